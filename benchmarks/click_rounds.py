"""Training steps with rounds of clicks: memory and time, and the same with stock's decoder.

Embeddings are given, as with a cache. The loop over stock's modules decodes the objects of one
image at a time, as `MaskDecoder` does, and takes each round's gradient at once, as samft does;
clicks, losses and optimizer are samft's own.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import MeasureOptions, time_interleaved
from benchmarks.tables import format_speedups, markdown_table
from benchmarks.variants import LOSS_TOLERANCE, Variants, Workload, random_sam, samft_trainer
from samft.data.dataset import Batch
from samft.models.chunked_loss import ChunkLoss
from samft.models.prompted_sam import PromptedSam
from samft.models.trainable import freeze, unreached_by
from samft.runtime.device import exact_float32, freed_memory_kept
from samft.training.clicks import first_clicks, next_clicks
from samft.training.engine import Trainer
from samft.training.prompt_schedule import PromptSchedule
from samft.training.rounds import Rounds

CORRECTIONS = 7
BOXES, FIRST_ONLY = "boxes, no corrections", "mixed, no corrections"
CLICKS = f"mixed, {CORRECTIONS} corrections"
SEED_OF_TURNS = 16  # the first seven steps begin with points and boxes in turn
STOCK = f"{CLICKS}, stock decoder image by image"
# The aims: of the memory of few boxes without corrections, and of the time of the same prompts
# without corrections.
FEW_OBJECTS, MANY_OBJECTS = 16, 256
MEMORY_GROWTH, TIME_FACTOR, STOCK_FACTOR = 0.25, 7.5, 3.0


class ClickSteps:
    """Steps on one batch with given embeddings, by the names above."""

    def __init__(self, workload: Workload) -> None:
        self.workload = replace(workload, frozen=True)
        self.variants = Variants(self.workload)
        self.variants.use_random_embeddings()

    def trainer(self, prompts: PromptSchedule, *, attention: str = "fast") -> Trainer:
        """A trainer of a new model with the same weights, in float32."""
        sam = random_sam(self.workload, attention=attention)
        unreached = unreached_by(
            prompts.prompts,
            corrections=prompts.corrections,
            mask_prompt=prompts.mask_prompt,
            multimask=prompts.multimask,
        )
        freeze(sam, ["image_encoder"], unreached=unreached)
        return samft_trainer(PromptedSam(sam), amp="off", prompts=prompts)

    @cached_property
    def batch(self) -> Batch:
        """Of all images, with draws for all clicks."""
        batch = self.variants.synthetic.batch(exact=False, embeddings=self.variants.embeddings)
        generator = torch.Generator().manual_seed(2)
        draws = torch.rand(batch.num_masks, CORRECTIONS + 1, 2, generator=generator)
        return replace(batch, click_draws=draws.to(self.workload.device))

    def step(self, name: str) -> Callable[[], Any]:
        """A training step; its prompts are drawn anew each time, alike for samft and stock."""
        if name == BOXES:
            trainer = self.trainer(PromptSchedule())
            return lambda: trainer.train_step([self.batch])
        trainer = self.trainer(mixed_prompts(0 if name == FIRST_ONLY else CORRECTIONS))
        if name in (CLICKS, FIRST_ONLY):
            return lambda: trainer.train_step([self.batch])
        return lambda: stock_step(trainer, self.batch)


def mixed_prompts(corrections: int = CORRECTIONS) -> PromptSchedule:
    """The prompts of `--prompts mixed --multimask best`; their first ones do not depend on N."""
    return PromptSchedule("mixed", corrections, multimask="best", seed=SEED_OF_TURNS)


@exact_float32()
def stock_step(trainer: Trainer, batch: Batch) -> float:
    """The training step of `trainer` by a loop over images; returns the mean loss."""
    assert trainer.prompts is not None and batch.click_draws is not None
    rounds = trainer.prompts.rounds_at(
        trainer.progress.position, click_draws=batch.click_draws, loss=trainer.loss
    )
    trainer.progress.position += 1
    total = 0.0
    for image in range(len(batch.image_ids)):
        rows = torch.nonzero(batch.image_index == image)[:, 0]
        own = batch.take_objects(slice(int(rows[0]), int(rows[-1]) + 1))
        total += _image_loss(trainer, own, image, rounds, weight=1 / batch.num_masks)
    torch.nn.utils.clip_grad_norm_(trainer.parameters, trainer.clip_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return total


def _image_loss(
    trainer: Trainer, batch: Batch, image: int, rounds: Rounds, *, weight: float
) -> float:
    # Forward and backward of one image's objects, round by round; its part of the mean loss.
    sam, total, embeddings = trainer.model.sam, 0.0, batch.embeddings
    assert embeddings is not None and batch.click_draws is not None
    inputs: dict[str, Tensor] = {
        "targets": batch.targets,
        "windows": batch.windows,
        "image_index": batch.image_index,
        "input_sizes": batch.input_sizes,
    }
    boxes, masks = None if rounds.from_point else batch.boxes, None
    points: tuple[Tensor, Tensor] | None = None
    if rounds.from_point:
        click = first_clicks(batch.click_draws[:, 0], **inputs)
        points = (click.points[:, None], click.labels[:, None])

    def add(
        share: float, *, three: ChunkLoss | None = None, **prompts: Any
    ) -> tuple[float, Tensor]:
        sparse, dense = sam.prompt_encoder(**prompts)
        logits, iou = sam.mask_decoder(
            image_embeddings=embeddings[image : image + 1],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=three is not None,
        )
        best = torch.arange(len(iou)), iou.detach().argmax(1)
        losses = (
            three(logits, iou, **inputs)
            if three is not None
            else trainer.loss(logits[:, 0], iou[:, 0], **inputs)
        )
        loss = losses[0].sum() * (weight * share)
        loss.backward()
        return loss.item(), logits.detach()[best]

    shares = rounds.shares()
    for number in range(rounds.count):
        three = rounds.multimask_loss if number == 0 else None
        loss, last = add(shares[number], three=three, points=points, boxes=boxes, masks=masks)
        total += loss
        if number + 1 == rounds.count:
            break
        click = next_clicks(last, batch.click_draws[:, number + 1], **inputs)
        more = (click.points[:, None], click.labels[:, None])
        points = more if points is None else _join_points(points, more)
        masks = last[:, None] if rounds.mask_prompts[number] else None
    if rounds.with_box:
        total += add(shares[-1], points=None, boxes=batch.boxes, masks=None)[0]
    return total


def _join_points(
    points: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    return torch.cat([points[0], more[0]], 1), torch.cat([points[1], more[1]], 1)


def check_equality(steps: ClickSteps) -> float:
    """The largest relative difference of the losses of two steps, which must be small.

    Raises:
        AssertionError: It is not.
    """
    samft, stock = (steps.trainer(mixed_prompts()) for _ in range(2))
    worst = 0.0
    for _ in range(2):
        assert samft.train_step([steps.batch])
        actual, expected = samft.pop_metrics()["loss"], stock_step(stock, steps.batch)
        worst = max(worst, abs(actual - expected) / expected)
        # From the same weights: AdamW turns the rounding of a gradient of zero into a whole step.
        stock.model.load_state_dict(samft.model.state_dict())
    assert worst <= LOSS_TOLERANCE, f"the losses differ by {worst:.1e}"
    return worst


def _count_operations(step: Callable[[], Any]) -> int:
    """Floating point operations of two steps, one that begins with points and one with boxes."""
    with FlopCounterMode(display=False) as counter:
        step()
        step()
    return counter.get_total_flops()


def measure_click_rounds(
    workload: Workload,
    *,
    options: MeasureOptions,
    peak_of: Callable[[Workload, str], dict[str, float] | None],
) -> tuple[str, dict[str, Any]]:
    """Measures time, and memory in processes of their own.

    Args:
        workload: Images, and objects of each.
        options: How long.
        peak_of: The peak memory of a step, of a workload, by name.

    Returns:
        Tables, and their numbers.
    """
    steps = ClickSteps(workload)
    note = f"Equal: losses of two steps to {check_equality(steps):.1e}."
    functions = {name: steps.step(name) for name in (STOCK, CLICKS, FIRST_ONLY, BOXES)}
    # Of a trainer of its own: prompts are drawn anew in each step, and rows have to take the same.
    functions[f"{STOCK}, again"] = steps.step(STOCK)
    operations = {name: _count_operations(step) for name, step in functions.items()}
    with freed_memory_kept(workload.device):  # as `samft.train` does
        seconds = time_interleaved(functions, options=options, device=workload.device)
    rows = []
    for name, times in seconds.items():
        counted = operations[name] / operations[BOXES]
        # A mean: steps that begin with a point take longer than those that begin with a box.
        mean = statistics.fmean(times)
        ratios = (mean / statistics.fmean(seconds[base]) for base in (FIRST_ONLY, BOXES))
        cells = [f"{1e3 * mean:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
        cells.append(f"{counted:.2f}")
        rows.append(f"| {name} | {' | '.join(cells)} | {format_speedups(seconds[STOCK], times)} |")
    head = (
        f"| cached step, {workload.num_images} x {workload.boxes} objects, {workload.model_type}, "
        f"{workload.image_size} px | ms | of mixed without corrections, aim {TIME_FACTOR} "
        f"| of boxes | operations, of boxes | faster than stock, aim {STOCK_FACTOR} |"
    )
    texts = [note, markdown_table(head, rows)]
    figures: dict[str, Any] = {"seconds": seconds, "operations": operations}
    if options.memory_gib:
        one_image = replace(workload, num_images=1)
        few = peak_of(replace(one_image, boxes=FEW_OBJECTS), BOXES)
        many = peak_of(replace(one_image, boxes=MANY_OBJECTS), CLICKS)
        growth = f"{many['peak'] / few['peak'] - 1:+.0%}" if few and many else "out of memory"
        cells = [f"{peak['peak']:.2f}" if peak else "" for peak in (few, many)]
        memory_head = (
            f"| peak GiB, {FEW_OBJECTS} objects, no corrections | {MANY_OBJECTS} objects, "
            f"{CORRECTIONS} corrections | growth, aim at most {MEMORY_GROWTH:.0%} |"
        )
        texts.append(markdown_table(memory_head, [f"| {' | '.join([*cells, growth])} |"]))
        figures["memory"] = {"few": few, "many": many}
    return "\n\n".join(texts), figures
