"""Training with CUDA graphs computes what training without them does, on pretended GPUs."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from helpers.pretend_cuda.runs import needs_harness, run_with_pretended_gpus
from samft.models.cuda_graphs import CudaGraphs


@pytest.mark.processes
@needs_harness
@pytest.mark.parametrize(
    ("checks", "processes"),
    [
        (["compare_gradients", "freeze_parts", "count_launches", "move_weights"], 1),
        (["resume", "resume:bfloat16", "compare_steps:float16", "fall_back"], 1),
        (["compare_steps"], 2),
    ],
    ids=["gradients", "steps", "two ranks"],
)
def test_graphs_compute_what_is_computed_without(
    checks: Sequence[str], processes: int, tmp_path: Path
) -> None:
    run = run_with_pretended_gpus(
        "helpers.graphed_training", checks, folder=tmp_path, processes=processes, timeout=600
    )
    assert run.code == 0, run.output
    assert run.output.count("checked:") == processes * len(checks), run.output
    assert not any(report.faults for report in run.reports)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_nothing_is_recorded_while_autograd_looks_on() -> None:
    graphs = CudaGraphs()
    tensor = torch.ones(2, requires_grad=True)
    assert graphs.run(lambda x: (x * 2,), (tensor,), key="double") is None
    with torch.no_grad(), torch.autograd.detect_anomaly(check_nan=False):
        assert graphs.run(lambda x: (x * 2,), (tensor,), key="double") is None
    assert graphs.num_recordings == 0 and not graphs.failed
