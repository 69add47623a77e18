"""The plain recipe that public fine-tuners of SAM follow, to measure samft beside.

Stock modules with explicit attention, one decoder call per image, the loss at the size of the input
against float masks of that size, default AdamW over all that trains, float32, no workers. Only the
semantics of the loss are samft's (`samft.losses`, `loss_resolution input`), so that the two can be
held equal before they are timed.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import sigmoid_focal_loss

from samft.data.samplers import SampleKey
from samft.models.sam import PIXEL_MEAN, PIXEL_STD

FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 20.0, 1.0, 1.0
LEARNING_RATE = 1e-4
_MEAN, _STD = np.array(PIXEL_MEAN, np.float32), np.array(PIXEL_STD, np.float32)


@dataclass
class PlainSample:
    """One image with its K objects."""

    image: Tensor  # float32 [3, S, S], normalised, padded with zeros
    boxes: Tensor  # float32 [K, 4], input frame
    masks: Tensor  # float32 or uint8 [K, S, S], 0 and 1
    input_size: tuple[int, int]  # h, w of the image inside of the frame

    def to(self, device: torch.device) -> "PlainSample":
        """The sample with all tensors on a device."""
        image, boxes, masks = (t.to(device) for t in (self.image, self.boxes, self.masks))
        return PlainSample(image, boxes, masks, self.input_size)


def plain_losses(mask_logits: Tensor, iou_predicted: Tensor, sample: PlainSample) -> Tensor:
    """Weighted loss of each mask of an image, [K], over the pixels that are not padding."""
    height, width = sample.input_size
    size = sample.masks.shape[-1]
    logits = F.interpolate(mask_logits, (size, size), mode="bilinear", align_corners=False)
    logits, masks = logits[:, 0, :height, :width], sample.masks[:, :height, :width]
    focal = sigmoid_focal_loss(logits, masks, alpha=0.25, gamma=2.0).mean((1, 2))
    probabilities = logits.sigmoid()
    overlap = (probabilities * masks).sum((1, 2))
    total = probabilities.sum((1, 2)) + masks.sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    predicted, truth = logits > 0, masks > 0.5
    union = (predicted | truth).sum((1, 2))
    iou_actual = (predicted & truth).sum((1, 2)) / union.clamp(min=1)
    iou = (iou_predicted[:, 0] - iou_actual).square()
    return FOCAL_WEIGHT * focal + DICE_WEIGHT * dice + IOU_WEIGHT * iou


class PlainTrainer:
    """A stock SAM and its optimizer."""

    def __init__(self, sam: Sam, *, amp: bool = False) -> None:
        """Optimizes all that requires a gradient; `amp` is bf16 autocast."""
        self.sam = sam
        self.amp = amp
        trainable = [p for p in sam.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)

    def encode(self, images: Tensor) -> Tensor:
        """Image embeddings [N, C, S/16, S/16]."""
        return self.sam.image_encoder(images)

    def decode(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits [K, 1, S/4, S/4] and predicted IoU [K, 1] of one image [1, C, h, w]."""
        sparse, dense = self.sam.prompt_encoder(points=None, boxes=boxes, masks=None)
        return self.sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )

    def losses(self, mask_logits: Tensor, iou_predicted: Tensor, sample: PlainSample) -> Tensor:
        """See `plain_losses`."""
        return plain_losses(mask_logits, iou_predicted, sample)

    def decoder_loss(self, embeddings: Tensor, samples: Sequence[PlainSample]) -> Tensor:
        """Mean loss over all masks, image after image."""
        parts = []
        for embedding, sample in zip(embeddings, samples, strict=True):
            mask_logits, iou_predicted = self.decode(embedding[None], sample.boxes)
            parts.append(self.losses(mask_logits, iou_predicted, sample))
        return torch.cat(parts).mean()

    def loss(self, samples: Sequence[PlainSample]) -> Tensor:
        """Mean loss over all masks of the batch."""
        with self.autocast():
            embeddings = self.encode(torch.stack([sample.image for sample in samples]))
            return self.decoder_loss(embeddings, samples)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Of forward and loss."""
        return torch.autocast(self.sam.device.type, dtype=torch.bfloat16, enabled=self.amp)

    def train_step(self, samples: Sequence[PlainSample]) -> float:
        """One optimizer step; its loss."""
        self.optimizer.zero_grad()
        loss = self.loss([sample.to(self.sam.device) for sample in samples])
        loss.backward()
        self.optimizer.step()
        return loss.item()


class PlainDataset(Dataset[PlainSample]):
    """Samples as a loader gives them that was written without thought of what they cost.

    Args:
        coco: The annotation file.
        image_folder: What its file names are relative to.
        objects: For each image its id and the ids of its objects.
        image_size: Side S of the input frame.
        max_masks: Objects of an image, drawn at random where there are more; None: all, in order.
        mask_type: What masks are handed on as: the float32 that the loss wants, or uint8.
    """

    def __init__(
        self,
        coco: COCO,
        image_folder: Path,
        *,
        objects: Sequence[tuple[int, list[int]]],
        image_size: int,
        max_masks: int | None = None,
        mask_type: torch.dtype = torch.float32,
    ) -> None:
        self.coco = coco
        self.image_folder = image_folder
        self.objects = objects
        self.image_size = image_size
        self.max_masks = max_masks
        self.mask_type = mask_type
        self.transform = ResizeLongestSide(image_size)

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, key: int | SampleKey) -> PlainSample:
        image_id, object_ids = self.objects[key[1] if isinstance(key, tuple) else key]
        path = self.image_folder / self.coco.loadImgs(image_id)[0]["file_name"]
        image: Any = cv2.imread(str(path))
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        if self.max_masks is not None:
            chosen = torch.randperm(len(object_ids))[: self.max_masks].tolist()
            object_ids = [object_ids[k] for k in chosen]
        entries = self.coco.loadAnns(object_ids)
        masks = [self.transform.apply_image(self.coco.annToMask(entry)) for entry in entries]
        corners = np.array([entry["bbox"] for entry in entries])
        corners[:, 2:] += corners[:, :2]
        boxes = self.transform.apply_boxes(corners, image.shape[:2])
        resized = self.transform.apply_image(image)
        pixels = (resized.astype(np.float32) - _MEAN) / _STD
        return PlainSample(
            torch.from_numpy(self._pad(pixels).transpose(2, 0, 1).copy()),
            torch.from_numpy(boxes).float(),
            torch.from_numpy(np.stack([self._pad(mask) for mask in masks])).to(self.mask_type),
            (resized.shape[0], resized.shape[1]),
        )

    def _pad(self, array: NDArray[Any]) -> NDArray[Any]:
        bottom, right = self.image_size - array.shape[0], self.image_size - array.shape[1]
        padding = ((0, bottom), (0, right), (0, 0))
        return np.pad(array, padding[: array.ndim])


def plain_loader(dataset: PlainDataset, *, batch_size: int) -> Iterator[list[PlainSample]]:
    """One epoch of whole batches in random order, loaded in the process that trains."""
    yield from DataLoader(
        dataset, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=list
    )
