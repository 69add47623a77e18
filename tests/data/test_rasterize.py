"""Coverage of cells by polygons, against closed forms and pycocotools."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from pycocotools import mask as mask_utils

import samft.data.rasterize
from helpers.targets import rle_of
from samft.data.rasterize import decode_runs, polygon_edges, rasterize, rasterize_runs

Parts = list[list[float]]
SQUARE = [1.0, 1, 3, 1, 3, 3, 1, 3]


def _draw_coverage(
    objects: list[Parts], height: float, width: float, *, scale: float = 1.0
) -> np.ndarray:
    edges = polygon_edges([[np.array(p) * scale for p in parts] for parts in objects])
    areas = np.tile([0, 0, width, height], (len(objects), 1))
    canvas = np.zeros((len(objects), int(np.ceil(height)), int(np.ceil(width))))
    for block in rasterize(edges, areas):
        h, w = block.share.shape
        canvas[block.object, block.top : block.top + h, block.left : block.left + w] = block.share
        assert (h, w) == canvas[block.object, block.top :, block.left :][:h, :w].shape
    return canvas


def _fine(parts: Parts, side: int, times: int = 16) -> np.ndarray:
    # pycocotools on a grid so many times finer, averaged.
    enlarged = [(np.array(part) * times).tolist() for part in parts]
    rle = mask_utils.merge(mask_utils.frPyObjects(enlarged, side * times, side * times))
    mask = mask_utils.decode(rle).astype(float)
    return mask.reshape(side, times, side, times).mean(axis=(1, 3))


def test_a_rectangle_covers_what_it_overlaps() -> None:
    rectangle = [1.25, 1.5, 3.5, 1.5, 3.5, 4, 1.25, 4]
    expected = np.zeros((5, 6))
    expected[1:4, 1:4] = np.outer([0.5, 1, 1], [0.75, 1, 0.5])
    reversed_one = np.array(rectangle).reshape(-1, 2)[::-1].ravel().tolist()
    for polygon in (rectangle, reversed_one):
        np.testing.assert_allclose(_draw_coverage([[polygon]], 5, 6)[0], expected, atol=1e-12)


def test_a_triangle_covers_half_of_the_cells_on_its_diagonal() -> None:
    share = _draw_coverage([[[0, 0, 4, 0, 0, 4]]], 4, 4)[0]
    x, y = np.meshgrid(np.arange(4), np.arange(4))
    np.testing.assert_allclose(share, np.select([x + y < 3, x + y == 3], [1, 0.5]), atol=1e-12)
    # 3 across and 1 down: the first cell is cut at heights 0 and 1/3.
    share = _draw_coverage([[[0, 0, 3, 0, 3, 1]]], 1, 3)[0]
    np.testing.assert_allclose(share[0], [1 / 6, 1 / 2, 5 / 6], atol=1e-12)


def test_a_sliver_inside_of_one_cell() -> None:
    share = _draw_coverage([[[2.2, 1.2, 2.6, 1.2, 2.6, 1.7, 2.2, 1.7]]], 3, 4)[0]
    assert share[1, 2] == pytest.approx(0.2) and np.count_nonzero(share) == 1


def test_parts_are_joined_and_holes_are_by_the_even_odd_rule() -> None:
    far, near = [[1.0, 1, 2, 1, 2, 2, 1, 2], [4.0, 4, 5, 4, 5, 4.5, 4, 4.5]], [SQUARE, SQUARE]
    joined, twice = _draw_coverage([far, near], 6, 6)
    assert joined[1, 1] == 1 and joined[4, 4] == 0.5 and joined.sum() == 1.5
    assert twice.max() == 1 and twice.sum() == 4  # both parts cover the same: no more than once
    star = [[20 + 15 * np.sin(2.4 * np.pi * i / 3), 20 - 15 * np.cos(2.4 * np.pi * i / 3)]
            for i in range(5)]  # fmt: skip
    pentagram = np.ravel(star).tolist()
    share = _draw_coverage([[pentagram]], 40, 40)[0]
    assert share[20, 20] == pytest.approx(0, abs=1e-9)
    assert np.abs(share - _fine([pentagram], 40)).mean() < 0.002
    bow_tie = _draw_coverage([[[0, 0, 4, 4, 4, 0, 0, 4]]], 4, 4)[0]
    x, y = np.meshgrid(np.arange(4), np.arange(4))
    sides = np.select([(x == y) | (x == 3 - y), (x < y) ^ (x > 3 - y)], [0.5, 1])
    np.testing.assert_allclose(bow_tie, sides, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 6), (4.5, 5.25)])
def test_polygons_are_clipped_at_the_border(size: tuple[float, float]) -> None:
    around = [[-3.0, -2, 9, -2, 9, 8, -3, 8]]
    corner = [[-2.0, -2, 2.5, -2, 2.5, 1.5, -2, 1.5]]
    beyond = [[7.0, 1, 9, 1, 9, 3, 7, 3]]
    above = [[1.0, -4, 3, -4, 3, -1, 1, -1]]
    diagonal = [[-2.0, 1, 1, -2, 4, 1, 1, 4]]
    everything, near, outside, over, diamond = _draw_coverage(
        [around, corner, beyond, above, diagonal], *size
    )
    assert everything.sum() == pytest.approx(size[0] * size[1])
    assert near.sum() == pytest.approx(2.5 * 1.5) and near[1, 2] == pytest.approx(0.25)
    assert max(outside.max(), over.max()) < 1e-12
    expected = _clipped_area(np.reshape(diagonal[0], (-1, 2)), *size)
    assert diamond.sum() == pytest.approx(expected)


POINT = st.tuples(st.floats(-6, 22), st.floats(-6, 22))


@given(
    points=st.lists(POINT, min_size=3, max_size=8), height=st.floats(3, 16), width=st.floats(3, 16)
)
def test_areas_are_exact_for_triangles_of_any_place(
    points: list[tuple[float, float]], height: float, width: float
) -> None:
    triangle = np.array(points[:3])
    share = _draw_coverage([[triangle.ravel().tolist()]], height, width)[0]
    assert share.min() >= 0 and share.max() <= 1 + 1e-9
    assert share.sum() == pytest.approx(_clipped_area(triangle, height, width), abs=1e-6)


def _clipped_area(polygon: np.ndarray, height: float, width: float) -> float:
    # Sutherland-Hodgman, for a convex polygon.
    for axis, bound, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        kept = []
        for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            da, db = sign * (a[axis] - bound), sign * (b[axis] - bound)
            if da >= 0:
                kept.append(a)
            if (da >= 0) != (db >= 0):
                kept.append(a + (b - a) * da / (da - db))
        polygon = np.array(kept)
        if len(polygon) < 3:
            return 0.0
    x, y = polygon.T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


@given(seed=st.integers(0, 10**6), num_points=st.integers(3, 9))
def test_any_outline_is_what_pycocotools_draws_finely(seed: int, num_points: int) -> None:
    polygon = np.random.default_rng(seed).uniform(0.5, 15.5, 2 * num_points).tolist()
    off = np.abs(_draw_coverage([[polygon]], 16, 16)[0] - _fine([polygon], 16))
    # Only where the outline crosses itself may cells be off by more than pycocotools' rounding: two
    # edges that meet at a small angle share up to four cells (measured on 60,000 outlines).
    crossings = num_points * (num_points - 3) / 2
    assert off.mean() < min(0.04, 0.004 + 0.004 * crossings)
    assert np.count_nonzero(off > 0.06) <= 4 * crossings


def test_many_objects_in_small_chunks_are_each_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    objects: list[Parts] = []
    for k in range(30):
        parts = []
        for _ in range(1 + k % 3):
            angle = np.sort(generator.uniform(0, 2 * np.pi, 12))
            reach = generator.uniform(2, 15, (12, 1))
            ring = np.stack([np.cos(angle), np.sin(angle)], axis=1) * reach
            parts.append((generator.uniform(0, 60, 2) + ring).ravel().tolist())
        objects.append(parts)
    alone = np.concatenate([_draw_coverage([parts], 60, 60) for parts in objects])
    np.testing.assert_allclose(_draw_coverage(objects, 60, 60), alone, atol=1e-9)
    monkeypatch.setattr(samft.data.rasterize, "_CHUNK_CELLS", 100)
    np.testing.assert_allclose(_draw_coverage(objects, 60, 60), alone, atol=1e-9)


def test_lines_and_nothing_cover_nothing() -> None:
    level, point, upright = [[1.0, 2, 5, 2, 3, 2]], [[1.0, 1, 1, 1, 1, 1]], [[2.0, 1, 2, 4, 2, 3]]
    areas = _draw_coverage([level, point, upright, [], [SQUARE]], 6, 6).sum(axis=(1, 2))
    assert areas.tolist() == [0, 0, 0, 0, 4]
    assert list(rasterize(polygon_edges([]), np.zeros((0, 4)))) == []
    assert list(rasterize(polygon_edges([[], []]), np.array([[0, 0, 4, 4]] * 2))) == []


def test_runs_of_pixels_cover_what_their_mask_covers() -> None:
    # With a hole, touching runs, a whole column, and a second object that has no pixel.
    masks = np.random.default_rng(0).integers(0, 2, (3, 7, 9)).astype(bool)
    masks[0, :, 4], masks[1] = True, False
    runs = decode_runs([rle_of(mask) for mask in masks], (7, 9))
    drawn = np.zeros((3, 15, 15), dtype=np.uint8)
    place = {"scale": np.full((3, 2), 1.5), "shift": np.ones((3, 2))}
    areas = np.array([[0.0, 0, 15, 12]] * 3)
    rasterize_runs(runs, np.arange(3), **place, areas=areas, is_binary=False, out=drawn)
    # Each pixel covers 1.5 x 1.5 cells, from cell 1 on.
    fine = np.kron(masks, np.ones((1, 3, 3)))  # half a cell each
    padded = np.pad(fine, ((0, 0), (2, 1), (2, 1)))
    expected = padded.reshape(3, 12, 2, 15, 2).mean(axis=(2, 4))
    assert (drawn[:, 12:] == 0).all()
    np.testing.assert_array_equal(drawn[:, :12], np.floor(255 * expected + 0.5))


def test_each_object_is_clipped_to_an_area_of_its_own() -> None:
    edges = polygon_edges([[np.array(SQUARE)]] * 4)
    areas = np.array([[0, 0, 4, 4], [1.5, 0, 4, 2.25], [0, 3.5, 4, 4], [2, 2, 2, 4]])
    shares = np.zeros((4, 4, 4))
    for block in rasterize(edges, areas):
        height, width = block.share.shape
        shares[block.object, block.top :, block.left :][:height, :width] = block.share
    assert shares.sum(axis=(1, 2)) == pytest.approx([4, 1.5 * 1.25, 0, 0])
    np.testing.assert_allclose(shares[1, 1:3, 1:3], [[0.5, 1], [0.125, 0.25]])
