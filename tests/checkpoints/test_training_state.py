"""The state to resume from: what is read back after every kind of damage and every kill."""

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import TESTS
from samft.checkpoints import training_state
from samft.checkpoints.top_k import TopK
from samft.checkpoints.training_state import (
    FORMAT_VERSION,
    LAST_NAME,
    load_latest,
    load_state_file,
    load_verified_state,
    quarantine_damaged,
    run_dir_of,
    save_last,
)
from samft.errors import CheckpointError
from samft.runtime import files
from samft.training.engine import Progress

PREVIOUS = Path("previous") / LAST_NAME
FIXTURE = TESTS / "fixtures" / "last-format-1.ckpt"


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_last(folder, {"step": step, "model": {"w": torch.full((300,), float(step))}})


def step_of(state: dict[str, Any]) -> int:
    """The step of a state, after a look at the tensor that goes with it."""
    assert state["format"] == FORMAT_VERSION
    assert torch.equal(state["model"]["w"], torch.full((300,), float(state["step"])))
    return int(state["step"])


def newest_step(folder: Path) -> int:
    newest = load_latest(folder)
    assert newest is not None
    return step_of(newest.state)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "model": {"w": torch.randn(3)},
        "progress": {"step": 7, "window": [0.5, 1.0]},
        "random": torch.get_rng_state(),
    }
    save_last(tmp_path, state)
    newest = load_latest(tmp_path)
    assert newest is not None
    expected = {"format": FORMAT_VERSION, **state}
    torch.testing.assert_close(newest.state, expected, rtol=0, atol=0)
    assert (newest.path, newest.passed_over) == (tmp_path / LAST_NAME, [])


def test_a_folder_without_a_state_gives_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None


def test_the_previous_state_is_kept_and_can_be_verified(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert not (tmp_path / PREVIOUS).exists()
    for step in range(2, 8):
        save(tmp_path, step)
        assert step_of(load_verified_state(tmp_path / LAST_NAME)) == step
        assert step_of(load_verified_state(tmp_path / PREVIOUS)) == step - 1
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "last.json", "previous"]
    assert sorted(os.listdir(tmp_path / "previous")) == ["last.ckpt", "last.json"]


def test_without_links_the_state_before_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    save(tmp_path, 1, 2, 3)
    assert step_of(load_verified_state(tmp_path / PREVIOUS)) == 2


def flip_a_bit(whole: bytes) -> bytes:
    middle = whole.index(torch.full((300,), 2.0).numpy().tobytes()) + 600
    return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]


Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda whole: whole[:-1], "last.ckpt is damaged: its SHA-256 is not the one in"),
    "halved": (lambda whole: whole[: len(whole) // 2], "is damaged: its SHA-256"),
    "empty": (lambda whole: b"", "last.ckpt is empty"),
    "zeroed": (lambda whole: bytes(len(whole)), "is damaged: its SHA-256"),
    "garbage": (lambda whole: b"PK\3\4 and so on" * 99, "is damaged: its SHA-256"),
    "one bit": (flip_a_bit, "is damaged: its SHA-256"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_instead_of_a_damaged_state_the_one_before_is_used(tmp_path: Path, kind: str) -> None:
    damage, reason = DAMAGES[kind]
    save(tmp_path, 1, 2)
    last = tmp_path / LAST_NAME
    last.write_bytes(damage(last.read_bytes()))
    newest = load_latest(tmp_path)
    assert newest is not None
    assert (step_of(newest.state), newest.path) == (1, tmp_path / PREVIOUS)
    assert len(newest.passed_over) == 1 and reason in newest.passed_over[0]
    with pytest.raises(CheckpointError, match="^resume: ") as caught:
        load_state_file(last)
    assert reason in str(caught.value)


def test_a_flipped_bit_is_not_found_by_loading_alone(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    last = tmp_path / LAST_NAME
    last.write_bytes(flip_a_bit(last.read_bytes()))
    (tmp_path / "last.json").unlink()
    assert torch.load(last, weights_only=True)["model"]["w"].unique().numel() == 2


@pytest.mark.parametrize("sidecar", [None, "", "{", "[]", "{}", '{"sha256": null}'])
def test_without_a_readable_sidecar_the_checked_one_before_is_better(
    tmp_path: Path, sidecar: str | None
) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "last.json").unlink()
    if sidecar is not None:
        (tmp_path / "last.json").write_text(sidecar)
    newest = load_latest(tmp_path)
    assert newest is not None
    assert (step_of(newest.state), newest.path) == (1, tmp_path / PREVIOUS)
    assert "last.ckpt has no last.json beside it to be checked" in newest.passed_over[0]


def test_an_absent_state_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / LAST_NAME).unlink()
    newest = load_latest(tmp_path)
    assert newest is not None and step_of(newest.state) == 1
    assert newest.passed_over == [f"there is no file {tmp_path / LAST_NAME}."]


def test_an_older_version_state_without_a_sidecar_is_used_and_reported(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "last.json").unlink()
    newest = load_latest(tmp_path)
    assert newest is not None
    assert (step_of(newest.state), newest.path) == (1, tmp_path / LAST_NAME)
    assert len(newest.passed_over) == 1 and "has no last.json" in newest.passed_over[0]
    save(tmp_path, 2)
    for path, step in ((LAST_NAME, 2), (PREVIOUS, 1)):  # from now on both can be checked
        assert step_of(load_verified_state(tmp_path / path)) == step


def test_when_no_state_is_good_each_is_listed_with_its_reason(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "last.json").unlink()
    (tmp_path / LAST_NAME).write_bytes(b"garbage")
    (tmp_path / PREVIOUS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="--resume never") as caught:
        load_latest(tmp_path)
    last, previous = tmp_path / LAST_NAME, tmp_path / PREVIOUS
    assert str(caught.value).splitlines()[1:4] == [
        f"  - {last} has no last.json beside it to be checked against.",
        f"  - {previous} is empty.",
        f"  - {last} cannot be read: it is damaged, or no last.ckpt of samft; weights of other "
        "programs go into checkpoint_path.",
    ]


class Bomb:
    """Unpickling it would make a folder."""

    def __init__(self, planted: Path) -> None:
        self.planted = planted

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.planted),)


@pytest.mark.parametrize("checked", [True, False])
def test_a_state_that_would_run_code_is_refused(tmp_path: Path, checked: bool) -> None:
    planted, run = tmp_path / "planted", tmp_path / "run"
    run.mkdir()
    save_last(run, {"extra": Bomb(planted)})
    if not checked:
        (run / "last.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_latest(run)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state_file(run / LAST_NAME)
    assert not planted.exists()
    torch.load(run / LAST_NAME, weights_only=False)  # and yet the bomb was live
    assert planted.exists()


@pytest.mark.parametrize(
    "content", [{"w": torch.ones(1)}, {"format": FORMAT_VERSION + 1}, [1, 2], torch.ones(2)]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="is not the training state of a run"):
        load_state_file(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"resume: there is no file .*b\.ckpt"):
        load_state_file(tmp_path / "b.ckpt")


def test_a_named_state_without_a_sidecar_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    assert step_of(load_state_file(tmp_path / LAST_NAME)) == 1
    assert caplog.messages == []
    (tmp_path / "last.json").unlink()
    assert step_of(load_state_file(tmp_path / LAST_NAME)) == 1
    assert len(caplog.messages) == 1 and "It is used without this check." in caplog.messages[0]


def test_the_state_before_belongs_to_the_same_run(tmp_path: Path) -> None:
    assert run_dir_of(tmp_path / "run" / LAST_NAME) == tmp_path / "run"
    assert run_dir_of(tmp_path / "run" / PREVIOUS) == tmp_path / "run"


def test_a_run_in_a_folder_called_previous_is_its_own(tmp_path: Path) -> None:
    run = tmp_path / "previous"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert run_dir_of(run / LAST_NAME) == run


# Kills


class Killed(BaseException):
    """In the place of SIGKILL: nobody catches it."""


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before its nth change of a name."""
    calls = itertools.count(1)

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if next(calls) >= number:
                raise Killed
            return function(*args, **options)

        return call

    for name in ("replace", "link", "unlink"):
        monkeypatch.setattr(os, name, deadly(getattr(os, name)))
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a kill is no power cut
    for module in (files, training_state):
        monkeypatch.setattr(module, "write_json", deadly(files.write_json))


def killed_in_save(folder: Path, step: int, *, number: int) -> bool:
    """Saves, and dies at the nth change; whether it came so far."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(number, patch)
        try:
            save(folder, step)
        except Killed:
            return True
    return False


def one(folder: Path) -> None:
    save(folder, 8)


def two(folder: Path) -> None:
    save(folder, 7, 8)


def many(folder: Path) -> None:
    save(folder, *range(1, 9))


def of_an_older_version(folder: Path) -> None:
    save(folder, 8)
    (folder / "last.json").unlink()


def after_a_fallback(folder: Path) -> None:
    save(folder, 8, 9)
    (folder / LAST_NAME).write_bytes(b"garbage")
    quarantine_damaged(folder, used=folder / PREVIOUS)


STARTS = (one, two, many, of_an_older_version, after_a_fallback)


@pytest.mark.parametrize("start", STARTS)
def test_killed_at_any_point_the_old_or_the_new_state_is_there(
    tmp_path: Path, start: Callable[[Path], None]
) -> None:
    first = tmp_path / "start"
    first.mkdir()
    start(first)
    assert newest_step(first) == 8
    steps = []
    for number in itertools.count(1):
        folder = shutil.copytree(first, tmp_path / str(number))
        if not killed_in_save(folder, 10, number=number):
            break
        steps.append(newest_step(folder))
        if (folder / PREVIOUS).exists():  # it can be checked at any moment, too
            assert step_of(load_verified_state(folder / PREVIOUS)) in (7, 8)
        save(folder, 11)
        assert step_of(load_verified_state(folder / LAST_NAME)) == 11
        assert step_of(load_verified_state(folder / PREVIOUS)) == steps[-1]
    assert len(steps) >= 3
    assert steps == sorted(steps) and set(steps) <= {8, 10}
    assert newest_step(folder) == 10


@pytest.mark.parametrize("start", STARTS)
def test_killed_at_the_same_point_again_and_again_nothing_is_lost(
    tmp_path: Path, start: Callable[[Path], None]
) -> None:
    first = tmp_path / "start"
    first.mkdir()
    start(first)
    for number in itertools.count(1):
        folder, expected = shutil.copytree(first, tmp_path / str(number)), 8
        for step in range(10, 16):
            if not killed_in_save(folder, step, number=number):
                expected = step
            assert newest_step(folder) in (expected, step)
            expected = newest_step(folder)
        if expected == 15:
            break
    assert number > 3


def test_a_full_disk_leaves_the_state_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fill_up(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos")

    monkeypatch.setattr(torch, "save", fill_up)
    with pytest.raises(OSError, match="the disk may be full"):
        save(tmp_path, 3)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# Going on from the state before


def test_after_a_fallback_saving_keeps_the_good_state(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / LAST_NAME).write_bytes(b"garbage")
    newest = load_latest(tmp_path)
    assert newest is not None
    quarantine_damaged(tmp_path, used=newest.path)
    assert (tmp_path / "last.ckpt.damaged").read_bytes() == b"garbage"
    assert newest_step(tmp_path) == 1
    save(tmp_path, 3)
    assert step_of(load_verified_state(tmp_path / LAST_NAME)) == 3
    assert step_of(load_verified_state(tmp_path / PREVIOUS)) == 1


def test_without_quarantine_a_damaged_state_would_replace_the_good_one(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / LAST_NAME).write_bytes(b"garbage")
    save(tmp_path, 3)
    assert (tmp_path / PREVIOUS).read_bytes() == b"garbage"


def test_a_good_state_is_not_quarantined(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    quarantine_damaged(tmp_path, used=tmp_path / LAST_NAME)
    assert newest_step(tmp_path) == 2


def test_a_sidecar_names_what_is_there(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    for path in (tmp_path / LAST_NAME, tmp_path / PREVIOUS):
        written = json.loads(path.with_suffix(".json").read_text())
        assert written == {"format": FORMAT_VERSION, "sha256": [files.sha256_of(path)]}


def test_a_state_that_rots_is_not_vouched_for_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    last = tmp_path / LAST_NAME
    last.write_bytes(flip_a_bit(last.read_bytes()))
    save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_verified_state(tmp_path / PREVIOUS)


def test_a_save_succeeds_even_if_its_final_sidecar_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    replaced = []
    replace, write = os.replace, files.write_json

    def write_before_the_last(path: Path, value: Any) -> None:
        if tmp_path / LAST_NAME in replaced:
            raise OSError(errno.ENOSPC, "no room")
        write(path, value)

    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append(b), replace(a, b)))
    monkeypatch.setattr(training_state, "write_json", write_before_the_last)
    save(tmp_path, 2)
    assert newest_step(tmp_path) == 2


# Files that the first version left


def test_a_state_of_the_first_version_is_read(tmp_path: Path) -> None:
    """The fixture was made with the code of commit 2305f6a, the first, by this:

    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    config = TrainConfig(data_root="data", model_type="vit_tiny", checkpoint_path="auto")
    progress = Progress(step=20, position=21, skipped_steps=1, baseline={"per_mask_iou": 0.5})
    state = {
        "format": FORMAT_VERSION,
        "config": asdict(config),
        "global_batch": 1,
        "fingerprint": "abc",
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu", enabled=False).state_dict(),
        "progress": asdict(progress),
        "best": [{"name": "20-0.75.ckpt", "step": 20, "score": 0.75}],
    }
    save_tensors(Path("last-format-1.ckpt"), state)
    """
    shutil.copy(FIXTURE, tmp_path / LAST_NAME)
    newest = load_latest(tmp_path)
    assert newest is not None and len(newest.passed_over) == 1
    state = newest.state
    assert not {"pending", "bad_images"} & set(state["progress"])
    progress = Progress(**state["progress"])
    assert (progress.step, progress.position, progress.skipped_steps) == (20, 21, 1)
    assert (progress.baseline, progress.pending) == ({"per_mask_iou": 0.5}, {})
    assert TopK.from_list(state["best"])[0].score == 0.75
    model = torch.nn.Linear(2, 1)
    model.load_state_dict(state["model"])
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(state["optimizer"])
    first = optimizer.state[model.weight]
    torch.testing.assert_close(first["exp_avg"], torch.full((1, 2), 0.1))
