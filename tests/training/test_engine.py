"""The loop: invariance to processes and accumulation, precision, bad gradients, validation."""

import copy
import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from helpers.trainers import (
    LOSS,
    NUM_CLICKS,
    SIZE,
    make_sample,
    make_trainer,
    unreadable,
    val_batches,
)
from samft.data.dataset import Batch, collate
from samft.data.samplers import EndlessBatchSampler, TrainingSampler
from samft.distributed import get_rank, get_world_size
from samft.errors import DataError, TrainingError, UserError
from samft.evaluation.validation import validate
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.models.trainable import freeze
from samft.training.engine import LOSS_NAMES, ROUND_NAMES, Progress, Trainer, train
from samft.training.prompt_schedule import PromptSchedule

NUM_IMAGES = 13


def run_steps(
    batch_size: int, accumulate_steps: int, steps: int, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Trains for some steps; the loss of each, and the weights after the last."""
    trainer = make_trainer(**options)
    sampler = TrainingSampler(range(NUM_IMAGES), batch_size=batch_size)
    losses: list[float] = []
    batches = (
        collate([make_sample(i) for _, i, _ in rows]) for rows in EndlessBatchSampler(sampler)
    )
    finished = train(
        trainer,
        batches,
        steps=steps,
        accumulate_steps=accumulate_steps,
        interval=1,
        should_stop=lambda: False,
        on_step=lambda taken, image_ids: None,
        on_interval=lambda window: losses.append(window["loss"]),
    )
    assert finished
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return losses, weights


def test_processes_and_accumulation_do_not_change_what_is_learnt(gloo2: Any) -> None:
    losses, weights = run_steps(4, 1, 10)
    others = [
        run_steps(1, 4, 10),
        gloo2.run(run_steps, 2, 1, 10)[0],
        gloo2.run(run_steps, 1, 2, 10)[0],
    ]
    assert losses[-1] != losses[0]
    for other_losses, other_weights in others:
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-5)


MIXED = PromptSchedule("mixed", NUM_CLICKS - 1, mask_prompt=0.5, multimask="best")


def test_neither_do_they_with_clicks_nor_does_the_chunk(gloo2: Any, gloo3: Any) -> None:
    losses, weights = run_steps(6, 1, 10, prompts=MIXED)
    others = [
        run_steps(2, 3, 10, prompts=MIXED, mask_chunk=3),
        gloo2.run(partial(run_steps, 3, 1, 10, prompts=MIXED))[0],
        gloo3.run(partial(run_steps, 1, 2, 10, prompts=MIXED, mask_chunk=1))[0],
    ]
    for other_losses, other_weights in others:
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-5)
    another_seed = replace(MIXED, seed=1)
    assert run_steps(6, 1, 2, prompts=another_seed)[0] != pytest.approx(losses[:2], rel=1e-5)


def test_a_run_with_clicks_goes_on_in_the_same_bits() -> None:
    losses, weights = run_steps(2, 1, 6, prompts=MIXED)
    trainer = make_trainer(prompts=MIXED)
    sampler = TrainingSampler(range(NUM_IMAGES), batch_size=2)
    keys = itertools.islice(EndlessBatchSampler(sampler), 6)
    batches = [collate([make_sample(row) for _, row, _ in rows]) for rows in keys]
    for batch in batches[:3]:
        assert trainer.train_step([batch])
    state = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))
    resumed = make_trainer(prompts=MIXED, progress=Progress(step=3, position=3))
    resumed.model.load_state_dict(state[0])
    resumed.optimizer.load_state_dict(state[1])
    for number, batch in enumerate(batches[3:], start=3):
        assert resumed.train_step([batch])
        assert resumed.pop_metrics()["loss"] == losses[number]
    for name, value in weights.items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_metrics_of_steps_with_clicks_are_means_over_rounds() -> None:
    trainer = make_trainer(prompts=PromptSchedule("point", NUM_CLICKS - 1))
    batch = collate([make_sample(2), make_sample(3)])
    rounds = trainer.prompts.rounds_at(0, click_draws=batch.click_draws, loss=LOSS)  # type: ignore[union-attr,arg-type]
    with torch.no_grad():
        _, values = trainer.model(
            batch.images,
            batch.boxes,
            batch.image_index,
            input_sizes=batch.input_sizes,
            loss=LOSS,
            targets=batch.targets,
            windows=batch.windows,
            rounds=rounds,
        )
    assert trainer.train_step([batch])
    metrics = trainer.pop_metrics()
    expected = [values[0], *values[1:5], values[9], values[14]]
    for name, column in zip((*LOSS_NAMES, *ROUND_NAMES), expected, strict=True):
        assert metrics[name] == pytest.approx(column.mean().item(), rel=1e-5), name
    assert len({metrics[name] for name in ("per_mask_iou", *ROUND_NAMES)}) == 3
    assert not set(ROUND_NAMES) & set(make_trainer().pop_metrics())


def warnings_of_a_step() -> list[str]:
    torch.set_warn_always(True)  # else once in a process, which runs many tests
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # In bf16 the gradient of a 1 x 1 convolution has the strides of channels last
            trainer = make_trainer(amp_dtype=torch.bfloat16)
            assert trainer.train_step([collate([make_sample(1)])])
    finally:
        torch.set_warn_always(False)
    return [str(warning.message) for warning in caught]


def test_gradients_have_the_strides_of_their_buckets(gloo2: Any) -> None:
    messages = [message for of_rank in gloo2.run(warnings_of_a_step) for message in of_rank]
    assert not [message for message in messages if "strides" in message]


def test_the_invariance_test_can_fail() -> None:
    losses, _ = run_steps(4, 1, 2)
    other_losses, _ = run_steps(3, 1, 2)
    assert other_losses != pytest.approx(losses, rel=1e-5)


def plant(trainer: Trainer, value: float, *, on_rank: int = 0) -> None:
    """The next backward of one rank finds this value in its gradient."""
    parameter = trainer.model.sam.mask_decoder.mask_tokens.weight
    armed = [True]

    def replace(gradient: torch.Tensor) -> torch.Tensor:
        if armed and get_rank() == on_rank:
            armed.clear()
            return torch.full_like(gradient, value)
        return gradient

    parameter.register_hook(replace)


def step_with_planted(value: float, amp: str | None) -> dict[str, Any]:
    """One step with a planted gradient on rank 1, then a clean one."""
    trainer = make_trainer(amp_dtype=getattr(torch, amp) if amp else None)
    rates: list[int] = []
    trainer.learning_rate_at = lambda step: rates.append(step) or 1e-4  # type: ignore[func-returns-value]
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    plant(trainer, value, on_rank=get_world_size() - 1)
    batch = collate([make_sample(get_rank())])
    taken = trainer.train_step([batch])
    same = all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    again = trainer.train_step([batch])
    moved = not all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    weight = trainer.model.sam.mask_decoder.mask_tokens.weight.detach().clone()
    progress = trainer.progress
    return {
        "taken": taken,
        "same": same,
        "again": again,
        "moved": moved,
        "steps": (progress.step, progress.position, progress.skipped_steps, progress.bad_steps),
        "rates": rates,
        "weight": weight,
        "finite": bool(torch.isfinite(weight).all()),
    }


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_bad_gradient_of_one_rank_skips_the_step_on_all(gloo2: Any, value: float) -> None:
    first, second = gloo2.run(step_with_planted, value, None)
    for outcome in (first, second):
        assert not outcome["taken"] and outcome["same"]
        assert outcome["again"] and outcome["moved"] and outcome["finite"]
        assert outcome["steps"] == (1, 2, 1, 0)
        assert outcome["rates"] == [0, 0]  # the schedule did not advance
    assert torch.equal(first["weight"], second["weight"])


def test_fp16_with_its_scaler_skips_and_halves_the_scale(gloo2: Any) -> None:
    for outcome in gloo2.run(step_with_planted, math.inf, "float16"):
        assert not outcome["taken"] and outcome["same"] and outcome["steps"][:3] == (1, 2, 1)


def test_bad_steps_in_a_row_end_the_run() -> None:
    trainer = make_trainer()
    batch = collate([make_sample(1), make_sample(2)])
    steps: list[tuple[bool, list[int]]] = []

    def batches() -> Iterator[Batch]:
        while True:
            plant(trainer, math.nan)
            yield batch

    with pytest.raises(TrainingError, match="not finite 4 times in a row after step 0"):
        train(
            trainer,
            batches(),
            steps=5,
            accumulate_steps=1,
            interval=10,
            max_bad_steps=3,
            should_stop=lambda: False,
            on_step=lambda taken, image_ids: steps.append((taken, image_ids)),
            on_interval=lambda window: None,
        )
    assert steps == [(False, [1, 2])] * 4  # three may be skipped


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_with_accumulation_and_clipping(amp: str) -> None:
    trainer = make_trainer(amp_dtype=getattr(torch, amp), clip_grad_norm=0.01)
    float32 = make_trainer(clip_grad_norm=0.01)
    assert trainer.scaler.is_enabled() == (amp == "float16")
    norms: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: norms.append(
            math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.parameters))
        )
    )
    batches = [collate([make_sample(i)]) for i in range(4)]
    for _ in range(3):
        assert float32.train_step(batches)
        while not trainer.train_step(batches):  # the scaler finds its scale
            assert trainer.scaler.get_scale() > 1
    assert trainer.progress.step == 3
    assert norms == pytest.approx([0.01] * 3, rel=1e-2)
    mixed, expected = trainer.pop_metrics(), float32.pop_metrics()
    assert mixed["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in trainer.parameters)


def test_window_is_a_mean_over_masks() -> None:
    trainer = make_trainer()
    batch = collate([make_sample(2), make_sample(3)])
    with torch.no_grad():
        logits, iou = trainer.model(
            batch.images, batch.boxes, batch.image_index, input_sizes=batch.input_sizes
        )
        losses = LOSS(
            logits,
            iou,
            targets=batch.targets,
            windows=batch.windows,
            image_index=batch.image_index,
            input_sizes=batch.input_sizes,
        )
    assert trainer.train_step([batch])
    window = trainer.pop_metrics()
    expected = (losses.total, losses.focal, losses.dice, losses.iou, losses.iou_actual)
    for name, values in zip(LOSS_NAMES, expected, strict=True):
        assert window[name] == pytest.approx(float(values.mean()), rel=1e-5)
    assert window["lr"] == 1e-4
    assert trainer.progress.train_images == 2
    assert trainer.metric_sums.sum() == 0


def test_the_memory_probe_counts_what_the_optimizer_will_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, batch = make_trainer(), collate([make_sample(1)])
    empty_like, sizes = torch.empty_like, []

    def record_size(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        if isinstance(tensor, torch.nn.Parameter):
            sizes.append(tensor.numel())
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", record_size)
    trainer.probe_memory(batch)
    assert sum(sizes) == 2 * sum(parameter.numel() for parameter in trainer.parameters)
    assert all(parameter.grad is None for parameter in trainer.parameters)
    assert trainer.train_step([batch])
    sizes.clear()
    trainer.probe_memory(batch)  # which has its moments now
    assert sizes == []


def test_train_stops_when_asked_and_continues_from_progress() -> None:
    trainer = make_trainer()
    batch = collate([make_sample(1)])
    calls: list[int] = []
    run = partial(
        train,
        batches=[batch] * 10,
        steps=5,
        accumulate_steps=1,
        interval=2,
        on_step=lambda taken, image_ids: None,
        on_interval=lambda window: calls.append(trainer.progress.step),
    )
    assert not run(trainer, should_stop=lambda: trainer.progress.step >= 3)
    assert trainer.progress.step == 3 and calls == [2]
    assert run(trainer, should_stop=lambda: False)
    assert calls == [2, 4, 5]


def constant_model(logit: float) -> PromptedSam:
    """A model whose mask logits are one constant, whatever the image."""
    sam = build_sam("vit_tiny", SIZE)
    freeze(sam, ["image_encoder"])
    model = PromptedSam(sam)

    def decode(embeddings: Any, boxes: torch.Tensor, index: Any) -> Any:
        logits = torch.full((len(boxes), SIZE // 4, SIZE // 4), logit)
        return logits, torch.full((len(boxes),), 0.5)

    model.decode = decode  # type: ignore[method-assign]
    return model


def validate_share(num_images: int) -> tuple[dict[str, float], float]:
    validation = validate(make_trainer().model.eval(), val_batches(num_images), loss=LOSS)
    rows = validation.objects
    assert rows.iou_actual.mean() == pytest.approx(validation.metrics["per_mask_iou"], abs=1e-12)
    samples = [make_sample(i) for i in range(num_images)]
    assert rows.image_ids.tolist() == [s.image_id for s in samples for _ in s.truths]
    assert rows.object_ids.tolist() == [id for s in samples for id in s.object_ids.tolist()]
    assert rows.areas.tolist() == [t.mask.sum() for s in samples for t in s.truths]
    return validation.metrics, validation.box_fill_iou


def test_validation_of_full_masks_has_closed_form() -> None:
    validation = validate(constant_model(5.0), val_batches(3), loss=LOSS)
    samples = [make_sample(i) for i in range(3)]
    expected = [
        truth.mask.size / (sample.original_size[0] * sample.original_size[1])
        for sample in samples
        for truth in sample.truths
    ]
    assert validation.metrics["per_mask_iou"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert validation.metrics["iou_predicted"] == 0.5
    assert validation.box_fill_iou == 1.0  # the objects are rectangles


def validate_with_gaps(with_gaps: bool) -> tuple[dict[str, float], dict[str, str]]:
    # The second rank has nothing but an image that cannot be read.
    batches = [unreadable(7)] if with_gaps else []
    batches += [] if get_rank() else [*val_batches(1), *batches]
    model = make_trainer().model.eval()
    encoded = []
    model.sam.image_encoder.register_forward_hook(lambda *_: encoded.append(1))
    validation = validate(model, batches, loss=LOSS)
    assert len(encoded) == (0 if get_rank() else 1)
    return validation.metrics, validation.bad_images


def test_validation_counts_nothing_for_an_image_that_cannot_be_read(gloo2: Any) -> None:
    gaps, whole = (gloo2.run(validate_with_gaps, with_gaps) for with_gaps in (True, False))
    assert [bad for _, bad in gaps] == [{"7.jpg": "cut short"}] * 2
    assert [bad for _, bad in whole] == [{}, {}]
    assert [metrics for metrics, _ in gaps] == [metrics for metrics, _ in whole]


def test_the_trainer_collects_the_bad_images_of_its_batches() -> None:
    trainer = make_trainer()
    for number, bad in ((1, {}), (2, {"a.jpg": "empty"}), (3, {"b.jpg": "empty"})):
        trainer.train_step([collate([replace(make_sample(number), bad_images=bad)])])
    assert trainer.bad_images == {"a.jpg": "empty", "b.jpg": "empty"}


@pytest.mark.parametrize("num_images", [1, 2, NUM_IMAGES])
def test_validation_is_the_same_on_one_two_and_three_processes(
    gloo2: Any, gloo3: Any, num_images: int
) -> None:
    alone, box_fill = validate_share(num_images)
    for pool in (gloo2, gloo3):
        for metrics, fill in pool.run(validate_share, num_images):
            assert metrics["per_mask_iou"] == pytest.approx(alone["per_mask_iou"], abs=1e-7)
            assert metrics == pytest.approx(alone, rel=1e-6)
            assert fill == pytest.approx(box_fill, abs=1e-12)


def broken_on_the_last_rank(num_good: int) -> Iterator[Batch]:
    """Good batches, then, on the last rank only, an image that cannot be read."""
    for _ in range(num_good):
        yield collate([make_sample(1)])
    if get_rank() == get_world_size() - 1:
        raise DataError("7.jpg is cut short.")
    yield collate([make_sample(1)])


def train_on_broken() -> str:
    trainer = make_trainer()
    with pytest.raises(UserError) as caught:
        train(
            trainer,
            broken_on_the_last_rank(1),
            steps=5,
            accumulate_steps=1,
            interval=10,
            should_stop=lambda: False,
            on_step=lambda taken, image_ids: None,
            on_interval=lambda window: None,
        )
    return f"{trainer.progress.step} {caught.value}"


def validate_broken() -> str:
    with pytest.raises(UserError) as caught:
        validate(make_trainer().model, broken_on_the_last_rank(1), loss=LOSS)
    return str(caught.value)


def test_a_broken_image_on_one_rank_is_an_error_on_all(gloo2: Any) -> None:
    assert gloo2.run(train_on_broken) == ["1 7.jpg is cut short."] * 2
    assert gloo2.run(validate_broken) == ["7.jpg is cut short."] * 2
    assert train_on_broken() == "1 7.jpg is cut short."


def test_progress_survives_as_plain_values() -> None:
    progress = Progress(step=3, baseline={"per_mask_iou": 0.5})
    assert Progress(**vars(progress)) == progress
