"""What runs and evaluations left in their folders, value by value, and where two of them differ."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Keys of metrics.jsonl and of an evaluation's numbers that may differ without a change of results.
MAY_DIFFER = frozenset(
    """images_per_second masks_per_second peak_memory_gib seconds train_seconds wall_seconds
    samft_version torch_version git_commit""".split()
)
_STATE = ("model", "optimizer", "scaler")  # of last.ckpt; the rest are settings and clocks


@dataclass(frozen=True)
class Content:
    """What was read from files: a count in words, and every single value under a name."""

    count: str
    values: dict[str, Any]


def read_weights(folder: Path) -> Content:
    """All tensors of the best checkpoints and of last.ckpt, and the optimizer's settings."""
    values: dict[str, Any] = {}
    paths = sorted(folder.glob("*.ckpt"))
    for path in paths:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if path.name == "last.ckpt":
            state = {name: state[name] for name in _STATE}
        values.update(_leaves(state, path.name))
    tensors = sum(isinstance(value, Tensor) for value in values.values())
    # Without tensors there is nothing to compare, whatever numbers there are.
    return Content(f"{len(paths)} checkpoints, {tensors} tensors", values if tensors else {})


def read_metrics(folder: Path) -> Content:
    """The lines of metrics.jsonl."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = {f"line {n}, step {one['step']}": one for n, one in enumerate(records, 1)}
    return Content(f"{len(records)} lines of metrics", dict(_leaves(lines, "metrics.jsonl")))


def read_scores(folder: Path) -> Content:
    """An evaluation's numbers, and the scores of each object."""
    with (folder / "scores.objects.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    objects = [dict(zip(head, row, strict=True)) for row in rows]
    values = dict(_leaves(json.loads((folder / "scores.json").read_text()), "scores.json"))
    numbers = len(values)
    values.update(_leaves({"head": head, "row": objects}, "objects.csv"))
    return Content(f"{numbers} scores, {len(rows)} objects", values if rows else {})


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, (dict, list, tuple)):
        yield name, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if key not in MAY_DIFFER:
            yield from _leaves(item, f"{name}: {key}")


def compare(before: Content, after: Content) -> str:
    """`equal`, or the first value that is not, and how many more there are."""
    if not before.values and not after.values:
        return "nothing was found to compare"
    names = dict.fromkeys([*before.values, *after.values])
    differences = [
        text for name in names if (text := _difference(name, before.values, after.values))
    ]
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    return f"{differences[0]}{more}" if differences else "equal"


def _difference(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if name not in before or name not in after:
        return f"{name}: only {'before' if name in before else 'after'}"
    one, other = before[name], after[name]
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        # As text: 1 is not 1.0, and nan is nan.
        return "" if repr(one) == repr(other) else f"{name}: before {one!r}, after {other!r}"
    if one.dtype != other.dtype or one.shape != other.shape:
        kinds = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (one, other)]
        return f"{name}: before {kinds[0]}, after {kinds[1]}"
    if torch.equal(one, other):
        return ""
    return f"{name}: up to {(one.double() - other.double()).abs().max().item():.3g} apart"
