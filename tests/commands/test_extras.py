"""Missing packages are named with the command that installs them."""

import configparser
import re
from pathlib import Path

import pytest

from samft import cli
from samft.cli import EXTRAS, require_extra
from samft.commands import shell_program
from samft.errors import ConfigError


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch) -> None:
    monkeypatch.setitem(EXTRAS, "onnx", ("json", "no_such_package_a", "no_such_package_b"))
    with pytest.raises(ConfigError) as caught:
        require_extra("onnx", what="--format onnx")
    message = str(caught.value)
    assert message.startswith("--format onnx needs no_such_package_a and no_such_package_b,")
    command = message.split("`")[1]
    assert command == shell_program("pip", *"install no_such_package_a no_such_package_b".split())


def test_installed_packages_are_no_error(monkeypatch) -> None:
    monkeypatch.setitem(EXTRAS, "onnx", ("json", "numpy"))
    require_extra("onnx", what="--format onnx")


# Of MLflow and Trackio, developers have what their tests need, or nothing: see setup.cfg.
LARGE = {"mlflow", "trackio"}


def test_the_extras_are_those_of_setup_cfg_and_all_but_large_ones_are_for_developers() -> None:
    parser = configparser.ConfigParser()
    parser.read(Path(cli.__file__).parent.parent / "setup.cfg")
    declared = {
        extra: {re.split("[^a-z0-9-]", line)[0].replace("-", "_") for line in lines.split("\n")}
        for extra, lines in parser["options.extras_require"].items()
    }
    for extra, packages in EXTRAS.items():
        assert declared[extra] - {""} == set(packages)
        assert set(packages) <= declared["dev"] or extra in LARGE
