"""What a device has and can do: precision, free and peak memory, a clock that waits for it."""

import resource
import time

import torch


def pick_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The type to autocast to; None for float32. `auto`: bf16 on GPUs that have it, else off."""
    if amp == "auto":
        good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if good else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on the GPU, or resident on the CPU; in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def free_memory_bytes(device: torch.device) -> float:
    """Bytes that new tensors could take on a device; no end of them on a CPU."""
    if device.type != "cuda":
        return float("inf")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def synchronized_time(device: torch.device) -> float:
    """Seconds, after all that the device has been given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
