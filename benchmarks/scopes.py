"""What `benchmarks.train_step` measures: whole steps, decoder, encoder, memory of many boxes."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from benchmarks.measure import (
    AGAIN,
    REST,
    Effort,
    PhaseClock,
    in_fresh_process,
    interleave,
    limit_memory,
    model_flops,
    peak_memory,
    ratios,
    table,
)
from benchmarks.variants import (
    CACHED,
    CACHED_EXACT,
    PLAIN,
    PLAIN_AMP,
    SAMFT,
    SAMFT_EXACT,
    Setting,
    Variants,
    assert_equal,
)

PHASES = ("data", "encoder", "decoder + loss", "backward", "optimizer", REST)
# GiB by dress; None where the memory gave out.
Memory: TypeAlias = dict[str, dict[str, float] | None]

ENCODER_TOLERANCE = 1e-5
MEMORY_GROWTH = 0.25  # of a step with 256 boxes over one with 16, at most
_FEW_BOXES, _MANY_BOXES = 16, 256


@dataclass(frozen=True)
class Result:
    """What a scope found: for people, and for programs."""

    text: str
    figures: dict[str, Any]


def dresses_of(setting: Setting, modes: Sequence[str]) -> list[str]:
    """What is worn: in float32, `plain+amp` is of no use where it is not faster."""
    names = [PLAIN, *([PLAIN_AMP] if setting.device.type == "cuda" else [])]
    if ("frozen" if setting.frozen else "full") in modes:
        names += [SAMFT, SAMFT_EXACT]
    if setting.frozen and "cached" in modes:
        names += [CACHED, CACHED_EXACT]
    return names


# Whole steps.


def measure_steps(
    setting: Setting, names: Sequence[str], *, effort: Effort, peak: tuple[float, str]
) -> Result:
    """Steps with the batch on the device: times and phases interleaved, memory apart."""
    wardrobe = Variants(setting)
    starts = {"images": SAMFT in names, "cached": CACHED in names}
    notes = [_equality(wardrobe, start=start) for start, used in starts.items() if used]
    for name in names:
        make_ready(wardrobe, name)
    steps = {name: wardrobe.step(name) for name in [*names]}
    seconds, phases = time_phases(
        {**steps, AGAIN: steps[PLAIN]},
        spans={**{name: wardrobe.spans(name) for name in names}, AGAIN: wardrobe.spans(PLAIN)},
        effort=effort,
        device=setting.device,
    )
    memory = _memory(setting, names, scope="step", effort=effort)
    utilisation = {
        name: _step_flops(setting, name) / statistics.median(own) / peak[0]
        for name, own in seconds.items()
    }
    mode = "frozen" if setting.frozen else "full"
    head = (
        f"| {mode}, {setting.model_type}, {setting.image_size} px | s/step | images/s | masks/s "
        "| faster than plain | utilisation | peak GiB | of plain's |"
    )
    rows = []
    for name, own in seconds.items():
        median = statistics.median(own)
        cells = [f"{median:.3f}", *_rates(setting, median), ratios(seconds[PLAIN], own)]
        cells += [f"{100 * utilisation[name]:.1f} %", *_memory_cells(memory, name)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    texts = ["\n".join(notes), table(head, rows), phase_table(phases)]
    figures = {"seconds": seconds, "phases": phases, "memory": memory, "utilisation": utilisation}
    return Result("\n\n".join(texts), {"mode": mode, **figures})


def _equality(wardrobe: Variants, *, start: str) -> str:
    loss, gradient = assert_equal(wardrobe, start=start)
    return f"Equal ({start}): weights exactly, loss to {loss:.1e}, gradients to {gradient:.1e}."


def _rates(setting: Setting, seconds: float) -> list[str]:
    return [f"{count / seconds:.3g}" for count in (setting.num_images, setting.num_masks)]


def _step_flops(setting: Setting, name: str) -> float:
    # Backward is counted as twice the forward, where there is one.
    encoder, decoder = model_flops(setting.model_type, setting.image_size)
    passes = 0 if name.startswith(CACHED) else 1 if setting.frozen else 3
    return setting.num_images * passes * encoder + setting.num_masks * 3 * decoder


def make_ready(wardrobe: Variants, name: str) -> None:
    """Gives the optimizer its state, which it would otherwise make in the first step."""
    if name == PLAIN_AMP:  # has that of the plain recipe
        return
    trainer = wardrobe.plain if name == PLAIN else wardrobe.samft
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


def time_phases(
    steps: Mapping[str, Callable[[], Any]],
    *,
    spans: Mapping[str, Sequence[Any]],
    effort: Effort,
    device: torch.device,
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds of each step by round, and mean seconds of its phases.

    On the CPU these are of the same steps. A GPU has to be waited for after each phase, so there
    the phases are of as many further steps.
    """
    clocks = {name: PhaseClock(device) for name in steps}

    def watched(name: str) -> None:
        with clocks[name].watch(spans[name]):
            steps[name]()

    for step in list(steps.values()) * effort.warm_up:
        step()
    effort = replace(effort, warm_up=0)
    with_phases = {name: partial(watched, name) for name in steps}
    seconds = interleave(with_phases, effort=effort, device=device)
    if device.type == "cuda":
        seconds = interleave(steps, effort=effort, device=device)
    phases = {
        name: {phase: spent / effort.rounds for phase, spent in clock.seconds.items()}
        for name, clock in clocks.items()
    }
    return seconds, phases


def phase_table(phases: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: where the time of a step goes, and which share of it is neither of them."""
    used = [phase for phase in PHASES if any(phase in own for own in phases.values())]
    head = f"| ms a step | {' | '.join(used)} | rest, share |"
    rows = []
    for name, own in phases.items():
        share = own[REST] / sum(own.values())
        cells = [f"{1e3 * own[phase]:.1f}" if phase in own else "-" for phase in used]
        rows.append(f"| {name} | {' | '.join(cells)} | {100 * share:.2f} % |")
    return table(head, rows)


# Memory, each in a process of its own.


def _memory(setting: Setting, names: Iterable[str], *, scope: str, effort: Effort) -> Memory:
    if not effort.memory_gib:
        return {}
    words = ["--model_type", setting.model_type, "--image_size", str(setting.image_size)]
    words += ["--images", str(setting.num_images), "--boxes", str(setting.boxes)]
    words += ["--device", setting.device.type, "--modes", "frozen" if setting.frozen else "full"]
    words += ["--scopes", scope, "--memory_gib", str(effort.memory_gib)]
    words += ["--threads", str(torch.get_num_threads()), "--peak_of"]
    return {name: in_fresh_process("benchmarks.train_step", *words, name) for name in names}


def measure_peak(setting: Setting, name: str, *, scope: str, memory_gib: float) -> dict[str, float]:
    """GiB held at most until the step begins, and in all; runs in a fresh process."""
    if setting.device.type == "cpu":
        limit_memory(memory_gib)
    wardrobe = Variants(setting)
    if scope == "decoder" or name.startswith(CACHED):
        # Encoding would be the peak.
        wardrobe.draw_embeddings()
        wardrobe.samft.model.sam.image_encoder.cpu()
    step = wardrobe.decoder_step(name) if scope == "decoder" else wardrobe.step(name)
    if scope == "step":
        make_ready(wardrobe, name)
    before = peak_memory(setting.device)
    step()
    return {"before": before, "peak": peak_memory(setting.device)}


def _memory_cells(memory: Memory, name: str) -> list[str]:
    if name not in memory:
        return ["", ""]
    own, plain = memory[name], memory[PLAIN]
    if own is None:
        return ["gave out", ""]
    share = f"{own['peak'] / plain['peak']:.2f}" if plain else ""
    return [f"{own['peak']:.2f}", share]


# Parts of a step.


def measure_decoder(setting: Setting, *, effort: Effort) -> Result:
    """Decoder and loss, forward and backward, from embeddings: all images against one by one."""
    wardrobe = Variants(replace(setting, frozen=True))
    wardrobe.draw_embeddings()
    note = _equality(wardrobe, start="embeddings")
    steps = {name: wardrobe.decoder_step(name) for name in (PLAIN, SAMFT, SAMFT_EXACT)}
    steps[AGAIN] = steps[PLAIN]
    seconds = interleave(steps, effort=effort, device=setting.device)
    names = (PLAIN, SAMFT, SAMFT_EXACT)
    memory = _memory(wardrobe.setting, names, scope="decoder", effort=effort)
    head = (
        f"| decoder + loss, {setting.num_images} x {setting.boxes} boxes, {setting.image_size} px "
        "| ms | faster than plain | peak GiB | of plain's |"
    )
    rows = []
    for name, own in seconds.items():
        cells = [f"{1e3 * statistics.median(own):.0f}", ratios(seconds[PLAIN], own)]
        rows.append(f"| {name} | {' | '.join([*cells, *_memory_cells(memory, name)])} |")
    text = f"{note}\n\n{table(head, rows)}"
    return Result(text, {"seconds": seconds, "memory": memory})


def measure_encoder(setting: Setting, *, effort: Effort) -> Result:
    """The encoder's forward pass alone, its output held equal to stock."""
    wardrobe = Variants(replace(setting, frozen=True))
    batch, samples = wardrobe.scene.batch(exact=False), wardrobe.samples
    model = wardrobe.samft.model

    @torch.no_grad()
    def plain() -> torch.Tensor:
        return wardrobe.plain.encode(torch.stack([sample.image for sample in samples]))

    @torch.no_grad()
    def own() -> torch.Tensor:
        return model.embed(batch.images, batch.input_sizes)

    expected = plain()
    off = ((own() - expected).norm() / expected.norm()).item()
    assert off <= ENCODER_TOLERANCE, f"the embeddings differ by {off:.1e}"
    steps = {PLAIN: plain, SAMFT: own, AGAIN: plain}
    seconds = interleave(steps, effort=effort, device=setting.device)
    head = f"| encoder forward, {setting.image_size} px | ms | faster than plain |"
    rows = [
        f"| {name} | {1e3 * statistics.median(times):.0f} | {ratios(seconds[PLAIN], times)} |"
        for name, times in seconds.items()
    ]
    text = f"Equal: embeddings to {off:.1e}.\n\n{table(head, rows)}"
    return Result(text, {"seconds": seconds, "difference": off, "image_size": setting.image_size})


def measure_boxes(setting: Setting, *, effort: Effort) -> Result:
    """Memory of a step with few and with many boxes on one image."""
    found = []
    for boxes in (_FEW_BOXES, _MANY_BOXES):
        own = replace(setting, num_images=1, boxes=boxes, frozen=True)
        found.append(_memory(own, (SAMFT, SAMFT_EXACT), scope="step", effort=effort))
    rows = []
    for name in found[0]:
        few, many = (memory[name] for memory in found)
        cells = [f"{peak['peak']:.2f}" if peak else "gave out" for peak in (few, many)]
        growth = f"{many['peak'] / few['peak'] - 1:+.0%}" if few and many else ""
        rows.append(f"| {name} | {' | '.join(cells)} | {growth} |")
    head = (
        f"| peak GiB, frozen, {setting.image_size} px | {_FEW_BOXES} boxes | {_MANY_BOXES} boxes "
        f"| growth, aim {MEMORY_GROWTH:.0%} |"
    )
    return Result(table(head, rows), {"memory": found})
