"""Corrections equal a loop of stock `SamPredictor.predict` with the same clicks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from helpers.coco_files import write_coco
from samft.annotations.segmentation import CroppedMask
from samft.coco.subset import read_coco
from samft.data.dataset import Batch, Coco2MaskDataset, collate
from samft.data.transforms import boxes_to_original
from samft.evaluation import evaluator
from samft.evaluation.clicks import Click, CorrectedMask
from samft.evaluation.evaluator import Clicking, PromptedObjects, evaluate_split
from samft.evaluation.metrics import cropped_iou
from samft.images.decoder import open_image
from samft.models.prompted_sam import PromptedSam
from samft.models.prompts import Prompts
from samft.models.sam import build_sam, load_sam
from samft.weights.download import PACKAGED_TINY

NUM_CLICKS = 4


class EveryMask:
    """In place of `ClickExamples`: keeps all masks that begin with a click."""

    def __init__(self) -> None:
        self.masks: dict[tuple[int, int], list[CorrectedMask]] = {}

    def watch(self, masks, keys):
        for corrected in masks:
            self.masks.setdefault(keys[corrected.row], []).append(corrected)
            yield corrected

    def gather(self) -> None:
        """There is one rank."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Coco2MaskDataset:
    sizes = ((150, 201), (96, 64), (300, 40))
    annotations = write_coco(tmp_path_factory.mktemp("data"), 3, sizes=sizes)
    subset = read_coco(annotations, annotations.parent)
    return Coco2MaskDataset(annotations.parent, subset=subset, image_size=256)


def random_sam() -> Sam:
    """Random weights, whose masks are noise: the packaged ones may predict nothing for a point."""
    torch.manual_seed(0)
    return build_sam("vit_tiny", 256).eval()


@torch.no_grad()
def masks_of_samft(
    model: PromptedSam, batch: Batch, start: str
) -> dict[tuple[int, int], list[CorrectedMask]]:
    kept = EveryMask()
    clicking = Clicking(NUM_CLICKS, multimask=start == "point_multimask", examples=kept)
    if start != "box":
        evaluate_split(model, [batch], clicking=clicking)
        return kept.masks
    embedding = model.embed(batch.images, batch.input_sizes)
    objects = PromptedObjects(model, embedding, batch, batch.boxes)
    keys = [(batch.image_ids[0], object_id) for object_id in batch.object_ids.tolist()]
    logits, _ = objects.decode(Prompts(boxes=batch.boxes))
    clicks: list[list[Click]] = [[] for _ in keys]
    list(kept.watch(objects.correct(logits, clicks, boxes=True, most=NUM_CLICKS), keys))
    return kept.masks


def masks_of_stock(
    predictor: SamPredictor, corrected: list[CorrectedMask], box: np.ndarray | None, *, best: bool
) -> list[np.ndarray]:
    """The masks after the same clicks, each with the logits before it as `mask_input`."""
    masks, logits = [], None
    for one in corrected:
        clicks = np.array(one.clicks).reshape(-1, 3)
        drawn, scores, logits = predictor.predict(
            point_coords=clicks[:, :2] if len(clicks) else None,
            point_labels=clicks[:, 2] if len(clicks) else None,
            box=box,
            mask_input=logits,
            multimask_output=best and logits is None,
        )
        chosen = int(scores.argmax())
        logits = logits[chosen : chosen + 1]
        masks.append(drawn[chosen])
    return masks


def whole(crop: CroppedMask, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    height, width = crop.mask.shape
    mask[crop.top : crop.top + height, crop.left : crop.left + width] = crop.mask
    return mask


@pytest.mark.parametrize(
    ("weights", "start"),
    [("packaged", "box"), ("random", "point"), ("random", "point_multimask")],
)
def test_masks_equal_those_of_a_loop_of_predict(
    dataset: Coco2MaskDataset, weights: str, start: str
) -> None:
    sams = [load_sam(PACKAGED_TINY) if weights == "packaged" else random_sam() for _ in "ab"]
    model, predictor = PromptedSam(sams[0].eval()), SamPredictor(sams[1].eval())
    differing, pixels, areas, num_clicks = 0, 0, [], []
    for i in range(len(dataset)):
        sample, batch = dataset[i], collate([dataset[i]])
        predictor.set_image(open_image(dataset.subset.path(i)).decode())
        boxes = boxes_to_original(sample.boxes.numpy(), dataset.full_frame(sample.original_size))
        box_of = dict(zip(sample.object_ids.tolist(), boxes, strict=True))
        for (_, object_id), corrected in masks_of_samft(model, batch, start).items():
            box = box_of[object_id] if start == "box" else None
            stock = masks_of_stock(predictor, corrected, box, best=start == "point_multimask")
            for one, expected in zip(corrected, stock, strict=True):
                own = whole(one.mask, sample.original_size)
                differing += int((own != expected).sum())
                pixels += own.size
                areas.append(own.mean())
                num_clicks.append(len(one.clicks))
    assert differing <= 1e-3 * pixels
    assert max(num_clicks) == NUM_CLICKS  # not equal for being right at once
    assert np.std(areas) > 0.01  # or for being empty


def test_the_curve_has_the_scores_of_those_masks(dataset: Coco2MaskDataset) -> None:
    kept = EveryMask()
    clicking = Clicking(NUM_CLICKS, multimask=False, examples=kept)
    batches = [collate([dataset[i]]) for i in range(len(dataset))]
    rows, _ = evaluate_split(PromptedSam(random_sam()), batches, clicking=clicking)
    truths = {
        (batch.image_ids[0], int(object_id)): truth
        for batch in batches
        for object_id, truth in zip(batch.object_ids, batch.truths, strict=True)
    }
    for row, key in enumerate(map(tuple, rows.keys().tolist())):
        ious = [cropped_iou(one.mask, truths[key]) for one in kept.masks[key]]
        ious += ious[-1:] * (NUM_CLICKS - len(ious))
        assert rows.iou_clicks_point[row].tolist() == ious
    assert np.array_equal(rows.iou_clicks_point[:, 0], rows.iou_point)
    assert np.array_equal(rows.iou_clicks_box[:, 0], rows.iou_actual)
    assert np.array_equal(rows.iou_boundary_clicks_box[:, 0], rows.iou_boundary)
    assert rows.iou_clicks_box.shape[1] == NUM_CLICKS + 1
    assert rows.iou_clicks_point.std() > 0.01


def test_chunks_do_not_change_the_scores(
    dataset: Coco2MaskDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, clicking = collate([dataset[1]]), Clicking(NUM_CLICKS)
    once, _ = evaluate_split(PromptedSam(random_sam()), [batch], clicking=clicking)
    monkeypatch.setattr(evaluator, "MASK_CHUNK", 3)
    parts, _ = evaluate_split(PromptedSam(random_sam(), mask_chunk=2), [batch], clicking=clicking)
    assert np.array_equal(once.keys(), parts.keys()) and len(once) == 4
    for name in ("iou_clicks_box", "iou_clicks_point"):
        # A pixel whose logit is within rounding of 0 may send a later click elsewhere.
        assert np.isclose(getattr(once, name), getattr(parts, name), atol=1e-3).mean() > 0.8, name


def test_objects_of_one_pixel_are_clicked_and_scored(dataset: Coco2MaskDataset) -> None:
    batch = collate([dataset[1]])
    pixel = CroppedMask(5, 7, np.ones((1, 1), bool))
    tiny = replace(batch, truths=[pixel] * batch.num_masks)
    kept = EveryMask()
    rows, _ = evaluate_split(
        PromptedSam(random_sam()), [tiny], clicking=Clicking(NUM_CLICKS, examples=kept)
    )
    assert all(own[0].clicks == (Click(7, 5, 1),) for own in kept.masks.values())
    for own in kept.masks.values():
        clicks = own[-1].clicks
        assert len({click[:2] for click in clicks}) == len(clicks)  # no pixel twice
    assert np.isfinite(rows.iou_clicks_box).all() and (rows.areas == 1).all()
