"""The benchmarks of `benchmarks.train_step`: steps, decoder, encoder, memory of many boxes."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from benchmarks.click_rounds import ClickSteps, measure_click_rounds
from benchmarks.measure import (
    AGAIN,
    REST,
    MeasureOptions,
    PhaseClock,
    limit_memory,
    model_flops,
    process_peak_gib,
    run_in_fresh_process,
    time_interleaved,
)
from benchmarks.tables import format_speedups, markdown_table
from benchmarks.variants import (
    BASELINE,
    BASELINE_AMP,
    CACHED,
    CACHED_EXACT,
    SAMFT,
    SAMFT_EXACT,
    Variants,
    Workload,
    assert_equal,
)
from samft.runtime.device import exact_float32

PHASES = ("data", "encoder", "decoder + loss", "backward", "optimizer", REST)
# GiB by variant; None if the process ran out of memory.
PeakMemory: TypeAlias = dict[str, dict[str, float] | None]

ENCODER_TOLERANCE = 1e-5
MEMORY_GROWTH = 0.25  # the aim: at most this for a step with 256 boxes over one with 16
_FEW_BOXES, _MANY_BOXES = 16, 256


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of a benchmark, as a table to print and as numbers for a JSON file."""

    text: str
    figures: dict[str, Any]


def choose_variants(workload: Workload, modes: Sequence[str]) -> list[str]:
    """The variants to measure; the baseline with autocast only on a GPU, where it is faster."""
    names = [BASELINE, *([BASELINE_AMP] if workload.device.type == "cuda" else [])]
    if ("frozen" if workload.frozen else "full") in modes:
        names += [SAMFT, SAMFT_EXACT]
    if workload.frozen and "cached" in modes:
        names += [CACHED, CACHED_EXACT]
    return names


# Whole steps.


def measure_steps(
    workload: Workload, names: Sequence[str], *, options: MeasureOptions, peak: tuple[float, str]
) -> BenchmarkResult:
    """Measures steps with the batch on the device; peak memory in processes of their own."""
    variants = Variants(workload)
    starts = {"images": SAMFT in names, "cached": CACHED in names}
    notes = [_check_equality(variants, start=start) for start, used in starts.items() if used]
    for name in names:
        init_optimizer_state(variants, name)
    steps = {name: variants.step(name) for name in names}
    seconds, phases = time_phases(
        {**steps, AGAIN: steps[BASELINE]},
        spans={**{name: variants.spans(name) for name in names}, AGAIN: variants.spans(BASELINE)},
        options=options,
        device=workload.device,
    )
    memory = _measure_memory(workload, names, benchmark="step", options=options)
    utilisation = {
        name: _step_flops(workload, name) / statistics.median(times) / peak[0]
        for name, times in seconds.items()
    }
    mode = "frozen" if workload.frozen else "full"
    head = (
        f"| {mode}, {workload.model_type}, {workload.image_size} px | s/step | images/s | masks/s "
        "| faster than baseline | utilisation | peak GiB | of baseline's |"
    )
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        cells = [
            f"{median:.3f}",
            *_rates(workload, median),
            format_speedups(seconds[BASELINE], times),
        ]
        cells += [f"{100 * utilisation[name]:.1f} %", *_memory_cells(memory, name)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    texts = ["\n".join(notes), markdown_table(head, rows), phase_table(phases)]
    figures = {"seconds": seconds, "phases": phases, "memory": memory, "utilisation": utilisation}
    return BenchmarkResult("\n\n".join(texts), {"mode": mode, **figures})


def _check_equality(variants: Variants, *, start: str) -> str:
    notes = []
    for exact, name in ((True, "exact loss"), (False, "default loss")):
        loss, gradient = assert_equal(variants, start=start, exact=exact)
        notes.append(f"{name} to {loss:.1e}, its gradients to {gradient:.1e}")
    return f"Equal ({start}): weights exactly, {', '.join(notes)}."


def _rates(workload: Workload, seconds: float) -> list[str]:
    return [f"{count / seconds:.3g}" for count in (workload.num_images, workload.num_masks)]


def _step_flops(workload: Workload, name: str) -> float:
    # A backward pass counts as two forward passes.
    encoder, decoder = model_flops(workload.model_type, workload.image_size)
    passes = 0 if name.startswith(CACHED) else 1 if workload.frozen else 3
    return workload.num_images * passes * encoder + workload.num_masks * 3 * decoder


def init_optimizer_state(variants: Variants, name: str) -> None:
    """Allocates the optimizer's state, which would otherwise slow down the first step."""
    if name == BASELINE_AMP:  # shares the baseline's optimizer
        return
    trainer = variants.baseline if name == BASELINE else variants.samft
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


def time_phases(
    steps: Mapping[str, Callable[[], Any]],
    *,
    spans: Mapping[str, Sequence[Any]],
    options: MeasureOptions,
    device: torch.device,
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds of each step by round, and mean seconds of its phases.

    On the CPU both are measured on the same steps. On a GPU, measuring phases synchronizes after
    each of them and slows the step down, so the steps are timed again without phases.
    """
    clocks = {name: PhaseClock(device) for name in steps}

    def step_with_phases(name: str) -> None:
        with clocks[name].watch(spans[name]):
            steps[name]()

    for step in list(steps.values()) * options.warm_up:
        step()
    options = replace(options, warm_up=0)
    with_phases = {name: partial(step_with_phases, name) for name in steps}
    seconds = time_interleaved(with_phases, options=options, device=device)
    if device.type == "cuda":
        seconds = time_interleaved(steps, options=options, device=device)
    phases = {
        name: {phase: spent / options.rounds for phase, spent in clock.seconds.items()}
        for name, clock in clocks.items()
    }
    return seconds, phases


def phase_table(phases: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table: ms of each phase of a step, and the share outside of all phases."""
    used = [phase for phase in PHASES if any(phase in spent for spent in phases.values())]
    head = f"| ms a step | {' | '.join(used)} | rest, share |"
    rows = []
    for name, spent in phases.items():
        share = spent[REST] / sum(spent.values())
        cells = [f"{1e3 * spent[phase]:.1f}" if phase in spent else "-" for phase in used]
        rows.append(f"| {name} | {' | '.join(cells)} | {100 * share:.2f} % |")
    return markdown_table(head, rows)


# Peak memory, each in a process of its own.


def _measure_memory(
    workload: Workload, names: Iterable[str], *, benchmark: str, options: MeasureOptions
) -> PeakMemory:
    if not options.memory_gib:
        return {}
    flags = ["--model_type", workload.model_type, "--image_size", str(workload.image_size)]
    flags += ["--images", str(workload.num_images), "--boxes", str(workload.boxes)]
    flags += ["--device", workload.device.type, "--modes", "frozen" if workload.frozen else "full"]
    flags += ["--benchmarks", benchmark, "--memory_gib", str(options.memory_gib)]
    flags += ["--threads", str(torch.get_num_threads()), "--peak_of"]
    return {name: run_in_fresh_process("benchmarks.train_step", *flags, name) for name in names}


def measure_peak(
    workload: Workload, name: str, *, benchmark: str, memory_gib: float
) -> dict[str, float]:
    """Peak GiB before the step and with it; must run in a fresh process."""
    if workload.device.type == "cpu":
        limit_memory(memory_gib)
    if benchmark == "clicks":
        step = ClickSteps(workload).step(name)
        before = process_peak_gib(workload.device)
        step()
        return {"before": before, "peak": process_peak_gib(workload.device)}
    variants = Variants(workload)
    if benchmark == "decoder" or name.startswith(CACHED):
        # Encoding the embeddings would be the peak.
        variants.use_random_embeddings()
        variants.samft.model.sam.image_encoder.cpu()
    step = variants.decoder_step(name) if benchmark == "decoder" else variants.step(name)
    if benchmark == "step":
        init_optimizer_state(variants, name)
    before = process_peak_gib(workload.device)
    step()
    return {"before": before, "peak": process_peak_gib(workload.device)}


def _memory_cells(memory: PeakMemory, name: str) -> list[str]:
    if name not in memory:
        return ["", ""]
    peaks, baseline = memory[name], memory[BASELINE]
    if peaks is None:
        return ["out of memory", ""]
    share = f"{peaks['peak'] / baseline['peak']:.2f}" if baseline else ""
    return [f"{peaks['peak']:.2f}", share]


# Parts of a step.


def measure_decoder(workload: Workload, *, options: MeasureOptions) -> BenchmarkResult:
    """Forward and backward of decoder and loss: all images in one call, and one by one."""
    variants = Variants(replace(workload, frozen=True))
    variants.use_random_embeddings()
    note = _check_equality(variants, start="embeddings")
    steps = {name: variants.decoder_step(name) for name in (BASELINE, SAMFT, SAMFT_EXACT)}
    steps[AGAIN] = steps[BASELINE]
    seconds = time_interleaved(steps, options=options, device=workload.device)
    names = (BASELINE, SAMFT, SAMFT_EXACT)
    memory = _measure_memory(variants.workload, names, benchmark="decoder", options=options)
    head = (
        f"| decoder + loss, {workload.num_images} x {workload.boxes} boxes, "
        f"{workload.image_size} px | ms | faster than baseline | peak GiB | of baseline's |"
    )
    rows = []
    for name, times in seconds.items():
        cells = [f"{1e3 * statistics.median(times):.0f}", format_speedups(seconds[BASELINE], times)]
        rows.append(f"| {name} | {' | '.join([*cells, *_memory_cells(memory, name)])} |")
    text = f"{note}\n\n{markdown_table(head, rows)}"
    return BenchmarkResult(text, {"seconds": seconds, "memory": memory})


def measure_encoder(workload: Workload, *, options: MeasureOptions) -> BenchmarkResult:
    """The encoder's forward pass, after a check that its output equals the stock encoder's."""
    variants = Variants(replace(workload, frozen=True))
    batch, samples = variants.synthetic.batch(exact=False), variants.samples
    model = variants.samft.model

    @torch.no_grad()
    def encode_stock() -> torch.Tensor:
        return variants.baseline.encode(torch.stack([sample.image for sample in samples]))

    @torch.no_grad()
    def encode_fast() -> torch.Tensor:
        return model.embed(batch.images, batch.input_sizes)

    with exact_float32():
        expected = encode_stock()
        difference = ((encode_fast() - expected).norm() / expected.norm()).item()
    assert difference <= ENCODER_TOLERANCE, f"the embeddings differ by {difference:.1e}"
    steps = {BASELINE: encode_stock, SAMFT: encode_fast, AGAIN: encode_stock}
    seconds = time_interleaved(steps, options=options, device=workload.device)
    head = f"| encoder forward, {workload.image_size} px | ms | faster than baseline |"
    rows = [
        f"| {name} | {1e3 * statistics.median(times):.0f} "
        f"| {format_speedups(seconds[BASELINE], times)} |"
        for name, times in seconds.items()
    ]
    text = f"Equal: embeddings to {difference:.1e}.\n\n{markdown_table(head, rows)}"
    return BenchmarkResult(
        text, {"seconds": seconds, "difference": difference, "image_size": workload.image_size}
    )


def measure_boxes(workload: Workload, *, options: MeasureOptions) -> BenchmarkResult:
    """Memory of a step with few and with many boxes on one image."""
    memory = []
    for boxes in (_FEW_BOXES, _MANY_BOXES):
        one_image = replace(workload, num_images=1, boxes=boxes, frozen=True)
        names = (SAMFT, SAMFT_EXACT)
        memory.append(_measure_memory(one_image, names, benchmark="step", options=options))
    rows = []
    for name in memory[0]:
        few, many = (peaks[name] for peaks in memory)
        cells = [f"{peak['peak']:.2f}" if peak else "out of memory" for peak in (few, many)]
        growth = f"{many['peak'] / few['peak'] - 1:+.0%}" if few and many else ""
        rows.append(f"| {name} | {' | '.join(cells)} | {growth} |")
    head = (
        f"| peak GiB, frozen, {workload.image_size} px | {_FEW_BOXES} boxes | {_MANY_BOXES} boxes "
        f"| growth, aim {MEMORY_GROWTH:.0%} |"
    )
    return BenchmarkResult(markdown_table(head, rows), {"memory": memory})


def measure_clicks(workload: Workload, *, options: MeasureOptions) -> BenchmarkResult:
    """Steps with rounds of corrections: time against stock's decoder, and memory."""

    def peak_of(workload: Workload, name: str) -> dict[str, float] | None:
        return _measure_memory(workload, [name], benchmark="clicks", options=options)[name]

    return BenchmarkResult(*measure_click_rounds(workload, options=options, peak_of=peak_of))
