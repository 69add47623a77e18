"""All boxes of all images, a chunk of boxes at a time, so that memory does not grow with boxes.

Decoding a box at 1024 px takes some 80 MB until backward. But the loss of a step is a sum over
boxes, and the gradient of a sum is the sum of gradients: `sum_losses` decodes a chunk, takes its
losses and their gradient right away, adds the gradient to what the chunks before it gave, and lets
go of the chunk. Nothing is computed twice, as it would be with checkpointing. To autograd it is one
function of the image side, the prompts and the parameters, whose backward has its answer ready; so
DistributedDataParallel sees one forward and one backward, and its hooks run as ever.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import MaskDecoder
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from samft.models.mask_decoder import Decoder, Tensors

# What a box takes for each channel of each image token, in bytes: the slope of a step's peak memory
# over the chunk, measured with vit_b at 1024 px in float32 (81 MB a box).
BYTES_PER_VALUE = 81
SHARE_OF_FREE_MEMORY = 0.25
# On a CPU more at once gains nothing: larger tensors are fetched anew from the system each time.
MOST_BOXES = {"cpu": 8}
OTHERWISE_MOST = 64


def auto_mask_chunk(num_values: int, device_type: str, *, free_memory: float) -> int:
    """How many boxes to decode at once.

    Args:
        num_values: Image tokens x channels: 4096 x 256 at 1024 px.
        device_type: `cpu`, `cuda`, ...
        free_memory: Bytes that are free on the device.

    Returns:
        1 to 64, and no more than a quarter of the memory can hold.
    """
    most = MOST_BOXES.get(device_type, OTHERWISE_MOST)
    return int(max(1, min(most, SHARE_OF_FREE_MEMORY * free_memory / BYTES_PER_VALUE / num_values)))


class Inputs(NamedTuple):
    """What the decoder is given.

    Attributes:
        image_embeddings: float [N, C, h, w].
        image_pe: float [1, C, h, w], the dense positional encoding.
        dense_embedding: float [1, C, 1, 1], the "no mask" embedding.
        sparse_embeddings: float [M, 2, C], the embedded corners of each box.
    """

    image_embeddings: Tensor
    image_pe: Tensor
    dense_embedding: Tensor
    sparse_embeddings: Tensor


@dataclass(frozen=True)
class BoxDecoder:
    """A mask decoder, with what it needs to know beside its inputs.

    Attributes:
        module: Stock's module, whose parameters are used.
        way: How it is computed.
        image_index: int64 [M], the image of each box, in 0..N-1.
        mask_chunk: Boxes decoded at once.
    """

    module: MaskDecoder
    way: Decoder
    image_index: Tensor
    mask_chunk: int

    def parts(self) -> Iterator[slice]:
        """The chunks of boxes; one, empty, where there are no boxes, so that gradients exist."""
        starts = range(0, max(len(self.image_index), 1), self.mask_chunk)
        return (slice(start, start + self.mask_chunk) for start in starts)

    def decode(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Predicts one mask for each box; where there is a second chunk, backward decodes anew.

        Returns:
            Mask logits [M, 4h, 4w] and predicted IoU [M].
        """
        per_image, shared = self.way.prepare(self.module, *inputs[:3])
        run: Callable[..., tuple[Tensor, Tensor]] = self._decode_part
        if torch.is_grad_enabled() and len(self.image_index) > self.mask_chunk:
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        found = [run(per_image, shared, inputs.sparse_embeddings, part) for part in self.parts()]
        logits, iou_predicted = zip(*found, strict=True)
        return torch.cat(logits), torch.cat(iou_predicted)

    def _decode_part(
        self, per_image: Tensors, shared: Tensors, sparse: Tensor, part: slice
    ) -> tuple[Tensor, Tensor]:
        index = self.image_index[part]
        chosen = tuple(tensor.index_select(0, index) for tensor in per_image)
        return self.way.decode(self.module, chosen, shared, sparse[part])

    def sum_losses(
        self, inputs: Inputs, *, loss: Callable[[Tensor, Tensor, slice], Tensors], gradient: Tensor
    ) -> tuple[Tensor, Tensors]:
        """The losses of all boxes, with memory for one chunk of them.

        Args:
            inputs: Of all boxes of all images.
            loss: (mask logits, predicted IoU, which boxes) to tensors [m], the first of them the
                loss.
            gradient: float32 scalar, the gradient that the sum is going to get in backward. Any
                other is right, too, but in float16 small gradients would be lost.

        Returns:
            The sum of the loss over boxes, and the tensors [M], without a gradient.
        """
        per_image, shared = self.way.prepare(self.module, *inputs[:3])
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        task = _Task(self, loss, gradient, len(per_image), len(shared))
        tensors = (*per_image, inputs.sparse_embeddings, *shared, *parameters)
        total, *values = _SumLosses.apply(task, *tensors)
        return total, tuple(values)


@dataclass(frozen=True)
class _Task:
    """What `_SumLosses` does with its tensors: per image, the prompts, shared, parameters."""

    boxes: BoxDecoder
    loss: Callable[[Tensor, Tensor, slice], Tensors]
    gradient: Tensor
    num_per_image: int
    num_shared: int

    def cut(self, tensors: Tensors, part: slice) -> list[Tensor]:
        """The tensors of a chunk of boxes, as leaves; parameters stay themselves."""
        num, index = self.num_per_image, self.boxes.image_index[part]
        end = num + 1 + self.num_shared
        leaves = [t.index_select(0, index) for t in tensors[:num]]
        leaves += [tensors[num][part].detach(), *(t.detach() for t in tensors[num + 1 : end])]
        for leaf, tensor in zip(leaves, tensors, strict=False):
            leaf.requires_grad_(tensor.requires_grad)
        return [*leaves, *tensors[end:]]

    def run(self, leaves: list[Tensor], part: slice) -> Tensors:
        """The losses of a chunk of boxes; the first carries the gradient."""
        num, end = self.num_per_image, self.num_per_image + 1 + self.num_shared
        per_image, sparse, shared = tuple(leaves[:num]), leaves[num], tuple(leaves[num + 1 : end])
        decoded = self.boxes.way.decode(self.boxes.module, per_image, shared, sparse)
        return self.loss(*decoded, part)

    def add(self, sums: list[Tensor | None], found: list[Tensor | None], part: slice) -> None:
        """Adds the gradients of a chunk's leaves to those of the whole tensors."""
        index = self.boxes.image_index[part]
        for number, (whole, gradient) in enumerate(zip(sums, found, strict=True)):
            if gradient is None:
                continue
            if number < self.num_per_image:
                assert whole is not None
                whole.index_add_(0, index, gradient.to(whole.dtype))
            elif number == self.num_per_image:
                assert whole is not None
                whole[part] = gradient
            else:
                sums[number] = gradient if whole is None else whole + gradient


class _SumLosses(torch.autograd.Function):
    """Sums losses over chunks of boxes, with the gradients taken on the way forward."""

    @staticmethod
    def forward(ctx: Any, task: _Task, *tensors: Tensor) -> Any:
        needed = [tensor.requires_grad for tensor in tensors]
        sums: list[Tensor | None] = [None] * len(tensors)
        for number, tensor in enumerate(tensors[: task.num_per_image + 1]):
            if needed[number]:  # summed over boxes in float32 also where autocast made halves
                dtype = torch.promote_types(tensor.dtype, torch.float32)
                sums[number] = torch.zeros_like(tensor, dtype=dtype)
        kept: list[Tensors] = []
        for part in task.boxes.parts():
            leaves = task.cut(tensors, part)
            with torch.enable_grad():
                values = task.run(leaves, part)
            kept.append(tuple(value.detach() for value in values))
            if any(needed):
                task.add(sums, _gradients(values[0], leaves, needed, task.gradient), part)
            del values, leaves  # or the next chunk would be made beside this one
        ctx.sums, ctx.gradient = sums, task.gradient
        columns = tuple(torch.cat(column) for column in zip(*kept, strict=True))
        ctx.mark_non_differentiable(*columns)
        return columns[0].sum(), *columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> Any:
        factor, sums = gradient / ctx.gradient, ctx.sums
        if sums is None:
            raise RuntimeError("the losses of this step have been through backward before")
        ctx.sums = None  # free, as autograd's own saved tensors are
        return None, *(None if total is None else total * factor for total in sums)


def _gradients(
    loss: Tensor, leaves: list[Tensor], needed: list[bool], gradient: Tensor
) -> list[Tensor | None]:
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    weights = gradient.to(loss.dtype).expand_as(loss)
    with torch.autocast(loss.device.type, enabled=False):  # backward takes forward's types
        found = iter(torch.autograd.grad(loss, wanted, weights, allow_unused=True))
    return [next(found) if need else None for need in needed]
