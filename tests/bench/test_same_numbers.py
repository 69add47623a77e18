"""What `benchmarks.same_numbers` compares: files of a few values, without any training."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import same_numbers
from benchmarks.run_contents import compare, read_metrics, read_scores, read_weights

LINES = [
    {"step": 0, "split": "val", "loss": 0.5, "images_per_second": 3.0},
    {"step": 5, "split": "train", "loss": 0.25, "peak_memory_gib": 1.0, "skipped_steps": 0},
    {"step": 5, "split": "val", "loss": None, "masks_per_second": 7.0},
]
OBJECTS = "checkpoint,object_id,iou_actual\nrun/last.ckpt,1,0.5\nrun/last.ckpt,2,0.75\n"
SCORES = {"seconds": 1.5, "iou": {"mean": 0.625}, "samft_version": "1.0", "others": []}


def write_state(path: Path, *, weight: float = 1.0, moment: float = 2.0, **changes: Any) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.tensor([moment])}}, "param_groups": [{"lr": 0.1}]}
    state = {
        "config": {"output_dir": str(path)},
        "model": {"decoder.weight": torch.tensor([0.0, weight])},
        "optimizer": optimizer,
        "scaler": {},
        "progress": {"wall_seconds": 1.0},
        **changes,
    }
    torch.save(state, path / "last.ckpt")
    torch.save(state["model"], path / "5-0.50.ckpt")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_scores(path: Path, *, objects: str = OBJECTS, **changes: Any) -> None:
    (path / "scores.objects.csv").write_text(objects)
    (path / "scores.json").write_text(json.dumps({**SCORES, **changes}))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that left the same."""
    both = tmp_path / "before", tmp_path / "after"
    for folder in both:
        folder.mkdir()
        write_state(folder)
        write_lines(folder, LINES)
        write_scores(folder)
    return both


def verdict(read: Callable[[Path], Any], folders: tuple[Path, Path]) -> str:
    return compare(*map(read, folders))


def test_same_files_are_equal_and_counted(folders) -> None:
    for read, count in (
        (read_weights, "2 checkpoints, 3 tensors"),
        (read_metrics, "3 lines of metrics"),
        (read_scores, "1 scores, 2 objects"),
    ):
        assert read(folders[0]).count == count
        assert verdict(read, folders) == "equal"


def test_changed_weight_is_named_with_its_size(folders) -> None:
    write_state(folders[1], weight=1.0 + 2**-20)
    result = verdict(read_weights, folders)
    assert result == "5-0.50.ckpt: decoder.weight: up to 9.54e-07 apart (and 1 more)"


def test_changed_optimizer_is_named(folders) -> None:
    write_state(folders[1], moment=3.0)
    result = verdict(read_weights, folders)
    assert result == "last.ckpt: optimizer: state: 0: exp_avg: up to 1 apart"


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        ({"decoder.weight": torch.zeros(3)}, "before torch.float32 [2], after torch.float32 [3]"),
        (
            {"decoder.weight": torch.tensor([0.0, 1.0]).half()},
            "before torch.float32 [2], after torch.float16 [2]",
        ),
        ({"moved.weight": torch.tensor([0.0, 1.0])}, "only before"),
    ],
    ids=["shape", "type", "name"],
)
def test_other_tensors_are_no_equal_ones(folders, model, difference: str) -> None:
    write_state(folders[1], model=model)
    assert verdict(read_weights, folders).startswith(f"5-0.50.ckpt: decoder.weight: {difference}")


def test_settings_and_clocks_of_a_state_may_differ(folders) -> None:
    write_state(folders[1], config={"batch_size": 9}, progress={"wall_seconds": 2.0}, format=2)
    assert verdict(read_weights, folders) == "equal"


def test_checkpoint_of_another_score_is_named(folders) -> None:
    (folders[1] / "5-0.50.ckpt").rename(folders[1] / "5-0.51.ckpt")
    result = verdict(read_weights, folders)
    assert result == "5-0.50.ckpt: decoder.weight: only before (and 1 more)"


def test_missing_line_is_named(folders) -> None:
    write_lines(folders[1], LINES[:-1])
    assert verdict(read_metrics, folders).startswith("metrics.jsonl: line 3, step 5: step: only b")
    assert verdict(read_metrics, folders[::-1]).startswith("metrics.jsonl: line 3, step 5: step: ")


def test_changed_loss_is_named_and_a_rate_is_not(folders) -> None:
    write_lines(folders[1], [{**LINES[0], "images_per_second": 4.0}, *LINES[1:]])
    assert verdict(read_metrics, folders) == "equal"
    write_lines(folders[1], [{**LINES[0], "loss": 0.5 + 2**-53}, *LINES[1:]])
    result = verdict(read_metrics, folders)
    assert result == "metrics.jsonl: line 1, step 0: loss: before 0.5, after 0.5000000000000001"


def test_value_that_is_not_finite_any_more_is_named(folders) -> None:
    write_lines(folders[1], [{**LINES[0], "loss": None}, *LINES[1:]])
    assert verdict(read_metrics, folders).endswith("loss: before 0.5, after None")


def test_changed_scores_are_named(folders) -> None:
    write_scores(folders[1], seconds=9.0, samft_version="2.0")
    assert verdict(read_scores, folders) == "equal"
    write_scores(folders[1], iou={"mean": 0.5})
    assert verdict(read_scores, folders) == "scores.json: iou: mean: before 0.625, after 0.5"
    write_scores(folders[1], objects=OBJECTS.replace("0.75", "0.750"))
    result = verdict(read_scores, folders)
    assert result == "objects.csv: row: 1: iou_actual: before '0.75', after '0.750'"


def test_nothing_on_both_sides_is_not_equal(folders) -> None:
    for folder in folders:
        write_state(folder, model={}, optimizer={"param_groups": [{"lr": 0.1}]})
        write_lines(folder, [])
        write_scores(folder, objects=OBJECTS.splitlines()[0] + "\n")
    for read in (read_weights, read_metrics, read_scores):
        assert verdict(read, folders) == "nothing was found to compare"


def a_side(folder: Path) -> same_numbers.Side:
    (folder / "code" / "samft").mkdir(parents=True)
    (folder / "code" / "samft" / "__init__.py").touch()
    (folder / "code" / "samft" / "demo.py").write_text("import samft.errors")
    return same_numbers.Side(folder / "code", folder / "runs")


def test_side_runs_its_own_code_only(tmp_path: Path) -> None:
    # An installed samft has a module samft.errors; this one has not.
    side = a_side(tmp_path)
    side.prepare()
    with pytest.raises(SystemExit, match=r"(?s)No module named 'samft.errors'.*ended with 1"):
        side.samft("demo")


def test_other_code_is_refused(tmp_path: Path) -> None:
    side = a_side(tmp_path)
    (side.code / "samft" / "__init__.py").write_text("__file__ = '/elsewhere/samft.py'")
    with pytest.raises(SystemExit, match="/elsewhere/samft.py would be run"):
        side.prepare()


def git(*arguments: str, folder: Path) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *name, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_worktree_is_removed_also_after_an_error(tmp_path: Path, monkeypatch) -> None:
    repository, folder = tmp_path / "repository", tmp_path / "code"
    git("init", str(repository), folder=tmp_path)
    (repository / "a.txt").write_text("a")
    git("add", ".", folder=repository)
    git("commit", "--message", "a", folder=repository)
    monkeypatch.setattr(same_numbers, "_TOP", repository)
    with pytest.raises(KeyError), same_numbers.checked_out("HEAD", folder) as top:
        assert (top / "a.txt").read_text() == "a"
        raise KeyError
    assert not folder.exists()
    assert len(git("worktree", "list", folder=repository).splitlines()) == 1
    with pytest.raises(SystemExit, match="no-such could not"):
        same_numbers.checked_out("no-such", folder).__enter__()


@pytest.mark.parametrize("verdicts", [("equal", "equal"), ("equal", "up to 1 apart")])
def test_exit_code_and_table(verdicts, monkeypatch, capsys) -> None:
    rows = [("demo", 1, "3 tensors", verdict) for verdict in verdicts]
    monkeypatch.setattr(sys, "argv", ["same_numbers", "--before", "HEAD"])
    monkeypatch.setattr(same_numbers.Side, "prepare", lambda self: None)
    monkeypatch.setattr(same_numbers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(same_numbers, "checked_out", lambda revision, folder: nullcontext(folder))
    monkeypatch.setattr(same_numbers, "compare_all", lambda before, after, quick: iter(rows))
    assert same_numbers.main() == (verdicts[1] != "equal")
    out = capsys.readouterr().out
    assert f"| demo | 1 | 3 tensors | {verdicts[1]} |" in out
    assert ("all equal" in out) == (verdicts[1] == "equal")
