"""Python environments and shells as on a machine that knows nothing of the tests' own Python.

Nothing is downloaded: the environments see the packages of this Python.
"""

import re
import subprocess
import sys
from pathlib import Path

SECONDS = 540
# What pip takes for its flags --no-index and --no-build-isolation.
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(*command: object, cwd: Path, **variables: str) -> str:
    """A command in a shell that knows nothing of this Python; its output, both streams."""
    ended = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def package_folders() -> list[str]:
    """Where the packages of this Python are."""
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def link_packages(folder: Path) -> Path:
    """A folder with links to these packages, but for samft, for a PYTHONPATH.

    An installation of samft that was in there would come before the one that is tested.
    """
    folder.mkdir()
    for packages in map(Path, package_folders()):
        for path in packages.iterdir():
            link = folder / path.name
            if "samft" not in path.name and not link.is_symlink():
                link.symlink_to(path)
    return folder


def make_environment(folder: Path) -> Path:
    """A virtual environment without samft that sees the packages of this Python; its `bin`."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "packages_of_the_tests.pth").write_text("\n".join(package_folders()))
    pip = folder / "bin" / "pip"
    pip.write_text(f'#!/bin/bash\nexec {folder}/bin/python -m pip "$@"\n')
    pip.chmod(0o755)
    return folder / "bin"


def copy_clone(repository: Path, folder: Path) -> Path:
    """A clone of the repository with what is not committed yet, but without its history."""
    listed = run(
        "git", "-C", repository, "ls-files", "-z", "-co", "--exclude-standard", cwd=repository
    )
    for name in listed.split("\0"):
        if name and (repository / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((repository / name).read_bytes())
            (folder / name).chmod((repository / name).stat().st_mode)
    return folder


def shrink_clone(clone: Path) -> None:
    """Makes the demo of a clone a run of two small steps on the CPU; its command stays the same.

    Exports compare few automatic masks.
    """
    config = clone / "configs" / "demo.yaml"
    for name, value in (("image_size", 64), ("steps", 2), ("metrics_interval", 2)):
        _replace(config, rf"^{name}: .*$", f"{name}: {value}")
    config.write_text(f"{config.read_text()}device: cpu\n")
    module = clone / "samft" / "exporters" / "automatic_masks.py"
    _replace(module, r"^POINTS_PER_SIDE = \d+", "POINTS_PER_SIDE = 2")


def _replace(path: Path, pattern: str, line: str) -> None:
    text, replaced = re.subn(pattern, line, path.read_text(), flags=re.M)
    assert replaced == 1, pattern
    path.write_text(text)
