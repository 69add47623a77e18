"""Counts and suggestions, against sets whose numbers are known."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers.broken_coco import HEIGHT, WIDTH, encode_image
from helpers.coco_files import annotation, write_json
from samft.annotations.entries import CROWD
from samft.coco.index import CocoIndex, index_file
from samft.coco.statistics import (
    ViewFacts,
    compute_statistics,
    measure_views,
    statistics_lines,
    suggest_max_masks,
    suggest_view,
    suggestion_lines,
)
from samft.views.windows import View


def square(x: float, y: float, side: float) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


@pytest.fixture
def index(tmp_path: Path) -> CocoIndex:
    """Images of 20 x 30 px with 0, 1, 3 objects and one crowd; sides 3, 6, 12 and 15 px."""
    sides = {2: [(3, 1)], 3: [(6, 1), (12, 2), (15, 3)]}
    objects = [
        annotation(image_id * 10 + k, image_id, square(1, 1, side), category_id=category)
        for image_id, those in sides.items()
        for k, (side, category) in enumerate(those)
    ]
    objects.append(annotation(99, 2, square(4, 4, 10), iscrowd=1))
    images = []
    for number in range(1, 4):
        (tmp_path / f"{number}.png").write_bytes(encode_image(number))
        name = f"{number}.png"
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
    images.append({"id": 4, "file_name": "missing.png"})
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "a"}]
    categories.append({"id": 4, "name": "never"})
    document = {"images": images, "annotations": objects, "categories": categories}
    path = tmp_path / "file.json"
    path.write_text(json.dumps(document))
    return index_file(path, tmp_path, cache=tmp_path / "cache")


def test_counts(index: CocoIndex) -> None:
    statistics = compute_statistics(index, image_size=30)
    assert (statistics.num_images, statistics.num_images_with_objects) == (4, 2)
    assert (statistics.num_objects, statistics.num_crowds, statistics.most_objects) == (4, 1, 3)
    assert statistics.objects_per_image == {"0": 1, "1": 1, "2-3": 1}
    assert statistics.object_sizes == {"small": 4, "medium": 0, "large": 0}
    assert statistics.classes == {"a": 3, "b": 1, "never": 0}
    assert list(statistics.classes) == ["a", "b", "never"]


def test_sides_are_those_at_the_models_input(index: CocoIndex) -> None:
    """The image's longer side, 30 px, becomes image_size."""
    shown = {
        name: n for name, n in compute_statistics(index, image_size=30).object_sides.items() if n
    }
    assert shown == {"under 4 px": 1, "4-8 px": 1, "8-16 px": 2}
    shown = {
        name: n for name, n in compute_statistics(index, image_size=960).object_sides.items() if n
    }
    assert shown == {"64-128 px": 1, "128-256 px": 1, "256-512 px": 2}


def test_objects_vanish_under_one_cell(index: CocoIndex) -> None:
    assert compute_statistics(index, image_size=32).num_vanishing == 1  # 3 px become 3.2
    assert compute_statistics(index, image_size=40).num_vanishing == 0  # 4 px
    assert compute_statistics(index, image_size=16).num_vanishing == 2  # 6 px become 3.2
    assert compute_statistics(index, image_size=16).vanishing_share == 0.5


def test_coco_sizes_go_by_the_area_of_the_mask(index: CocoIndex) -> None:
    areas = np.where(index.flags, 5, np.zeros(5))
    areas[index.flags == 0] = [1023.9, 1024, 9215.9, 9216]
    statistics = compute_statistics(replace(index, areas=areas), image_size=64)
    assert statistics.object_sizes == {"small": 1, "medium": 2, "large": 1}


@pytest.mark.parametrize(
    ("per_image", "expected"),
    [
        ([], 8),
        ([1], 8),
        ([8] * 10, 8),
        ([9] * 10, 16),
        ([16] * 10, 16),
        ([5] * 199 + [500], 8),  # half a per cent has more
        ([5] * 100 + [33, 500], 64),
        ([200] * 3, 256),
    ],
)
def test_suggested_max_masks(per_image: list[int], expected: int) -> None:
    assert suggest_max_masks(np.array(per_image, dtype=np.int64)) == expected


def test_lines(index: CocoIndex) -> None:
    lines = statistics_lines(compute_statistics(index, image_size=32))
    assert lines[0] == "4 images, 2 of them with objects; 4 objects in 2 classes; 1 crowds"
    assert "  a          3  " + "#" * 40 in lines
    assert "  b          1  " + "#" * 14 in lines
    assert not any("never" in line or "large" in line for line in lines)
    first, second, *_ = suggestion_lines(compute_statistics(index, image_size=32))
    assert first.startswith("suggested max_masks_per_image: 8 ")
    assert second.startswith("at image_size 32 1 objects (25.0%) vanish: ")
    assert suggestion_lines(compute_statistics(index, image_size=96))[1:] == [
        "at image_size 96 no object vanishes"
    ]


@pytest.fixture
def wide(tmp_path: Path) -> CocoIndex:
    """An image of 128 x 512 px with squares of 7, 10, 10 and 40 px, two of them side by side."""
    cv2.imwrite(str(tmp_path / "wide.png"), np.zeros((128, 512, 3), dtype=np.uint8))
    squares = [(20, 20, 7), (300, 60, 10), (312, 60, 10), (450, 50, 40)]
    objects = [annotation(k, 1, square(*where)) for k, where in enumerate(squares, start=1)]
    images = [{"id": 1, "file_name": "wide.png", "height": 128, "width": 512}]
    path = write_json(tmp_path / "file.json", images, objects)
    return index_file(path, tmp_path, cache=tmp_path / "cache")


def test_views_are_measured_in_windows_of_the_models_input(wide: CocoIndex) -> None:
    image, tiles, objects = measure_views(wide, image_size=64)
    # Shrunk to an eighth, all sides but one are under 4 px, and all under 8.
    assert (image.windows_per_image, image.small_share, image.vanishing_share) == (1, 1.0, 0.75)
    # At full scale, one square is of 7 px. The two neighbours are in one window either way.
    for facts in (tiles, objects):
        assert (facts.windows_per_image, facts.small_share, facts.vanishing_share) == (3, 0.25, 0)
    statistics = compute_statistics(wide, image_size=64)
    assert statistics.to_json()["views"]["tiles"] == {
        "windows_per_image": 3.0,
        "too_small": 0.25,
        "vanishing": 0.0,
    }
    lines = suggestion_lines(statistics)
    assert lines[-1].startswith("suggested view: objects (`--view objects`")
    assert any(
        line.startswith("  image       1.0 windows an image, 100.0% of the objects too small")
        for line in lines
    )


@pytest.mark.parametrize(
    ("shares", "windows", "suggested"),
    [
        ((0.25, 0.0, 0.0), (9, 4), None),  # few are too small
        ((0.5, 0.26, 0.3), (9, 4), None),  # windows help too little
        ((0.0, 0.0, 0.0), (9, 4), None),
        ((0.5, 0.25, 0.3), (9, 4), "tiles"),
        ((0.5, 0.3, 0.1), (9, 4), "objects"),
        ((0.5, 0.1, 0.1), (9, 17), "objects"),  # they cut none
        ((0.5, 0.1, 0.1), (9, 19), "tiles"),  # less than half as many
    ],
)
def test_windows_are_suggested_that_keep_objects(shares, windows, suggested) -> None:
    kinds = zip(("image", "tiles", "objects"), (1, *windows), shares, strict=True)
    view = suggest_view([ViewFacts(View(kind), many, share, 0.0) for kind, many, share in kinds])
    assert (view and view.view.kind) == suggested


def test_without_objects_nothing_is_suggested(wide: CocoIndex) -> None:
    none = replace(wide, flags=np.full_like(wide.flags, CROWD))
    assert measure_views(none, image_size=64) == () and suggest_view(()) is None


def test_of_many_images_some_are_looked_at(index: CocoIndex, monkeypatch) -> None:
    every = measure_views(index, image_size=64)
    monkeypatch.setattr("samft.coco.statistics._SAMPLED_IMAGES", 1)
    (one, *_) = measure_views(index, image_size=64)
    assert (every[0].small_share, one.small_share) == (0.25, 1.0)


def test_only_twenty_classes_are_shown(index: CocoIndex) -> None:
    statistics = compute_statistics(index, image_size=64)
    many = {f"c{k}": 30 - k for k in range(25)}
    lines = statistics_lines(replace(statistics, classes=many))
    assert any("c19" in line for line in lines) and not any("c20" in line for line in lines)
    assert lines[-1] == "  and 5 more with 40 objects"


def test_json_is_plain(index: CocoIndex) -> None:
    statistics = json.loads(json.dumps(compute_statistics(index, image_size=32).to_json()))
    assert statistics["vanishing"] == {"objects": 1, "share": 0.25}
    assert statistics["too_small"] == {"objects": 2, "share": 0.5}  # 3.2 and 6.4 px
    assert statistics["suggestions"] == {
        "max_masks_per_image": 8,
        "image_size": 64,
        "view": "image",
    }
    assert set(statistics["histograms"]) == {"objects_per_image", "object_sizes", "object_sides"}
