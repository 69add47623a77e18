"""Scores of every object equal stock SAM's, and are perfect for the true masks."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from segment_anything import SamPredictor

from helpers.boundary_reference import paper_boundary_iou
from helpers.coco_files import write_coco
from helpers.gloo_pool import GlooPool
from helpers.trainers import LOSS, make_trainer, unreadable
from helpers.trainers import val_batches as small_batches
from samft.annotations.segmentation import CroppedMask
from samft.coco.subset import CocoSubset, read_coco
from samft.data.dataset import Batch, Coco2MaskDataset
from samft.data.loaders import val_loader
from samft.data.transforms import boxes_to_original
from samft.distributed import get_rank, get_world_size
from samft.errors import DataError, UserError
from samft.evaluation.clicks import ClickExamples, centre_point
from samft.evaluation.coco_ap import average_precision, category_ids_of, coco_results, coco_truth
from samft.evaluation.evaluator import (
    OTHER_PROMPTS,
    Clicking,
    EvaluatedObjects,
    evaluate_split,
    jittered_boxes,
    score_masks,
)
from samft.evaluation.metrics import boundary_iou, cropped_iou
from samft.evaluation.tables import summarise_scores
from samft.evaluation.validation import validate
from samft.images.decoder import open_image
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import load_sam
from samft.weights.download import PACKAGED_TINY

pytestmark = pytest.mark.run


def read_subset(folder: Path) -> CocoSubset:
    return read_coco(folder / "_annotations.coco.json", folder)


def tiny() -> PromptedSam:
    return PromptedSam(load_sam(PACKAGED_TINY))


def batches_of(subset: CocoSubset, *, image_size: int = 256) -> Any:
    dataset = Coco2MaskDataset(subset.index.image_folder, subset=subset, image_size=image_size)
    return val_loader(dataset, rank=get_rank(), world_size=get_world_size())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = ((150, 201), (96, 64), (300, 40))
    return write_coco(tmp_path_factory.mktemp("data"), 4, sizes=sizes).parent


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> EvaluatedObjects:
    rows, bad_images = evaluate_split(tiny(), batches_of(read_subset(folder)))
    assert bad_images == {}
    return rows


def whole(crop: CroppedMask, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, dtype=np.uint8)
    height, width = crop.mask.shape
    mask[crop.top : crop.top + height, crop.left : crop.left + width] = crop.mask
    return mask


def iou_of(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask.astype(bool) & truth.astype(bool)).sum() / (mask | truth).sum())


def test_each_prompt_scores_as_with_stock_sam(folder: Path, evaluated: EvaluatedObjects) -> None:
    predictor = SamPredictor(load_sam(PACKAGED_TINY))
    subset = read_subset(folder)
    dataset = Coco2MaskDataset(folder, subset=subset, image_size=256)
    row, expected = 0, {name: [] for name in ("iou_actual", "iou_boundary", "iou_predicted")}
    expected |= {f"iou_{name}": [] for name in OTHER_PROMPTS}
    for i in range(subset.num_images):
        sample, image = dataset[i], open_image(subset.path(i)).decode()
        predictor.set_image(image)
        frame = dataset.full_frame(sample.original_size)
        for k, truth in enumerate(sample.truths):
            box, object_id = sample.boxes[k : k + 1].numpy(), sample.object_ids[k : k + 1].numpy()
            true_mask = whole(truth, sample.original_size)
            prompts: dict[str, dict[str, Any]] = {
                "actual": {"box": boxes_to_original(box, frame)[0]}
            }
            for name, share in (("jitter_5", 0.05), ("jitter_10", 0.1), ("jitter_20", 0.2)):
                moved = jittered_boxes(box, object_id, share=share, frame=frame, seed=0)
                prompts[name] = {"box": boxes_to_original(moved, frame)[0]}
            point = np.array([centre_point(truth)])
            prompts["point"] = {"point_coords": point, "point_labels": np.array([1])}
            prompts["point_multimask"] = {**prompts["point"], "multimask_output": True}
            for name, prompt in prompts.items():
                prompt = {"multimask_output": False, **prompt}
                mask, score, _ = predictor.predict(**prompt)
                mask = mask[score.argmax()].astype(np.uint8)
                expected[f"iou_{name}"].append(iou_of(mask, true_mask))
                if name == "actual":
                    expected["iou_boundary"].append(paper_boundary_iou(true_mask, mask))
                    expected["iou_predicted"].append(float(score[0]))
                    decoded = mask_utils.decode(evaluated.rle_predicted[row])
                    assert (decoded != mask).mean() < 1e-3
            assert np.array_equal(mask_utils.decode(evaluated.rle_true[row]), true_mask)
            row += 1
    assert row == len(evaluated)
    for name, values in expected.items():
        # A pixel whose logit is within rounding of 0 may fall to either side.
        np.testing.assert_allclose(getattr(evaluated, name), values, atol=5e-3, err_msg=name)
        assert np.median(np.abs(getattr(evaluated, name) - values)) < 1e-5, name
    assert evaluated.iou_actual.std() > 0.01


def test_the_mean_iou_equals_that_of_validate(folder: Path, evaluated: EvaluatedObjects) -> None:
    validation = validate(tiny(), batches_of(read_subset(folder)), loss=LOSS)
    assert evaluated.iou_actual.mean() == pytest.approx(
        validation.metrics["per_mask_iou"], abs=1e-12
    )
    assert evaluated.iou_box_fill.mean() == pytest.approx(validation.box_fill_iou, abs=1e-12)
    assert np.array_equal(evaluated.iou_actual, validation.objects.iou_actual)
    assert np.array_equal(evaluated.areas, validation.objects.areas)


def numbers(folder: Path, backend: str = "pycocotools") -> tuple[dict[str, Any], dict[str, Any]]:
    """All numbers of the tiny model, on however many ranks there are."""
    subset = read_subset(folder)
    clicking = Clicking(2, examples=ClickExamples([(13, 9), (11, 2)], num_masks=2))
    rows, _ = evaluate_split(tiny(), batches_of(subset), clicking=clicking)
    category_ids = category_ids_of(subset, rows.object_ids)
    results = coco_results(rows, category_ids)
    assert clicking.examples is not None
    kept = clicking.examples.masks.items()
    return (
        summarise_scores(rows, category_ids, names=subset.index.category_names)
        | {
            "kept": [(key, [(one.clicks, one.mask.mask.sum()) for one in own]) for key, own in kept]
        },
        average_precision(coco_truth(rows, subset), results, backend=backend),
    )


def test_scores_do_not_depend_on_the_number_of_processes(
    gloo2: GlooPool, gloo3: GlooPool, folder: Path
) -> None:
    alone = numbers(folder)
    assert alone[0]["masks"] == 14
    assert len(alone[0]["clicks"]["box"]["iou"]) == 3
    assert all(len(masks) == 2 for _, masks in alone[0]["kept"])
    assert gloo2.run(numbers, folder) == [alone] * 2
    assert gloo3.run(numbers, folder) == [alone] * 3


def perfect(batch: Batch) -> EvaluatedObjects:
    masks = {name: batch.truths for name in ("box", *OTHER_PROMPTS)}
    return score_masks(batch, masks, torch.rand(batch.num_masks))


def check_perfect(subset: CocoSubset) -> None:
    rows = EvaluatedObjects.concatenate(
        [perfect(batch) for batch in batches_of(subset, image_size=64)]
    )
    category_ids = category_ids_of(subset, rows.object_ids)
    summary = summarise_scores(rows, category_ids, names=subset.index.category_names)
    for name in ("iou", "dice", "boundary_iou"):
        assert summary[name] == {"mean": 1, "median": 1, "percentile_10": 1}
    assert all(spread["mean"] == 1 for spread in summary["by_prompt"].values())
    ap_scores = average_precision(coco_truth(rows, subset), coco_results(rows, category_ids))
    for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"):
        assert ap_scores[name] in (None, pytest.approx(1, abs=1e-12)), name
    assert ap_scores["ap"] is not None


def test_true_masks_score_1(folder: Path) -> None:
    check_perfect(read_subset(folder))


@pytest.mark.parametrize("name", ["coco_open104", "mushrooms"])
def test_true_masks_of_real_datasets_score_1(data_root: Path, name: str) -> None:
    root = data_root / name
    if name == "coco_open104":
        files = root / "annotations" / "instances_val2017.json", root / "val2017"
    else:  # up to 318 objects of a class in an image, and an object whose id is 0
        files = root / "valid" / "_annotations.coco.json", root / "valid"
    check_perfect(read_coco(*files))


def test_a_worse_mask_scores_less() -> None:
    batch = small_batches(1)[0].take_objects(slice(0, 1))
    truth = batch.truths[0]
    half = CroppedMask(truth.top, truth.left, truth.mask[: truth.mask.shape[0] // 2])
    masks = {name: [truth] for name in OTHER_PROMPTS}
    rows = score_masks(batch, {"box": [half], **masks}, torch.tensor([0.75]))
    assert rows.iou_actual.tolist() == [cropped_iou(half, truth)]
    size = tuple(batch.original_sizes[0].tolist())
    assert rows.iou_boundary.tolist() == [boundary_iou(half, truth, original_size=size)]
    assert rows.dice[0] == pytest.approx(2 * half.mask.sum() / (half.mask.sum() + truth.mask.sum()))
    assert rows.iou_predicted.tolist() == [0.75]
    assert rows.iou_point.tolist() == [1]


def count_encodings(num_images: int) -> tuple[int, int, dict[str, str], list[int]]:
    batches = [*small_batches(num_images), *([unreadable(9)] if get_rank() == 0 else [])]
    model = make_trainer().model.eval()
    encoded: list[int] = []
    model.sam.image_encoder.register_forward_hook(lambda *_: encoded.append(1))
    seen: list[int] = []
    rows, bad_images = evaluate_split(model, batches, on_image=lambda: seen.append(1))
    return len(encoded), len(seen), bad_images, rows.image_ids.tolist()


def test_each_image_is_encoded_once_and_a_broken_one_not_at_all(gloo2: GlooPool) -> None:
    encoded, seen, bad_images, ids = count_encodings(3)
    assert (encoded, seen, len(bad_images)) == (3, 4, 1)
    both = gloo2.run(count_encodings, 3)
    assert [answer[:2] for answer in both] == [(2, 3), (1, 1)]
    assert [answer[2:] for answer in both] == [(bad_images, ids)] * 2


def no_images() -> int:
    def broken() -> Any:
        if get_rank() == 0:
            raise DataError("image 3 is broken")
        yield from small_batches(2)

    with pytest.raises(UserError, match="image 3 is broken"):
        evaluate_split(make_trainer().model.eval(), broken())
    rows, _ = evaluate_split(make_trainer().model.eval(), [])
    assert {getattr(rows, field.name).shape for field in fields(rows)} == {(0,)}
    return len(rows)


def test_an_error_on_one_rank_is_raised_on_all(gloo2: GlooPool) -> None:
    assert gloo2.run(no_images) == [0, 0]
