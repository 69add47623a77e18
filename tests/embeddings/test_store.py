"""What is on disk: only whole embeddings are believed, and the longest unused go first."""

import errno
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.damage import FAULTS, REPLACEMENTS
from samft.embeddings.store import (
    CachedEmbeddings,
    EmbeddingRecord,
    EmbeddingStore,
    evict_unused_stores,
)
from samft.errors import DataError
from samft.images.files import ImageError
from samft.runtime.logs import GIB, format_gib

SHAPE = (8, 3, 3)


def digest(number: int) -> bytes:
    return bytes([number]) * 32


def embedding(number: int, dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(number).normal(size=SHAPE).astype(dtype)


def record(number: int, dtype: str = "float16") -> EmbeddingRecord:
    checksum = zlib.crc32(embedding(number, dtype).tobytes())
    return EmbeddingRecord(number, digest(number), (40 + number, 60), checksum)


def read(store: EmbeddingStore, number: int, dtype: str = "float16") -> np.ndarray | None:
    return store.read(number, checksum=record(number, dtype).checksum)


def a_store(folder: Path, *, count: int = 0, dtype: str = "float16") -> EmbeddingStore:
    """A store with `count` embeddings in it, opened anew."""
    store = EmbeddingStore(folder, shape=SHAPE, dtype=dtype)
    store.create({"who": "a test"})
    for number in range(count):
        store.write(number, embedding(number, dtype))
    store.sync()
    store.commit([record(k, dtype) for k in range(count)])
    store.close()
    return EmbeddingStore(folder, shape=SHAPE, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_was_committed_is_read_back_to_the_bit(tmp_path: Path, dtype: str) -> None:
    store = a_store(tmp_path / "a", count=3, dtype=dtype)
    records = store.read_records()
    assert records == {digest(k): record(k, dtype) for k in range(3)}
    for reader in (store, pickle.loads(pickle.dumps(store))):
        for number in (2, 0, 1):
            copy = read(reader, number, dtype)
            assert copy is not None and copy.dtype == dtype
            assert np.array_equal(copy, embedding(number, dtype))
    copy[:] = 0  # not the file
    assert np.array_equal(read(store, 1, dtype), embedding(1, dtype))


def test_a_pickle_is_small_after_reading(tmp_path: Path) -> None:
    store = a_store(tmp_path / "a", count=3)
    read(store, 0)
    assert len(pickle.dumps(store)) < 1000


def test_an_embedding_without_a_record_does_not_count(tmp_path: Path) -> None:
    store = a_store(tmp_path / "a", count=2)
    store.write(2, embedding(2))
    store.sync()
    assert store.read_records().keys() == {digest(0), digest(1)}
    store.write(4, embedding(4))
    store.commit([record(4)])  # slots 2 and 3 stay open
    assert store.read_records().keys() == {digest(0), digest(1), digest(4)}


def test_a_record_that_is_torn_moved_or_without_its_data_does_not_count(tmp_path: Path) -> None:
    store = a_store(tmp_path / "a", count=3)
    records, data = tmp_path / "a" / "records.bin", tmp_path / "a" / "embeddings.bin"
    whole, size = records.read_bytes(), len(records.read_bytes()) // 3
    for flipped in range(size):
        torn = bytearray(whole)
        torn[size + flipped] ^= 1
        records.write_bytes(torn)
        assert store.read_records().keys() == {digest(0), digest(2)}, flipped
    records.write_bytes(whole[:-1])
    assert store.read_records().keys() == {digest(0), digest(1)}
    records.write_bytes(whole[size:])  # each in another's place
    assert store.read_records() == {}
    records.write_bytes(whole)
    os.truncate(data, data.stat().st_size - 1)
    assert store.read_records().keys() == {digest(0), digest(1)}


def test_no_folder_has_no_entries(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path / "absent", shape=SHAPE, dtype="float32")
    assert store.read_records() == {} and store.num_records == 0


def test_creating_again_keeps_what_is_there(tmp_path: Path) -> None:
    a_store(tmp_path / "a", count=2)
    os.utime(tmp_path / "a" / "meta.json", (1, 1))
    store = a_store(tmp_path / "a")
    assert len(store.read_records()) == store.num_records == 2
    assert json.loads((tmp_path / "a" / "meta.json").read_text()) == {"who": "a test"}
    assert (tmp_path / "a" / "meta.json").stat().st_mtime > 1e9


# Damage


@pytest.mark.parametrize("fault", [*FAULTS, *REPLACEMENTS])
def test_whatever_happens_to_a_file_each_embedding_is_whole_or_missing(
    tmp_path: Path, fault: str
) -> None:
    generator, damage = np.random.default_rng(0), {**FAULTS, **REPLACEMENTS}[fault]
    for name in ("embeddings.bin", "records.bin", "meta.json"):
        for number in range(5 if fault in FAULTS else 1):
            folder = tmp_path / f"{name}{number}"
            a_store(folder, count=3)
            damage(folder / name, generator)
            store = a_store(folder)
            records = store.read_records()
            whole = {k for k in range(3) if digest(k) in records and read(store, k) is not None}
            for k in whole:
                assert records[digest(k)] == record(k)
                assert np.array_equal(read(store, k), embedding(k))
            assert json.loads((folder / "meta.json").read_text()) == {"who": "a test"}
            a_store(folder, count=3)  # what is missing can be written again
            store = EmbeddingStore(folder, shape=SHAPE, dtype="float16")
            assert store.read_records().keys() == {digest(k) for k in range(3)}
            assert all(np.array_equal(read(store, k), embedding(k)) for k in range(3))


@pytest.mark.parametrize("fault", ["file", "dangling link", "pipe"])
def test_something_else_in_the_place_of_a_store_is_replaced(tmp_path: Path, fault: str) -> None:
    (tmp_path / "a").write_text("of somebody")
    if fault in REPLACEMENTS:
        REPLACEMENTS[fault](tmp_path / "a", np.random.default_rng(0))
    store = EmbeddingStore(tmp_path / "a", shape=SHAPE, dtype="float16")
    assert store.read_records() == {} and store.num_records == 0
    assert np.array_equal(read(a_store(tmp_path / "a", count=1), 0), embedding(0))


def test_each_flipped_bit_of_an_embedding_shows(tmp_path: Path) -> None:
    store, data = a_store(tmp_path / "a", count=2), tmp_path / "a" / "embeddings.bin"
    whole = data.read_bytes()
    for position in range(embedding(1).nbytes):
        torn = bytearray(whole)
        torn[store.slot_bytes + position] ^= 1 << position % 8
        data.write_bytes(torn)
        assert read(store, 1) is None and read(store, 0) is not None
    data.write_bytes(whole)
    assert read(store, 1) is not None


def test_the_files_of_another_store_do_not_count(tmp_path: Path) -> None:
    store, other = a_store(tmp_path / "a", count=2), a_store(tmp_path / "b", count=3)
    for name in ("embeddings.bin", "records.bin"):
        (other.folder / name).replace(store.folder / name)
    assert store.read_records() == {}


def test_a_damaged_embedding_is_refused_and_then_missing(tmp_path: Path) -> None:
    stores = (a_store(tmp_path / "a", count=2),)
    checksums = np.array([[record(k).checksum] for k in range(2)])
    sizes = np.zeros((2, 2), dtype=np.int32)
    cached = CachedEmbeddings(stores, np.array([[0], [1]]), checksums, sizes, {})
    with (tmp_path / "a" / "embeddings.bin").open("r+b") as file:
        file.seek(stores[0].slot_bytes)
        file.write(b"x")
    assert np.array_equal(cached.read(0, flipped=False), embedding(0))
    with pytest.raises(DataError, match="same command again") as caught:
        cached.read(1, flipped=False)
    assert not isinstance(caught.value, ImageError)  # it is not the image that is broken
    assert stores[0].read_records().keys() == {digest(0)}


def test_a_full_disk_is_an_error_and_not_a_dead_process(tmp_path: Path, monkeypatch: Any) -> None:
    store = a_store(tmp_path / "a", count=1)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(1, embedding(1))
    assert store.read_records().keys() == {digest(0)}


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: Any) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, part, at: whole(file, part[:1000], at))
    assert np.array_equal(read(a_store(tmp_path / "a", count=2), 1), embedding(1))


def test_a_split_reads_by_position_and_refuses_bad_images(tmp_path: Path) -> None:
    stores = (a_store(tmp_path / "a", count=3), a_store(tmp_path / "b", count=3))
    slots = np.array([[2, 0], [-1, -1], [1, 1]])
    sizes = np.array([[42, 60], [0, 0], [41, 60]], dtype=np.int32)
    checksums = np.array([[record(max(k, 0)).checksum for k in row] for row in slots.tolist()])
    cached = CachedEmbeddings(stores, slots, checksums, sizes, {1: "b.png is broken"})
    assert np.array_equal(cached.read(0, flipped=False), embedding(2))
    assert np.array_equal(cached.read(0, flipped=True), embedding(0))
    assert cached.size(2) == (41, 60)
    with pytest.raises(ImageError, match="b.png is broken"):
        cached.size(1)


# Room


def sized_store(folder: Path, *, mib: int, used: int) -> Path:
    a_store(folder)
    (folder / "embeddings.bin").write_bytes(bytes(mib << 20))
    os.utime(folder / "meta.json", (used, used))
    return folder


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Three stores of 2 MiB, `b` used longest ago, then `c`, then `a`; and a file that is none."""
    for name, used in (("a", 30), ("b", 10), ("c", 20)):
        sized_store(tmp_path / name, mib=2, used=used)
    (tmp_path / "lock").touch()
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


MIB = 1 << 20


@pytest.mark.parametrize(
    ("limit", "own", "left"),
    [
        (9 * MIB, set(), {"a", "b", "c"}),
        (7 * MIB, set(), {"a", "c"}),
        (5 * MIB, set(), {"a"}),
        (5 * MIB, {"b"}, {"b"}),
        (7 * MIB, {"b", "new"}, {"a", "b"}),
    ],
)
def test_the_longest_unused_go_first_and_only_as_many_as_needed(
    filled: Path, limit: int, own: set[str], left: set[str]
) -> None:
    assert evict_unused_stores(filled, own=own, needed=2 * MIB, limit=limit) is None
    assert names(filled) == left


def test_what_another_run_reads_is_not_evicted(filled: Path) -> None:
    reader = EmbeddingStore(filled / "b", shape=SHAPE, dtype="float16")
    reader.open()
    assert evict_unused_stores(filled, own=set(), needed=2 * MIB, limit=5 * MIB) is None
    assert names(filled) == {"b"}
    why = evict_unused_stores(filled, own=set(), needed=2 * MIB, limit=3 * MIB)
    assert why is not None and "other runs use 2.0 MiB of it" in why
    del reader
    assert evict_unused_stores(filled, own=set(), needed=2 * MIB, limit=3 * MIB) is None
    assert names(filled) == set()


def test_too_low_a_limit_is_explained_and_nothing_is_evicted(filled: Path) -> None:
    why = evict_unused_stores(filled, own={"a"}, needed=3 * GIB, limit=2 * GIB)
    assert why == "it would hold 3.0 GiB, and cache_max_gib allows 2.0 GiB"
    assert names(filled) == {"a", "b", "c"}


def test_too_small_a_disk_is_explained_or_stores_are_evicted(
    filled: Path, monkeypatch: Any
) -> None:
    def with_free(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))

    with_free(GIB + 4 * MIB)  # all but the gibibyte that is for checkpoints
    assert evict_unused_stores(filled, own={"a"}, needed=4 * MIB, limit=GIB) is None
    assert names(filled) == {"a", "b", "c"}
    why = evict_unused_stores(filled, own={"a"}, needed=9 * MIB, limit=GIB)
    assert why is not None and why.startswith("9.0 MiB more are needed")
    assert names(filled) == {"a", "b", "c"}
    assert evict_unused_stores(filled, own={"a"}, needed=5 * MIB, limit=GIB) is None
    assert names(filled) == {"a", "c"}
    with_free(0)
    assert evict_unused_stores(filled, own={"a"}, needed=0, limit=GIB) is None


def test_holes_take_up_no_room(tmp_path: Path) -> None:
    sized_store(tmp_path / "a", mib=1, used=1)
    os.truncate(tmp_path / "a" / "embeddings.bin", GIB)
    assert evict_unused_stores(tmp_path, own={"a"}, needed=MIB, limit=3 * MIB) is None


def test_bytes_for_a_person() -> None:
    assert (format_gib(5 * MIB), format_gib(GIB), format_gib(3 * GIB // 2)) == (
        "5.0 MiB",
        "1.0 GiB",
        "1.5 GiB",
    )
