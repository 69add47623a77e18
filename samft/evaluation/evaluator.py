"""Scores every mask of a split for `samft.evaluate`: `evaluate_split`, one row per object.

Each image is encoded once. Its objects are decoded from the annotated boxes, from jittered
boxes, and from single points; where it is wanted, they are corrected by clicks. Masks are reduced
to scores and run lengths at once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samft.annotations.segmentation import CroppedMask, encode_cropped
from samft.data.dataset import Batch
from samft.data.loaders import lockstep
from samft.data.samplers import PROMPT_STREAM, generator_of
from samft.data.transfers import send_to
from samft.data.transforms import Frame, jitter_boxes
from samft.distributed import all_gather
from samft.errors import explain_out_of_memory
from samft.evaluation.clicks import (
    Click,
    ClickExamples,
    ClickScores,
    ClickSession,
    CorrectedMask,
    centre_point,
    click_prompts,
    score_clicks,
)
from samft.evaluation.metrics import boundary_iou, box_fill_ious, cropped_iou, visible_part
from samft.evaluation.object_scores import ObjectScores, gather_scores
from samft.evaluation.validation import MASK_CHUNK, describe_image
from samft.models.prompted_sam import PromptedSam, original_masks
from samft.models.prompts import OBJECT, Prompts
from samft.runtime import heartbeat
from samft.runtime.device import exact_float32

JITTERS = {"jitter_5": 0.05, "jitter_10": 0.1, "jitter_20": 0.2}  # name: share of the box's side
OTHER_PROMPTS = (*JITTERS, "point", "point_multimask")  # beside `box`, the annotated one

MEMORY_ADVICE = "Give --device cpu, or a checkpoint of a smaller model or image size."

Masks = Iterable[CroppedMask]


@dataclass(frozen=True)
class EvaluatedObjects(ObjectScores):
    """`ObjectScores` of the annotated boxes, with more scores and both masks of each of K objects.

    Attributes:
        iou_boundary: float64 [K], see `metrics.boundary_iou`.
        iou_boundary_jitter_10: The same, prompted as for `iou_jitter_10`.
        iou_jitter_5: float64 [K], prompted with a box whose sides are moved by up to 5 %.
        iou_jitter_10: The same, 10 %.
        iou_jitter_20: The same, 20 %.
        iou_point: float64 [K], prompted with one point, see `clicks.centre_point`.
        iou_point_multimask: float64 [K], the same, of the three masks that stock predicts for an
            ambiguous prompt (`multimask_output=True`) the one with the highest predicted IoU.
        iou_clicks_box: float64 [K, N + 1], with the annotated box and 0 to N clicks, see `clicks`;
            [K, 0] where no clicks were wanted.
        iou_clicks_point: float64 [K, N], after 1 to N clicks without a box; or [K, 0].
        iou_boundary_clicks_box: The boundary IoU, as `iou_clicks_box`.
        iou_boundary_clicks_point: The same, as `iou_clicks_point`.
        rle_predicted: object [K], the mask as COCO's compressed RLE, original frame.
        rle_true: object [K], the true mask, the same.
    """

    iou_boundary: NDArray[np.float64]
    iou_boundary_jitter_10: NDArray[np.float64]
    iou_jitter_5: NDArray[np.float64]
    iou_jitter_10: NDArray[np.float64]
    iou_jitter_20: NDArray[np.float64]
    iou_point: NDArray[np.float64]
    iou_point_multimask: NDArray[np.float64]
    iou_clicks_box: NDArray[np.float64]
    iou_clicks_point: NDArray[np.float64]
    iou_boundary_clicks_box: NDArray[np.float64]
    iou_boundary_clicks_point: NDArray[np.float64]
    rle_predicted: NDArray[np.object_]
    rle_true: NDArray[np.object_]

    @property
    def dice(self) -> NDArray[np.float64]:
        """Dice, 2 |P T| / (|P| + |T|), of each mask, float64 [K]: 2 IoU / (1 + IoU)."""
        return 2 * self.iou_actual / (1 + self.iou_actual)


@dataclass(frozen=True)
class Clicking:
    """How objects are corrected by clicks.

    Attributes:
        most: Clicks on an object, N; 0: none.
        multimask: Whether the first click's mask is the best of three, by predicted IoU.
        examples: Keeps some of the masks that began with a click; None: keeps none.
    """

    most: int = 0
    multimask: bool = True
    examples: ClickExamples | None = None


def evaluate_split(
    model: PromptedSam,
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    clicking: Clicking = Clicking(),
    on_image: Callable[[], object] = lambda: None,
) -> tuple[EvaluatedObjects, dict[str, str]]:
    """Scores a model on every mask of a split. Collective: every rank must call.

    In exact float32, with the annotated boxes decoded as `validation.validate` does: their mean IoU
    is the one that the training logged.

    Args:
        model: On its device.
        batches: This rank's images, one per batch, with their true masks.
        seed: Of the jittered boxes.
        clicking: How objects are corrected by clicks; its examples are those of all ranks then.
        on_image: Called after each image of this rank.

    Returns:
        The rows of all ranks, in the order of image and object; and the images that could not be
        read: name, reason.

    Raises:
        UserError: An image cannot be read, on any rank.
    """
    (objects,), bad_images = evaluate_models(
        [model], batches, seed=seed, clicking=clicking, on_image=on_image
    )
    return objects, bad_images


@torch.no_grad()
@exact_float32()
def evaluate_models(
    models: Sequence[PromptedSam],
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    clicking: Clicking = Clicking(),
    on_image: Callable[[], object] = lambda: None,
) -> tuple[list[EvaluatedObjects], dict[str, str]]:
    """As `evaluate_split`, for several models that see images alike, in one pass over these.

    Neighbours that share the module of their image encoder encode each image once. Collective:
    every rank must call.

    Args:
        models: On the same device.
        batches: See `evaluate_split`, as all others.
        seed: Of the jittered boxes.
        clicking: Its examples are of the first model's masks, so give one model with examples.
        on_image: Called after each image of this rank.

    Returns:
        The rows of each model, and the images that could not be read.

    Raises:
        UserError: An image cannot be read, on any rank.
    """
    parts: list[list[EvaluatedObjects]] = [[] for _ in models]
    bad_images: dict[str, str] = {}
    for batch in lockstep(batches):
        heartbeat.set_activity("evaluating image", partial(list, batch.image_ids))
        bad_images.update(batch.bad_images)
        if batch.num_masks:  # 0 if the image cannot be read
            with explain_out_of_memory(partial(describe_image, batch), advice=MEMORY_ADVICE):
                _evaluate_image(models, batch, parts, seed=seed, clicking=clicking)
        on_image()
    objects = [gather_scores(EvaluatedObjects.concatenate(part)) for part in parts]
    if clicking.examples is not None:
        clicking.examples.gather()
    return objects, {name: why for bad in all_gather(bad_images) for name, why in bad.items()}


def _evaluate_image(
    models: Sequence[PromptedSam],
    batch: Batch,
    parts: list[list[EvaluatedObjects]],
    *,
    seed: int,
    clicking: Clicking,
) -> None:
    on_device = batch.to(models[0].sam.device, non_blocking=True)
    embedding, encoder = None, None
    for model, rows in zip(models, parts, strict=True):
        if embedding is None or model.sam.image_encoder is not encoder:
            encoder, cached = model.sam.image_encoder, on_device.embeddings
            embedding = model.embed(on_device.images, on_device.input_sizes, cached=cached)
        for part in torch.arange(batch.num_masks).split(MASK_CHUNK):
            # By a slice: the device would have to be sent the numbers, and be waited for
            own = slice(int(part[0]), int(part[-1]) + 1)
            boxes = on_device.boxes[own]
            objects = PromptedObjects(model, embedding, batch.take_objects(own), boxes)
            rows.append(objects.evaluate(seed=seed, clicking=clicking))


@dataclass(frozen=True)
class PromptedObjects:
    """Objects of one image, to be prompted in several ways.

    Attributes:
        model: See `evaluate_split`.
        embedding: float [1, C, H/16, W/16], of the image.
        batch: Of the M objects, with their true masks, on the host.
        boxes: float32 [M, 4], their annotated boxes in the input frame, on the device.
    """

    model: PromptedSam
    embedding: Tensor
    batch: Batch
    boxes: Tensor

    @property
    def frame(self) -> Frame:
        """Where the image is in the input frame."""
        sizes = self.batch.image_sizes
        return Frame(
            sizes["original_size"],
            sizes["input_size"],
            self.model.frame_size,
            origin=sizes["origin"],
            whole_size=self.batch.file_size,
        )

    @cached_property
    def truths(self) -> list[CroppedMask]:
        """The true masks as far as the window shows them, which is where clicks can be made."""
        frame, wholes = self.frame, self.batch.truths
        if not frame.cuts_objects:
            return wholes
        parts = [
            visible_part(each, origin=frame.origin, original_size=frame.original_size)
            for each in wholes
        ]
        return [p if p.mask.any() else whole for p, whole in zip(parts, wholes, strict=True)]

    def decode(self, prompts: Prompts, *, multimask: bool = False) -> tuple[Tensor, Tensor]:
        """See `PromptedSam.decode`."""
        index = torch.zeros(len(prompts), dtype=torch.int64, device=self.embedding.device)
        return self.model.decode(self.embedding, prompts, index, multimask=multimask)

    def evaluate(self, *, seed: int, clicking: Clicking) -> EvaluatedObjects:
        """Scores the masks of all prompts; see `evaluate_split`."""
        # The annotated boxes have a call of their own, as in `validate`: in one with other prompts,
        # the last bits of their logits would differ.
        logits, iou_predicted = self.decode(Prompts(boxes=self.boxes))
        device, batch = self.embedding.device, self.batch
        jittered = send_to(device, self._jittered_boxes(seed))
        others = self.decode(Prompts(boxes=jittered))[0].split(len(self.boxes))
        centres = [[Click(*centre_point(truth), OBJECT)] for truth in self.truths]
        points = click_prompts(centres, self.frame, device)
        one, best = self.decode(points)[0], self._best_masks(points)
        by_prompt = dict(zip(OTHER_PROMPTS, (*others, one, best), strict=True))
        masks = {name: self._masks_of(own) for name, own in {"box": logits, **by_prompt}.items()}
        first = best if clicking.multimask else one
        curves = self._score_clicks(clicking, {"box": logits, "point": first}, centres)
        return score_masks(batch, masks, iou_predicted.cpu(), curves=curves)

    def _masks_of(self, logits: Tensor) -> Masks:
        return original_masks(logits, **self.batch.image_sizes)

    def _jittered_boxes(self, seed: int) -> Tensor:
        boxes, object_ids = self.batch.boxes.numpy(), self.batch.object_ids.numpy()
        jittered = [
            jittered_boxes(boxes, object_ids, share=share, frame=self.frame, seed=seed)
            for share in JITTERS.values()
        ]
        return torch.from_numpy(np.concatenate(jittered)).float()

    def _best_masks(self, prompts: Prompts) -> Tensor:
        # Of the three masks of each prompt, the one with the highest predicted IoU.
        logits, iou_predicted = self.decode(prompts, multimask=True)
        best = iou_predicted.argmax(1)
        return logits.gather(1, best[:, None, None, None].expand(-1, 1, *logits.shape[2:]))[:, 0]

    def correct(
        self, logits: Tensor, clicks: Sequence[Sequence[Click]], *, boxes: bool, most: int
    ) -> Iterator[CorrectedMask]:
        """Corrects the masks of all objects by clicks, see `ClickSession.correct`.

        Args:
            logits: float [M, H/4, W/4], of the first masks.
            clicks: That led to them, as many for each object.
            boxes: Whether the annotated boxes are given with the clicks.
            most: Clicks on an object.
        """
        session = ClickSession(
            lambda prompts: self.decode(prompts)[0],
            self.boxes if boxes else None,
            self.truths,
            self.frame,
        )
        return session.correct(logits, clicks=clicks, most=most)

    def _score_clicks(
        self, clicking: Clicking, first: dict[str, Tensor], centres: list[list[Click]]
    ) -> dict[str, ClickScores] | None:
        # From the logits of the first masks, by what these were prompted with: `box` and `point`.
        if not clicking.most:
            return None
        batch, scores = self.batch, {}
        for name, logits in first.items():
            clicks = centres if name == "point" else [[] for _ in centres]
            masks = self.correct(logits, clicks, boxes=name == "box", most=clicking.most)
            if name == "point" and clicking.examples is not None:
                keys = [(batch.image_ids[0], object_id) for object_id in batch.object_ids.tolist()]
                masks = clicking.examples.watch(masks, keys)
            scores[name] = score_clicks(
                masks,
                batch.truths,
                num_rounds=clicking.most + 1 - len(clicks[0]),
                original_size=self.batch.file_size,
            )
        return scores


def score_masks(
    batch: Batch,
    masks: Mapping[str, Masks],
    iou_predicted: Tensor,
    *,
    curves: Mapping[str, ClickScores] | None = None,
) -> EvaluatedObjects:
    """Scores masks of one image against the true ones.

    Args:
        batch: Of one image, with its M true masks.
        masks: By prompt (`box` and `OTHER_PROMPTS`), M masks each, original frame.
        iou_predicted: float [M], of the masks prompted with the annotated boxes.
        curves: By what clicks began with, `box` and `point`; None if there were none.

    Returns:
        M rows.
    """
    truths = batch.truths
    sizes = batch.image_sizes
    size = batch.file_size
    # Two prompts' masks get more than one score; those of the others are dropped one by one.
    by_box, by_jitter = list(masks["box"]), list(masks["jitter_10"])
    masks = {**masks, "jitter_10": by_jitter}
    pairs = list(zip(by_box, truths, strict=True))
    other_ious = {
        f"iou_{name}": np.array(
            [cropped_iou(*pair) for pair in zip(masks[name], truths, strict=True)]
        )
        for name in OTHER_PROMPTS
    }
    boundaries = {
        f"iou_boundary{suffix}": np.array(
            [boundary_iou(*pair, original_size=size) for pair in zip(own, truths, strict=True)]
        )
        for suffix, own in (("", by_box), ("_jitter_10", by_jitter))
    }
    fill, none = box_fill_ious(batch.boxes, truths, **sizes), np.zeros((len(truths), 0))
    clicked = {
        f"{score}_clicks_{start}": getattr(curves[start], score) if curves else none
        for score in ("iou", "iou_boundary")
        for start in ("box", "point")
    }
    return EvaluatedObjects(
        image_ids=np.full(len(truths), batch.image_ids[0]),
        object_ids=batch.object_ids.numpy(),
        areas=np.array([float(truth.mask.sum()) for truth in truths]),
        iou_actual=np.array([cropped_iou(*pair) for pair in pairs]),
        iou_predicted=iou_predicted.double().numpy(),
        iou_box_fill=fill.numpy(),
        rle_predicted=_encode_masks(by_box, size),
        rle_true=_encode_masks(truths, size),
        **boundaries,
        **other_ious,
        **clicked,
    )


def _encode_masks(masks: list[CroppedMask], size: tuple[int, int]) -> NDArray[np.object_]:
    encoded = np.empty(len(masks), dtype=object)
    for k, mask in enumerate(masks):
        encoded[k] = encode_cropped(mask, size)
    return encoded


def jittered_boxes(
    boxes: NDArray[np.floating],
    object_ids: NDArray[np.int64],
    *,
    share: float,
    frame: Frame,
    seed: int,
) -> NDArray[np.float64]:
    """Moves each side of each box uniformly by up to a share of the box's width or height.

    The draw of an object depends on the seed and its id alone, not on its image, the model, workers
    or processes. All shares scale the same draw, so that levels of jitter are comparable.

    Args:
        boxes: [K, 4] in the input frame.
        object_ids: [K].
        share: The most that a side moves; unlike in training, there is no limit in pixels.
        frame: Of the image, which no side leaves.
        seed: Of the draws.

    Returns:
        [K, 4] in the input frame.
    """
    jittered = np.zeros((len(boxes), 4))
    for row, (box, object_id) in enumerate(zip(boxes, object_ids.tolist(), strict=True)):
        generator = generator_of(PROMPT_STREAM, seed, object_id)
        jittered[row] = jitter_boxes(
            box[None], share=share, frame=frame, generator=generator, most=math.inf
        )
    return jittered
