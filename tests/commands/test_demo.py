"""The demo dataset: one set of files for a seed, COCO in every form, nothing overwritten."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from helpers import REPOSITORY
from helpers.terminal import terminal
from samft import check
from samft.cli import run_command
from samft.commands import shell_command
from samft.config import parse_config
from samft.demo import ANNOTATIONS, main, write_demo
from samft.errors import ConfigError, DataError
from samft.images.synthetic import draw_scene

SPLITS = {"train": 8, "val": 4}
SIZE = 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("demo") / "data"
    return write_demo(target, num_train=SPLITS["train"], num_val=SPLITS["val"], size=SIZE)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def read_annotations(folder: Path, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / split / ANNOTATIONS).read_text())
    return content


def decode_mask(segmentation: Any) -> np.ndarray:
    """A segmentation's mask, by pycocotools and independently of how it was written."""
    if isinstance(segmentation, list):
        return mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(segmentation, SIZE, SIZE)))
    if isinstance(segmentation["counts"], list):
        return mask_utils.decode(mask_utils.frPyObjects(segmentation, SIZE, SIZE))
    return mask_utils.decode(segmentation)


def form_of(annotation: dict[str, Any]) -> str:
    segmentation = annotation["segmentation"]
    if annotation["iscrowd"]:
        return "crowd"
    if isinstance(segmentation, list):
        return "polygon" if len(segmentation) == 1 else "polygons"
    return "uncompressed" if isinstance(segmentation["counts"], list) else "compressed"


def test_the_same_seed_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    again = write_demo(tmp_path, num_train=SPLITS["train"], num_val=SPLITS["val"], size=SIZE)
    assert files_of(again) == files_of(folder)
    other = write_demo(tmp_path / "other", seed=1, num_train=8, num_val=4, size=SIZE)
    assert files_of(other).keys() == files_of(folder).keys()
    assert files_of(other)["train/image_0001.jpg"] != files_of(folder)["train/image_0001.jpg"]


def test_splits_differ(folder: Path) -> None:
    files = files_of(folder)
    assert files["train/image_0001.jpg"] != files["val/image_0001.jpg"]


@pytest.mark.parametrize("split", SPLITS)
def test_images_are_as_listed(folder: Path, split: str) -> None:
    content = read_annotations(folder, split)
    assert len(content["images"]) == SPLITS[split]
    names = {image["file_name"] for image in content["images"]}
    assert names == {path.name for path in (folder / split).glob("*.jpg")}
    for image in content["images"]:
        pixels = cv2.imread(str(folder / split / image["file_name"]))
        assert pixels is not None
        assert pixels.shape == (image["height"], image["width"], 3) == (SIZE, SIZE, 3)


@pytest.mark.parametrize("split", SPLITS)
def test_every_form_of_annotation_is_there(folder: Path, split: str) -> None:
    content = read_annotations(folder, split)
    forms = {form_of(annotation) for annotation in content["annotations"]}
    assert forms == {"polygon", "polygons", "compressed", "uncompressed", "crowd"}
    taken = {annotation["image_id"] for annotation in content["annotations"]}
    assert len(taken) == SPLITS[split] - 1  # one image has no objects
    assert {category["id"]: category["name"] for category in content["categories"]} == {
        1: "butterfly",
        2: "flower",
    }
    assert {annotation["category_id"] for annotation in content["annotations"]} == {1, 2}


@pytest.mark.parametrize("split", SPLITS)
def test_annotations_decode_to_their_box_and_area(folder: Path, split: str) -> None:
    annotations = read_annotations(folder, split)["annotations"]
    assert [annotation["id"] for annotation in annotations] == [
        number + 1 for number in range(len(annotations))
    ]
    for annotation in annotations:
        mask = decode_mask(annotation["segmentation"])
        assert mask.shape == (SIZE, SIZE)
        assert mask.sum() == annotation["area"] > 0
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize("split", SPLITS)
def test_objects_hide_each_other_rather_than_share_pixels(folder: Path, split: str) -> None:
    """But for the pixels that the common border of two neighbours crosses."""
    content = read_annotations(folder, split)
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        covered = sum((decode_mask(a["segmentation"]).astype(int) for a in own), np.zeros(1, int))
        assert (covered > 1).sum() <= 0.01 * max(1, (covered > 0).sum())


def test_pycocotools_reads_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = COCO(str(folder / "train" / ANNOTATIONS))
    assert len(coco.getImgIds()) == SPLITS["train"]
    for annotation in coco.loadAnns(coco.getAnnIds()):
        assert coco.annToMask(annotation).sum() == annotation["area"]


def test_filling_the_box_is_a_poor_answer() -> None:
    fills = []
    for seed in range(12):
        _, objects = draw_scene(np.random.default_rng(seed), SIZE)
        for item in objects:
            mask = decode_mask(item.polygons)
            fills.append(mask.sum() / np.prod(cv2.boundingRect(mask)[2:]))
    assert 0.36 < np.mean(fills) < 0.5


def test_outlines_lie_where_the_paint_is() -> None:
    """Inside an outline there is pigment; the bare paper around is lighter."""
    darker = []
    for seed in range(6):
        image, objects = draw_scene(np.random.default_rng(seed), SIZE)
        grey = image.astype(float).mean(2)
        taken = np.maximum.reduce([decode_mask(item.polygons) for item in objects])
        around = cv2.dilate(taken, np.ones((9, 9), np.uint8)) - taken
        darker.append(np.median(grey[around > 0]) - np.median(grey[taken > 0]))
    assert min(darker) > 10


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    write_demo(tmp_path, seed=4, num_train=5, num_val=3, size=64)
    (tmp_path / "val" / f".{ANNOTATIONS}.ab_12345.part").write_text(
        "{"
    )  # as a killed process leaves it
    write_demo(tmp_path, seed=5, num_train=3, num_val=3, size=64)
    assert len(list((tmp_path / "train").glob("*.jpg"))) == 3
    fresh = write_demo(tmp_path / "fresh", seed=5, num_train=3, num_val=3, size=64)
    files = {n: c for n, c in files_of(tmp_path).items() if not n.startswith("fresh")}
    assert files == files_of(fresh)


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "train/photo.jpg", "train/_annotations.coco.json", "test/image_0001.jpg"]
    + ["train/image_0001.jpg", "val/.film.mkv.ab_12345.part"],
)
def test_other_data_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"info": {"description": "mine"}}')
    with pytest.raises(DataError, match=Path(name).name):
        write_demo(tmp_path, num_train=3, num_val=3, size=64)
    assert files_of(tmp_path) == {name: b'{"info": {"description": "mine"}}'}


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(DataError, match="is a file"):
        write_demo(tmp_path / "demo")


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"seed": -1}, "seed"), ({"num_val": 2}, "too few"), ({"size": 63}, "size")],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        write_demo(tmp_path / "demo", **wrong)
    assert not (tmp_path / "demo").exists()


def test_the_command_says_what_was_written_and_what_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "demo"
    main(["--output_dir", str(target), "--images", "12", "--size", "64"])
    printed = capsys.readouterr().out
    assert "train: 9 images" in printed and "val: 3 images" in printed
    tune = shlex.split(printed.splitlines()[-1])
    program = shlex.split(shell_command("train"))
    assert tune[: len(program)] == program
    config = parse_config([*tune[len(program) :], "--num_workers", "1", "--metrics_interval", "50"])
    folders = ["--data_root", str(target), "--output_dir", str(tmp_path / "demo-run")]
    assert config == parse_config(["--config", str(REPOSITORY / "configs/demo.yaml"), *folders])


def test_a_user_error_ends_the_command_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert run_command(main, ["--output_dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "mine.txt" in message and message.count("\n") == 1


def test_no_torch_is_imported() -> None:
    code = "import samft.demo, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_terminal_gets_whole_words_and_a_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "data"
    with terminal(columns=60) as screen:
        monkeypatch.setattr(sys, "stdout", screen.stream)
        main(["--output_dir", str(target), "--images", "16", "--size", "96"])
        check.main(["--data_root", str(target)])
        lines = screen.lines()
    commands = [line for line in lines if line.lstrip().startswith(shell_command("train"))]
    assert len(commands) == 1 and commands[0].endswith("data-run")
    # What is longer than a line is one word, such as a path; or it is the command.
    assert all(len(line.split()) == 1 for line in set(lines) - set(commands) if len(line) > 60)
