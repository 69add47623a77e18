"""Markdown tables of the benchmarks, and numbers in them. Imports no torch."""

import statistics
from collections.abc import Sequence


def markdown_table(head: str, rows: Sequence[str]) -> str:
    """A Markdown table from its head and its rows, each `| cell | cell |`."""
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])


def format_speedups(reference: Sequence[float], seconds: Sequence[float]) -> str:
    """How many times faster than the reference, by round: median (lowest to highest)."""
    return format_spread([one / other for one, other in zip(reference, seconds, strict=True)])


def format_spread(values: Sequence[float]) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
