"""Exit codes, and the exceptions that are the user's to resolve. Imports nothing of samft."""

import errno

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


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


def explain_os_error(error: BaseException) -> str | None:
    """A sentence for an error of the host that any line of code may meet, such as a full disk.

    Args:
        error: Any exception.

    Returns:
        What happened, where, and what to do; None for any other error.
    """
    if not isinstance(error, OSError):
        return None
    if error.errno in _NO_ROOM:
        where = error.filename or "a file"
        advice = "make room, or name a folder on another disk, and run again"
        return f"{where} cannot be written or read ({error.strerror}): {advice}."
    if error.errno in _TOO_MANY_FILES:
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


class ExportError(_SanitizedError, RuntimeError):
    """A written file does not give the expected outputs; printed without a traceback."""


class RunStopped(Exception):
    """The run was asked to stop and has saved everything; the same command resumes it."""
