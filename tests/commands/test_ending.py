"""How processes end: with their exit code and all that they wrote, whatever still waits in them."""

import subprocess
import sys

import pytest

from helpers.short_runs import COMMAND_SECONDS, clean_environment

# Its standard output is a pipe, so what it prints lies in a buffer until that is flushed.
PROGRAM = """
import atexit, logging, threading
from logging.handlers import MemoryHandler
from samft import ending

ending.END_SECONDS = 0.2
held = MemoryHandler(1000, target=logging.FileHandler("log"))
logging.getLogger().addHandler(held)
logging.warning("the last line of the log")
atexit.register(print, "by the way of the interpreter")
print("the last words")
ending.end_in_background({what})
ending.end_process(7)
"""


@pytest.mark.parametrize(
    ("what", "output"),
    [
        ("threading.Event().wait", "the last words\n"),
        ("lambda: None", "the last words\nby the way of the interpreter\n"),
    ],
)
def test_a_process_ends_with_its_code_and_its_words(
    tmp_path: object, what: str, output: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(what=what)],
        cwd=str(tmp_path),
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        env=clean_environment(),
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, output, "")
    with open(f"{tmp_path}/log") as log:
        assert log.read() == "the last line of the log\n"
