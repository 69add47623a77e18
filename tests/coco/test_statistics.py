"""Counts and suggestions, against sets whose numbers are known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.broken_coco import HEIGHT, WIDTH, encode_image
from helpers.coco_files import annotation
from samft.coco.index import CocoIndex, index_file
from samft.coco.statistics import (
    compute_statistics,
    statistics_lines,
    suggest_max_masks,
    suggestion_lines,
)


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
    first, second = suggestion_lines(compute_statistics(index, image_size=32))
    assert first.startswith("suggested max_masks_per_image: 8 ")
    assert second.startswith("at image_size 32 1 objects (25.0%) vanish: ")
    assert suggestion_lines(compute_statistics(index, image_size=64))[1:] == [
        "at image_size 64 no object vanishes"
    ]


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
    assert statistics["suggestions"] == {"max_masks_per_image": 8, "image_size": 64}
    assert set(statistics["histograms"]) == {"objects_per_image", "object_sizes", "object_sides"}
