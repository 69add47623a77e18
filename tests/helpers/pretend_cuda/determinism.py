"""Operations that CUDA refuses while deterministic algorithms are on, for it has only kernels that
add in whatever order threads arrive."""

import os

import torch

from helpers.pretend_cuda.device_rules import Operation

# Source: https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html,
# by the names of the operators that the functions there lead to. (For what it lists as "will act
# deterministically", CUDA has another kernel.)
HAVE_NO_DETERMINISTIC_KERNEL = frozenset(
    "avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward "
    "adaptive_max_pool2d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward "
    "max_unpool2d max_unpool3d upsample_linear1d_backward upsample_bilinear2d_backward "
    "_upsample_bilinear2d_aa_backward upsample_bicubic2d_backward "
    "_upsample_bicubic2d_aa_backward upsample_trilinear3d_backward reflection_pad1d_backward "
    "reflection_pad2d_backward reflection_pad3d_backward nll_loss_forward nll_loss2d_forward "
    "_ctc_loss_backward _embedding_bag_dense_backward put put_ histc median kthvalue "
    "grid_sampler_2d_backward grid_sampler_3d_backward".split()
)
# Source: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
PRODUCTS = frozenset("mm addmm addmm_ bmm baddbmm baddbmm_ addbmm mv addmv dot".split())
WORKSPACES = (":4096:8", ":16:8")


def describe_refusal(operation: Operation) -> str:
    """Why CUDA refuses an operation for not being deterministic; empty if it does not."""
    if not torch.are_deterministic_algorithms_enabled():
        return ""
    if _has_no_deterministic_kernel(operation):
        return f"{operation.name} does not have a deterministic implementation"
    if operation.name in PRODUCTS and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in WORKSPACES:
        return (
            f"Deterministic behavior was enabled, but {operation.name} is not deterministic "
            "because it uses cuBLAS without CUBLAS_WORKSPACE_CONFIG"
        )
    return ""


def _has_no_deterministic_kernel(operation: Operation) -> bool:
    if operation.name in ("cumsum", "cumsum_"):
        dtype = operation.kwargs.get("dtype") or operation.args[0].dtype
        return bool(dtype.is_floating_point or dtype.is_complex)
    if operation.name == "bincount":
        return len(operation.args) > 1 or operation.kwargs.get("weights") is not None
    if operation.name in ("scatter_reduce", "scatter_reduce_"):
        return "prod" in operation.args
    return operation.name in HAVE_NO_DETERMINISTIC_KERNEL
