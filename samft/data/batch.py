"""What a dataset gives: one image with its objects; and several of them as one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samft.data.targets import CroppedMask

NO_PIXELS = torch.zeros(3, 0, 0, dtype=torch.uint8)


@dataclass
class Sample:
    """One image with its K objects."""

    image: Tensor  # uint8 [3, S, S], RGB, input frame, channels last; `NO_PIXELS` with an embedding
    boxes: Tensor  # float32 [K, 4], input frame
    targets: Tensor  # uint8 [K, s, s]; 0..255 at s = S/4, or 0 and 1 at s = S
    input_size: tuple[int, int]  # h, w of the image inside of the input frame
    original_size: tuple[int, int]  # H, W of the file
    image_id: int
    object_ids: Tensor  # int64 [K]
    truths: list[CroppedMask]  # K of them in validation, none in training
    bad_images: dict[str, str] = field(default_factory=dict)  # met on the way: name, reason
    embedding: Tensor | None = None  # float16 or float32 [C, S/16, S/16], where it is cached


@dataclass
class Batch:
    """N images, and the M objects of all of them one after the other."""

    images: Tensor  # uint8 [N, 3, S, S], RGB, input frame, channels last; [N, 3, 0, 0] if cached
    boxes: Tensor  # float32 [M, 4], input frame
    image_index: Tensor  # int64 [M], which of the N images an object is in
    targets: Tensor  # uint8 [M, s, s]; 0..255 at s = S/4, or 0 and 1 at s = S
    input_sizes: Tensor  # int64 [N, 2], h, w inside of the input frame
    original_sizes: Tensor  # int64 [N, 2], H, W of the file
    image_ids: list[int]
    object_ids: Tensor  # int64 [M]
    truths: list[CroppedMask]  # M of them in validation, none in training
    bad_images: dict[str, str] = field(default_factory=dict)  # met on the way: name, reason
    embeddings: Tensor | None = None  # float16 or float32 [N, C, S/16, S/16], where they are cached

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

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps the memory of all tensors until the stream is done with them."""
        for value in vars(self).values():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(stream)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **tensors})


def collate(samples: Sequence[Sample]) -> Batch:
    """Puts samples one after the other into one batch; all have an embedding, or none."""
    embeddings = [sample.embedding for sample in samples if sample.embedding is not None]
    num_objects = torch.tensor([len(sample.boxes) for sample in samples])
    return Batch(
        # Stacked as they lie in memory: a change of layout would cost more than all else here.
        images=torch.stack([s.image.permute(1, 2, 0) for s in samples]).permute(0, 3, 1, 2),
        boxes=torch.cat([sample.boxes for sample in samples]),
        image_index=torch.repeat_interleave(torch.arange(len(samples)), num_objects),
        targets=torch.cat([sample.targets for sample in samples]),
        input_sizes=torch.tensor([sample.input_size for sample in samples]),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        image_ids=[sample.image_id for sample in samples],
        object_ids=torch.cat([sample.object_ids for sample in samples]),
        truths=[truth for sample in samples for truth in sample.truths],
        bad_images={name: why for s in samples for name, why in s.bad_images.items()},
        embeddings=torch.stack(embeddings) if embeddings else None,
    )
