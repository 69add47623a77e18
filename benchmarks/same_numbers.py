"""Shows that two revisions compute the same numbers, to the last bit: `--before REV [--after REV]`.

For changes that must not change any result, such as moving code or renaming. Both revisions train
and evaluate on the same small demo dataset, and what they leave is compared: every tensor of the
checkpoints, every value of metrics.jsonl, every object's scores. A run that the first revision
stopped is gone on with by the second, too. Without --after, the second is the working tree as it
is. Five minutes on two cores; --quick takes one.

Only the public commands are run, and nothing of samft is imported here, since the modules of the
two revisions may have different names.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from benchmarks.run_contents import Content, compare, read_metrics, read_scores, read_weights

# Flags over those of configs/demo.yaml. All at sizes that keep a run below half a minute.
_SMALL = "--steps 10 --metrics_interval 5 --image_size 128"
CASES = {
    "demo": "--steps 30 --metrics_interval 10",
    "frozen, cached": f"{_SMALL} --freeze_image_encoder --cache_embeddings on",
    "bf16, accumulated": f"{_SMALL} --amp bf16 --accumulate_steps 2",
}
PROCESSES = (1, 2)
RESUMED = "demo"  # the case that is stopped by one revision and ended by the other
STOP_AFTER = 14  # between two validations, so that half an interval's sums are carried over
QUICK = {"demo": "--steps 4 --metrics_interval 2"}  # on one process

GLOBAL_BATCH = 4  # images a step, over all processes
DATA_FLAGS = "--images 16 --size 160"
# sitecustomize.py of all that is run: where samft is installed as editable, the finder of that
# would give modules that a revision's own package lacks, from another source tree.
_SITE = """import sys
sys.meta_path[:] = [
    one for one in sys.meta_path if not getattr(one, "__module__", "").startswith("__editable__")
]
"""
_STOPPED = 75  # exit code of a run that --stop_after ended
_TOP = Path(__file__).resolve().parent.parent

Row: TypeAlias = tuple[str, int, str, str]  # name, processes, what was compared, verdict


@dataclass(frozen=True)
class Side:
    """A revision.

    Attributes:
        code: The top of its source tree.
        runs: The folder that its commands run in. Paths below are given relative to it, so that
            files that name a path are alike on both sides.
    """

    code: Path
    runs: Path

    def prepare(self) -> None:
        """Makes the folder of the runs, and sure that no samft but this one is run."""
        (self.runs / "site").mkdir(parents=True)
        (self.runs / "site" / "sitecustomize.py").write_text(_SITE)
        imported_from = self.python(["-c", "import samft; print(samft.__file__)"]).strip()
        if not Path(imported_from).resolve().is_relative_to(self.code.resolve()):
            sys.exit(f"{imported_from} would be run, not the samft of {self.code}")

    def python(self, arguments: Sequence[str], *, expect: int = 0) -> str:
        """Runs Python with this revision's samft; its standard output.

        Raises:
            SystemExit: It ended with another exit code than `expect`.
        """
        ours = {key: value for key, value in os.environ.items() if not key.startswith("SAMFT_")}
        ours["PYTHONPATH"] = os.pathsep.join([str(self.code), str(self.runs / "site")])
        ours["OMP_NUM_THREADS"] = "1"
        ours["SAMFT_CACHE"] = str(self.runs / "cache")  # or the other side's index would be taken
        command = [sys.executable, *arguments]
        ended = subprocess.run(command, cwd=self.runs, env=ours, capture_output=True, text=True)
        if ended.returncode != expect:
            output = f"{ended.stdout}\n{ended.stderr}"[-4000:]
            sys.exit(
                f"{output}\nended with {ended.returncode}: {' '.join(command)}\nof {self.code}"
            )
        return ended.stdout

    def samft(self, command: str, *flags: str, processes: int = 1, expect: int = 0) -> None:
        """Runs `python -m samft.<command> <flags>`, under torchrun for more than one process."""
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()
        launcher = torchrun if processes > 1 else []
        self.python([*launcher, "-m", f"samft.{command}", *flags], expect=expect)

    def train(self, name: str, flags: str, *, processes: int = 1, expect: int = 0) -> Path:
        """A training run of the demo; its output folder."""
        config = str(self.code / "configs" / "demo.yaml")
        common = f"--data_root ../data --output_dir {name} --device cpu"
        arguments = f"{common} --batch_size {GLOBAL_BATCH // processes} {flags}".split()
        self.samft("train", "--config", config, *arguments, processes=processes, expect=expect)
        return self.runs / name

    def evaluate(self, runs: Sequence[str], *, processes: int = 1) -> Path:
        """Evaluates the last checkpoints of runs, all in one go; the folder of the scores."""
        checkpoints = [f"{run}/last.ckpt" for run in runs]
        folder = f"scores-{processes}"
        options = f"--output {folder}/scores.json --data_root ../data --device cpu --num_workers 0"
        flags = ["--checkpoint", *checkpoints, *options.split()]
        self.samft("evaluate", *flags, processes=processes)
        return self.runs / folder


def run_name(case: str, processes: int) -> str:
    """The output folder of a case."""
    return f"{case.replace(', ', '-')}-{processes}"


def compare_trained(
    before: Side, after: Side, *, case: str, flags: str, processes: int
) -> list[Row]:
    """Trains on both sides."""
    run = run_name(case, processes)
    folders = [side.train(run, flags, processes=processes) for side in (before, after)]
    return _rows(case, processes, folders=folders, readers=(read_weights, read_metrics))


def compare_evaluated(
    before: Side, after: Side, *, runs: Sequence[str], processes: int
) -> list[Row]:
    """Evaluates what was trained on both sides, each its own."""
    folders = [side.evaluate(runs, processes=processes) for side in (before, after)]
    return _rows("evaluate", processes, folders=folders, readers=(read_scores,))


def compare_resumed(before: Side, after: Side, *, case: str, flags: str) -> list[Row]:
    """Stops a run of `before`, ends it by `after`, and compares with one not stopped."""
    stopped = before.train("resumed", f"{flags} --stop_after {STOP_AFTER}", expect=_STOPPED)
    shutil.copytree(stopped, after.runs / stopped.name)
    folders = [before.runs / run_name(case, 1), after.train(stopped.name, flags)]
    return _rows(f"{case}: resumed", 1, folders=folders, readers=(read_weights, read_metrics))


def _rows(
    name: str,
    processes: int,
    *,
    folders: Sequence[Path],
    readers: Sequence[Callable[[Path], Content]],
) -> list[Row]:
    rows = []
    for reader in readers:
        before, after = map(reader, folders)
        rows.append((name, processes, before.count, compare(before, after)))
    return rows


def compare_all(before: Side, after: Side, *, quick: bool) -> Iterator[Row]:
    """All comparisons, in the order in which they are made."""
    before.samft("demo", *f"--output_dir ../data {DATA_FLAGS}".split())
    cases, numbers = (QUICK, (1,)) if quick else (CASES, PROCESSES)
    for case, flags in cases.items():
        for processes in numbers:
            yield from compare_trained(before, after, case=case, flags=flags, processes=processes)
    runs = [run_name(case, processes) for case in cases for processes in numbers]
    for processes in numbers:
        yield from compare_evaluated(before, after, runs=runs, processes=processes)
    if not quick:
        yield from compare_resumed(before, after, case=RESUMED, flags=CASES[RESUMED])


@contextlib.contextmanager
def checked_out(revision: str | None, folder: Path) -> Iterator[Path]:
    """The source tree of a revision, in a folder that is removed afterwards; None: as it is."""
    if revision is None:
        yield _TOP
        return
    git = ["git", "-C", str(_TOP), "worktree"]
    try:
        add = [*git, "add", "--quiet", "--detach", str(folder), revision]
        if subprocess.run(add).returncode:
            sys.exit(f"{revision} could not be checked out")
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True)


@contextlib.contextmanager
def both_sides(before: str, after: str | None) -> Iterator[tuple[Side, Side]]:
    """The two revisions, with folders for their runs beside one for the data."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = []
        for name, revision in (("before", before), ("after", after)):
            code = stack.enter_context(checked_out(revision, folder / f"{name}-code"))
            sides.append(Side(code, folder / name))
            sides[-1].prepare()
        yield sides[0], sides[1]


def main() -> int:
    """Compares, and prints a row of a table as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, metavar="REV")
    parser.add_argument("--after", metavar="REV", help="default: the working tree as it is")
    parser.add_argument("--quick", action="store_true", help="a few steps of the first case")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # worktrees are removed then, too
    start, verdicts = time.monotonic(), []
    with both_sides(options.before, options.after) as (before, after):
        print(f"before: {options.before}, after: {options.after or 'the working tree'}\n")
        print("| run | processes | compared | result |\n|---|---|---|---|", flush=True)
        for name, processes, count, verdict in compare_all(before, after, quick=options.quick):
            print(f"| {name} | {processes} | {count} | {verdict} |", flush=True)
            verdicts.append(verdict)
    unequal = sum(verdict != "equal" for verdict in verdicts)
    result = f"{unequal} of {len(verdicts)} comparisons differ" if unequal else "all equal"
    print(f"\n{result}, after {time.monotonic() - start:.0f} s")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
