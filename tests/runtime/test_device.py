"""The device of a process on hosts that are described to it: what PyTorch, driver and files say."""

import ctypes
import fnmatch
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from samft.errors import ConfigError, TrainingError
from samft.runtime.device import (
    check_device,
    deterministic_algorithms,
    log_hidden_gpus,
    pick_device,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version"
)
NO_DEVICE = "No CUDA GPUs are available"
VERSION = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021
GCC version:  gcc version 9.4.0
"""


@dataclass
class Host:
    """A host with an NVIDIA GPU, and a driver that is too old for the PyTorch on it."""

    cuda: str | None = "13.0"
    hip: str | None = None
    count: int = 0  # what PyTorch counts
    refusal: str = TOO_OLD  # why PyTorch does not start CUDA
    devices: tuple[str, ...] = ("nvidia0",)
    version: str | None = VERSION
    listing: str | None = None  # of nvidia-smi -L; None: there is no such program

    def describe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Has PyTorch, the files and nvidia-smi say so."""

        def refuse() -> None:
            raise RuntimeError(self.refusal)

        def list_gpus(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            assert command == ["nvidia-smi", "-L"]
            if self.listing is None:
                raise FileNotFoundError(command[0])
            return subprocess.CompletedProcess(command, 0, stdout=self.listing)

        def read(path: Path) -> str:
            if self.version is None:
                raise FileNotFoundError(path)
            return self.version

        for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch, "__version__", "2.13.0")
        monkeypatch.setattr(torch.version, "cuda", self.cuda)
        monkeypatch.setattr(torch.version, "hip", self.hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: self.count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "init", refuse)

        def glob(path: Path, pattern: str) -> list[str]:
            return fnmatch.filter(listed[str(path)], pattern)

        listed = {"/dev": self.devices, "/proc/driver/nvidia/gpus": ()}
        monkeypatch.setattr(Path, "glob", glob)
        monkeypatch.setattr(Path, "read_text", read)
        monkeypatch.setattr(subprocess, "run", list_gpus)


@pytest.fixture
def describe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda **changes: Host(**changes).describe(monkeypatch)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_driver_that_is_too_old_is_an_error(device: str, describe: Callable[..., None]) -> None:
    describe()
    with pytest.raises(ConfigError) as caught:
        pick_device(device)
    assert str(caught.value) == (
        "device: this host has NVIDIA GPUs with driver 470.82.01, but PyTorch 2.13.0 (built for "
        "CUDA 13.0) cannot use them: The NVIDIA driver on your system is too old (found version "
        "11040). Install a PyTorch that is built for their driver, or update the driver; or "
        "compute without GPUs: --device cpu."
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"cuda": None},
            "PyTorch 2.13.0 (built for CPUs) cannot use them: it has no code for them",
        ),
        ({"cuda": None, "hip": "6.4"}, "(built for AMD GPUs, ROCm 6.4) cannot use them"),
        ({"refusal": NO_DEVICE}, f"{NO_DEVICE}. Install"),
        (
            {
                "cuda": None,
                "hip": "6.4",
                "devices": ("kfd",),
                "refusal": "No HIP GPUs",
                "version": None,
            },
            "has AMD GPUs, but PyTorch 2.13.0 (built for AMD GPUs, ROCm 6.4) cannot use them: No",
        ),
        ({"devices": (), "listing": "GPU 0: NVIDIA H100 (UUID: GPU-1)\n"}, "too old"),
        ({"version": None}, "has NVIDIA GPUs, but PyTorch"),
        ({"version": VERSION.replace("x86_64 Kernel", "Open Kernel")}, "driver 470.82.01,"),
    ],
)
def test_so_is_whatever_else_keeps_pytorch_from_the_gpus(
    changes: dict[str, Any], reason: str, describe: Callable[..., None]
) -> None:
    describe(**changes)
    with pytest.raises(ConfigError) as caught:
        pick_device("auto")
    assert reason in str(caught.value) and "--device cpu" in str(caught.value)
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize(
    "listing", [None, "No devices found.\n", ""], ids=["no program", "no device", "nothing"]
)
def test_a_host_without_gpus_computes_on_the_cpu(
    listing: str | None, describe: Callable[..., None]
) -> None:
    describe(devices=("kfd",), listing=listing)  # an AMD processor's own, for a build for CUDA
    assert pick_device("auto") == CPU
    with pytest.raises(ConfigError, match=r"'cuda' was asked for, but .* sees no GPU"):
        pick_device("cuda")


@pytest.mark.parametrize("visible", ["", "-1", "-1,0", "NoDevFiles"])
def test_whoever_hides_the_gpus_wants_the_cpu(
    visible: str,
    describe: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    describe(refusal=NO_DEVICE)
    caplog.set_level(logging.INFO)
    log_hidden_gpus(CPU)
    assert caplog.messages == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert pick_device("auto") == CPU
    log_hidden_gpus(CPU)
    assert caplog.messages == [
        "computing on the CPU: CUDA_VISIBLE_DEVICES hides the GPUs of this host"
    ]
    with pytest.raises(ConfigError, match="hides all GPUs: unset it, or say --device cpu"):
        pick_device("cuda")


@pytest.mark.parametrize("visible", ["7", "GPU-typo", "0,1"])
def test_a_wrong_choice_of_gpus_hides_nothing(
    visible: str, describe: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(refusal=NO_DEVICE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=f"Check CUDA_VISIBLE_DEVICES, which is '{visible}'"):
        pick_device("auto")


def test_each_process_gets_the_gpu_of_its_local_rank(
    describe: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(count=2)
    assert pick_device("auto") == GPU
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("local_rank", [0, 2])
def test_all_processes_refuse_where_one_has_no_gpu(
    local_rank: int, describe: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(count=2)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="3 processes of this host .* there are 2"):
        pick_device("auto")


@pytest.mark.parametrize(
    ("message", "kind", "sentence"),
    [
        (
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel",
            ConfigError,
            "(built for CUDA 13.0) cannot use cuda:0: CUDA error: no kernel image is "
            "available for execution on the device. Install",
        ),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", ConfigError, "busy"),
        ("CUDA error: out of memory", TrainingError, "not enough memory on cuda:0 to begin with"),
    ],
)
def test_a_gpu_that_cannot_compute_is_an_error_at_the_start(
    message: str,
    kind: type[Exception],
    sentence: str,
    describe: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    describe(count=1)
    monkeypatch.setattr(torch, "ones", fail)
    check_device(CPU)
    with pytest.raises(kind) as caught:
        check_device(GPU)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("workspace", [None, ":0:0", ":16:8"])
def test_deterministic_algorithms_are_on_within_and_only_there(
    monkeypatch: pytest.MonkeyPatch, workspace: str | None
) -> None:
    if workspace is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == workspace
    with pytest.raises(ZeroDivisionError), deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        # A setting of the user's that is deterministic stays
        chosen = ":16:8" if workspace == ":16:8" else ":4096:8"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == chosen
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic and torch.backends.cudnn.benchmark
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == workspace


RESIDENT_MEMORY = """
import re, torch
from pathlib import Path
from samft.runtime.device import freed_memory_kept

def resident_mib():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**10

def use_and_free():
    torch.empty(2**24).fill_(1)  # 64 MiB

use_and_free()
before = resident_mib()
with freed_memory_kept(torch.device("{device}")):
    use_and_free()
    within = resident_mib() - before
print(within, resident_mib() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's mallopt")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_freed_memory_is_kept_on_a_cpu_until_the_block_ends(device: str) -> None:
    command = [sys.executable, "-c", RESIDENT_MEMORY.format(device=device)]

    within, after = (float(number) for number in subprocess.check_output(command).split())

    assert (within > 60) == (device == "cpu") and after < 30
