"""The rules of the house for samft/, which `make check` holds together with ruff and mypy.

Each rule is a function from source text to a list of complaints, so that it can be shown to fail.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import REPOSITORY

PACKAGE = REPOSITORY / "samft"
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_FILES_OF_A_ROOM = 12

# A room (or a file beside the rooms) imports only what stands on a line above its own, and itself.
ORDER = (
    ("errors", "commands", "suggestions", "step_costs", "ending"),
    ("cli", "rendezvous"),
    ("settings", "config_checks", "suggested_settings"),
    ("config", "distributed"),
    ("runtime",),
    ("images",),
    ("views",),
    ("annotations",),
    ("coco",),
    ("interchange", "weights"),
    ("models", "data"),
    ("embeddings", "checkpoints", "training"),
    ("evaluation",),
    ("reports",),
    ("prediction",),
    ("exporters",),
    ("recipes",),
    ("api",),
    ("__main__", "train", "evaluate", "average", "predict", "export", "check", "demo", "convert"),
)
COMMANDS = ORDER[-1]
WITHOUT_TORCH = (
    *ORDER[0],
    "cli",
    "settings",
    "config_checks",
    "suggested_settings",
    "config",
    "images",
    "views",
    "annotations",
    "coco",
    "interchange",
    *COMMANDS,
)
KNOW_THE_CONFIG = ("__init__", "config", "recipes", "api", *COMMANDS)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def too_long_file(source: str, module: str) -> list[str]:
    """A file of more lines than one reads at a sitting."""
    lines = len(source.splitlines())
    return [f"{lines} lines, over {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []


def too_long_functions(source: str, module: str) -> list[str]:
    """Functions of more lines than fit on a screen, docstring included."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                complaints.append(f"{node.name}: {lines} lines, over {MAX_FUNCTION_LINES}")
    return complaints


def imported_rooms(source: str) -> set[str]:
    """The rooms, and files beside them, that a source imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # Modules import each other by their whole name: `from . import x` is refused by ruff.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("samft.")} - {"load_sam"}


def room_of(module: str) -> str:
    """`data` of `data.samplers`; a file beside the rooms is a room of its own."""
    return module.split(".")[0]


def wrong_imports(source: str, module: str) -> list[str]:
    """Imports of rooms on the same or a later line of `ORDER`."""
    room = room_of(module)
    if room == "__init__" or unknown_room(source, module):
        return []
    line = next(i for i, names in enumerate(ORDER) if room in names)
    allowed = {room} - set(COMMANDS)
    allowed |= {name for names in ORDER[:line] for name in names}
    known = {name for names in ORDER for name in names}
    return [f"imports samft.{name}" for name in sorted(imported_rooms(source) & known - allowed)]


def config_seen(source: str, module: str) -> list[str]:
    """TrainConfig anywhere but where runs are put together: the rest takes plain arguments."""
    if room_of(module) in KNOW_THE_CONFIG:
        return []
    for node in ast.walk(ast.parse(source)):
        names = (
            getattr(node, "id", None),
            getattr(node, "attr", None),
            getattr(node, "name", None),
        )
        if "TrainConfig" in names:
            return ["knows TrainConfig"]
    return []


def unknown_room(source: str, module: str) -> list[str]:
    """A room, or a file beside the rooms, without a place in the order: named utils, say."""
    known = {"__init__", *(name for names in ORDER for name in names)}
    return [] if room_of(module) in known else [f"samft.{room_of(module)} has no place in ORDER"]


def public_definitions(tree: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Classes, functions and methods whose names do not begin with an underscore."""
    for node in tree.body:
        if isinstance(node, (Function, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


def missing_docstrings(source: str, module: str) -> list[str]:
    """Modules and public names that do not say what they are."""
    tree = ast.parse(source)
    complaints = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    for node in public_definitions(tree):
        if not ast.get_docstring(node):
            complaints.append(f"{node.name} has no docstring")
    return complaints


def methods(tree: ast.Module) -> set[ast.AST]:
    """The functions that take self or cls."""
    return {
        node
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, Function)
        and not any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list)
    }


def missing_annotations(source: str, module: str) -> list[str]:
    """Arguments and results without a type."""
    tree = ast.parse(source)
    bound = methods(tree)
    complaints = []
    for node in ast.walk(tree):
        if not isinstance(node, Function):
            continue
        args = node.args
        positional = [*args.posonlyargs, *args.args][1 if node in bound else 0 :]
        every = [*positional, *args.kwonlyargs, args.vararg, args.kwarg]
        names = [arg.arg for arg in every if arg is not None and arg.annotation is None]
        if node.returns is None:
            names.append("result")
        complaints += [f"{node.name}: {name} has no type" for name in names]
    return complaints


RULES = (
    too_long_file,
    too_long_functions,
    wrong_imports,
    config_seen,
    unknown_room,
    missing_docstrings,
    missing_annotations,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_rule(rule) -> None:
    complaints = [
        f"{path.relative_to(REPOSITORY)}: {complaint}"
        for path in FILES
        for complaint in rule(path.read_text(encoding="utf-8"), module_name(path))
    ]
    assert not complaints, "\n".join(complaints)


def module_name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")


def test_modules_are_found() -> None:
    assert {"__init__", "errors", "config", "training.engine", "train"} <= {
        module_name(p) for p in FILES
    }


LONG_BODY = "\n".join(["    pass"] * MAX_FUNCTION_LINES)

BAD = [
    (too_long_file, "losses", "\n" * (MAX_FILE_LINES + 1), "501 lines, over 500"),
    (too_long_functions, "losses", f"def f():\n{LONG_BODY}", "f: 61 lines, over 60"),
    (
        too_long_functions,
        "losses",
        "class A:\n    async def g(self):\n" + LONG_BODY.replace("    ", "        "),
        "g: 61 lines, over 60",
    ),
    (
        wrong_imports,
        "training.losses",
        "from samft.recipes.train import run",
        "imports samft.recipes",
    ),
    (wrong_imports, "data.samplers", "import samft.models.sam", "imports samft.models"),
    (wrong_imports, "coco.index", "from samft.data import samplers", "imports samft.data"),
    (wrong_imports, "errors", "from samft import cli", "imports samft.cli"),
    (wrong_imports, "recipes.build", "def f():\n    import samft.train", "imports samft.train"),
    (wrong_imports, "check", "from samft.train import main", "imports samft.train"),
    (wrong_imports, "train", "from samft.export import main", "imports samft.export"),
    (
        config_seen,
        "training.engine",
        "from samft.config import TrainConfig",
        "knows TrainConfig",
    ),
    (config_seen, "models.sam", "import samft.config as c\nc.TrainConfig()", "knows TrainConfig"),
    (unknown_room, "utils", "", "samft.utils has no place in ORDER"),
    (unknown_room, "helpers.sam", "", "samft.helpers has no place in ORDER"),
    (missing_docstrings, "losses", "x = 1", "the module has no docstring"),
    (missing_docstrings, "losses", '"""M."""\ndef f(): ...', "f has no docstring"),
    (missing_docstrings, "losses", '"""M."""\nclass A: ...', "A has no docstring"),
    (
        missing_docstrings,
        "losses",
        '"""M."""\nclass A:\n    """A."""\n    def g(self): ...',
        "g has no docstring",
    ),
    (missing_annotations, "losses", "def f(x) -> None: ...", "f: x has no type"),
    (missing_annotations, "losses", "def f(*, x) -> None: ...", "f: x has no type"),
    (missing_annotations, "losses", "def f(*x, **y: int) -> None: ...", "f: x has no type"),
    (missing_annotations, "losses", "def f(x: int): ...", "f: result has no type"),
    (
        missing_annotations,
        "losses",
        "class A:\n    @staticmethod\n    def g(x) -> None: ...",
        "g: x has no type",
    ),
]


@pytest.mark.parametrize(("rule", "module", "source", "complaint"), BAD)
def test_rule_catches(rule, module: str, source: str, complaint: str) -> None:
    assert rule(source, module) == [complaint]


GOOD = '''"""M."""
from samft import errors
class A:
    """A."""
    def __getitem__(self, i: int) -> int:
        return i
    @classmethod
    def make(cls, *args: int) -> "A":
        """Makes one."""
        return cls()
'''


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_lets_good_source_pass(rule) -> None:
    assert rule(GOOD, "training.losses") == []
    assert wrong_imports("from samft.recipes.train import run", "train") == []
    assert config_seen("from samft.config import TrainConfig", "train") == []


RUFF_BAD = {
    "C901": '"""M."""\n\n\ndef f(x: int) -> int:\n    """F."""\n'
    + "".join(f"    if x == {i}:\n        return {i}\n" for i in range(10))
    + "    return x\n",
    "D103": '"""M."""\n\n\ndef f() -> None:\n    return None\n',
    "ANN001": '"""M."""\n\n\ndef f(x) -> None:\n    """F."""\n',
    # Names of a room are whole, so that a test can read which rooms a file imports.
    "TID252": '"""M."""\n\nfrom . import engine\n\nprint(engine)\n',
}


@pytest.mark.parametrize("code", RUFF_BAD)
def test_ruff_catches(code: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    ended = subprocess.run(
        [*command, "--stdin-filename", "samft/losses.py", "-"],
        input=RUFF_BAD[code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("samft/")]
    assert [line.split()[1] for line in lines] == [code], ended.stdout


def run_python(source: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", source, *args]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""


def test_torch_free_rooms_import_no_torch() -> None:
    modules = [module_name(path).removesuffix(".__init__") for path in FILES]
    torch_free = [f"samft.{name}" for name in modules if room_of(name) in WITHOUT_TORCH]
    assert len(torch_free) > 15
    ended = run_python(IMPORT_ALL, *torch_free)
    assert ended.returncode == 0, ended.stderr


LAZY_NAMES = """
import sys, samft
assert samft.TrainConfig(steps=3).steps == 3
assert {"finetune", "load_sam", "TrainConfig"} <= set(dir(samft)) & set(samft.__all__)
assert "torch" not in sys.modules
assert callable(samft.finetune) and "torch" in sys.modules
"""


def test_torch_is_imported_with_the_first_name_that_needs_it() -> None:
    ended = run_python(LAZY_NAMES)
    assert ended.returncode == 0, ended.stderr


def test_torch_would_be_seen() -> None:
    ended = run_python(IMPORT_ALL, "samft.errors", "samft.runtime.torchvision_compat")
    assert ended.stderr.endswith("torchvision_compat imports torch\n"), ended.stderr


def test_test_files_have_names_of_their_own() -> None:
    # pytest imports them by these names, whatever their folder.
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_no_room_is_crowded() -> None:
    for room in (path for path in PACKAGE.iterdir() if path.is_dir()):
        modules = [path for path in room.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MAX_FILES_OF_A_ROOM, f"{room.name}: {len(modules)} modules"


HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(f"samft.{sys.argv[0]}", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("torch" in sys.modules)
"""


@pytest.mark.parametrize(("command", "flag"), [("train", "--learning_rate"), ("predict", "--box")])
def test_help_imports_no_torch(command: str, flag: str) -> None:
    ended = run_python(HELP, command)
    assert ended.returncode == 0, ended.stderr
    assert flag in ended.stdout
    assert ended.stdout.endswith("False\n")
