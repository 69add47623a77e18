"""Windows: they cover the image, and each object has exactly one in which it is scored."""

import numpy as np
import pytest

from samft.views.mapping import (
    boxes_to_window,
    cut_window,
    points_to_window,
)
from samft.views.windows import (
    MIN_SHARE,
    View,
    best_windows,
    held_shares,
    object_windows,
    tile_windows,
    view_objects,
)

TILES = View("tiles", tile_size=64, tile_overlap=0.25)
OBJECTS = View("objects", tile_size=64, context=2.0)
SIZES = [(64, 64), (65, 64), (40, 200), (1, 1), (63, 300), (127, 129), (300, 97)]


def draw_boxes(seed: int, size: tuple[int, int], *, number: int = 40, most: int = 90) -> np.ndarray:
    """Boxes of 1 to `most` px that lie in an image, some flush with its edges."""
    generator = np.random.default_rng(seed)
    limit = np.array(size[::-1])
    low = generator.uniform(0, limit, (number, 2)).round(generator.integers(0, 3))
    low = np.minimum(low, limit - 1)
    high = np.minimum(low + generator.uniform(1, most, (number, 2)), limit)
    return np.concatenate([low, high], axis=1)


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_cover_the_image_and_stay_inside(size, overlap) -> None:
    windows = tile_windows(size, View("tiles", tile_size=64, tile_overlap=overlap))
    covered = np.zeros(size, dtype=int)
    for window in windows:
        cut_window(covered, window)[...] += 1
    assert covered.min() >= 1
    assert (windows[:, :2] >= 0).all() and (windows[:, 2:] <= size[::-1]).all()
    shapes = windows[:, 2:] - windows[:, :2]
    assert (shapes == [min(size[1], 64), min(size[0], 64)]).all()
    assert len(np.unique(windows, axis=0)) == len(windows)


@pytest.mark.parametrize("overlap", [0, 0.25, 0.6])
def test_neighbouring_tiles_share_at_least_the_overlap(overlap) -> None:
    starts = np.unique(tile_windows((64, 1000), View("tiles", 64, overlap))[:, 0])
    assert (starts[:-1] + 64 - starts[1:] >= round(overlap * 64)).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", [View(), TILES, OBJECTS])
def test_every_object_has_exactly_one_scored_window(view, size) -> None:
    for seed in range(5):
        boxes = draw_boxes(seed, size)
        seen = view_objects(boxes, size, view)
        assert sorted(seen.objects.tolist()) == list(range(len(boxes)))
        assert seen.counts.sum() == len(boxes) and seen.counts.min() >= 1


def test_every_position_at_a_seam_has_the_window_that_holds_most() -> None:
    # Tiles at 0, 48 and 86 of 150 px; a box of 20 px at every position, in steps of 1/4 px.
    view, size = TILES, (64, 150)
    windows = tile_windows(size, view)
    for x0 in np.arange(0, 130.25, 0.25):
        box = np.array([[x0, 5, x0 + 20, 25]])
        shares = held_shares(box, windows)[0]
        (best,) = best_windows(box, windows)
        assert shares[best] == shares.max()
        rivals = np.flatnonzero(shares == shares.max())
        centres = windows[rivals][:, [0, 2]].mean(axis=1)
        nearest = np.abs(centres - (x0 + 10)).min()
        assert abs(windows[best][[0, 2]].mean() - (x0 + 10)) == nearest


def test_best_window_by_hand() -> None:
    windows = np.array([[0, 0, 10, 10], [6, 0, 16, 10], [0, 0, 10, 10]])
    boxes = [[0, 0, 4, 4], [7, 0, 9, 4], [6, 0, 10, 4], [8, 0, 14, 4], [20, 0, 22, 4]]
    # 2: held by both, centre 8 as far from 5 as from 11. 4: held by none, nearest to 11.
    assert best_windows(np.array(boxes), windows).tolist() == [0, 0, 0, 1, 1]


def test_boxes_without_area_have_a_window_too() -> None:
    windows = tile_windows((64, 150), TILES)
    boxes = np.array([[149.0, 3, 149, 9], [150, 64, 150, 64], [10, 10, 40, 10]])
    assert best_windows(boxes, windows).tolist() == [2, 2, 0]


def test_training_takes_objects_that_are_held_by_half_or_more_everywhere() -> None:
    for seed in range(5):
        size = (150, 170)
        boxes = draw_boxes(seed, size)
        windows = tile_windows(size, TILES)
        shares = held_shares(boxes, windows)
        wanted = {
            (tuple(windows[n]), k)
            for k in range(len(boxes))
            for n in range(len(windows))
            if shares[k, n] >= MIN_SHARE
        }
        seen = view_objects(boxes, size, TILES, training=True)
        owner = np.repeat(np.arange(len(seen.windows)), seen.counts)
        pairs = [(tuple(seen.windows[n]), k) for n, k in zip(owner, seen.objects, strict=True)]
        assert len(pairs) == len(set(pairs)) and set(pairs) == wanted


def test_windows_around_objects_hold_their_surroundings() -> None:
    for seed in range(10):
        size = (400, 500)
        boxes = draw_boxes(seed, size, most=30)
        windows = object_windows(boxes, size, OBJECTS)
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        around = np.concatenate([centre - half, centre + half], axis=1)
        around = np.clip(around, 0, [500, 400, 500, 400])
        best = windows[best_windows(boxes, windows)]
        shares = held_shares(around, windows)
        assert (shares.max(axis=1) > 1 - 1e-9).all()
        assert (windows[:, 2:] - windows[:, :2] == 64).all()
        assert (held_shares(boxes, best).diagonal() > 1 - 1e-9).all()


def test_an_object_too_large_for_a_tile_has_a_larger_window() -> None:
    boxes = np.array([[100, 100, 150, 120], [101, 101, 105, 105]])
    assert object_windows(boxes, (300, 300), OBJECTS).tolist() == [
        [75, 60, 175, 160],  # 2 x 50 px wide, square, around the centre at 125, 110
        [71, 71, 135, 135],
    ]


def test_objects_share_a_window_as_long_as_they_fit() -> None:
    boxes = np.array([[k * 20, 0, k * 20 + 4, 4] for k in range(8)])
    # The surroundings of three in a row are 20 + 20 + 8 px wide; of four, 68 px.
    windows = object_windows(boxes, (64, 200), OBJECTS)
    assert len(windows) == 3
    assert np.bincount(best_windows(boxes, windows)).sum() == 8


@pytest.mark.parametrize("view", [TILES, OBJECTS])
def test_windows_do_not_depend_on_the_order_of_objects(view) -> None:
    boxes = draw_boxes(3, (300, 300), number=60, most=40)
    order = np.random.default_rng(0).permutation(len(boxes))
    one, other = (view_objects(each, (300, 300), view) for each in (boxes, boxes[order]))
    assert np.array_equal(one.windows, other.windows)


def test_images_without_objects_have_no_window_with_any() -> None:
    for view in (View(), TILES, OBJECTS):
        seen = view_objects(np.zeros((0, 4)), (100, 100), view)
        assert seen.windows.shape == (0, 4) and len(seen.objects) == len(seen.counts) == 0


def test_thousands_of_objects_are_compared_in_parts(monkeypatch) -> None:
    boxes = draw_boxes(1, (600, 600), number=300)
    whole = view_objects(boxes, (600, 600), TILES, training=True)
    monkeypatch.setattr("samft.views.windows._MOST_PAIRS", 1000)
    parts = view_objects(boxes, (600, 600), TILES, training=True)
    assert np.array_equal(whole.objects, parts.objects)


def test_masks_boxes_and_points_come_back_to_the_pixel_at_every_position() -> None:
    size = (64, 150)
    for x0 in range(0, 140):
        mask = np.zeros(size, dtype=bool)
        mask[20:31, x0 : x0 + 10] = np.eye(11, 10, dtype=bool)
        box = np.array([[x0 + 0.37, 20.11, x0 + 9.3, 30.93]])
        seen = view_objects(box, size, TILES)
        window = seen.windows[0]
        cut = cut_window(mask, window)
        back = np.zeros(size, dtype=bool)
        cut_window(back, window)[:] = cut
        assert np.array_equal(back, mask) == (held_shares(box, seen.windows)[0, 0] > 1 - 1e-9)
        own = boxes_to_window(box, window)
        clipped = np.clip(box, np.tile(window[:2], 2), np.tile(window[2:], 2))
        np.testing.assert_allclose(own + np.tile(window[:2], 2), clipped, rtol=0, atol=1e-9)
        points = box.reshape(2, 2)
        there_and_back = points_to_window(points, window) + window[:2]
        np.testing.assert_allclose(there_and_back, points, rtol=0, atol=1e-9)
