"""Automatic masks against annotations: closed-form recalls and AP, plain COCOeval, processes."""

import contextlib
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.coco_files import annotation, write_coco, write_json
from helpers.gloo_pool import GlooPool
from helpers.tiny_checkpoint import mask_finding_sam
from samft.annotations.segmentation import CroppedMask, encode_cropped
from samft.coco.subset import CocoSubset, read_coco
from samft.data.dataset import Coco2MaskDataset
from samft.data.loaders import val_loader
from samft.distributed import get_rank, get_world_size
from samft.evaluation.automatic import (
    AutomaticScores,
    ImageMasks,
    automatic_columns,
    compare_scores,
    generate_split,
    sample_images,
    score_masks,
)
from samft.evaluation.coco_ap import coco_truth
from samft.evaluation.resampled_ap import RankedMasks
from samft.evaluation.tiled_masks import generate_in_tiles
from samft.models.mask_generator import MaskGenerator
from samft.views.regions import DecodedImage
from samft.views.windows import View

SIZE = (40, 60)
Square = tuple[int, int, int]  # left, top, side; px


def corners(left: int, top: int, side: int) -> list[float]:
    right, bottom = left + side, top + side
    return [left, top, right, top, right, bottom, left, bottom]


def encoded(left: int, top: int, side: int, *, missing: int = 0) -> dict[str, Any]:
    """A square that lacks some of its pixels: its IoU with the whole is 1 - missing / side^2."""
    mask = np.ones(side * side, bool)
    mask[side * side - missing :] = False
    return encode_cropped(CroppedMask(top, left, mask.reshape(side, side)), SIZE)


def write_squares(folder: Path, *images: list[Square], crowd: Square | None = None) -> CocoSubset:
    """Images of squares, of two classes by turns; the first image may have a crowd region."""
    entries, names = [], []
    for number, squares in enumerate(images, start=1):
        names.append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 60})
        cv2.imwrite(str(folder / f"{number}.png"), np.zeros((*SIZE, 3), np.uint8))
        for square in squares:
            category = {"category_id": 1 + len(entries) % 2}
            entries.append(annotation(len(entries), number, corners(*square), **category))
    if crowd is not None:
        fields = {"iscrowd": 1, "segmentation": encoded(*crowd)}
        entries.append(annotation(len(entries), 1, corners(*crowd), **fields))
    file = write_json(folder / "a.json", names, entries)
    text = file.read_text().replace('"name": "thing"}', '"name": "thing"}, {"id": 2, "name": "x"}')
    file.write_text(text)
    return read_coco(file, folder, crowds="leave_out")


def found_in(
    subset: CocoSubset, *masks: list[tuple[dict[str, Any], float]], seconds: float = 1.0
) -> AutomaticScores:
    """Scores of given masks of each image, with their predicted IoU."""
    images = []
    dataset = Coco2MaskDataset(subset.index.image_folder, subset=subset, image_size=64)
    for batch, own in zip(val_loader(dataset), masks, strict=True):
        images.append(
            ImageMasks(
                batch.image_ids[0],
                [mask for mask, _ in own],
                [score for _, score in own],
                seconds,
                batch.object_ids.tolist(),
                [encode_cropped(truth, SIZE) for truth in batch.truths],
                [float(truth.mask.sum()) for truth in batch.truths],
            )
        )
    return score_masks(images, subset)


A, B, C = (0, 0, 10), (20, 0, 10), (40, 20, 10)


def test_scores_are_those_computed_by_hand(tmp_path: Path) -> None:
    subset = write_squares(tmp_path, [A, B])
    # A is found whatever the class, B with an IoU of .62, and the third mask is of nothing.
    masks = [(encoded(*A), 0.9), (encoded(*B, missing=38), 0.8), (encoded(*C), 0.7)]
    scores = found_in(subset, masks)
    assert scores.columns["iou_best"].tolist() == [1, pytest.approx(0.62)]
    assert scores.columns["found_50"].tolist() == [1, 1]
    assert scores.columns["found_75"].tolist() == [1, 0]
    for name in ("ar_100", "ar_1000"):  # B at .50, .55 and .60 of ten thresholds
        assert scores.columns[name].tolist() == [1, pytest.approx(0.3)]
        assert scores.coco[name] == pytest.approx(0.65)
    # Precision is 1 up to recall 1 at three thresholds; at seven up to recall .5, then 0.
    assert scores.coco["ap"] == pytest.approx((3 + 7 * 51 / 101) / 10)
    summary = scores.summarise()
    assert summary["found_50"] == 1 and summary["found_75"] == 0.5
    assert (summary["images"], summary["objects"], summary["masks_per_image"]) == (1, 2, 3)
    assert summary["seconds_per_image"] == 1


def test_only_the_best_hundred_or_thousand_masks_count(tmp_path: Path) -> None:
    subset = write_squares(tmp_path, [A])
    wrong = [(encoded(30, 10, 3), 0.9)] * 100
    scores = found_in(subset, [*wrong, (encoded(*A), 0.5)])
    assert (scores.coco["ar_100"], scores.coco["ar_1000"], scores.coco["ap"]) == (0, 1, 0)
    assert scores.columns["found_50"].tolist() == [1]
    more = found_in(subset, [*wrong * 10, (encoded(*A), 0.5)])
    assert (more.coco["ar_1000"], more.columns["found_50"].tolist()) == (0, [0])


def test_masks_within_a_crowd_are_not_wrong(tmp_path: Path) -> None:
    masks = [(encoded(42, 22, 4), 0.9), (encoded(*A), 0.5)]
    with_crowd = write_squares(tmp_path, [A], crowd=(40, 20, 15))
    assert found_in(with_crowd, masks).coco["ap"] == pytest.approx(1)
    assert found_in(with_crowd, masks).columns["iou_best"].tolist() == [1]
    # Without it the first mask is a false one before the right one.
    assert found_in(write_squares(tmp_path, [A]), masks).coco["ap"] == pytest.approx(0.5)


def test_no_mask_at_all_finds_nothing(tmp_path: Path) -> None:
    subset = write_squares(tmp_path, [A, B], [C])
    scores = found_in(subset, [], [])
    assert scores.coco == {"ap": 0, "ar_100": 0, "ar_1000": 0}
    assert all(not values.any() for values in scores.columns.values())
    assert scores.summarise()["masks_per_image"] == 0
    some = found_in(subset, [], [(encoded(*C), 0.9)])
    assert some.columns["found_50"].tolist() == [0, 0, 1]
    assert some.coco["ar_100"] == pytest.approx(1 / 3)


def random_scores(folder: Path, *, seed: int, num_images: int = 4) -> AutomaticScores:
    """Masks of random objects, worse and better, with random scores, some of nothing."""
    generator = np.random.default_rng(seed)
    subset = write_squares(folder, *[[A, B, C]] * num_images)
    masks = []
    for _ in range(num_images):
        squares = [(A, B, C)[k] for k in generator.integers(0, 3, 5)]
        own = [encoded(*square, missing=int(generator.integers(60))) for square in squares]
        own += [encoded(5, 25, int(generator.integers(3, 9)))]
        masks.append(list(zip(own, generator.random(6).tolist(), strict=True)))
    return found_in(subset, *masks)


def test_the_numbers_are_plain_cocoevals_without_classes(tmp_path: Path) -> None:
    scores = random_scores(tmp_path, seed=1)
    subset = read_coco(tmp_path / "a.json", tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = coco_truth(scores.objects, subset)
        coco.createIndex()
        results = [
            {"image_id": image.image_id, "category_id": 1, "segmentation": mask, "score": score}
            for image in scores.images
            for mask, score in zip(image.masks, image.scores, strict=True)
        ]
        plain = COCOeval(coco, coco.loadRes(results), "segm")
        plain.params.useCats = 0
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
    assert scores.coco["ap"] == pytest.approx(plain.stats[0], abs=1e-12)
    assert scores.coco["ar_100"] == pytest.approx(plain.stats[8], abs=1e-12)
    assert 0.1 < scores.coco["ap"] < 0.9
    for name in ("ar_100", "ar_1000"):
        assert scores.columns[name].mean() == pytest.approx(scores.coco[name], abs=1e-12)


def ap_of(ranked: RankedMasks, *weights: float) -> float:
    return ranked.average_precision(np.array(weights))


def test_ap_of_weighted_images_is_that_of_repeated_ones(tmp_path: Path) -> None:
    scores = random_scores(tmp_path, seed=2)
    assert ap_of(scores.ranked, 1, 1, 1, 1) == pytest.approx(scores.coco["ap"], abs=1e-12)
    order = [0, 0, 2, 3, 3]  # images, as often as they are drawn
    repeated = RankedMasks(
        image=np.concatenate([np.flatnonzero(np.array(order) == k) for k in scores.ranked.image]),
        **{
            name: np.concatenate(
                [
                    np.repeat(getattr(scores.ranked, name)[:, [d]], order.count(image), axis=1)
                    for d, image in enumerate(scores.ranked.image.tolist())
                ],
                axis=1,
            )
            for name in ("is_right", "is_wrong")
        },
        num_objects=scores.ranked.num_objects[order],
        recalls=scores.ranked.recalls,
    )
    expected = ap_of(scores.ranked, 2, 0, 1, 2)
    assert ap_of(repeated, *[1] * 5) == pytest.approx(expected, abs=1e-12)


def test_changes_have_intervals_over_images(tmp_path: Path) -> None:
    subset = write_squares(tmp_path, [A, B], [C])
    before = found_in(subset, [], [(encoded(*C), 0.9)])
    after = found_in(subset, [(encoded(*A), 0.9)], [(encoded(*C), 0.9), (encoded(*A), 0.1)])
    changes = compare_scores(before, after, seed=0)
    assert changes["found_50"]["difference"] == pytest.approx(1 / 3)
    # Drawn alone, the first image gains one of two objects, the second nothing.
    assert changes["found_50"]["interval"] == pytest.approx([0, 0.5])
    assert changes["masks_per_image"] == {"difference": 1, "interval": [1, 1]}
    assert changes["ap"]["difference"] == pytest.approx(after.coco["ap"] - before.coco["ap"])
    # Alone, the first image's AP rises from 0 to 51 of 101 recalls, the second's stays 1.
    assert changes["ap"]["interval"] == pytest.approx([0, 51 / 101])
    same = compare_scores(after, after, seed=0)
    assert all(one == {"difference": 0, "interval": [0, 0]} for one in same.values())
    alone = found_in(write_squares(tmp_path, [A]), [])
    single = compare_scores(alone, alone, seed=0)
    assert all(one == {"difference": 0, "interval": None} for one in single.values())


def test_columns_are_empty_for_objects_outside_of_the_sample(tmp_path: Path) -> None:
    subset = write_squares(tmp_path, [A], [B, C])
    scores = found_in(subset.select([1]), [(encoded(*C), 0.9)])

    class Rows:
        """The rows of all objects."""

        @staticmethod
        def keys() -> np.ndarray:
            return np.array([[1, 0], [2, 1], [2, 2]])

    columns = automatic_columns(scores, Rows())
    assert columns["automatic_found_50"] == [None, 0, 1]
    assert columns["automatic_iou_best"] == [None, 0, 1]


def test_a_larger_sample_has_the_images_of_a_smaller_one(tmp_path: Path) -> None:
    subset = write_squares(tmp_path, *[[A]] * 9)

    def chosen(number: int, seed: int = 0) -> list[int]:
        sample = sample_images(subset, number, seed=seed)
        return [sample.image_id(row) for row in range(sample.num_images)]

    assert chosen(20) == list(range(1, 10))
    few, more = chosen(3), chosen(5)
    assert set(few) < set(more) and few == sorted(few) and len(more) == 5
    assert {tuple(chosen(3, seed)) for seed in range(5)} != {tuple(few)}


def masks_of_split(folder: Path) -> list[tuple[Any, ...]]:
    """The masks of all images of a split, on however many ranks there are; all but seconds."""
    subset = read_coco(folder / "_annotations.coco.json", folder)
    generator = MaskGenerator(mask_finding_sam(), points_per_side=2, show_progress=False)
    dataset = Coco2MaskDataset(folder, subset=subset, image_size=64)
    batches = val_loader(dataset, rank=get_rank(), world_size=get_world_size())
    counted: list[None] = []
    images = generate_split(generator, subset, batches, on_image=lambda: counted.append(None))
    assert len(counted) == len(range(get_rank(), 3, get_world_size()))
    return [(i.image_id, i.masks, i.scores, i.object_ids, i.rle_true, i.areas) for i in images]


def test_with_windows_masks_are_those_of_tiles(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, 3).parent
    subset = read_coco(folder / "_annotations.coco.json", folder)
    generator = MaskGenerator(mask_finding_sam(), points_per_side=2, show_progress=False)
    batches = val_loader(Coco2MaskDataset(folder, subset=subset, image_size=64))
    view = View("tiles", tile_size=32)
    images = generate_split(generator, subset, batches, view=view)
    assert sum(len(image.masks) for image in images) > 0
    for row, image in enumerate(images):
        source = DecodedImage(subset.open_image(row).decode())
        tiled = generate_in_tiles(generator, source, view)
        assert image.masks == [one.rle for one in tiled]
        assert image.scores == [one.iou_predicted for one in tiled]


def test_masks_do_not_depend_on_the_number_of_processes(gloo2: GlooPool, tmp_path: Path) -> None:
    folder = write_coco(tmp_path, 3).parent
    alone = masks_of_split(folder)
    assert [one[0] for one in alone] == [10, 11, 12]
    assert sum(len(one[1]) for one in alone) > 2 and [len(one[3]) for one in alone] == [1, 4, 2]
    assert gloo2.run(masks_of_split, folder) == [alone] * 2
