"""The Dockerfile, as far as it can be tested without Docker: what it copies, installs and starts.

Its steps run in a folder in place of an image: COPY and the installation as they are written, then
the entry point, with the variables that the image sets, as a user who owns nothing there.
"""

import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pytest
import torch

from helpers import REPOSITORY
from helpers.environments import OFFLINE, copy_clone, link_packages, run, shrink_clone

# Of torch's wheel for Linux, by its own metadata: Requires-Dist: cuda-toolkit[...]==13.0.3
CUDA_OF_TORCH = {"2.13.0": "13.0"}
DOCKERFILE = REPOSITORY / "Dockerfile"
HOME = "/home/trainer"


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Each instruction and its value, in order; comments are dropped, `\\` joins lines."""
    parse = pytest.importorskip("dockerfile_parse", reason="pip install '.[dev]'")
    parser = parse.DockerfileParser(fileobj=io.BytesIO(dockerfile.encode()))
    entries = [(entry["instruction"], entry["value"]) for entry in parser.structure]
    return [entry for entry in entries if entry[0] != "COMMENT"]


def values_of(name: str) -> list[str]:
    return [value for other, value in instructions(DOCKERFILE.read_text()) if other == name]


def is_in_context(name: str, dockerignore: str) -> bool:
    """Whether Docker sees a file: the last pattern that matches it or a folder above it decides."""
    path, included = PurePosixPath(name), True
    for line in dockerignore.splitlines():
        pattern = line.strip().removeprefix("!")
        if pattern and not pattern.startswith("#"):
            if any(matches(above, pattern) for above in (path, *path.parents[:-1])):
                included = line.startswith("!")
    return included


def matches(path: PurePosixPath, pattern: str) -> bool:
    """As Docker does: from the root of the context, `*` within a name, `**/` any folders."""
    at_any_depth = pattern.startswith("**/")
    parts = pattern.removeprefix("**/").split("/")
    names = path.parts[-len(parts) :] if at_any_depth else path.parts
    return len(names) == len(parts) and all(map(fnmatchcase, names, parts))


def context(clone: Path) -> list[str]:
    """The files of a clone that `docker build .` sees."""
    dockerignore = (clone / ".dockerignore").read_text()
    files = (path for path in clone.rglob("*") if path.is_file())
    names = (path.relative_to(clone).as_posix() for path in files)
    return sorted(name for name in names if is_in_context(name, dockerignore))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_clone(REPOSITORY, tmp_path_factory.mktemp("clone"))


def test_the_base_image_has_the_cuda_of_the_pinned_torch() -> None:
    pins = (REPOSITORY / "constraints.txt").read_text()
    (pinned,) = re.findall(r"^torch==(\S+)$", pins, flags=re.M)
    (base,) = values_of("FROM")
    (cuda,) = re.findall(r"^nvidia/cuda:(\d+\.\d+)\.\d+-base-ubuntu[\d.]+$", base)
    assert cuda == CUDA_OF_TORCH[pinned]
    if torch.version.cuda and torch.__version__.startswith(pinned):
        assert torch.version.cuda == cuda


def test_an_image_has_what_a_run_needs_and_nothing_else(clone: Path) -> None:
    (clone / "runs" / "mine").mkdir(parents=True)
    (clone / "runs" / "mine" / "last.ckpt").write_bytes(b"large")
    (clone / "DATASET").mkdir()
    (clone / "DATASET" / "image.jpg").write_bytes(b"private")
    cache = clone / "samft" / "models" / "__pycache__"
    cache.mkdir()
    (cache / "sam.pyc").write_bytes(b"")
    files = context(clone)
    shutil.rmtree(cache)
    top = {name.partition("/")[0] for name in files}
    assert top == {
        *("LICENSE", "README.md", "configs", "constraints.txt", "launch.sh", "pyproject.toml"),
        *("samft", "setup.cfg"),
    }
    package = {p.relative_to(clone).as_posix() for p in (clone / "samft").rglob("*") if p.is_file()}
    assert package == {name for name in files if name.startswith("samft/")}
    assert "samft/pretrained/vit_tiny.pth" in package


def test_patterns_of_docker_are_read_as_docker_reads_them() -> None:
    patterns = "*\n!samft\n!launch.sh\n**/__pycache__\n# all\n"
    names = (
        "samft/a/b.py",
        "launch.sh",
        "samft/__pycache__/x",
        "samft/a/__pycache__/x",
        "a/samft/b",
    )
    seen = [is_in_context(name, patterns) for name in names]
    assert seen == [True, True, False, False, False]
    assert not is_in_context("a.pth", "*.pth") and is_in_context("b/a.pth", "*.pth")


def test_all_that_is_copied_is_in_git_and_seen_by_docker(clone: Path) -> None:
    seen = context(clone)
    for value in values_of("COPY"):
        *sources, _ = value.split()
        for source in sources:
            assert source == "." or source in seen, f"COPY {source}"


def test_it_runs_as_another_user_than_root_with_volumes() -> None:
    order = [name for name, _ in instructions(DOCKERFILE.read_text())]
    (user,) = values_of("USER")
    assert user not in ("root", "0") and f"useradd --create-home {user}" in "".join(
        values_of("RUN")
    )
    assert order.index("USER") > max(i for i, name in enumerate(order) if name in ("RUN", "COPY"))
    (volumes,) = values_of("VOLUME")
    assert json.loads(volumes) == ["/samft/data", "/samft/runs"]
    (entry,) = values_of("ENTRYPOINT")
    assert json.loads(entry) == ["bash", "/samft/launch.sh"] and values_of("WORKDIR") == ["/samft"]


def test_its_commands_are_those_of_a_shell() -> None:
    for command in values_of("RUN"):
        run("bash", "-n", "-c", command, cwd=REPOSITORY)
    with pytest.raises(AssertionError, match="syntax error"):
        run("bash", "-n", "-c", "apt-get update &&", cwd=REPOSITORY)


def in_image(text: str, root: Path) -> str:
    """A text with the image's own paths at the folder that stands in for its root."""
    return re.sub(r"(?<![\w.])/(samft|opt|home)\b", rf"{root}/\1", text)


def copy_files(value: str, clone: Path, workdir: Path) -> None:
    *sources, target = value.split()
    names = context(clone) if sources == ["."] else sources
    for name in names:
        to = workdir / target / (name if sources == ["."] else Path(name).name)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clone / name, to)


@pytest.mark.processes
def test_its_steps_make_a_folder_in_which_any_user_runs_the_demo(
    clone: Path, tmp_path: Path
) -> None:
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root writes everywhere, and there is no setpriv to take that from it")
    root = tmp_path / "image"
    root.mkdir()
    environment = take_steps(clone, root)
    shrink_clone(root / "samft")
    (entry,) = values_of("ENTRYPOINT")
    with only_open_folders_writable(root) as start:
        with pytest.raises(AssertionError, match="Permission denied"):
            run(*start, "touch", "new", cwd=root / "samft", **environment)
        command = json.loads(in_image(entry, root))
        printed = run(*start, *command, cwd=root / "samft", **environment)
    assert "done: val_per_mask_iou" in printed, printed
    assert len(list((root / "samft" / "runs" / "demo").glob("2-*.ckpt"))) == 1
    assert (root / "samft" / "runs" / "cache").is_dir()


@contextmanager
def only_open_folders_writable(root: Path) -> Iterator[list[str]]:
    """Lets nobody write but where any user may; what a command is started with to be held to it."""
    closed = [path for path in root.rglob("*") if not path.is_symlink()]
    modes = {path: mode for path in closed if not (mode := path.stat().st_mode) & 0o002}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    yield ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    for path, mode in modes.items():
        path.chmod(mode)


def take_steps(clone: Path, root: Path) -> dict[str, str]:
    """Runs the steps that make an image, but for Ubuntu's packages; what ENV sets in the end."""
    programs = root / "programs"
    programs.mkdir()
    python = f'exec {shlex.quote(sys.executable)} "$@"'
    for name, text in (("python3", python), ("useradd", "mkdir -p " + in_image(HOME, root))):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", **OFFLINE}
    environment["PYTHONPATH"] = str(link_packages(root / "packages"))
    for name, value in instructions(DOCKERFILE.read_text()):
        if name == "ENV":
            for word in shlex.split(in_image(value, root)):
                variable, _, text = word.partition("=")
                environment[variable] = text.replace("$PATH", environment["PATH"])
        elif name == "WORKDIR":
            (root / "samft").mkdir()
        elif name == "COPY":
            copy_files(value, clone, root / "samft")
        elif name == "RUN" and not value.startswith("apt-get "):
            run("bash", "-ec", in_image(value, root), cwd=root / "samft", **environment)
    return environment
