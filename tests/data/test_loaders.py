"""Loading batches: what is being waited for, and workers that die or hang."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from helpers import REPOSITORY
from helpers.coco_files import write_coco
from helpers.processes import children_of
from samft.data.dataset import Coco2MaskDataset
from samft.data.loaders import (
    BatchLoader,
    batch_by_objects,
    masks_per_image,
    train_loader,
    val_loader,
)
from samft.errors import TrainingError
from samft.runtime import heartbeat
from samft.runtime.heartbeat import explain_distributed_errors

OBJECTS = (1, 4, 2, 7, 3)  # of the images, from coco_files


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), 5, objects=OBJECTS)


def a_dataset(annotations: Path, kind: type[Coco2MaskDataset], **options: Any) -> Coco2MaskDataset:
    options = {"image_size": 64, "training": True, **options}
    return kind(annotations.parent, annotations, **options)


@pytest.fixture
def dataset(annotations: Path) -> Coco2MaskDataset:
    return a_dataset(annotations, Coco2MaskDataset)


# Objects


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, [1, 4, 2, 7, 3]),
        ({"max_masks_per_image": 3}, [1, 3, 2, 3, 3]),
        ({"max_masks_per_image": 0}, [1, 4, 2, 7, 3]),
        ({"max_masks_per_image": 3, "training": False}, [1, 4, 2, 7, 3]),
    ],
)
def test_masks_per_image_are_those_of_its_samples(
    annotations: Path, options: dict[str, Any], counts: list[int]
) -> None:
    dataset = a_dataset(annotations, Coco2MaskDataset, **options)
    assert masks_per_image(dataset).tolist() == counts
    if not options.get("training", True):
        assert [len(dataset[i].boxes) for i in range(5)] == counts


# By their objects, images 0, 2, 4, 1, 3 have 1, 2, 3, 4, 7; their ids begin at 10.
@pytest.mark.parametrize(
    ("batch_size", "share", "image_ids"),
    [
        (2, 0.0, [10, 12]),
        (2, 1.0, [11, 13]),
        (1, 0.5, [14]),
        (3, 0.5, [12, 14, 11]),
        (5, 1.0, [10, 12, 14, 11, 13]),
        (7, 0.3, [10, 12, 14, 11, 13, 10, 12]),
    ],
)
def test_a_batch_of_images_with_more_objects_than_a_share_of_all(
    dataset: Coco2MaskDataset, batch_size: int, share: float, image_ids: list[int]
) -> None:
    batch = batch_by_objects(dataset, batch_size, share=share)
    assert batch.image_ids == image_ids
    assert batch.num_masks <= sum(OBJECTS[i - 10] for i in image_ids)


# What is waited for


def names(*numbers: int) -> list[str]:
    return [f"image_{number}.png" for number in numbers]


def in_order(loader: BatchLoader) -> list[str]:
    """The file names in the order of the loader's sampler."""
    keys = list(loader.requested.batch_sampler)
    return names(*(key[1] for own in keys for key in own))


def test_nothing_is_waited_for_before_and_after(dataset: Coco2MaskDataset) -> None:
    loader = train_loader(dataset, batch_size=2, steps=3)
    assert loader.waiting_for() == []
    assert len(list(loader)) == 3
    assert loader.waiting_for() == []


def test_without_workers_the_next_batch_is_waited_for(
    dataset: Coco2MaskDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat.set_step(0)  # an earlier test of this process may have left another
    loader = train_loader(dataset, batch_size=2, steps=3)
    expected, seen = in_order(loader), []
    load = Coco2MaskDataset.__getitem__

    def look(self: Coco2MaskDataset, key: Any) -> Any:
        seen.append((loader.waiting_for(), heartbeat.describe_position()))
        return load(self, key)

    monkeypatch.setattr(Coco2MaskDataset, "__getitem__", look)
    list(loader)
    activities = [(pair, ", ".join(pair)) for pair in (expected[:2], expected[2:4], expected[4:])]
    assert seen == [
        (pair, f"step 0, loading images {names}") for pair, names in activities for _ in range(2)
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_with_workers_as_many_batches_as_there_are_workers_the_next_first(
    dataset: Coco2MaskDataset,
) -> None:
    loader = train_loader(dataset, batch_size=2, steps=5, num_workers=2)
    expected = in_order(loader)
    for _ in range(2):  # the workers stay for the next time
        batches = iter(loader)
        for done in range(1, 6):
            next(batches)
            assert loader.waiting_for() == expected[2 * done : 2 * done + 4]
        assert next(batches, None) is None


def test_workers_that_are_started_early_load_the_first_batches_and_no_others(
    dataset: Coco2MaskDataset,
) -> None:
    options: dict[str, Any] = {"batch_size": 2, "steps": 3}
    expected = [batch.image_ids for batch in train_loader(dataset, **options)]
    loader, before = train_loader(dataset, **options, num_workers=1), children_of(os.getpid())
    for _ in range(2):
        loader.start_workers()
    assert len(set(children_of(os.getpid())) - set(before)) == 1
    assert [batch.image_ids for batch in loader] == expected
    assert [batch.image_ids for batch in loader] == expected  # once more, by the same worker
    train_loader(dataset, **options).start_workers()  # without workers


def test_there_are_no_more_workers_than_cores(
    dataset: Coco2MaskDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as PyTorch warns of more
        assert val_loader(dataset, num_workers=4).num_workers == 1
        assert val_loader(dataset, num_workers=0).num_workers == 0


def test_in_validation_the_share_of_this_process_is_waited_for(
    annotations: Path,
) -> None:
    dataset = a_dataset(annotations, Coco2MaskDataset, training=False)
    loader = val_loader(dataset, num_workers=1, rank=1, world_size=2)
    batches = iter(loader)
    assert next(batches).image_ids == [11]
    assert loader.waiting_for() == names(3)
    assert next(batches).image_ids == [13]
    assert loader.waiting_for() == []


# Workers that die or hang


class Hanging(Coco2MaskDataset):
    """Loading image 2 waits until a file exists."""

    released = Path("absent")

    def __getitem__(self, key: Any) -> Any:
        while key == 2 and not self.released.exists():
            time.sleep(0.01)
        return super().__getitem__(key)


class Deadly(Hanging):
    """Loading image 2 then kills the worker."""

    def __getitem__(self, key: Any) -> Any:
        sample = super().__getitem__(key)
        if key == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample


@pytest.mark.parametrize(
    ("kind", "timeout", "cause"),
    [
        (Deadly, None, "DataLoader worker (pid"),
        (Deadly, 60.0, "DataLoader worker (pid"),
        (Hanging, 2.0, "DataLoader timed out after 2"),
    ],
)
def test_images_of_a_worker_that_dies_or_hangs_are_named(
    annotations: Path,
    kind: type[Coco2MaskDataset],
    timeout: float | None,
    cause: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Hanging, "released", tmp_path / "released")
    loader = val_loader(
        a_dataset(annotations, kind, training=False), num_workers=1, timeout=timeout
    )
    heartbeat.set_step(6)
    image_ids = []
    try:
        with pytest.raises(TrainingError) as caught, explain_distributed_errors():
            for batch in loader:
                image_ids.append(batch.image_ids)
                if kind is Deadly and len(image_ids) == 2:
                    (tmp_path / "released").touch()
    finally:
        (tmp_path / "released").touch()
        loader.loader._iterator._shutdown_workers()  # type: ignore[union-attr]
    assert image_ids == [[10], [11]]
    assert cause in str(caught.value) and isinstance(caught.value.__cause__, RuntimeError)
    position = ", at step 6, loading images image_2.png; its workers were at image_2.png."
    assert str(caught.value).endswith(position)
    assert "\n" not in str(caught.value)


def test_a_timeout_without_workers_is_no_error(dataset: Coco2MaskDataset) -> None:
    assert len(list(train_loader(dataset, batch_size=2, steps=1, timeout=5.0))) == 1


class GroupReporting(Coco2MaskDataset):
    """Image ids are the process group minus the process that loads: 0 for its leader."""

    def __getitem__(self, key: Any) -> Any:
        sample = super().__getitem__(key)
        sample.image_id = os.getpgid(0) - os.getpid()
        return sample


def test_a_worker_is_in_a_group_of_its_own(annotations: Path) -> None:
    dataset = a_dataset(annotations, GroupReporting, training=False)
    assert {batch.image_ids[0] for batch in val_loader(dataset, num_workers=1)} == {0}


# A program that uses samft as a library, with a child of its own that ends when a byte arrives.
PROGRAM = """
import multiprocessing, os, sys
from pathlib import Path
from samft.data.dataset import Coco2MaskDataset
from samft.data.loaders import val_loader

def wait(pipe):
    os.read(pipe, 1)
    print("the child ended by itself", flush=True)

def load():
    annotations = Path(sys.argv[1])
    dataset = Coco2MaskDataset(annotations.parent, annotations, image_size=64, training=True)
    loaders = [val_loader(dataset, num_workers=number) for number in (2, 1)]
    batches = [iter(loader) for loader in loaders]
    for each in batches:
        next(each)
    others = {other.pid for other in multiprocessing.active_children()} - {child.pid}
    print(child.pid, *others, flush=True)
    if sys.argv[3] == "closes":
        del each, batches, loaders
        return None
    if sys.argv[3] == "raises":
        raise RuntimeError("no more")
    return batches

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    child = context.Process(target=wait, args=(int(sys.argv[2]),))
    child.start()
    batches = load()
    if sys.argv[3] == "closes":
        child.join()
"""


@pytest.mark.parametrize("ending", ["exits", "raises", "closes"])
def test_a_program_keeps_its_own_children_and_no_workers(
    annotations: Path, tmp_path: Path, ending: str
) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), str(annotations), str(reader), ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[reader],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    os.close(reader)
    try:
        assert process.stdout is not None
        child, *workers = map(int, process.stdout.readline().split())
        assert len(workers) == 3
        deadline = time.monotonic() + 60
        while set(workers) & set(children_of(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.01)
        # The workers have ended; the program waits for its own child, which still runs.
        assert children_of(process.pid) == [child]
        os.write(writer, b"!")
        output, errors = process.communicate(timeout=60)
    finally:
        os.close(writer)
        process.kill()
        process.wait()
    assert output.splitlines() == ["the child ended by itself"]
    assert process.returncode == (1 if ending == "raises" else 0)
    assert errors.splitlines()[-1:] == (["RuntimeError: no more"] if ending == "raises" else [])


def test_loading_the_module_registers_nothing_at_exit() -> None:
    program = (
        "import multiprocessing.util as util\n"
        "from samft.data import loaders\n"
        "callbacks = [each._callback for each in util._finalizer_registry.values()]\n"
        "print(callbacks.count(loaders._kill_workers))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "0\n"
