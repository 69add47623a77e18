"""Errors that are the user's to mend, and how a command turns any ending into an exit code."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


def escape_unprintable(text: str) -> str:
    """Text that may hold a name from outside, with escapes for what could steer a terminal.

    Args:
        text: Of any characters; line ends and tabs stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def escape_paragraph(text: str) -> str:
    """Text of which only the first line begins at the margin, so that it cannot forge others."""
    return escape_unprintable(text).replace("\n", "\n  ")


class _SanitizedError(Exception):
    # Its words are printed and written to status.json, and may hold a file's name.
    def __str__(self) -> str:
        return escape_unprintable(super().__str__())


class UserError(_SanitizedError, ValueError):
    """Wrong usage, configuration, data or checkpoint: what, where, what to do, in a sentence."""


class ConfigError(UserError):
    """A command line or YAML file that cannot be used; every rank finds the same."""


class DataError(UserError):
    """A dataset, annotation file or image that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that does not fit."""


class SharedError(UserError):
    """A user's error that one rank found and all were told, so that all end and one speaks."""


class TrainingError(_SanitizedError, RuntimeError):
    """The run cannot go on (say, the loss is not finite); a sentence, shown without a traceback."""


class ExportError(_SanitizedError, RuntimeError):
    """A file that was written does not do what it should; a sentence, without a traceback."""


class RunStopped(Exception):
    """The run was asked to stop and has saved everything; running it again goes on from there."""
