"""The loss of docs/python.md: at most 20 lines, the same on one and two processes, and resumed."""

import sys
from pathlib import Path

import pytest

from helpers import REPOSITORY
from helpers.documentation import read_blocks
from helpers.own_datasets import Discs, write_as_coco
from helpers.preloaded import run_preloaded
from helpers.short_runs import (
    COMMAND_SECONDS,
    clean_environment,
    largest_difference,
    read_metrics,
)

PAGE = REPOSITORY / "docs" / "python.md"
SMALL = {
    '"DATASET"': '"data"',
    '"vit_b"': '"vit_tiny"',
    'output_dir="runs/tversky")': (
        'output_dir=OUT, image_size=64, steps=4, metrics_interval=2, num_workers=0, device="cpu", '
        "batch_size=BATCH, stop_after=STOP)"
    ),
}
HEADER = "import os\nOUT, BATCH = os.environ['OUT'], int(os.environ['BATCH'])\n"
HEADER += "STOP = int(os.environ['STOP']) or None\n"


def read_script() -> str:
    blocks = read_blocks(PAGE.read_text(), page=PAGE.name)
    (text,) = [block.text for block in blocks if "def tversky_losses" in block.text]
    return text


def run_script(name: str, *, processes: int = 1, stop: int = 0) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    line = [sys.executable, *(launcher if processes > 1 else []), "tversky.py"]
    variables = clean_environment(OUT=name, BATCH=str(2 // processes), STOP=str(stop))
    code, output = run_preloaded(line, variables, timeout=COMMAND_SECONDS)
    assert (code == 0) == (not stop), output
    return output


def test_the_loss_of_the_page_has_20_lines() -> None:
    lines = [line for line in read_script().splitlines() if line.strip()]
    assert 10 < len(lines) <= 20


@pytest.mark.processes
def test_the_loss_of_the_page_on_one_and_two_processes_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = read_script()
    for large, small in SMALL.items():
        assert text.count(large) == 1
        text = text.replace(large, small)
    (tmp_path / "tversky.py").write_text(HEADER + text)
    for split, seed in (("train", 0), ("val", 1)):
        write_as_coco(Discs(6, seed=seed), tmp_path / "data", split=split)
    assert "'per_mask_iou': " in run_script("one")
    run_script("two", processes=2)
    assert "RunStopped: stop_after 3: saved after step 3 of 4" in run_script("resumed", stop=3)
    run_script("resumed")
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    assert largest_difference(one, resumed) == 0.0
    assert largest_difference(one, two) < 1e-3  # Adam makes much of rounding
    losses = [[line["loss"] for line in read_metrics(run, "val")] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # The constants of the script are a part of the loss.
    other = (tmp_path / "tversky.py").read_text().replace("0.7, 0.3", "0.5, 0.5")
    (tmp_path / "tversky.py").write_text(other)
    assert "holds a run of another configuration" in run_script("resumed", stop=1)
