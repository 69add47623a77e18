"""Turns a process into one that has pretended GPUs."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.pretend_cuda.extension import load_library


def install(library: Path) -> None:
    """Gives this process its GPUs; before torch is imported.

    Args:
        library: The compiled devices, of `build_library`.
    """
    load_library(library)
    import torch.distributed

    from helpers.pretend_cuda import cuda_module, launches, tensors

    cuda_module.pretend_cuda_module()
    launches.allow_lists_of(tensors.PretendCudaTensor)
    # `torch.tensor(..., device="cuda")` then makes its tensor on the CPU and copies it over
    torch._C._set_only_lift_cpu_tensors(True)
    _replace(torch.nn.Module, "_apply", _swap_parameters)
    _replace(torch, "load", _load_then_copy)
    _replace(torch.distributed, "init_process_group", _use_gloo_for_nccl)
    _replace(torch.nn.functional, "scaled_dot_product_attention", _attend_in_one_kernel)
    _replace(threading.Thread, "run", _enter_mode)
    # Until the process ends: an exception while it is left would hide the first one
    tensors.PretendCudaMode().__enter__()


def count_steps() -> None:
    """Has the ledger tell steps of samft's trainer apart."""
    from helpers.pretend_cuda.ledger import LEDGER
    from samft.training.engine import Trainer

    def within_step(stock: Callable[..., Any]) -> Callable[..., Any]:
        def train_step(*args: Any, **options: Any) -> Any:
            with LEDGER.step():
                return stock(*args, **options)

        return train_step

    _replace(Trainer, "train_step", within_step)


def _replace(
    owner: Any, name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    setattr(owner, name, change(getattr(owner, name)))


def _swap_parameters(stock: Callable[..., Any]) -> Callable[..., Any]:
    # A parameter cannot be given data of another class, so `module.to("cuda")` swaps the tensors,
    # which keeps the parameter the same object, as on a GPU.
    import torch

    def apply(*args: Any, **options: Any) -> Any:
        future = torch.__future__
        before = future.get_swap_module_params_on_conversion()
        future.set_swap_module_params_on_conversion(True)
        try:
            return stock(*args, **options)
        finally:
            future.set_swap_module_params_on_conversion(before)

    return apply


def _load_then_copy(stock: Callable[..., Any]) -> Callable[..., Any]:
    # Storages are read straight onto a device, below any operator.
    import torch
    from torch.utils._pytree import tree_map

    def load(file: Any, map_location: Any = None, **options: Any) -> Any:
        is_device = isinstance(map_location, (str, torch.device))
        if not is_device or torch.device(map_location).type != "cuda":
            return stock(file, map_location=map_location, **options)
        content = stock(file, map_location="cpu", **options)
        return tree_map(
            lambda leaf: leaf.to(map_location) if isinstance(leaf, torch.Tensor) else leaf, content
        )

    return load


def _use_gloo_for_nccl(stock: Callable[..., Any]) -> Callable[..., Any]:
    def init_process_group(backend: str | None = None, *args: Any, **options: Any) -> Any:
        if backend and "nccl" in backend:
            backend = "cpu:gloo,cuda:gloo"
        return stock(backend, *args, **options)

    return init_process_group


def _attend_in_one_kernel(stock: Callable[..., Any]) -> Callable[..., Any]:
    # A CPU build takes attention on CUDA apart into products and a softmax. A GPU has it in one
    # kernel, forward and backward; so has the CPU, for values as wide as keys.
    import torch

    from helpers.pretend_cuda.ledger import LEDGER

    def attend(
        query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **options: Any
    ) -> Any:
        if not query.is_cuda:
            return stock(query, key, value, attn_mask, *args, **options)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        with_gradient = torch.is_grad_enabled() and query.requires_grad
        LEDGER.attention(
            f"{query.dtype} query {tuple(query.shape)} key {tuple(key.shape)} value "
            f"{tuple(value.shape)} mask {attn_mask is not None} gradient {with_gradient}"
        )
        is_plain = not args and set(options) <= {"scale"} and attn_mask is None
        if is_plain and key.shape == value.shape:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(query, key, value, **options)[0]
        with torch.autocast("cuda", enabled=False):
            return stock(query, key, value, attn_mask, *args, **options)

    return attend


def _enter_mode(stock: Callable[..., Any]) -> Callable[..., Any]:
    # A mode belongs to a thread, and loaders and savers start threads of their own.
    from helpers.pretend_cuda.tensors import PretendCudaMode

    def run(thread: threading.Thread) -> None:
        with PretendCudaMode():
            stock(thread)

    return run


def library_from_environment() -> Path | None:
    """What the process that starts this one has compiled already."""
    path = os.environ.get("PRETEND_CUDA_LIBRARY")
    return Path(path) if path else None
