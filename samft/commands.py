"""The commands of samft: their table, and how to type one in the shell that a person is in.

Imports nothing but small parts of the standard library: `samft` alone answers at once.
"""

import os
import shlex
import shutil
import site
import sys
import sysconfig
from pathlib import Path

# Each is the module samft.NAME, which `samft NAME` runs as `python -m samft.NAME` does.
COMMANDS = {
    "demo": "write a small COCO dataset to try things on",
    "convert": "make a COCO dataset of label images, YOLO, LabelMe or VOC, or back",
    "check": "list what is wrong with a dataset, and write repaired annotations",
    "train": "tune Segment Anything on a dataset",
    "evaluate": "score checkpoints on every object of a split",
    "average": "average untouched and tuned weights, and keep the best",
    "predict": "write masks for images, from boxes, clicks or automatic",
    "export": "write a checkpoint for other programs",
}


def shell_command(name: str, *arguments: object) -> str:
    """A command of samft that can be copied into the shell that started this process.

    It names this Python's own `samft`, by its path where the shell would find another or none, such
    as in a virtual environment that is not active.

    Args:
        name: One of `COMMANDS`, or a word that stands for one.
        arguments: Flags and values, which are quoted.
    """
    return shell_program("samft", name, *arguments)


def shell_program(script: str, *arguments: object, module: str | None = None) -> str:
    """As `shell_command`, for any program that is installed beside samft.

    Args:
        script: Its name.
        arguments: Flags and values, which are quoted.
        module: What `python -m` runs where there is no such script; None: the same name.
    """
    path = _installed_script(script)
    program = [path] if path else [shell_python(), "-m", module or script]
    return shlex.join([*program, *map(str, arguments)])


def shell_python() -> str:
    """The Python that runs this, as the shell finds it: `python`, or its path."""
    first_on_path = shutil.which("python")
    here = Path(sys.executable)
    is_first = first_on_path and _is_same_file(Path(first_on_path).parent, here.parent)
    return "python" if is_first else _shortest_path(here)


def _installed_script(name: str) -> str | None:
    folders = [sysconfig.get_path("scripts")]
    if site.ENABLE_USER_SITE and sys.prefix == sys.base_prefix:
        folders.append(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user")))
    scripts = [Path(folder) / name for folder in folders]
    script = next((path for path in scripts if os.access(path, os.X_OK)), None)
    if script is None:
        return None
    first_on_path = shutil.which(name)
    is_first = first_on_path and _is_same_file(Path(first_on_path), script)
    return name if is_first else _shortest_path(script)


def _is_same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _shortest_path(path: Path) -> str:
    relative = os.path.relpath(path)
    return min(str(path), relative, key=len) if os.sep in relative else f".{os.sep}{relative}"
