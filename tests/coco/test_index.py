import json
import logging
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.broken_coco import SQUARE, encode_image
from helpers.coco_files import annotation, write_coco, write_json
from helpers.damage import FAULTS, REPLACEMENTS
from samft.annotations.problems import Problems
from samft.annotations.segmentation import Segmentations
from samft.coco import index as coco_index
from samft.coco.index import CocoIndex, index_file, open_index
from samft.errors import DataError


def _count_builds(caplog: pytest.LogCaptureFixture) -> int:
    number = sum("indexed" in message for message in caplog.messages)
    caplog.clear()
    return number


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="samft")
    return caplog


def check_equal(index: CocoIndex, other: CocoIndex) -> None:
    """All that two indexes hold is equal."""
    for name in CocoIndex.__annotations__:
        mine, others = getattr(index, name), getattr(other, name)
        if isinstance(mine, Segmentations):
            np.testing.assert_array_equal(mine.buffer, others.buffer)
            np.testing.assert_array_equal(mine.starts, others.starts)
        elif isinstance(mine, Problems):
            assert mine.to_json() == others.to_json()
        elif name != "folder":
            np.testing.assert_array_equal(mine, others)


def test_a_file_is_indexed_once(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    path, cache = write_coco(tmp_path, 5), tmp_path / "cache"
    first = index_file(path, path.parent, cache=cache)
    assert _count_builds(log) == 1
    second = index_file(path, path.parent, cache=cache)
    assert _count_builds(log) == 0 and second.folder == first.folder
    check_equal(first, second)
    # Mapped, not read.
    base = first.boxes.base
    assert isinstance(base, np.memmap) and not first.boxes.flags.writeable


def test_it_is_indexed_anew_when_anything_changes(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    path, cache = write_coco(tmp_path, 3), tmp_path / "cache"
    broken = path.parent / "image_1.png"
    broken.write_bytes(b"")

    def count_new_builds() -> int:
        index_file(path, path.parent, cache=cache)
        return _count_builds(log)

    assert [count_new_builds(), count_new_builds()] == [1, 0]
    broken.write_bytes(encode_image(1))  # repaired
    assert [count_new_builds(), count_new_builds()] == [1, 0]
    assert index_file(path, path.parent, cache=cache).bad_images == {}
    broken.unlink()
    assert [count_new_builds(), count_new_builds()] == [1, 0]
    assert index_file(path, path.parent, cache=cache).bad_images == {"image_1.png": "image-missing"}
    path.write_text(path.read_text() + "\n")
    assert [count_new_builds(), count_new_builds()] == [1, 0]
    # Another folder of images, another index.
    (tmp_path / "elsewhere").mkdir()
    assert len(index_file(path, tmp_path / "elsewhere", cache=cache).bad_images) == 3


def test_a_json_that_moved_keeps_its_index(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    path, cache = write_coco(tmp_path, 3), tmp_path / "cache"
    index_file(path, path.parent, cache=cache)
    moved = path.rename(tmp_path / "moved.json")
    _count_builds(log)
    index_file(moved, tmp_path / "train", cache=cache)
    # The listing has one name less, so the images were looked at again.
    assert _count_builds(log) == 1


def _build_in_process(
    path: Path, cache: Path, results: "multiprocessing.Queue[tuple[int, int]]"
) -> None:
    calls = []
    real = coco_index.check_file
    coco_index.check_file = lambda *given, **named: (
        calls.append(1) or time.sleep(0.3) or real(*given, **named)
    )
    index = index_file(path, path.parent, cache=cache)
    results.put((len(calls), len(index.object_ids)))


def test_processes_that_start_together_build_one(tmp_path: Path) -> None:
    path, cache = write_coco(tmp_path, 3), tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[int, int]] = context.Queue()
    processes = [
        context.Process(target=_build_in_process, args=(path, cache, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    counts = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert sorted(counts) == [(0, 7), (0, 7), (1, 7)]
    assert not list(cache.glob("*.part"))


def test_a_builder_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_coco(tmp_path, 3), tmp_path / "cache"

    def raise_disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", raise_disk_full)
    with pytest.raises(DataError, match=r"No space left.*SAMFT_CACHE"):
        index_file(path, path.parent, cache=cache)
    monkeypatch.undo()
    assert [one.suffix for one in cache.iterdir()] == [".lock"]
    assert len(index_file(path, path.parent, cache=cache).object_ids) == 7


def test_a_cache_that_cannot_be_written_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    path = write_coco(tmp_path, 3)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAMFT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(coco_index.tempfile, "tempdir", str(tmp_path))
    index = index_file(path, path.parent)
    private = tmp_path / f"samft-{os.getuid()}"
    assert index.folder.parent == private / "index"
    assert private.stat().st_mode & 0o777 == 0o700
    assert "cannot be written" in log.text
    private.chmod(0o777)  # as anyone could have made it before
    with pytest.raises(DataError, match="other users may write into it.*folder of your own"):
        index_file(path, path.parent)


def test_an_index_nobody_opened_for_a_month_is_deleted(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old, kept, new = (write_coco(tmp_path / name, 2, seed=k) for k, name in enumerate("abc"))
    folders = [index_file(path, path.parent, cache=cache).folder for path in (old, kept)]
    for folder, days in zip(folders, (31, 29), strict=True):
        then = time.time() - days * 86_400
        os.utime(folder / "index.json", (then, then))
    index_file(new, new.parent, cache=cache)
    assert [folder.exists() for folder in folders] == [False, True]
    # Using one counts as opening it.
    assert (
        time.time()
        - (index_file(kept, kept.parent, cache=cache).folder / "index.json").stat().st_mtime
        < 3600
    )


@pytest.mark.parametrize("fault", [*FAULTS, *REPLACEMENTS])
def test_a_damaged_index_is_built_again_and_said(
    tmp_path: Path, log: pytest.LogCaptureFixture, fault: str
) -> None:
    path, cache = write_coco(tmp_path, 5), tmp_path / "cache"
    (path.parent / "image_1.png").write_bytes(b"")  # something for the lists of what is bad
    index = index_file(path, path.parent, cache=tmp_path / "whole")
    folder = index_file(path, path.parent, cache=cache).folder
    generator, damage = np.random.default_rng(0), {**FAULTS, **REPLACEMENTS}[fault]
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in sorted(whole):
        for _ in range(3 if fault in FAULTS else 1):
            log.clear()
            damage(folder / name, generator)
            is_changed = (folder / name).is_fifo() or any(
                (folder / one).read_bytes() != whole[one] if (folder / one).is_file() else True
                for one in whole
            )
            check_equal(index_file(path, path.parent, cache=cache), index)
            warnings = [one for one in log.messages if "is damaged: it is built again" in one]
            assert len(warnings) == (is_changed or fault == "link"), name
            assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_the_index_of_another_file_in_its_place_is_not_believed(tmp_path: Path) -> None:
    cache, paths = tmp_path / "cache", [write_coco(tmp_path / name, 3) for name in "ab"]
    document = json.loads(paths[1].read_text())
    document["annotations"][0]["bbox"][2] += 1
    paths[1].write_text(json.dumps(document))
    one, other = (index_file(path, path.parent, cache=cache) for path in paths)
    one.folder.rename(cache / "aside")
    other.folder.rename(one.folder)
    (cache / "aside").rename(other.folder)
    for path, index in zip(paths, (one, other), strict=True):
        check_equal(index_file(path, path.parent, cache=cache), index)


@pytest.mark.parametrize("fault", REPLACEMENTS)
def test_something_else_in_the_place_of_an_index_is_replaced(tmp_path: Path, fault: str) -> None:
    path, cache = write_coco(tmp_path, 3), tmp_path / "cache"
    index = index_file(path, path.parent, cache=tmp_path / "whole")
    place = index_file(path, path.parent, cache=cache).folder
    place.rename(cache / "aside")
    place.write_text("of somebody")
    REPLACEMENTS[fault](place, np.random.default_rng(0))
    check_equal(index_file(path, path.parent, cache=cache), index)
    assert not place.is_symlink() and place.is_dir()


def test_a_lock_that_is_a_link_leaves_the_file_alone(tmp_path: Path) -> None:
    path, cache = write_coco(tmp_path, 3), tmp_path / "cache"
    folder = index_file(path, path.parent, cache=cache).folder
    lock, theirs = folder.with_suffix(".lock"), tmp_path / "theirs.txt"
    theirs.write_text("of somebody")
    lock.unlink()
    lock.symlink_to(theirs)
    with pytest.raises(DataError, match="SAMFT_CACHE"):
        index_file(path, path.parent, cache=cache)
    assert theirs.read_text() == "of somebody"


def test_arrays_that_hold_nothing_are_mapped_too(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [], [])
    index = index_file(path, tmp_path, cache=tmp_path / "cache")
    assert index.num_images == 0 and len(index.segmentations) == 0
    assert index.problems["no-objects"] == 1 and index.file_names() == []


def test_names_that_are_no_utf8_come_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(encode_image(1))
    (tmp_path / "näh.png").write_bytes(encode_image(2))
    images = [
        {"id": 1, "file_name": name, "height": 20, "width": 30},
        {"id": 2, "file_name": "näh.png", "height": 20, "width": 30},
    ]
    path = write_json(tmp_path / "a.json", images, [annotation(1, 1, SQUARE)])
    index = index_file(path, tmp_path, cache=tmp_path / "cache")
    assert index.file_names() == [name, "näh.png"] and not index.bad.any()
    again = pickle.loads(pickle.dumps(index))
    assert again.file_names() == index.file_names()
    assert again.folder == index.folder and open_index(index.folder, tmp_path).category_names == {
        1: "thing"
    }
    assert "caf" in json.dumps(name)
