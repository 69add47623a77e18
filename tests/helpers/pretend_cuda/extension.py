"""The compiled part: `devices.cpp` as a shared library, kept outside of the repository."""

import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("devices.cpp")


def missing_requirement() -> str:
    """Why the harness cannot run here; empty if it can. Imports no torch."""
    if shutil.which("g++") is None:
        return "no g++ to compile the pretended CUDA devices with"
    if "+cu" in importlib.metadata.version("torch"):
        return "PyTorch is built for CUDA; the harness needs a build for CPUs only"
    if (_torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "PyTorch is built for CUDA; the harness needs a build for CPUs only"
    return ""


def build_library() -> Path:
    """Compiles the devices unless that was done before for this PyTorch; takes 10 to 20 s.

    Returns:
        The shared library, below the folder where PyTorch keeps extensions that it compiles.
    """
    version = importlib.metadata.version("torch")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    folder = _extensions_folder() / f"pretend_cuda-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"devices-{digest}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        if not library.exists():
            _compile(library)
    return library


def load_library(library: Path) -> None:
    """Loads the devices; must come before `import torch`, whose start looks for devices.

    Raises:
        RuntimeError: torch is imported already.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the pretended CUDA devices have to be loaded before torch is imported")
    libraries = _torch_folder() / "lib"
    ctypes.CDLL(str(libraries / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    for path in (libraries / "libc10.so", libraries / "libtorch_cpu.so", library):
        ctypes.CDLL(str(path))


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")  # does not import it
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _extensions_folder() -> Path:
    # As `torch.utils.cpp_extension` has it, by the variable that it documents.
    own = Path.home() / ".cache" / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", own))


def _compile(library: Path) -> None:
    torch = _torch_folder()
    partial = library.with_suffix(f".{os.getpid()}")
    includes = (torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(partial)]
    command += [f"-I{folder}" for folder in includes]
    command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    os.replace(partial, library)
