"""Finds image files under a folder by the names that an annotation file gives. Imports no torch."""

import hashlib
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

RESPELLED = "image-name-mended"  # code of a file that is found under another spelling


class ImageFolder:
    """Finds image files by the names in an annotation file.

    Each folder is listed once, since a system call per file takes minutes on a network disk.
    """

    def __init__(self, folder: Path, *, root: Path | None = None) -> None:
        """Lists no folder yet.

        Args:
            folder: What file names are relative to.
            root: The dataset's folder; symbolic links may lead to anywhere below it or `folder`.
        """
        self.folder = folder
        self._allowed = [path.resolve() for path in (folder, root) if path is not None]
        self._listings: dict[str, dict[str, bool]] = {}  # name -> whether it is a symbolic link
        self._by_lower: dict[str, dict[str, str]] = {}

    def find(self, name: str) -> tuple[str, str]:
        """Finds a file, also under another spelling of its name.

        Other spellings are Windows separators, a leading split name, a folder `images` in between
        and other letter case.

        Args:
            name: As in the annotation file.

        Returns:
            The name relative to the folder, and a code: '' where the file has that very name,
            `RESPELLED`, `image-missing`, or `image-outside` for one that leaves the data folder by
            `..`, an absolute path or a symbolic link.
        """
        posix, windows = PurePosixPath(name), PureWindowsPath(name)
        parts = (*posix.parts, *windows.parts)
        if ".." in parts or posix.is_absolute() or windows.anchor or "\0" in name:
            return name, "image-outside"
        plain = windows.as_posix()
        candidates = [str(posix), plain, f"images/{plain}"]
        head, _, rest = plain.partition("/")
        if rest and head == self.folder.name:
            candidates += [rest, f"images/{rest}"]
        for candidate in candidates:
            if self._exists(candidate):
                return self._refuse_link_outside(
                    candidate, code="" if candidate == name else RESPELLED
                )
        for candidate in candidates:
            near = self._other_case(candidate)
            if near is not None:
                return self._refuse_link_outside(near, code=RESPELLED)
        return name, "image-missing"

    def _exists(self, name: str) -> bool:
        parent, _, last = name.rpartition("/")
        return last in self._list_folder(parent)

    def _other_case(self, name: str) -> str | None:
        parent, _, last = name.rpartition("/")
        if parent not in self._by_lower:
            self._by_lower[parent] = {one.casefold(): one for one in self._list_folder(parent)}
        near = self._by_lower[parent].get(last.casefold())
        return near and f"{parent}/{near}".lstrip("/")

    def _refuse_link_outside(self, name: str, *, code: str) -> tuple[str, str]:
        parent, _, last = name.rpartition("/")
        if self._list_folder(parent)[last] and not self._leads_inside(self.folder / name):
            return name, "image-outside"
        return name, code

    def _leads_inside(self, path: Path) -> bool:
        try:
            target = path.resolve(strict=False)
        except (OSError, RuntimeError):  # a loop of links
            return False
        return any(target.is_relative_to(folder) for folder in self._allowed)

    def _list_folder(self, parent: str) -> dict[str, bool]:
        if parent not in self._listings:
            path = self.folder / parent
            listing = {}
            if path.is_dir():
                # Every file of a folder outside is treated as a link that leads outside.
                outside = not self._leads_inside(path)
                with os.scandir(path) as entries:
                    listing = {one.name: outside or one.is_symlink() for one in entries}
            self._listings[parent] = listing
        return self._listings[parent]

    def listing_digests(self) -> dict[str, str]:
        """A hash of the listing of each folder that was searched, for `has_changed`."""
        return {parent: _hash_listing(listing) for parent, listing in self._listings.items()}

    def has_changed(self, digests: dict[str, str]) -> bool:
        """Whether files have come or gone since `listing_digests` was called."""
        return any(
            _hash_listing(self._list_folder(parent)) != digest for parent, digest in digests.items()
        )


def _hash_listing(listing: dict[str, bool]) -> str:
    lines = (f"{name}\0{link}" for name, link in sorted(listing.items()))
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
