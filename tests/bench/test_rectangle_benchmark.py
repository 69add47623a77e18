"""The comparison of a rectangle with its square."""

import re

import pytest

from benchmarks import rectangle


def test_the_table_compares_equal_work(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    made = []
    make_part = rectangle.make_part
    monkeypatch.setattr(rectangle, "measure_peak", lambda *_: 2.0)
    monkeypatch.setattr(rectangle, "count_core_seconds", lambda: None)
    monkeypatch.setattr(
        rectangle, "make_part", lambda *a, **k: made.append((a, k)) or make_part(*a, **k)
    )
    sizes = ["--model_type", "vit_tiny", "--image_size", "64x48", "--boxes", "2"]
    rectangle.main([*sizes, "--rounds", "1", "--warm_up", "0"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| part | 64 | 64x48 | ratio | 64 | 64x48 | ratio |"
    assert [row.split()[1] for row in rows[1:]] == list(rectangle.PARTS)
    assert all(re.fullmatch(r"\| \w+ (\| [\d.]+ s ){2}\| [\d.]+ (\| .*)", row) for row in rows[1:])
    assert [(size, how["part"]) for (_, size), how in made] == [
        (size, part) for part in rectangle.PARTS for size in (64, "64x48")
    ]
