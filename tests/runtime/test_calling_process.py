"""What two runs leave behind in a program that calls `samft.train.main`: nothing."""

import json
import subprocess
import sys
from pathlib import Path

from helpers import TESTS
from helpers.short_runs import COMMAND_SECONDS, arguments, clean_environment, write_data

# A program with logging, a signal handler and atexit functions of its own, as a notebook or a
# sweep has. It prints its state as JSON: before the first run, and after each.
PROGRAM = """
import atexit, json, logging, os, signal, sys, threading, warnings

registered = []
register, unregister = atexit.register, atexit.unregister

def record_registration(function, *args, **kwargs):
    registered.append(function)
    return register(function, *args, **kwargs)

def record_removal(function):
    registered[:] = [other for other in registered if other != function]
    unregister(function)

atexit.register, atexit.unregister = record_registration, record_removal
logging.basicConfig(filename=sys.argv[1], level=logging.ERROR, format="%(message)s")
signal.signal(signal.SIGUSR1, lambda number, frame: None)

from helpers.processes import children_of
from samft.train import main

def state():
    root, ours = logging.getLogger(), logging.getLogger("samft")
    # PyTorch installs a handler of SIGCHLD with its first loader worker, once per process.
    numbers = sorted(signal.valid_signals() - {signal.SIGCHLD})
    return {
        "handlers": [repr(handler) for handler in root.handlers + ours.handlers],
        "levels": [root.level, ours.level, ours.getEffectiveLevel()],
        "warnings": repr(warnings.showwarning),
        "signals": [repr(signal.getsignal(number)) for number in numbers],
        "children": children_of(os.getpid()),
        "atexit": [repr(f) for f in registered if (f.__module__ or "").startswith("samft")],
    }

states = [state()]
for run in ("first", "second"):
    main([*sys.argv[2:], "--output_dir", run])
    states.append(state())
    logging.error("the program's own line after the %s run", run)
print(json.dumps(states))
"""


def test_a_program_that_trains_twice_is_left_as_it_was(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    argv = arguments(tmp_path / "data", tmp_path, steps=2, metrics_interval=1, num_workers=1)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "own.log"), *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        env=clean_environment(PYTHONPATH=f"{TESTS}:{TESTS.parent}"),
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    before, *after = json.loads(ended.stdout.splitlines()[-1])
    assert after == [before, before]
    lines = (tmp_path / "own.log").read_text().splitlines()
    assert lines[-1] == "the program's own line after the second run"
    # The program's handlers get the lines of the runs too; each run has its own in its train.log.
    assert sum(line.startswith("step 0: val_per_mask_iou") for line in lines) == 2
    for run in ("first", "second"):
        log = (tmp_path / run / "train.log").read_text()
        assert log.count("step 0: val_per_mask_iou") == 1 and "own line" not in log
