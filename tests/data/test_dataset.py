"""Samples and batches: what they hold, what seeds them, and images that cannot be read."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from helpers.coco_files import SIZES, annotation, write_coco, write_json
from helpers.targets import draw_mask
from samft.coco.layout import find_split
from samft.coco.subset import read_coco
from samft.data.dataset import Batch, Coco2MaskDataset, Sample, collate
from samft.data.loaders import train_loader, val_loader
from samft.data.targets import make_windows
from samft.data.transforms import make_frame
from samft.errors import DataError
from samft.images.decoder import open_image


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), 13)


def _dataset(annotations: Path, **options: Any) -> Coco2MaskDataset:
    options = {"image_size": 64, "training": True, **options}
    return Coco2MaskDataset(annotations.parent, annotations, **options)


def _assert_equal(first: Batch | Sample, second: Batch | Sample) -> None:
    for field in fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), field.name
        elif field.name == "truths":
            assert len(one) == len(other)
            for a, b in zip(one, other, strict=True):
                assert (a.top, a.left) == (b.top, b.left) and np.array_equal(a.mask, b.mask)
        else:
            assert one == other, field.name


def test_a_validation_sample_is_what_was_annotated(annotations: Path) -> None:
    dataset = _dataset(annotations, training=False, max_masks_per_image=1)
    sample = dataset[3]
    size = SIZES[0]
    frame = make_frame(size, 64, resize_mode="pad")
    assert sample.image.shape == (3, 64, 64) and sample.image.dtype == torch.uint8
    assert (sample.original_size, sample.input_size) == (size, frame.input_size)
    assert sample.image_id == 13 and sample.object_ids.tolist() == [8, 9, 10, 11, 12, 13, 14]
    entries = json.loads(annotations.read_text())["annotations"][7:14]
    for k, entry in enumerate(entries):
        x, y, w, h = entry["bbox"]
        np.testing.assert_allclose(sample.boxes[k], np.array([x, y, x + w, y + h], np.float32))
        truth = sample.truths[k]
        height, width = truth.mask.shape
        assert truth.mask.dtype == bool and truth.mask[0].any() and truth.mask[:, -1].any()
        tight_box = [truth.left, truth.top, truth.left + width, truth.top + height]
        np.testing.assert_allclose(tight_box, [x, y, x + w, y + h], atol=1)
        # 64 px wide at an image size of 64: the target's cells hold the truth's pixels.
        x0, y0, x1, y1 = sample.windows[k].tolist()
        total = sample.targets[k].double().mean() / 255 * (x1 - x0) * (y1 - y0)
        np.testing.assert_allclose(total, truth.mask.sum(), rtol=0.02)
    assert sample.targets.shape == (7, 64, 64)


def test_targets_at_the_input_are_the_mask(annotations: Path) -> None:
    sample = _dataset(annotations, training=False, loss_resolution="input")[0]
    truth = sample.truths[0]
    expected = torch.zeros(1, 64, 64, dtype=torch.uint8)
    height, width = truth.mask.shape
    inside = expected[0, truth.top : truth.top + height, truth.left : truth.left + width]
    inside[:] = 255 * torch.from_numpy(truth.mask)
    assert torch.equal(sample.targets, expected)


@pytest.mark.parametrize("augment", ["flip", "scale"])
def test_windows_are_around_objects_whatever_the_prompt(annotations: Path, augment: str) -> None:
    options: dict[str, Any] = {"augment": augment, "loss_resolution": "window"}
    shaken = _dataset(annotations, box_jitter=0.3, **options)
    exact = _dataset(annotations, box_jitter=0.0, **options)
    for epoch in range(10):
        sample, other = shaken[epoch, 3], exact[epoch, 3]
        assert not torch.equal(sample.boxes, other.boxes)
        assert sample.windows.dtype == torch.float32
        assert torch.equal(sample.windows, other.windows)
        assert torch.equal(sample.targets, other.targets)
        expected = make_windows(other.boxes.double().numpy())
        np.testing.assert_allclose(sample.windows, expected, atol=1e-4)
        assert sample.targets.shape == (len(sample.boxes), 64, 64)
        # Cells that are covered reach as far as the object.
        x0, y0, x1, y1 = other.boxes.T
        share = sample.targets.double().sum(dim=(1, 2)) / 255 / 64**2
        whole = (sample.windows[:, 2:] - sample.windows[:, :2]).prod(dim=1)
        assert (share * whole <= (x1 - x0) * (y1 - y0) * 1.2 + 1).all() and (share > 0.05).all()


def test_validation_draws_windows_from_the_truths(annotations: Path) -> None:
    dataset = _dataset(annotations, training=False, loss_resolution="window")
    sample = dataset[3]
    frame = make_frame(SIZES[0], 64, resize_mode="pad")
    assert len(sample.truths) == len(sample.windows) == 7
    for window, target, truth in zip(sample.windows, sample.targets, sample.truths, strict=True):
        expected = draw_mask(truth, frame, "window", window=window.double().numpy())
        assert np.abs(target.numpy().astype(int) - expected).max() <= 1
    batch = collate([sample, dataset[0]])
    assert torch.equal(batch.windows[:7], sample.windows) and len(batch.windows) == 8


def test_training_keeps_image_boxes_and_targets_together(annotations: Path) -> None:
    dataset = _dataset(annotations, box_jitter=0.0, loss_resolution="input")
    plain = _dataset(annotations, box_jitter=0.0, loss_resolution="input", augment="none")
    seen = set()
    for epoch in range(12):
        sample, unflipped = dataset[epoch, 1], plain[epoch, 1]
        width = sample.input_size[1]
        flipped = not torch.equal(sample.image, unflipped.image)
        seen.add(flipped)
        for box, target in zip(sample.boxes, sample.targets, strict=True):
            xs, ys = target.any(dim=0).nonzero(), target.any(dim=1).nonzero()
            tight_box = torch.tensor([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
            torch.testing.assert_close(box, tight_box.float(), atol=1.5, rtol=0)
        if flipped:
            torch.testing.assert_close(
                sample.image[..., :width].flip(-1), unflipped.image[..., :width]
            )
            torch.testing.assert_close(
                sample.targets[..., :width].flip(-1), unflipped.targets[..., :width]
            )
        assert sample.truths == [] and sample.image[..., width:].sum() == 0
    assert seen == {True, False}


def test_samples_depend_on_seed_epoch_and_image_id_only(annotations: Path) -> None:
    dataset = _dataset(annotations)
    first = dataset[5, 3]
    dataset[9, 2]
    np.random.seed(7)
    torch.manual_seed(7)
    _assert_equal(first, dataset[5, 3])
    # Another index with the same image at another place.
    alone = _dataset(annotations, subset=dataset.subset.select([3]))
    _assert_equal(first, alone[5, 0])
    assert not torch.equal(first.boxes, dataset[6, 3].boxes)
    assert not torch.equal(first.boxes, _dataset(annotations, seed=1)[5, 3].boxes)


def draws_by_object(dataset: Coco2MaskDataset, *key: int) -> dict[int, list[Any]]:
    sample = dataset[key]
    assert sample.click_draws is not None and sample.click_draws.dtype == torch.float32
    return dict(zip(sample.object_ids.tolist(), sample.click_draws.tolist(), strict=True))


def test_draws_for_clicks_depend_on_seed_epoch_image_object_and_number_only(
    annotations: Path,
) -> None:
    draws = draws_by_object(_dataset(annotations, num_clicks=3), 5, 3)
    assert {len(of_object) for of_object in draws.values()} == {3}
    numbers = [number for of_object in draws.values() for pair in of_object for number in pair]
    assert len(set(numbers)) == len(numbers) == 7 * 3 * 2
    assert all(0 <= number < 1 for number in numbers)
    # Other images, objects and clicks beside them change none.
    dataset = _dataset(annotations, num_clicks=8, max_masks_per_image=3, augment="scale")
    few = draws_by_object(dataset, 5, 3)
    assert len(few) == 3
    for object_id, of_object in few.items():
        assert of_object[:3] == draws[object_id]
    alone = _dataset(annotations, num_clicks=3, subset=dataset.subset.select([3]))
    assert draws_by_object(alone, 5, 0) == draws
    # Seed, epoch and copy change all.
    for other in (
        draws_by_object(_dataset(annotations, num_clicks=3, seed=1), 5, 3),
        draws_by_object(_dataset(annotations, num_clicks=3), 6, 3),
        draws_by_object(_dataset(annotations, num_clicks=3), 5, 3, 1),
    ):
        assert not {n for rows in other.values() for row in rows for n in row} & set(numbers)


def test_batches_hold_the_draws_of_their_objects_or_none(annotations: Path) -> None:
    dataset = _dataset(annotations, num_clicks=2)
    batch = collate([dataset[0, 3], dataset[0, 1]])
    assert batch.click_draws is not None and batch.click_draws.shape == (batch.num_masks, 2, 2)
    expected = {**draws_by_object(dataset, 0, 3), **draws_by_object(dataset, 0, 1)}
    assert batch.click_draws.tolist() == [expected[k] for k in batch.object_ids.tolist()]
    part = batch.take_objects(slice(2, 5)).click_draws
    assert part is not None and torch.equal(part, batch.click_draws[2:5])
    without = collate([_dataset(annotations)[0, 3]])
    assert without.click_draws is None and without.take_objects(slice(1)).click_draws is None
    assert _dataset(annotations, num_clicks=2, training=False)[3].click_draws is None


def test_draws_for_clicks_leave_the_rest_of_a_sample_alone(annotations: Path) -> None:
    with_draws, without = _dataset(annotations, num_clicks=2)[5, 3], _dataset(annotations)[5, 3]
    with_draws.click_draws = None
    _assert_equal(with_draws, without)


def test_the_subset_of_masks_changes_with_the_epoch(annotations: Path) -> None:
    dataset = _dataset(annotations, max_masks_per_image=3)
    chosen = [tuple(dataset[epoch, 3].object_ids.tolist()) for epoch in range(20)]
    assert all(len(set(ids)) == 3 and list(ids) == sorted(ids) for ids in chosen)
    assert len(set(chosen)) > 5 and {k for ids in chosen for k in ids} == set(range(8, 15))
    assert len(_dataset(annotations, max_masks_per_image=0)[0, 3].boxes) == 7


def test_collate_counts_objects_image_by_image(annotations: Path) -> None:
    dataset = _dataset(annotations, training=False)
    batch = collate([dataset[i] for i in (0, 1, 2)])
    assert batch.num_masks == 7 == len(batch.truths) == len(batch.targets)
    assert batch.image_index.tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert batch.image_ids == [10, 11, 12] and batch.images.shape == (3, 3, 64, 64)
    assert batch.original_sizes.tolist() == [list(size) for size in SIZES]
    assert batch.input_sizes.tolist() == [[48, 64], [64, 48], [64, 64]]
    moved = batch.to("meta")
    assert moved.boxes.device.type == "meta" and moved.image_ids == batch.image_ids


@pytest.mark.parametrize("resize_mode", ["pad", "squash"])
@pytest.mark.parametrize("training", [False, True])
def test_an_image_that_shrank_after_it_was_indexed(
    tmp_path: Path, resize_mode: str, training: bool
) -> None:
    image = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}
    last_row = annotation(1, 1, [2.0, 19, 9, 19, 9, 20, 2, 20])
    # Kept at a tiny resolution, as long as one original pixel is there.
    pixel = annotation(2, 1, [4.0, 4, 5, 4, 5, 5, 4, 5])
    for entries, expected in (([last_row, pixel], [2]), ([last_row], [])):
        cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 30, 3), np.uint8))
        path = write_json(tmp_path / "a.json", [image], entries)
        options: dict[str, Any] = {"image_size": 16, "resize_mode": resize_mode}
        dataset = Coco2MaskDataset(tmp_path, path, training=training, **options)
        assert len(dataset[0].boxes) == len(entries)
        cv2.imwrite(str(tmp_path / "a.png"), np.zeros((19, 30, 3), np.uint8))
        sample = dataset[0]
        assert sample.object_ids.tolist() == expected and sample.original_size == (19, 30)
        batch = collate([sample, dataset[0]])
        assert batch.num_masks == 2 * len(expected)
        assert batch.targets.shape == (batch.num_masks, 64, 64)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_and_resuming_change_nothing(tmp_path: Path, num_workers: int) -> None:
    # With all that is random: crops, colours, subsets, repeats, and an image that is replaced.
    annotations = write_coco(tmp_path, 13)
    dataset = _dataset(annotations, max_masks_per_image=3, augment="scale", on_bad_image="skip")
    (annotations.parent / "image_4.png").write_bytes(b"broken")
    options: dict[str, Any] = {"batch_size": 2, "accumulate_steps": 2, "steps": 8, "seed": 1}
    options["repeats"] = np.linspace(1, 2, 13)
    alone = list(train_loader(dataset, **options))
    assert len(alone) == 16 and any(batch.bad_images for batch in alone)
    theirs = list(train_loader(dataset, **options, num_workers=num_workers))
    resumed = list(train_loader(dataset, **options, start_step=3, num_workers=num_workers))
    for mine, other in zip(alone * 2, [*theirs, *alone[:6], *resumed], strict=True):
        _assert_equal(mine, other)


def test_workers_change_nothing_in_validation(annotations: Path) -> None:
    check = _dataset(annotations, training=False)
    loader = val_loader(check, num_workers=2, rank=1, world_size=2)
    for _ in range(2):
        batches = list(loader)
        assert [batch.image_ids for batch in batches] == [[11], [13], [15], [17], [19], [21]]
    for mine, theirs in zip(val_loader(check, rank=1, world_size=2), batches, strict=True):
        _assert_equal(mine, theirs)


def test_an_endless_loader_continues_past_the_epoch(annotations: Path) -> None:
    batches = iter(train_loader(_dataset(annotations), batch_size=5))
    ids = [i for _ in range(6) for i in next(batches).image_ids]
    assert sorted(ids[:13]) == sorted(ids[13:26]) == list(range(10, 23))


def test_loading_leaves_the_global_generators_alone(annotations: Path) -> None:
    torch_state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    list(train_loader(_dataset(annotations), batch_size=2, steps=3, num_workers=0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == numpy_state


class _WorkerState(Coco2MaskDataset):
    def __getitem__(self, key: Any) -> Sample:
        sample = super().__getitem__(key)
        threads = [cv2.getNumThreads(), torch.get_num_threads()]
        sample.object_ids = torch.tensor(threads * len(sample.boxes))
        return sample


def test_workers_use_one_thread(annotations: Path) -> None:
    dataset = _WorkerState(annotations.parent, annotations, image_size=64)
    batch = next(iter(val_loader(dataset, num_workers=1)))
    assert set(batch.object_ids.tolist()) == {1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_named_by_the_loader(tmp_path: Path, num_workers: int) -> None:
    path = write_coco(tmp_path, 3)
    dataset = _dataset(path)
    (path.parent / "image_1.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"image_1\.png") as error:
        list(train_loader(dataset, batch_size=3, steps=1, num_workers=num_workers))
    assert "\n" not in str(error.value)


def test_skipping_takes_the_next_image_that_can_be_read(tmp_path: Path) -> None:
    path = write_coco(tmp_path, 5)
    dataset = _dataset(path, on_bad_image="skip")
    whole = [dataset[2, i] for i in range(5)]
    (path.parent / "image_4.png").write_bytes(b"not an image")
    (path.parent / "image_0.png").unlink()
    samples = [dataset[2, i] for i in range(5)]
    assert [sample.image_id for sample in samples] == [11, 11, 12, 13, 11]
    names = [list(sample.bad_images) for sample in samples]
    assert names == [["image_0.png"], [], [], [], ["image_4.png", "image_0.png"]]
    assert "image_4.png" in samples[4].bad_images["image_4.png"]
    for i in (1, 2, 3):
        _assert_equal(samples[i], whole[i])
    # Not a twin of what the other sample of that image shows.
    assert not torch.equal(samples[0].boxes, samples[1].boxes)
    assert not torch.equal(samples[0].boxes, samples[4].boxes)
    batch = collate(samples)
    assert list(batch.bad_images) == ["image_0.png", "image_4.png"]


def test_skipping_in_validation_replaces_nothing(tmp_path: Path) -> None:
    path = write_coco(tmp_path, 3)
    dataset = _dataset(path, on_bad_image="skip", training=False)
    (path.parent / "image_1.png").write_bytes(b"")
    batches = list(val_loader(dataset))
    assert [batch.image_ids for batch in batches] == [[10], [11], [12]]
    assert [batch.num_masks for batch in batches] == [1, 0, 2]
    assert [list(batch.bad_images) for batch in batches] == [[], ["image_1.png"], []]
    assert batches[1].images.shape == (1, 3, 64, 64) and batches[1].targets.shape == (0, 64, 64)
    assert batches[1].original_sizes.tolist() == [list(SIZES[1])]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_skipping_ends_where_nothing_can_be_read(tmp_path: Path, num_workers: int) -> None:
    path = write_coco(tmp_path, 3)
    dataset = _dataset(path, on_bad_image="skip")
    for i in range(3):
        (path.parent / f"image_{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 3 images .*image_\d\.png"):
        next(iter(train_loader(dataset, batch_size=1, num_workers=num_workers)))


def test_copies_of_an_image_in_an_epoch_differ(annotations: Path) -> None:
    dataset = _dataset(annotations)
    _assert_equal(dataset[5, 3], dataset[5, 3, 0])
    assert not torch.equal(dataset[5, 3, 0].boxes, dataset[5, 3, 1].boxes)


def test_scale_crops_image_boxes_and_targets_alike(annotations: Path) -> None:
    options: dict[str, Any] = {"augment": "scale", "box_jitter": 0.0, "loss_resolution": "input"}
    dataset = _dataset(annotations, **options)
    zooms, cut = [], 0
    for epoch in range(60):
        sample = dataset[epoch, 3]
        height, width = sample.input_size
        assert len(sample.boxes) > 0 and max(height, width) <= 64
        zooms.append((height * width) / 64**2)
        assert sample.image[:, height:].sum() == sample.image[:, :, width:].sum() == 0
        assert sample.targets[:, height:].sum() == sample.targets[:, :, width:].sum() == 0
        cut += len(sample.boxes) < 7
        for box, target in zip(sample.boxes, sample.targets, strict=True):
            xs, ys = target.any(dim=0).nonzero(), target.any(dim=1).nonzero()
            tight_box = torch.tensor([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
            # An original pixel is up to two wide.
            torch.testing.assert_close(box, tight_box.float(), atol=2.6, rtol=0)
            inside = target.bool()
            bright = sample.image.float().mean(0)
            assert bright[inside].mean() > 90  # objects are brighter than 120, the rest than 0..80
    assert min(zooms) < 0.3 and max(zooms) == 1 and 5 < cut < 55


def test_a_crop_never_empties_a_sample(tmp_path: Path) -> None:
    # One object of 3 px in a corner of 400 x 400: most crops of a quarter miss it.
    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), np.zeros((400, 400, 3), np.uint8))
    image = {"id": 1, "file_name": "a.png", "height": 400, "width": 400}
    corner = annotation(1, 1, [396.0, 396, 399, 396, 399, 399, 396, 399])
    path = write_json(tmp_path / "a.json", [image], [corner])
    dataset = Coco2MaskDataset(folder, path, image_size=64, training=True, augment="scale")
    samples = [dataset[epoch, 0] for epoch in range(80)]
    assert all(sample.object_ids.tolist() == [1] and sample.targets.any() for sample in samples)
    sizes = {round(float(s.boxes[0, 2] - s.boxes[0, 0]), 3) for s in samples}
    assert len(sizes) > 10  # drawn again and again, not always whole


def test_batches_lie_in_memory_as_images_are_decoded(annotations: Path) -> None:
    batch = next(iter(train_loader(_dataset(annotations), batch_size=3, num_workers=1)))
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_training_shows_large_jpegs_as_validation_does(tmp_path: Path) -> None:
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8), (833, 577))
    cv2.imwrite(str(tmp_path / "a.jpg"), smooth)
    image = {"id": 1, "file_name": "a.jpg", "height": 577, "width": 833}
    quad = annotation(1, 1, [100.0, 100, 700, 130, 650, 500, 90, 420])
    path = write_json(tmp_path / "a.json", [image], [quad])
    for size in (128, 192, 64):
        train, val = (
            Coco2MaskDataset(
                tmp_path, path, image_size=size, training=t, augment="none", box_jitter=0.0
            )[0]
            for t in (True, False)
        )
        assert (train.input_size, train.original_size) == (val.input_size, (577, 833))
        torch.testing.assert_close(train.boxes, val.boxes)
        assert (train.image.int() - val.image.int()).abs().float().mean() < 2
        assert (train.targets.int() - val.targets.int()).abs().max() <= 20


def test_the_dataset_needs_annotations_or_an_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="annotations"):
        Coco2MaskDataset(tmp_path)


@pytest.mark.parametrize("name", ["hbn_flakes", "mushrooms", "coco_open104"])
def test_real_samples_are_whole(data_root: Path, name: str) -> None:
    annotations, folder = find_split(data_root / name, "train")
    subset = read_coco(annotations, folder)
    dataset = Coco2MaskDataset(folder, subset=subset, image_size=256)
    for i in range(0, len(dataset), len(dataset) // 3):
        sample = dataset[i]
        count = int(subset.first_object[i + 1] - subset.first_object[i])
        assert len(sample.boxes) == len(sample.truths) == len(sample.targets) == count
        assert sample.original_size == open_image(subset.path(i)).size
        # What the target holds is the truth's area, but for rounding to 1/255 of a cell.
        scale = sample.input_size[0] / sample.original_size[0]
        sides = sample.windows[:, 2:] - sample.windows[:, :2]
        cell_areas = (sides.prod(1) / sample.targets[0].numel()).tolist()
        for target, truth, cell in zip(sample.targets, sample.truths, cell_areas, strict=True):
            area = truth.mask.sum() * scale * sample.input_size[1] / sample.original_size[1]
            cells = np.count_nonzero(target) + 4
            rounding = cell * 0.5 / 255 * cells + 1e-4 * area
            assert abs(target.double().sum() / 255 * cell - area) <= rounding
