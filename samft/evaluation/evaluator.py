"""What a model is asked beside the annotated boxes: boxes that are off, and single points.

Every mask of a split scored in every way: `evaluate_split`, one row for each object.

Each image is encoded once, and what its objects are prompted with (their boxes, boxes that are off,
single points) is decoded from that. Masks become numbers and run lengths as soon as they are there.
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
from samft.data.transforms import Frame, jitter_boxes
from samft.distributed import all_gather
from samft.evaluation.metrics import boundary_iou, box_fill_ious, cropped_iou
from samft.evaluation.object_scores import ObjectScores, gather_scores
from samft.evaluation.validation import MASK_CHUNK
from samft.models.prompted_sam import PromptedSam, original_masks
from samft.runtime import heartbeat


def jittered_boxes(
    boxes: NDArray[np.floating],
    object_ids: NDArray[np.int64],
    *,
    share: float,
    frame: Frame,
    seed: int,
) -> NDArray[np.float64]:
    """Moves each side of each box uniformly by up to a share of the box's width or height.

    How depends on the seed and on the object alone, not on its image, the model, workers or
    processes. All shares take the same draw, scaled, so that levels differ in nothing else.

    Args:
        boxes: [K, 4] in the input frame.
        object_ids: [K].
        share: Furthest that a side moves; unlike in training, there is no limit in pixels.
        frame: Of the image, which no side leaves.
        seed: Of the draws.

    Returns:
        [K, 4] in the input frame.
    """
    moved = np.zeros((len(boxes), 4))
    for row, (box, object_id) in enumerate(zip(boxes, object_ids.tolist(), strict=True)):
        generator = generator_of(PROMPT_STREAM, seed, object_id)
        moved[row] = jitter_boxes(
            box[None], share=share, frame=frame, generator=generator, most=math.inf
        )
    return moved


def centre_point(mask: CroppedMask) -> tuple[int, int]:
    """The pixel of a mask that is farthest from its border; the first of several.

    Args:
        mask: Not empty, in the original frame.

    Returns:
        x, y of the pixel, as `SamPredictor` is given them.

    Source: the maximum of the mask's distance transform, where SAM's paper puts the first point
    (Kirillov et al., Segment Anything, 2023, D.1); the image's edge is a border.
    """
    padded = np.pad(mask.mask.astype(np.uint8), 1)
    distances = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(int(np.argmax(distances)), distances.shape)
    return mask.left + int(x), mask.top + int(y)


def points_to_input(points: NDArray[np.integer], frame: Frame) -> NDArray[np.float64]:
    """Pixels [K, 2], x y, of the original to the input frame of a whole image, not flipped.

    Source: `ResizeLongestSide.apply_coords` of segment_anything.
    """
    return np.asarray(points, dtype=np.float64).reshape(-1, 2) * (frame.scale_x, frame.scale_y)


JITTERS = {"jitter_5": 0.05, "jitter_10": 0.1, "jitter_20": 0.2}  # prompt -> share of the side
OTHER_PROMPTS = (*JITTERS, "point")  # than the box as annotated

Masks = Iterable[CroppedMask]


@dataclass(frozen=True)
class EvaluatedObjects(ObjectScores):
    """`ObjectScores` (of the box as annotated), and what else is known of each of K masks.

    Attributes:
        iou_boundary: float64 [K], boundary IoU, see `boundary`.
        iou_box_fill: float64 [K], what filling the box would score.
        iou_jitter_5: float64 [K], prompted by a box whose sides are off by up to 5 % of its size.
        iou_jitter_10: The same, 10 %.
        iou_jitter_20: The same, 20 %.
        iou_point: float64 [K], prompted by the centre point alone.
        rle_predicted: object [K], the mask as COCO's compressed RLE, original frame.
        rle_true: object [K], the true mask.
    """

    iou_boundary: NDArray[np.float64]
    iou_box_fill: NDArray[np.float64]
    iou_jitter_5: NDArray[np.float64]
    iou_jitter_10: NDArray[np.float64]
    iou_jitter_20: NDArray[np.float64]
    iou_point: NDArray[np.float64]
    rle_predicted: NDArray[np.object_]
    rle_true: NDArray[np.object_]

    @property
    def dice(self) -> NDArray[np.float64]:
        """2 |P T| / (|P| + |T|) of each mask, float64 [K]: a function of its IoU."""
        return 2 * self.iou_actual / (1 + self.iou_actual)


@torch.no_grad()
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

    In float32, and with the boxes decoded as `validation.validate` does, so that their mean IoU is
    the one in the log of the training.

    Args:
        model: On its device.
        batches: This rank's images, one a batch, with their truths.
        seed: Of the boxes that are off.
        on_image: Called after each image of this rank.
        should_stop: See `prefetch.lockstep`.
        waiting: See `prefetch.lockstep`.

    Returns:
        The rows of all ranks, in the order of image and object; and the images that could not be
        read: name, what is wrong.

    Raises:
        StopInterrupt: Any rank was asked to stop.
        UserError: An image cannot be read, on any rank.
    """
    parts: list[EvaluatedObjects] = []
    bad_images: dict[str, str] = {}
    for batch in lockstep(batches, should_stop=should_stop, waiting=waiting):
        heartbeat.set_activity("evaluating image", partial(list, batch.image_ids))
        bad_images.update(batch.bad_images)
        if batch.num_masks:  # none if the image cannot be read
            parts += _evaluate_image(model, batch, seed=seed)
        on_image()
    found = gather_scores(EvaluatedObjects.concatenate(parts))
    return found, {name: why for bad in all_gather(bad_images) for name, why in bad.items()}


def _evaluate_image(model: PromptedSam, batch: Batch, *, seed: int) -> Iterator[EvaluatedObjects]:
    moved = batch.to(model.sam.device, non_blocking=True)
    embedding = model.embed(moved.images, moved.input_sizes, cached=moved.embeddings)
    sizes, image_size = batch.image_sizes, model.sam.image_encoder.img_size
    frame = Frame(sizes["original_size"], sizes["input_size"], image_size)

    def masks_of(mask_logits: Tensor) -> Masks:
        return original_masks(mask_logits, image_size=image_size, **sizes)

    for part in torch.arange(batch.num_masks).split(MASK_CHUNK):
        # By themselves, or other prompts would change the last bits of their logits.
        logits, iou_predicted = model.decode(embedding, moved.boxes[part], moved.image_index[part])
        boxes, points = _other_prompts(batch, part, frame=frame, seed=seed)
        index = moved.image_index[part].repeat(len(OTHER_PROMPTS))
        device = embedding.device
        others, _ = model.decode(embedding, boxes.to(device), index, points=points.to(device))
        by_prompt = zip(OTHER_PROMPTS, others.split(len(part)), strict=True)
        masks = {"box": masks_of(logits), **{name: masks_of(own) for name, own in by_prompt}}
        yield score_masks(batch, masks, iou_predicted.cpu(), part=part)


def _other_prompts(batch: Batch, part: Tensor, *, frame: Frame, seed: int) -> tuple[Tensor, Tensor]:
    boxes, object_ids = batch.boxes[part].numpy(), batch.object_ids[part].numpy()
    jittered = [
        jittered_boxes(boxes, object_ids, share=share, frame=frame, seed=seed)
        for share in JITTERS.values()
    ]
    points = np.array([centre_point(batch.truths[k]) for k in part.tolist()])
    in_frame = points_to_input(points, frame)
    return torch.from_numpy(np.concatenate(jittered)).float(), torch.from_numpy(in_frame).float()


def score_masks(
    batch: Batch, masks: Mapping[str, Masks], iou_predicted: Tensor, *, part: Tensor
) -> EvaluatedObjects:
    """Scores some masks of one image against their truths.

    Args:
        batch: Of one image, with its truths.
        masks: By prompt (`box` and `OTHER_PROMPTS`), the masks of the objects, original frame.
        iou_predicted: float [m], of the masks by box.
        part: int64 [m], which of the batch's objects.

    Returns:
        m rows.
    """
    truths = [batch.truths[k] for k in part.tolist()]
    sizes = batch.image_sizes
    size = sizes["original_size"]
    by_box = list(masks["box"])
    others = {
        f"iou_{name}": np.array(
            [cropped_iou(*pair) for pair in zip(masks[name], truths, strict=True)]
        )
        for name in OTHER_PROMPTS
    }
    pairs = list(zip(by_box, truths, strict=True))
    fill = box_fill_ious(batch.boxes[part], truths, **sizes)
    return EvaluatedObjects(
        image_ids=np.full(len(part), batch.image_ids[0]),
        object_ids=batch.object_ids[part].numpy(),
        areas=np.array([float(truth.mask.sum()) for truth in truths]),
        iou_actual=np.array([cropped_iou(*pair) for pair in pairs]),
        iou_predicted=iou_predicted.double().numpy(),
        iou_boundary=np.array([boundary_iou(*pair, original_size=size) for pair in pairs]),
        iou_box_fill=fill.numpy(),
        rle_predicted=_encode(by_box, size),
        rle_true=_encode(truths, size),
        **others,
    )


def _encode(masks: list[CroppedMask], size: tuple[int, int]) -> NDArray[np.object_]:
    encoded = np.empty(len(masks), dtype=object)
    for k, mask in enumerate(masks):
        encoded[k] = encode_cropped(mask, height=size[0], width=size[1])
    return encoded
