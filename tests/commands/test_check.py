"""The dataset doctor: what it says of real and of broken sets, what it writes, how it ends."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.broken_coco import write_broken
from helpers.coco_files import annotation, write_coco, write_json
from helpers.short_runs import a_config, arguments, train_here
from samft.annotations.boxes import advise_on_small_objects
from samft.annotations.problems import ERROR, FACT, KINDS, WARNING
from samft.check import main
from samft.cli import run_command
from samft.commands import shell_command
from samft.errors import ConfigError, DataError
from samft.recipes.datasets import load_splits

# What the README.md beside the real sets lists; and, marked *, three facts that it leaves out.
PLACEHOLDER = {"category-placeholder": 1}
ID_ZERO = {"annotation-id-zero": 1}  # * the exporter counts from 0
QUIRKS = {
    "hbn_flakes": {
        "train": {
            "image-size-differs": 71,
            "image-without-objects": 3,
            "area-is-box": 1601,
            "box-leaves-image": 12,  # *
            **PLACEHOLDER,
            **ID_ZERO,
        },
        "val": {
            "split-name": 1,
            "area-is-box": 277,
            "polygon-leaves-image": 2,
            "box-leaves-image": 1,  # *
            **PLACEHOLDER,
            **ID_ZERO,
        },
        "test": {
            "mask-missing": 1,
            "area-is-box": 87,
            "polygon-leaves-image": 1,
            **PLACEHOLDER,
            **ID_ZERO,
        },
    },
    # Of 10,335 objects, three fill their boxes, so that nobody can tell.
    "mushrooms": {
        "train": {
            "area-is-box": 10332,
            "box-leaves-image": 201,
            "mask-tiny": 3,
            **PLACEHOLDER,
            **ID_ZERO,
        },
        "val": {
            "split-name": 1,
            "area-is-box": 702,
            "box-leaves-image": 14,
            "box-thin": 2,
            "mask-tiny": 2,
            **PLACEHOLDER,
            **ID_ZERO,
        },
        "test": {
            "area-is-box": 594,
            "box-leaves-image": 7,
            "mask-tiny": 1,
            **PLACEHOLDER,
            **ID_ZERO,
        },
    },
    "coco_open104": {
        "train": {
            "crowd": 6,
            "polygon-parts": 39,
            "category-ids-not-contiguous": 8,
            "mask-tiny": 1,  # *
        },
        "val": {
            "crowd": 7,
            "polygon-parts": 45,
            "category-ids-not-contiguous": 8,
            "image-without-objects": 2,
        },
    },
    "fruits_nuts": {"trainval": {}},
}
OBJECTS = {
    "hbn_flakes": {"train": 1601, "val": 277, "test": 87},  # of 88 in test, one has no mask
    "mushrooms": {"train": 10335, "val": 702, "test": 594},
    "coco_open104": {"train": 524 - 6, "val": 517 - 7},  # without the crowds
    "fruits_nuts": {"trainval": 165},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMFT_CACHE", str(cache))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A dataset without a flaw."""
    root = tmp_path / "data"
    for seed, split in enumerate(("train", "val")):
        file = write_coco(root, 3, split=split, seed=seed)
        document = json.loads(file.read_text())
        for entry in document["annotations"]:
            entry["area"] *= 0.8
        file.write_text(json.dumps(document))
    return root


def of_set(data_root: Path, name: str) -> list[str]:
    folder = data_root / name
    if name == "fruits_nuts":
        data = folder / "data"
        return ["--annotations", str(data / "trainval.json"), "--images", str(data / "images")]
    return ["--data_root", str(folder)]


def codes(split: dict[str, Any]) -> dict[str, int]:
    return {problem["code"]: problem["count"] for problem in split["problems"]}


@pytest.mark.parametrize("name", QUIRKS)
def test_real_sets_have_the_quirks_that_are_known_and_no_error(data_root: Path, name: str) -> None:
    report = main(of_set(data_root, name))
    assert report["errors"] == 0
    assert {
        split: codes(split_report) for split, split_report in report["splits"].items()
    } == QUIRKS[name]
    counts = {split: split_report["objects"] for split, split_report in report["splits"].items()}
    assert counts == OBJECTS[name]


@pytest.mark.parametrize("name", ["hbn_flakes", "coco_open104"])
def test_real_sets_are_clean_once_repaired(
    data_root: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*of_set(data_root, name), "--fix", str(tmp_path / "fixed")])
    commands = commands_in(capsys.readouterr().out, "check")
    assert len(commands) == len(QUIRKS[name])
    for command, objects in zip(commands, OBJECTS[name].values(), strict=True):
        report = main(command)
        (split,) = report["splits"].values()
        assert severities(split) <= {FACT} and split["objects"] == objects


def commands_in(text: str, name: str) -> list[list[str]]:
    """The arguments of the commands that are printed."""
    start = f"  {shell_command(name)} "
    lines = [line for line in text.splitlines() if line.startswith(start)]
    return [shlex.split(line.removeprefix(start)) for line in lines]


def severities(split: dict[str, Any]) -> set[str]:
    return {problem["severity"] for problem in split["problems"]}


def test_a_broken_set_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run names everything that is wrong, and the copies are clean and hold the rest."""
    root, out = tmp_path / "data", tmp_path / "report" / "check.json"
    expected = write_broken(root)
    before = {path: path.read_bytes() for path in root.rglob("*.json")}
    argv = ["--data_root", str(root), "--json", str(out), "--fix", str(tmp_path / "fixed")]
    with pytest.raises(DataError, match=r"train: image-outside 2.*test: json-invalid 1"):
        main(argv)
    printed = capsys.readouterr().out
    splits = json.loads(out.read_text())["splits"]
    for name, counts in expected.items():
        wanted = {code: number for code, number in counts.items() if code in KINDS}
        assert codes(splits[name]) == wanted
        assert all(f"{code:28}{number:>7}" in printed for code, number in wanted.items())
    assert len({code for split in splits.values() for code in codes(split)}) >= 60
    assert {path: path.read_bytes() for path in before} == before

    again = [main(command)["splits"] for command in commands_in(printed, "check")]
    train, val = (next(iter(splits.values())) for splits in again)
    assert severities(train) <= {FACT} and severities(val) <= {FACT}
    # One image, with one object, is in val as well.
    assert train["objects"] == expected["train"]["good_objects"] - 1
    assert train["images_with_objects"] == expected["train"]["good_images"] - 1
    assert val["objects"] == expected["val"]["good_objects"]
    (command,) = commands_in(printed, "train")
    fixed = tmp_path / "fixed"
    assert command == [
        *("--data_root", str(root)),
        *("--train_annotations", str(fixed / "train" / "_annotations.coco.json")),
        *("--train_images", str(root / "train")),
        *("--val_annotations", str(fixed / "val" / "_annotations.coco.json")),
        *("--val_images", str(root / "val")),
    ]

    run = tmp_path / "run"
    short = arguments(root, run, steps=2, metrics_interval=2)
    data = train_here([*short, *command])["data"]
    # One image, with one object, is in val as well.
    wanted = [expected["train"][f"good_{name}"] - 1 for name in ("images", "objects")]
    assert [data["train"][name] for name in ("images", "masks")] == wanted
    assert (data["val"]["images"], data["val"]["masks"]) == (2, 2)
    assert data["train"]["skipped"] == {"crowd": 1, "image-without-objects": 1}
    assert data["train"]["bad_images"] == data["val"]["bad_images"] == data["val"]["skipped"] == {}


def test_images_that_are_all_bad_are_not_said_to_have_boxes_only(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in (good / "train").glob("*.png"):
        image.unlink()
    assert run_command(main, ["--data_root", str(good)]) == 2
    error = capsys.readouterr().err
    assert "no-objects" in error and "image-missing" in error
    assert "masks from boxes" not in error and "on_bad_image" not in error


def test_bad_images_may_be_skipped(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (good / "train" / "image_1.png").unlink()
    argv = ["--data_root", str(good)]
    assert run_command(main, argv) == 2
    captured = capsys.readouterr()
    assert "verdict: cannot be trained on (errors 1, warnings 0, notes 0)" in captured.out
    assert captured.err.startswith("error: the dataset cannot be trained on (train: image-missing")
    assert "--on_bad_image skip" in captured.err and captured.err.count("\n") == 1
    report = main([*argv, "--on_bad_image", "skip"])
    assert report["errors"] == 0
    assert codes(report["splits"]["train"])["image-missing"] == 1


def test_the_report_of_a_good_set(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = good.parent / "check.json"
    report = main(["--data_root", str(good), "--json", str(out), "--image_size", "64"])
    assert json.loads(out.read_text()) == report
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("verdict: clean (errors 0, warnings 0, notes 0)")
    assert printed.count("suggested max_masks_per_image: 8 ") == 1  # of train, not of val
    assert report["image_size"] == 64
    train = report["splits"]["train"]
    assert (train["images"], train["objects"], train["classes"]) == (3, 7, {"thing": 7})
    assert train["annotations"] == str(good / "train" / "_annotations.coco.json")


def test_rectangle_is_measured_as_images_fit_into_it(good: Path, tmp_path: Path, capsys) -> None:
    report = main(["--data_root", str(good), "--image_size", "64x48"])
    text = " ".join(capsys.readouterr().out.split())
    index = load_splits(a_config(good, image_size="64x48")).train.subset.index
    portrait = int((index.sizes[:, 0] > 0.8 * index.sizes[:, 1]).sum())
    assert report["image_size"] == "64x48" and portrait
    assert f"{portrait} of {index.num_images} images" in text
    assert "are of another shape than image_size 64x48" in text
    square = main(["--data_root", str(good), "--image_size", "64"])
    assert "another shape" not in capsys.readouterr().out
    small, fewer = (one["splits"]["train"]["too_small"]["objects"] for one in (report, square))
    assert small >= fewer


def test_small_objects_get_the_advice_of_a_training_run(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = main(["--data_root", str(good), "--image_size", "16"])
    printed = capsys.readouterr().out
    advice = load_splits(a_config(good, image_size=16)).small_objects
    assert advise_on_small_objects(advice) in printed.splitlines()
    for split, small in advice.items():
        report_of_split = report["splits"][split]
        assert report_of_split["too_small"] == {"objects": small.num_small, "share": small.share}
        assert report_of_split["suggestions"]["image_size"] == small.suggested_image_size > 16
    main(["--data_root", str(good), "--image_size", "1024"])
    assert "too small for image_size" not in capsys.readouterr().out


def test_warnings_end_well(good: Path) -> None:
    path = good / "train" / "_annotations.coco.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["segmentation"] = []
    path.write_text(json.dumps(document))
    assert main(["--data_root", str(good)])["warnings"] == 1


def test_a_missing_validation_split_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(tmp_path / "data", 2)
    assert run_command(main, ["--data_root", str(tmp_path / "data")]) == 0
    assert "no validation split" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "nothing to check"),
        (["--annotations", "a.json"], "go together"),
        (["--data_root", "x", "--images", "y"], "go together"),
        (["--data_root", "x", "--image_size", "100"], "multiple of 16"),
        (["--data_root", "x", "--image_size", "0"], "multiple of 16"),
        (["--data_root", "x", "--image_size", "64x50"], "a side of no multiple of 16"),
        (["--data_root", "x", "--image_size", "64x"], "nor WIDTHxHEIGHT"),
    ],
)
def test_wrong_flags(argv: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        main(argv)


def test_a_missing_training_split_is_not_said_to_be_repaired(tmp_path: Path) -> None:
    write_coco(tmp_path, 2, split="val")
    with pytest.raises(DataError, match=r"train: json-missing 1") as caught:
        main(["--data_root", str(tmp_path)])
    assert "--fix" not in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--annotations", str(tmp_path / "none.json"), "--images", str(tmp_path)]
    assert run_command(main, argv) == 2
    assert "json-missing" in capsys.readouterr().err
    assert run_command(main, ["--data_root", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("flag", ["--fix", "--pictures"])
@pytest.mark.parametrize("place", ["", "train", "new/folder"])
def test_nothing_is_written_among_the_data(good: Path, flag: str, place: str) -> None:
    before = sorted(good.rglob("*"))
    with pytest.raises(ConfigError, match="among the data"):
        main(["--data_root", str(good), flag, str(good / place)])
    assert sorted(good.rglob("*")) == before


def test_the_report_never_replaces_the_annotations(good: Path) -> None:
    file = good / "train" / "_annotations.coco.json"
    with pytest.raises(ConfigError, match="is an annotation file"):
        main(["--data_root", str(good), "--json", str(file)])


def test_a_repaired_copy_is_never_replaced(good: Path, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    (fixed / "val").mkdir(parents=True)
    (fixed / "val" / "_annotations.coco.json").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        main(["--data_root", str(good), "--fix", str(fixed)])
    assert (fixed / "val" / "_annotations.coco.json").read_text() == "mine"
    assert not (fixed / "train").exists()


@pytest.mark.parametrize("flag", ["--json", "--fix", "--pictures"])
def test_a_place_that_cannot_be_written_is_named(good: Path, tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"{flag}: .* cannot be written"):
        main(["--data_root", str(good), flag, str(tmp_path / "file" / "x")])


def test_the_official_layout_is_kept_by_the_copies(good: Path, tmp_path: Path) -> None:
    (good / "annotations").mkdir()
    for split in ("train", "val"):
        file = good / split / "_annotations.coco.json"
        file.rename(good / "annotations" / f"instances_{split}2017.json")
        (good / split).rename(good / f"{split}2017")
    main(["--data_root", str(good), "--fix", str(tmp_path / "fixed")])
    written = sorted(path.name for path in (tmp_path / "fixed" / "annotations").iterdir())
    assert written == ["instances_train2017.json", "instances_val2017.json"]


def test_links_within_the_data_are_followed_in_the_copies_too(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = good / "train" / "image_0.png"
    (good / "store").mkdir()
    image.rename(good / "store" / "x.png")
    image.symlink_to(good / "store" / "x.png")
    main(["--data_root", str(good), "--fix", str(good.parent / "fixed")])
    first, _ = commands_in(capsys.readouterr().out, "check")
    assert main(first)["splits"]["train"]["images"] == 3


def test_pictures(good: Path, tmp_path: Path) -> None:
    main(["--data_root", str(good), "--pictures", str(tmp_path / "pictures")])
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    expected = {f"{s}-{k}.png" for s in ("train", "val") for k in ("smallest", "class-thing")}
    assert expected <= names


def test_names_cannot_play_tricks_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = {"id": 1, "file_name": "\x1b[31mred\nverdict: clean\udcff", "height": 5, "width": 5}
    objects = [annotation(1, 1, [0, 0, 3, 0, 3, 3])]
    file = write_json(tmp_path / "file.json", [image], objects)
    assert run_command(main, ["--annotations", str(file), "--images", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\nverdict: clean" not in printed
    assert "\\x1b[31mred" in printed


def test_the_command(good: Path, cache: Path) -> None:
    """Its exit code, and that it needs no torch."""
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('samft.check', "
    code += "run_name='__main__')"
    command = [sys.executable, "-c", code, "--data_root", str(good)]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    (good / "val" / "_annotations.coco.json").write_text("{")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "json-invalid" in ended.stderr and "7 objects" in ended.stdout


def test_errors_in_the_table_are_what_refuses(good: Path) -> None:
    """An error of any kind ends with 2: here ids that stand for two files."""
    path = good / "train" / "_annotations.coco.json"
    document = json.loads(path.read_text())
    document["images"][1]["id"] = document["images"][0]["id"]
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="image-id-ambiguous 1") as raised:
        main(["--data_root", str(good)])
    assert "on_bad_image" not in str(raised.value) and "--fix" in str(raised.value)
    assert KINDS["image-id-ambiguous"][0] == ERROR


@pytest.fixture
def general(good: Path, tmp_path: Path) -> Path:
    """Other data, one of whose images is validated on, and one of whose objects has no mask."""
    file = write_coco(tmp_path / "general", 3, seed=7)
    document = json.loads(file.read_text())
    document["annotations"][0]["segmentation"] = []
    file.write_text(json.dumps(document))
    shutil.copy(good / "val/image_2.png", file.parent / "image_1.png")
    return tmp_path / "general"


def test_a_general_set_is_checked_too(
    good: Path, general: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data_root", str(good), "--general_data_root", str(general)]
    suggested = tmp_path / "mine.yaml"
    report = main([*argv, "--fix", str(tmp_path / "fixed"), "--suggest", str(suggested)])
    assert list(report["splits"]) == ["train", "val", "general_data_root"]
    of_general = codes(report["splits"]["general_data_root"])
    assert (of_general["mask-missing"], of_general["image-in-general-set"]) == (1, 1)
    assert report["warnings"] == 2 and report["errors"] == 0
    printed = capsys.readouterr().out
    assert f"general_data_root: {general}/train/_annotations.coco.json" in printed
    assert f"general_data_root: {general}\n" in suggested.read_text()


def test_a_general_set_is_repaired_into_a_folder_that_training_takes(
    good: Path, general: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Also where the original lies beside its images, as here, or in the folder of the dataset."""
    monkeypatch.chdir(tmp_path)
    in_the_root = tmp_path / "of_one_file"
    shutil.copytree(general / "train", in_the_root / "images")
    (in_the_root / "images/_annotations.coco.json").rename(in_the_root / "labels.json")
    (in_the_root / "images/val").mkdir()  # a folder of images like the name of a split
    for root in (general, in_the_root):
        fixed = Path("fixed", root.name)
        before = sorted(root.rglob("*"))
        main(["--data_root", str(good), "--general_data_root", str(root), "--fix", str(fixed)])
        printed = capsys.readouterr().out
        assert sorted(root.rglob("*")) == before
        (command,) = commands_in(printed, "train")
        copy = Path(command[command.index("--general_data_root") + 1])
        assert copy.is_relative_to(fixed) and command[command.index("--data_root") + 1] == str(good)
        *_, again = commands_in(printed, "check")
        assert main(again)["warnings"] == 0
        config = a_config(good, general_data_root=str(copy))
        repaired, stock = (
            load_splits(replace(config, general_data_root=str(one))).general for one in (copy, root)
        )
        assert repaired.subset.index.problems.count(WARNING) == 0
        assert stock.subset.index.problems.count(WARNING) == 1
        assert len(repaired) == len(stock) == 2
        assert np.array_equal(repaired[0].image, stock[0].image)


@pytest.mark.parametrize("place", ["fixed", "train/fixed"])
def test_nothing_is_written_into_a_general_set(good: Path, general: Path, place: str) -> None:
    before = sorted(general.rglob("*"))
    argv = ["--data_root", str(good), "--general_data_root", str(general)]
    with pytest.raises(ConfigError, match="among the data"):
        main([*argv, "--fix", str(general / place)])
    assert sorted(general.rglob("*")) == before


def test_a_general_set_is_checked_beside_a_single_file(
    good: Path, general: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--annotations", str(good / "train/_annotations.coco.json")]
    files += ["--images", str(good / "train"), "--general_data_root", str(general)]
    assert list(main(files)["splits"]) == ["train", "general_data_root"]
    assert capsys.readouterr().out.count("suggested max_masks_per_image") == 1


def test_a_general_set_that_cannot_be_used_is_an_error(good: Path, general: Path) -> None:
    (general / "train/image_0.png").unlink()
    argv = ["--data_root", str(good), "--general_data_root"]
    with pytest.raises(DataError, match=r"trained on \(general_data_root: image-missing 1\)"):
        main([*argv, str(general)])
    with pytest.raises(DataError, match="^general_data_root: .* does not exist: give the folder"):
        main([*argv, str(general / "nowhere")])
