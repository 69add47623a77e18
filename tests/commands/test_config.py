"""The configuration: its table of defaults, precedence, and every mistake that it must catch."""

import dataclasses
import importlib
import itertools
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import REPOSITORY
from samft.cli import CommandParser, link_folders
from samft.config import TrainConfig, parse_config
from samft.errors import ConfigError
from samft.recipes.resume import FREE_ON_RESUME, changed_settings
from samft.settings import commented_yaml, convert_values, to_yaml

REQUIRED = ["--data_root", "data", "--model_type", "vit_tiny", "--checkpoint_path", "auto"]

# The names and defaults that users and scripts rely on; none of them may change.
CONTRACT: dict[str, Any] = {
    "data_root": None,
    "model_type": None,
    "checkpoint_path": None,
    "freeze_image_encoder": False,
    "freeze_prompt_encoder": False,
    "freeze_mask_decoder": False,
    "batch_size": 1,
    "image_size": 1024,
    "steps": 1500,
    "learning_rate": 1e-4,
    "weight_decay": 1e-2,
    "metrics_interval": 50,
    "output_dir": ".",
    "train_split": "train",
    "val_split": "val",
    "train_annotations": None,
    "train_images": None,
    "val_annotations": None,
    "val_images": None,
    "val_fraction": None,
    "max_masks_per_image": 64,
    "box_jitter": 0.1,
    "augment": "flip",
    "resize_mode": "pad",
    "num_workers": 4,
    "amp": "auto",
    "accumulate_steps": 1,
    "clip_grad_norm": 1.0,
    "lr_schedule": "multistep",
    "warmup_steps": 250,
    "loss_focal_weight": 10.0,
    "loss_dice_weight": 1.0,
    "loss_iou_weight": 1.0,
    "loss_resolution": "window",
    "cache_embeddings": "auto",
    "cache_dir": None,  # <output_dir>/embeddings
    "save_top_k": 1,
    "resume": "auto",
    "seed": 0,
    "device": "auto",
}

# A value for each field that differs from its default and passes the checks.
OTHER: dict[str, Any] = {
    "data_root": "elsewhere",
    "model_type": "vit_b",
    "checkpoint_path": "random",
    "freeze_image_encoder": False,
    "freeze_prompt_encoder": True,
    "freeze_mask_decoder": False,
    "train_blocks": 2,
    "train_norms": True,
    "train_biases": True,
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lora_targets": "q,k",
    "lora_decoder": True,
    "batch_size": 3,
    "image_size": 256,
    "steps": 7,
    "learning_rate": 3e-5,
    "encoder_learning_rate": 1e-5,
    "layer_decay": 0.9,
    "ema_decay": 0.99,
    "anchor_weight": 30.0,
    "patience": 3,
    "weight_decay": 0.0,
    "metrics_interval": 5,
    "output_dir": "runs/a b",
    "train_split": "train2017",
    "val_split": "2017",
    "test_split": "none",
    "train_annotations": "t.json",
    "train_images": "t",
    "val_annotations": "v.json",
    "val_images": "v",
    "test_annotations": "w.json",
    "test_images": "w",
    "general_data_root": "/elsewhere",
    "val_fraction": 0.25,
    "max_masks_per_image": 8,
    "box_jitter": 0.0,
    "prompts": "point",
    "correction_rounds": 2,
    "mask_prompt": 1.0,
    "multimask": "best",
    "augment": "scale",
    "attention": "stock",
    "decoder": "stock",
    "deterministic": True,
    "mask_chunk": 3,
    "compile": "auto",
    "cuda_graphs": True,
    "activation_checkpointing": "blocks",
    "optimizer_sharding": True,
    "bf16_compress": True,
    "category_names": "cat,dog",
    "min_mask_area": 16.0,
    "crowds": "leave_out",
    "repeat_threshold": 0.001,
    "on_bad_image": "skip",
    "group_by": "folder",
    "allow_links": "/pool,/cache",
    "pixel_range": "0,4095",
    "channels": "3,2,1",
    "page": 2,
    "view": "tiles",
    "tile_size": 512,
    "tile_overlap": 0.5,
    "view_context": 3.0,
    "resize_mode": "squash",
    "num_workers": 0,
    "amp": "off",
    "accumulate_steps": 4,
    "clip_grad_norm": 0.0,
    "decay_fraction": 0.1,
    "lr_schedule": "cosine",
    "warmup_steps": 0,
    "loss_focal_weight": 1.0,
    "loss_dice_weight": 0.5,
    "loss_iou_weight": 0.0,
    "loss_resolution": "input",
    "cache_embeddings": "off",
    "cache_dir": "cache",
    "cache_dtype": "float32",
    "cache_max_gib": 2.5,
    "save_top_k": 3,
    "trackers": "mlflow,tensorboard",
    "resume": "never",
    "seed": 12,
    "device": "cpu",
    "stop_after": 3,
    "dry_run": True,
    "max_bad_steps": 2,
    "detect_anomaly": True,
    "hang_timeout": 60.0,
    "save_before_limit": 120.0,
    "probe_memory": True,
    "debug": True,
}


def parse_yaml(folder: Path, text: str, *flags: str) -> TrainConfig:
    path = folder / "config.yaml"
    path.write_text(text)
    return parse_config([*REQUIRED, "--config", str(path), *flags])


def problems_of(argv: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(argv)
    return str(caught.value)


def as_flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def test_every_field_of_the_contract_has_its_default() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert {name: defaults[name] for name in CONTRACT} == CONTRACT
    for name, value in CONTRACT.items():
        assert type(defaults[name]) is type(value), name


def test_defaults_reach_the_parsed_configuration() -> None:
    given = {"data_root": "data", "model_type": "vit_tiny", "checkpoint_path": "auto"}
    parsed = dataclasses.asdict(parse_config(REQUIRED))
    assert {name: parsed[name] for name in CONTRACT} == {**CONTRACT, **given}


def test_every_field_can_be_given_as_a_flag_and_as_a_key(tmp_path: Path) -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(TrainConfig)}
    from_flags = parse_config(as_flags(OTHER))
    assert dataclasses.asdict(from_flags) == OTHER
    (tmp_path / "c.yaml").write_text("".join(f"{k}: {v}\n" for k, v in OTHER.items()))
    assert parse_config(["--config", str(tmp_path / "c.yaml")]) == from_flags


@pytest.mark.parametrize(
    ("flags", "corrections", "clicks"),
    [
        ("", 0, 0),
        ("--correction_rounds 2", 2, 3),
        ("--prompts point", 0, 1),
        ("--prompts mixed", 7, 8),
        ("--prompts mixed --correction_rounds 0", 0, 1),
        ("--prompts mixed --correction_rounds null", 7, 8),
    ],
)
def test_rounds_of_corrections_follow_from_the_prompts(
    flags: str, corrections: int, clicks: int
) -> None:
    config = parse_config([*REQUIRED, *flags.split()])
    assert (config.num_corrections, config.num_clicks) == (corrections, clicks)


@pytest.mark.parametrize("name", ["prompts", "correction_rounds", "mask_prompt", "multimask"])
def test_another_way_to_prompt_is_another_run(name: str) -> None:
    base = dataclasses.replace(parse_config(REQUIRED), **EFFECTIVE.get(name, {}))
    saved = dataclasses.asdict(base)
    config = dataclasses.replace(base, **{name: OTHER[name]})
    assert [row.split()[0] for row in changed_settings(saved, config)] == [name]
    del saved[name]  # of a run of an earlier version, which had boxes only
    assert changed_settings(saved, base) == []
    assert [row.split()[0] for row in changed_settings(saved, config)] == [name]


def test_it_is_frozen() -> None:
    config = parse_config(REQUIRED)
    for field in dataclasses.fields(TrainConfig):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, OTHER[field.name])


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    config = parse_yaml(tmp_path, "steps: 20\nseed: 5\ndebug: true\n", "--steps", "30")
    assert (config.steps, config.seed, config.batch_size, config.debug) == (30, 5, 1, True)
    assert parse_yaml(tmp_path, "debug: true\n", "--no-debug").debug is False
    # A flag at its default's value is given all the same.
    assert parse_yaml(tmp_path, "steps: 20\n", "--steps=1500").steps == 1500


def test_numbers_and_switches_may_be_written_as_in_yaml(tmp_path: Path) -> None:
    config = parse_yaml(
        tmp_path,
        "amp: off\ncache_embeddings: off\nlearning_rate: 1e-4\nweight_decay: 1\n"
        "val_split: 2017\nval_fraction: null\nfreeze_image_encoder: yes\n",
    )
    assert (config.amp, config.cache_embeddings) == ("off", "off")
    assert (config.learning_rate, config.weight_decay) == (1e-4, 1.0)
    assert (config.val_split, config.val_fraction) == ("2017", None)
    assert config.freeze_image_encoder is True
    assert parse_config([*REQUIRED, "--learning_rate", "1e-4"]).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("flags", "yaml", "value"),
    [
        ([], "", "off"),
        (["--compile"], "", "on"),
        (["--compile", "--amp", "off"], "", "on"),
        (["--no-compile"], "compile: auto\n", "off"),
        (["--compile", "auto"], "", "auto"),
        ([], "compile: true\n", "on"),
        ([], "compile: false\n", "off"),
        ([], "compile: on\n", "on"),
    ],
)
def test_compile_is_a_switch_with_a_third_position(
    tmp_path: Path, flags: list[str], yaml: str, value: str
) -> None:
    assert parse_yaml(tmp_path, yaml, *flags).compile == value


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert parse_yaml(tmp_path, "# nothing yet\n") == parse_config(REQUIRED)


def test_an_optional_value_can_be_set_to_none(tmp_path: Path) -> None:
    assert (
        parse_yaml(tmp_path, "val_fraction: 0.2\n", "--val_fraction", "none").val_fraction is None
    )


@pytest.mark.parametrize("values", [{}, OTHER], ids=["defaults", "others"])
def test_yaml_of_a_configuration_repeats_it(tmp_path: Path, values: dict[str, Any]) -> None:
    config = parse_config([*REQUIRED, *as_flags(values)])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("name", ["a${steps}", r"a\${absent}", "${", r"\\${oc.env:HOME}\b"])
def test_a_path_may_have_what_omegaconf_takes_for_a_reference(tmp_path: Path, name: str) -> None:
    config = parse_config([*REQUIRED, "--data_root", name])
    assert config.data_root == name
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert parse_config(["--config", str(tmp_path / "again.yaml")]) == config
    for text in (name, Path(name)):
        in_python: Any = {"data_root": text}
        assert convert_values(dataclasses.replace(config, **in_python)) == (config, [])
    (tmp_path / "one.yaml").write_text(commented_yaml("", {"data_root": name}))
    flags = ["--config", str(tmp_path / "one.yaml"), *REQUIRED[2:]]
    assert parse_config(flags) == config


def test_a_file_may_refer_to_its_other_settings(tmp_path: Path) -> None:
    text = "output_dir: runs/a\ncache_dir: ${output_dir}/cache\n"
    assert parse_yaml(tmp_path, text).cache_dir == "runs/a/cache"


def test_trackers_are_one_or_several() -> None:
    for value in ("tensorboard", "none", "wandb, mlflow", "trackio,tensorboard,trackio"):
        assert parse_config([*REQUIRED, "--trackers", value]).trackers == value
    names = "tensorboard, mlflow, wandb, trackio, none"
    for value, problem in (
        ("mlflow,wandbb", f"trackers: 'wandbb' is none of {names}. Did you mean 'wandb'?"),
        ("mlflow,", f"trackers: '' is none of {names}."),
    ):
        assert problem in problems_of([*REQUIRED, "--trackers", value])


def test_an_unknown_flag_is_named_with_its_nearest() -> None:
    assert "--stepz: no such flag. Did you mean --steps?" in problems_of(
        [*REQUIRED, "--stepz", "5"]
    )
    # An abbreviation would become ambiguous with the next field that is added.
    assert "--weight: no such flag." in problems_of([*REQUIRED, "--weight", "5"])
    assert "--seeds=3: no such flag. Did you mean --seed?" in problems_of([*REQUIRED, "--seeds=3"])
    assert "extra: no such flag." in problems_of([*REQUIRED, "extra"])


def test_an_unknown_key_is_named_with_its_file_and_its_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(tmp_path, "learning_rat: 1\n7: 8\n")
    assert f"{tmp_path}/config.yaml: learning_rat: no such key. Did you mean learning_rate?" in str(
        caught.value
    )
    assert "7: no such key." in str(caught.value)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("epochs: 3\nbatch_size: many\n")
    text = problems_of(
        ["--config", str(tmp_path / "c.yaml"), "--stepz", "5", "--amp", "bf61", "--seed", "-1"]
    )
    expected = [
        "--stepz: no such flag.",
        "epochs: no such key.",
        "batch_size: 'many' is not a whole number.",
        "amp: 'bf61' is none of auto, off, bf16, fp16. Did you mean 'bf16'?",
        "seed: -1 must be at least 0.",
        "model_type is missing: give one of vit_h, vit_l, vit_b, vit_tiny.",
        "checkpoint_path is missing: give a SAM .pth or .ckpt file, 'auto'",
        "data_root is missing",
    ]
    for problem in expected:
        assert problem in text
    assert text.startswith(f"the configuration has {len(expected)} problems\n")


NO_SIZES = ("1024x", "x768", "1024X768", "1024*768", "9x9x9", "-64", "6.4e1", "64x48px", "٦٤")


@pytest.mark.parametrize(
    "flags, problem",
    [
        ("--steps abc", "--steps: 'abc' is not a whole number."),
        ("--steps 2.5", "--steps: '2.5' is not a whole number."),
        ("--steps 0", "steps: 0 must be at least 1."),
        (f"--seed {2**63}", f"seed: {2**63} must be below 2^63."),
        (f"--view tiles --tile_size {10**20}", f"tile_size: {10**20} must be below 2^63."),
        (
            "--loss_focal_weight 0 --loss_dice_weight 0 --loss_iou_weight 0",
            "loss_*_weight: all three weights are 0, so nothing would be learnt.",
        ),
        ("--learning_rate fast", "--learning_rate: 'fast' is not a number."),
        ("--learning_rate 0", "learning_rate: 0.0 must be above 0."),
        ("--learning_rate nan", "learning_rate: nan must be above 0."),
        ("--weight_decay nan", "weight_decay: nan must be at least 0."),
        ("--clip_grad_norm inf", "clip_grad_norm: inf must be at least 0."),
        ("--image_size 100", "image_size: 100 is no multiple of 16; the nearest is 96."),
        ("--image_size 0", "image_size: 0 is no multiple of 16; the nearest is 16."),
        (
            "--image_size 100x64",
            "image_size: 100x64 has a side of no multiple of 16; the nearest is",
        ),
        ("--image_size 0x768", "image_size: 0x768 has a side of no multiple of 16; the nearest is"),
        *((f"--image_size={size}", f"image_size: '{size}' is neither") for size in NO_SIZES),
        ("--image_size 64x48 --attention stock", "image_size: 64x48 does not go with attention"),
        ("--image_size 64x48 --view tiles", "64x48 is for whole images, and view 'tiles' shows"),
        ("--model_type vit_bb", "'vit_bb' is none of vit_h, vit_l, vit_b, vit_tiny."),
        ("--val_fraction 1", "val_fraction: 1.0 must lie between 0 and 1."),
        ("--box_jitter 0.6", "box_jitter: 0.6 must be at most 0.5."),
        ("--mask_prompt 1.5", "mask_prompt: 1.5 must be at most 1."),
        ("--correction_rounds -1", "correction_rounds: -1 must be at least 0."),
        ("--multimask best", "multimask: 'best' is for steps that begin with a point, and prompts"),
        ("--batch_size 0", "batch_size: 0 must be at least 1."),
        ("--num_workers -1", "num_workers: -1 must be at least 0."),
        ("--stop_after 0", "stop_after: 0 must be at least 1."),
        ("--train_images x", "train_annotations and train_images go together."),
        ("--val_annotations x", "val_annotations and val_images go together."),
        ("--test_images x", "test_annotations and test_images go together."),
        ("--augment large", "augment: 'large' is none of none, flip, scale."),
        ("--repeat_threshold 0", "repeat_threshold: 0.0 must lie between 0 and 1."),
        ("--output_dir a\udcff", "output_dir: 'a\\udcff' is not UTF-8"),
        ("--group_by .*", "it has no group in brackets"),
        ("--group_by (", "no regular expression"),
        ("--min_mask_area -1", "min_mask_area: -1.0 must be at least 0."),
        ("--view tile", "view: 'tile' is none of image, tiles, objects. Did you mean 'tiles'?"),
        ("--tile_size 15 --view tiles", "tile_size: 15 must be at least 16."),
        ("--tile_size 64", "tile_size: with view 'image' there are no windows"),
        ("--tile_overlap 0.95", "tile_overlap: 0.95 must be at most 0.9."),
        ("--view_context 0.5", "view_context: 0.5 must be at least 1"),
        ("--on_bad_image ignore", "on_bad_image: 'ignore' is none of error, skip."),
        ("--cache_embeddings on", "cache_embeddings: 'on' needs freeze_image_encoder"),
        ("--freeze_image_encoder --train_blocks 1", "train_blocks: freeze_image_encoder leaves no"),
        ("--train_norms", "train_norms: the whole image encoder is trained, so these are, too"),
        (
            "--train_biases --freeze_image_encoder --cache_embeddings on",
            "cache_embeddings: 'on' does not go with train_biases",
        ),
        ("--decay_fraction 0.95", "decay_fraction: 0.95 must be above 0, and at most 0.9."),
        ("--encoder_learning_rate 0", "encoder_learning_rate: 0.0 must be above 0."),
        ("--lora_targets q,x", "lora_targets: 'q,x' is not a list of q, k, v, proj, mlp"),
        ("--lora_targets q,q", "lora_targets: 'q,q' is not a list"),
        ("--lora_alpha 2", "lora_alpha: without lora_rank there are no adapters."),
        ("--lora_decoder", "lora_decoder: without lora_rank there are no adapters."),
        ("--lora_rank 2 --lora_alpha 0", "lora_alpha: 0.0 must be above 0."),
        ("--lora_rank 2 --freeze_image_encoder", "lora_rank: freeze_image_encoder leaves no layer"),
        (
            "--lora_rank 2 --lora_decoder --freeze_mask_decoder",
            "lora_decoder: freeze_mask_decoder leaves no layer to adapt.",
        ),
        ("--ema_decay 1", "ema_decay: 1.0 must be below 1."),
        ("--anchor_weight 10001", "anchor_weight: 10001.0 times the learning rate, 0.0001, is"),
        ("--anchor_weight 300 --encoder_learning_rate 1e-2", "take at most 100."),
        ("--anchor_weight -1", "anchor_weight: -1.0 must be at least 0."),
        ("--layer_decay 1.1", "layer_decay: 1.1 must be above 0, and at most 1."),
        (
            "--cache_embeddings on --freeze_image_encoder --augment scale",
            "'on' does not go with augment 'scale', which changes the pixels",
        ),
        ("--cache_dtype half", "cache_dtype: 'half' is none of float16, float32."),
        ("--cache_max_gib -1", "cache_max_gib: -1.0 must be at least 0."),
        (
            "--freeze_image_encoder --freeze_prompt_encoder --freeze_mask_decoder",
            "freeze_*: all three parts are frozen",
        ),
        ("--steps", "argument --steps: expected one argument"),
        ("--debug=1", "ignored explicit argument '1'"),
        ("--config absent.yaml", "--config: there is no file absent.yaml."),
        ("--data_root ???", "cannot be resolved: "),
    ],
)
def test_a_wrong_value_is_refused_with_a_sentence(flags: str, problem: str) -> None:
    assert problem in problems_of([*REQUIRED, *flags.split()])


@pytest.mark.parametrize(
    "text, problem",
    [
        ("output_dir: ${absent}", "cannot be resolved: Interpolation key 'absent' not found."),
        ("steps: true", "steps: 'true' is not a whole number."),
        ("steps: 1:30", "steps: '1:30' is not a whole number."),
        ("steps: 1e3", "steps: '1e3' is not a whole number."),
        ("seed: 0x10", "seed: '0x10' is not a whole number."),
        ("learning_rate: 1:30", "learning_rate: '1:30' is not a number."),
        ("debug: 1:30", "debug: '1:30' is not yes or no."),
        ("image_size: 0x768", "image_size: 0x768 has a side of no multiple of 16; the nearest is "),
        ("channels: 0b11", "channels: '0b11' is not one or three band numbers"),
        ("steps: null", "steps: 'None' is not a whole number."),
        ("steps: [one]", "steps: '['one']' is not a whole number."),
        ("data_root: {a: b}", "data_root: '{'a': 'b'}' is not text."),
        ("debug: perhaps", "debug: 'perhaps' is not yes or no."),
        ("amp: on", "amp: 'on' is none of auto, off, bf16, fp16."),
        ("- steps", "must hold `key: value` lines."),
        ("steps: [", "is not readable as YAML: "),
        ("steps: 1\nsteps: 2", "duplicate key steps"),
    ],
)
def test_a_wrong_file_is_refused_with_a_sentence(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(tmp_path, text)
    assert problem in str(caught.value)
    of_values = ("amp: on", "image_size: 0x768", "channels: 0b11")
    assert "config.yaml" in str(caught.value) or text in of_values


@pytest.mark.parametrize(
    "value",
    ["010", "1_000", "1:30", "0x768", "0b11", "+5", "1e-4", "1E3", "on", "no", "2017-01-01"],
)
def test_text_in_a_file_is_what_is_written_there(tmp_path: Path, value: str) -> None:
    names = ("test_split", "train_split", "category_names", "output_dir")
    config = parse_yaml(tmp_path, "".join(f"{name}: {value}\n" for name in names))
    assert {getattr(config, name) for name in names} == {value}
    with_quotes = parse_yaml(tmp_path, "".join(f"{name}: '{value}'\n" for name in names))
    flags = [part for name in names for part in (f"--{name}", value)]
    assert with_quotes == config == parse_config([*REQUIRED, *flags])


def test_numbers_in_a_file_are_those_of_flags(tmp_path: Path) -> None:
    config = parse_yaml(
        tmp_path, "steps: 010\nseed: 1_000\nlearning_rate: +1.5E-3\nwarmup_steps: 0"
    )
    assert (config.steps, config.seed, config.learning_rate) == (10, 1000, 0.0015)
    assert config == parse_config(
        [*REQUIRED, *"--steps 010 --seed 1_000 --learning_rate +1.5E-3 --warmup_steps 0".split()]
    )


def test_anchors_and_null_mean_in_a_file_what_they_mean_in_yaml(tmp_path: Path) -> None:
    config = parse_yaml(
        tmp_path, "train_split: &name no\nval_split: *name\nval_fraction: ~\npage:\n"
    )
    assert (config.train_split, config.val_split) == ("no", "no")
    assert config.val_fraction is None and config.page is None


def test_explicit_files_need_no_data_root() -> None:
    config = parse_config([*REQUIRED[2:], "--train_annotations", "a", "--train_images", "b"])
    assert config.data_root is None


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    printed = set(text.replace(",", " ").split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in printed
        assert (f"--no-{field.name}" in printed) == isinstance(field.default, bool)
    assert "--config" in printed


GROUPS = (
    "data",
    "model",
    "prompts and augmentation",
    "optimisation",
    "speed and memory",
    "output",
    "reliability",
)


def test_every_setting_is_in_one_group_and_each_group_is_in_one_place() -> None:
    groups = [field.metadata["group"] for field in dataclasses.fields(TrainConfig)]
    assert tuple(group for group, _ in itertools.groupby(groups)) == GROUPS


def test_help_lists_the_most_used_flags_and_then_the_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["most used:", *(f"{group} (advanced):" for group in GROUPS)]
    flags = [line.split()[0].strip(",") for line in lines if line.startswith("  --")]
    first = flags[1 : flags.index("--train_split")]  # after --config
    assert 12 <= len(first) <= 18
    assert {"--data_root", "--model_type", "--checkpoint_path", "--output_dir"} < set(first)
    assert sorted(flags) == sorted(["--config", *(f"--{name}" for name in OTHER)])


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "export", "check", "demo"])
def test_help_fits_into_80_columns_on_any_terminal(
    command: str,
    columns: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        importlib.import_module(f"samft.{command}").main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) in range(60, 81)


def test_long_example_commands_are_folded(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--first_flag VALUE --second_flag LONGER_VALUE"
    example = f"    python -m program {flags} --third-flag VALUE"
    parser = CommandParser("program", f"Does\nthings.\n\n{example}\n    short")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    folded = f"    python -m program {flags} \\\n        --third-flag VALUE"
    assert f"\nDoes things.\n\n{folded}\n    short\n" in capsys.readouterr().out


def test_parsing_imports_no_torch() -> None:
    code = (
        "import sys; from samft.config import parse_config\n"
        f"parse_config({REQUIRED!r})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_changed_settings_are_those_that_change_what_is_learnt() -> None:
    config = parse_config(REQUIRED)
    saved = dataclasses.asdict(config)
    assert changed_settings(saved, config) == []
    changed = dataclasses.replace(
        config, learning_rate=0.5, seed=3, output_dir="b", num_workers=0, device="cpu"
    )
    rows = [row.split() for row in changed_settings(saved, changed)]
    assert rows == [["learning_rate", "0.0001", "0.5"], ["seed", "0", "3"]]


# Of settings that some values of others leave without effect: values with which they have one.
EFFECTIVE: dict[str, dict[str, Any]] = {
    "tile_size": {"view": "tiles"},
    "tile_overlap": {"view": "tiles"},
    "view_context": {"view": "objects"},
    "lora_alpha": {"lora_rank": 4},
    "lora_targets": {"lora_rank": 4},
    "mask_prompt": {"correction_rounds": 2},
    "decay_fraction": {"lr_schedule": "wsd"},
    "layer_decay": {"freeze_image_encoder": False},
    "box_jitter": {"prompts": "mixed"},
    "val_fraction": {"val_annotations": None},
    "group_by": {"val_fraction": 0.2},
}
# And values with which they have none.
WITHOUT_EFFECT: dict[str, dict[str, Any]] = {
    "tile_overlap": {"view": "objects"},
    "view_context": {"view": "tiles"},
    "lora_targets": {"lora_rank": None},
    "mask_prompt": {"prompts": "mixed", "correction_rounds": 0},
    "decay_fraction": {"lr_schedule": "cosine"},
    "layer_decay": {"freeze_image_encoder": True},
    "box_jitter": {"prompts": "point"},
    "val_fraction": {"val_annotations": "a.json", "val_images": "images"},
    "group_by": {"val_fraction": None},
}


def test_each_field_is_either_free_on_resume_or_held() -> None:
    assert FREE_ON_RESUME < set(OTHER)
    for name, value in OTHER.items():
        config = dataclasses.replace(parse_config(REQUIRED), **EFFECTIVE.get(name, {}))
        saved = dataclasses.asdict(config)
        if value != saved[name]:
            rows = changed_settings(saved, dataclasses.replace(config, **{name: value}))
            assert [row.split()[0] for row in rows] == [name] * (name not in FREE_ON_RESUME)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_setting_without_effect_forbids_no_resume(name: str) -> None:
    config = dataclasses.replace(parse_config(REQUIRED), **WITHOUT_EFFECT[name])
    assert config.check() == []
    changed = dataclasses.replace(config, **{name: OTHER[name]})
    assert changed != config and changed.check() == []
    assert changed_settings(dataclasses.asdict(config), changed) == []
    assert changed_settings(dataclasses.asdict(changed), config) == []


@pytest.mark.parametrize(
    ("others", "name", "value"),
    [
        ({"view": "tiles", "image_size": 512}, "tile_size", 512),
        ({"lora_rank": 8}, "lora_alpha", 8.0),
        ({"prompts": "mixed"}, "correction_rounds", 7),
        ({}, "correction_rounds", 0),
        ({"learning_rate": 3e-4}, "encoder_learning_rate", 3e-4),
    ],
)
def test_a_default_that_is_spelled_out_forbids_no_resume(
    others: dict[str, Any], name: str, value: Any
) -> None:
    config = dataclasses.replace(parse_config(REQUIRED), **others)
    spelled_out = dataclasses.replace(config, **{name: value})
    assert changed_settings(dataclasses.asdict(config), spelled_out) == []
    assert changed_settings(dataclasses.asdict(spelled_out), config) == []
    other = dataclasses.replace(config, **{name: value * 2 or 1})
    (row,) = changed_settings(dataclasses.asdict(config), other)
    assert row.split()[0] == name


def test_what_makes_a_setting_effective_is_named_with_it() -> None:
    saved = dataclasses.asdict(parse_config(REQUIRED))
    config = dataclasses.replace(parse_config(REQUIRED), view="tiles", tile_overlap=0.5)
    assert [row.split()[0] for row in changed_settings(saved, config)] == ["view", "tile_overlap"]


def test_a_setting_that_the_saved_run_did_not_have_had_its_default() -> None:
    saved = dataclasses.asdict(parse_config(REQUIRED))
    del saved["crowds"]
    assert changed_settings(saved, parse_config(REQUIRED)) == []
    changed = dataclasses.replace(parse_config(REQUIRED), crowds="use")
    assert [row.split() for row in changed_settings(saved, changed)] == [["crowds", "auto", "use"]]


def configuration_page() -> str:
    module = runpy.run_path(str(REPOSITORY / "docs" / "generate_configuration.py"))
    page: str = module["configuration_page"]()
    return page


def test_the_page_of_the_configuration_is_the_generated_one() -> None:
    committed = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert committed == configuration_page(), "run `make docs`"


def test_the_page_has_a_row_for_every_setting_with_its_default() -> None:
    page = configuration_page()
    for setting in dataclasses.fields(TrainConfig):
        default = setting.default
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        cell = "" if default is None else f"`{shown}`"
        assert page.count(f"\n| `{setting.name}` | {cell} |") == 1, setting.name


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs").glob("*.yaml")))
def test_each_ready_made_configuration_is_valid_and_opens_with_its_command(file: Path) -> None:
    config = parse_config(["--config", str(file), "--data_root", "anywhere"])
    assert config.model_type is not None
    head = file.read_text().split("model_type:")[0]
    assert f"launch.sh --config configs/{file.name}" in head or file.name == "demo.yaml"
    assert "Hardware:" in head


def test_links_are_allowed_into_folders_or_anywhere(tmp_path: Path) -> None:
    assert link_folders(None) == ()
    assert link_folders("all") == (Path("/"),)
    assert link_folders("/pool, /cache") == (Path("/pool"), Path("/cache"))
    with_comma = tmp_path / "a,b"
    with_comma.mkdir()
    assert link_folders(str(with_comma)) == (with_comma,)
    required = ["--data_root", "d", "--model_type", "vit_tiny", "--checkpoint_path", "auto"]
    assert parse_config([*required, "--allow_links"]).allow_links == "all"
    assert parse_config(["--allow_links", "/pool", *required]).allow_links == "/pool"


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024x768", "1024x768"), ("'768x1024'", "768x1024"), ("512x512", 512), ("'512'", 512)],
)
def test_image_size_may_be_a_rectangle(tmp_path: Path, text: str, size: int | str) -> None:
    config = parse_yaml(tmp_path, f"image_size: {text}\n", *REQUIRED)
    assert config.image_size == size and type(config.image_size) is type(size)
    assert config == parse_config([*REQUIRED, "--image_size", text.strip("'")])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert parse_config(["--config", str(tmp_path / "again.yaml")]) == config
    made = dataclasses.replace(parse_config(REQUIRED), image_size=text.strip("'"))
    assert made.check() == [] and convert_values(made)[0].image_size == size


@pytest.mark.parametrize("value", ["[64, 48]", "64 x 48", "64.0", "true", "null", "''"])
def test_image_size_that_is_none_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="image_size: '.*' is neither a number of pixels"):
        parse_yaml(tmp_path, f"image_size: {value}\n", *REQUIRED)
