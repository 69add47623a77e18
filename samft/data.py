"""The dataset, its batches, and loaders that any number of processes can share and resume.

What a sample looks like depends on (seed, epoch, image id) only, and what a step consists of on the
seed and the number of images in a step: not on workers, processes, accumulation or restarts.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from samft.coco import CocoIndex, read_coco
from samft.errors import DataError
from samft.images import read_image
from samft.masks import decode_cropped
from samft.transforms import (
    Frame,
    boxes_to_input,
    jitter_boxes,
    make_frame,
    mask_to_input,
    mask_to_low,
    resize_image,
)

_ORDER_STREAM, _SAMPLE_STREAM = 1, 2  # first word of a seed, so that no two streams are the same
_WORD = 2**64 - 1


@dataclass(frozen=True)
class CroppedMask:
    """A true mask at the original resolution, cropped tightly."""

    top: int  # px, original frame
    left: int
    mask: NDArray[np.bool_]  # [h, w]


@dataclass
class Sample:
    """One image with its K objects."""

    image: Tensor  # uint8 [3, S, S], RGB, input frame
    boxes: Tensor  # float32 [K, 4], input frame
    targets: Tensor  # uint8 [K, s, s]; 0..255 at s = S/4, or 0 and 1 at s = S
    input_size: tuple[int, int]  # h, w of the image inside of the input frame
    original_size: tuple[int, int]  # H, W of the file
    image_id: int
    object_ids: Tensor  # int64 [K]
    truths: list[CroppedMask]  # K of them in validation, none in training


@dataclass
class Batch:
    """N images, and the M objects of all of them one after the other."""

    images: Tensor  # uint8 [N, 3, S, S], RGB, input frame
    boxes: Tensor  # float32 [M, 4], input frame
    image_index: Tensor  # int64 [M], which of the N images an object is in
    targets: Tensor  # uint8 [M, s, s]; 0..255 at s = S/4, or 0 and 1 at s = S
    input_sizes: Tensor  # int64 [N, 2], h, w inside of the input frame
    original_sizes: Tensor  # int64 [N, 2], H, W of the file
    image_ids: list[int]
    object_ids: Tensor  # int64 [M]
    truths: list[CroppedMask]  # M of them in validation, none in training

    @property
    def num_masks(self) -> int:
        """M."""
        return len(self.boxes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with all tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; the data loader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **tensors})


def _generator(*words: int) -> np.random.Generator:
    seed = np.random.SeedSequence([word & _WORD for word in words])
    return np.random.Generator(np.random.Philox(seed))


class Coco2MaskDataset(Dataset[Sample]):
    """Images of a COCO file with a box and a mask for each object.

    Training draws a subset of the objects, a flip and the jitter of the boxes; validation gives all
    objects as annotated, with their masks at the original resolution as `truths`.

    Args:
        image_folder: What the file names are relative to.
        annotations: The COCO file; not read if `index` is given.
        image_size: Side S of the input frame.
        resize_mode: `pad` or `squash`, see `make_frame`.
        training: Whether to draw at random.
        max_masks_per_image: Size of the subset; 0 takes all.
        box_jitter: See `jitter_boxes`.
        augment: `flip` or `none`.
        loss_resolution: Targets at `low` (S/4) or `input` (S).
        seed: Of everything random.
        index: The checked file, if it has been read.

    Raises:
        DataError: As `read_coco`.
    """

    def __init__(
        self,
        image_folder: str | Path,
        annotations: str | Path | None = None,
        *,
        image_size: int = 1024,
        resize_mode: str = "pad",
        training: bool = False,
        max_masks_per_image: int = 64,
        box_jitter: float = 0.1,
        augment: str = "flip",
        loss_resolution: str = "low",
        seed: int = 0,
        index: CocoIndex | None = None,
    ) -> None:
        if index is None:
            if annotations is None:
                raise ValueError("Coco2MaskDataset needs annotations, or an index.")
            index = read_coco(Path(annotations), Path(image_folder))
        self.index = index
        self.image_folder = Path(image_folder)
        self.image_size = image_size
        self.resize_mode = resize_mode
        self.training = training
        self.max_masks_per_image = max_masks_per_image
        self.box_jitter = box_jitter
        self.augment = augment
        self.loss_resolution = loss_resolution
        self.seed = seed

    def __len__(self) -> int:
        return self.index.num_images

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Loads an image by i, or by (epoch, i), which decides what is drawn.

        Raises:
            DataError: If the image is missing or broken.
        """
        epoch, i = key if isinstance(key, tuple) else (0, key)
        i = range(len(self))[i]  # an IndexError past the end, so that the dataset can be iterated
        image = read_image(self.image_folder / self.index.file_names[i])
        size = (image.shape[0], image.shape[1])
        image_id = int(self.index.image_ids[i])
        generator = _generator(_SAMPLE_STREAM, self.seed, epoch, image_id)
        objects = np.arange(*self.index.first_object[i : i + 2])
        if self.training and 0 < self.max_masks_per_image < len(objects):
            chosen = generator.choice(objects, self.max_masks_per_image, replace=False)
            objects = np.sort(chosen)
        flipped = self.training and self.augment == "flip" and bool(generator.integers(2))
        frame = make_frame(size, self.image_size, resize_mode=self.resize_mode, flipped=flipped)
        boxes = boxes_to_input(self.index.boxes[objects], frame)
        if self.training:
            boxes = jitter_boxes(boxes, share=self.box_jitter, frame=frame, generator=generator)
        crops = [decode_cropped(self.index.segmentations[int(k)], *size) for k in objects]
        # The index was checked at the JSON's size: in a smaller file a small object may be outside.
        kept = np.array([crop.size > 0 for _, _, crop in crops], dtype=bool)
        truths = [CroppedMask(*crop[:2], crop[2].astype(bool)) for crop in crops if crop[2].size]
        return Sample(
            image=torch.from_numpy(resize_image(image, frame).transpose(2, 0, 1).copy()),
            boxes=torch.from_numpy(boxes[kept].astype(np.float32)),
            targets=self._targets(truths, frame),
            input_size=frame.input_size,
            original_size=size,
            image_id=image_id,
            object_ids=torch.from_numpy(self.index.object_ids[objects[kept]]),
            truths=[] if self.training else truths,
        )

    def _targets(self, truths: list[CroppedMask], frame: Frame) -> Tensor:
        to_target = mask_to_low if self.loss_resolution == "low" else mask_to_input
        side = self.image_size // 4 if self.loss_resolution == "low" else self.image_size
        targets = np.zeros((len(truths), side, side), dtype=np.uint8)
        for target, truth in zip(targets, truths, strict=True):
            target[:] = to_target(truth.mask, frame, top=truth.top, left=truth.left)
        return torch.from_numpy(targets)


def collate(samples: Sequence[Sample]) -> Batch:
    """Puts samples one after the other into one batch."""
    num_objects = torch.tensor([len(sample.boxes) for sample in samples])
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        boxes=torch.cat([sample.boxes for sample in samples]),
        image_index=torch.repeat_interleave(torch.arange(len(samples)), num_objects),
        targets=torch.cat([sample.targets for sample in samples]),
        input_sizes=torch.tensor([sample.input_size for sample in samples]),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        image_ids=[sample.image_id for sample in samples],
        object_ids=torch.cat([sample.object_ids for sample in samples]),
        truths=[truth for sample in samples for truth in sample.truths],
    )


@dataclass(eq=False, kw_only=True)
class StepSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one process, as lists of (epoch, i), for a loader's `batch_sampler`.

    All processes read one endless stream: position p is the image permutation(seed, p // n)[p % n]
    of epoch p // n. A step takes the next world_size * batch_size * accumulate_steps positions, so
    it is made of the same images however that product comes about.
    """

    num_images: int  # n
    batch_size: int = 1  # images per process per micro-batch
    accumulate_steps: int = 1  # micro-batches per step
    start_step: int = 0  # steps that are done already
    steps: int | None = None  # the step to end before; None goes on for ever
    rank: int = 0
    world_size: int = 1
    seed: int = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        ahead = itertools.count(self.start_step)
        for step in ahead if self.steps is None else range(self.start_step, self.steps):
            for micro in range(self.accumulate_steps):
                shard = (step * self.accumulate_steps + micro) * self.world_size + self.rank
                first = shard * self.batch_size
                yield [self._at(position) for position in range(first, first + self.batch_size)]

    def _at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.num_images)
        return epoch, int(_permutation(self.seed, epoch, self.num_images)[place])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    return _generator(_ORDER_STREAM, seed, epoch).permutation(num_images)


class ShardSampler(Sampler[int]):
    """Every image exactly once over all processes: rank r takes r, r + world_size, ...

    Processes get unequal numbers where n does not divide, some of them none: nothing is padded.
    """

    def __init__(self, num_images: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.rows = range(rank, num_images, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class _ErrorsAsItems(Dataset[Sample | DataError]):
    # A loader makes a traceback's text of what a worker raises; what is returned stays whole.
    def __init__(self, dataset: Coco2MaskDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | DataError:
        try:
            return self.dataset[key]
        except DataError as error:
            return error


def _collate_or_error(items: list[Sample | DataError]) -> Batch | DataError:
    errors = [item for item in items if isinstance(item, DataError)]
    return errors[0] if errors else collate([item for item in items if isinstance(item, Sample)])


class BatchLoader:
    """Iterates over batches; a worker's `DataError` (an image is broken, say) is raised whole."""

    def __init__(self, dataset: Coco2MaskDataset, *, num_workers: int, **options: Any) -> None:
        self.loader = DataLoader(
            _ErrorsAsItems(dataset),
            num_workers=num_workers,
            collate_fn=_collate_or_error,
            worker_init_fn=_start_worker,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # or it draws from the model's generator
            **options,
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def __len__(self) -> int:
        return len(self.loader)


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # In a group of its own, a signal to the run's group (Ctrl-C, a scheduler's warning) reaches the
    # main process only, which finishes its step with the workers alive and then stops them.
    os.setpgid(0, 0)


def train_loader(
    dataset: Coco2MaskDataset,
    *,
    batch_size: int,
    accumulate_steps: int = 1,
    start_step: int = 0,
    steps: int | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
) -> BatchLoader:
    """Loads this process' micro-batches, step after step; see `StepSampler`."""
    sampler = StepSampler(
        num_images=len(dataset),
        batch_size=batch_size,
        accumulate_steps=accumulate_steps,
        start_step=start_step,
        steps=steps,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )
    return BatchLoader(dataset, num_workers=num_workers, batch_sampler=sampler)


def val_loader(
    dataset: Coco2MaskDataset, *, num_workers: int = 0, rank: int = 0, world_size: int = 1
) -> BatchLoader:
    """Loads this process' share of the images, one per batch; see `ShardSampler`."""
    sampler = ShardSampler(len(dataset), rank=rank, world_size=world_size)
    return BatchLoader(dataset, num_workers=num_workers, sampler=sampler, batch_size=1)
