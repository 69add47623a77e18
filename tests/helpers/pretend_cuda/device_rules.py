"""Which operations CUDA refuses because their tensors lie on several devices, and which make the
host wait for the device."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# A tensor of no dimension may lie on the CPU beside tensors on a GPU where TensorIterator does the
# work (https://docs.pytorch.org/docs/stable/notes/cuda.html). These have kernels of their own.
REFUSE_SCALARS_ON_CPU = frozenset(
    "mm addmm bmm baddbmm addbmm cat stack index_select gather scatter scatter_ scatter_add "
    "index_add index_add_ index_copy embedding convolution convolution_backward native_layer_norm "
    "native_layer_norm_backward native_group_norm _softmax upsample_bilinear2d upsample_linear1d "
    "_fused_adamw_ _foreach_mul _foreach_mul_ _foreach_div _foreach_div_ masked_select "
    "_amp_foreach_non_finite_check_and_unscale_ _amp_update_scale_ take_along_dim bincount "
    "searchsorted sort topk _scaled_dot_product_flash_attention".split()
)
MAY_MIX_DEVICES = frozenset(
    "copy_ _to_copy _copy_from set_ record_stream _foreach_copy_ lift_fresh".split()
)
INDEXING = frozenset("index index_put index_put_ _index_put_impl_ _unsafe_index".split())
# Their result is on the host, or its shape depends on values.
WAIT_FOR_VALUES = frozenset(
    "_local_scalar_dense item is_nonzero equal nonzero masked_select bincount _unique2 unique_dim "
    "unique_consecutive".split()
)


@dataclass(frozen=True)
class Operation:
    """A call of one of PyTorch's operators.

    Attributes:
        func: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def name(self) -> str:
        """`copy_` of `aten::copy_.default`."""
        name: str = self.func.overloadpacket.__name__
        return name

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, also in lists."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @cached_property
    def device(self) -> torch.device | None:
        """Where results go: the argument `device`, else that of a tensor on a GPU."""
        if self.kwargs.get("device") is not None:
            return torch.device(self.kwargs["device"])
        return next((t.device for t in self.tensors if t.is_cuda), None)

    @property
    def uses_cuda(self) -> bool:
        """Whether a tensor or the result is on a GPU."""
        to_cuda = self.device is not None and self.device.type == "cuda"
        return to_cuda or any(tensor.is_cuda for tensor in self.tensors)


def mixes_devices(operation: Operation) -> bool:
    """Whether CUDA refuses an operation on a GPU because of where its tensors lie."""
    if operation.name in MAY_MIX_DEVICES:
        return False
    devices = {tensor.device for tensor in operation.tensors if tensor.is_cuda}
    on_cpu = [tensor for tensor in operation.tensors if not tensor.is_cuda]
    if len(devices) > 1:
        return True
    if not devices or not on_cpu:
        return False
    if operation.name in INDEXING:
        return _indexing_mixes_devices(operation)
    return operation.name in REFUSE_SCALARS_ON_CPU or any(tensor.dim() for tensor in on_cpu)


def _indexing_mixes_devices(operation: Operation) -> bool:
    # Indices on the CPU are moved over, and waited for; what is indexed, and put there, is not.
    indexed, _, *values = operation.args
    refused = [value for value in values[:1] if isinstance(value, Tensor) and value.dim()]
    return any(not tensor.is_cuda for tensor in [indexed, *refused])


def describe_mix(operation: Operation) -> str:
    """CUDA's words for it, with the shapes."""
    places = [f"{tensor.device} {tuple(tensor.shape)}" for tensor in operation.tensors]
    return (
        "Expected all tensors to be on the same device, but found at least two devices, in "
        f"{operation.func}: {', '.join(places)}"
    )


def kind_of_wait(operation: Operation) -> str:
    """How an operation, no copy, makes the host wait for the device; empty if it does not."""
    if operation.name in WAIT_FOR_VALUES:
        return "item" if operation.name == "_local_scalar_dense" else operation.name
    if operation.name == "repeat_interleave":
        return "" if operation.kwargs.get("output_size") else "repeat_interleave"
    if operation.name in INDEXING:
        indices = [index for index in operation.args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return f"{operation.name} by a mask"
        if any(not index.is_cuda for index in indices):
            return f"{operation.name} with indices on the CPU"
    return ""
