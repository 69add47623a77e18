"""Which name is meant by one that does not exist."""

from dataclasses import fields

import pytest

from samft import check, evaluate, predict
from samft.commands import COMMANDS
from samft.config import TrainConfig, parse_config
from samft.errors import ConfigError
from samft.suggestions import _OTHER_NAMES, suggest_nearest

FLAGS = ["--config", "--help", *(f"--{field.name}" for field in fields(TrainConfig))]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--lr", "--learning_rate"),
        ("--epochs", "--steps"),
        ("--bs", "--batch_size"),
        ("-b", "--batch_size"),
        ("--workers", "--num_workers"),
        ("--imgsz", "--image_size"),
        ("--LR", "--learning_rate"),
        ("--learning-rate", "--learning_rate"),
        ("--model_tipe", "--model_type"),
        ("--split", "--train_split, --val_split or --test_split"),
        ("--fraction_val", "--val_fraction"),
        ("--freeze_encoder", "--freeze_image_encoder or --freeze_prompt_encoder"),
        ("--fraction", "--val_fraction or --decay_fraction"),
        ("--output", "--output_dir"),
        ("--hlep", "--help"),
    ],
)
def test_a_flag_is_suggested_by_meaning_word_or_letters(given: str, meant: str) -> None:
    assert suggest_nearest(given, FLAGS) == f" Did you mean {meant}?"


@pytest.mark.parametrize("given", ["--zzz", "--", "-", "", "--a_b_c"])
def test_where_nothing_is_near_nothing_is_suggested(given: str) -> None:
    assert suggest_nearest(given, FLAGS) == ""


def test_the_other_names_are_those_of_flags_and_commands_and_no_name_of_ours() -> None:
    ours = {flag.strip("-") for flag in FLAGS} | {*COMMANDS, "checkpoint"}
    assert _OTHER_NAMES.keys() <= ours
    assert not {other for names in _OTHER_NAMES.values() for other in names.split()} & (
        ours - {"checkpoint_path"}  # a flag of the training, and a mistake elsewhere
    )


COMMAND_LINES = [
    (parse_config, "--lr 3", "--lr: no such flag. Did you mean --learning_rate?"),
    (parse_config, "--lr=3", "--lr=3: no such flag. Did you mean --learning_rate?"),
    (check.main, "--dataset X", "--dataset: no such flag. Did you mean --data_root?"),
    (evaluate.main, "--weights=X", "--weights: no such flag. Did you mean --checkpoint?"),
    (predict.main, "--chekpoint X --out Y", "Did you mean --checkpoint? --out: no such flag. "),
    (predict.main, "--out Y", "Did you mean --output_dir? `"),
]


@pytest.mark.parametrize(("main", "line", "message"), COMMAND_LINES)
def test_every_command_answers_a_wrong_flag(main, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(line.split())
    assert message in str(caught.value)
    assert "are required" not in str(caught.value)
