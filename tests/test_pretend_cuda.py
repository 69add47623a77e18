"""The pretended GPUs behave as GPUs do, and count what is counted."""

from collections import Counter
from pathlib import Path

import pytest

from helpers.pretend_cuda.launches import launches_of_lists
from helpers.pretend_cuda.ledger import Collective, CudaReport, Place, StepReport, Wait
from helpers.pretend_cuda.runs import needs_harness, run_with_pretended_gpus

PLACE = Place("samft/training/engine.py", 251, "_update")


@pytest.mark.processes
@needs_harness
def test_operations_are_those_of_a_gpu(tmp_path: Path) -> None:
    run = run_with_pretended_gpus("helpers.pretended_operations", [], folder=tmp_path)
    assert run.code == 0, run.output
    assert run.output.count("checked:") == 17, run.output
    assert not run.reports[0].faults


def test_reports_are_read_as_they_were_written(tmp_path: Path) -> None:
    report = CudaReport(
        faults=Counter({"devices mixed": 2}),
        waits=Counter({Wait("item", PLACE): 3}),
        collectives=Counter({Collective("allreduce_", "cuda", PLACE): 1}),
        attention=Counter({"bf16": 4}),
        steps=[StepReport(Counter(mm=2), Counter(add=5), Counter({Wait("item", PLACE): 1}))],
        launches=Counter(mm=7),
    )
    report.write(tmp_path / "report")
    assert CudaReport.read(tmp_path / "report") == report
    assert report.steps[0].functions_that_wait() == ["samft/training/engine.py _update: item"]
    assert report.steps[0].num_launches == 2


@pytest.mark.parametrize(
    ("sizes", "num_lists", "launches"),
    [
        ([], 1, 0),
        ([0, 0], 1, 0),
        ([1], 1, 1),
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([1] * 64, 2, 1),
        ([1] * 65, 2, 2),
        ([65536 * 320], 1, 1),
        ([65536 * 320 + 1], 1, 2),
        ([65536 * 320, 1], 1, 2),
        ([65536 * 319, 65536, 1], 3, 2),
    ],
)
def test_lists_of_tensors_are_launched_in_parts(
    sizes: list[int], num_lists: int, launches: int
) -> None:
    assert launches_of_lists(sizes, num_lists) == launches
