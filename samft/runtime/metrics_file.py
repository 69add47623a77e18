"""metrics.jsonl: its whole lines, and the numbers of the damaged ones. Imports no torch."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

FILE_NAME = "metrics.jsonl"
GENERAL_PREFIX = "general_"  # of the names of the general set's metrics, in lines of validation
_MAX_STEP = 2**53  # from here on JSON readers disagree about whole numbers


class MetricsLine(NamedTuple):
    """One line: its text as it stands in the file, without a line end, and what it says."""

    text: str
    record: dict[str, Any]


class MetricsLines(NamedTuple):
    """All lines of a file, in its order.

    Attributes:
        whole: Those that can be used.
        damaged: The numbers, from 1, of those that cannot, or that repeat an earlier one.
    """

    whole: list[MetricsLine]
    damaged: list[int]


def read_metrics_file(path: Path) -> MetricsLines:
    """Reads metrics.jsonl; each line is judged by itself, and none costs another one.

    Args:
        path: The file; an absent one has no lines.

    Raises:
        OSError: It cannot be read.
    """
    lines = MetricsLines([], [])
    seen = set()
    # Not `splitlines`, which also splits at characters that JSON allows within a line.
    content = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, encoded in enumerate(content, start=1):
        if not encoded.strip():
            continue
        line = _parse_line(encoded)
        key = line and (line.record["step"], line.record["split"])
        if line is None or key in seen:
            lines.damaged.append(number)
            continue
        seen.add(key)
        lines.whole.append(line)
    return lines


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by name, without its step; those that were not finite are left out."""
    return {n: v for n, v in record.items() if n not in ("step", "split") and v is not None}


def _parse_line(encoded: bytes) -> MetricsLine | None:
    # RecursionError: brackets within brackets.
    try:
        text = encoded.decode().lstrip("\ufeff").strip()
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("split") not in ("train", "val"):
        return None
    step = record.get("step")
    if type(step) is not int or not 0 <= step <= _MAX_STEP:
        return None
    values = (value for name, value in record.items() if name not in ("step", "split"))
    return MetricsLine(text, record) if all(map(_is_value, values)) else None


def _is_value(value: Any) -> bool:
    # A number that a chart can show, or null for one that was not finite.
    if value is None:
        return True
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:
        return False


def describe_damage(numbers: list[int]) -> str:
    """Begins a sentence about damaged lines: "line 3 is", "lines 3, 4, 6 and 7 more are"."""
    listed = ", ".join(map(str, numbers[:3]))
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"line {listed} is" if len(numbers) == 1 else f"lines {listed}{more} are"
