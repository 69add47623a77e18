"""Scores every mask of a split for `samft.evaluate`: `evaluate_split`, one row per object.

Each image is encoded once. Its objects are decoded from the annotated boxes, from jittered
boxes, and from single points. Masks are reduced to scores and run lengths at once.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samft.coco.segmentation import CroppedMask, encode_cropped
from samft.data.dataset import Batch
from samft.data.loaders import Waiting, lockstep
from samft.data.samplers import PROMPT_STREAM, generator_of
from samft.data.transfers import send_to
from samft.data.transforms import Frame, jitter_boxes
from samft.distributed import all_gather
from samft.errors import explain_out_of_memory
from samft.evaluation.metrics import boundary_iou, box_fill_ious, cropped_iou
from samft.evaluation.object_scores import ObjectScores, gather_scores
from samft.evaluation.validation import MASK_CHUNK, describe_image
from samft.models.prompted_sam import PromptedSam, original_masks
from samft.models.prompts import Prompts
from samft.runtime import heartbeat
from samft.runtime.device import exact_float32

JITTERS = {"jitter_5": 0.05, "jitter_10": 0.1, "jitter_20": 0.2}  # name: share of the box's side
OTHER_PROMPTS = (*JITTERS, "point")  # beside `box`, the annotated one

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
        iou_point: float64 [K], prompted with one point, see `centre_point`.
        rle_predicted: object [K], the mask as COCO's compressed RLE, original frame.
        rle_true: object [K], the true mask, the same.
    """

    iou_boundary: NDArray[np.float64]
    iou_boundary_jitter_10: NDArray[np.float64]
    iou_jitter_5: NDArray[np.float64]
    iou_jitter_10: NDArray[np.float64]
    iou_jitter_20: NDArray[np.float64]
    iou_point: NDArray[np.float64]
    rle_predicted: NDArray[np.object_]
    rle_true: NDArray[np.object_]

    @property
    def dice(self) -> NDArray[np.float64]:
        """Dice, 2 |P T| / (|P| + |T|), of each mask, float64 [K]: 2 IoU / (1 + IoU)."""
        return 2 * self.iou_actual / (1 + self.iou_actual)


@torch.no_grad()
@exact_float32()
def evaluate_split(
    model: PromptedSam,
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    on_image: Callable[[], object] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
    waiting: Waiting = contextlib.nullcontext,
) -> tuple[EvaluatedObjects, dict[str, str]]:
    """Scores a model on every mask of a split. Collective: every rank must call.

    In exact float32, with the annotated boxes decoded as `validation.validate` does: their mean IoU
    is the one that the training logged.

    Args:
        model: On its device.
        batches: This rank's images, one per batch, with their true masks.
        seed: Of the jittered boxes.
        on_image: Called after each image of this rank.
        should_stop: See `loaders.lockstep`.
        waiting: See `loaders.lockstep`.

    Returns:
        The rows of all ranks, in the order of image and object; and the images that could not be
        read: name, reason.

    Raises:
        StopInterrupt: Any rank was asked to stop.
        UserError: An image cannot be read, on any rank.
    """
    parts: list[EvaluatedObjects] = []
    bad_images: dict[str, str] = {}
    for batch in lockstep(batches, should_stop=should_stop, waiting=waiting):
        heartbeat.set_activity("evaluating image", partial(list, batch.image_ids))
        bad_images.update(batch.bad_images)
        if batch.num_masks:  # 0 if the image cannot be read
            with explain_out_of_memory(partial(describe_image, batch), advice=MEMORY_ADVICE):
                parts += _evaluate_image(model, batch, seed=seed)
        on_image()
    objects = gather_scores(EvaluatedObjects.concatenate(parts))
    return objects, {name: why for bad in all_gather(bad_images) for name, why in bad.items()}


def _evaluate_image(model: PromptedSam, batch: Batch, *, seed: int) -> Iterator[EvaluatedObjects]:
    on_device = batch.to(model.sam.device, non_blocking=True)
    embedding = model.embed(on_device.images, on_device.input_sizes, cached=on_device.embeddings)
    sizes, image_size = batch.image_sizes, model.sam.image_encoder.img_size
    frame = Frame(sizes["original_size"], sizes["input_size"], image_size)

    def masks_of(mask_logits: Tensor) -> Masks:
        return original_masks(mask_logits, image_size=image_size, **sizes)

    for part in torch.arange(batch.num_masks).split(MASK_CHUNK):
        # The annotated boxes have a call of their own, as in `validate`: in one with other prompts,
        # the last bits of their logits would differ.
        # By a slice: the device would have to be sent the numbers, and be waited for
        own = slice(int(part[0]), int(part[-1]) + 1)
        index = on_device.image_index[own]
        annotated = Prompts(boxes=on_device.boxes[own])
        logits, iou_predicted = model.decode(embedding, annotated, index)
        boxes, points = _other_prompts(batch, part, frame=frame, seed=seed)
        device = embedding.device
        jittered = Prompts(boxes=send_to(device, boxes))
        of_boxes, _ = model.decode(embedding, jittered, index.repeat(len(JITTERS)))
        clicks = Prompts(points=send_to(device, points), labels=torch.ones_like(index)[:, None])
        of_points, _ = model.decode(embedding, clicks, index)
        by_prompt = zip(OTHER_PROMPTS, (*of_boxes.split(len(part)), of_points), strict=True)
        masks = {"box": masks_of(logits), **{name: masks_of(own) for name, own in by_prompt}}
        yield score_masks(batch, masks, iou_predicted.cpu(), part=part)


def _other_prompts(batch: Batch, part: Tensor, *, frame: Frame, seed: int) -> tuple[Tensor, Tensor]:
    boxes, object_ids = batch.boxes[part].numpy(), batch.object_ids[part].numpy()
    jittered = [
        jittered_boxes(boxes, object_ids, share=share, frame=frame, seed=seed)
        for share in JITTERS.values()
    ]
    centres = np.array([centre_point(batch.truths[k]) for k in part.tolist()])
    in_frame = points_to_input(centres, frame)
    points = torch.from_numpy(in_frame)[:, None]
    return torch.from_numpy(np.concatenate(jittered)).float(), points.float()


def score_masks(
    batch: Batch, masks: Mapping[str, Masks], iou_predicted: Tensor, *, part: Tensor
) -> EvaluatedObjects:
    """Scores masks of one image against the true ones.

    Args:
        batch: Of one image, with its true masks.
        masks: By prompt (`box` and `OTHER_PROMPTS`), m masks each, original frame.
        iou_predicted: float [m], of the masks prompted with the annotated boxes.
        part: int64 [m], the objects of the batch that the masks are of.

    Returns:
        m rows.
    """
    truths = [batch.truths[k] for k in part.tolist()]
    sizes = batch.image_sizes
    size = sizes["original_size"]
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
    fill = box_fill_ious(batch.boxes[part], truths, **sizes)
    return EvaluatedObjects(
        image_ids=np.full(len(part), batch.image_ids[0]),
        object_ids=batch.object_ids[part].numpy(),
        areas=np.array([float(truth.mask.sum()) for truth in truths]),
        iou_actual=np.array([cropped_iou(*pair) for pair in pairs]),
        iou_predicted=iou_predicted.double().numpy(),
        iou_box_fill=fill.numpy(),
        rle_predicted=_encode_masks(by_box, size),
        rle_true=_encode_masks(truths, size),
        **boundaries,
        **other_ious,
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


def centre_point(mask: CroppedMask) -> tuple[int, int]:
    """The pixel of a mask that is farthest from its border; the first of several.

    Args:
        mask: Not empty, in the original frame.

    Returns:
        x, y of the pixel, as `SamPredictor` takes them.

    Source: the maximum of the mask's distance transform, where SAM's paper puts the first point
    (Kirillov et al., Segment Anything, 2023, D.1); the image's edge is a border.
    """
    padded = np.pad(mask.mask.astype(np.uint8), 1)
    distances = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(int(np.argmax(distances)), distances.shape)
    return mask.left + int(x), mask.top + int(y)


def points_to_input(points: NDArray[np.integer], frame: Frame) -> NDArray[np.float64]:
    """Maps points [K, 2], x y, of the original frame to the input frame; not flipped, not cropped.

    Source: `ResizeLongestSide.apply_coords` of segment_anything.
    """
    return np.asarray(points, dtype=np.float64).reshape(-1, 2) * (frame.scale_x, frame.scale_y)
