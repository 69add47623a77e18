"""A run that something happens to every 20 to 60 seconds, beside one that is left alone.

    python tests/faults/soak.py --minutes 30

Two ranks under launch.sh, on the CPU. Whatever ends the command, the same command is started again,
until the run has finished. Its weights must then be those of the undisturbed run, to the bit, and
its metrics the same lines. Prints a table of what was survived.
"""

import argparse
import collections
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from helpers.fault_runs import TESTS, environment, run_arguments
from helpers.processes import children_of, descendants_of
from helpers.short_runs import read_metrics, write_data

REPOSITORY = TESTS.parent
SECONDS_BETWEEN = (20.0, 60.0)
INTERVAL = 25


class Command:
    """launch.sh on two ranks, and its processes."""

    def __init__(self, argv: list[str], *, log: Path, core: int | None) -> None:
        pinned = ["taskset", "-c", str(core)] if core is not None else []
        self.file = log.open("a")
        self.process = subprocess.Popen(
            [*pinned, "bash", str(REPOSITORY / "launch.sh"), *argv],
            stdout=self.file,
            stderr=subprocess.STDOUT,
            env=environment(NPROC_PER_NODE="2", SAMFT_PYTHON=sys.executable),
            start_new_session=True,
        )

    @property
    def agent(self) -> int | None:
        """torchrun's process."""
        return next(iter(children_of(self.process.pid)), None)

    @property
    def ranks(self) -> list[int]:
        """The training processes."""
        return children_of(self.agent) if self.agent else []

    def kill_everything(self) -> None:
        """SIGKILL to launch.sh and all that it started."""
        for pid in [self.process.pid, *descendants_of(self.process.pid)]:
            _send(pid, signal.SIGKILL)
        self.process.wait()


def _send(pid: int | None, number: int) -> None:
    if pid is not None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:  # gone meanwhile
            pass


def _damage(folder: Path, change: Callable[[bytes], bytes], name: str = "last.ckpt") -> None:
    path = folder / name
    if path.exists():
        path.write_bytes(change(path.read_bytes()))


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _add_half_a_line(content: bytes) -> bytes:
    # As a kill in the middle of writing leaves it; whole lines are on the disk before the state is.
    return content + content.splitlines()[-1][:60] if content else content


Fault = Callable[[Command, Path, random.Random], None]


def _kill_then(change: Callable[[Path], None]) -> Fault:
    def fault(command: Command, folder: Path, chance: random.Random) -> None:
        command.kill_everything()
        change(folder)

    return fault


def _one_rank(number: int) -> Fault:
    def fault(command: Command, folder: Path, chance: random.Random) -> None:
        if command.ranks:
            _send(chance.choice(command.ranks), number)

    return fault


FAULTS: dict[str, Fault] = {
    "kill -9 of a rank": _one_rank(signal.SIGKILL),
    "a rank stopped (hangs)": _one_rank(signal.SIGSTOP),
    "SIGTERM to one rank": _one_rank(signal.SIGTERM),
    "SIGTERM to launch.sh": lambda command, *_: _send(command.process.pid, signal.SIGTERM),
    "SIGUSR1 to torchrun": lambda command, *_: _send(command.agent, signal.SIGUSR1),
    "kill -9 of torchrun": lambda command, *_: _send(command.agent, signal.SIGKILL),
    "kill -9 of everything": _kill_then(lambda folder: None),
    "the same, and a bit of last.ckpt flipped": _kill_then(lambda folder: _damage(folder, _flip)),
    "the same, and last.ckpt emptied": _kill_then(lambda folder: _damage(folder, lambda _: b"")),
    "the same, and half a line in metrics.jsonl": _kill_then(
        lambda folder: _damage(folder, _add_half_a_line, "metrics.jsonl")
    ),
}


def disturb(argv: list[str], folder: Path, *, log: Path, core: int | None, seed: int) -> list[str]:
    """Runs the command to its end, with faults; their names, in order."""
    chance, happened = random.Random(seed), list[str]()
    names = list(FAULTS)
    command = Command(argv, log=log, core=core)
    due = time.monotonic() + chance.uniform(*SECONDS_BETWEEN)
    while True:
        time.sleep(0.2)
        code = command.process.poll()
        if code == 0:
            return happened
        if code is not None:
            print(f"  the command ended with {code}; again", flush=True)
            command = Command(argv, log=log, core=core)
        if time.monotonic() < due or not command.ranks:
            continue
        if len(happened) % len(names) == 0:
            chance.shuffle(names)
        name = names[len(happened) % len(names)]
        print(f"{time.strftime('%H:%M:%S')} {last_step(log)}: {name}", flush=True)
        FAULTS[name](command, folder, chance)
        happened.append(name)
        due = time.monotonic() + chance.uniform(*SECONDS_BETWEEN)


def last_step(log: Path) -> str:
    """How far the run is, as its log says."""
    steps = re.findall(r"step (\d+/\d+):", log.read_text())
    return f"step {steps[-1]}" if steps else "before the first step"


def steps_in(
    seconds: float, data: Path, root: Path, *, cores: tuple[int | None, int | None]
) -> int:
    """How many steps an undisturbed run takes in that time here and now, beside another."""
    trials = {root / f"trial-{number}": core for number, core in enumerate(cores)}
    commands = [
        Command(soak_arguments(data, folder, steps=200), log=root / f"{folder.name}.log", core=core)
        for folder, core in trials.items()
    ]
    for command in commands:
        assert command.process.wait() == 0, [path.read_text() for path in root.glob("trial*.log")]
    walls = [json.loads((folder / "summary.json").read_text())["wall_seconds"] for folder in trials]
    return max(200, round(seconds * 200 / max(walls) / INTERVAL) * INTERVAL)


def soak_arguments(data: Path, folder: Path, *, steps: int) -> list[str]:
    """A run of many small steps."""
    options = {"steps": steps, "metrics_interval": INTERVAL, "hang_timeout": 20, "num_workers": 1}
    return run_arguments(data, folder, learning_rate=1e-4, **options)


def check_equal(folder: Path, expected: Path) -> None:
    """Weights to the bit, metrics line by line."""
    one, other = (
        torch.load(path / "last.ckpt", weights_only=True)["model"] for path in (folder, expected)
    )
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor), f"{name} differs"
    for line, wanted in zip(read_metrics(folder), read_metrics(expected), strict=True):
        names = ("step", "split", "loss", "per_mask_iou")
        assert [line[n] for n in names] == [wanted[n] for n in names], f"{line} is not {wanted}"


def main() -> None:
    """Runs both, compares them, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=30, help="at least, and half as much more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pin", action="store_true", help="one core for each of the two runs")
    args = parser.parse_args()
    cores = (0, 1) if args.pin else (None, None)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        data = write_data(root / "data", num_train=61)
        logs = {name: root / f"{name}.log" for name in ("alone", "disturbed")}
        # As many as it would take without faults, each of which costs a start, too.
        steps = steps_in(args.minutes * 60, data, root, cores=cores)
        print(f"{steps} steps", flush=True)
        start = time.monotonic()
        alone = Command(
            soak_arguments(data, root / "alone", steps=steps), log=logs["alone"], core=cores[0]
        )
        argv = soak_arguments(data, root / "disturbed", steps=steps)
        options = {"log": logs["disturbed"], "core": cores[1]}
        happened = disturb(argv, root / "disturbed", seed=args.seed, **options)
        minutes = (time.monotonic() - start) / 60
        assert alone.process.wait() == 0, logs["alone"].read_text()[-3000:]
        check_equal(root / "disturbed", root / "alone")
    print(f"\n{len(happened)} faults in {minutes:.0f} minutes; weights and metrics equal.\n")
    print("| fault | survived |\n|---|---|")
    for name, count in sorted(collections.Counter(happened).items()):
        print(f"| {name} | {count} |")


if __name__ == "__main__":
    main()
