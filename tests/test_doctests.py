"""The examples in the docstrings of samft give what they show."""

import doctest
import importlib

import pytest

from helpers import REPOSITORY

MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for path in (REPOSITORY / "samft").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_show(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed, capsys.readouterr().out


def test_what_callers_use_has_examples() -> None:
    assert {"samft.api", "samft.config", "samft.models.sam", "samft.training.losses"} <= set(
        MODULES
    )
