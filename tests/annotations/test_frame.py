"""Outlines in another frame than the pixels: the frame is found, and a right set is never changed.

Pictures are drawn by the test: bright ellipses on dark paper, outlined exactly. Each set is right
or changed in one known way; noisy ones have a tenth of wrong boxes and outlines that leave the
image.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from helpers.drawn_sets import Change, DrawnSet, draw_set, encode, fit_into, write_set
from samft.annotations.problems import Problems
from samft.annotations.segmentation import PLAIN, decode_cropped, relayout, resample
from samft.coco.index import CocoIndex, index_file
from samft.coco.repair import write_repaired
from samft.coco.subset import read_coco
from samft.errors import DataError
from samft.images.orientation import inverse_orientation, turn_pixels

SEEDS = range(3)


def open_set(path: Path) -> CocoIndex:
    """The index of a set that `write_set` wrote."""
    return index_file(path, path.parent, cache=path.parent.parent / "cache")


def frame_of(path: Path) -> tuple[bool, bool, str]:
    """Whether images of a set are turned and outlines are scaled, and the layout of RLE."""
    frame = open_set(path).frame
    return bool(frame.get("turned_by_exif")), "scale_x_y" in frame, frame.get("rle", PLAIN)


def agreement(index: CocoIndex, drawn: DrawnSet, border: str = "") -> float:
    """The mean IoU of the index's masks with those drawn, in the images as they are decoded."""
    ious = []
    for row in range(index.num_images):
        image = index.open_image(row).decode()
        assert image.shape[:2] == tuple(index.sizes[row])
        for number, k in enumerate(range(*index.first_object[row : row + 2].tolist())):
            truth = fit_into(drawn.masks[row][number], image.shape[1::-1], border)
            crop = decode_cropped(index.segmentations[k], image.shape[:2])
            mask = np.zeros_like(truth)
            height, width = crop.mask.shape
            mask[crop.top : crop.top + height, crop.left : crop.left + width] = crop.mask
            ious.append((mask & truth).sum() / (mask | truth).sum())
            assert np.abs(index.boxes[k] - crop.extent).max() <= 3
    assert min(ious) > 0.6
    return float(np.mean(ious))


RIGHT = {
    "plain": Change(),
    "sizes of the files missing": Change(json_size="none"),
    "width and height swapped": Change(json_size="swapped"),
    "rle": Change(rle="plain"),
    "noise": Change(noise=True),
    "xyxy": Change(boxes="xyxy"),
    "centre and size": Change(boxes="centre"),
    "boxes as shares": Change(boxes="shares"),
    "boxes around the image": Change(boxes="image", rle="plain"),
    "no boxes": Change(boxes="none", rle="plain"),
}
SHAPES = {
    "upright": {"size": (120, 90)},
    "square": {"size": (100, 100)},
    "tiny": {"num_images": 1, "num_objects": 3},
    "one object": {"num_images": 1, "num_objects": 1},
    "many": {"num_images": 12, "num_objects": 6},
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("right", RIGHT)
def test_right_sets_stay_as_they_are(right: str, shape: str, seed: int, tmp_path: Path) -> None:
    path = write_set(tmp_path / "a", draw_set(seed, **SHAPES[shape]), RIGHT[right], seed=seed)
    index = open_set(path)
    assert index.frame == {}
    assert not index.problems.errors()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("all_turned", [True, False])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_outlines_on_stored_pixels_stay_whatever_exif_says(
    orientation: int, all_turned: bool, seed: int, tmp_path: Path
) -> None:
    drawn = draw_set(seed)
    path = write_set(tmp_path / "a", drawn, Change())
    for number, view in enumerate(drawn.views):
        exif = Image.Exif()
        exif[0x0112] = orientation if all_turned or number % 2 else 1
        Image.fromarray(view).save(tmp_path / "a" / f"{number}.png", exif=exif)
    index = open_set(path)
    assert index.frame == {} and index.problems["image-exif-rotated"] > 0
    assert agreement(index, drawn) > 0.85


TURNED = {
    "sizes turned": Change(json_size="view"),
    "sizes of the files": Change(json_size="file"),
    "no sizes": Change(json_size="none"),
    "some images": Change(json_size="view", all_turned=False),
    "noise": Change(json_size="file", noise=True),
    "rle": Change(json_size="view", rle="plain"),
    "no boxes": Change(json_size="view", boxes="none"),
    "resized afterwards": Change(json_size="view", factor=0.5),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("turned", TURNED)
def test_outlines_on_the_turned_view(
    turned: str, orientation: int, seed: int, tmp_path: Path
) -> None:
    change = Change(**{**vars(TURNED[turned]), "orientation": orientation})
    drawn = draw_set(seed, num_images=6, size=(240, 180) if change.factor < 1 else (120, 90))
    path = write_set(tmp_path / "a", drawn, change, seed=seed)
    assert frame_of(path) == (True, change.factor != 1, PLAIN)
    index = open_set(path)
    assert index.problems["frame-exif-turned"] == 1 and index.problems["image-exif-rotated"] == 0
    assert not index.problems.errors()
    if not change.noise:
        assert agreement(index, drawn) > 0.85


SCALED = {
    "halved": Change(factor=0.5),
    "three quarters": Change(factor=0.75),
    "a little smaller": Change(factor=0.9),
    "doubled": Change(factor=2),
    "a little larger": Change(factor=1.2),
    "to a fixed size": Change(fixed=(128, 128)),
    "into a border on both sides": Change(fixed=(160, 160), border="middle"),
    "into a border below": Change(fixed=(160, 160), border="corner"),
    "into a border, rle": Change(fixed=(160, 160), border="middle", rle="plain"),
    "halved, noise": Change(factor=0.5, noise=True),
    "doubled, noise": Change(factor=2, noise=True),
    "halved, rle": Change(factor=0.5, rle="plain"),
    "doubled, rle": Change(factor=2, rle="plain"),
    "halved, sizes of the files, rle": Change(factor=0.5, rle="plain", json_size="file"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scaled", SCALED)
def test_images_resized_after_labelling(scaled: str, seed: int, tmp_path: Path) -> None:
    change, drawn = SCALED[scaled], draw_set(seed, size=(240, 180))
    path = write_set(tmp_path / "a", drawn, change, seed=seed)
    assert frame_of(path) == (False, True, PLAIN)
    index = open_set(path)
    assert index.problems["frame-scaled"] == 1 and index.problems["image-size-differs"] == 0
    assert len(index.object_ids) == sum(map(len, drawn.masks))
    if not change.noise:
        assert agreement(index, drawn, change.border) > 0.75


@pytest.mark.parametrize("boxes", ["shares", "px", "none"])
@pytest.mark.parametrize("unit", [1, 100, 1000])
def test_outlines_in_shares_of_the_image(unit: int, boxes: str, tmp_path: Path) -> None:
    drawn = draw_set(0, size=(1300, 1200) if unit == 1000 else (180, 140))
    path = write_set(tmp_path / "a", drawn, Change())
    document = json.loads(path.read_text())
    for one in document["annotations"]:
        image = document["images"][one["image_id"] - 1]
        sides = np.array([image["width"], image["height"]] * 2) / unit
        one["segmentation"] = [
            (np.reshape(one["segmentation"], (-1, 2)) / sides[:2]).ravel().tolist()
        ]
        one["bbox"] = (one["bbox"] / sides).tolist() if boxes == "shares" else one["bbox"]
        if boxes == "none":
            del one["bbox"]
    path.write_text(json.dumps(document))
    index = open_set(path)
    assert index.problems["frame-shares"] == 1 and not index.problems.errors()
    assert agreement(index, drawn) > 0.85
    copy = tmp_path / "copy.json"
    write_repaired(index, path, target=copy)
    fixed = index_file(copy, path.parent, cache=tmp_path / "cache")
    assert fixed.frame == {} and agreement(fixed, drawn) > 0.85


@pytest.mark.parametrize("seed", SEEDS)
def test_objects_in_the_corner_of_all_images_are_no_shares(seed: int, tmp_path: Path) -> None:
    drawn = draw_set(seed, size=(90, 90))
    for number, view in enumerate(drawn.views):
        drawn.views[number] = np.pad(view, ((0, 200), (0, 200), (0, 0)), constant_values=40)
        drawn.masks[number] = [np.pad(mask, ((0, 200), (0, 200))) for mask in drawn.masks[number]]
    index = open_set(write_set(tmp_path / "a", drawn, Change()))
    assert index.frame == {} and agreement(index, drawn) > 0.85


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("boxes", ["xywh", "none"])
@pytest.mark.parametrize("layout", ["size-swapped", "by-rows", "by-rows-size-swapped"])
def test_layouts_of_rle(layout: str, boxes: str, seed: int, tmp_path: Path) -> None:
    if boxes == "none" and layout == "by-rows-size-swapped":
        pytest.skip("nothing tells a transposed mask")
    drawn = draw_set(seed)
    path = write_set(tmp_path / "a", drawn, Change(rle=layout, boxes=boxes))
    assert frame_of(path) == (False, False, layout)
    assert agreement(open_set(path), drawn) == 1


@pytest.mark.parametrize("layout", ["by-rows", "by-rows-size-swapped"])
def test_rle_by_rows_of_square_images(layout: str, tmp_path: Path) -> None:
    drawn = draw_set(0, num_images=4, size=(100, 100))
    drawn = DrawnSet(drawn.views[::2], drawn.masks[::2], drawn.polygons[::2])  # those of 100 x 100
    path = write_set(tmp_path / "a", drawn, Change(rle=layout))
    assert frame_of(path)[2] == "by-rows"
    assert agreement(open_set(path), drawn) == 1


def test_boxes_are_not_replaced_by_those_of_garbage(tmp_path: Path) -> None:
    drawn = draw_set(0)
    path = write_set(tmp_path / "a", drawn, Change())
    document = json.loads(path.read_text())
    shuffled = np.random.default_rng(0).permutation(len(document["annotations"])).tolist()
    polygons = [one["segmentation"] for one in document["annotations"]]
    for one, other in zip(document["annotations"], shuffled, strict=True):
        one["segmentation"] = polygons[other]
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"boxes-unlike-masks.*(\d+) of 20 objects"):
        read_coco(path, path.parent)


@pytest.mark.parametrize("seed", SEEDS)
def test_outlines_of_rows_and_columns_are_refused(seed: int, tmp_path: Path) -> None:
    path = write_set(tmp_path / "a", draw_set(seed, size=(120, 60)), Change(boxes="none"))
    document = json.loads(path.read_text())
    for one in document["annotations"]:
        one["segmentation"] = [np.reshape(one["segmentation"], (-1, 2))[:, ::-1].ravel().tolist()]
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="frame-y-first.*write x before y"):
        read_coco(path, path.parent)


def test_outlines_that_nothing_explains_are_refused(tmp_path: Path) -> None:
    change = Change(factor=0.4, json_size="file")
    path = write_set(tmp_path / "a", draw_set(0, size=(240, 180)), change)
    with pytest.raises(DataError, match=r"frame-unknown.*neither EXIF.*(\d+) of 20 objects"):
        read_coco(path, path.parent)


def test_outlines_of_tiles_may_leave_them_on_all_sides(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a", draw_set(0), Change())
    document = json.loads(path.read_text())
    for number, one in enumerate(document["annotations"]):
        move = [[40.0, 0.0], [-40.0, 0.0], [0.0, 50.0], [0.0, -50.0]][number % 4]
        polygon = np.array(one["segmentation"][0]).reshape(-1, 2) + move
        one["segmentation"] = [polygon.ravel().tolist()]
        one["bbox"] = [*polygon.min(0).tolist(), *np.ptp(polygon, axis=0).tolist()]
    path.write_text(json.dumps(document))
    index = open_set(path)
    assert index.frame == {} and "frame-unknown" not in index.problems.errors()


@pytest.mark.parametrize(
    "change",
    [
        Change(orientation=6),
        Change(orientation=3),
        Change(orientation=6, rle="plain"),
        Change(factor=0.5),
        Change(factor=2, rle="plain"),
        Change(rle="size-swapped"),
        Change(rle="by-rows"),
    ],
    ids=str,
)
def test_repaired_copies_are_in_the_plain_frame(change: Change, tmp_path: Path) -> None:
    drawn = draw_set(0, num_images=6, size=(240, 180))
    path = write_set(tmp_path / "a", drawn, change)
    index = open_set(path)
    copy = tmp_path / "fixed" / "fixed.json"
    write_repaired(index, path, target=copy)
    fixed = index_file(copy, path.parent, cache=tmp_path / "cache")
    assert index.frame and fixed.frame == {}
    assert fixed.problems.lines("error", "warning", "note") == []
    assert json.loads(copy.read_text())["samft_frame"]["reasons"]
    stored = DrawnSet(
        masks=[
            [turn_pixels(mask, inverse_orientation(change.orientation)) for mask in masks]
            for masks in drawn.masks
        ]
    )
    assert agreement(fixed, stored) > 0.85


def test_a_picture_that_was_turned_is_looked_at_again(tmp_path: Path) -> None:
    drawn = draw_set(0, num_images=6)
    path = write_set(tmp_path / "a", drawn, Change(orientation=6))
    assert frame_of(path) == (True, False, PLAIN)
    for number, view in enumerate(drawn.views):
        Image.fromarray(view).save(tmp_path / "a" / f"{number}.png")
    assert frame_of(path) == (False, False, PLAIN)


def test_resampling_keeps_the_pixel_under_each_centre() -> None:
    mask = np.zeros((6, 9), np.uint8)
    mask[1:4, 3:8] = 1
    rle = {"size": [6, 9], "counts": np.array(encode(mask, PLAIN)["counts"])}
    for size in ((3, 3), (12, 18), (6, 9), (5, 20)):
        scaled = resample(rle, size, np.array([size[1] / 9, size[0] / 6, 0, 0]))
        encoded = mask_utils.frPyObjects({**scaled, "counts": scaled["counts"].tolist()}, *size)
        rows = ((np.arange(size[0]) + 0.5) * 6 / size[0]).astype(int)
        columns = ((np.arange(size[1]) + 0.5) * 9 / size[1]).astype(int)
        np.testing.assert_array_equal(mask_utils.decode(encoded), mask[np.ix_(rows, columns)])
    one_pixel = {"size": [900, 900], "counts": np.array([0, 1, 809_999])}
    nothing = resample(one_pixel, (2, 2), np.array([2 / 900, 2 / 900, 0, 0]))
    assert nothing["counts"].tolist() == [4]


def test_relayout_is_exact() -> None:
    mask = (np.random.default_rng(0).random((5, 8)) < 0.4).astype(np.uint8)
    for layout in ("plain", "size-swapped", "by-rows", "by-rows-size-swapped"):
        raw = encode(mask, layout)
        rle = relayout({**raw, "counts": np.array(raw["counts"])}, layout)
        encoded = mask_utils.frPyObjects({**rle, "counts": rle["counts"].tolist()}, 5, 8)
        np.testing.assert_array_equal(mask_utils.decode(encoded), mask)


def test_problems_are_merged() -> None:
    problems, other = Problems(), Problems()
    problems.add("crowd", "a")
    other.add("crowd", *"bcd", count=30)
    problems.merge(other)
    assert problems["crowd"] == 31 and problems.issues["crowd"].examples == list("abcd")
