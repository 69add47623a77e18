"""The rules of the house for samft/, which `make check` holds together with ruff and mypy.

Each rule is a function from source text to a list of complaints, so that it can be shown to fail.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "samft"
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60

# A module imports only what stands above it. A new module is given its place here.
LAYERS = (
    "errors",
    "extras",
    "torchvision_cure",
    "files",
    "signals",
    "command_line",
    "flags",
    "config",
    "distributed",
    "images",
    "problems",
    "layout",
    "masks",
    "mask_checks",
    "coverage",
    "coco_json",
    "coco_images",
    "coco_objects",
    "coco_build",
    "coco_index",
    "coco",
    "coco_fix",
    "dataset_report",
    "checked_split",
    "prediction_task",
    "box_sources",
    "transforms",
    "targets",
    "augment",
    "samplers",
    "batch",
    "whereabouts",
    "prefetch",
    "embedding_store",
    "data",
    "loaders",
    "attention",
    "activation_checkpointing",
    "cross_attention",
    "decoder",
    "box_chunks",
    "weights",
    "sam",
    "freezing",
    "prompted",
    "embeddings",
    "precompute",
    "pixel_sums",
    "losses",
    "metrics",
    "boundary",
    "scores",
    "kept_masks",
    "comparison",
    "optim",
    "progress",
    "checkpoint",
    "training_state",
    "pictures",
    "cutouts",
    "results",
    "contact_sheets",
    "logs",
    "saving",
    "object_log",
    "validation",
    "prompts",
    "evaluation",
    "score_tables",
    "coco_ap",
    "score_sheet",
    "mask_generation",
    "gallery",
    "prediction",
    "engine",
    "report",
    "curves",
    "markup",
    "report_page",
    "splits",
    "assemble",
    "before_after",
    "resume",
    "caching",
    "dry_run",
    "host_checks",
    "ending",
    "run",
    "guard",
    "evaluation_run",
    "plates",
    "reference",
    "automatic_masks",
    "weight_files",
    "onnx_files",
    "huggingface",
    "exporting",
)
ENTRY_POINTS = ("train", "evaluate", "predict", "export", "check", "demo")
KNOW_THE_CONFIG = {
    "config",
    "splits",
    "assemble",
    "before_after",
    "resume",
    "caching",
    "dry_run",
    "ending",
    "run",
    "guard",
    *ENTRY_POINTS,
}
ENTRY_POINTS_THAT_TRAIN_USES = {"check", "demo"}
WITHOUT_TORCH = (
    "errors",
    "extras",
    "files",
    "signals",
    "command_line",
    "flags",
    "config",
    "images",
    "problems",
    "layout",
    "masks",
    "mask_checks",
    "coverage",
    "coco_json",
    "coco_images",
    "coco_objects",
    "coco_build",
    "coco_index",
    "coco",
    "coco_fix",
    "dataset_report",
    "checked_split",
    "prediction_task",
    "box_sources",
    "transforms",
    "targets",
    "embedding_store",
    "pictures",
    "cutouts",
    "results",
    "contact_sheets",
    "curves",
    "markup",
    "plates",
    "predict",
    "check",
    "demo",
    "evaluate",
    "export",
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def too_long_file(source: str, module: str) -> list[str]:
    """A file of more lines than one reads at a sitting."""
    lines = len(source.splitlines())
    return [f"{lines} lines, over {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []


def too_long_functions(source: str, module: str) -> list[str]:
    """Functions of more lines than fit on a screen, docstring included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{node.name}: {lines} lines, over {MAX_FUNCTION_LINES}")
    return found


def imported_modules(source: str) -> set[str]:
    """The modules of samft that a source imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "samft." * (node.level > 0) + (node.module or "")
            names = [f"{base.rstrip('.')}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("samft.")}
    return found


def wrong_imports(source: str, module: str) -> list[str]:
    """Imports of modules further down, and of entry points by each other."""
    if module == "__init__" or unknown_module(source, module):
        return []
    if module in ENTRY_POINTS:
        allowed = set(LAYERS)
        if module == "train":
            allowed |= ENTRY_POINTS_THAT_TRAIN_USES
    else:
        allowed = set(LAYERS[: LAYERS.index(module)])
    known = set(LAYERS) | set(ENTRY_POINTS)
    imported = imported_modules(source) & known
    return [f"imports samft.{name}" for name in sorted(imported - allowed)]


def config_seen(source: str, module: str) -> list[str]:
    """TrainConfig anywhere but where runs are put together: the rest takes plain arguments."""
    if module in KNOW_THE_CONFIG:
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


def unknown_module(source: str, module: str) -> list[str]:
    """A module without a place in the order: named utils, say, or new."""
    known = ("__init__", *LAYERS, *ENTRY_POINTS)
    return [] if module in known else [f"samft.{module} has no place in LAYERS"]


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
    found = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    for node in public_definitions(tree):
        if not ast.get_docstring(node):
            found.append(f"{node.name} has no docstring")
    return found


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
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, Function):
            continue
        args = node.args
        positional = [*args.posonlyargs, *args.args][1 if node in bound else 0 :]
        every = [*positional, *args.kwonlyargs, args.vararg, args.kwarg]
        names = [arg.arg for arg in every if arg is not None and arg.annotation is None]
        if node.returns is None:
            names.append("result")
        found += [f"{node.name}: {name} has no type" for name in names]
    return found


RULES = (
    too_long_file,
    too_long_functions,
    wrong_imports,
    config_seen,
    unknown_module,
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
    assert {"__init__", "errors", "config", "engine", "train"} <= {module_name(p) for p in FILES}


LONG_BODY = "\n".join(["    pass"] * MAX_FUNCTION_LINES)

BAD = [
    (too_long_file, "losses", "\n" * (MAX_FILE_LINES + 1), "351 lines, over 350"),
    (too_long_functions, "losses", f"def f():\n{LONG_BODY}", "f: 61 lines, over 60"),
    (
        too_long_functions,
        "losses",
        "class A:\n    async def g(self):\n" + LONG_BODY.replace("    ", "        "),
        "g: 61 lines, over 60",
    ),
    (wrong_imports, "losses", "from samft.engine import train", "imports samft.engine"),
    (wrong_imports, "losses", "import samft.losses", "imports samft.losses"),
    (wrong_imports, "losses", "from samft import engine", "imports samft.engine"),
    (wrong_imports, "losses", "from . import engine", "imports samft.engine"),
    (wrong_imports, "losses", "from .engine import train", "imports samft.engine"),
    (wrong_imports, "losses", "def f():\n    import samft.train", "imports samft.train"),
    (wrong_imports, "check", "from samft.train import main", "imports samft.train"),
    (wrong_imports, "train", "from samft.export import main", "imports samft.export"),
    (config_seen, "engine", "from samft.config import TrainConfig", "knows TrainConfig"),
    (config_seen, "engine", "import samft.config as c\nc.TrainConfig()", "knows TrainConfig"),
    (unknown_module, "utils", "", "samft.utils has no place in LAYERS"),
    (unknown_module, "models.sam", "", "samft.models.sam has no place in LAYERS"),
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
import samft.torchvision_cure
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
    assert rule(GOOD, "losses") == []
    assert wrong_imports("from samft.demo import write_demo", "train") == []
    assert config_seen("from samft.config import TrainConfig", "train") == []


RUFF_BAD = {
    "C901": '"""M."""\n\n\ndef f(x: int) -> int:\n    """F."""\n'
    + "".join(f"    if x == {i}:\n        return {i}\n" for i in range(10))
    + "    return x\n",
    "D103": '"""M."""\n\n\ndef f() -> None:\n    return None\n',
    "ANN001": '"""M."""\n\n\ndef f(x) -> None:\n    """F."""\n',
    # The cure has to come before torchvision, whatever the alphabet says.
    "I001": '"""M."""\n\nimport torchvision\n\nimport samft.torchvision_cure\n\n'
    "print(torchvision, samft)\n",
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


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_module_imports_no_torch(module: str) -> None:
    ended = run_python(f"import samft.{module}, sys; print('torch' in sys.modules)")
    assert (ended.returncode, ended.stdout) == (0, "False\n"), ended.stderr


def test_torch_would_be_seen() -> None:
    ended = run_python("import samft.torchvision_cure, sys; print('torch' in sys.modules)")
    assert ended.stdout == "True\n", ended.stderr


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
