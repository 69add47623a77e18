"""Decodes boxes, and sums their losses, a chunk at a time: memory does not grow with boxes.

Decoding a box at 1024 px takes some 80 MB until backward. But the loss of a step is a sum over
boxes, and the gradient of a sum is the sum of gradients. So `BoxDecoder.sum_losses` decodes a
chunk, computes its losses and their gradient at once, adds the gradient to that of earlier chunks,
and frees the chunk. Nothing is computed twice, as it would be with checkpointing.

To autograd the whole is one function of image tensors, prompts and parameters, whose backward has
its answer ready: DistributedDataParallel sees one forward and one backward, and its hooks run as
ever. The price is that forward has to know by what the sum will be multiplied (`gradient`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from samft.models.mask_decoder import DecoderImplementation
from samft.models.prompts import DenseEmbedding, PromptEmbeddings
from samft.models.two_way_transformer import Tensors

# Bytes a box takes for each channel of each image token: the slope of a step's peak memory over the
# chunk, measured with vit_b at 1024 px in float32 and boxes of several images (81 MB a box).
BYTES_PER_VALUE = 81
SHARE_OF_FREE_MEMORY = 0.25
# On a CPU a chunk has at most so many values, 4 boxes at 1024 px or 64 at 256 px: larger tensors
# come fresh from the system each time. At 1024 px, 8 boxes at once take 1.2 to 1.3 times as long.
MAX_VALUES = {"cpu": 2**22}
MAX_BOXES = 64

# (mask logits [m, s, s], predicted IoU [m], the fields of `LossInputs` by name) to tensors [m], of
# which the first is the loss.
ChunkLoss = Callable[..., Tensors]
T = TypeVar("T")
U = TypeVar("U")


def auto_mask_chunk(num_values: int, device_type: str, *, free_memory: float) -> int:
    """How many boxes to decode at once.

    Args:
        num_values: Image tokens x channels: 4096 x 256 at 1024 px.
        device_type: `cpu`, `cuda`, ...
        free_memory: Bytes that are free on the device.

    Returns:
        1 to 64, and no more than a quarter of the memory can hold.
    """
    by_memory = SHARE_OF_FREE_MEMORY * free_memory / BYTES_PER_VALUE
    most = min(by_memory, MAX_VALUES.get(device_type, float("inf")))
    return int(max(1, min(most / num_values, MAX_BOXES)))


# The first three of `DecoderInputs`.
ImageInputs = tuple[Tensor, Tensor, DenseEmbedding]


class DecoderInputs(NamedTuple):
    """The tensors that a mask decoder takes, for all prompts of all images.

    Attributes:
        image_embeddings: float [N, C, h, w].
        image_pe: float [1, C, h, w], the dense positional encoding.
        dense_embedding: With what prompts, with masks or without, add to image embeddings.
        prompts: Of M prompts.
    """

    image_embeddings: Tensor
    image_pe: Tensor
    dense_embedding: DenseEmbedding
    prompts: PromptEmbeddings


class LossInputs(NamedTuple):
    """What a loss compares the masks of all boxes with.

    Attributes:
        targets: uint8 [M, G, G].
        windows: float32 [M, 4], the rectangles that the targets cover.
        image_index: int64 [M], the image of each box.
        input_sizes: int [N, 2], height and width of each image inside the frame.
    """

    targets: Tensor
    windows: Tensor
    image_index: Tensor
    input_sizes: Tensor

    def rows(self, chunk: slice) -> "LossInputs":
        """Of a chunk of boxes; the images are the same."""
        targets, windows, image_index = (tensor[chunk] for tensor in self[:3])
        return LossInputs(targets, windows, image_index, self.input_sizes)


@dataclass(frozen=True)
class BoxDecoder:
    """A mask decoder for boxes of several images, applied to a chunk of boxes at a time.

    Attributes:
        module: The stock module, whose parameters are used.
        implementation: How it is computed.
        image_index: int64 [M], the image of each box, in 0..N-1.
        mask_chunk: Boxes decoded at once.
    """

    module: MaskDecoder
    implementation: DecoderImplementation
    image_index: Tensor
    mask_chunk: int

    def chunks(self) -> Iterator[slice]:
        """The chunks of boxes; an empty one if there are no boxes, so that gradients exist."""
        starts = range(0, max(len(self.image_index), 1), self.mask_chunk)
        return (slice(start, start + self.mask_chunk) for start in starts)

    def rows_of_boxes(self, per_image: Tensor, chunk: slice) -> Tensor:
        """What the decoder takes of [N, ...] for a chunk: the row of each box, or the only row."""
        if len(per_image) == 1:
            return per_image
        return per_image.index_select(0, self.image_index[chunk])

    def add_of_boxes(self, per_image: Tensor, of_boxes: Tensor, chunk: slice) -> None:
        """Adds to [N, ...], in place, the rows of the boxes of each image.

        Args:
            per_image: float [N, ...], contiguous.
            of_boxes: Of the shape that `rows_of_boxes` returned.
            chunk: The chunk of boxes.
        """
        if len(per_image) == 1:
            per_image.add_(of_boxes)
            return
        # As a matrix product, which adds in the same order each time: `index_add_` on a GPU does
        # not. The matrix has a 1 where a box is in an image.
        images = torch.arange(len(per_image), device=per_image.device)
        membership = (images[:, None] == self.image_index[chunk]).to(per_image.dtype)
        rows = of_boxes.flatten(1).to(per_image.dtype)
        per_image.view(len(per_image), -1).addmm_(membership, rows)

    def decode(
        self,
        image_inputs: ImageInputs,
        embed: Callable[[slice], PromptEmbeddings],
        *,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Predicts the masks of all prompts; with several chunks, backward decodes each once more.

        Args:
            image_inputs: The first three of `DecoderInputs`.
            embed: Gives the embeddings of a chunk of the prompts.
            multimask: Whether three masks are wanted of each prompt.

        Returns:
            Mask logits and predicted IoU, see `DecoderImplementation.decode`.
        """
        per_image, shared = self.implementation.prepare(self.module, *image_inputs)

        def decode(chunk: slice) -> tuple[Tensor, Tensor]:
            of_boxes = tuple(self.rows_of_boxes(tensor, chunk) for tensor in per_image)
            decode_rows = self.implementation.decode
            return decode_rows(self.module, of_boxes, shared, embed(chunk), multimask=multimask)

        if torch.is_grad_enabled() and len(self.image_index) > self.mask_chunk:
            # The masks are wanted, so no loss can be taken here: checkpoint each chunk.
            decode = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=False)
        logits, iou_predicted = zip(*map(decode, self.chunks()), strict=True)
        return torch.cat(logits), torch.cat(iou_predicted)

    def sum_losses(
        self,
        inputs: DecoderInputs,
        *,
        loss: ChunkLoss,
        loss_inputs: LossInputs,
        gradient: Tensor,
        add_chunk: "AddChunk | None" = None,
    ) -> tuple[Tensor, Tensors]:
        """The losses of all boxes, with memory for one chunk of them.

        Args:
            inputs: Of all boxes of all images.
            loss: See `ChunkLoss`.
            loss_inputs: Of all boxes.
            gradient: float32 scalar, the gradient that the sum is going to get in backward. Any
                other is right, too, but in float16 small gradients would be lost.
            add_chunk: What to do instead of `ChunkedStep.add_chunk`, with the same result.

        Returns:
            The sum of the loss over boxes, and the tensors [M], without a gradient.
        """
        per_image, shared = self.implementation.prepare(self.module, *inputs[:3])
        groups = Groups(
            per_image=list(per_image),
            per_box=[tensor for tensor in inputs.prompts if tensor is not None],
            shared=list(shared),
            parameters=[p for p in self.module.parameters() if p.requires_grad],
        )
        step = ChunkedStep(self, loss, loss_inputs, gradient, groups.layout())
        return sum_of_losses(step, groups, add_chunk=add_chunk)


class RoundInputs(NamedTuple):
    """What several rounds of prompts are made and decoded with.

    Attributes:
        decoder: Of all objects.
        prompt_encoder: The stock module, whose parameters are used.
        image_embeddings: float [N, C, h, w].
        image_pe: float [1, C, h, w], the dense positional encoding.
        boxes: float32 [M, 4], of all objects, in pixels of the model frame.
    """

    decoder: BoxDecoder
    prompt_encoder: PromptEncoder
    image_embeddings: Tensor
    image_pe: Tensor
    boxes: Tensor


class LossRounds(Protocol):
    """Several rounds of prompts, of which the loss is a mean; see `training.rounds`."""

    def sum_losses(
        self,
        inputs: RoundInputs,
        *,
        loss: ChunkLoss,
        loss_inputs: LossInputs,
        gradient: Tensor,
    ) -> tuple[Tensor, Tensors]:
        """As `BoxDecoder.sum_losses`."""
        ...


@dataclass(frozen=True)
class Groups(Generic[T]):
    """The tensors that the losses depend on (or one thing for each), by what a chunk takes of them.

    Attributes:
        per_image: [N, ...] each: the row of each box's image, or the only row.
        per_box: [M, ...] each: the rows of the chunk.
        shared: The whole, the same for all images.
        parameters: Themselves: the decoder module uses them without being given them.
    """

    per_image: list[T]
    per_box: list[T]
    shared: list[T]
    parameters: list[T]

    def flatten(self) -> list[T]:
        """All of them in the order of the groups."""
        return [*self.per_image, *self.per_box, *self.shared, *self.parameters]

    def layout(self) -> "Groups[int]":
        """The place of each of them in the flat list."""
        return self.regroup(range(len(self.flatten())))

    def regroup(self, flat: Iterable[U]) -> "Groups[U]":
        """The reverse of `flatten`, for other things in the same order."""
        items = iter(flat)
        groups = (self.per_image, self.per_box, self.shared, self.parameters)
        return Groups(*([next(items) for _ in group] for group in groups))


@dataclass(frozen=True)
class ChunkedStep:
    """What `_SumOfLosses` does with a chunk of boxes.

    Attributes:
        decoder: Says which chunks there are.
        loss: See `BoxDecoder.sum_losses`.
        loss_inputs: See `BoxDecoder.sum_losses`.
        gradient: See `BoxDecoder.sum_losses`; or float32 [m], that of each box of the only chunk.
        layout: How flat arguments are grouped.
    """

    decoder: BoxDecoder
    loss: ChunkLoss
    loss_inputs: LossInputs
    gradient: Tensor
    layout: Groups[int]

    def add_chunk(
        self, sums: Groups[Tensor | None], tensors: Groups[Tensor], chunk: slice
    ) -> Tensors:
        """Returns the losses of a chunk of boxes; adds their gradients to the sums, in place."""
        leaves = self.slice_inputs(tensors, chunk)
        needed = [leaf.requires_grad for leaf in leaves.flatten()]
        with torch.enable_grad():
            values = self.forward(leaves, chunk)
        if any(needed):
            gradients = gradients_of(values[0], leaves.flatten(), needed, self.gradient)
            self.accumulate(sums, self.layout.regroup(gradients), chunk)
        return tuple(value.detach() for value in values)

    def slice_inputs(self, tensors: Groups[Tensor], chunk: slice) -> Groups[Tensor]:
        """The chunk's inputs as leaves of a graph of its own, which can be freed with it."""
        leaves = Groups(
            [self.decoder.rows_of_boxes(tensor.detach(), chunk) for tensor in tensors.per_image],
            [tensor[chunk].detach() for tensor in tensors.per_box],
            [tensor.detach() for tensor in tensors.shared],
            tensors.parameters,  # leaves already
        )
        for leaf, tensor in zip(leaves.flatten(), tensors.flatten(), strict=True):
            leaf.requires_grad_(tensor.requires_grad)
        return leaves

    def forward(self, leaves: Groups[Tensor], chunk: slice) -> Tensors:
        """The losses of a chunk of boxes; the first tensor carries the gradient."""
        per_image, shared = tuple(leaves.per_image), tuple(leaves.shared)
        decoder, prompts = self.decoder, PromptEmbeddings(*leaves.per_box)
        decoded = decoder.implementation.decode(decoder.module, per_image, shared, prompts)
        return self.loss(*decoded, **self.loss_inputs.rows(chunk)._asdict())

    def empty_sums(self, tensors: Groups[Tensor]) -> Groups[Tensor | None]:
        """Zeros where a chunk adds to a part of a tensor; None where it adds to all or nothing."""

        def zeros(tensor: Tensor) -> Tensor | None:
            if not tensor.requires_grad:
                return None
            # In float32 also where autocast made halves: many boxes are added up in one image.
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)

        return Groups(
            [zeros(tensor) for tensor in tensors.per_image],
            [zeros(tensor) for tensor in tensors.per_box],
            [None for _ in tensors.shared],
            [None for _ in tensors.parameters],
        )

    def accumulate(
        self,
        sums: Groups[Tensor | None],
        gradients: Groups[Tensor | None],
        chunk: slice,
        *,
        summed_by_image: bool = False,
    ) -> None:
        """Adds the gradients of a chunk to those of the whole tensors, in place.

        Args:
            sums: Of the whole tensors.
            gradients: Of the chunk's leaves.
            chunk: The chunk of boxes.
            summed_by_image: Whether the gradients of what is per image are so already, [N, ...].
        """
        for total, gradient in zip(sums.per_image, gradients.per_image, strict=True):
            if total is not None and gradient is not None:
                if summed_by_image:
                    total.add_(gradient)
                else:
                    self.decoder.add_of_boxes(total, gradient, chunk)
        for total, gradient in zip(sums.per_box, gradients.per_box, strict=True):
            if total is not None and gradient is not None:
                total[chunk] = gradient  # a box is in one chunk only
        _add_each(sums.shared, gradients.shared)
        _add_each(sums.parameters, gradients.parameters)


# (step, sums, tensors, chunk) to what `ChunkedStep.add_chunk` returns; None: that is to be called.
AddChunk = Callable[[ChunkedStep, Groups[Tensor | None], Groups[Tensor], slice], "Tensors | None"]


def sum_of_losses(
    step: ChunkedStep, groups: Groups[Tensor], *, add_chunk: AddChunk | None = None
) -> tuple[Tensor, Tensors]:
    """The sum of the losses over all chunks of boxes, as one function of the tensors.

    Args:
        step: What is done with a chunk.
        groups: All tensors that the losses depend on.
        add_chunk: What to do instead of `step.add_chunk`, with the same result.

    Returns:
        The sum of the first tensor that `step.add_chunk` returns, and these tensors of all boxes.
    """
    # autograd sees only tensors that are arguments themselves: a flat list.
    total, *values = _SumOfLosses.apply(step, add_chunk, *groups.flatten())
    return total, tuple(values)


def _add_each(totals: list[Tensor | None], more: list[Tensor | None]) -> None:
    """Adds tensors to totals of which some may be None; the totals become other tensors.

    Not in place, because the first total is a tensor of autograd's, which may be the gradient of
    another leaf as well.
    """
    pairs = zip(totals, more, strict=True)
    both = [(i, t, new) for i, (t, new) in enumerate(pairs) if t is not None and new is not None]
    if both:
        numbers, old, new = (list(column) for column in zip(*both, strict=True))
        # All in one call: a GPU launches as many kernels as there are types, not tensors.
        for number, total in zip(numbers, torch._foreach_add(old, new), strict=True):
            totals[number] = total
    for number, first in enumerate(more):
        totals[number] = first if totals[number] is None else totals[number]


def _scale_each(tensors: list[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """Each tensor times a scalar on the device; one call for each type, as in `_add_each`."""
    scaled = list(tensors)
    for dtype in {tensor.dtype for tensor in tensors if tensor is not None}:
        of_type = [(i, t) for i, t in enumerate(tensors) if t is not None and t.dtype == dtype]
        numbers, old = (list(column) for column in zip(*of_type, strict=True))
        for number, new in zip(numbers, torch._foreach_mul(old, factor.to(dtype)), strict=True):
            scaled[number] = new
    return scaled


class _SumOfLosses(torch.autograd.Function):
    """Sums losses over chunks of boxes, and their gradients already on the way forward."""

    @staticmethod
    def forward(ctx: Any, step: ChunkedStep, add_chunk: AddChunk | None, *flat: Tensor) -> Any:
        tensors = step.layout.regroup(flat)
        sums = step.empty_sums(tensors)
        values_of_chunks: list[Tensors] = []
        for chunk in step.decoder.chunks():
            values = add_chunk(step, sums, tensors, chunk) if add_chunk else None
            if values is None:
                values = step.add_chunk(sums, tensors, chunk)
            values_of_chunks.append(values)
        ctx.sums, ctx.gradient = sums.flatten(), step.gradient
        columns = tuple(torch.cat(column) for column in zip(*values_of_chunks, strict=True))
        ctx.mark_non_differentiable(*columns)
        return columns[0].sum(), *columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> Any:
        # Gradients are linear in that of the sum: scale from the expected one to the actual one.
        # (What was too small for float16 is lost by now: forward has to expect the right order.)
        factor, sums = gradient / ctx.gradient, ctx.sums
        if sums is None:
            raise RuntimeError("the losses of this step have been through backward before")
        ctx.sums = None  # freed, as autograd's own saved tensors are
        return None, None, *_scale_each(sums, factor)


def gradients_of(
    loss: Tensor, leaves: list[Tensor], needed: list[bool], gradient: Tensor
) -> list[Tensor | None]:
    """The gradient of each leaf, for `gradient` as that of each loss; None where not needed."""
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    weights = gradient.to(loss.dtype).expand_as(loss)
    with torch.autocast(loss.device.type, enabled=False):  # backward uses the types of forward
        gradients = iter(torch.autograd.grad(loss, wanted, weights, allow_unused=True))
    return [next(gradients) if need else None for need in needed]
