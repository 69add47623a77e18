"""Embeddings on disk: a file of slots, and a file of records that says which of them count.

A store is a folder, named by a key of all that its embeddings depend on except the image; in it, an
embedding is known by the SHA-256 of the image file. So a changed image gets a new embedding, copies
of an image share one, and datasets can share a store. Imports no torch.

Why not LMDB: several hosts may write a store at once over NFS, where LMDB does not work. Here, each
embedding has pages of its own in the file, and only one process writes records.

Crash safety: an embedding counts once it has a record with a valid checksum, and the record is
written after the embedding has been synced. What a crash leaves half-written has no such record.
Damage: the record holds the checksum of the embedding, which every read verifies.
"""

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from samft.errors import DataError
from samft.images.files import ImageError
from samft.runtime.checksums import open_regular
from samft.runtime.files import write_json
from samft.runtime.logs import GIB, LOGGER, format_gib

DIGEST_BYTES = 32
MARGIN_BYTES = GIB  # left free on the disk, for the run's own checkpoints
_DATA, _RECORDS, _META = "embeddings.bin", "records.bin", "meta.json"
_PAGE_BYTES = 4096  # slots begin at pages: over NFS two hosts can write neighbouring pages at once
_RECORD = np.dtype(
    [("digest", "u1", DIGEST_BYTES), ("height", "<i4"), ("width", "<i4")]
    + [("checksum", "<u4"), ("crc", "<u4")]  # of the embedding, and of the record itself
)


@dataclass(frozen=True)
class EmbeddingRecord:
    """Which image the embedding in a slot is of."""

    slot: int
    digest: bytes  # SHA-256 of the image file
    size: tuple[int, int]  # H, W of the image, original px
    checksum: int  # `checksum_embedding` of the embedding


def checksum_embedding(embedding: NDArray[np.floating]) -> int:
    """The CRC-32 of an embedding's bytes."""
    return zlib.crc32(np.ascontiguousarray(embedding).data)


class EmbeddingStore:
    """One folder of embeddings of one shape and type.

    All ranks write embeddings, with `write` and `sync`. Only rank 0 writes records, with `commit`,
    of embeddings that the ranks that wrote them have synced.
    """

    def __init__(self, folder: Path, *, shape: tuple[int, int, int], dtype: str) -> None:
        """Describes a store; touches no file.

        Args:
            folder: Where it is, or will be created.
            shape: C, h, w of an embedding.
            dtype: `float16` or `float32`.
        """
        self.folder, self.shape, self.dtype = folder, shape, np.dtype(dtype)
        num_bytes = int(np.prod(shape)) * self.dtype.itemsize
        self.slot_bytes = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self._reader: BinaryIO | None = None
        self._descriptor: int | None = None  # for writing

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None, "_descriptor": None}  # a loader worker opens its own

    def create(self, metadata: dict[str, Any]) -> None:
        """Creates the folder, or what is missing of it, and marks it as used now.

        Args:
            metadata: What the embeddings depend on, for people to read.

        Raises:
            OSError: It cannot be written.
        """
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            LOGGER.warning("%s is no folder of embeddings: it is deleted", self.folder)
            self.folder.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (_DATA, _RECORDS, _META):
            _delete_unless_regular(self.folder / name)
        if not _holds_json(self.folder / _META, metadata):
            write_json(self.folder / _META, metadata)
        (self.folder / _DATA).touch()
        os.utime(self.folder / _META)  # `evict_unused_stores` goes by this time

    def read_records(self) -> dict[bytes, EmbeddingRecord]:
        """The records of all whole embeddings, by the digests of their images."""
        try:
            with open(open_regular(self.folder / _RECORDS), "rb") as file:
                content = file.read()
            num_slots = (self.folder / _DATA).stat().st_size // self.slot_bytes
        except OSError:
            return {}
        # A file of records that is longer than the data is a copy that was broken off, say.
        num_records = min(len(content) // _RECORD.itemsize, num_slots)
        records = {}
        for slot, encoded in enumerate(np.frombuffer(content, _RECORD, count=num_records)):
            size = int(encoded["height"]), int(encoded["width"])
            checksum = int(encoded["checksum"])
            record = EmbeddingRecord(slot, encoded["digest"].tobytes(), size, checksum)
            # Never written (a hole in the file), or written in part only: the checksum differs.
            if encoded["crc"] == self._encode_record(record)["crc"]:
                records[record.digest] = record
        return records

    @property
    def num_records(self) -> int:
        """An upper bound of the number of embeddings, from the file size alone."""
        try:
            return (self.folder / _RECORDS).stat().st_size // _RECORD.itemsize
        except OSError:
            return 0

    def write(self, slot: int, embedding: NDArray[np.floating]) -> None:
        """Writes an embedding [C, h, w] of the store's type; it counts only after `commit`.

        Raises:
            OSError: For example, the disk is full.
        """
        # Not through the map: there, a full disk would kill the process with SIGBUS.
        if self._descriptor is None:
            self._descriptor = os.open(self.folder / _DATA, os.O_WRONLY)
        assert embedding.shape == self.shape and embedding.dtype == self.dtype
        content = embedding.tobytes().ljust(self.slot_bytes, b"\0")
        _write_fully(self._descriptor, content, offset=slot * self.slot_bytes)

    def sync(self) -> None:
        """Returns when everything that this process wrote is on the disk."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def commit(self, records: Iterable[EmbeddingRecord]) -> None:
        """Records embeddings that the processes that wrote them have synced.

        Raises:
            OSError: The records cannot be written.
        """
        self._write_records({one.slot: self._encode_record(one).tobytes() for one in records})

    def forget(self, slots: Iterable[int]) -> None:
        """Takes the records of embeddings away, which then count as missing.

        Raises:
            OSError: The records cannot be written.
        """
        self._write_records({slot: bytes(_RECORD.itemsize) for slot in slots})

    def _write_records(self, by_slot: dict[int, bytes]) -> None:
        file = os.open(self.folder / _RECORDS, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            for slot, content in by_slot.items():
                _write_fully(file, content, offset=slot * _RECORD.itemsize)
            os.fsync(file)
        finally:
            os.close(file)

    def _encode_record(self, record: EmbeddingRecord) -> NDArray[np.void]:
        digest = np.frombuffer(record.digest, np.uint8)
        # The slot and the store are part of the checksum: a record does not count where it was
        # moved in the file, nor in the file of another store.
        numbers = np.array([record.slot, *record.size, record.checksum], dtype="<i8").tobytes()
        crc = zlib.crc32(self.folder.name.encode() + numbers + record.digest)
        return np.array((digest, *record.size, record.checksum, crc), dtype=_RECORD)

    def close(self) -> None:
        """Closes the file that embeddings are written to; it can still be read."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def open(self) -> None:
        """Opens the embeddings for reading, unless that is done.

        Raises:
            OSError: There is no file of embeddings.
        """
        if self._reader is not None:
            return
        file = open(open_regular(self.folder / _DATA), "rb", buffering=0)
        # While the file is open, `evict_unused_stores` does not delete the store.
        fcntl.flock(file, fcntl.LOCK_SH)
        self._reader = file

    def read(self, slot: int, *, checksum: int) -> NDArray[np.floating] | None:
        """The embedding in a slot, [C, h, w]; None if it is not the one that was written.

        Args:
            slot: Of an embedding that was committed before the store was opened.
            checksum: In its record.
        """
        # Not through a map: there, a disk that cannot be read, or a file that was cut short, would
        # kill the process with SIGBUS.
        embedding = np.empty(self.shape, self.dtype)
        try:
            self.open()
            assert self._reader is not None
            buffer = embedding.data.cast("B")
            read = _read_fully(self._reader.fileno(), buffer, offset=slot * self.slot_bytes)
        except OSError:
            return None
        is_whole = read == embedding.nbytes and checksum_embedding(embedding) == checksum
        return embedding if is_whole else None


def _read_fully(file: int, buffer: memoryview, *, offset: int) -> int:
    done = 0
    while count := os.preadv(file, [buffer[done:]], offset + done):
        done += count
    return done


def _delete_unless_regular(path: Path) -> None:
    if not os.path.lexists(path) or (path.is_file() and not path.is_symlink()):
        return
    LOGGER.warning("%s is no file of embeddings: it is deleted", path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _holds_json(path: Path, value: Any) -> bool:
    try:
        return bool(json.loads(path.read_bytes()) == value)
    except (OSError, ValueError, RecursionError):
        return False


def _write_fully(file: int, content: bytes, *, offset: int) -> None:
    written = 0
    while written < len(content):
        written += os.pwrite(file, memoryview(content)[written:], offset + written)


@dataclass(frozen=True)
class CachedEmbeddings:
    """The embeddings of the N images of a split, in the order of the split.

    Attributes:
        stores: Of the unflipped images and, if training flips, of the flipped ones.
        slots: int64 [N, number of stores]; -1 where an image cannot be used.
        checksums: uint32 [N, number of stores], in the records of the slots.
        sizes: int32 [N, 2], H, W of the images, original px.
        bad_images: Why images cannot be used, by row.
    """

    stores: tuple[EmbeddingStore, ...]
    slots: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    sizes: NDArray[np.int32]
    bad_images: dict[int, str]

    def size(self, i: int) -> tuple[int, int]:
        """H, W of image i, original px.

        Raises:
            ImageError: The image could not be used when it was to be encoded.
        """
        if i in self.bad_images:
            raise ImageError(self.bad_images[i])
        height, width = self.sizes[i].tolist()
        return height, width

    def read(self, i: int, *, flipped: bool) -> NDArray[np.floating]:
        """The embedding of image i, [C, h, w].

        Raises:
            DataError: It is damaged; the next start then encodes the image again.
        """
        store, k = self.stores[int(flipped)], int(flipped)
        slot, checksum = int(self.slots[i, k]), int(self.checksums[i, k])
        embedding = store.read(slot, checksum=checksum)
        if embedding is None:
            with contextlib.suppress(OSError):  # a loader has no encoder, but the next start has
                store.forget([slot])
            raise DataError(
                f"an embedding in {store.folder} has changed on the disk since it was written. "
                "Start the same command again: it encodes that image anew and goes on. Should it "
                "happen again, look after the disk, or name another cache_dir."
            )
        return embedding


class _DiskUsage(NamedTuple):
    # In bytes. `evictable` are the stores that may be deleted, the longest unused first.
    free: int  # of the disk
    used: int  # by all stores
    kept: int  # by the stores that the caller keeps
    evictable: dict[Path, int]

    @property
    def num_evictable_bytes(self) -> int:
        return sum(self.evictable.values())


def evict_unused_stores(folder: Path, *, own: set[str], needed: int, limit: int) -> str | None:
    """Deletes the stores that were unused longest until there is room. One process at a time.

    Args:
        folder: Of all stores.
        own: Names of the stores to keep.
        needed: Bytes that are to be written.
        limit: Bytes that the folder may hold.

    Returns:
        None if there is room. Otherwise why not, as the end of a sentence; nothing is deleted then.
    """
    usage = _measure_usage(folder, own=own)
    if reason := _explain_lack_of_room(usage, needed=needed, limit=limit):
        return reason
    free, used = usage.free, usage.used
    for store, size in usage.evictable.items():
        if used + needed <= limit and needed + MARGIN_BYTES <= free:
            break
        shutil.rmtree(store)
        used, free = used - size, free + size
    return None


def _measure_usage(folder: Path, *, own: set[str]) -> _DiskUsage:
    sizes = {
        store: _allocated_bytes(store) for store in folder.iterdir() if (store / _META).exists()
    }
    evictable = sorted(
        (store for store in sizes if store.name not in own and not _is_open(store)),
        key=lambda store: (store / _META).stat().st_mtime,
    )
    return _DiskUsage(
        free=shutil.disk_usage(folder).free,
        used=sum(sizes.values()),
        kept=sum(size for store, size in sizes.items() if store.name in own),
        evictable={store: sizes[store] for store in evictable},
    )


def _explain_lack_of_room(usage: _DiskUsage, *, needed: int, limit: int) -> str | None:
    remaining = usage.used - usage.num_evictable_bytes  # after deleting all that may be deleted
    if remaining + needed > limit:
        others = remaining - usage.kept
        busy = f", and other runs use {format_gib(others)} of it" if others else ""
        return (
            f"it would hold {format_gib(usage.kept + needed)}{busy}, "
            f"and cache_max_gib allows {format_gib(limit)}"
        )
    available = usage.free + usage.num_evictable_bytes
    if needed and needed + MARGIN_BYTES > available:
        return (
            f"{format_gib(needed)} more are needed, and of the {format_gib(available)} that are "
            f"free there {format_gib(MARGIN_BYTES)} are left to checkpoints"
        )
    return None


def _allocated_bytes(store: Path) -> int:
    # Not the file sizes: slots that have not been written are holes, which take up no disk.
    return sum(path.lstat().st_blocks * 512 for path in store.iterdir())


def _is_open(store: Path) -> bool:
    # Whether a run reads the store: it holds a shared lock, see `EmbeddingStore.open`.
    try:
        file = open(open_regular(store / _DATA), "rb")
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
