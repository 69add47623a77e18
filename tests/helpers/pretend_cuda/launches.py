"""How many kernels an operation launches, about: none for views, one for most others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.pretend_cuda.device_rules import Operation

_NO_KERNEL = frozenset(
    "detach lift_fresh _unsafe_view empty empty_strided empty_like new_empty "
    "new_empty_strided".split()
)
_FUSED_OPTIMIZERS = ("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_")
# Operations on lists of tensors cut them into chunks, and one launch takes so many chunks of so
# many tensors, by how many lists there are. Source: depth_to_max_tensors, depth_to_max_blocks and
# kChunkSize in PyTorch's aten/src/ATen/native/cuda/MultiTensorApply.cuh.
_TENSORS_OF_A_LAUNCH = (110, 64, 48, 36, 30)
_CHUNKS_OF_A_LAUNCH = 320
_CHUNK = 65536  # elements


def count_launches(operation: Operation) -> int:
    """Kernels of one call; copies count as one."""
    if operation.func.is_view or operation.name in _NO_KERNEL:
        return 0
    if operation.name.startswith(("_foreach_", "_amp_foreach_", *_FUSED_OPTIMIZERS)):
        lists = [arg for arg in operation.args if _is_tensor_list(arg)]
        return launches_of_lists([t.numel() for t in lists[0]], len(lists)) if lists else 1
    return 1


def launches_of_lists(sizes: Sequence[int], num_lists: int) -> int:
    """Launches of one operation on lists of tensors with these numbers of elements."""
    most_tensors = _TENSORS_OF_A_LAUNCH[min(max(num_lists, 1), 5) - 1]
    launches = tensors = chunks = 0
    for size in sizes:
        tensors += size > 0
        for remaining in reversed(range(-(-size // _CHUNK))):
            chunks += 1
            is_full = chunks == _CHUNKS_OF_A_LAUNCH or (not remaining and tensors == most_tensors)
            if is_full:  # a tensor of which chunks remain goes on in the next launch
                launches, chunks, tensors = launches + 1, 0, int(remaining > 0)
    return launches + (chunks > 0)


def allow_lists_of(tensor_type: type[Tensor]) -> None:
    """Has PyTorch take lists of a subclass in one operation, as it takes CUDA's own tensors.

    Optimizers and `clip_grad_norm_` look for the types that they know, as
    `torch.distributed.tensor` does for its own.
    """
    from torch.optim.optimizer import _foreach_supported_types as of_optimizers
    from torch.utils._foreach_utils import _foreach_supported_types as of_clipping

    of_optimizers.append(tensor_type)
    of_clipping.append(tensor_type)


def _is_tensor_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], torch.Tensor)
