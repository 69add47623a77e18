"""Hostile annotation and detector files end in a result or a sentence, soon and in little memory.

Each file is read in a process of its own, which may take 10 s of a core and 500 MB more than it has
at its start.
"""

import json
import multiprocessing
import os
import random
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from helpers.broken_coco import SQUARE, encode_image, rle
from helpers.coco_files import annotation
from samft.check import main as check
from samft.cli import run_command
from samft.coco.subset import read_coco
from samft.errors import DataError
from samft.prediction.inputs import build_task

pytestmark = pytest.mark.processes

NUM_DOCUMENTS, NUM_RESULTS = 200, 50
MEMORY, CPU_SECONDS = 500 * 2**20, 10

NUMBERS: list[Any] = [
    *(0, -1, 1.5, True, None, "", "1", "a_1", "٣", "1e5", 2**31, 2**63, 2**64, -(2**70), 10**4000),
    *(1e308, -1e308, float("nan"), float("inf"), 1e-320, [], [1], {}, {"id": 1}, "x" * 10**5),
]
SEGMENTATIONS: list[Any] = [
    *({}, [], "", None, 0, True, "outline", [None], [[None] * 8], [[]] * 1000, [SQUARE] * 20_000),
    *([[1e308] * 8], [[float("nan")] * 8], [[10**400] * 8], [SQUARE * 50_000], [[1, 2, 3]]),
    [[0, 0, 9e4, 9e4] * 1000],
    [[SQUARE[k : k + 2] for k in range(0, 8, 2)] * 5000],
    [{"x": k, "y": -k} for k in range(5000)],
    {"x": [1] * 10**5, "y": [2] * 10**5},
    *("1,2," * 10**5, "[" * 10**5, '{"size":[9,9],"counts":[81]}', [["1"] * 8, ["b"] * 8]),
    *({"size": [10**9, 1], "counts": [0, 10**9]}, {"size": [31_622, 31_622], "counts": "0"}),
    {"size": [13_000, 13_000], "counts": [0, 13_000**2]},
    {"size": [179_000_000, 1], "counts": [1, 178_999_999]},
    {"size": [1, 179_000_000], "counts": [1, 178_999_999]},
    {"size": [640, 960], "counts": [1, 640 * 960 - 1]},
    {"size": [20, 30], "counts": [0, 1] * 200_000},
    {"size": [20, 30], "counts": [2**62, 2**62, -(2**63)]},
    {"size": [20, 30], "counts": "o" * 10**6},
    {"size": [20, 30], "counts": "b'" + "\\x00" * 10**4},
    {"size": ["20", "30"], "counts": "0 5 595"},
    {"size": [[20, 30]], "counts": [[600]]},
    {"size": [-20, -30], "counts": [0, 600]},
    {"size": [float("nan"), 30], "counts": [0, 600]},
    [rle(compressed=True), rle(compressed=True)],
    rle(compressed=True, height=2000, width=3000),
]
NAMES: list[Any] = [
    *("../a.png", "/etc/passwd", "C:\\x\\a.png", "a\0.png", "\ud800.png", "x" * 300, "x/" * 5000),
    *("%61.png", ".", "", " ", "A.PNG", "/dev/zero", "/proc/self/mem", 7, None, ["a.png"]),
]
CATEGORIES: list[Any] = [
    *(None, [], {}, "cat", 7, ["cat", "dog"], {"1": "cat"}, {"cat": 1}, [None], [["cat"]]),
    *([{"id": "a", "name": "b"}, {"id": "b", "name": "a"}], [{"id": 1}], [{"name": "thing"}]),
    [{"id": k % 7, "name": f"class, {k % 5}"} for k in range(3000)],
    [{"id": 2**70 + k, "name": "x" * 5000} for k in range(50)],
]


def _document() -> dict[str, Any]:
    segmentations = ([SQUARE], rle(compressed=True), rle(compressed=False), [SQUARE])
    return {
        "images": [
            {"id": i, "file_name": f"{'ab'[i]}.png", "height": 20, "width": 30} for i in range(2)
        ],
        "annotations": [
            annotation(k, k % 2, SQUARE, segmentation=one) for k, one in enumerate(segmentations)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }


def _spoil_field(document: dict[str, Any], draw: random.Random) -> None:
    entry = draw.choice(document[draw.choice(["images", "annotations"])])
    name = draw.choice([key for key in entry if key not in ("segmentation", "file_name")])
    entry[name] = draw.choice(NUMBERS)


def _spoil_box(document: dict[str, Any], draw: random.Random) -> None:
    draw.choice(document["annotations"])["bbox"] = [draw.choice(NUMBERS) for _ in range(4)]


def _spoil_mask(document: dict[str, Any], draw: random.Random) -> None:
    chosen = draw.sample(document["annotations"], draw.randint(1, 2))
    for entry in chosen:
        entry["segmentation"] = draw.choice(SEGMENTATIONS)
        entry["iscrowd"] = draw.randint(0, 1)


def _spoil_name(document: dict[str, Any], draw: random.Random) -> None:
    draw.choice(document["images"])["file_name"] = draw.choice(NAMES)


def _spoil_categories(document: dict[str, Any], draw: random.Random) -> None:
    document["categories"] = draw.choice(CATEGORIES)
    for entry in document["annotations"]:
        entry["category_id"] = draw.choice([0, 1, "cat", "thing", "a", None, 2**70, [1]])


def _spoil_ids(document: dict[str, Any], draw: random.Random) -> None:
    make: Callable[[int], Any] = draw.choice([str, float, "i_{}".format, lambda k: k + 2**66])
    for image in document["images"]:
        image["id"] = make(image["id"])
    for entry in document["annotations"]:
        entry["image_id"] = make(entry["image_id"])


def _repeat(document: dict[str, Any], draw: random.Random) -> None:
    key = draw.choice(["images", "annotations"])
    entries = [draw.choice(document[key]) for _ in range(draw.choice([10, 20_000]))]
    kept = [{k: v for k, v in entry.items() if k != "segmentation"} for entry in entries[1000:]]
    document[key] += entries[:1000] + kept


def _replace_list(document: dict[str, Any], draw: random.Random) -> None:
    document[draw.choice(["images", "annotations"])] = draw.choice(
        [[], None, {}, "text", [None], [[]], {"0": {}}, [1] * 1000]
    )


SPOILERS = [_spoil_field] * 3 + [_spoil_mask] * 4 + [_spoil_box, _spoil_name, _spoil_categories]
SPOILERS += [_spoil_ids, _repeat, _replace_list]
RAW = [
    *(b"", b"null", b"[]", b"{}", b"[" * 10**6, b'{"images":' * 10**5, b"\xff\xfe{\0}\0", b"\0"),
    b'{"images": [], "annotations": [' + b"9" * 10**6 + b"]}",
    b'{"images": [], "images": 7, "annotations": []}',
    b'[{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]',
]


def hostile_document(number: int) -> bytes:
    """An annotation file of images a.png and b.png, spoilt."""
    draw = random.Random(number)
    if number < len(RAW):
        return RAW[number]
    document = _document()
    for spoil in draw.choices(SPOILERS, k=draw.randint(1, 3)):
        try:
            spoil(document, draw)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            continue  # nothing is left of what it would spoil
    content = json.dumps(document).encode()
    if draw.random() < 0.15:
        content = content[: draw.randrange(len(content))]
    elif draw.random() < 0.1:
        place = draw.randrange(len(content))
        content = content[:place] + draw.randbytes(3) + content[place + 1 :]
    return content


def hostile_results(number: int) -> bytes:
    """A detector's file for images 0 and 1, spoilt."""
    draw = random.Random(1000 + number)
    if number < len(RAW):
        return RAW[number]
    entries: list[Any] = [
        {"image_id": k % 2, "category_id": 1, "bbox": [2, 3, 6, 6], "score": 0.5} for k in range(9)
    ]
    for _ in range(draw.randint(1, 3)):
        entry = draw.choice(entries)
        name = draw.choice(["image_id", "category_id", "bbox", "score", "sides"])
        if name == "sides":
            entry["bbox"] = [draw.choice([*NUMBERS, 5, 5, 5]) for _ in range(4)]
        else:
            entry[name] = draw.choice(NUMBERS)
    content = json.dumps(entries).encode()
    if len(content) < 5000 and draw.random() < 0.3:
        content = json.dumps(entries * 5000).encode()
    return content[: draw.randrange(len(content))] if draw.random() < 0.1 else content


def run_limited(work: Callable[[], int], output: Path) -> tuple[int, str]:
    """Runs something in a fork of this process, with limits; its exit code, and what it wrote."""
    process = multiprocessing.get_context("fork").Process(target=_limited, args=(work, output))
    process.start()
    process.join(120)  # however busy the machine is
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, output.read_text(errors="replace")


def _limited(work: Callable[[], int], output: Path) -> None:
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    code = 99
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images a.png and b.png."""
    monkeypatch.setenv("SAMFT_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    for name in "ab":
        (data / f"{name}.png").write_bytes(encode_image(ord(name)))
    return data


def check_and_read(folder: Path, number: int) -> int:
    """The exit code of `samft.check`, which repairs the file, too; training must agree with it."""
    path = folder / f"{number}.json"
    fixed = ["--fix", str(folder.parent / f"fixed_{number}"), "--annotations", str(path)]
    code = run_command(check, [*fixed, "--images", str(folder)])
    try:
        subset = read_coco(path, folder)
    except DataError:
        assert code == 2, "the check passes what training refuses"
        return code
    assert code == 0, "training takes what the check refuses"
    boxes = subset.index.boxes[subset.objects]
    assert np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(np.unique(subset.index.object_ids)) == len(subset.index.object_ids)
    assert set(subset.index.categories.tolist()) <= set(subset.index.category_names)
    return code


def read_results(folder: Path, number: int) -> int:
    """2 if the detector's file is refused; boxes that are taken must be usable."""
    try:
        task = build_task(
            [folder], annotations=folder / "a.json", results=folder / f"{number}.results.json"
        )
    except DataError as error:
        print(error)
        return 2
    assert task.prompts is not None
    for row in task.rows:
        boxes = task.boxes_of(row)
        assert np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        for k in range(min(len(boxes), 20)):
            msgspec.json.encode(task.result_fields(row, k))
    return 0


def _verdicts(
    folder: Path, work: Callable[[Path, int], int], numbers: range
) -> tuple[list[int], list[str]]:
    codes, failures = [], []
    for number in numbers:
        code, output = run_limited(lambda number=number: work(folder, number), folder / "output")
        codes.append(code)
        if code not in (0, 2) or "Traceback" in output or not (code == 0 or output.strip()):
            failures.append(f"{number} ended with {code}: {output[-1500:]}")
    return codes, failures


def test_hostile_annotations_are_read_or_refused(folder: Path) -> None:
    for number in range(NUM_DOCUMENTS):
        (folder / f"{number}.json").write_bytes(hostile_document(number))
    codes, failures = _verdicts(folder, check_and_read, range(NUM_DOCUMENTS))
    assert not failures, "\n\n".join(failures)
    assert codes.count(0) > NUM_DOCUMENTS // 5 and codes.count(2) > NUM_DOCUMENTS // 5


def test_hostile_results_are_read_or_refused(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(_document()))
    for number in range(NUM_RESULTS):
        (folder / f"{number}.results.json").write_bytes(hostile_results(number))
    codes, failures = _verdicts(folder, read_results, range(NUM_RESULTS))
    assert not failures, "\n\n".join(failures)
    assert codes.count(0) > 5 and codes.count(2) > 5


@pytest.mark.parametrize("fault", ["memory", "time", "traceback", "crash"])
def test_the_limits_are_kept(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        if fault == "memory":
            return len(bytearray(2 * MEMORY))
        if fault == "crash":
            os.abort()
        while fault == "time":
            pass
        raise KeyError

    monkeypatch.setitem(globals(), "CPU_SECONDS", 1)
    code, output = run_limited(fail, tmp_path / "output")
    assert code == 99 if fault in ("memory", "traceback") else code < 0
    assert ("Traceback" in output) == (fault in ("memory", "traceback"))
