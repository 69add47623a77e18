"""The crop of an object: its place in the image, and its outline, box and predicted mask."""

from pathlib import Path

import cv2
import numpy as np

from helpers.coco_files import annotation
from helpers.painted_objects import (
    CYAN,
    GREY,
    HEIGHT,
    MAGENTA,
    WIDTH,
    bounds_of_colour,
    rectangle,
    write_painted,
)
from samft.annotations.segmentation import CroppedMask
from samft.reports.drawing import TILE, annotate_crop, crop_around


def test_a_tile_shows_mask_box_and_margin(tmp_path: Path) -> None:
    """A box of 64 px, of which the mask fills the left half; the tile spans 84 px."""
    mask = rectangle(60, 20, 32, 64)
    index = write_painted(tmp_path, [annotation(1, 1, mask, bbox=[60, 20, 64, 64])])
    image = cv2.imread(str(tmp_path / "1.png"))[..., ::-1]
    tile = annotate_crop(index, 0, crop_around(index.boxes[0], image))
    assert tile.shape == (TILE, TILE, 3)
    scale = TILE / 84
    box = [round(v * scale) for v in (10, 10, 74, 74)]
    np.testing.assert_allclose(
        bounds_of_colour(tile, MAGENTA), [box[0], box[1], 42 * scale, box[3]], atol=2
    )
    assert bounds_of_colour(tile, CYAN)[2] == box[2]
    assert tile[box[1] + 9, 40 * TILE // 84 + 30].tolist() == [0, 90, 0]
    assert (tile[-1] == [0, 90, 0]).all()  # the margin; nothing beyond the image is in sight


def test_beyond_the_image_a_tile_is_grey(tmp_path: Path) -> None:
    index = write_painted(tmp_path, [annotation(1, 1, rectangle(0, 40, 40, 20))])
    image = cv2.imread(str(tmp_path / "1.png"))[..., ::-1]
    tile = annotate_crop(index, 0, crop_around(index.boxes[0], image))
    edge = 6 * TILE // 52
    assert (tile[:, : edge - 8] == GREY).all()  # where interpolation does not reach
    assert (tile[5, edge + 8 :] == [0, 90, 0]).all()


def test_a_tiny_object_is_shown_with_what_is_around_it(tmp_path: Path) -> None:
    index = write_painted(tmp_path, [annotation(1, 1, rectangle(50, 50, 4, 4))])
    tile = annotate_crop(
        index, 0, crop_around(index.boxes[0], cv2.imread(str(tmp_path / "1.png"))[..., ::-1])
    )
    x0, _, x1, _ = bounds_of_colour(tile, MAGENTA)
    np.testing.assert_allclose([x0, x1], [18 * TILE / 40, 22 * TILE / 40], atol=2)


def test_holes_are_outlined(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[20:80, 20:80] = 1
    mask[40:60, 40:60] = 0
    edges = np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=0, append=2))
    runs = {"size": [HEIGHT, WIDTH], "counts": np.diff(edges, prepend=0).tolist()}
    index = write_painted(
        tmp_path, [annotation(1, 1, rectangle(20, 20, 60, 60), segmentation=runs)]
    )
    tile = annotate_crop(
        index, 0, crop_around(index.boxes[0], cv2.imread(str(tmp_path / "1.png"))[..., ::-1])
    )
    middle = (tile[TILE // 2] == MAGENTA).all(-1)
    assert middle.sum() == 4  # two outer edges, two inner ones


def test_a_predicted_mask_is_blended_in_where_it_is(tmp_path: Path) -> None:
    """The tile spans 84 px from 50, 10; the mask lies at 100 to 130, 20 to 60, and beyond it."""
    index = write_painted(tmp_path, [annotation(1, 1, rectangle(60, 20, 64, 64))])
    crop = crop_around(index.boxes[0], np.full((HEIGHT, WIDTH, 3), (0, 90, 0), np.uint8), tile=168)
    assert (crop.left, crop.top, crop.side) == (50, 10, 84)
    predicted = CroppedMask(20, 100, np.ones((40, 90), bool))
    without_mask, drawn = (
        annotate_crop(index, 0, crop),
        annotate_crop(index, 0, crop, predicted=predicted),
    )
    changed = (without_mask != drawn).any(-1)
    ys, xs = np.nonzero(changed)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (100, 167, 20, 99)
    assert (drawn[60, 110] == [10, 90, 127]).all()
    assert (
        annotate_crop(index, 0, crop, predicted=CroppedMask(0, 0, np.zeros((0, 0), bool)))
        == without_mask
    ).all()
    assert (crop.pixels == (0, 90, 0)).all()  # stays, to be drawn on again
