"""Splits checked one by one and against each other."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.coco_files import write_coco
from samft.annotations.problems import Problems
from samft.coco.statistics import CheckedSplit, check_split, check_splits
from samft.errors import DataError


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMFT_CACHE", str(tmp_path / "cache"))


def check_root(root: Path, *, train: str = "train", val: str = "val") -> dict[str, CheckedSplit]:
    return check_splits(root, train_split=train, val_split=val, image_size=64)


def codes(split: CheckedSplit) -> dict[str, int]:
    return {code: issue.count for code, _, issue in split.problems}


def errors(split: CheckedSplit, **options: str) -> dict[str, int]:
    return {code: issue.count for code, issue in split.problems.errors(**options).items()}


def test_every_split_that_is_there(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for number, split in enumerate(("train", "val", "test")):
        write_coco(root, number + 1, split=split, seed=number)
    splits = check_root(root)
    assert list(splits) == ["train", "val", "test"]
    images = [split.statistics and split.statistics.num_images for split in splits.values()]
    assert images == [1, 2, 3]
    assert all(not errors(split) for split in splits.values())


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_another_name_for_validation_is_a_fact(tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    write_coco(root, 2)
    write_coco(root, 2, split=name, seed=1)
    assert codes(check_root(root)["val"])["split-name"] == 1


def test_the_official_names_are_no_problem(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    for seed, split in enumerate(("train2017", "val2017")):
        file = write_coco(root, 2, split=split, seed=seed)
        file.rename(root / "annotations" / f"instances_{split}.json")
    splits = check_root(root)
    assert "split-name" not in codes(splits["val"])
    assert splits["train"].images == root / "train2017"


def test_images_in_train_and_val(tmp_path: Path) -> None:
    """By content, whatever their names; only those of train count."""
    root = tmp_path / "data"
    write_coco(root, 4)
    write_coco(root, 3, split="val", seed=1)
    shutil.copy(root / "train" / "image_3.png", root / "val" / "image_0.png")
    splits = check_root(root)
    assert splits["train"].problems.issues["image-in-train-and-val"].examples == ["image_3.png"]
    assert splits["train"].shared_rows.tolist() == [3]
    assert "image-in-train-and-val" not in codes(splits["val"])
    assert codes(check_root(root, val="none")["train"]).get("image-in-train-and-val") is None


def test_one_broken_file_does_not_hide_the_others(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_coco(root, 2)
    file = write_coco(root, 2, split="val")
    file.write_text("[1, 2")
    splits = check_root(root)
    assert codes(splits["val"]) == {"json-invalid": 1}
    assert splits["val"].index is None and splits["val"].statistics is None
    assert str(file) in splits["val"].failure and splits["val"].lines(suggest=True)[0]
    assert errors(splits["train"]) == {} and splits["train"].statistics is not None


def test_a_missing_training_split_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_coco(root, 2, split="val")
    splits = check_root(root)
    assert errors(splits["train"]) == {"json-missing": 1}
    assert "no split train" in splits["train"].failure
    assert errors(splits["val"]) == {}


def test_without_any_split_there_is_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset folder"):
        check_root(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no split train"):
        check_root(tmp_path / "empty")


def test_a_missing_file(tmp_path: Path) -> None:
    split = check_split(tmp_path / "none.json", tmp_path, image_size=64)
    assert errors(split) == {"json-missing": 1}


def test_bad_images_are_no_errors_with_skip() -> None:
    problems = Problems()
    problems.add("image-missing", "a", "b")
    problems.add("image-id-ambiguous", "image 1")
    problems.add("mask-missing", "object 1")
    split = CheckedSplit(Path("a"), Path("b"), problems)
    assert errors(split) == {"image-missing": 2, "image-id-ambiguous": 1}
    assert errors(split, on_bad_image="skip") == {"image-id-ambiguous": 1}


def test_long_lines_hang_under_the_meaning(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "data", 2)
    split = check_split(file, file.parent, image_size=64)
    split.problems.add("image-size-differs", *("x" * 50 + str(k) for k in range(3)))
    lines = split.lines(suggest=False)
    start = next(k for k, line in enumerate(lines) if "image-size-differs" in line)
    column = lines[start].index("width and height")
    assert lines[start + 1].lstrip().startswith("(xxx")
    assert len(lines[start + 1]) - len(lines[start + 1].lstrip()) == column


def test_copies_of_a_picture_in_both_splits_are_noted(tmp_path: Path) -> None:
    for split in ("train", "val"):
        path = write_coco(tmp_path, 2, split=split, seed=len(split))
        document = json.loads(path.read_text())
        for k, image in enumerate(document["images"]):
            name = f"p{k}_png.rf.{len(split) + k:032x}.png"
            (path.parent / image["file_name"]).rename(path.parent / name)
            image["file_name"] = name
        path.write_text(json.dumps(document))
    splits = check_splits(tmp_path, train_split="train", val_split="val", image_size=64)
    assert splits["train"].problems["image-copies-in-train-and-val"] == 2
    assert splits["train"].problems["image-in-train-and-val"] == 0
