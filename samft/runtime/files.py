"""Files that matter: written whole or not at all. Imports no torch."""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

CHUNK_BYTES = 1 << 20


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part.

    Args:
        path: The file; its folder must exist.
        write: Given the open file, writes the content.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    with atomic_replacement(path, write):
        pass


@contextmanager
def atomic_replacement(path: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """As `write_atomically`, with something to do when the new content is safe, but not in place.

    Args:
        path: The file; its folder must exist.
        write: Given the open file, writes the content.

    Yields:
        A file with the new content, on the disk; it takes the place of the old when the block ends.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)
        yield part
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def staging_path(target: Path) -> Iterator[Path]:
    """A place to write a file or a whole folder, which becomes `target` when the block ends well.

    Args:
        target: Where it is to be; its parent must exist. A file or folder there is replaced.

    Yields:
        A path of the same name on the same disk, where nothing is yet.

    Raises:
        OSError: The disk is full or the folder cannot be written; what was there is untouched.
    """
    place = tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{target.name}.", suffix=".part", ignore_cleanup_errors=True
    )
    with place as folder:
        part, earlier = Path(folder) / target.name, Path(folder) / "earlier"
        yield part
        for path in (part, *part.rglob("*")):
            if path.is_file():
                path.chmod(0o644)
            _sync(path)
        if target.is_dir():  # a folder that holds something cannot be replaced in one go
            target.rename(earlier)
        try:
            os.replace(part, target)
        except OSError:
            if earlier.exists():
                earlier.rename(target)
            raise
        _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, see `write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, indented, see `write_atomically`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def cache_folder() -> Path:
    """Where downloads and indexes are kept: `SAMFT_CACHE`, else below `XDG_CACHE_HOME`."""
    if os.environ.get("SAMFT_CACHE"):
        return Path(os.environ["SAMFT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samft"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_digests(sidecar: Path) -> list[str]:
    """The SHA-256 that a checkpoint may have, as the JSON file beside it says; none if unreadable.

    A list under `sha256` names several, of which the file has one.
    """
    try:
        found = json.loads(sidecar.read_text())["sha256"]
        return [found] if isinstance(found, str) else [str(digest) for digest in found]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def matches_sidecar(path: Path, sidecar: Path) -> bool:
    """Whether a checkpoint is what its sidecar says; a sidecar without a hash says nothing."""
    known = read_digests(sidecar)
    return not known or sha256_of(path) in known


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds a lock that only one process of this node can hold at a time, by a file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> TextIO | None:
    """Takes a lock that one process can hold at a time, for as long as the file stays open.

    Returns:
        The open file; None if another has the lock.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks: nobody can be kept out
        pass
    return file
