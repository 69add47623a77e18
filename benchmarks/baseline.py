"""The baseline: how public fine-tuners of SAM train it, to compare samft with.

Stock modules with explicit attention, one decoder call per image, the loss at the input's
resolution against float masks, default AdamW over all trainable parameters, float32, no loader
workers. Only the definition of the loss is samft's (`samft.training.losses`, `loss_resolution
input`), so that both can be checked to be equal before they are timed.
"""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)

# isort: split
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
from samft.training.losses import MaskLosses

FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 20.0, 1.0, 1.0
LEARNING_RATE = 1e-4
_MEAN, _STD = np.array(PIXEL_MEAN, np.float32), np.array(PIXEL_STD, np.float32)


@dataclass
class BaselineSample:
    """One image with its K objects."""

    image: Tensor  # float32 [3, S, S], normalised, padded with zeros
    boxes: Tensor  # float32 [K, 4], input frame
    masks: Tensor  # float32 or uint8 [K, S, S], 0 and 1
    input_size: tuple[int, int]  # h, w of the image area in the input frame

    def to(self, device: torch.device) -> "BaselineSample":
        """The sample with all tensors on a device."""
        image, boxes, masks = (t.to(device) for t in (self.image, self.boxes, self.masks))
        return BaselineSample(image, boxes, masks, self.input_size)


def baseline_losses(mask_logits: Tensor, iou_predicted: Tensor, sample: BaselineSample) -> Tensor:
    """Weighted loss [K] of each mask of an image, over the pixels that are not padding."""
    height, width = sample.input_size
    size = sample.masks.shape[-1]
    logits = F.interpolate(mask_logits, (size, size), mode="bilinear", align_corners=False)
    logits, masks = logits[:, 0, :height, :width], sample.masks[:, :height, :width]
    focal, dice = focal_and_dice(logits, masks)
    predicted, truth = logits > 0, masks > 0.5
    union = (predicted | truth).sum((1, 2))
    iou_actual = (predicted & truth).sum((1, 2)) / union.clamp(min=1)
    iou = (iou_predicted[:, 0] - iou_actual).square()
    return FOCAL_WEIGHT * focal + DICE_WEIGHT * dice + IOU_WEIGHT * iou


def focal_and_dice(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Focal loss, a mean over pixels, and dice loss of each mask; also those of the original tool.

    Args:
        logits: float32 [K, h, w].
        masks: float32 [K, h, w], 0 and 1.

    Returns:
        Two float32 [K], without weights.
    """
    focal = sigmoid_focal_loss(logits, masks, alpha=0.25, gamma=2.0).mean((1, 2))
    probabilities = logits.sigmoid()
    overlap = (probabilities * masks).sum((1, 2))
    total = probabilities.sum((1, 2)) + masks.sum((1, 2))
    return focal, 1 - (2 * overlap + 1) / (total + 1)


def plain_losses(
    mask_logits: Tensor,
    iou_predicted: Tensor,
    *,
    targets: Tensor,
    windows: Tensor,
    image_index: Tensor,
    input_sizes: Tensor,
    focal_weight: float,
    alpha: float = 0.25,
    gamma: float = 2.0,
    overlap_loss: str = "dice",
) -> MaskLosses:
    """samft's default losses of each mask, written out for autograd with PyTorch's own sampling.

    Arguments and result as those of `samft.training.losses.mask_losses`, which the tests compare
    with this; `alpha` and `gamma` of the focal loss and `overlap_loss`, `dice` or `iou`, are for
    experiments with other losses.
    """
    size, frame = targets.shape[-1], 4 * mask_logits.shape[-1]
    extents = input_sizes[image_index].float()
    edges = _cell_edges(windows, size)
    y, x = ((axis[:, 1:] + axis[:, :-1]) / 2 for axis in edges)
    centres = torch.stack(
        [x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1
    )
    sampled = F.grid_sample(
        mask_logits[:, None], 2 * centres / frame - 1, padding_mode="border", align_corners=False
    )[:, 0]
    shares, none = targets / 255, torch.zeros_like(mask_logits)
    whole = torch.cat([torch.zeros_like(extents), extents.flip(1)], dim=1)
    frames = windows.new_tensor([[0.0, 0.0, frame, frame]]).expand(len(windows), -1)
    own = _cell_edges(frames, mask_logits.shape[-1])
    area = _areas_within(edges, whole)
    outside = _areas_within(own, whole) - _areas_within(own, _intersect(windows, whole))

    def total(window: Tensor, surroundings: Tensor) -> Tensor:
        return (window * area).sum((1, 2)) + (surroundings * outside).sum((1, 2))

    focal = total(
        sigmoid_focal_loss(sampled, shares, alpha=alpha, gamma=gamma),
        sigmoid_focal_loss(mask_logits, none, alpha=alpha, gamma=gamma),
    ) / extents.prod(1)
    overlap = total(sampled.sigmoid() * shares, none)
    areas = total(sampled.sigmoid() + shares, mask_logits.sigmoid())
    cell = (windows[:, 2:] - windows[:, :2]).prod(1) / size**2
    if overlap_loss == "dice":
        dice = 1 - (2 * overlap + cell) / (areas + cell)
    else:
        dice = 1 - (overlap + cell) / (areas - overlap + cell)
    truth = shares >= shares.amax((1, 2), keepdim=True).clamp(min=1e-6, max=0.5)
    common = total(((sampled > 0) & truth).float(), none)
    union = total(((sampled > 0) | truth).float(), (mask_logits > 0).float())
    iou_actual = torch.where(union > 0, common / union.clamp(min=1e-12), 1.0)
    iou = (iou_predicted - iou_actual).square()
    return MaskLosses(
        focal_weight * focal + DICE_WEIGHT * dice + IOU_WEIGHT * iou, focal, dice, iou, iou_actual
    )


def _cell_edges(rectangles: Tensor, size: int) -> tuple[Tensor, Tensor]:
    # The edges of size x size cells of each rectangle [m, 4], x0 y0 x1 y1: two [m, size + 1], y, x.
    start, end = rectangles[:, :2, None], rectangles[:, 2:, None]
    steps = torch.linspace(0, 1, size + 1, device=rectangles.device)
    x, y = (start + (end - start) * steps).unbind(1)
    return y, x


def _intersect(rectangles: Tensor, others: Tensor) -> Tensor:
    start = torch.maximum(rectangles[:, :2], others[:, :2])
    return torch.cat([start, torch.minimum(rectangles[:, 2:], others[:, 2:])], dim=1)


def _areas_within(edges: tuple[Tensor, Tensor], rectangles: Tensor) -> Tensor:
    # How much of each cell lies in a rectangle [m, 4]: [m, n, n].
    x0, y0, x1, y1 = rectangles[:, :, None].unbind(1)
    rows, columns = (
        (torch.minimum(axis[:, 1:], high) - torch.maximum(axis[:, :-1], low)).clamp(min=0)
        for axis, low, high in zip(edges, (y0, x0), (y1, x1), strict=True)
    )
    return rows[:, :, None] * columns[:, None, :]


class BaselineTrainer:
    """A stock SAM and its optimizer."""

    def __init__(self, sam: Sam, *, amp: bool = False) -> None:
        """Optimizes all parameters that require a gradient; `amp` is bf16 autocast."""
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

    def losses(self, mask_logits: Tensor, iou_predicted: Tensor, sample: BaselineSample) -> Tensor:
        """See `baseline_losses`."""
        return baseline_losses(mask_logits, iou_predicted, sample)

    def decoder_loss(self, embeddings: Tensor, samples: Sequence[BaselineSample]) -> Tensor:
        """Mean loss over all masks; decodes one image after the other."""
        losses = []
        for embedding, sample in zip(embeddings, samples, strict=True):
            mask_logits, iou_predicted = self.decode(embedding[None], sample.boxes)
            losses.append(self.losses(mask_logits, iou_predicted, sample))
        return torch.cat(losses).mean()

    def loss(self, samples: Sequence[BaselineSample]) -> Tensor:
        """Mean loss over all masks of the batch."""
        with self.autocast():
            embeddings = self.encode(torch.stack([sample.image for sample in samples]))
            return self.decoder_loss(embeddings, samples)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context of forward pass and loss."""
        return torch.autocast(self.sam.device.type, dtype=torch.bfloat16, enabled=self.amp)

    def train_step(self, samples: Sequence[BaselineSample]) -> float:
        """Takes one optimizer step; returns its loss."""
        self.optimizer.zero_grad()
        loss = self.loss([sample.to(self.sam.device) for sample in samples])
        loss.backward()
        self.optimizer.step()
        return loss.item()


class BaselineDataset(Dataset[BaselineSample]):
    """Samples of a straightforward loader: whole images, and one full-size mask per object.

    Args:
        coco: The annotation file.
        image_folder: What its file names are relative to.
        objects: For each image its id and the ids of its objects.
        image_size: Side S of the input frame, px.
        max_masks: The most objects of an image, chosen at random; None: all, in order.
        mask_type: Dtype of the masks: float32, which the loss takes, or uint8.
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

    def __getitem__(self, key: int | SampleKey) -> BaselineSample:
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
        return BaselineSample(
            torch.from_numpy(self._pad(pixels).transpose(2, 0, 1).copy()),
            torch.from_numpy(boxes).float(),
            torch.from_numpy(np.stack([self._pad(mask) for mask in masks])).to(self.mask_type),
            (resized.shape[0], resized.shape[1]),
        )

    def _pad(self, array: NDArray[Any]) -> NDArray[Any]:
        bottom, right = self.image_size - array.shape[0], self.image_size - array.shape[1]
        padding = ((0, bottom), (0, right), (0, 0))
        return np.pad(array, padding[: array.ndim])


def baseline_loader(dataset: BaselineDataset, *, batch_size: int) -> Iterator[list[BaselineSample]]:
    """One epoch of full batches in random order, loaded in the training process."""
    yield from DataLoader(
        dataset, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=list
    )
