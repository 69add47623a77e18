"""Whatever stands in a COCO file, reading it ends well or with a documented error.

Each test that could take the process with it runs in a process of its own.
"""

import faulthandler
import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.broken_coco import SQUARE, encode_image, rle
from helpers.coco_files import annotation
from helpers.segmentations import check_segmentation, decode_segmentation
from samft.annotations.notation import MaskError
from samft.annotations.problems import KINDS
from samft.annotations.segmentation import decode_cropped
from samft.coco.index import index_file
from samft.coco.subset import read_coco
from samft.errors import DataError

pytestmark = pytest.mark.processes

CASES = 500
SECONDS = 240  # for all cases of a test, however busy the machine is

NUMBER = st.one_of(
    st.integers(-3, 40),
    st.floats(-50, 50),
    st.floats(),
    st.integers(),
    st.sampled_from([0, -1, 10**400, 2**63, 2**31, 1e9, 1e308, float("nan"), float("inf"), True]),
)
JUNK = st.one_of(
    NUMBER,
    st.none(),
    st.text(max_size=8),
    st.lists(NUMBER, max_size=9),
    st.dictionaries(st.sampled_from(["size", "counts", "id", "x"]), NUMBER, max_size=3),
    st.recursive(NUMBER, lambda inner: st.lists(inner, max_size=3), max_leaves=6),
)
RLE_TEXT = st.one_of(
    st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=40),
    st.binary(max_size=40).map(lambda text: text.decode("latin-1")),
)
SEGMENTATION = st.one_of(
    JUNK,
    st.lists(st.lists(NUMBER, max_size=14), max_size=4),
    st.lists(st.lists(st.floats(-100, 100), min_size=6, max_size=20), min_size=1, max_size=3),
    st.fixed_dictionaries(
        {
            "size": st.one_of(st.just([20, 30]), st.lists(NUMBER, max_size=3)),
            "counts": st.one_of(RLE_TEXT, st.lists(st.integers(0, 700), max_size=8), JUNK),
        }
    ),
)
FIELDS = {
    "annotations": {
        "id": JUNK,
        "image_id": JUNK,
        "category_id": JUNK,
        "iscrowd": JUNK,
        "bbox": st.one_of(JUNK, st.lists(NUMBER, min_size=4, max_size=4)),
        "area": JUNK,
        "segmentation": SEGMENTATION,
    },
    "images": {
        "id": JUNK,
        "file_name": st.one_of(JUNK, st.text(max_size=12), st.sampled_from(["../a.png", "A.png"])),
        "height": JUNK,
        "width": JUNK,
    },
    "categories": {"id": JUNK, "name": JUNK},
}


def _document() -> dict[str, Any]:
    segmentations = ([SQUARE], rle(compressed=True), rle(compressed=False), SQUARE)
    return {
        "images": [
            {"id": i, "file_name": f"{'ab'[i]}.png", "height": 20, "width": 30} for i in range(2)
        ],
        "annotations": [
            annotation(k, k % 2, SQUARE, segmentation=one) for k, one in enumerate(segmentations)
        ],
        "categories": [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}],
    }


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """A COCO file of which some fields, entries, lists or bytes have been spoilt."""
    document: Any = _document()
    for _ in range(draw(st.integers(1, 5))):
        key = draw(st.sampled_from(sorted(FIELDS)))
        entries = document.get(key)
        if not isinstance(entries, list) or not entries:
            continue
        place = draw(st.integers(0, len(entries) - 1))
        action = draw(st.sampled_from(["field", "field", "field", "drop", "junk", "again", "list"]))
        if action == "field" and isinstance(entries[place], dict):
            name = draw(st.sampled_from(sorted(FIELDS[key])))
            entries[place] = {**entries[place], name: draw(FIELDS[key][name])}
        elif action == "drop" and isinstance(entries[place], dict):
            entries[place] = {
                name: value
                for name, value in entries[place].items()
                if name != draw(st.sampled_from(sorted(FIELDS[key])))
            }
        elif action == "junk":
            entries[place] = draw(JUNK)
        elif action == "again":
            entries.append(entries[place])
        elif action == "list":
            document[key] = draw(JUNK)
    content = bytearray(json.dumps(document).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, len(content) - 1))
        content[place] = draw(st.integers(0, 255))
    cut = draw(st.sampled_from([None, None, None, None, 0.3, 0.9]))
    return bytes(content if cut is None else content[: int(len(content) * cut)])


def _in_own_process(work: Any, *given_to: Any) -> None:
    # A crash, a hang or a foreign error of the child is a failure here.
    context = multiprocessing.get_context("fork")
    process = context.Process(target=work, args=given_to)
    process.start()
    process.join(SECONDS)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert not alive, "it hangs"
    assert process.exitcode == 0, f"it ended with {process.exitcode}; its output says why"


def _fuzz_documents(folder: Path) -> None:
    path, cases = folder / "a.json", []

    @settings(max_examples=CASES, suppress_health_check=list(HealthCheck), deadline=None)
    @given(content=documents())
    def check_document(content: bytes) -> None:
        path.write_bytes(content)
        cases.append(1)
        try:
            index = index_file(path, folder, cache=folder / "cache")
        except DataError as error:
            assert getattr(error, "code", None) in KINDS, error
            return
        for _, severity, issue in index.problems:
            assert issue.count >= len(issue.examples) >= 1 and severity
        try:
            subset = read_coco(path, folder, cache=folder / "cache", on_bad_image="skip")
        except DataError as error:
            assert "cannot be used" in str(error)
            return
        boxes = subset.index.boxes[subset.objects]
        assert np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert len(np.unique(subset.index.object_ids)) == len(subset.index.object_ids)
        for i in range(subset.num_images):
            for k in subset.objects_of(i):
                mask = decode_cropped(subset.index.segmentations[int(k)], subset.size(i)).mask
                assert mask.any()

    check_document()
    assert len(cases) >= CASES


def test_no_file_crashes_hangs_or_escapes(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(encode_image(ord(name)))
    _in_own_process(_fuzz_documents, tmp_path)


def _fuzz_masks() -> None:
    cases = []

    @settings(max_examples=CASES, suppress_health_check=list(HealthCheck), deadline=None)
    @given(raw=SEGMENTATION, height=st.integers(1, 60), width=st.integers(1, 60))
    def draw_segmentation(raw: Any, height: int, width: int) -> None:
        cases.append(1)
        try:
            mask = decode_segmentation(raw, (height, width))
        except MaskError as error:
            assert error.code in KINDS
            return
        assert mask.shape == (height, width) and mask.max(initial=0) <= 1
        assert isinstance(check_segmentation(raw), (list, dict))

    draw_segmentation()
    assert len(cases) >= CASES


def test_no_mask_crashes_hangs_or_escapes() -> None:
    _in_own_process(_fuzz_masks)


def _fuzz_rle() -> None:
    generator = random.Random(0)
    for _ in range(20 * CASES):
        text = rle(compressed=True)["counts"]
        letters = list(text)
        for _ in range(generator.randint(1, 4)):
            action = generator.randint(0, 2)
            place = generator.randrange(len(letters) + 1)
            letter = chr(generator.choice([generator.randint(48, 111), generator.randint(0, 255)]))
            letters[place : place + (action > 0)] = [letter] if action < 2 else []
        try:
            mask = decode_segmentation({"size": [20, 30], "counts": "".join(letters)}, (20, 30))
        except MaskError as error:
            assert error.code in KINDS
        else:
            assert mask.shape == (20, 30) and mask.any()


def test_no_spoilt_rle_crashes_hangs_or_escapes() -> None:
    _in_own_process(_fuzz_rle)


@pytest.mark.parametrize("ending", ["hang", "crash", "error"])
def test_the_fuzzers_see_what_they_look_for(ending: str, monkeypatch: Any) -> None:
    def crash() -> None:
        if ending == "hang":
            multiprocessing.Event().wait()
        elif ending == "crash":
            faulthandler.disable()  # or it fills the screen
            os.abort()
        raise KeyError

    monkeypatch.setitem(globals(), "SECONDS", 1)
    with pytest.raises(AssertionError, match="hangs" if ending == "hang" else "ended with"):
        _in_own_process(crash)
