"""Interleaved timing, phases, peak memory and operations: how the benchmarks measure."""

import contextlib
import functools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from samft.models.sam import PATCH_SIZE, build_sam

Span: TypeAlias = tuple[Any, str, str]  # owner of a function, its name, the phase it belongs to

AGAIN = "plain, once more"  # the A/A row
REST = "rest"
_TOP = Path(__file__).resolve().parent.parent  # where `benchmarks` can be imported
# Dense bf16, without sparsity. Source: NVIDIA's data sheets of H100 (SXM, PCIe, NVL), H200, A100.
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}


_clock = time.perf_counter


def count_core_seconds() -> None:
    """From now on, time is what this process has had cores for.

    Ratios hold on a machine where other work comes and goes, but for what that does to caches and
    memory. Of no use where other processes work for this one, as a loader's workers do.
    """
    global _clock
    _clock = time.process_time


def now(device: torch.device) -> float:
    """Seconds, after all that the device has been given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _clock()


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    warm_up: int = 1  # rounds that do not count
    memory_gib: float = 0  # a fresh process on the CPU may hold at most this; 0: do not measure


def interleave(
    steps: Mapping[str, Callable[[], Any]], *, effort: Effort, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step, in every round one after the other: A B A B."""
    for step in list(steps.values()) * effort.warm_up:
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(effort.rounds):
        for name, step in steps.items():
            start = now(device)
            step()
            seconds[name].append(now(device) - start)
    return seconds


def ratios(reference: Sequence[float], own: Sequence[float]) -> str:
    """How many times faster, round by round: median (lowest to highest)."""
    each = [one / other for one, other in zip(reference, own, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


class PhaseClock:
    """Adds up the seconds that a step spends in each phase, by wrapping functions from outside."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inside = False

    def wrap(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """The function, timed; a call from within another timed one belongs to that one."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, start = True, now(self.device)
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                spent = now(self.device) - start
                self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

        return timed

    @contextlib.contextmanager
    def watch(self, spans: Sequence[Span]) -> Iterator[None]:
        """Times the phases, and what is in none of them as `rest`."""
        with contextlib.ExitStack() as stack:
            for owner, name, phase in spans:
                timed = self.wrap(getattr(owner, name), phase)
                stack.enter_context(mock.patch.object(owner, name, timed))
            start, before = now(self.device), sum(self.seconds.values())
            yield
            spent = now(self.device) - start - (sum(self.seconds.values()) - before)
            self.seconds[REST] = self.seconds.get(REST, 0.0) + spent


# Memory.


def limit_memory(gib: float) -> None:
    """On the CPU, an allocation beyond this fails instead of driving the machine out of memory."""
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def peak_memory(device: torch.device) -> float:
    """The most that this process has held, GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Not getrusage: after fork and exec, that still holds what the parent had.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 2**20


def in_fresh_process(module: str, *words: str) -> dict[str, Any] | None:
    """The JSON object that `python -m module words` prints; None where its memory gave out."""
    command = [sys.executable, "-m", module, *words]
    run = subprocess.run(command, cwd=_TOP, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return found
    if "allocate memory" in run.stderr or "out of memory" in run.stderr:
        return None
    raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}:\n{run.stderr}")


# Operations.


@functools.cache
def model_flops(model_type: str, image_size: int) -> tuple[float, float]:
    """Of the stock modules, forward: of the encoder for an image, of the decoder for a box.

    Counted on tensors without data. Faster ways to the same numbers are measured against these.
    """
    with torch.device("meta"):
        sam = build_sam(model_type, image_size)
        grid, width = image_size // PATCH_SIZE, sam.prompt_encoder.embed_dim
        image, dense = torch.zeros(1, 3, image_size, image_size), torch.zeros(1, width, grid, grid)
        with torch.no_grad(), FlopCounterMode(display=False) as encoder:
            sam.image_encoder(image)
        with torch.no_grad(), FlopCounterMode(display=False) as decoder:
            sam.mask_decoder.predict_masks(dense, dense, torch.zeros(1, 2, width), dense)
    return float(encoder.get_total_flops()), float(decoder.get_total_flops())


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Operations a second that the device can do at most, and where that number is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [key for key in _PEAK_FLOPS if all(word in name for word in key.split())]
        if known:
            return _PEAK_FLOPS[known[0]], f"{name}, dense bf16, data sheet"
        dtype, size, rounds = torch.bfloat16, 8192, 20
    else:
        name, dtype, size, rounds = "CPU", torch.float32, 1536, 5
    one = torch.randn(size, size, device=device, dtype=dtype)
    seconds = interleave({"": lambda: one @ one}, effort=Effort(rounds), device=device)[""]
    best = 2 * size**3 / min(seconds)
    return best, f"{name}, best {str(dtype).removeprefix('torch.')} matrix product of {rounds}"


def machine(device: torch.device) -> str:
    """What this runs on, for the head of a table."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return (
        f"{place}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}, "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(head: str, rows: Sequence[str]) -> str:
    """Markdown."""
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])
