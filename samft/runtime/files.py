"""Atomic writes, file locks and SHA-256 digests. Imports no torch."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file in one step: a reader, or a crash, finds the old or the new content, no part.

    Args:
        path: The file; its folder must exist.
        write: Writes the content into the open file it is given.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    with atomic_replacement(path, write):
        pass


@contextmanager
def atomic_replacement(path: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """As `write_atomically`, with a block between writing the new content and replacing the old.

    Args:
        path: The file; its folder must exist.
        write: Writes the content into the open file it is given.

    Yields:
        A temporary file with the new content, flushed to disk; it replaces `path` at the end of the
        block, unless that raises.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    # In the same folder: os.replace is atomic only within one file system.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)  # mkstemp makes files that only their owner can read
        yield part
        os.replace(part, path)
        _flush_to_disk(path.parent)  # the new name, which a power failure could undo
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a failed write names no file
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def staging_path(target: Path) -> Iterator[Path]:
    """A path for a new file or folder, which replaces `target` at the end of the block.

    Args:
        target: Its parent must exist. An existing file or folder is replaced.

    Yields:
        A path of the same name on the same disk, where nothing exists yet. If the block raises,
        what was written there is deleted, and `target` is untouched.

    Raises:
        OSError: The disk is full or the folder cannot be written; `target` is untouched.
    """
    staging = tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{target.name}.", suffix=".part", ignore_cleanup_errors=True
    )
    with staging as folder:
        part, replaced = Path(folder) / target.name, Path(folder) / "replaced"
        yield part
        for path in (part, *part.rglob("*")):
            if path.is_file():
                path.chmod(0o644)
            _flush_to_disk(path)
        if target.is_dir():  # os.replace replaces files and empty folders only
            target.rename(replaced)
        try:
            os.replace(part, target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        _flush_to_disk(target.parent)


def _flush_to_disk(path: Path) -> None:
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


def read_json(path: Path) -> Any:
    """Reads a JSON file that may be damaged, or anything else.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_bytes().decode())
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def unused_path(path: Path) -> Path:
    """The path itself, or with the first number behind it that makes it free."""
    candidate, number = path, 1
    while candidate.exists() or candidate.is_symlink():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def cache_folder() -> Path:
    """The folder of downloads and indexes: `SAMFT_CACHE`, else in `XDG_CACHE_HOME`.

    Raises:
        OSError: There is no home folder to keep it in, and no private temporary folder.
    """
    if os.environ.get("SAMFT_CACHE"):
        return Path(os.environ["SAMFT_CACHE"]).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samft"
    except RuntimeError:  # a container's user without an entry in passwd, and without HOME
        return private_temporary_folder()


def private_temporary_folder() -> Path:
    """A folder in the shared temporary folder that no other user can write or read.

    What it holds is trusted later, and anyone may make a folder, or a link, of this name first.

    Raises:
        OSError: It cannot be made, or it is a link or another user's.
    """
    folder = Path(tempfile.gettempdir()) / f"samft-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it is a link or belongs to another user", str(folder))
    if status.st_mode & 0o022:  # while it was open to others, they may have put anything into it
        raise PermissionError(errno.EPERM, "other users may write into it", str(folder))
    folder.chmod(0o700)
    return folder


class NotAFileError(OSError):
    """A pipe, socket or device in the place of a file."""


def open_file(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Opens a file to read it, and never waits for the other end of a pipe.

    Args:
        path: The file.
        buffering: See `open`.

    Raises:
        NotAFileError: It is a pipe, a socket or a device.
        OSError: It cannot be opened.
    """
    return open(path, "rb", buffering, opener=_open_at_once)


def _open_at_once(path: str, flags: int) -> int:
    no_file = errno.EINVAL, "it is a pipe, socket or device, and no file", path
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise NotAFileError(*no_file) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        os.close(descriptor)
        raise NotAFileError(*no_file)
    return descriptor


def read_file(path: Path) -> bytes:
    """All of a file; see `open_file`."""
    with open_file(path) as file:
        return file.read()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; see `open_file`."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_digests(sidecar: Path) -> list[str]:
    """The SHA-256 digests that a sidecar allows for its checkpoint; none if it is unreadable.

    `sha256` in the JSON is one digest, or a list of them while the checkpoint is being replaced.
    """
    try:
        digests = read_json(sidecar)["sha256"]
        return [digests] if isinstance(digests, str) else [str(digest) for digest in digests]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def matches_sidecar(path: Path, sidecar: Path) -> bool:
    """Whether the file's SHA-256 matches its sidecar; True if the sidecar has none."""
    digests = read_digests(sidecar)
    return not digests or sha256_of(path) in digests


@contextmanager
def file_lock(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds a lock on a file, between the processes of this host; waits for it.

    Args:
        path: The file; it is created, and its content does not matter.
        shared: Whether others may hold it as well, shared too.
    """
    with _open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> BinaryIO | None:
    """Takes an exclusive lock on a file, without waiting; it is held until the file is closed.

    Returns:
        The open file; None if another process holds the lock.
    """
    file = _open_lock(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks, where no process can be kept out
        pass
    return file


def _open_lock(path: Path) -> BinaryIO:
    # Without emptying it or following a link: what lies there may be somebody's file. For reading
    # and writing, as NFS demands for locks of both kinds, and as a pipe can be opened at once.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    file = open(descriptor, "rb", buffering=0)
    _locks.add(file)
    return file


# A lock is held until all processes that have inherited the open file have closed it: a loader's
# worker would keep it for the seconds by which it outlives a run that was killed.
_locks: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def _close_inherited_locks() -> None:
    for file in list(_locks):
        file.close()


os.register_at_fork(after_in_child=_close_inherited_locks)
