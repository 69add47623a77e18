"""What CUDA's kernels compute differently from the CPU's, and arguments that only CUDA takes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helpers.pretend_cuda.device_rules import Operation

_CONVOLUTIONS = {"convolution": slice(0, 2), "convolution_backward": slice(0, 3)}
_PRODUCTS = {
    "mm": slice(0, 2),
    "bmm": slice(0, 2),
    "addmm": slice(1, 3),
    "baddbmm": slice(1, 3),
}
_TF32_HALF, _TF32_MASK = 0x1000, ~0x1FFF  # of the 23 bits of a float32's mantissa, 10 are kept


Kernel = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def bind_kernel(operation: Operation) -> Kernel:
    """What computes an operation on the CPU as CUDA does, with the settings of this moment.

    Args:
        operation: As it was called, on tensors of the pretended device.

    Returns:
        A function of its positional and keyword arguments, with CPU tensors in their place.
    """
    return partial(_compute, operation, _tf32_operands(operation))


def _compute(
    operation: Operation,
    operands: slice | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if operands is not None:
        rounded = [round_to_tf32(tensor) for tensor in args[operands]]
        args = (*args[: operands.start], *rounded, *args[operands.stop :])
    if operation.name in ("_softmax", "_log_softmax") and args[2]:
        # From half precision to float32 in one kernel, which the CPU has not
        return operation.func(args[0].float(), args[1], False)
    if operation.name in ("_softmax_backward_data", "_log_softmax_backward_data"):
        gradient = operation.func(*args[:3], args[0].dtype)
        return gradient.to(args[3])
    return operation.func(*args, **kwargs)


def round_to_tf32(tensor: Tensor) -> Tensor:
    """Rounds float32 to the 10 bits of mantissa that tensor cores take.

    Source: NVIDIA A100 Tensor Core GPU architecture, TF32 (8 bits of exponent, 10 of mantissa).
    """
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + _TF32_HALF) & _TF32_MASK).view(torch.float32).reshape(tensor.shape)


def _tf32_operands(operation: Operation) -> slice | None:
    # The arguments that are rounded where PyTorch's switches allow it: convolutions by default,
    # matrix products on request (https://docs.pytorch.org/docs/stable/notes/cuda.html).
    on_cuda = [tensor for tensor in operation.tensors if tensor.is_cuda]
    if any(tensor.dtype != torch.float32 for tensor in on_cuda):
        return None
    if operation.name in _CONVOLUTIONS and torch.backends.cudnn.allow_tf32:
        return _CONVOLUTIONS[operation.name]
    if operation.name in _PRODUCTS and torch.get_float32_matmul_precision() != "highest":
        return _PRODUCTS[operation.name]
    return None
