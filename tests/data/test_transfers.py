"""Copies beside computation: on pretended GPUs, and none at all on a CPU."""

from pathlib import Path

import pytest
import torch

from helpers.pretend_cuda.runs import needs_harness, run_with_pretended_gpus
from helpers.trainers import val_batches
from samft.data.transfers import Transfers, send_to

CPU = torch.device("cpu")


@pytest.mark.processes
@needs_harness
def test_a_gpu_copies_while_it_computes_and_nobody_reads_too_early(tmp_path: Path) -> None:
    run = run_with_pretended_gpus("helpers.pretended_transfers", [], folder=tmp_path)
    assert run.code == 0, run.output
    assert run.output.count("checked:") == 6, run.output


def test_on_a_cpu_nothing_is_copied() -> None:
    (batch,), tensor = val_batches(1), torch.ones(3)
    transfers = Transfers(CPU)
    assert transfers.to_device(batch)() is batch
    assert transfers.to_host(tensor)() is tensor
    assert send_to(CPU, tensor) is tensor
