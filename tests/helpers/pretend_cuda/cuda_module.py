"""`torch.cuda` for pretended GPUs: their number, properties, memory, streams and events."""

import os
from typing import Any

import torch

from helpers.pretend_cuda import graphs, streams

NUM_DEVICES = int(os.environ.get("PRETEND_CUDA_DEVICES", "1"))
_TOTAL_MEMORY = int(float(os.environ.get("PRETEND_CUDA_GIB", "80")) * 2**30)
_IN_USE = 2**30  # bytes; memory is not measured
_current_index = 0


class DeviceProperties:
    """Of an H100, as far as samft and PyTorch look at them."""

    name = "Pretended H100 80GB HBM3"
    major, minor = 9, 0
    total_memory = _TOTAL_MEMORY
    multi_processor_count = 132


class _UseDevice:
    # `torch.cuda.device`, of which there is one for each process.
    def __init__(self, device: Any) -> None:
        self.idx = device

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


def set_device(device: Any) -> None:
    """Makes a GPU the current one of this process.

    Raises:
        RuntimeError: There is none of this number.
    """
    global _current_index
    index = device if isinstance(device, int) else torch.device(device).index
    if index is not None and not 0 <= index < NUM_DEVICES:
        raise RuntimeError("CUDA error: invalid device ordinal")
    if index is not None:
        _current_index = index


def pretend_cuda_module() -> None:
    """Replaces what `torch.cuda` asks the driver for."""
    cuda = torch.cuda
    cuda.is_available = lambda: NUM_DEVICES > 0
    cuda.device_count = lambda: NUM_DEVICES
    cuda.current_device = lambda: _current_index
    cuda.set_device = set_device
    cuda.device = _UseDevice
    cuda.init = cuda._lazy_init = lambda: None
    cuda.is_initialized = lambda: True
    cuda._is_in_bad_fork = lambda: False
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.get_device_name = lambda device=None: DeviceProperties.name
    cuda.get_device_properties = lambda device=None: DeviceProperties
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.Stream, cuda.Event = streams.Stream, streams.Event
    cuda.stream, cuda.current_stream = streams.use_stream, streams.current_stream
    cuda.default_stream = streams.default_stream
    cuda.synchronize = lambda device=None: streams.wait_for_device("torch.cuda.synchronize")
    cuda.mem_get_info = lambda device=None: (_TOTAL_MEMORY - _IN_USE, _TOTAL_MEMORY)
    for name in ("allocated", "reserved"):
        setattr(cuda, f"memory_{name}", lambda device=None: _IN_USE)
        setattr(cuda, f"max_memory_{name}", lambda device=None: _IN_USE)
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.CUDAGraph, cuda.graph = graphs.CudaGraph, graphs.CaptureGraph
    cuda.graph_pool_handle = graphs.new_pool
    torch.version.cuda = "13.0"
    torch.backends.cuda.is_built = lambda: True
    torch.accelerator.is_available = lambda: NUM_DEVICES > 0
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
