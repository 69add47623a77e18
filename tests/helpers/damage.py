"""What disks, broken copies and people do to one file."""

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def _flip(path: Path, generator: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)
    path.write_bytes(content)


def _truncate(path: Path, generator: np.random.Generator) -> None:
    os.truncate(path, generator.integers(max(path.stat().st_size, 1)))


def _zero(path: Path, generator: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    start, end = np.sort(generator.integers(len(content) + 1, size=2)).tolist()
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def _swap(path: Path, generator: np.random.Generator) -> None:
    others = sorted(one for one in path.parent.iterdir() if one.is_file() and one != path)
    if others:
        other, aside = others[generator.integers(len(others))], path.with_name("aside")
        path.rename(aside)
        other.rename(path)
        aside.rename(other)


def _delete(path: Path, generator: np.random.Generator) -> None:
    path.unlink()


def _garbage(path: Path, generator: np.random.Generator) -> None:
    path.write_bytes(generator.bytes(int(generator.integers(1, 5000))))


# Those of a disk or a copy; a file may also be changed by none of them, where it is empty, say.
FAULTS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "flip": _flip,
    "truncate": _truncate,
    "zero": _zero,
    "swap": _swap,
    "delete": _delete,
    "garbage": _garbage,
}


def _folder(path: Path, generator: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("of somebody")


def _link(path: Path, generator: np.random.Generator) -> None:
    copy = path.with_name(path.name + ".copy")
    shutil.copy(path, copy)
    path.unlink()
    path.symlink_to(copy)


def _dangling_link(path: Path, generator: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _pipe(path: Path, generator: np.random.Generator) -> None:
    path.unlink()
    os.mkfifo(path)


# Something else where the file was.
REPLACEMENTS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "folder": _folder,
    "link": _link,
    "dangling link": _dangling_link,
    "pipe": _pipe,
}


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond this; Python gets an OSError after a part is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
