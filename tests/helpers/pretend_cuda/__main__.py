"""Runs a module or script with pretended GPUs: `python -m helpers.pretend_cuda MODULE ARGS...`.

Environment variables:
    PRETEND_CUDA_DEVICES   how many GPUs; 1
    PRETEND_CUDA_GIB       their memory; 80
    PRETEND_CUDA_REPORT    a file for the report, as JSON, with the process's rank at its end;
                           else it is printed at the end
"""

import atexit
import os
import runpy
import sys
from pathlib import Path

from helpers.pretend_cuda.extension import build_library, missing_requirement
from helpers.pretend_cuda.install import count_steps, install, library_from_environment


def main() -> None:
    """Runs what the arguments name, to its end."""
    library = library_from_environment()
    if library is None:
        if reason := missing_requirement():
            sys.exit(f"The harness cannot run here: {reason}.")
        library = build_library()
    install(library)
    count_steps()
    atexit.register(_write_report)
    _run_as_main(sys.argv[1:])


def _run_as_main(argv: list[str]) -> None:
    if argv[0].endswith(".py"):
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")
    else:
        sys.argv = argv
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def _write_report() -> None:
    from helpers.pretend_cuda.ledger import LEDGER
    from helpers.pretend_cuda.stream_order import ORDER

    ORDER.look_for_early_reuse()
    if path := os.environ.get("PRETEND_CUDA_REPORT"):
        LEDGER.report.write(Path(f"{path}.{os.environ.get('RANK', '0')}"))
    else:
        print(LEDGER.report, file=sys.stderr)


if __name__ == "__main__":
    main()
