"""How the benchmarks measure: interleaved timing, phases of a step, peak memory and FLOPs."""

import contextlib
import functools
import json
import platform
import resource
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
from samft.runtime.device import synchronized_time

PhaseSpan: TypeAlias = tuple[Any, str, str]  # owner of a function, its name, its phase

AGAIN = "baseline, again"  # the A/A row: how much of a speedup is noise
REST = "rest"
_REPOSITORY = Path(__file__).resolve().parent.parent  # where `benchmarks` can be imported
# Dense bf16, without sparsity. Source: NVIDIA's data sheets of H100 (SXM, PCIe, NVL), H200, A100.
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}

_clock: Callable[[torch.device], float] = synchronized_time


def count_core_seconds() -> None:
    """Makes `now` count the CPU seconds of this process instead of wall-clock seconds.

    On a machine with other load, speedups stay valid except for effects on caches and memory. Not
    for work that is done by a GPU or by other processes, such as loader workers.
    """
    global _clock
    _clock = _process_seconds


def _process_seconds(device: torch.device) -> float:
    return time.process_time()


def now(device: torch.device) -> float:
    """Seconds, once the device has finished its queued work."""
    return _clock(device)


@dataclass(frozen=True)
class MeasureOptions:
    """How long to measure, and whether memory too."""

    rounds: int
    warm_up: int = 1  # rounds before the timed ones
    memory_gib: float = 0  # limit of a process whose peak is measured; 0: do not measure memory


def time_interleaved(
    steps: Mapping[str, Callable[[], Any]], *, options: MeasureOptions, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step by round; every round takes each step once: A B A B."""
    for step in list(steps.values()) * options.warm_up:
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = now(device)
            step()
            seconds[name].append(now(device) - start)
    return seconds


class PhaseClock:
    """Adds up the seconds that a step spends in each phase, by wrapping functions from outside.

    Attributes:
        seconds: By phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._in_phase = False

    def wrap_function(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Returns a timed function; a call inside another timed one counts for the outer phase."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._in_phase:
                return function(*args, **kwargs)
            self._in_phase, start = True, now(self.device)
            try:
                return function(*args, **kwargs)
            finally:
                self._in_phase = False
                spent = now(self.device) - start
                self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

        return timed

    @contextlib.contextmanager
    def watch(self, spans: Sequence[PhaseSpan]) -> Iterator[None]:
        """Times the phases while the block runs, and the time outside of all phases as `rest`."""
        with contextlib.ExitStack() as stack:
            for owner, name, phase in spans:
                timed = self.wrap_function(getattr(owner, name), phase)
                stack.enter_context(mock.patch.object(owner, name, timed))
            start, before = now(self.device), sum(self.seconds.values())
            yield
            spent = now(self.device) - start - (sum(self.seconds.values()) - before)
            self.seconds[REST] = self.seconds.get(REST, 0.0) + spent


# Memory.


def limit_memory(gib: float) -> None:
    """Makes larger CPU allocations of this process fail, so that the machine keeps its memory."""
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def process_peak_gib(device: torch.device) -> float:
    """Most memory that this process held, GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Not getrusage as in `peak_memory_gib`: after fork and exec, it includes the parent's peak.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 2**20


def run_in_fresh_process(module: str, *arguments: str) -> dict[str, Any] | None:
    """The JSON object that `python -m module arguments` prints; None if it ran out of memory."""
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return result
    if "allocate memory" in run.stderr or "out of memory" in run.stderr:
        return None
    raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}:\n{run.stderr}")


# FLOPs.


@functools.cache
def model_flops(model_type: str, image_size: int) -> tuple[float, float]:
    """Forward FLOPs of the stock modules: of the encoder per image, of the decoder per box.

    Counted on the meta device. The utilisation of faster implementations refers to these too.
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
    """Peak FLOP/s of the device, and the source of that number."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [key for key in _PEAK_FLOPS if all(part in name for part in key.split())]
        if known:
            return _PEAK_FLOPS[known[0]], f"{name}, dense bf16, data sheet"
        dtype, size, rounds = torch.bfloat16, 8192, 20
    else:
        name, dtype, size, rounds = "CPU", torch.float32, 1536, 5
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    seconds = time_interleaved(
        {"": lambda: matrix @ matrix}, options=MeasureOptions(rounds), device=device
    )[""]
    best = 2 * size**3 / min(seconds)
    return best, f"{name}, best {str(dtype).removeprefix('torch.')} matrix product of {rounds}"


def describe_machine(device: torch.device) -> str:
    """Device, threads, versions and date, for the head of a table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return (
        f"{name}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}, "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
