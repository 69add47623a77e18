"""The best k files and their sidecars, and the commit that they name."""

import hashlib
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import samft
from samft.checkpoints.top_k import Checkpoint, TopK, git_commit, save_tensors
from samft.checkpoints.training_state import load_latest, save_last


def save_if_better(top_k: TopK, step: int, score: float) -> bool:
    state = {"weight": torch.full((2,), float(step), requires_grad=True)}
    return top_k.save_if_better(
        state, score=score, sidecar={"step": step, "metrics": {"iou": score}}
    )


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def pairs(*stems: str) -> list[str]:
    return sorted(f"{stem}.{kind}" for stem in stems for kind in ("ckpt", "json"))


def test_the_best_k_stay_in_order_and_the_others_are_deleted(tmp_path: Path) -> None:
    top_k = TopK(tmp_path, k=2)
    scores = [(0, 0.5), (10, 0.4), (20, 0.7), (30, 0.6), (40, 0.45)]
    saved = [save_if_better(top_k, step, score) for step, score in scores]
    assert saved == [True, True, True, True, False]
    assert [(checkpoint.step, checkpoint.score) for checkpoint in top_k.best] == [
        (20, 0.7),
        (30, 0.6),
    ]
    assert names_in(tmp_path) == pairs("20-0.70", "30-0.60")


def test_a_checkpoint_is_deleted_only_when_the_better_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top_k = TopK(tmp_path, k=1)
    save_if_better(top_k, 0, 0.5)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("samft.checkpoints.top_k.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        save_if_better(top_k, 10, 0.6)
    assert set(pairs("0-0.50")) <= set(names_in(tmp_path))
    assert [checkpoint.step for checkpoint in top_k.best] == [0]


def test_ties_keep_the_earlier(tmp_path: Path) -> None:
    top_k = TopK(tmp_path, k=1)
    assert save_if_better(top_k, 10, 0.5)
    assert not save_if_better(top_k, 20, 0.5)
    assert save_if_better(top_k, 30, 0.5 + 1e-9)  # a name rounds, a score does not
    assert names_in(tmp_path) == pairs("30-0.50")


def test_nan_is_never_good_enough(tmp_path: Path) -> None:
    top_k = TopK(tmp_path, k=3)
    assert not save_if_better(top_k, 10, math.nan)
    assert names_in(tmp_path) == []
    assert save_if_better(top_k, 20, -1.0)
    assert not save_if_better(top_k, 30, math.nan)
    assert names_in(tmp_path) == pairs("20--1.00")


def test_a_step_that_is_repeated_replaces_itself(tmp_path: Path) -> None:
    top_k = TopK(tmp_path, k=1)
    save_if_better(top_k, 10, 0.5)
    assert save_if_better(top_k, 10, 0.5)
    assert names_in(tmp_path) == pairs("10-0.50")
    assert save_if_better(top_k, 10, 0.25)
    assert names_in(tmp_path) == pairs("10-0.25")
    assert [checkpoint.score for checkpoint in top_k.best] == [0.25]


def test_a_checkpoint_is_a_flat_dict_of_tensors_only(tmp_path: Path) -> None:
    shared = torch.arange(1000.0)
    state = {"a": shared[:3], "b": torch.nn.Parameter(torch.ones(2, 2))}
    TopK(tmp_path, k=1).save_if_better(state, score=0.123, sidecar={"step": 5})
    loaded = torch.load(tmp_path / "5-0.12.ckpt", weights_only=True)
    assert type(loaded) is dict and list(loaded) == ["a", "b"]
    assert all(type(tensor) is torch.Tensor for tensor in loaded.values())
    assert not any(tensor.requires_grad for tensor in loaded.values())
    assert torch.equal(loaded["a"], shared[:3]) and torch.equal(loaded["b"], torch.ones(2, 2))
    # A view must not bring the whole of its storage along.
    assert loaded["a"].untyped_storage().nbytes() == 12


def test_the_sidecar_knows_its_file(tmp_path: Path) -> None:
    sidecar = {"step": 5, "metrics": {"per_mask_iou": 0.75}, "config": {"seed": 0}}
    TopK(tmp_path, k=1).save_if_better({"a": torch.ones(1)}, score=0.75, sidecar=sidecar)
    written = json.loads((tmp_path / "5-0.75.json").read_text())
    digest = hashlib.sha256((tmp_path / "5-0.75.ckpt").read_bytes()).hexdigest()
    assert written == {**sidecar, "sha256": digest}


def test_a_resumed_run_keeps_the_list(tmp_path: Path) -> None:
    top_k = TopK(tmp_path, k=2)
    save_if_better(top_k, 10, 0.5)
    save_if_better(top_k, 20, 0.7)
    save_last(tmp_path, {"best": top_k.to_list()})
    newest = load_latest(tmp_path)
    assert newest is not None
    resumed = TopK(tmp_path, k=2, best=TopK.from_list(newest.state["best"]))
    assert (
        resumed.best
        == top_k.best
        == [
            Checkpoint("20-0.70.ckpt", 20, 0.7),
            Checkpoint("10-0.50.ckpt", 10, 0.5),
        ]
    )
    assert save_if_better(resumed, 30, 0.6)
    assert names_in(tmp_path) == pairs("20-0.70", "30-0.60", "last")


def test_a_file_that_was_deleted_already_is_no_error(tmp_path: Path) -> None:
    top_k = TopK(tmp_path, k=1)
    save_if_better(top_k, 10, 0.5)
    for name in pairs("10-0.50"):
        (tmp_path / name).unlink()
    assert save_if_better(top_k, 20, 0.6)
    assert names_in(tmp_path) == pairs("20-0.60")


class Failing:
    """Something that torch.save cannot pickle."""

    def __reduce__(self) -> Any:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos")


def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_tensors(path, {"a": 1})
    with pytest.raises(OSError, match="the disk may be full"):
        save_tensors(path, {"a": torch.ones(3), "b": Failing()})
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert names_in(tmp_path) == ["last.ckpt"]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    package = tmp_path / "samft"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(samft, "__file__", str(package / "__init__.py"))
    assert git_commit() is None  # no repository
    git(tmp_path, "init", "--quiet")
    assert git_commit() is None  # no commit
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "a")
    assert git_commit() is None  # installed inside someone else's repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "b")
    assert git_commit() == git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None  # no git


def test_a_run_resumed_in_another_folder_copies_its_best(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    first = TopK(old, k=2)
    assert save_if_better(first, 10, 0.5) and save_if_better(first, 20, 0.6)
    (old / "10-0.50.ckpt").unlink()
    top_k = TopK(new, k=2, best=first.best)
    top_k.copy_from(old)
    assert [checkpoint.step for checkpoint in top_k.best] == [20]
    assert (new / "20-0.60.ckpt").read_bytes() == (old / "20-0.60.ckpt").read_bytes()
    assert (new / "20-0.60.json").is_file()
