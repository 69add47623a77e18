"""Exit codes, the user's errors, and text as a terminal may get it. Imports nothing of samft."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from typing import TextIO

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


def escape_unprintable(text: str) -> str:
    """Replaces control characters with escapes, so that a file name cannot control a terminal.

    Args:
        text: Any text; newlines and tabs are kept.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def escape_paragraph(text: str) -> str:
    """Also indents all lines but the first, so that a file name cannot forge a line of the log."""
    return escape_unprintable(text).replace("\n", "\n  ")


# What is never broken, with the spaces before it: `a command`, 'a quoted path', any other word.
_UNBROKEN = re.compile(r"\s*(?:`[^`]*`\S*|(?<!\S)'[^']*'\S*|\S+)")
_NARROWEST = 40  # columns; a narrower terminal breaks lines by itself


def fold_for_terminal(text: str, stream: TextIO | None, *, indent: int = 2) -> str:
    """Breaks long lines between words where a terminal would break them within words.

    Args:
        text: Printable. Whole words stay whole, so that paths and commands can be copied.
        stream: Where it is going to be written; for anything but a terminal the text is unchanged.
        indent: Spaces before what follows a break in the first line; other lines are two deeper.
    """
    try:
        width = os.get_terminal_size(stream.fileno()).columns if stream and stream.isatty() else 0
    except (OSError, ValueError):  # a stream without a file, or one that is closed
        return text
    if width < _NARROWEST:
        return text
    first, *others = text.split("\n")
    lines = [_fold_line(first, width, margin=" " * indent)]
    for line in others:
        own = line[: len(line) - len(line.lstrip())]
        lines.append(_fold_line(line, width, margin=f"{own}  "))
    return "\n".join(lines)


def _fold_line(line: str, width: int, *, margin: str) -> str:
    folded, column = "", 0
    for word in _UNBROKEN.findall(line):
        if column and column + len(word) > width:
            word = margin + word.lstrip()
            folded, column = f"{folded}\n", 0
        folded, column = folded + word, column + len(word)
    return folded


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
_MEMORY_ADVICE = (
    "End other programs that use it, or take a smaller model, smaller images, fewer of them at "
    "once, or fewer num_workers."
)


# In the words of CUDA, NCCL, cuBLAS, cuDNN, PyTorch's allocators, the kernel, OpenCV, onnxruntime.
# NCCL may name no cause but a CUDA call of its own, whose buffers find no room beside PyTorch's.
_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot|unable to|failed to) allocate (memory|shared memory|\d)"
    r"|not enough memory: you tried to allocate|Insufficient memory|bad_alloc|bad allocation"
    r"|STATUS_(INTERNAL_ERROR_DEVICE_)?ALLOC(ATION)?_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling .?cublasCreate"
    r"|unhandled cuda error(?!.*Cuda failure)",
    re.IGNORECASE | re.DOTALL,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whatever library, means that a GPU or the host has too little memory."""
    if isinstance(error, _SanitizedError):  # a sentence of ours, which may quote anything
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return _NO_MEMORY.search(str(error)) is not None


def first_sentence(message: str) -> str:
    """The first sentence of an error's message, without its full stop."""
    first_line = (message.strip().splitlines() or [""])[0]
    return re.split(r"\. (?=[A-Z])", first_line)[0].rstrip(".: ")


@contextlib.contextmanager
def explain_out_of_memory(describe: Callable[[], str], *, advice: str) -> Iterator[None]:
    """Raises a sentence for what any library raises where memory is short.

    Args:
        describe: Called for the sentence: what memory is needed for, as in "to validate image 3".
        advice: What to do.

    Raises:
        TrainingError: There was not enough memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(_memory_sentence(error, describe(), advice=advice)) from error


def _memory_sentence(error: BaseException, what_for: str, *, advice: str) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    # Of NCCL and of another thread's traceback, the last such line names the cause.
    cause = [line for line in lines if _NO_MEMORY.search(line)][-1:] or lines[:1]
    return (
        f"not enough memory {what_for}{''.join(f': {first_sentence(c)}' for c in cause)}. {advice}"
    )


def explain_host_error(error: BaseException) -> str | None:
    """A sentence for an error of the host that any line of code may meet, such as a full disk.

    Args:
        error: Any exception.

    Returns:
        What happened, where, and what to do; None for any other error.
    """
    if is_out_of_memory(error):
        return _memory_sentence(error, "on this GPU or host", advice=_MEMORY_ADVICE)
    if not isinstance(error, OSError):
        return None
    if error.errno in _NO_ROOM:
        where = error.filename or "a file"
        advice = "make room, or name a folder on another disk, and run again"
        return f"{where} cannot be written or read ({error.strerror}): {advice}."
    if error.errno in TOO_MANY_FILES:
        return (
            f"too many files are open at once ({error.strerror}): raise the limit (`ulimit -n`), "
            "or lower num_workers."
        )
    return None


class _SanitizedError(Exception):
    # The message is printed and written to status.json, and may hold a file name.
    def __str__(self) -> str:
        return escape_unprintable(super().__str__())


class UserError(_SanitizedError, ValueError):
    """Wrong usage, configuration, data or checkpoint; the message says what, where, what to do."""


class ConfigError(UserError):
    """A command line or YAML file that cannot be used; raised on every rank alike."""


class DataError(UserError):
    """A dataset, annotation file or image that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or does not fit the model."""


class SharedError(UserError):
    """A UserError raised on one rank and re-raised on all; only rank 0 prints it."""


class TrainingError(_SanitizedError, RuntimeError):
    """The run cannot continue (say, the loss is not finite); printed without a traceback."""


class CollectiveError(TrainingError):
    """A collective failed: another process is gone or does not answer, or the network broke."""


class ExportError(_SanitizedError, RuntimeError):
    """A written file does not give the expected outputs; printed without a traceback."""


class RunStopped(Exception):
    """The run was asked to stop and has saved everything; the same command resumes it."""
