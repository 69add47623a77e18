"""Exact float32: what PyTorch's settings are within, and that a program gets its own back."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from helpers.tensor_cores import TensorCores
from samft.runtime.device import exact_float32

read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter

SETTINGS = [
    ("generic", "all"),
    ("cuda", "all"),
    ("mkldnn", "all"),
    *itertools.product(("cuda", "mkldnn"), ("matmul", "conv", "rnn")),
]
OLDER_NAMES = (
    torch.get_float32_matmul_precision,
    torch._C._get_cublas_allow_tf32,
    torch._C._get_cudnn_allow_tf32,
)


def own_settings() -> dict[Any, str]:
    """The value of each setting itself; of one that is "none", PyTorch gives its parent's."""
    values = {}
    for setting in SETTINGS:  # parents first
        values[setting] = read(*setting)
        write(*setting, "none")
    for setting, value in values.items():
        write(*setting, value)
    return values


def all_settings() -> tuple[Any, ...]:
    """`own_settings`, and what the older names say; "raises" where they contradict the newer."""
    older: list[Any] = []
    for get in OLDER_NAMES:
        try:
            older.append(get())
        except RuntimeError:
            older.append("raises")
    return own_settings(), older


@pytest.fixture(autouse=True)
def _settings_of_the_other_tests() -> Iterator[None]:
    before = own_settings()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for setting, value in before.items():
        write(*setting, value)


def check_exact() -> None:
    assert {read(*setting) for setting in SETTINGS} <= {"none", "ieee"}
    assert [get() for get in OLDER_NAMES] == ["highest", False, False]


# By the older names alone, by the newer alone, and by both, which then contradict each other.
@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_a_program_gets_its_settings_back(matmul: str, convolutions: bool) -> None:
    newer = itertools.product(("none", "ieee", "tf32"), repeat=4)
    for generic, of_cuda, of_matmul, of_conv in [(None,) * 4, *newer]:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions
        if generic is not None:
            write("generic", "all", generic)
            write("cuda", "all", of_cuda)
            write("cuda", "matmul", of_matmul)
            write("cuda", "conv", of_conv)
            write("mkldnn", "conv", of_conv)
        before = all_settings()
        with pytest.raises(ZeroDivisionError), exact_float32():
            check_exact()
            1 / 0  # noqa: B018  # however the block ends
        assert all_settings() == before


def test_of_blocks_that_overlap_the_last_restores() -> None:
    torch.set_float32_matmul_precision("high")
    before = all_settings()
    first, second = exact_float32(), exact_float32()  # as of two threads
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    check_exact()
    second.__exit__(None, None, None)
    assert all_settings() == before


def test_products_and_convolutions_are_exact_within() -> None:
    torch.set_float32_matmul_precision("high")
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    image, kernel = torch.randn(1, 2, 9, 9), torch.randn(3, 2, 4, 4)
    expected = a @ b, F.conv2d(image, kernel)
    with TensorCores() as gpu:
        rounded = a @ b, F.conv2d(image, kernel)
        with exact_float32():
            exact = a @ b, F.conv2d(image, kernel)
    assert gpu.rounded == gpu.exact == {"mm": 1, "convolution": 1}
    for ours, tf32, true in zip(exact, rounded, expected, strict=True):
        assert torch.equal(ours, true)
        assert 1e-5 < (tf32 - true).abs().max() < 1e-2
