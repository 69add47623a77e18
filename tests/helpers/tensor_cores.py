"""A GPU's TF32 on a CPU: operands rounded to 10 bits wherever PyTorch's settings allow it."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.pretend_cuda.numerics import round_to_tf32

# The operands of each operation, as positions of its arguments.
_OPERANDS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "convolution": (0, 1),
    "convolution_backward": (0, 1, 2),
}


class TensorCores(TorchDispatchMode):
    """Multiplies as a GPU since Ampere would: in TF32, unless the settings say otherwise.

    Attributes:
        rounded: How often each operation was done in TF32.
        exact: How often each was done in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounded: Counter[str] = Counter()
        self.exact: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _OPERANDS and args[_OPERANDS[name][0]].dtype == torch.float32:
            kind = "conv" if name.startswith("conv") else "matmul"
            in_tf32 = torch._C._get_fp32_precision_getter("cuda", kind) == "tf32"
            (self.rounded if in_tf32 else self.exact)[name] += 1
            if in_tf32:
                operands = _OPERANDS[name]
                args = tuple(round_to_tf32(a) if k in operands else a for k, a in enumerate(args))
        return func(*args, **(kwargs or {}))
