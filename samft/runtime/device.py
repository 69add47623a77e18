"""Devices: which, or why none; autocast type, exact float32, cores, peak memory, and time."""

import contextlib
import ctypes
import os
import re
import resource
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from samft.errors import ConfigError, TrainingError, explain_out_of_memory, first_sentence
from samft.runtime.logs import LOGGER

# The buffers of cuBLAS with which its products are deterministic
_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # bytes, of this process's container
# Parameters of mallopt, and where they end up by themselves in a process with large blocks
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MALLOC_DEFAULTS = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _MMAP_MAX: 2**16}
# With one of these as its first entry, CUDA_VISIBLE_DEVICES hides all GPUs on purpose.
_HIDES_ALL = ("", "-1", "NoDevFiles")

# PyTorch's settings of how float32 is multiplied: "ieee", "tf32", "bf16", or "none", which leaves
# it to the parent ("all" of the backend, then "generic"). Parents come first.
# Source: `aten/src/ATen/Context.cpp` of PyTorch, since 2.9.
_FLOAT32_SETTINGS = (
    ("generic", "all"),
    *((backend, "all") for backend in ("cuda", "mkldnn")),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")),
)


def pick_device(device: str) -> torch.device:
    """Picks this process's device: of several GPUs, the one of its local rank.

    With `cpu` nothing of CUDA is touched, so this process makes no CUDA context.

    Args:
        device: `auto`, `cuda` or `cpu`. `auto` is the CPU where there is no NVIDIA GPU, or where
            CUDA_VISIBLE_DEVICES hides them all; ROCm's GPUs are PyTorch's `cuda`, too.

    Raises:
        ConfigError: There are GPUs that PyTorch cannot use, or fewer than processes on this host;
            or `cuda` is asked for, and there is none.
    """
    if device == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch warns of here is the error's reason
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        if reason := _explain_unusable_gpus(device):
            raise ConfigError(f"device: {reason}")
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    # Asked by all processes alike: one that left alone would be waited for by the others.
    if processes > count:
        raise ConfigError(
            f"device: {processes} processes of this host need a GPU each, and there are {count}: "
            "lower --nproc_per_node (a GPU's MIG slices count as one)."
        )
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place


def check_device(device: torch.device) -> None:
    """Computes something on a GPU, the only proof that it can be used; a CPU is not checked.

    A GPU that PyTorch has no kernels for, or that another process has reserved, is counted as any.

    Raises:
        ConfigError: It cannot be used.
        TrainingError: Other programs have left it no memory.
    """
    if device.type != "cuda":
        return
    advice = "Other programs use it, which nvidia-smi lists: end them, or choose another GPU."
    try:
        with explain_out_of_memory(lambda: f"on {device} to begin with", advice=advice):
            torch.ones(1, device=device).add_(1).item()
    except TrainingError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: {_describe_build()} cannot use {device}: {first_sentence(str(error))}. "
            "Install a PyTorch that is built for it, choose another GPU with CUDA_VISIBLE_DEVICES, "
            "or compute without one: --device cpu."
        ) from error


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Within, a GPU computes the same bits at each run: `--deterministic`.

    On the same GPUs with the same versions. An operation without a deterministic kernel raises.
    cuBLAS reads its setting once: enter this before anything is computed on a GPU.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    if not wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    workspace = os.environ.get(_CUBLAS_WORKSPACE)
    if workspace not in _DETERMINISTIC_WORKSPACES:
        os.environ[_CUBLAS_WORKSPACE] = _DETERMINISTIC_WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
        del os.environ[_CUBLAS_WORKSPACE]
        if workspace is not None:
            os.environ[_CUBLAS_WORKSPACE] = workspace


@contextlib.contextmanager
def process_settings_restored() -> Iterator[None]:
    """Restores what a run sets in its process: random state, open files, sharing, current GPU."""
    sharing, open_files = torch.multiprocessing, resource.RLIMIT_NOFILE
    strategy, limits = sharing.get_sharing_strategy(), resource.getrlimit(open_files)
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    try:
        with torch.random.fork_rng([] if gpu is None else [gpu]):
            yield
    finally:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        sharing.set_sharing_strategy(strategy)
        # Not while more files are open than were allowed before: the limit would fail any other.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(open_files, (limits[0], resource.getrlimit(open_files)[1]))


def log_hidden_gpus(device: torch.device) -> None:
    """Logs that this host's GPUs are not used because CUDA_VISIBLE_DEVICES hides them."""
    if device.type == "cpu" and _hides_all_gpus() and _has_nvidia_gpus():
        LOGGER.info("computing on the CPU: CUDA_VISIBLE_DEVICES hides the GPUs of this host")


def _explain_unusable_gpus(device: str) -> str:
    # Why PyTorch sees no GPU, and what to do; empty if the CPU is the right device.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _hides_all_gpus():
        why = f"CUDA_VISIBLE_DEVICES is '{visible}', which hides all GPUs: unset it"
    elif make := _make_of_gpus():
        driver = f" with driver {version}" if (version := _driver_version()) else ""
        check = f"Check CUDA_VISIBLE_DEVICES, which is '{visible}'. " if visible is not None else ""
        return (
            f"this host has {make} GPUs{driver}, but {_describe_build()} cannot use them: "
            f"{_reason_of_pytorch(make)}. {check}Install a PyTorch that is built for their driver, "
            "or update the driver; or compute without GPUs: --device cpu."
        )
    else:
        why = f"{_describe_build()} sees no GPU here: leave it out"
    return f"'cuda' was asked for, but {why}, or say --device cpu." if device == "cuda" else ""


def _hides_all_gpus() -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.split(",")[0].strip() in _HIDES_ALL


def _make_of_gpus() -> str:
    # Many processors have a GPU of AMD's in them, which counts only for a PyTorch that wants it.
    if torch.version.hip and any(Path("/dev").glob("kfd")):
        return "AMD"
    return "NVIDIA" if _has_nvidia_gpus() else ""


def _has_nvidia_gpus() -> bool:
    # The kernel driver's files, of which a container may have either, or the driver's own answer,
    # which is all that WSL has.
    if any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return True
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and listed.stdout.startswith("GPU ")


def _driver_version() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    version = re.search(r"Module.*?\s(\d+\.\d[\d.]*)\s", text)
    return version[1] if version else ""


def _describe_build() -> str:
    hip, cuda = torch.version.hip, torch.version.cuda
    built_for = f"AMD GPUs, ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else "CPUs"
    return f"PyTorch {torch.__version__} (built for {built_for})"


def _reason_of_pytorch(make: str) -> str:
    if (torch.version.hip if make == "AMD" else torch.version.cuda) is None:
        return "it has no code for them"
    try:
        torch.cuda.init()  # says why, as `is_available` does not
    except (RuntimeError, AssertionError) as error:
        return first_sentence(str(error))
    return "it counts none"


def pick_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to; None for float32. `auto`: bf16 on GPUs that have it, else None."""
    if amp == "auto":
        # Older GPUs emulate bf16, which is slower than float32.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far, in GiB: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextlib.contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Within, memory of tensors that are freed is kept for the next ones; on a CPU only.

    The C library gives blocks of 32 MiB and more, and what is free at the end of its heap, back to
    the system at once. A step takes the same again, and each of its pages costs a fault: with
    `vit_b` an eighth to a fifth of the time. For it the heap has gaps, some memory more where the
    number of boxes changes (docs/benchmarks.md). Other C libraries than glibc are left alone.

    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    library = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_MMAP_MAX, 0)  # no block of its own for any tensor
    library.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        for parameter, value in _MALLOC_DEFAULTS.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)


def free_memory_bytes(device: torch.device) -> float:
    """Bytes that new tensors can take on a GPU, PyTorch's cached blocks included; CPU: infinite."""
    if device.type != "cuda":
        return float("inf")
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def total_memory_bytes(device: torch.device) -> float:
    """Bytes of a GPU's memory, whoever uses it; CPU: infinite."""
    if device.type != "cuda":
        return float("inf")
    return float(torch.cuda.get_device_properties(device).total_memory)


def host_memory_gib() -> float:
    """The memory of this host, or of the container or job that this process may not exceed."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(_CGROUP_LIMIT.read_text())
    except (OSError, ValueError):  # another system, or "max": no limit
        limit = whole
    return min(whole, limit) / 2**30


def gpu_memories_gib() -> list[float]:
    """The memory of each GPU that this process may use; empty where PyTorch can use none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `samft train` says what is wrong with them
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(count)]


def synchronized_time(device: torch.device) -> float:
    """Seconds of a monotonic clock, read after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


class _ExactBlocks:
    # The blocks of `exact_float32` that are open. PyTorch's settings are the process's, not a
    # thread's, so the first block that opens sets them and the last that closes restores them.
    def __init__(self) -> None:
        self.lock, self.num_open = threading.Lock(), 0
        self.restore: Callable[[], None] = lambda: None

    def open(self) -> None:
        with self.lock:
            if not self.num_open:
                self.restore = _make_float32_exact()
            self.num_open += 1

    def close(self) -> None:
        with self.lock:
            self.num_open -= 1
            if not self.num_open:
                self.restore()


_exact_blocks = _ExactBlocks()


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Within, float32 is multiplied as float32: no TF32 (10 of 23 bits), on any device.

    By PyTorch's defaults, convolutions on GPUs are TF32, and matrix products too where the program
    asked for it, which moves single masks by .01 IoU. Autocast is left as it is. Whatever the
    program has set is restored, by older and by newer names alike. Not to be held over a `yield`:
    what runs meanwhile would get these settings.
    """
    _exact_blocks.open()
    try:
        yield
    finally:
        _exact_blocks.close()


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products within are of float32 proper: no autocast, no TF32.

    Positions go through matrix products: in bf16 or TF32, corners of boxes would move by pixels.
    """
    with exact_float32(), torch.autocast(device.type, enabled=False):
        yield


def _make_float32_exact() -> Callable[[], None]:
    # Returns what restores the settings.
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    before = {}
    for setting in _FLOAT32_SETTINGS:
        before[setting] = read(*setting)  # its own, and no parent's: those are "none" by now
        write(*setting, "none")
    # The older names of the settings remember their values beside these. Both have to agree, or
    # PyTorch raises where it reads the older ones (as its compiler does).
    matmul_precision = torch.get_float32_matmul_precision()
    try:
        convolutions_in_tf32 = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # remembered as true, which "none" contradicts
        convolutions_in_tf32 = True
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False

    def restore() -> None:
        torch.set_float32_matmul_precision(matmul_precision)
        torch.backends.cudnn.allow_tf32 = convolutions_in_tf32
        for setting, value in before.items():
            write(*setting, value)

    return restore


def usable_cores() -> int:
    """The CPU cores that this process may use: fewer than the host has in a job or a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
