"""torchvision imports after torchvision_compat, whether or not its C++ operators load."""

import subprocess
import sys

import pytest

# Makes torchvision's extension unloadable, as a CUDA build beside a CPU-only torch is.
BREAK = """
import torch
def refuse(path):
    raise OSError("libcudart is missing")
torch.ops.load_library = refuse
"""
COMPAT = "import samft.runtime.torchvision_compat as compat\n"
USE = """
import torch, torchvision, torchmetrics, segment_anything
from torchvision.ops import sigmoid_focal_loss
print(sigmoid_focal_loss(torch.zeros(1), torch.ones(1), alpha=-1, gamma=0).item())
"""


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", source]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_import_fails_without_the_module() -> None:
    ended = run_python(BREAK + USE)
    assert ended.returncode == 1
    assert "operator torchvision::nms does not exist" in ended.stderr


@pytest.mark.parametrize("start", ["", BREAK], ids=["as installed", "broken extension"])
def test_import_works_after_the_module(start: str) -> None:
    ended = run_python(start + COMPAT + USE)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) == pytest.approx(0.693147, abs=1e-6)  # -log(sigmoid(0))


def test_a_missing_operator_says_so() -> None:
    call = "torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"
    ended = run_python(BREAK + COMPAT + USE + call)
    assert ended.returncode == 1
    assert "Couldn't load custom C++ ops" in ended.stderr


def test_nothing_is_declared_where_the_operators_load() -> None:
    # The extension's own registration stands in for it: what it declares must be left alone.
    loads = """
import torch
library = torch.library.Library("torchvision", "DEF")
def load(path):
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.ops.load_library = load
"""
    ended = run_python(
        loads + COMPAT + "print(compat.LIBRARY, hasattr(torch.ops.torchvision, 'qnms'))"
    )
    assert (ended.returncode, ended.stdout) == (0, "None False\n"), ended.stderr


def test_nothing_is_done_twice_or_too_late() -> None:
    again = "print(compat.declare_missing_operators())"
    ended = run_python(BREAK + COMPAT + again + USE + again)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["None", "0.6931471824645996", "None"]
