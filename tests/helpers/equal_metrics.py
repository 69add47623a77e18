"""Compares two metrics.jsonl."""

from pathlib import Path

import pytest

from helpers.short_runs import (
    read_metrics,
)


def check_equal_metrics(folder: Path, other: Path, *, rel: float = 1e-6) -> None:
    ours, theirs = read_metrics(folder), read_metrics(other)
    keys = [(line["step"], line["split"]) for line in ours]
    assert len(set(keys)) == len(keys) and keys == [(v["step"], v["split"]) for v in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        for name in ("loss", "loss_focal", "loss_dice", "loss_iou", "per_mask_iou"):
            # Losses near zero differ by as much as the large ones, of which they are a part.
            close = pytest.approx(expected[name], rel=rel, abs=rel / 10)
            assert line[name] == close, (line["step"], name)
        assert line.get("lr") == expected.get("lr")
