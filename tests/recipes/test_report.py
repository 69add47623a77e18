"""The end of a run: commands for its own data, settings, and what must not fail it."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.coco_files import write_coco
from helpers.short_runs import arguments, command_here, train_here, write_data
from samft.checkpoints.top_k import Checkpoint
from samft.commands import shell_command
from samft.config import TrainConfig, parse_config
from samft.recipes.report import RunReport, describe_environment, split_by_default
from samft.training.custom import CustomParts

pytestmark = pytest.mark.run


def short(data: Path, folder: Path, **changes: object) -> list[str]:
    return arguments(data, folder, steps=1, metrics_interval=1, **changes)


def commands(data: Path, **changes: object) -> list[list[str]]:
    """The commands of a run in `a run`, as a shell would split them."""
    config = parse_config(short(data, Path("a run"), **changes))
    nothing: Any = SimpleNamespace(objects=SimpleNamespace(read=lambda step: None))
    links = [path for path in (data / "val").glob("*") if path.is_symlink()]
    val: Any = SimpleNamespace(
        num_images=len(links),
        path=links.__getitem__,
        file_name=lambda i: links[i].name,
        index=SimpleNamespace(has_files=True),
    )
    splits: Any = SimpleNamespace(val=SimpleNamespace(subset=val))
    best = Checkpoint("1-0.50.ckpt", 1, 0.5)
    report = RunReport(config, Path("a run"), splits, nothing, best, CustomParts())
    return [shlex.split(line) for line in report.next_commands()]


def test_commands_name_the_validation_split(tmp_path: Path) -> None:
    write_coco(tmp_path, 1, split="val")
    evaluate, predict, _ = commands(tmp_path)
    best = ["--checkpoint", "a run/1-0.50.ckpt"]
    assert evaluate == [
        *shlex.split(shell_command("evaluate", *best)),
        *("--data_root", str(tmp_path), "--split", "val"),
    ]
    assert predict == [
        *(*shlex.split(shell_command("predict", *best)), "--images", str(tmp_path / "val")),
        *("--annotations", str(tmp_path / "val/_annotations.coco.json")),
        *("--output_dir", "a run/predictions"),
    ]


def test_commands_open_the_links_that_the_run_opened(tmp_path: Path) -> None:
    write_coco(tmp_path, 1, split="val")
    assert "--allow_links" not in commands(tmp_path)[1]
    evaluate, predict, _ = commands(tmp_path, allow_links="/pool")
    assert evaluate[-2:] == ["--allow_links", "/pool"]
    assert predict[-4:-2] == ["--allow_links", "/pool"]
    (tmp_path / "val" / "link.png").symlink_to("image_0.png")
    assert commands(tmp_path, allow_links="/pool")[1][-3] == f"/pool,{tmp_path}"


def test_commands_name_the_files_that_were_given(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "other", 1, split="v")
    given = {"val_annotations": file, "val_images": file.parent, "category_names": "a b,c"}
    evaluate = commands(tmp_path, **given)[0]
    files = ["--annotations", str(file), "--images", str(file.parent)]
    assert evaluate[evaluate.index("--checkpoint") + 2 :] == [*files, "--category_names", "a b,c"]


def test_held_out_images_are_in_the_training_split(tmp_path: Path) -> None:
    write_coco(tmp_path, 1)
    evaluate = commands(tmp_path, val_fraction=0.5)[0]
    split = ["--data_root", str(tmp_path), "--split", "train"]
    assert evaluate[evaluate.index("--checkpoint") + 2 :] == [*split, "--val_fraction", "0.5"]


def test_a_page_that_fails_is_no_failure_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(page: object) -> str:
        raise RuntimeError("a bug of the page")

    monkeypatch.setattr("samft.recipes.report.render", fail)
    data = write_data(tmp_path / "data", num_train=2, num_val=2)
    assert command_here(short(data, tmp_path / "run")) == 0
    log = (tmp_path / "run/train.log").read_text()
    assert "report.html could not be written" in log and "a bug of the page" in log
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"


def test_a_fresh_start_sets_the_report_aside(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", num_train=2, num_val=2)
    argv = short(data, tmp_path / "run")
    train_here(argv)
    first = (tmp_path / "run/report.html").read_bytes()
    log = (tmp_path / "run/train.log").read_text()
    shown = (shell_command("evaluate"), shell_command("predict"), "from samft import load_sam;")
    assert all(f"\n  {beginning} " in log for beginning in shown)
    train_here(argv)  # finished: nothing is done again
    assert (tmp_path / "run/report.html").read_bytes() == first
    train_here([*argv, "--resume", "never"])
    aside = tmp_path / "run/previous-1"
    assert (aside / "report.html").read_bytes() == first and (aside / "objects.json").exists()
    assert (tmp_path / "run/report.html").read_bytes() != first  # the time stands in it


def test_settings_are_told_apart_by_their_default() -> None:
    changed, unchanged = split_by_default(TrainConfig(model_type="vit_b", steps=7))
    assert changed == [("model_type", "vit_b", ""), ("steps", 7, 1500)]
    assert len(changed) + len(unchanged) == len(vars(TrainConfig()))
    assert ("learning_rate", 1e-4) in unchanged


def test_the_environment_names_versions_and_device() -> None:
    environment = dict(describe_environment(TrainConfig(), torch.device("cpu")))
    assert environment["torch"].startswith(torch.__version__.split("+")[0])
    assert environment["amp"] == "off" and environment["device"].startswith("CPU")
