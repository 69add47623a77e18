"""Embeddings on disk: a mapped file of slots, and a record of what is whole in it. No torch.

A store is a folder named by a key of all that its embeddings depend on except the image; a slot in
it is known by the SHA-256 of the image file. So a changed image is a new one, the same image in two
places is one, and data sets can share a store. A slot counts once its record is there, and that is
written after the embedding has reached the disk: what a crash leaves behind is not believed.
"""

import fcntl
import mmap
import os
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.coco.images import ImageError
from samft.runtime.files import write_json
from samft.runtime.logs import GIB, format_gib

DIGEST_BYTES = 32
MARGIN_BYTES = GIB  # left free on the disk, for the run's own checkpoints
_DATA, _RECORDS, _META = "embeddings.bin", "records.bin", "meta.json"
_PAGE = 4096  # bytes; slots begin at pages, which two hosts can write side by side over NFS
_RECORD = np.dtype(
    [("digest", "u1", DIGEST_BYTES), ("height", "<i4"), ("width", "<i4"), ("crc", "<u4")]
)


@dataclass(frozen=True)
class Entry:
    """What a record says: which image is in a slot, and the size of its file's picture."""

    slot: int
    digest: bytes
    size: tuple[int, int]  # H, W, original px


class Store:
    """One folder of embeddings of one shape and type.

    Every rank writes embeddings, with `write` and `sync`; only rank 0 writes records, with
    `commit`, for entries that their writers have synced.
    """

    def __init__(self, folder: Path, *, shape: tuple[int, int, int], dtype: str) -> None:
        """Names a store; opens nothing yet.

        Args:
            folder: Where it is, or will be.
            shape: C, h, w of an embedding.
            dtype: `float16` or `float32`.
        """
        self.folder, self.shape, self.dtype = folder, shape, np.dtype(dtype)
        content = int(np.prod(shape)) * self.dtype.itemsize
        self.slot_bytes = -(-content // _PAGE) * _PAGE
        self._map: mmap.mmap | None = None
        self._file: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_map": None, "_file": None}  # a worker opens its own

    def create(self, description: dict[str, Any]) -> None:
        """Makes the folder, if there is none, and notes that it is in use now.

        Raises:
            OSError: It cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _META).exists():
            write_json(self.folder / _META, description)
        (self.folder / _DATA).touch()
        os.utime(self.folder / _META)

    def entries(self) -> dict[bytes, Entry]:
        """All whole embeddings, by the digest of their image."""
        try:
            content = (self.folder / _RECORDS).read_bytes()
            num_slots = (self.folder / _DATA).stat().st_size // self.slot_bytes
        except FileNotFoundError:
            return {}
        num_records = min(len(content) // _RECORD.itemsize, num_slots)
        found = {}
        for slot, record in enumerate(np.frombuffer(content, _RECORD, count=num_records)):
            entry = Entry(slot, record["digest"].tobytes(), (record["height"], record["width"]))
            # A record that was never written, or not to its end, has another checksum.
            if record["crc"] == _record(entry)["crc"]:
                found[entry.digest] = entry
        return found

    @property
    def num_records(self) -> int:
        """An upper bound of the number of entries, which costs nothing to find."""
        try:
            return (self.folder / _RECORDS).stat().st_size // _RECORD.itemsize
        except FileNotFoundError:
            return 0

    def write(self, slot: int, embedding: NDArray[np.floating]) -> None:
        """Writes an embedding, [C, h, w] of the store's type; it counts from `commit` on.

        Raises:
            OSError: The disk is full, say. Writing through the map would kill the process instead.
        """
        if self._file is None:
            self._file = os.open(self.folder / _DATA, os.O_WRONLY)
        assert embedding.shape == self.shape and embedding.dtype == self.dtype
        content = embedding.tobytes().ljust(self.slot_bytes, b"\0")
        _write_all(self._file, content, offset=slot * self.slot_bytes)

    def sync(self) -> None:
        """Returns when all that this process wrote is on the disk."""
        if self._file is not None:
            os.fsync(self._file)

    def commit(self, entries: Iterable[Entry]) -> None:
        """Records embeddings that have been synced by those who wrote them.

        Raises:
            OSError: The records cannot be written.
        """
        file = os.open(self.folder / _RECORDS, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            for entry in entries:
                content = _record(entry).tobytes()
                _write_all(file, content, offset=entry.slot * _RECORD.itemsize)
            os.fsync(file)
        finally:
            os.close(file)

    def close(self) -> None:
        """Ends writing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def open(self) -> None:
        """Maps the file, if it is not mapped yet and has anything in it."""
        if self._map is not None or not (self.folder / _DATA).stat().st_size:
            return
        with (self.folder / _DATA).open("rb") as file:
            # Held for as long as the map is: who has it mapped keeps it from being evicted.
            fcntl.flock(file, fcntl.LOCK_SH)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, slot: int) -> NDArray[np.floating]:
        """A copy of an embedding, [C, h, w], that was committed before the store was opened."""
        self.open()
        assert self._map is not None
        start = slot * self.slot_bytes
        # One request for all of it, where page faults would make one for every 128 KiB.
        self._map.madvise(mmap.MADV_WILLNEED, start, self.slot_bytes)
        flat = np.frombuffer(self._map, self.dtype, count=int(np.prod(self.shape)), offset=start)
        return flat.reshape(self.shape).copy()


def _record(entry: Entry) -> NDArray[np.void]:
    digest = np.frombuffer(entry.digest, np.uint8)
    crc = zlib.crc32(np.array([entry.slot, *entry.size], dtype="<i8").tobytes() + entry.digest)
    return np.array((digest, *entry.size, crc), dtype=_RECORD)


def _write_all(file: int, content: bytes, *, offset: int) -> None:
    written = 0
    while written < len(content):
        written += os.pwrite(file, memoryview(content)[written:], offset + written)


@dataclass(frozen=True)
class CachedEmbeddings:
    """The embeddings of the N images of a split, in the order of its subset.

    Attributes:
        stores: Of the images as they are and, if training flips, of the flipped ones.
        slots: int64 [N, number of stores]; -1 where the image cannot be used.
        sizes: int32 [N, 2], H, W of the files.
        bad_images: What is wrong with those that cannot be used, by position.
    """

    stores: tuple[Store, ...]
    slots: NDArray[np.int64]
    sizes: NDArray[np.int32]
    bad_images: dict[int, str]

    def size(self, i: int) -> tuple[int, int]:
        """H, W of the file of image i.

        Raises:
            ImageError: It cannot be used, as was found when it was to be encoded.
        """
        if i in self.bad_images:
            raise ImageError(self.bad_images[i])
        height, width = self.sizes[i].tolist()
        return height, width

    def read(self, i: int, *, flipped: bool) -> NDArray[np.floating]:
        """The embedding of image i, [C, h, w]."""
        return self.stores[int(flipped)].read(int(self.slots[i, int(flipped)]))


def make_room(folder: Path, *, own: set[str], needed: int, limit: int) -> str | None:
    """Deletes what has not been used longest until there is room for more. One process at a time.

    Args:
        folder: Of all stores.
        own: Names of the stores to keep.
        needed: Bytes to come.
        limit: Bytes that the folder may hold.

    Returns:
        Why there is no room, as the end of a sentence, and then nothing is deleted; else None.
    """
    sizes = {store: _disk_bytes(store) for store in folder.iterdir() if (store / _META).exists()}
    kept = sum(sizes[store] for store in sizes if store.name in own)
    free = shutil.disk_usage(folder).free
    others = sorted(
        (store for store in sizes if store.name not in own and not _is_in_use(store)),
        key=lambda store: (store / _META).stat().st_mtime,
    )
    used, evictable = sum(sizes.values()), sum(sizes[store] for store in others)
    if used - evictable + needed > limit:
        busy = f", and other runs use {format_gib(used - evictable - kept)} of it"
        return (
            f"it would hold {format_gib(kept + needed)}"
            f"{busy if used - evictable > kept else ''}, "
            f"and cache_max_gib allows {format_gib(limit)}"
        )
    if needed and needed + MARGIN_BYTES > free + evictable:
        return (
            f"{format_gib(needed)} more are needed, and of the "
            f"{format_gib(free + evictable)} that are free there "
            f"{format_gib(MARGIN_BYTES)} are left to checkpoints"
        )
    for store in others:
        if used + needed <= limit and needed + MARGIN_BYTES <= free:
            break
        shutil.rmtree(store)
        used, free = used - sizes[store], free + sizes[store]
    return None


def _disk_bytes(store: Path) -> int:
    # What is taken up of the disk: slots that are not written yet are holes.
    return sum(path.stat().st_blocks * 512 for path in store.iterdir())


def _is_in_use(store: Path) -> bool:
    try:
        with (store / _DATA).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except OSError:
        return True
