"""Pictures of validations: which objects, and which files."""

from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from helpers.coco_files import write_coco
from helpers.trackers import a_board, read_events
from samft.annotations.segmentation import CroppedMask
from samft.coco.subset import CocoSubset, read_coco
from samft.evaluation.object_scores import ObjectScores
from samft.evaluation.validation import Validation
from samft.reports import drawing
from samft.reports.validation_images import (
    AFTER,
    BEFORE,
    BEFORE_AFTER,
    ValidationImages,
    choose_fixed,
    draw_before_and_after,
    draw_calibration,
    find_objects,
)
from samft.runtime.logs import RunLog


@pytest.fixture(scope="module")
def subset(tmp_path_factory: pytest.TempPathFactory) -> CocoSubset:
    """17 images with 57 objects."""
    folder = tmp_path_factory.mktemp("data")
    annotations = write_coco(folder, 17)
    return read_coco(annotations, annotations.parent, cache=folder / "cache")


def test_the_objects_are_spread_over_sizes_and_images(subset: CocoSubset) -> None:
    chosen = choose_fixed(subset)
    assert len(set(chosen.tolist())) == 16
    areas = subset.index.areas
    assert (np.diff(areas[chosen]) >= 0).all()
    quarters = np.quantile(areas[subset.objects], [0.25, 0.5, 0.75])
    sizes = Counter(np.searchsorted(quarters, areas[chosen]).tolist())
    assert max(sizes.values()) <= 5 and min(sizes.values()) >= 3
    images = Counter(np.searchsorted(subset.index.first_object, chosen, side="right").tolist())
    assert max(images.values()) <= 2
    assert (choose_fixed(subset) == chosen).all()


def test_all_objects_are_chosen_if_there_are_few(subset: CocoSubset) -> None:
    few = subset.select([0, 1])
    assert sorted(choose_fixed(few).tolist()) == sorted(few.objects.tolist())
    assert len(choose_fixed(subset.select([]))) == 0


def test_objects_are_found_by_their_ids(subset: CocoSubset) -> None:
    index = subset.index
    wanted = np.array([40, 3, 3, 20])
    image_ids = np.repeat(index.image_ids, np.diff(index.first_object))
    keys = np.stack([image_ids[wanted], index.object_ids[wanted]], axis=1)
    assert (find_objects(index, keys) == wanted).all()


def a_validation(images: ValidationImages, subset: CocoSubset, *, iou: float) -> Validation:
    """Each object's mask is a square in the corner of its image."""
    index, selection = subset.index, images.new_selection()
    image_ids = np.repeat(index.image_ids, np.diff(index.first_object))
    for image_id, object_id in zip(image_ids.tolist(), index.object_ids.tolist(), strict=True):
        mask = CroppedMask(0, 0, np.ones((8, 8), bool))
        selection.add((image_id, object_id), mask, ious=(iou, 0.5), size=(40, 40))
    selection.gather()
    values = np.full(len(image_ids), iou)
    rows = ObjectScores(image_ids, index.object_ids, index.areas, values, values, values)
    return Validation({}, 0.0, objects=rows, selection=selection)


def test_validations_are_drawn_and_the_first_and_best_kept(
    subset: CocoSubset, tmp_path: Path
) -> None:
    with closing(RunLog(tmp_path, main=True, steps=9)) as log:
        log.trackers = [a_board(tmp_path)]
        images = ValidationImages(tmp_path, subset, log, resumed_from=tmp_path, start_step=0)
        assert not images.has_validation
        for step, iou in ((0, 0.5), (3, 0.6), (6, 0.4)):
            images.record_validation(step, a_validation(images, subset, iou=iou))
            if step == 3:
                after = (tmp_path / AFTER).read_bytes()
        assert images.has_validation
    assert (tmp_path / AFTER).read_bytes() == after  # step 6 was no better
    assert drawing.read_png(tmp_path / BEFORE).shape == drawing.read_png(tmp_path / AFTER).shape
    events = read_events(tmp_path, "val")
    for name in ("masks/same_objects", "masks/worst_objects", "masks/calibration"):
        assert [event.step for event in events.Images(name)] == [0, 3, 6]
    (curve,) = [tag for tag in events.Tags()["tensors"] if "predicted_iou" in tag]
    assert [event.step for event in events.Tensors(curve)] == [0, 3, 6]


def test_a_picture_that_cannot_be_written_is_logged(
    subset: CocoSubset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / BEFORE).mkdir()
    with closing(RunLog(tmp_path, main=True, steps=9)) as log:
        images = ValidationImages(tmp_path, subset, log, resumed_from=tmp_path, start_step=0)
        images.record_validation(0, a_validation(images, subset, iou=0.5))
    assert f"{BEFORE} cannot be written" in caplog.text


def test_other_ranks_draw_nothing(subset: CocoSubset, tmp_path: Path) -> None:
    with closing(RunLog(tmp_path, main=False, steps=9)) as log:
        images = ValidationImages(tmp_path, subset, log, resumed_from=tmp_path, start_step=0)
        images.record_validation(0, a_validation(images, subset, iou=0.5))
    assert list(tmp_path.iterdir()) == []


def test_calibration_is_darkest_where_most_masks_are() -> None:
    ids = np.arange(5)
    predicted, actual = np.array([0.9, 0.9, 0.9, 0.9, 0.1]), np.array([0.1, 0.1, 0.1, 0.1, 0.1])
    picture = draw_calibration(ObjectScores(ids, ids, ids + 1.0, actual, predicted, actual))
    plot = picture[30 : 30 + 320, 44 : 44 + 320].astype(int).sum(2)
    at = {"right": plot[320 - 40, 18 * 16 + 5], "left": plot[320 - 40, 2 * 16 + 4]}
    assert at["right"] < at["left"] < plot[40, 5] == 3 * 255


def test_before_stands_left_of_after(tmp_path: Path) -> None:
    drawing.write_png(tmp_path / BEFORE, np.full((20, 40, 3), (200, 0, 0), np.uint8))
    drawing.write_png(tmp_path / AFTER, np.full((20, 40, 3), (0, 200, 0), np.uint8))
    draw_before_and_after(tmp_path, before=0.25, after=0.5)
    both = drawing.read_png(tmp_path / BEFORE_AFTER)
    red, green = ((both == colour).all(axis=2) for colour in ((200, 0, 0), (0, 200, 0)))
    assert red.sum() == green.sum() == 20 * 40
    assert np.nonzero(red)[1].max() < np.nonzero(green)[1].min()


def test_without_a_picture_of_the_best_step_there_is_no_comparison(tmp_path: Path) -> None:
    drawing.write_png(tmp_path / BEFORE, np.zeros((20, 40, 3), np.uint8))
    draw_before_and_after(tmp_path, before=0.25, after=float("nan"))
    assert not (tmp_path / BEFORE_AFTER).exists()


@pytest.mark.parametrize("content", [b"", b"no picture", bytes(200), None])
def test_a_damaged_picture_is_named_and_not_drawn(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (BEFORE, AFTER):
        drawing.write_png(tmp_path / name, np.zeros((20, 40, 3), np.uint8))
    if content is None:  # a header that promises 4 * 10^9 pixels
        content = (tmp_path / BEFORE).read_bytes()
        content = content[:16] + b"\0\0\xff\xff\0\0\xff\xff" + content[24:]
    (tmp_path / BEFORE).write_bytes(content)
    draw_before_and_after(tmp_path, before=0.25, after=0.5)
    assert not (tmp_path / BEFORE_AFTER).exists()
    assert f"{BEFORE_AFTER} was not drawn" in caplog.text and str(tmp_path / BEFORE) in caplog.text
