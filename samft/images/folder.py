"""Finds image files under a folder by the names that an annotation file gives. Imports no torch."""

import difflib
import errno
import hashlib
import os
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from samft.images.names import (
    SPELLINGS,
    are_of_other_folders,
    common_parts,
    is_image_name,
    numbers_in,
    split_name,
)

# Codes of `problems.KINDS`.
RESPELLED = "image-name-mended"  # found under another spelling
MISSING, OUTSIDE = "image-missing", "image-outside"
AMBIGUOUS, NOT_A_FILE = "image-ambiguous", "image-not-a-file"
UNREADABLE = "image-unreadable"

_FILE, _LINK, _FOLDER, _SPECIAL = "flds"  # kinds of entries in a listing
_CODES = {_FILE: "", _FOLDER: UNREADABLE, _SPECIAL: NOT_A_FILE}
_MAX_FOLDERS = 10_000  # searched for a name that is not where it says
_MAX_OFFERED = 3  # names that a near one is looked for, since that compares with every file
_NO_DATA = ("__MACOSX", "@eaDir")  # folders that systems leave among the data
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class ImageFolder:
    """Finds image files by the names in an annotation file.

    Each folder is listed once, since a system call per file takes minutes on a network disk. Other
    folders than those that names say are listed only if a file is not where its name says.

    Attributes:
        hints: From names that were not found to what a user should know about them.
    """

    def __init__(
        self, folder: Path, *, root: Path | None = None, allow_links: Sequence[Path] = ()
    ) -> None:
        """Lists no folder yet.

        Args:
            folder: What file names are relative to.
            root: The dataset's folder; symbolic links may lead to anywhere below it or `folder`.
            allow_links: Other folders that symbolic links and file names may lead to; `/` is for
                links alone.
        """
        self.folder = folder
        self.hints: dict[str, str] = {}
        roots = [path for path in (folder, root, *allow_links) if path is not None]
        self._allowed = [path.resolve() for path in roots]
        # Each folder without links, and the ways in which the path of a file in it may begin.
        self._own = [
            (spelled.parts[1:], path.resolve().parts[1:])
            for path in roots
            if len(path.parts) > 1  # not "/", which is for links alone
            for spelled in (path.absolute(), path.resolve())
        ]
        self._listings: dict[str, dict[str, str]] = {}  # name -> kind
        self._unreadable: dict[str, str] = {}  # folders that cannot be listed -> why
        self._pools: dict[str, Path] = {}  # the folders that refused links lead to, by name

    def image_names(self, suffixes: Collection[str]) -> list[str]:
        """The files that lie directly in the folder, by their suffixes, sorted.

        Args:
            suffixes: With their dots, in lower case.
        """
        # macOS leaves files such as "._a.jpg" beside the image "a.jpg".
        return sorted(
            name
            for name, kind in self._list_folder("").items()
            if kind != _FOLDER
            and not name.startswith(".")
            and Path(name).suffix.lower() in suffixes
        )

    def find(self, name: str) -> tuple[str, str]:
        """As `find_all`, for one name."""
        return self.find_all([name])[name]

    def find_all(self, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Finds the files of all names of an annotation file, also under other spellings.

        Other spellings are Windows separators, a leading split name or a folder `images`, letter
        case, Unicode forms, percent-encoding, `.jpeg` for `.jpg`, and what Label Studio and
        Roboflow add to names. A name that points to another place (`..`, an absolute path, a URL, a
        folder that is not there) is not followed; the file of that name inside the folder is taken
        where there is just one, and no other name means it.

        Args:
            names: As in the annotation file.

        Returns:
            By name: the name relative to the folder, and a code: '' where the file has that very
            name, `RESPELLED`, or why it cannot be used: `MISSING`, `OUTSIDE` for one that leaves
            the data folder by its name or a symbolic link, `AMBIGUOUS`, `NOT_A_FILE`.
        """
        places = {name: self._find_where_it_says(name) for name in names}
        lost = [name for name, (path, _) in places.items() if path == ""]
        if lost:
            taken = {path for path, _ in places.values()}
            places.update(self._find_elsewhere(lost, taken))
        self._name_pools(places)
        return places

    def _find_where_it_says(self, name: str) -> tuple[str, str]:
        # An empty name where there is no such file, and the code for it.
        parent, _, last = name.rpartition("/")
        if self._listings.get(parent, {}).get(last) == _FILE:  # nearly all names of nearly all sets
            return name, ""
        parts, outside = split_name(name)
        direct = "/".join(parts)
        if outside:
            inside = self._relative_to_own(name, parts)
            return ("", OUTSIDE) if inside is None else self._check_kind(name, inside)
        # A backslash may be a part of a file's name: some unpack Windows archives so.
        candidates = [direct] if ".." in name else [str(PurePosixPath(name)), direct]
        candidates.append(f"images/{direct}")
        if len(parts) > 1 and parts[0] == self.folder.name:
            rest = "/".join(parts[1:])
            candidates += [rest, f"images/{rest}"]
        for candidate in candidates:
            if self._exists(candidate):
                return self._check_kind(name, candidate)
        return "", MISSING

    def _relative_to_own(self, name: str, parts: tuple[str, ...]) -> str | None:
        # Of an absolute path or a path with `..` that lies inside the data folder after all.
        here, _ = self._own[0]
        if name.startswith(("/", "file://")):
            wholes = [parts, tuple(unquote(part) for part in parts)]
        elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):  # a drive, or the URL of another place
            return None
        else:
            joined = os.path.normpath("/" + "/".join([*here, name.replace("\\", "/")]))
            wholes = [Path(joined).parts[1:]]
        for whole in wholes:
            for own, resolved in self._own:
                if whole[: len(own)] == own:
                    target = _absolute([*resolved, *whole[len(own) :]])
                    inside = os.path.relpath(target, _absolute(self._own[0][1]))
                    if self._exists(inside):
                        return inside
        return None

    def _exists(self, name: str) -> bool:
        parent, _, last = name.rpartition("/")
        return last in self._list_folder(parent)

    def _check_kind(self, name: str, path: str) -> tuple[str, str]:
        # What `find_all` returns for a name whose file, or what looks like it, is at `path`.
        parent, _, last = path.rpartition("/")
        kind = self._list_folder(parent)[last]
        if kind == _LINK:
            code = self._follow_link(name, self.folder / path)
        else:
            code = _CODES[kind]
        if code:
            return name, code
        return path, "" if path == name else RESPELLED

    def _follow_link(self, name: str, path: Path) -> str:
        try:
            target = path.resolve(strict=False)
            mode = target.stat().st_mode
        except FileNotFoundError:
            self.hints[name] = f"a link to {target}, which is not there"
            return MISSING
        except (OSError, RuntimeError):  # a loop of links
            return OUTSIDE
        kind = _FILE if stat.S_ISREG(mode) else _FOLDER if stat.S_ISDIR(mode) else _SPECIAL
        if kind != _SPECIAL and not self._is_inside(target):
            self._pools[name] = target.parent
            return OUTSIDE
        return _CODES[kind]

    def _is_inside(self, target: Path) -> bool:
        return any(target.is_relative_to(folder) for folder in self._allowed)

    def _name_pools(self, places: dict[str, tuple[str, str]]) -> None:
        if self._pools:
            for name, (_, code) in places.items():
                if code == OUTSIDE and name in self._pools:
                    pool = _common_folder(self._pools.values(), self._pools[name])
                    self.hints[name] = f"behind a link: --allow_links {pool} opens it"

    # Names that are not where they say.

    def _find_elsewhere(self, names: list[str], taken: set[str]) -> dict[str, tuple[str, str]]:
        fits = {name: self._fitting_paths(*split_name(name)) for name in names}
        wanted_by = defaultdict(set)
        for name, paths in fits.items():
            for path in paths if len(paths) == 1 else ():
                wanted_by[path].add(tuple(SPELLINGS[1](part) for part in split_name(name)[0]))
        return {
            name: self._choose_fit(name, paths, taken=taken, wanted_by=wanted_by)
            for name, paths in fits.items()
        }

    def _choose_fit(
        self,
        name: str,
        paths: list[str],
        *,
        taken: set[str],
        wanted_by: dict[str, set[tuple[str, ...]]],
    ) -> tuple[str, str]:
        parts, outside = split_name(name)
        code = OUTSIDE if outside else MISSING
        if why := self._why_unreadable("/".join(parts[:-1])):
            self.hints[name] = why
            return name, code if outside else UNREADABLE
        if len(paths) > 1:
            self.hints[name] = f"{_listed(paths)} fit"
            return name, AMBIGUOUS
        if not paths:
            if not self.folder.is_dir():
                self.hints[name] = f"there is no folder {self.folder}"
            elif near := self._near_name(parts[-1], taken):
                self.hints[name] = f"did you mean {near}?"
            return name, code
        path = paths[0]
        if not (outside or self._is_respelled(parts, path)) and (
            self._holds_images(parts[:-1]) or are_of_other_folders(parts, _parts_of(path))
        ):
            self.hints[name] = f"there is {path}"
            return name, code
        if path in taken or len(wanted_by[path]) > 1:
            self.hints[name] = f"{path} fits, but other entries mean it, too"
            return name, AMBIGUOUS
        return self._check_kind(name, path)

    def _fitting_paths(self, parts: tuple[str, ...], outside: bool) -> list[str]:
        # The files whose names fit best, at the strictest level where any does.
        num_levels = len(SPELLINGS) - (outside or is_image_name(parts[-1]))
        for level, spell in enumerate(SPELLINGS[:num_levels]):
            paths = self._by_spelling(level).get(spell(parts[-1]))
            if paths is not None and len(paths) == 1:
                return paths
            if paths:
                shared = [common_parts(parts, _parts_of(path), level) for path in paths]
                best = max(shared)
                return [path for path, num in zip(paths, shared, strict=True) if num == best]
        return []

    def _is_respelled(self, parts: tuple[str, ...], path: str) -> bool:
        # Whether a path is that of the name, but for the spelling of its parts.
        prefixes = ("images", self.folder.name)
        own, other = (
            tuple(SPELLINGS[2](part) for part in each[:-1] if part not in prefixes)
            for each in (parts, _parts_of(path))
        )
        return own == other

    def _holds_images(self, parents: tuple[str, ...]) -> bool:
        # A folder with images is taken at its word: what is not in there is missing, and a file of
        # the same name in another folder is another image.
        listing = self._list_folder("/".join(parents))
        return any(is_image_name(name) for name, kind in listing.items() if kind != _FOLDER)

    def _why_unreadable(self, parent: str) -> str:
        for place in (parent, ""):
            if place in self._unreadable:
                return f"{self.folder / place} cannot be listed: {self._unreadable[place]}"
        return ""

    def _near_name(self, name: str, taken: set[str]) -> str | None:
        if len(self.hints) >= _MAX_OFFERED:
            return None
        for near in difflib.get_close_matches(name, self._by_spelling(0), n=5, cutoff=0.75):
            free = [path for path in self._by_spelling(0)[near] if path not in taken]
            if free and numbers_in(near) == numbers_in(name):
                return free[0]
        return None

    def _by_spelling(self, level: int) -> dict[str, list[str]]:
        # The paths of all files, by the spelling of their names.
        if level not in self._spelled:
            spelled = defaultdict(list)
            for path in self._all_files:
                spelled[SPELLINGS[level](_parts_of(path)[-1])].append(path)
            self._spelled[level] = dict(spelled)
        return self._spelled[level]

    @cached_property
    def _spelled(self) -> dict[int, dict[str, list[str]]]:
        return {}

    @cached_property
    def _all_files(self) -> list[str]:
        # Without what only pretends to be data; none where there are too many folders to search.
        paths, folders = [], [""]
        for parent in folders:
            if len(folders) > _MAX_FOLDERS:
                return []
            for name, kind in self._list_folder(parent).items():
                path = f"{parent}/{name}" if parent else name
                if name.startswith(".") or name in _NO_DATA:
                    continue
                if kind == _FOLDER:
                    folders.append(path)
                elif is_image_name(name):
                    paths.append(path)
        return sorted(paths)

    # Listings.

    def _list_folder(self, parent: str) -> dict[str, str]:
        if parent not in self._listings:
            listing: dict[str, str] = {}
            try:
                listing = self._read_folder(self.folder / parent)
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    self._unreadable[parent] = str(error.strerror)
            except (ValueError, RuntimeError):  # a name that no folder can have, a loop of links
                pass
            self._listings[parent] = listing
        return self._listings[parent]

    def _read_folder(self, path: Path) -> dict[str, str]:
        # Every file of a folder outside is treated as a link that leads outside.
        outside = not self._is_inside(path.resolve())
        with os.scandir(path) as entries:
            return {one.name: _LINK if outside else _kind_of(one) for one in entries}

    def listing_digests(self) -> dict[str, str]:
        """A hash of the listing of each folder that was searched, for `has_changed`."""
        return {parent: _hash_listing(listing) for parent, listing in self._listings.items()}

    def has_changed(self, digests: dict[str, str]) -> bool:
        """Whether files have come or gone since `listing_digests` was called."""
        return any(
            _hash_listing(self._list_folder(parent)) != digest for parent, digest in digests.items()
        )


def _kind_of(entry: "os.DirEntry[str]") -> str:
    if entry.is_file(follow_symlinks=False):
        return _FILE
    if entry.is_symlink():
        return _LINK
    return _FOLDER if entry.is_dir(follow_symlinks=False) else _SPECIAL


def _hash_listing(listing: dict[str, str]) -> str:
    lines = (f"{name}\0{kind}" for name, kind in sorted(listing.items()))
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _parts_of(path: str) -> tuple[str, ...]:
    # Of a file that is there; a Windows archive may have been unpacked into one with backslashes.
    return tuple(path.replace("\\", "/").split("/"))


def _absolute(parts: Iterable[str]) -> str:
    return "/" + "/".join(parts)


def _common_folder(folders: Iterable[Path], own: Path) -> Path:
    # The pool that refused links lead to: what their folders have in common, if that says anything.
    common = Path(os.path.commonpath(list(folders)))
    return common if len(common.parts) > 2 else own


def _listed(paths: list[str]) -> str:
    if len(paths) <= _MAX_OFFERED:
        return " and ".join(paths)
    return f"{', '.join(paths[:_MAX_OFFERED])} and {len(paths) - _MAX_OFFERED} more"
