"""Files from strangers: checkpoints run no code, file names forge no lines, nothing listens."""

import ast
import hashlib
import json
import os
import pickle
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import REPOSITORY
from helpers.short_runs import arguments, command_here, write_data
from samft.cli import run_command
from samft.errors import DataError, TrainingError

PACKAGE = REPOSITORY / "samft"
FILES = sorted(PACKAGE.rglob("*.py"))

# Code that runs what it reads


DANGERS = frozenset(
    """pickle _pickle dill cloudpickle joblib shelve marshal
    eval exec builtins.eval builtins.exec
    os.system os.popen subprocess.getoutput subprocess.getstatusoutput
    yaml.load yaml.load_all yaml.full_load yaml.unsafe_load yaml.UnsafeLoader yaml.Loader
    torch.jit.load torch.hub.load torch.package.PackageImporter
    """.split()
)
PICKLE_BETWEEN_PROCESSES = frozenset(
    """all_gather_object broadcast_object_list gather_object scatter_object_list
    send_object_list recv_object_list""".split()
)
# Processes of one job trust each other: what collectives send is pickled, by PyTorch or by us.
EXCHANGE = ("distributed", "pickle")  # the module, and what it may use
# Calls that are safe with a certain argument only: its name, and the one value that is.
ONLY_WITH = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
}
SHELL = ("run", "Popen", "call", "check_call", "check_output")


def names_of(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for, as in {"np": "numpy", "load": "torch.load"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module or ''}.{alias.name}"
    return names


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Every module, and everything of a module, that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The full name of a.b.c, with what `a` was imported as; '' for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def is_literal(call: ast.Call, name: str, value: object) -> bool:
    """Whether a call gives a keyword argument exactly this value."""
    given = [word.value for word in call.keywords if word.arg == name]
    return len(given) == 1 and isinstance(given[0], ast.Constant) and given[0].value is value


def begins_with_one_of(name: str, dangers: frozenset[str]) -> bool:
    """Whether a dotted name is a dangerous one, or lies in it."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in dangers for length in range(1, len(parts) + 1))


def unsafe_calls(tree: ast.Module, names: dict[str, str]) -> Iterator[str]:
    """Calls with the wrong arguments, and functions passed on to be called with who knows what."""
    checked = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        if name in ONLY_WITH and is_literal(node, *ONLY_WITH[name]):
            checked.add(node.func)
        if name in {f"subprocess.{one}" for one in SHELL}:
            for word in node.keywords:
                literal = isinstance(word.value, ast.Constant) and word.value.value is False
                if word.arg in ("shell", None) and not literal:
                    yield f"{name} with a shell"
    for node in ast.walk(tree):
        name = dotted(node, names)
        if name in ONLY_WITH and node not in checked:
            argument, value = ONLY_WITH[name]
            yield f"{name} without {argument}={value}"


def runs_what_it_reads(source: str, module: str) -> list[str]:
    """Whatever would run code, or a shell, from a file or a name of someone else's."""
    tree = ast.parse(source)
    names = names_of(tree)
    dangers = DANGERS - {EXCHANGE[1]} if module == EXCHANGE[0] else DANGERS
    complaints = [f"imports {one}" for one in imports_of(tree) if begins_with_one_of(one, dangers)]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = dotted(node, names)
            if name in dangers:
                complaints.append(f"uses {name}")
            if name.split(".")[-1] in PICKLE_BETWEEN_PROCESSES and module != EXCHANGE[0]:
                complaints.append(f"uses {name}")
    return complaints + list(unsafe_calls(tree, names))


def test_nothing_in_the_package_runs_what_it_reads() -> None:
    complaints = [
        f"{path.relative_to(REPOSITORY)}: {complaint}"
        for path in FILES
        for complaint in runs_what_it_reads(path.read_text(encoding="utf-8"), path.stem)
    ]
    assert not complaints, "\n".join(complaints)


BAD = [
    ("import pickle", ["imports pickle"]),
    ("import pickle as p", ["imports pickle"]),
    ("from pickle import loads", ["imports pickle.loads"]),
    ("def f():\n    import marshal", ["imports marshal"]),
    ("eval('1')", ["uses eval"]),
    ("exec(text)", ["uses exec"]),
    ("map(eval, lines)", ["uses eval"]),
    ("import builtins\nbuiltins.eval(text)", ["uses builtins.eval"]),
    ("import os\nos.system(line)", ["uses os.system"]),
    ("import os as o\no.popen(line)", ["uses os.popen"]),
    ("from os import system", ["imports os.system"]),
    ("import yaml\nyaml.load(file)", ["uses yaml.load"]),
    ("import yaml\nyaml.unsafe_load(file)", ["uses yaml.unsafe_load"]),
    ("import subprocess\nsubprocess.run(x, shell=True)", ["subprocess.run with a shell"]),
    ("import subprocess\nsubprocess.run(x, shell=y)", ["subprocess.run with a shell"]),
    ("import subprocess\nsubprocess.Popen(x, **more)", ["subprocess.Popen with a shell"]),
    ("from subprocess import run\nrun(x, shell=1)", ["subprocess.run with a shell"]),
    ("import subprocess\nsubprocess.getoutput(x)", ["uses subprocess.getoutput"]),
    ("import torch\ntorch.load(path)", ["torch.load without weights_only=True"]),
    ("import torch\ntorch.load(p, weights_only=False)", ["torch.load without weights_only=True"]),
    ("import torch\ntorch.load(p, weights_only=x)", ["torch.load without weights_only=True"]),
    ("import torch\ntorch.load(p, **options)", ["torch.load without weights_only=True"]),
    ("import torch as t\nt.load(path)", ["torch.load without weights_only=True"]),
    ("from torch import load as r\nr(path)", ["torch.load without weights_only=True"]),
    ("import torch\npartial(torch.load, p)", ["torch.load without weights_only=True"]),
    ("import torch\ntorch.jit.load(path)", ["uses torch.jit.load"]),
    ("import numpy as np\nnp.load(path)", ["numpy.load without allow_pickle=False"]),
    (
        "import torch.distributed as dist\ndist.all_gather_object(a, b)",
        ["uses torch.distributed.all_gather_object"],
    ),
]


@pytest.mark.parametrize(("source", "complaints"), BAD)
def test_the_rule_catches(source: str, complaints: list[str]) -> None:
    assert runs_what_it_reads(source, "losses") == complaints


GOOD = """
import subprocess
import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
model.eval()
model.load(path)
torch.load(path, map_location="cpu", weights_only=True)
np.load(path, mmap_mode="r", allow_pickle=False)
OmegaConf.load(path)
subprocess.run(["git", "-C", folder], check=False)
subprocess.run(["git"], shell=False)
"""


def test_the_rule_lets_good_source_pass() -> None:
    assert runs_what_it_reads(GOOD, "losses") == []
    gather = "import torch.distributed as dist\ndist.all_gather_object(a, b)"
    assert runs_what_it_reads(gather, "distributed") == []
    assert runs_what_it_reads("import pickle\npickle.loads(content)", "distributed") == []
    assert runs_what_it_reads("import marshal", "distributed") == ["imports marshal"]


# Checkpoints that would run a command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


class _Command:
    # Unpickled, it runs a command.
    def __init__(self, line: str) -> None:
        self.line = line

    def __reduce__(self) -> Any:
        return os.system, (self.line,)


def as_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def as_legacy_pickle(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_plain_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def with_sidecar(path: Path) -> Path:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({"format": 1, "sha256": [digest]}))
    return path


def as_weights(folder: Path, write: Callable[[Any, Path], None], content: Any) -> dict[str, Any]:
    write(content, folder / "sam.pth")
    return {"checkpoint_path": folder / "sam.pth"}


def as_top_k(folder: Path, write: Callable[[Any, Path], None], content: Any) -> dict[str, Any]:
    write(content, folder / "20-0.75.ckpt")
    return {"checkpoint_path": with_sidecar(folder / "20-0.75.ckpt")}


def as_last(folder: Path, write: Callable[[Any, Path], None], content: Any) -> dict[str, Any]:
    (folder / "run").mkdir()
    write(content, folder / "run/last.ckpt")
    with_sidecar(folder / "run/last.ckpt")
    return {}


def as_previous(folder: Path, write: Callable[[Any, Path], None], content: Any) -> dict[str, Any]:
    (folder / "run/previous").mkdir(parents=True)
    write(content, folder / "run/previous/last.ckpt")
    with_sidecar(folder / "run/previous/last.ckpt")
    return {}


def as_resume(folder: Path, write: Callable[[Any, Path], None], content: Any) -> dict[str, Any]:
    write(content, folder / "last.ckpt")
    return {"resume": with_sidecar(folder / "last.ckpt")}


def as_bare_resume(
    folder: Path, write: Callable[[Any, Path], None], content: Any
) -> dict[str, Any]:
    write(content, folder / "last.ckpt")  # without a sidecar it is read, unchecked
    return {"resume": folder / "last.ckpt"}


FORMATS = (as_zip, as_legacy_pickle, as_plain_pickle)
PLACES = (as_weights, as_top_k, as_last, as_previous, as_resume, as_bare_resume)


@pytest.mark.parametrize("write", FORMATS, ids=lambda f: f.__name__)
def test_the_attack_works_on_a_reader_that_trusts(write, tmp_path: Path) -> None:
    planted = tmp_path / "PLANTED"
    write({"model": _Command(f"touch {shlex.quote(str(planted))}")}, tmp_path / "file")
    if write is as_plain_pickle:
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert planted.exists()


@pytest.mark.parametrize("write", FORMATS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(
    place, write, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    planted = tmp_path / "PLANTED"
    weights = {"image_encoder.pos_embed": torch.zeros(1, 4, 4, 128)}
    attack = _Command(f"touch {shlex.quote(str(planted))}")
    content = {"format": 1, "config": {}, "model": weights, "best": [attack]}
    changes = place(tmp_path, write, content)
    assert command_here(arguments(data, tmp_path / "run", **changes)) == 2
    printed = capfd.readouterr().err
    assert printed.count("error: ") == 1 and "Traceback" not in printed, printed
    assert not planted.exists()


# File names that would forge lines of a log, or steer a terminal

FORGED = "2026-11-24 12:00:00,000 step 9999: loss 0.0000"
HOSTILE_NAME = f"a\n{FORGED}\n\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202e.png"


def rename(root: Path, old: str, new: str) -> Path:
    """Gives a training image another name, on the disk and in the JSON."""
    annotations = root / "train/_annotations.coco.json"
    document = json.loads(annotations.read_text())
    for image in document["images"]:
        if image["file_name"] == old:
            image["file_name"] = new
    annotations.write_text(json.dumps(document))
    return (root / "train" / old).rename(root / "train" / new)


def cut(content: bytes) -> bytes:
    """A PNG that is seen to be cut short at the start of a run."""
    return content[:-40]


def spoil(content: bytes) -> bytes:
    """A PNG of which only decoding tells that it is broken."""
    return content[:60] + bytes(len(content) - 80) + content[-20:]


def assert_harmless(text: str) -> None:
    """The output holds the hostile name, but no forged line and no control character."""
    assert FORGED in text
    assert not [line for line in text.split("\n") if line.startswith((FORGED, "\\x1b"))]
    assert all(c.isprintable() or c == "\n" for c in text), ascii(text)


@pytest.mark.parametrize("break_it", [cut, spoil])
def test_a_file_name_forges_nothing_in_the_log(
    break_it, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", num_train=2, num_val=1)
    image = rename(data, "image_0.png", HOSTILE_NAME)
    image.write_bytes(break_it(image.read_bytes()))
    argv = arguments(data, tmp_path / "run", steps=1, on_bad_image="skip")
    assert command_here(argv) == 0
    assert_harmless((tmp_path / "run/train.log").read_text())
    assert_harmless(capsys.readouterr().err)
    left_out = json.loads((tmp_path / "run/summary.json").read_text())["data"]["train"]
    assert HOSTILE_NAME in left_out["bad_images"]  # as it is, for programs


@pytest.mark.parametrize("break_it", [cut, spoil])
def test_a_file_name_forges_nothing_in_an_error(
    break_it, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", num_train=1, num_val=1)
    image = rename(data, "image_0.png", HOSTILE_NAME)
    image.write_bytes(break_it(image.read_bytes()))
    assert command_here(arguments(data, tmp_path / "run", steps=1)) == 2
    assert_harmless(capsys.readouterr().err)
    # launch.sh prints this.
    reason = json.loads((tmp_path / "run/status.json").read_text())["reason"]
    assert FORGED in reason and all(c.isprintable() or c == "\n" for c in reason), ascii(reason)


@pytest.mark.parametrize("kind", [DataError, TrainingError])
def test_an_error_keeps_its_letters_and_loses_its_control_characters(
    kind, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> None:
        raise kind("été 東京 \U0001f600:\n\tone\x1b[1m\x7f\ud800")

    run_command(main, [])
    expected = "error: été 東京 \U0001f600:\n  \tone\\x1b[1m\\x7f\\ud800\n"
    assert capsys.readouterr().err == expected


# The network


def test_one_host_listens_to_itself_only() -> None:
    environment = {"LAUNCH_DRY_RUN": "1", "NPROC_PER_NODE": "2", "SAMFT_PYTHON": "python"}
    ended = subprocess.run(
        ["bash", str(REPOSITORY / "launch.sh"), "--output_dir", "run"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], **environment},
        check=True,
    )
    command = shlex.split(ended.stdout)
    assert "--standalone" in command
    assert not {"--master_addr", "--rdzv_endpoint", "--rdzv-endpoint"} & set(command)
