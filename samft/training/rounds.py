"""Rounds of a training step: after the first mask, one more click where the last one was wrong.

A chunk of objects does all its rounds before the next chunk begins. The gradient of a round is
taken and added up as soon as its loss is known, and nothing flows from one round into the one
before it: a click is a place, and a mask prompt is given as a number. So rounds take time, but no
memory.

Prompts are embedded within the chunk, since only then it is known where they are: what is trained
of the prompt encoder counts among the parameters of the step, like the decoder's.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samft.models.chunked_loss import (
    ChunkedStep,
    ChunkLoss,
    Groups,
    LossInputs,
    RoundInputs,
    gradients_of,
    sum_of_losses,
)
from samft.models.prompts import DenseEmbedding, Prompts
from samft.models.two_way_transformer import Tensors
from samft.training.clicks import first_clicks, next_clicks

# The corrections' share of the loss: by the number of masks it would be 7 of 8, and what a first
# prompt gets from one click or box would be trained least (docs/experiments.md).
CORRECTIONS_SHARE = 0.5
BOX_SHARE = 0.25  # of a box that is answered beside a first point


@dataclass(frozen=True)
class Rounds:
    """What the M objects of a micro-batch are prompted with, round after round.

    Attributes:
        draws: float32 [M, R + 1, 2], for the click of each round, see `clicks.next_clicks`.
        mask_prompts: Of each of the R rounds after the first, whether it has the last logits as a
            prompt, too.
        from_point: Whether the first round begins with a point in each object, not with its box.
        with_box: Whether the box alone is answered, too, in a step that begins with a point.
        multimask_loss: The first round gives three masks of each object, [m, 3, s, s], and this is
            their `ChunkLoss`; the one with the highest predicted IoU is corrected. None: one mask.
    """

    draws: Tensor
    mask_prompts: tuple[bool, ...]
    from_point: bool = False
    with_box: bool = False
    multimask_loss: ChunkLoss | None = None

    @property
    def count(self) -> int:
        """R + 1."""
        return len(self.mask_prompts) + 1

    def shares(self) -> list[float]:
        """The share of each mask in the loss: of each round, and then of the box's own."""
        corrections = self.count - 1
        of_rounds = 1 - BOX_SHARE * self.with_box
        first = of_rounds * (1 - CORRECTIONS_SHARE) if corrections else of_rounds
        others = [(of_rounds - first) / corrections] * corrections if corrections else []
        return [first, *others, *[BOX_SHARE] * self.with_box]

    def sum_losses(
        self,
        inputs: RoundInputs,
        *,
        loss: ChunkLoss,
        loss_inputs: LossInputs,
        gradient: Tensor,
    ) -> tuple[Tensor, Tensors]:
        """The losses of all objects, weighted means over the rounds; see `chunked_loss.LossRounds`.

        Returns:
            The sum of the loss over objects, and what `RoundsStep.add_chunk` returns, of all.
        """
        decoder, prompt_encoder = inputs.decoder, inputs.prompt_encoder
        # Of all rounds, with masks and without.
        per_image, shared = decoder.implementation.prepare(
            decoder.module,
            inputs.image_embeddings,
            inputs.image_pe,
            DenseEmbedding.of(prompt_encoder),
        )
        modules = (decoder.module, prompt_encoder)
        groups = Groups(
            per_image=list(per_image),
            per_box=[],
            shared=list(shared),
            parameters=[p for module in modules for p in module.parameters() if p.requires_grad],
        )
        layout = groups.layout()
        step = RoundsStep(decoder, loss, loss_inputs, gradient, layout, rounds=self, inputs=inputs)
        return sum_of_losses(step, groups)


@dataclass(frozen=True)
class RoundsStep(ChunkedStep):
    """What is done with a chunk of objects, in all its rounds.

    Attributes:
        rounds: Of all objects.
        inputs: Of all images and objects.
    """

    rounds: Rounds
    inputs: RoundInputs

    def add_chunk(
        self, sums: Groups[Tensor | None], tensors: Groups[Tensor], chunk: slice
    ) -> Tensors:
        """Adds the gradients of a chunk of objects to the sums, in place.

        Returns:
            The losses of each object, means over the rounds by their shares; then those of the
            first round, and those of the last.
        """
        leaves = self.slice_inputs(tensors, chunk)
        shares, prompts = self.rounds.shares(), self._first_prompts(chunk)
        values_of_rounds: list[Tensors] = []
        for number in range(self.rounds.count):
            three = self.rounds.multimask_loss if number == 0 else None
            values, mask_logits = self._add_prompts(
                sums, leaves, prompts, chunk, share=shares[number], loss_of_three=three
            )
            values_of_rounds.append(values)
            if number + 1 < self.rounds.count:
                prompts = self._next_prompts(prompts, mask_logits, chunk, number + 1)
        first, last = values_of_rounds[0], values_of_rounds[-1]
        if self.rounds.with_box:
            box = Prompts(boxes=self.inputs.boxes[chunk])
            values, _ = self._add_prompts(sums, leaves, box, chunk, share=shares[-1])
            values_of_rounds.append(values)
        means = tuple(
            torch.stack([share * value for share, value in zip(shares, column, strict=True)]).sum(0)
            for column in zip(*values_of_rounds, strict=True)
        )
        return (*means, *first, *last)

    def _add_prompts(
        self,
        sums: Groups[Tensor | None],
        leaves: Groups[Tensor],
        prompts: Prompts,
        chunk: slice,
        *,
        share: float,
        loss_of_three: ChunkLoss | None = None,
    ) -> tuple[Tensors, Tensor]:
        """Adds the gradients of one mask of each object; returns its losses and its logits."""
        with torch.enable_grad():
            values, mask_logits = self._decode(leaves, prompts, chunk, loss_of_three)
        flat = leaves.flatten()
        needed = [leaf.requires_grad for leaf in flat]
        if any(needed):
            gradients = gradients_of(values[0], flat, needed, self.gradient * share)
            self.accumulate(sums, self.layout.regroup(gradients), chunk)
        return tuple(value.detach() for value in values), mask_logits.detach()

    def empty_sums(self, tensors: Groups[Tensor]) -> Groups[Tensor | None]:
        """Zeros for all that is trained: the prompts of this step may not reach some of it."""
        sums = super().empty_sums(tensors)

        def zeros(tensor: Tensor) -> Tensor | None:
            return torch.zeros_like(tensor) if tensor.requires_grad else None

        return replace(
            sums,
            shared=[zeros(tensor) for tensor in tensors.shared],
            parameters=[zeros(tensor) for tensor in tensors.parameters],
        )

    def _first_prompts(self, chunk: slice) -> Prompts:
        if not self.rounds.from_point:
            return Prompts(boxes=self.inputs.boxes[chunk])
        inputs = self.loss_inputs.rows(chunk)._asdict()
        points, labels = first_clicks(self.rounds.draws[chunk, 0], **inputs)
        return Prompts(points=points[:, None], labels=labels[:, None])

    def _next_prompts(
        self, prompts: Prompts, mask_logits: Tensor, chunk: slice, number: int
    ) -> Prompts:
        inputs = self.loss_inputs.rows(chunk)._asdict()
        draws = self.rounds.draws[chunk, number]
        points, labels = next_clicks(mask_logits, draws, **inputs)
        masks = mask_logits if self.rounds.mask_prompts[number - 1] else None
        return replace(prompts.add_points(points[:, None], labels[:, None]), masks=masks)

    def _decode(
        self,
        leaves: Groups[Tensor],
        prompts: Prompts,
        chunk: slice,
        loss_of_three: ChunkLoss | None,
    ) -> tuple[Tensors, Tensor]:
        """The losses [m] of a round, and the logits [m, s, s] that the next one corrects."""
        decoder, inputs = self.decoder, self.loss_inputs.rows(chunk)._asdict()
        mask_logits, iou_predicted = decoder.implementation.decode(
            decoder.module,
            tuple(leaves.per_image),
            tuple(leaves.shared),
            prompts.embed(self.inputs.prompt_encoder),
            multimask=loss_of_three is not None,
        )
        if loss_of_three is None:
            return self.loss(mask_logits, iou_predicted, **inputs), mask_logits
        values = loss_of_three(mask_logits, iou_predicted, **inputs)
        rows = torch.arange(len(mask_logits), device=mask_logits.device)
        return values, mask_logits.detach()[rows, iou_predicted.detach().argmax(1)]
