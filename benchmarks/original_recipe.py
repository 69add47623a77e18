"""The original tool's recipe, reimplemented: the yardstick of the quality lab.

Images squashed to a square, exact boxes, no flips, all objects of an image, the loss over the
whole square at the input's resolution, an IoU target from logits of .5 and more, AdamW with weight
decay on everything and no clipping, a warm-up of 250 steps however short the run.

Unlike `benchmarks.baseline`, which is timed and has samft's own loss and frame so that the two can
be compared, this one learns what the original tool learns; it is scored, not timed. It differs
from that tool in what cannot change scores, or can only help it: embeddings of a frozen encoder are
kept; what box prompts cannot reach does not decay; and masks are drawn as the evaluation draws
them, where the original's `sahi` makes polygons about half a pixel larger all around.

Source: https://github.com/bhpfelix/segment-anything-finetuner, `finetune.py`.
"""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)

# isort: split
from collections.abc import Iterator, Sequence
from dataclasses import replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.baseline import (
    DICE_WEIGHT,
    FOCAL_WEIGHT,
    IOU_WEIGHT,
    LEARNING_RATE,
    focal_and_dice,
)
from samft.annotations.segmentation import CroppedMask
from samft.coco.subset import CocoSubset
from samft.data.dataset import NO_PIXELS, Coco2MaskDataset, Sample
from samft.models.prompted_sam import PromptedSam

WEIGHT_DECAY = 1e-2
WARMUP_STEPS = 250
MILESTONES = (0.66667, 0.86666)  # shares of the steps, each of which divides the rate by ten
IOU_THRESHOLD = 0.5  # of logits: what the original takes for a mask where it scores itself


def learning_rate_factor(step: int, *, steps: int) -> float:
    """The learning rate at a step, from 0, as a share of the peak.

    The warm-up hides milestones that lie within it.
    """
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return float(0.1 ** sum(step >= share * steps for share in MILESTONES))


def original_losses(mask_logits: Tensor, iou_predicted: Tensor, masks: Tensor) -> Tensor:
    """The weighted loss of each mask, float32 [K]; the original divides their sum by the masks.

    Args:
        mask_logits: float32 [K, S/4, S/4].
        iou_predicted: float32 [K].
        masks: float32 [K, S, S], 0 and 1, over the whole square.
    """
    size = masks.shape[-2:]
    logits = F.interpolate(mask_logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    focal, dice = focal_and_dice(logits, masks)
    iou = (iou_predicted - original_iou(logits, masks)).square()
    return FOCAL_WEIGHT * focal + DICE_WEIGHT * dice + IOU_WEIGHT * iou


def original_iou(logits: Tensor, masks: Tensor) -> Tensor:
    """The IoU by which the original scores masks, float32 [K]; 1 if both are empty.

    A pixel counts as mask where its logit, not its probability, is at least .5.

    Args:
        logits: float32 [K, S, S].
        masks: float32 [K, S, S], 0 and 1.
    """
    predicted, true = logits >= IOU_THRESHOLD, masks > 0.5
    union = (predicted | true).sum((1, 2))
    overlap = (predicted & true).sum((1, 2))
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)


def squash_masks(
    truths: Sequence[CroppedMask], original_size: tuple[int, int], image_size: int
) -> NDArray[np.bool_]:
    """Resizes masks to the square: bilinearly, without antialiasing, thresholded above .5.

    Args:
        truths: K masks in the original frame.
        original_size: H, W of the image.
        image_size: S.

    Returns:
        bool [K, S, S].
    """
    squashed = np.zeros((len(truths), image_size, image_size), dtype=bool)
    for mask, truth in zip(squashed, truths, strict=True):
        whole = np.zeros(original_size, np.float32)
        (height, width), top, left = truth.mask.shape, truth.top, truth.left
        whole[top : top + height, left : left + width] = truth.mask
        mask[:] = cv2.resize(whole, (image_size, image_size), interpolation=cv2.INTER_LINEAR) > 0.5
    return squashed


class OriginalSamples:
    """The images, boxes and masks that the original's loader gives; each is made once and kept.

    Args:
        subset: Images and objects.
        image_size: S.
    """

    def __init__(self, subset: CocoSubset, *, image_size: int) -> None:
        # As in validation, without what samft does in training: flips, jitter, random subsets.
        self.dataset = Coco2MaskDataset(
            subset.index.image_folder, subset=subset, image_size=image_size, resize_mode="squash"
        )
        self.samples: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, row: int) -> Sample:
        """An image, squashed, and its exact boxes; masks are packed, see `unpack_masks`."""
        if row not in self.samples:
            sample = self.dataset[row]
            masks = squash_masks(sample.truths, sample.original_size, max(self.dataset.frame_size))
            packed = torch.from_numpy(np.packbits(masks, axis=2))
            self.samples[row] = replace(sample, targets=packed, truths=[])
        return self.samples[row]

    def embed(self, model: PromptedSam, row: int) -> Tensor:
        """The embedding of an image, float32 [1, C, S/16, S/16]; of a frozen encoder it is kept."""
        sample = self.sample(row)
        if sample.embedding is not None:
            return sample.embedding
        embedding = model.embed(sample.image[None], torch.tensor([sample.input_size]))
        if model.encoder_is_frozen:
            self.samples[row] = replace(sample, embedding=embedding, image=NO_PIXELS)
        return embedding


def unpack_masks(sample: Sample) -> Tensor:
    """The masks of a sample of `OriginalSamples`, float32 [K, S, S], 0 and 1."""
    return torch.from_numpy(np.unpackbits(sample.targets.numpy(), axis=2)).float()


def draw_batches(num_images: int, batch_size: int, *, seed: int) -> Iterator[list[int]]:
    """Rows in a new order each epoch, for ever; the last batch of an epoch may be smaller."""
    loader: DataLoader[int] = DataLoader(
        range(num_images),  # type: ignore[arg-type]  # a sequence is a dataset
        batch_size=batch_size,
        shuffle=True,
        collate_fn=list,
        generator=torch.Generator().manual_seed(seed),
    )
    while True:
        yield from loader


def _loss_of_chunk(
    mask_logits: Tensor, iou_predicted: Tensor, *, targets: Tensor, **_: Tensor
) -> tuple[Tensor]:
    return (original_losses(mask_logits, iou_predicted, targets),)


def train_original(
    model: PromptedSam, samples: OriginalSamples, *, steps: int, batch_size: int, seed: int
) -> None:
    """Trains a model, in place, as the original tool would, in float32 on the CPU.

    Args:
        model: With its frozen parts frozen.
        samples: If the encoder is frozen: of this encoder, because embeddings are kept in it.
        steps: Optimizer steps.
        batch_size: Images a step.
        seed: Of the order of images.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = draw_batches(len(samples), batch_size, seed=seed)
    for step, rows in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, steps=steps)
        optimizer.zero_grad()
        num_masks = sum(len(samples.sample(row).boxes) for row in rows)
        # Image by image, as the original decodes them; the sum of the gradients is the batch's.
        for row in rows:
            embedding, sample = samples.embed(model, row), samples.sample(row)
            total, _ = model(
                sample.image[None],
                sample.boxes,
                torch.zeros(len(sample.boxes), dtype=torch.int64),
                input_sizes=torch.tensor([sample.input_size]),
                embeddings=embedding,
                loss=_loss_of_chunk,
                targets=unpack_masks(sample),
                windows=sample.windows,
                gradient=torch.tensor(1 / num_masks),
            )
            (total / num_masks).backward()
        optimizer.step()
