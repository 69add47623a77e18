"""Images seen through windows: each sample is that of an image cut out by hand."""

import itertools
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from helpers.coco_files import write_coco, write_json
from helpers.own_datasets import Discs
from samft.annotations.segmentation import decode_cropped
from samft.coco.subset import (
    CocoSubset,
    choose_objects,
    read_coco,
    see_through_windows,
    split_by_hash,
)
from samft.data.dataset import Coco2MaskDataset
from samft.data.map_style import index_dataset
from samft.data.transforms import make_frame, resize_image
from samft.errors import DataError
from samft.evaluation.metrics import whole_mask
from samft.images.decoder import open_image
from samft.images.files import ImageError
from samft.views.mapping import cut_window
from samft.views.windows import MIN_SHARE, View, held_shares

TILES = View("tiles", tile_size=48, tile_overlap=0.25)
OBJECTS = View("objects", tile_size=48, context=1.5)
SIZES = ((150, 130), (48, 170), (30, 40))


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), 6, objects=(14, 9, 3), sizes=SIZES)


@pytest.fixture(scope="module")
def whole(annotations: Path) -> CocoSubset:
    return read_coco(annotations, annotations.parent)


def dataset_of(subset: CocoSubset, **options: Any) -> Coco2MaskDataset:
    return Coco2MaskDataset(
        subset.index.image_folder, subset=subset, **{"image_size": 64, **options}
    )


def true_mask(subset: CocoSubset, row: int, k: int) -> np.ndarray:
    size = tuple(subset.index.sizes[subset.rows[row]].tolist())
    return whole_mask(decode_cropped(subset.index.segmentations[k], size), size)


def cut_by_hand(subset: CocoSubset, row: int, folder: Path) -> Coco2MaskDataset:
    """A dataset of one image: a window written to a file, with its objects' masks and boxes."""
    window, boxes = subset.windows[row], subset.visible_boxes(row)
    image = cv2.imread(str(subset.path(row)))
    cv2.imwrite(str(folder / "window.png"), cut_window(image, window))
    entries = []
    for number, k in enumerate(subset.objects_of(row).tolist(), start=1):
        x0, y0, x1, y1 = boxes[number - 1] - np.tile(window[:2], 2)
        part = cut_window(true_mask(subset, row, k), window)
        rle = mask_utils.encode(np.asfortranarray(part, dtype=np.uint8))
        rle["counts"] = rle["counts"].decode()
        bbox = [x0, y0, x1 - x0, y1 - y0]
        entries.append({"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": bbox})
        entries[-1] |= {"segmentation": rle, "area": int(part.sum())}
    width, height = (window[2:] - window[:2]).tolist()
    images = [{"id": 1, "file_name": "window.png", "height": height, "width": width}]
    return dataset_of(read_coco(write_json(folder / "cut.json", images, entries), folder))


@pytest.mark.parametrize("view", [TILES, OBJECTS])
def test_a_window_is_the_sample_of_an_image_cut_by_hand(whole, view, tmp_path) -> None:
    seen = see_through_windows(whole, view)
    dataset = dataset_of(seen)
    assert len(dataset) > whole.num_images
    for row in range(len(dataset)):
        sample, cut = dataset[row], cut_by_hand(seen, row, tmp_path)[0]
        assert torch.equal(sample.image, cut.image)
        assert (sample.original_size, sample.input_size) == (cut.original_size, cut.input_size)
        torch.testing.assert_close(sample.boxes, cut.boxes, rtol=0, atol=1e-3)
        gap = (sample.targets.int() - cut.targets.int()).abs().max()
        assert gap <= 1  # of 255: sums in another order


@pytest.mark.parametrize("view", [TILES, OBJECTS])
def test_each_object_is_scored_once_against_its_whole_mask(whole, view) -> None:
    seen = see_through_windows(whole, view)
    dataset, ids = dataset_of(seen), []
    for row in range(len(dataset)):
        sample = dataset[row]
        ids += sample.object_ids.tolist()
        size = sample.whole_size
        assert size == tuple(whole.index.sizes[seen.rows[row]].tolist())
        for k, truth in zip(seen.objects_of(row).tolist(), sample.truths, strict=True):
            assert np.array_equal(whole_mask(truth, size), true_mask(seen, row, k))
    assert sorted(ids) == sorted(whole.index.object_ids[whole.objects].tolist())


def test_training_shows_what_windows_hold_by_half_and_cuts_boxes_with_them(whole) -> None:
    seen = see_through_windows(whole, TILES, training=True)
    dataset = dataset_of(seen, training=True, augment="none", box_jitter=0)
    num_cut = 0
    for row in range(len(dataset)):
        sample, window = dataset[row], seen.windows[row]
        shares = held_shares(whole.index.boxes[seen.objects_of(row)], window[None])[:, 0]
        assert (shares >= MIN_SHARE).all() and not sample.truths
        num_cut += int((shares < 1 - 1e-9).sum())
        height, width = sample.input_size
        limit = torch.tensor([width, height] * 2)
        assert (sample.boxes >= -1e-3).all() and (sample.boxes <= limit + 1e-3).all()
    assert num_cut > 3
    held = whole.index.object_ids[np.unique(seen.objects)]
    assert len(held) + seen.counts.get("object-in-no-window", 0) == whole.num_objects


def test_a_cut_object_is_trained_on_with_a_box_around_what_its_window_shows(whole) -> None:
    # Wherever the window lies in its image.
    seen = see_through_windows(whole, TILES, training=True)
    dataset = dataset_of(seen, training=True, augment="none", box_jitter=0, max_masks_per_image=0)
    num_cut = 0
    for row in range(len(dataset)):
        sample, corner = dataset[row], np.tile(seen.windows[row, :2], 2)
        trained = dict(zip(sample.object_ids.tolist(), sample.boxes.numpy(), strict=True))
        limit = np.tile(whole.index.sizes[seen.rows[row]][::-1], 2)
        for k, visible in zip(seen.objects_of(row).tolist(), seen.visible_boxes(row), strict=True):
            mask = true_mask(seen, row, k)
            part = cut_window(mask, seen.windows[row])
            box = trained.get(int(whole.index.object_ids[k]))
            if np.array_equal(visible, np.clip(whole.index.boxes[k], 0, limit)):
                assert box is not None
                continue
            assert (box is not None) == (part.sum() >= 0.1 * mask.sum())
            if box is not None:
                num_cut += 1
                rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
                tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                scale = np.array(sample.input_size) / part.shape
                np.testing.assert_allclose(box, tight * np.tile(scale[::-1], 2), atol=1e-3)
                assert (tight + corner <= limit).all()
    assert num_cut > 3


def test_windows_of_an_image_are_augmented_on_their_own(whole) -> None:
    dataset = dataset_of(see_through_windows(whole, TILES, training=True), training=True)
    plain = dataset_of(dataset.subset, training=True, augment="none")
    of_first = [row for row in range(len(dataset)) if dataset.subset.rows[row] == 0]
    flipped = [not torch.equal(dataset[0, row].image, plain[0, row].image) for row in of_first]
    assert len(of_first) > 6 and any(flipped) and not all(flipped)
    assert torch.equal(dataset[3, 2].boxes, dataset[3, 2].boxes)


def test_windows_around_objects_move_and_keep_their_objects(whole) -> None:
    seen = see_through_windows(whole, OBJECTS, training=True)
    options = {"training": True, "augment": "none", "box_jitter": 0}
    still, moving = dataset_of(seen, **options), dataset_of(seen, **options, move_windows=True)
    origins = set()
    for row, epoch in itertools.product(range(len(moving)), range(4)):
        one, other = still[epoch, row], moving[epoch, row]
        origins.add((row, other.origin))
        height, width = seen.sizes[row]
        y, x = other.origin
        image = open_image(seen.path(row)).decode()[y : y + height, x : x + width]
        assert image.shape[:2] == (height, width)
        if other.input_size == (64, 64) == (height * 64 // 48, width * 64 // 48):
            shown = other.image.permute(1, 2, 0).numpy()
            frame = make_frame((int(height), int(width)), 64, resize_mode="pad")
            assert np.array_equal(shown, resize_image(image, frame, exact=False))
        # In px of the image, boxes that the window holds stay where they are.
        scale = max(height, width) / 64
        held = [k for k, own in enumerate(one.object_ids.tolist()) if own in other.object_ids]
        boxes = one.boxes[held].numpy() * scale + np.tile(one.origin[::-1], 2)
        rows = [other.object_ids.tolist().index(int(one.object_ids[k])) for k in held]
        moved = other.boxes[rows].numpy() * scale + np.tile(other.origin[::-1], 2)
        shares = held_shares(whole.index.boxes[seen.objects_of(row)], seen.windows[row, None])
        ids = whole.index.object_ids[seen.objects_of(row)][shares[:, 0] > 1 - 1e-9].tolist()
        inside = [one.object_ids[k].item() in ids for k in held]
        np.testing.assert_allclose(moved[inside], boxes[inside], atol=0.02)
        assert set(ids) <= set(other.object_ids.tolist())
    assert len(origins) > 2 * len(moving)
    assert torch.equal(moving[2, 0].image, moving[2, 0].image)
    assert dataset_of(seen, move_windows=True)[0].origin == seen.corner(0)  # not in validation


@pytest.mark.parametrize("augment", ["none", "flip", "scale"])
def test_objects_stay_on_their_pixels_in_any_augmentation(whole, augment) -> None:
    # The targets, drawn from outlines, cover what is bright in the window's pixels.
    dataset = dataset_of(
        see_through_windows(whole, TILES, training=True),
        training=True,
        augment=augment,
        box_jitter=0,
        loss_resolution="input",
    )
    for row in range(len(dataset)):
        sample = dataset[1, row]
        covered = sample.targets.numpy().astype(bool).any(axis=0)
        levels = sample.image.numpy().max(axis=0)
        if covered.sum() > 20:
            assert np.median(levels[covered]) > 90


def test_windows_are_not_decoded_anew_and_have_digests_of_their_own(whole) -> None:
    seen = see_through_windows(whole, TILES)
    digests = set()
    for row in range(seen.num_images):
        picture = seen.open_image(row)
        pixels = open_image(seen.path(row)).decode()
        assert np.array_equal(picture.decode(), cut_window(pixels, seen.windows[row]))
        assert picture.size == seen.size(row)
        digests.add(picture.digest())
    assert len(digests) == seen.num_images


def test_a_file_that_was_replaced_by_one_of_another_size_is_refused(tmp_path) -> None:
    annotations = write_coco(tmp_path, 1, sizes=((90, 100),))
    seen = see_through_windows(read_coco(annotations, annotations.parent), TILES)
    cv2.imwrite(str(seen.path(0)), np.zeros((100, 90, 3), dtype=np.uint8))
    with pytest.raises(ImageError, match="is of 90 x 100 px, and was of 100 x 90 px"):
        seen.open_image(0).decode()


def test_images_are_held_out_before_they_are_cut(whole) -> None:
    train, val = (see_through_windows(part, TILES) for part in split_by_hash(whole, 0.3))
    assert not set(train.rows.tolist()) & set(val.rows.tolist())


def test_some_windows_can_be_selected(whole) -> None:
    seen = see_through_windows(whole, TILES)
    some = seen.select([3, 1])
    for new, old in ((0, 3), (1, 1)):
        assert np.array_equal(some.windows[new], seen.windows[old])
        assert np.array_equal(some.objects_of(new), seen.objects_of(old))
        assert (some.size(new), some.corner(new)) == (seen.size(old), seen.corner(old))
    assert [seen.row_of(int(k)) for k in seen.objects_of(3)] == [3] * len(seen.objects_of(3))


def test_whole_images_stay_as_they_are(whole) -> None:
    assert see_through_windows(whole, View()) is whole
    assert whole.corner(0) == (0, 0) and whole.size(0) == SIZES[0]


def test_windows_too_small_for_any_object_are_refused(tmp_path) -> None:
    annotations = write_coco(tmp_path, 2, sizes=((300, 300),))
    document = json.loads(annotations.read_text())
    assert all(min(one["bbox"][2:]) > 5 for one in document["annotations"])
    tiny = View("tiles", tile_size=2, tile_overlap=0.5)
    with pytest.raises(DataError, match="no window of 2 px holds half of any object"):
        see_through_windows(read_coco(annotations, annotations.parent), tiny, training=True)


def test_a_callers_dataset_is_seen_through_windows_too() -> None:
    data = Discs(3)
    index = index_dataset(data, name="train_data")
    chosen = choose_objects(index, source="train_data", category_names=(), min_mask_area=0)
    seen = see_through_windows(chosen, View("tiles", tile_size=32, tile_overlap=0.5))
    dataset = dataset_of(seen, image_size=32)
    assert len(dataset) > 3
    for row in range(len(dataset)):
        image = data[int(seen.rows[row])][0]
        expected = cut_window(image, seen.windows[row])
        pixels = dataset[row].image.permute(1, 2, 0).numpy()
        assert np.array_equal(pixels[: len(expected), : expected.shape[1]], expected)
