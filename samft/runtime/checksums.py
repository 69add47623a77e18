"""CRC-32 checksums of the files in a folder: a damaged file is noticed before it is used.

They notice what disks, copies and crashes do, not what somebody does on purpose. CRC-32 is the
fastest that is everywhere: 2.7 GB a second of a core, where BLAKE2 and SHA-256 have 0.6 and 1.4.
"""

import os
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path

from samft.runtime.files import CHUNK_BYTES, write_text

CHECKSUMS = "checksums.txt"  # in the folder, beside the files


def open_regular(path: Path) -> int:
    """A descriptor for reading a file that is no link, and that no read would wait for.

    Raises:
        OSError: It does not exist, cannot be read, or is a link, a folder, a pipe or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return descriptor


def checksum_of(path: Path) -> int:
    """The CRC-32 of a file's content.

    Raises:
        OSError: See `open_regular`.
    """
    checksum, buffer = 0, bytearray(CHUNK_BYTES)
    with open(open_regular(path), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(memoryview(buffer)[:count], checksum)
    return checksum


def write_checksums(folder: Path, names: Iterable[str], *, identity: str) -> None:
    """Writes the checksums of files, for `is_intact`.

    Args:
        folder: Where the files are.
        names: Of the files.
        identity: What the folder holds; one that took its place is not intact.
    """
    write_text(folder / CHECKSUMS, _list_checksums(folder, names, identity))


def is_intact(folder: Path, names: Iterable[str], *, identity: str) -> bool:
    """Whether all files are there, and what `write_checksums` was called for.

    Args:
        folder: See `write_checksums`.
        names: See `write_checksums`.
        identity: See `write_checksums`.
    """
    try:
        with open(open_regular(folder / CHECKSUMS), "rb") as file:
            expected = file.read(CHUNK_BYTES)
        # Compared as a whole: nothing that is in a damaged file is ever interpreted.
        return expected == _list_checksums(folder, names, identity).encode()
    except OSError:
        return False


def _list_checksums(folder: Path, names: Iterable[str], identity: str) -> str:
    lines = [f"{checksum_of(folder / name):08x} {name}\n" for name in names]
    return "".join([f"{identity}\n", *lines])
