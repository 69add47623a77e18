"""Which kernel scaled_dot_product_attention takes for samft's widths on this GPU, and how fast.

    python -m benchmarks.attention_kernels

samft extends queries and keys by relative positions (`models/image_encoder.py`), and values by
zeros, because flash attention wants equal widths; cuDNN has a kernel for keys 192 and values 128
wide.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.tables import markdown_table

ROUNDS = 10


@dataclass(frozen=True)
class Shape:
    """What one block of an image encoder attends to, at 1024 px.

    Attributes:
        name: Of the block.
        batch: Images, or windows of one image.
        heads: Of the block.
        tokens: Of an image, or a window.
        width: Of queries and keys.
        value_widths: To compare.
    """

    name: str
    batch: int
    heads: int
    tokens: int
    width: int
    value_widths: tuple[int, ...]


SHAPES = (
    Shape("vit_b global", 1, 12, 4096, 192, (192, 128, 64)),
    Shape("vit_l global", 1, 16, 4096, 192, (192, 128)),
    Shape("vit_h global", 1, 16, 4096, 208, (208,)),
    Shape("vit_b without positions", 1, 12, 4096, 64, (64,)),
    Shape("vit_b windows", 25, 12, 196, 96, (96,)),
    Shape("vit_h windows", 25, 16, 196, 112, (112,)),
)
BACKENDS = {
    "PyTorch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def main() -> None:
    """Prints a row for each shape and backend, bf16; the choice names its kernel."""
    head = "| attention, bf16 | keys | values | backend | forward, ms | and backward, ms | kernel |"
    print(markdown_table(head, []), flush=True)
    for shape in SHAPES:
        for value_width in shape.value_widths:
            for name, backend in BACKENDS.items():
                cells = [_measure_cell(shape, value_width, backend, grad) for grad in (False, True)]
                kernel = "" if backend else _kernel_name(shape, value_width)
                row = f"| {shape.name} | {shape.width} | {value_width} | {name} "
                print(f"{row}| {' | '.join(cells)} | {kernel} |", flush=True)


def _measure_cell(
    shape: Shape, value_width: int, backend: SDPBackend | None, with_gradient: bool
) -> str:
    attend = _attention(shape, value_width, backend, with_gradient)
    try:
        return f"{_milliseconds(attend):.3f}"
    except RuntimeError as error:  # no kernel of this backend for such tensors
        return f"no: {str(error).splitlines()[0][:40].replace('|', '/')}"


def _attention(
    shape: Shape, value_width: int, backend: SDPBackend | None, with_gradient: bool
) -> Callable[[], Tensor]:
    def random(width: int) -> Tensor:
        size = (shape.batch, shape.heads, shape.tokens, width)
        values = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        return values.requires_grad_(with_gradient)

    query, key, value = random(shape.width), random(shape.width), random(value_width)

    def attend() -> Tensor:
        if backend is None:
            result = scaled_dot_product_attention(query, key, value, scale=0.125)
        else:
            with sdpa_kernel([backend]):
                result = scaled_dot_product_attention(query, key, value, scale=0.125)
        if with_gradient:
            result.backward(result.detach())
            query.grad = key.grad = value.grad = None
        return result

    return attend


def _milliseconds(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(ROUNDS):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / ROUNDS


def _kernel_name(shape: Shape, value_width: int) -> str:
    attend = _attention(shape, value_width, None, False)
    attend()
    with torch.profiler.profile() as profile:
        attend()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_time_total > 0]
    longest = max(events, key=lambda event: event.device_time_total, default=None)
    return longest.key[:60].replace("|", "/") if longest else "not seen"


if __name__ == "__main__":
    main()
