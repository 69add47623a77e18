"""Runs that something happens to, by the real commands, and what is left of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import TESTS
from helpers.preloaded import run_preloaded
from helpers.processes import processes_with
from helpers.short_runs import arguments, clean_environment

SCRIPT = str(TESTS / "helpers" / "faulty_train.py")
SECONDS = 180  # what a run of these tests may take, however busy the machine is


@dataclass
class Ended:
    """How a command ended."""

    code: int
    output: str
    seconds: float

    @property
    def last_lines(self) -> str:
        """The last 20 lines that it wrote."""
        return "\n".join(self.output.splitlines()[-20:])


def run_arguments(data: Path, folder: Path, **changes: Any) -> list[str]:
    """Sixteen steps of one image a process, a validation and a state every four."""
    small = {"steps": 16, "metrics_interval": 4, "batch_size": 1, "hang_timeout": 60}
    return arguments(data, folder, **{**small, **changes})


def torchrun(argv: list[str], *, processes: int, max_restarts: int = 0) -> list[str]:
    """torchrun, with the fault."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(processes), "--max-restarts", str(max_restarts)),
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"),
        *("--monitor-interval", "0.2", SCRIPT, *argv),
    ]


def alone(argv: list[str]) -> list[str]:
    """One process without torchrun, with the fault."""
    return [sys.executable, SCRIPT, *argv]


def launch(argv: list[str], python: Path) -> list[str]:
    """launch.sh, with the fault: `python` is to be made by `faulty_python`."""
    return ["env", f"SAMFT_PYTHON={python}", "bash", str(TESTS.parent / "launch.sh"), *argv]


def faulty_python(path: Path) -> Path:
    """A Python that runs faulty_train.py where samft.train is asked for."""
    path.write_text(
        "#!/bin/bash\n"
        'command=(); while (($#)); do if [[ "$1 ${2:-}" == "-m samft.train" ]]; '
        f'then command+=({SCRIPT}); shift 2; else command+=("$1"); shift; fi; done\n'
        f'exec {sys.executable} "${{command[@]}}"\n'
    )
    path.chmod(0o755)
    return path


def environment(fault: dict[str, Any] | None = None, **changes: str) -> dict[str, str]:
    """Of a run with a fault."""
    fault_variable = {} if fault is None else {"SAMFT_TEST_FAULT": json.dumps(fault)}
    return clean_environment(**fault_variable, **changes)


@contextmanager
def started(
    command: list[str], fault: dict[str, Any] | None = None, **changes: str
) -> Iterator["subprocess.Popen[str]"]:
    """A command that runs, and is gone afterwards with all that it started."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(fault, **changes),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run(command: list[str], fault: dict[str, Any] | None = None, **changes: str) -> Ended:
    """A command, to its end."""
    start = time.monotonic()
    if command[0] == sys.executable:
        code, output = run_preloaded(command, environment(fault, **changes), timeout=SECONDS)
    else:
        with started(command, fault, **changes) as process:
            output, _ = process.communicate(timeout=SECONDS)
        code = process.returncode
    return Ended(code, output, time.monotonic() - start)


def left_after(folder: Path, *, seconds: float = 5.0) -> list[int]:
    """Processes that still have to do with an output folder after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := processes_with(str(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def status_of(folder: Path) -> dict[str, Any]:
    """What status.json says."""
    status: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return status
