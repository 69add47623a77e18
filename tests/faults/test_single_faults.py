"""After any single fault in its files, a run ends in the undisturbed result or in a sentence.

Each case copies a run (finished, or stopped in the middle) with its index and its embeddings, does
one thing to one file, and starts the same command again, then the evaluation of its checkpoint.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import TESTS
from helpers.cached_runs import cached_arguments
from helpers.damage import FAULTS
from helpers.fault_runs import Ended, run
from helpers.short_runs import largest_difference, read_metrics, write_data

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

SCRIPT = str(TESTS / "helpers" / "watched_command.py")
NUM_FAULTS, PARTS = 300, 10
MORE_MEMORY = 500_000  # kB
MEASURED = ("loss", "loss_focal", "loss_dice", "loss_iou", "per_mask_iou", "lr")
AREAS = ("run", "index", "embeddings")


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to, the folders that cases copy, and the peak of memory."""

    data: Path
    folders: dict[str, Path]  # finished, stopped: each with `run` and `cache`
    evaluation: str
    peak: int  # kB

    @property
    def run(self) -> Path:
        """The finished run."""
        return self.folders["finished"] / "run"


def command(folder: Path, module: str, argv: list[str]) -> Ended:
    return run(
        [sys.executable, SCRIPT, module, *argv],
        SAMFT_CACHE=str(folder / "cache"),
        SAMFT_TEST_REPORT=str(folder / "report.json"),
    )


def train(data: Path, folder: Path, *more: str) -> Ended:
    small = {"steps": 4, "metrics_interval": 2, "batch_size": 1}
    argv = cached_arguments(data, folder / "run", **small)
    return command(folder, "samft.train", [*argv, *more])


def evaluate(data: Path, folder: Path) -> tuple[Ended, str]:
    """The evaluation of the best checkpoint, and its table."""
    checkpoint = best_checkpoint(folder)
    argv = ["--checkpoint", str(checkpoint), "--data_root", str(data), "--split", "val"]
    ended = command(folder, "samft.evaluate", [*argv, "--device", "cpu", "--num_workers", "0"])
    return ended, "\n".join(re.findall(r"^.*\d\.\d{4}$", ended.output, re.MULTILINE))


def best_checkpoint(folder: Path) -> Path:
    # By the name in the summary: a checkpoint that the fault kept from being known as the run's own
    # stays beside it.
    name = json.loads((folder / "run" / "summary.json").read_text())["best_checkpoint"]
    return folder / "run" / Path(name).name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    data = write_data(tmp_path_factory.mktemp("data"), num_train=3, num_val=2)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("finished", "stopped")}
    assert train(data, folders["finished"]).code == 0
    assert train(data, folders["stopped"], "--stop_after", "2").code == 75
    ended, table = evaluate(data, folders["finished"])
    assert ended.code == 0 and table, ended.output
    peak = json.loads((folders["finished"] / "report.json").read_text())["peak"]
    for folder in folders.values():
        (folder / "report.json").unlink()
    return Undisturbed(data, folders, table, peak)


@dataclass(frozen=True)
class Case:
    """One fault, all of it drawn from a seed."""

    seed: int
    folder: Path
    state: str
    path: Path  # of the damaged file
    fault: str

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.fault} of {self.path.relative_to(self.folder)} ({self.state})"
        )


def files_of(folder: Path, area: str) -> Iterator[Path]:
    stores = folder / "run" / "embeddings"
    below = {"run": folder / "run", "index": folder / "cache", "embeddings": stores}[area]
    for path in sorted(below.rglob("*")):
        if path.is_file() and (area == "embeddings" or not path.is_relative_to(stores)):
            yield path


def make_case(undisturbed: Undisturbed, folder: Path, seed: int) -> Case:
    generator = np.random.default_rng(seed)
    state = ("finished", "stopped")[generator.integers(2)]
    shutil.copytree(undisturbed.folders[state], folder, dirs_exist_ok=True)
    paths = list(files_of(folder, AREAS[seed % len(AREAS)]))
    path = paths[generator.integers(len(paths))]
    fault = list(FAULTS)[generator.integers(len(FAULTS))]
    FAULTS[fault](path, generator)
    return Case(seed, folder, state, path, fault)


def check_case(undisturbed: Undisturbed, folder: Path, seed: int) -> str | None:
    """What is wrong with how the case ended, if anything."""
    case = make_case(undisturbed, folder, seed)
    try:
        problem = find_problem(undisturbed, case)
    except Exception as error:  # a file that the run should have left cannot be read, say
        problem = f"{type(error).__name__}: {error}"
    shutil.rmtree(folder)
    return problem and f"{case}: {problem}"


def find_problem(undisturbed: Undisturbed, case: Case) -> str | None:
    ended = train(undisturbed.data, case.folder)
    if problem := find_bad_end(undisturbed, case, ended):
        return problem
    if ended.code == 2:
        is_cache = (
            not case.path.is_relative_to(case.folder / "run") or "embeddings" in case.path.parts
        )
        return f"refused over what can be made again\n{ended.output}" if is_cache else None
    if largest_difference(case.folder / "run", undisturbed.run):
        return f"other weights\n{ended.output}"
    if problem := find_other_metrics(undisturbed, case, ended.output):
        return f"{problem}\n{ended.output}"
    if case.path.is_relative_to(case.folder / "run" / "embeddings"):
        return None  # which an evaluation does not read
    evaluated, table = evaluate(undisturbed.data, case.folder)
    if problem := find_bad_end(undisturbed, case, evaluated):
        return f"then evaluated: {problem}"
    if evaluated.code == 0 and table != undisturbed.evaluation:
        return f"another evaluation\n{table}\n{undisturbed.evaluation}"
    return None


def find_bad_end(undisturbed: Undisturbed, case: Case, ended: Ended) -> str | None:
    if ended.code not in (0, 2) or "Traceback" in ended.output:
        return f"code {ended.code}\n{ended.output}"
    peak = json.loads((case.folder / "report.json").read_text())["peak"]
    if peak > undisturbed.peak + MORE_MEMORY:
        return f"{peak} kB of memory\n{ended.output}"
    return None


def find_other_metrics(undisturbed: Undisturbed, case: Case, output: str) -> str | None:
    # Lines that were damaged are lost, and that is said; those that are there are the run's.
    expected = {key_of(line): line for line in read_metrics(undisturbed.run)}
    lines = read_metrics(case.folder / "run")
    for line in lines if "not as this run has written them" not in output else ():
        other = expected.get(key_of(line), {})
        if any(line.get(name) != other.get(name) for name in MEASURED):
            return f"other metrics: {line}, not {other}"
    if len({key_of(line) for line in lines}) != len(lines):
        return "metrics twice"
    if len(lines) < len(expected) and "metrics.jsonl" not in output:
        return (
            f"{len(expected) - len(lines)} lines of metrics.jsonl are missing, and nothing is said"
        )
    return None


def key_of(line: dict[str, Any]) -> tuple[int, str]:
    return line["step"], line["split"]


@pytest.mark.parametrize("part", range(PARTS))
def test_a_fault_in_one_file_changes_nothing_in_silence(
    undisturbed: Undisturbed, tmp_path: Path, part: int
) -> None:
    seeds = range(part, NUM_FAULTS, PARTS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = pool.map(lambda seed: check_case(undisturbed, tmp_path / str(seed), seed), seeds)
        failures = [problem for problem in problems if problem]
    assert not failures, f"{len(failures)} of {len(seeds)}\n\n" + "\n\n".join(failures)
