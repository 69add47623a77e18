"""Runs in folders that hold files of others, too: those stay as they are, whatever the run does."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.cached_runs import cached_arguments
from helpers.short_runs import a_config, arguments, command_here, train_here, write_data
from samft import evaluate, predict
from samft.cli import run_command
from samft.settings import to_yaml

pytestmark = pytest.mark.run

MINE = {
    "cat.png": b"\x89PNG my training image",
    "model.ckpt": b"my weights",
    "model.json": b"{}",
    "notes.yaml": b"a: 1",
    ".film.mkv.abcd1234.part": b"half a film",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=3, num_val=2)


def short(data: Path, folder: Path, **changes: Any) -> list[str]:
    return arguments(data, folder, **{"steps": 2, "metrics_interval": 1, **changes})


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def files_of(folder: Path, *, without: tuple[str, ...] = (".lock",)) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {name: content for name, content in files.items() if name not in without}


def test_files_of_others_stay_through_a_start_a_resume_and_a_fresh_start(data, tmp_path):
    run = tmp_path / "run"
    write_files(run, MINE)
    assert command_here(short(data, run, stop_after=1)) == 75
    train_here(short(data, run))
    first = files_of(run)
    assert {name: first[name] for name in MINE} == MINE
    train_here(short(data, run, resume="never", seed=1))
    last = files_of(run)
    assert {name: last[name] for name in MINE} == MINE
    archived = {name.removeprefix("previous-1/"): c for name, c in last.items() if "s-1/" in name}
    assert archived == {name: content for name, content in first.items() if name not in MINE}


@pytest.mark.parametrize(
    "name", ["before.png", "train.log", "summary.json", "last.ckpt", "metrics.jsonl", "config.yaml"]
)
def test_a_name_that_is_taken_is_refused_and_nothing_changed(name, data, tmp_path, capsys):
    write_files(tmp_path, {name: b"mine"})
    assert command_here(short(data, tmp_path, resume="never")) == 2
    assert f"{tmp_path} holds {name}, which a run would overwrite" in capsys.readouterr().err
    assert files_of(tmp_path, without=(".lock", "status.json")) == {name: b"mine"}


def test_a_configuration_of_the_user_is_left_as_it_is(data, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    text = "# mine\n" + to_yaml(a_config(data, tmp_path, steps=1))
    path.write_text(text)
    for _ in range(2):  # a start, and a finished run
        assert command_here(["--config", str(path)]) == 0
        assert path.read_text() == text
    assert command_here(["--config", str(path), "--resume", "never", "--seed", "5"]) == 2
    assert "config.yaml" in capsys.readouterr().err and path.read_text() == text


def test_a_copy_of_another_runs_configuration_is_left_as_it_is(data, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(a_config(data, tmp_path / "other", steps=1)))
    before = path.read_text()
    assert command_here(["--config", str(path), "--output_dir", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err and path.read_text() == before


@pytest.mark.parametrize(
    "changes",
    [{"checkpoint_path": "gone.pth"}, {"cache_embeddings": "on", "cache_max_gib": 1e-6}],
    ids=["no weights", "no room for embeddings"],
)
def test_a_start_that_is_refused_changes_nothing(changes, data, tmp_path, capsys):
    run = tmp_path / "run"
    train_here(short(data, run))
    before = files_of(run)
    changes = {"resume": "never", "cache_dir": tmp_path / "cache", **changes}
    assert command_here(cached_arguments(data, run, steps=3, metrics_interval=1, **changes)) == 2
    assert files_of(run) == before
    assert not (tmp_path / "cache").exists()


def test_a_damaged_by_product_does_not_end_a_finished_run(data, tmp_path, capsys):
    train_here(short(data, tmp_path))
    garbage = {"before.png": b"", "objects.json": b"[" * 100_000, "summary.json": b"\0", **{}}
    write_files(tmp_path, garbage)
    assert command_here(short(data, tmp_path)) == 0
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    assert "before_after.png was not drawn" in stderr and "objects.json is damaged" in stderr
    assert json.loads((tmp_path / "summary.json").read_text())["best_step"] is not None


def test_outputs_of_other_commands_replace_only_their_own(data, tmp_path, capsys):
    train_here(short(data, tmp_path / "run"))
    (checkpoint,) = (path for path in (tmp_path / "run").glob("*-*.ckpt"))
    scores, out = tmp_path / "scores.json", tmp_path / "out"
    evaluation = ["--checkpoint", str(checkpoint), "--data_root", str(data), "--output"]
    prediction = ["--checkpoint", str(checkpoint), "--images", str(data / "val" / "image_0.png")]
    prediction += ["--box", "2,2,20,20", "--masks", "--overlays", "--output_dir", str(out)]
    small = ["--num_workers", "0", "--device", "cpu"]
    for _ in range(2):
        assert run_command(evaluate.main, [*evaluation, str(scores), *small]) == 0
        assert run_command(predict.main, [*prediction, *small]) == 0
    for name in ("results.json", "images.json", "masks/image_0.png", "overlays/image_0.jpg"):
        before = (out / name).read_bytes()
        (out / name).write_bytes(b"[]")
        assert run_command(predict.main, [*prediction, *small]) == 2, name
        assert f"{out / name} exists" in capsys.readouterr().err
        assert (out / name).read_bytes() == b"[]"
        (out / name).write_bytes(before)
    for path in (scores, tmp_path / "scores.objects.csv"):
        before = path.read_bytes()
        path.write_bytes(b'{"mine": 1}')
        assert run_command(evaluate.main, [*evaluation, str(scores), *small]) == 2
        assert f"{path} exists" in capsys.readouterr().err
        assert path.read_bytes() == b'{"mine": 1}'
        path.write_bytes(before)
