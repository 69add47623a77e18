"""samft as an installed package: built, installed, and used outside of the checkout."""

import json
import re
import shlex
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers import REPOSITORY
from helpers.environments import make_environment, run
from samft import __version__

pytestmark = pytest.mark.processes
SMALL = "--image_size 64 --steps 2 --metrics_interval 2 --batch_size 2".split()
ON_CPU = ("--num_workers", "0", "--device", "cpu")


def install(target: object, bin: Path, *options: str) -> None:
    """`pip install TARGET` in an environment, from what is there."""
    pip = (sys.executable, "-m", "pip", "--python", bin / "python", "install", "-q")
    offline = ("--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(*pip, *offline, *options, target, cwd=bin)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, as a build leaves files in it."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "samft", folder / "samft", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    pytest.importorskip("build", reason="no build: pip install '.[dev]'")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


def test_sdist_and_wheel_hold_every_file_of_the_package(built: Path) -> None:
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "samft").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    name = f"samft-{__version__}"
    with tarfile.open(built / f"{name}.tar.gz") as sdist:
        assert expected <= {path.partition("/")[2] for path in sdist.getnames()}
    with zipfile.ZipFile(built / f"{name}-py3-none-any.whl") as wheel:
        assert expected == {path for path in wheel.namelist() if path.startswith("samft/")}


def test_it_installs_from_a_folder_with_an_extra(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install '.[onnx]'")
    bin = make_environment(tmp_path / "env")
    install(f"{source}[onnx]", bin)
    assert run(bin / "samft", "--version", cwd=tmp_path) == f"samft {__version__}\n"


def commands_in(text: str, program: str) -> list[list[str]]:
    """The commands that a text tells a person to run, split as a shell splits them."""
    pattern = rf"^ +({re.escape(program)} .*)$|`({re.escape(program)} [^`]*)`"
    return [shlex.split(line or quoted) for line, quoted in re.findall(pattern, text, flags=re.M)]


def test_every_command_that_it_prints_works_as_printed(built: Path, tmp_path: Path) -> None:
    home = tmp_path / "my work"  # outside of the checkout; the environment is not active
    home.mkdir()
    program = "env/bin/samft"
    bin = make_environment(home / "env")
    wheel = built / f"samft-{__version__}-py3-none-any.whl"
    install(wheel, bin, "--no-deps", "--ignore-installed")

    overview = run(program, cwd=home)
    demo, check = (line for line in commands_in(overview, program) if line[1] != "COMMAND")
    written = run(*demo, "--images", "12", "--size", "64", cwd=home)
    assert check[-1] == "DATASET"
    run(*check[:-1], demo[-1], cwd=home)

    (train,) = commands_in(written, program)
    log = run(*train, *SMALL, *ON_CPU, cwd=home)
    evaluate, predict = commands_in(log, program)
    run(*evaluate, *ON_CPU, cwd=home)
    run(*predict, *ON_CPU, cwd=home)
    results = Path(predict[predict.index("--output_dir") + 1]) / "results.json"
    assert json.loads((home / results).read_text())
    (tensorboard,) = commands_in(log, "env/bin/python -m tensorboard.main")
    run(*tensorboard[:3], "--version", cwd=home)
    (load,) = re.findall("^ +(from samft import .*)$", log, flags=re.M)
    run("env/bin/python", "-c", load, cwd=home)

    active = run(program, cwd=home, PATH=f"{bin}:/usr/bin:/bin")
    assert commands_in(active, "samft")[-1][:2] == ["samft", "check"]
