"""Which state a run goes on from, what is refused, and how a step is divided anew."""

import dataclasses
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import TESTS
from helpers.coco_files import write_coco
from helpers.gloo_pool import GlooPool
from helpers.short_runs import (
    a_config,
    arguments,
    command_here,
    read_metrics,
    read_weights,
    train_here,
    write_data,
)
from samft.checkpoints.training_state import FORMAT_VERSION, LAST_NAME, save_last
from samft.commands import shell_command
from samft.config import TrainConfig
from samft.errors import EXIT_STOPPED, EXIT_USAGE, CheckpointError, ConfigError
from samft.recipes.resume import (
    ResumePoint,
    find_resume_point,
    keep_images_per_step,
    keep_schedule,
)
from samft.training.custom import CustomParts

pytestmark = pytest.mark.run

DATA = Path("data")
FIXTURE = TESTS / "fixtures" / "last-format-1.ckpt"


def a_state(config: TrainConfig, **changes: Any) -> dict[str, Any]:
    state = {"config": vars(config), "global_batch": 2, "fingerprint": "abc", "step": 1}
    return {**state, **changes}


def find(config: TrainConfig, folder: Path, *states: dict[str, Any]) -> ResumePoint | None:
    for state in states:
        save_last(folder, state)
    return find_resume_point(config, folder, "abc", val_fingerprint="def")


def find_existing(config: TrainConfig, folder: Path, *states: dict[str, Any]) -> ResumePoint:
    point = find(config, folder, *states)
    assert point is not None
    return point


# Which


def test_a_run_of_the_same_configuration_is_resumed(tmp_path: Path) -> None:
    config = a_config(DATA)
    point = find_existing(config, tmp_path, a_state(config))
    assert point.state == {"format": FORMAT_VERSION, **a_state(config)}
    assert (point.path, point.output_dir, point.problems) == (tmp_path / LAST_NAME, tmp_path, [])


def test_another_validation_split_is_refused_as_its_scores_are_no_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(write_data(tmp_path / "data", num_train=4, num_val=2), 2, seed=5, split="other")
    settings = {"steps": 4, "metrics_interval": 2, "trackers": "none"}
    argv = arguments(tmp_path / "data", tmp_path / "run", **settings)
    assert command_here([*argv, "--stop_after", "2"]) == EXIT_STOPPED
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert command_here([*argv, "--val_split", "other"]) == EXIT_USAGE
    assert "validation data" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    (tmp_path / "data" / "val").rename(tmp_path / "data" / "valid")  # moved, it is the same
    assert command_here(argv) == 0


def test_never_and_an_empty_folder_start_a_new_run(tmp_path: Path) -> None:
    assert find_resume_point(a_config(DATA), tmp_path, "abc") is None
    config = a_config(DATA, resume="never")
    assert find(config, tmp_path, a_state(config)) is None


def test_a_damaged_state_gives_the_one_before_with_the_reason(tmp_path: Path) -> None:
    config = a_config(DATA)
    for step in (1, 2):
        save_last(tmp_path, a_state(config, step=step))
    (tmp_path / LAST_NAME).write_bytes(b"")
    point = find_existing(config, tmp_path)
    assert (point.state["step"], point.output_dir) == (1, tmp_path)
    assert point.problems == [f"{tmp_path / LAST_NAME} is empty."]


def test_when_all_states_are_damaged_nothing_is_started(tmp_path: Path) -> None:
    (tmp_path / LAST_NAME).write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of its states can be used"):
        find_resume_point(a_config(DATA), tmp_path, "abc")
    assert find_resume_point(a_config(DATA, resume="never"), tmp_path, "abc") is None


def test_a_path_is_resumed_from_any_folder(tmp_path: Path) -> None:
    own_dir, other_dir = tmp_path / "own_dir", tmp_path / "other_dir"
    own_dir.mkdir()
    other_dir.mkdir()
    for step in (1, 2):
        save_last(other_dir, a_state(a_config(DATA), step=step))
    for name, step in ((LAST_NAME, 2), (f"previous/{LAST_NAME}", 1)):
        point = find_existing(a_config(DATA, resume=other_dir / name), own_dir)
        assert (point.state["step"], point.output_dir) == (step, other_dir)


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    config = a_config(DATA, resume=tmp_path / "gone.ckpt")
    with pytest.raises(CheckpointError, match="gone.ckpt"):
        find_resume_point(config, tmp_path, "abc")


@pytest.mark.parametrize("damage", [b"", b"garbage"])
def test_a_path_to_a_damaged_file_is_an_error_with_no_other_in_its_place(
    tmp_path: Path, damage: bytes
) -> None:
    config = a_config(DATA, resume=tmp_path / LAST_NAME)
    for step in (1, 2):
        save_last(tmp_path, a_state(config, step=step))
    (tmp_path / LAST_NAME).write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"last\.ckpt is (empty|damaged)"):
        find_resume_point(config, tmp_path, "abc")


def test_a_run_in_a_folder_called_previous_is_resumed_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "previous"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    assert find_existing(a_config(DATA), folder, a_state(a_config(DATA))).output_dir == folder


@pytest.mark.parametrize(("count", "resumes"), [(None, False), ("0", False), ("1", True)])
def test_restarted_by_torchrun_even_never_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str | None, resumes: bool
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if count is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    config = a_config(DATA, resume="never")
    assert find_resume_point(config, tmp_path, "abc") is None
    point = find(config, tmp_path, a_state(config))
    assert (point is not None) == resumes


def test_restarted_by_torchrun_a_run_resumes_its_own_state_before_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_dir, other_dir = tmp_path / "own_dir", tmp_path / "other_dir"
    own_dir.mkdir()
    other_dir.mkdir()
    config = a_config(DATA, resume=other_dir / LAST_NAME)
    save_last(other_dir, a_state(config, step=1))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_existing(config, own_dir).state["step"] == 1  # it failed before it had saved
    assert find_existing(config, own_dir, a_state(config, step=2)).state["step"] == 2


@pytest.mark.parametrize(
    ("asked", "saved", "shown"),
    [
        ({"learning_rate": 2e-3}, {}, ("learning_rate", "0.001", "0.002")),
        ({"image_size": 128}, {}, ("image_size", "64", "128")),
        ({}, {"fingerprint": "xyz"}, ("training data", "xyz", "abc")),
        ({}, {"val_fingerprint": "uvw"}, ("validation data", "uvw", "def")),
    ],
    ids=lambda value: ",".join(value),
)
def test_another_configuration_is_refused_with_a_table(
    asked: dict[str, Any], saved: dict[str, Any], shown: tuple[str, str, str], tmp_path: Path
) -> None:
    state = a_state(a_config(DATA), **saved)
    with pytest.raises(ConfigError, match="--resume never") as caught:
        find(a_config(DATA, **asked), tmp_path, state)
    header, row = str(caught.value).splitlines()[1:3]
    assert header.split() == ["field", "the", "run", "has", "asked", "for"]
    name, before, after = shown
    assert row.strip().startswith(name)
    assert row.removeprefix(f"  {name}").split() == [before, after]


def test_more_steps_of_a_finished_run_are_another_run(tmp_path: Path) -> None:
    config = a_config(DATA, output_dir=str(tmp_path / "run"))
    best = [{"name": "2-0.75.ckpt", "step": 2, "score": 0.75}]
    done = a_state(config, progress={"step": config.steps}, best=best)
    more = a_config(DATA, output_dir=str(tmp_path / "run"), steps=config.steps + 5)
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="is finished") as caught:
        find(more, tmp_path / "run", done)
    assert str(caught.value).splitlines()[1].strip() == (
        f"{shell_command('train')} --config {tmp_path}/run/config.yaml "
        f"--checkpoint_path {tmp_path}/run/2-0.75.ckpt --steps 5 --output_dir {tmp_path}/run-more"
    )
    stopped = {**done, "progress": {"step": config.steps - 1}}
    with pytest.raises(ConfigError, match="has taken 19 of its 20 steps") as caught:
        find(more, tmp_path / "run", stopped)
    assert "--steps 6 --output_dir" in str(caught.value) and "`--steps 20`" in str(caught.value)
    with pytest.raises(ConfigError, match="another configuration"):
        find(more, tmp_path / "run", {**stopped, "best": []})  # none to go on from


@pytest.mark.parametrize(
    ("output_dir", "wanted"),
    [(".", "more"), ("..", "../more"), ("run/", "run-more"), ("~/run", "'~/run-more'")],
)
def test_more_steps_go_to_a_folder_that_can_be_seen(
    output_dir: str, wanted: str, tmp_path: Path
) -> None:
    config = a_config(DATA, output_dir=output_dir)
    best = [{"name": "2-0.75.ckpt", "step": 2, "score": 0.75}]
    done = a_state(config, progress={"step": config.steps}, best=best)
    with pytest.raises(ConfigError, match="is finished") as caught:
        find(replace(config, steps=config.steps + 5), tmp_path, done)
    assert str(caught.value).splitlines()[1].endswith(f"--output_dir {wanted}")


@pytest.mark.parametrize(
    "parts",
    [{"train_data": [3]}, {"val_data": [3]}, {"metrics": {"dice": max}}, {"callbacks": [print]}],
    ids=str,
)
def test_more_steps_of_a_callers_own_run_are_asked_for_in_python(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "it's a run"
    config = a_config(DATA, output_dir=str(folder))
    best = [{"name": "2-0.75.ckpt", "step": 2, "score": 0.75}]
    folder.mkdir()
    save_last(folder, a_state(config, progress={"step": config.steps}, best=best))
    more = replace(config, steps=config.steps + 5)
    with pytest.raises(ConfigError, match="is finished") as caught:
        find_resume_point(more, folder, "abc", custom=CustomParts(**parts))
    assert "samft train" not in str(caught.value)
    names: dict[str, Any] = {"config": more, "dataclasses": dataclasses}
    exec(str(caught.value).splitlines()[1].strip(), names)  # as the caller would write it
    assert names["config"] == replace(
        more, checkpoint_path=f"{folder}/2-0.75.ckpt", steps=5, output_dir=f"{folder}-more"
    )


def test_settings_without_effect_change_no_bit_of_a_run_nor_its_resume(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    base = {"steps": 4, "metrics_interval": 4, "prompts": "point", "correction_rounds": 0}
    base |= {"freeze_image_encoder": True, "multimask": "best"}
    others = {"box_jitter": 0.4, "layer_decay": 0.5, "mask_prompt": 0.1, "decay_fraction": 0.9}
    others |= {"lora_targets": "mlp", "view_context": 4.0, "tile_overlap": 0.0}
    others |= {"group_by": "folder"}
    argv = arguments(data, tmp_path / "run", **base)
    assert command_here([*argv, "--stop_after", "2"]) == 75
    train_here(arguments(data, tmp_path / "run", **base, **others))
    train_here(arguments(data, tmp_path / "straight", **base))
    resumed, straight = (read_weights(tmp_path / name) for name in ("run", "straight"))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    steps = [line["step"] for line in read_metrics(tmp_path / "run", "val")]
    assert steps == [0, 4]  # resumed, and not begun anew


CONSTANT: dict[str, Any] = {"lr_schedule": "constant", "warmup_steps": 0}
WSD: dict[str, Any] = {"lr_schedule": "wsd", "warmup_steps": 0}
MULTISTEP: dict[str, Any] = {"lr_schedule": "multistep", "warmup_steps": 0}


@pytest.mark.parametrize(
    ("run", "taken", "asked", "goes_on"),
    [
        ({**CONSTANT, "steps": 100}, 100, {"steps": 1000}, True),
        ({**CONSTANT, "steps": 100}, 50, {"steps": 49}, False),  # of which there are more already
        # The decay of a hundred steps begins with step 80, so step 81 is the first to be lower.
        ({**WSD, "steps": 100}, 81, {"steps": 200}, True),
        ({**WSD, "steps": 100}, 82, {"steps": 200}, False),
        ({**WSD, "steps": 100}, 100, {"steps": 200}, False),
        ({**WSD, "steps": 100}, 60, {"decay_fraction": 0.4}, True),
        ({**WSD, "steps": 100}, 62, {"decay_fraction": 0.4}, False),
        # It is told to come to its end: 60 of 75 steps at the peak, then a decay of 15.
        ({**WSD, "steps": 100}, 60, {"steps": 75}, True),
        ({**CONSTANT, "steps": 100}, 100, {"steps": 125, "lr_schedule": "wsd"}, True),
        ({**CONSTANT, "steps": 100}, 100, {"steps": 120, "lr_schedule": "wsd"}, False),
        ({**MULTISTEP, "steps": 100}, 67, {"steps": 200}, True),
        ({**MULTISTEP, "steps": 100}, 68, {"steps": 200}, False),
        ({"lr_schedule": "cosine", "warmup_steps": 0, "steps": 100}, 2, {"steps": 101}, False),
        ({**CONSTANT, "steps": 100}, 50, {"steps": 200, "seed": 5}, False),
    ],
    ids=str,
)
def test_steps_may_change_where_each_step_that_was_taken_had_the_rate_that_it_would_have(
    run: dict[str, Any], taken: int, asked: dict[str, Any], goes_on: bool, tmp_path: Path
) -> None:
    state = a_state(a_config(DATA, **run), progress={"step": taken}, best=[])
    config = a_config(DATA, **{**run, **asked})
    if goes_on:
        assert keep_schedule(config, find_existing(config, tmp_path, state)) == config
    else:
        with pytest.raises(ConfigError, match="another configuration"):
            find(config, tmp_path, state)


def test_more_steps_leave_the_warm_up_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="samft")
    # Of 100 steps, and then of 2000; asked for are 50, of which 10 are a tenth of the first run.
    schedule = {"lr_schedule": "constant", "warmup_steps": 50}
    longer = a_config(DATA, steps=2000, **schedule)
    progress: dict[str, Any] = {"progress": {"step": 100}, "best": []}
    state = a_state(a_config(DATA, steps=100, **schedule), **progress)
    kept = keep_schedule(longer, find_existing(longer, tmp_path, state))
    assert kept == replace(longer, warmup_steps=10)
    assert "10 steps, as the run has begun with, not 50" in caplog.text
    # The same command once more, and the run's config.yaml.
    state = a_state(longer, **progress, warmup_steps=10)
    assert keep_schedule(longer, find_existing(longer, tmp_path, state)) == kept
    assert keep_schedule(kept, find_existing(kept, tmp_path, state)) == kept
    other = replace(longer, warmup_steps=20)
    with pytest.raises(ConfigError, match="warmup_steps"):
        find_existing(other, tmp_path, state)


def test_a_state_of_the_first_format_is_resumed(tmp_path: Path) -> None:
    state = torch.load(FIXTURE, weights_only=True)
    # Of all that such a run could be asked for, only its loss is gone.
    state["config"] |= {"loss_resolution": "window", "loss_focal_weight": 10.0}
    torch.save(state, tmp_path / LAST_NAME)
    defaults = {name: None for name in ("image_size", "batch_size", "steps", "learning_rate")}
    changes = {**defaults, "metrics_interval": None, "num_workers": None, "device": None}
    point = find_existing(a_config(DATA, tmp_path, **changes), tmp_path)
    assert point.state["progress"]["step"] == 20
    with pytest.raises(ConfigError, match="learning_rate"):
        find_resume_point(a_config(DATA, tmp_path), tmp_path, "abc")


# Images per step


def divided(
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    *,
    processes: int,
    images: int,
    saved: TrainConfig | None = None,
) -> tuple[int, int]:
    """The batch size and accumulation with which a run of so many images a step goes on."""
    monkeypatch.setattr("samft.distributed.get_world_size", lambda: processes)
    state = a_state(saved or config, global_batch=images)
    kept = keep_images_per_step(config, ResumePoint(state, Path("run/last.ckpt"), []))
    assert processes * kept.batch_size * kept.accumulate_steps == images
    changed = {name for name, value in vars(kept).items() if value != getattr(config, name)}
    assert changed <= {"batch_size", "accumulate_steps"}
    return kept.batch_size, kept.accumulate_steps


# Started with batch_size 4 and accumulate_steps 1 on 2 processes: 8 images a step.
@pytest.mark.parametrize(
    ("processes", "fit"),
    [(1, (4, 2)), (2, (4, 1)), (4, (2, 1)), (8, (1, 1))],
)
def test_the_same_command_on_other_processes_keeps_the_images_per_step(
    processes: int, fit: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config(DATA, batch_size=4)
    assert divided(config, monkeypatch, processes=processes, images=8) == fit


def test_a_batch_is_never_larger_than_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 * 4 images on 2 processes are 24 on one, in batches of 3; 8 on three, of which 3 is no part.
    config = a_config(DATA, batch_size=3, accumulate_steps=4)
    assert divided(config, monkeypatch, processes=1, images=24) == (3, 8)
    assert divided(config, monkeypatch, processes=3, images=24) == (2, 4)


def test_only_a_change_of_the_division_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="samft")
    config = a_config(DATA, batch_size=4)
    divided(config, monkeypatch, processes=2, images=8)
    assert caplog.messages == []
    divided(config, monkeypatch, processes=1, images=8)
    message = "8 images per step on 1 process(es): batch_size 4 and accumulate_steps 2"
    assert len(caplog.messages) == 1 and message in caplog.messages[0]


def test_the_same_step_may_be_divided_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = a_config(DATA, batch_size=4)
    asked = a_config(DATA, batch_size=2, accumulate_steps=2)
    assert divided(asked, monkeypatch, processes=2, images=8, saved=saved) == (2, 2)
    # Divided otherwise, and on fewer processes at the same time.
    assert divided(asked, monkeypatch, processes=1, images=8, saved=saved) == (2, 4)


@pytest.mark.parametrize(
    ("processes", "images", "near"),
    [(3, 8, "1 or 2 or 4"), (5, 12, "4 or 6 or 3"), (9, 8, "2 or 4 or 8"), (2, 1, "1")],
)
def test_number_of_processes_that_cannot_share_a_step_is_an_error_with_those_that_can(
    processes: int, images: int, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        divided(a_config(DATA, batch_size=4), monkeypatch, processes=processes, images=images)
    start = f"{images} images per step, which {processes} processes cannot share evenly: start "
    assert start in str(caught.value)
    named = str(caught.value).split(start)[1].split(" of them")[0].split(" or ")
    assert named == sorted(near.split(" or "), key=int)


def test_another_batch_size_is_refused_with_the_values_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved, asked = a_config(DATA, batch_size=4), a_config(DATA, batch_size=6)
    with pytest.raises(ConfigError, match="--resume never") as caught:
        divided(asked, monkeypatch, processes=2, images=8, saved=saved)
    row = str(caught.value).splitlines()[2].strip()
    assert row.removeprefix("images per step").split(maxsplit=1) == [
        "8",
        "12, not batch_size 4 and accumulate_steps 1",
    ]


def test_one_command_resumes_on_one_process_then_two_then_one(
    gloo2: GlooPool, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", num_train=4, num_val=1)
    # A constant rate lets steps change on resume.
    changes = {"lr_schedule": "constant", "warmup_steps": 0, "metrics_interval": 1}

    def argv(folder: str, steps: int) -> list[str]:
        return arguments(data, tmp_path / folder, steps=steps, batch_size=2, **changes)

    train_here(argv("straight", 3))
    train_here(argv("moved", 1))
    assert gloo2.run(command_here, argv("moved", 2)) == [0, 0]
    saved = torch.load(tmp_path / "moved" / LAST_NAME, weights_only=True)
    # As asked for, or the next change of processes would be taken for another batch size.
    assert (saved["config"]["batch_size"], saved["global_batch"]) == (2, 2)
    train_here(argv("moved", 3))
    # Summed in another order, so equal but for rounding.
    lines, expected = (read_metrics(tmp_path / name, "train") for name in ("moved", "straight"))
    assert [line["step"] for line in lines] == [1, 2, 3]
    losses = [line["loss"] for line in lines]
    assert losses == pytest.approx([line["loss"] for line in expected], rel=1e-3)
