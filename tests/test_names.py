"""Names say their object, in the field's words: held over samft/, benchmarks/ and tests/."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import REPOSITORY

# What samft once called things, and nobody could guess.
PRIVATE_WORDS = {
    *("whereabouts", "being_loaded", "tell_failure", "who_is_missing", "naming_the_cause"),
    *("together", "raise_together", "side_by_side", "torchvision_cure", "naming_what_is_too_large"),
    *("kept_masks", "MaskKeeper", "offer", "adopt", "Candidate", "put_damaged_aside", "home_of"),
    *("plates", "plate", "paint_plate", "pixel_sums", "box_chunks", "prompted", "freezing"),
    *("saving", "caching", "before_after", "object_log", "gallery", "score_sheet", "score_tables"),
    *("Found", "found", "coco_fix", "Mended", "Recipe", "Foreseen", "foresee_cache", "set_aside"),
    *("sole_use", "read_newest", "throw_away_pass", "touching", "cut_objects", "draw_truths"),
    *("ask", "Answer", "words", "Told", "is_equal_to_the_bit", "assemble", "Ending", "whole_run"),
    *("dresses", "Wardrobe", "wardrobe", "scopes", "said", "told"),
}
BARE_VERBS = {
    *("read", "write", "note", "found", "run", "make", "put", "say", "tell", "ask", "take", "find"),
    *("draw", "see", "go", "save", "load", "map", "fill", "join", "check", "count", "list", "add"),
    *("begin", "collect", "choose", "prepare", "fetch", "cut", "mark", "round", "encode", "place"),
    *("cover", "paint", "shape", "standard", "blank", "fit", "build"),
}
FILES = sorted(
    path for room in ("samft", "benchmarks", "tests") for path in (REPOSITORY / room).rglob("*.py")
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def names_in(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every name that a source defines or uses."""
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield getattr(node, "lineno", 0), name


def private_words(source: str) -> list[str]:
    """Names that are, but for underscores before them, a private word."""
    return [
        f"{line}: {name}" for line, name in names_in(source) if name.strip("_") in PRIVATE_WORDS
    ]


def verbs_without_object(source: str) -> list[str]:
    """Private functions named by one verb: `_read` of what?"""
    return [
        f"{node.lineno}: {node.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, Function) and node.name.startswith("_")
        if node.name.strip("_") in BARE_VERBS and not node.name.endswith("__")
    ]


@pytest.mark.parametrize("rule", [private_words, verbs_without_object])
def test_names_say_their_object(rule) -> None:
    complaints = [
        f"{path.relative_to(REPOSITORY)}:{complaint}"
        for path in FILES
        if path != Path(__file__)
        for complaint in rule(path.read_text(encoding="utf-8"))
    ]
    assert not complaints, "\n".join(complaints)


def test_rules_catch() -> None:
    assert private_words("found = 1\nx._told(words=2)") == ["1: found", "2: _told", "2: words"]
    assert private_words("finding = find_files()") == []
    assert verbs_without_object("def _read(): ...\nclass A:\n    def _make_(self): ...") == [
        "1: _read",
        "3: _make_",
    ]
    assert (
        verbs_without_object("def _read_sidecar(): ...\ndef read(): ...\ndef __add__(): ...") == []
    )
