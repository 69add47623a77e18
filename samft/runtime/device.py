"""Devices: autocast type, free and peak memory, and time after all GPU work is done."""

import resource
import time

import torch


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


def free_memory_bytes(device: torch.device) -> float:
    """Bytes that new tensors can take on a GPU, PyTorch's cached blocks included; CPU: infinite."""
    if device.type != "cuda":
        return float("inf")
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def synchronized_time(device: torch.device) -> float:
    """Seconds of a monotonic clock, read after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
