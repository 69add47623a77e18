"""Commands of samft with pretended GPUs, for tests."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import REPOSITORY, TESTS
from helpers.pretend_cuda.extension import build_library, missing_requirement
from helpers.pretend_cuda.ledger import CudaReport

needs_harness = pytest.mark.skipif(bool(missing_requirement()), reason=missing_requirement())


@dataclass(frozen=True)
class PretendedRun:
    """A command that has run.

    Attributes:
        code: Its exit code.
        output: What it wrote to standard output and error.
        reports: One for each rank.
    """

    code: int
    output: str
    reports: list[CudaReport]


def run_with_pretended_gpus(
    module: str,
    argv: Sequence[str],
    *,
    folder: Path,
    processes: int = 1,
    timeout: float = 240,
    environment: dict[str, str] | None = None,
) -> PretendedRun:
    """Runs `python -m MODULE ARGV`, by torchrun for several processes, each with a GPU.

    Args:
        module: As `samft.train`.
        argv: Its arguments.
        folder: For the reports.
        processes: How many, and how many GPUs.
        timeout: Seconds.
        environment: More variables.
    """
    report = folder / f"cuda-report-{len(list(folder.glob('cuda-report-*')))}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else [])]
    command += ["-m", "helpers.pretend_cuda", module, *argv]
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{TESTS}",
        "PRETEND_CUDA_LIBRARY": str(build_library()),
        "PRETEND_CUDA_DEVICES": str(processes),
        "PRETEND_CUDA_REPORT": str(report),
        **(environment or {}),
    }
    ended = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )
    paths = [Path(f"{report}.{rank}") for rank in range(processes)]
    reports = [CudaReport.read(path) for path in paths if path.exists()]
    return PretendedRun(ended.returncode, ended.stdout + ended.stderr, reports)
