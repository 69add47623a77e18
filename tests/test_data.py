import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from coco_files import SIZES, annotation, write_coco, write_json
from samft.coco import find_split, read_coco
from samft.data import (
    Batch,
    Coco2MaskDataset,
    Sample,
    ShardSampler,
    StepSampler,
    collate,
    train_loader,
    val_loader,
)
from samft.errors import DataError
from samft.images import MAX_PIXELS, header_size, read_image
from samft.transforms import make_frame

LAYOUTS = [(1, 4, 1), (2, 2, 1), (1, 1, 4), (2, 1, 2)]  # world size, batch size, accumulation


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
        found = [truth.left, truth.top, truth.left + width, truth.top + height]
        np.testing.assert_allclose(found, [x, y, x + w, y + h], atol=1)
        # 64 px wide at an image size of 64: the target's cells hold the truth's pixels.
        total = sample.targets[k].double().sum() / 255 * 16
        np.testing.assert_allclose(total, truth.mask.sum(), rtol=0.02)
    assert sample.targets.shape == (7, 16, 16)


def test_targets_at_the_input_are_the_mask(annotations: Path) -> None:
    sample = _dataset(annotations, training=False, loss_resolution="input")[0]
    truth = sample.truths[0]
    expected = torch.zeros(1, 64, 64, dtype=torch.uint8)
    height, width = truth.mask.shape
    inside = expected[0, truth.top : truth.top + height, truth.left : truth.left + width]
    inside[:] = torch.from_numpy(truth.mask)
    assert torch.equal(sample.targets, expected)


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
            found = torch.tensor([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
            torch.testing.assert_close(box, found.float(), atol=1.5, rtol=0)
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
    alone = _dataset(annotations, index=dataset.index.select([3]))
    _assert_equal(first, alone[5, 0])
    assert not torch.equal(first.boxes, dataset[6, 3].boxes)
    assert not torch.equal(first.boxes, _dataset(annotations, seed=1)[5, 3].boxes)


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
def test_an_image_whose_masks_vanish_in_the_smaller_file(tmp_path: Path, resize_mode: str) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((19, 30, 3), np.uint8))
    image = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}
    last_row = annotation(1, 1, [2.0, 19, 9, 19, 9, 20, 2, 20])
    # Kept at a tiny resolution, as long as one original pixel is there.
    pixel = annotation(2, 1, [4.0, 4, 5, 4, 5, 5, 4, 5])
    for entries, expected in (([last_row, pixel], [2]), ([last_row], [])):
        path = write_json(tmp_path / "a.json", [image], entries)
        dataset = Coco2MaskDataset(tmp_path, path, image_size=16, resize_mode=resize_mode)
        sample = dataset[0]
        assert sample.object_ids.tolist() == expected and sample.original_size == (19, 30)
        batch = collate([sample, dataset[0]])
        assert batch.num_masks == 2 * len(expected)
        assert batch.targets.shape == (batch.num_masks, 4, 4)


def _steps(sampler: StepSampler, accumulate: int) -> list[list[tuple[int, int]]]:
    lists = list(sampler)
    return [
        [key for keys in lists[start : start + accumulate] for key in keys]
        for start in range(0, len(lists), accumulate)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_has_the_same_images_in_any_layout(layout: tuple[int, int, int]) -> None:
    world, batch, accumulate = layout
    expected = [sorted(keys) for keys in StepSampler(num_images=13, batch_size=4, steps=9, seed=3)]
    ranks = [
        StepSampler(
            num_images=13,
            batch_size=batch,
            accumulate_steps=accumulate,
            steps=9,
            rank=rank,
            world_size=world,
            seed=3,
        )
        for rank in range(world)
    ]
    by_rank = [_steps(sampler, accumulate) for sampler in ranks]
    assert all(len(steps) == 9 for steps in by_rank)
    assert [sorted(sum(parts, [])) for parts in zip(*by_rank, strict=True)] == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_gives_the_same_tail(layout: tuple[int, int, int]) -> None:
    world, batch, accumulate = layout
    for rank in range(world):
        options: dict[str, Any] = {
            "num_images": 13,
            "batch_size": batch,
            "accumulate_steps": accumulate,
            "steps": 20,
            "rank": rank,
            "world_size": world,
        }
        straight = list(StepSampler(**options))
        assert list(StepSampler(**options, start_step=7)) == straight[7 * accumulate :]


def test_an_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    stream = (key for keys in StepSampler(num_images=13, batch_size=4, seed=1) for key in keys)
    keys = [next(stream) for _ in range(3 * 13)]
    orders = [[i for epoch, i in keys if epoch == e] for e in range(3)]
    assert [epoch for epoch, _ in keys] == [0] * 13 + [1] * 13 + [2] * 13
    assert all(sorted(order) == list(range(13)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    other = next(iter(StepSampler(num_images=13, batch_size=13, seed=2)))
    assert [i for _, i in other] != orders[0]


def test_more_images_in_a_step_than_there_are() -> None:
    first = next(iter(StepSampler(num_images=3, batch_size=8)))
    assert [epoch for epoch, _ in first] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("num_images", [1, 2, 57])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_shards_hold_each_image_once(num_images: int, world_size: int) -> None:
    shards = [
        ShardSampler(num_images, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert sorted(i for shard in shards for i in shard) == list(range(num_images))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]


def test_workers_change_nothing(annotations: Path) -> None:
    dataset = _dataset(annotations, max_masks_per_image=3)
    options: dict[str, Any] = {"batch_size": 2, "accumulate_steps": 2, "start_step": 3, "steps": 8}
    alone = list(train_loader(dataset, **options, num_workers=0))
    assert len(alone) == 10
    for mine, theirs in zip(alone, train_loader(dataset, **options, num_workers=2), strict=True):
        _assert_equal(mine, theirs)
    check = _dataset(annotations, training=False)
    loader = val_loader(check, num_workers=2, rank=1, world_size=2)
    for _ in range(2):
        batches = list(loader)
        assert [batch.image_ids for batch in batches] == [[11], [13], [15], [17], [19], [21]]
    for mine, theirs in zip(val_loader(check, rank=1, world_size=2), batches, strict=True):
        _assert_equal(mine, theirs)


def test_an_endless_loader_goes_on_past_the_epoch(annotations: Path) -> None:
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


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return Image.fromarray(cv2.blur(noise, (9, 9)))


def _broken() -> Iterator[tuple[str, bytes]]:
    for kind in ("JPEG", "PNG", "WEBP"):
        content = _encode(_photo(), kind)
        yield f"{kind} cut", content[: len(content) * 2 // 3]
        yield f"{kind} stub", content[:30]
    yield "progressive cut", _encode(_photo(), "JPEG", progressive=True)[:-200]
    yield "empty", b""
    yield "text", b"hello"


BROKEN = dict(_broken())


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_images_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.jpg"):
        read_image(path)


def test_missing_images_and_bombs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png"):
        read_image(tmp_path / "gone.png")
    side = int((2 * MAX_PIXELS) ** 0.5) + 9
    for name, height in (("bomb.png", side), ("large.png", side // 2 + 9)):
        _encode_header_only(tmp_path / name, side, height)
        with pytest.raises(DataError, match="scale it down"):
            read_image(tmp_path / name)


def _encode_header_only(path: Path, width: int, height: int) -> None:
    content = bytearray(_encode(Image.new("L", (1, 1)), "PNG"))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1"])
def test_png_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.full((9, 7), 255, np.uint8)
    grey[:, 3:] = 0
    image = Image.fromarray(grey)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    (tmp_path / "a.png").write_bytes(_encode(image, "PNG"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.stack([grey] * 3, axis=-1))


def test_colours_come_as_rgb_and_cmyk_is_close(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (250, 10, 20))
    (tmp_path / "a.jpg").write_bytes(_encode(red, "JPEG", quality=95))
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg")[3, 3], [250, 10, 20], atol=4)
    (tmp_path / "b.jpg").write_bytes(_encode(red.convert("CMYK"), "JPEG", quality=95))
    np.testing.assert_allclose(read_image(tmp_path / "b.jpg")[3, 3], [250, 10, 20], atol=12)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(_encode(_photo(), "JPEG", exif=exif))
    assert read_image(tmp_path / "a.jpg").shape == (90, 120, 3)
    assert header_size(tmp_path / "a.jpg") == (90, 120)


def test_a_thumbnails_end_does_not_stand_for_the_images(tmp_path: Path) -> None:
    thumbnail = _encode(_photo().resize((12, 9)), "JPEG")
    content = _encode(_photo(), "JPEG", exif=b"Exif\0\0" + thumbnail)
    (tmp_path / "a.jpg").write_bytes(content + b"trailing")
    assert read_image(tmp_path / "a.jpg").shape == (90, 120, 3)
    (tmp_path / "a.jpg").write_bytes(content[:-300])
    with pytest.raises(DataError, match="cut short"):
        read_image(tmp_path / "a.jpg")


def test_the_dataset_needs_annotations_or_an_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="annotations"):
        Coco2MaskDataset(tmp_path)


@pytest.mark.parametrize("name", ["hbn_flakes", "mushrooms", "coco_open104"])
def test_real_samples_are_whole(data_root: Path, name: str) -> None:
    annotations, folder = find_split(data_root / name, "train")
    index = read_coco(annotations, folder)
    dataset = Coco2MaskDataset(folder, index=index, image_size=256)
    for i in range(0, len(dataset), len(dataset) // 3):
        sample = dataset[i]
        count = int(index.first_object[i + 1] - index.first_object[i])
        assert len(sample.boxes) == len(sample.truths) == len(sample.targets) == count
        assert sample.original_size == header_size(folder / index.file_names[i])
        # What the target holds is the truth's area, but for rounding to 1/255 of a cell.
        scale = sample.input_size[0] / sample.original_size[0]
        for target, truth in zip(sample.targets, sample.truths, strict=True):
            area = truth.mask.sum() * scale * sample.input_size[1] / sample.original_size[1]
            cells = np.count_nonzero(target) + 4
            assert abs(target.double().sum() / 255 * 16 - area) <= 16 * 0.5 / 255 * cells
