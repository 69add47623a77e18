from pathlib import Path

import pytest

from samft.coco.layout import find_general_set, find_split
from samft.errors import DataError


def _touch_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"images": [], "annotations": []}')


def test_find_split_in_both_layouts(tmp_path: Path) -> None:
    _touch_files(tmp_path, "a/train/_annotations.coco.json", "a/valid/_annotations.coco.json")
    _touch_files(tmp_path, "b/annotations/instances_train2017.json", "b/train2017/x.jpg")
    _touch_files(tmp_path, "b/annotations/instances_val.json", "b/images/val/x.jpg")
    a, b = tmp_path / "a", tmp_path / "b"
    assert find_split(a, "train") == (a / "train/_annotations.coco.json", a / "train")
    assert find_split(a, "val") == (a / "valid/_annotations.coco.json", a / "valid")
    official = b / "annotations/instances_train2017.json", b / "train2017"
    assert find_split(b, "train2017") == official
    assert find_split(b, "train") == official
    assert find_split(b, "val") == (b / "annotations/instances_val.json", b / "images/val")
    _touch_files(b, "annotations/instances_train2014.json")
    with pytest.raises(DataError, match="train2014, train2017"):
        find_split(b, "train")
    with pytest.raises(DataError, match="no split test"):
        find_split(a, "test")
    with pytest.raises(DataError, match="no dataset folder"):
        find_split(tmp_path / "c", "train")


@pytest.mark.parametrize(
    ("split", "annotations", "images", "others"),
    [
        ("train", "annotations/instances_Train.json", "images/Train", ["annotations/Val.json"]),
        ("val", "annotations/instances_Validation.json", "images/Validation", ["a/train.json"]),
        ("train", "result.json", "images", []),
        ("train", "labels.json", "data", []),
        ("train", "_annotations.coco.json", ".", ["images.txt"]),
        ("train", "train.json", ".", ["val.json"]),
        ("val", "val.json", "images", ["train.json"]),
        ("val", "val.json", "valid", ["train.json", "train/a.jpg"]),
        ("train", "train/annotations.json", "train", ["test/annotations.json"]),
        ("val", "Valid/_annotations.coco.json", "Valid", ["Train/_annotations.coco.json"]),
        ("train", "annotations/instances_default.json", "images", []),
        ("train", "labels/train2017.json", "train2017", ["labels/val2017.json"]),
        ("test", "annotations/test.json", "images/test", ["annotations/train.json"]),
        ("train", "annotations/lvis_v1_train.json", ".", ["annotations/lvis_v1_val.json"]),
        ("val", "annotations/val_fold0.json", "images", ["annotations/train_fold0.json"]),
        ("train", "train.json", "images", ["train_small.json"]),
        ("train", "labels_my-project_2024-01-01.json", "images", []),
    ],
)
def test_the_only_file_that_can_be_meant_is_taken(
    tmp_path: Path, split: str, annotations: str, images: str, others: list[str]
) -> None:
    _touch_files(tmp_path, annotations, *others)
    (tmp_path / images).mkdir(parents=True, exist_ok=True)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations" / "captions_train.json").write_text("{}")
    assert find_split(tmp_path, split) == (tmp_path / annotations, tmp_path / images)


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["result.json"], "val", r"no split val or .*It holds result.json \(images in .*\)"),
        (["coco_test_set.json"], "train", "no split train"),
        (["train_a.json", "train_b.json"], "train", "more than one split for 'train'"),
        (["a.json", "b.json"], "train", "no split train: .* a.json .*, b.json"),
        (["Train.json", "training.json"], "train", "more than one split for 'train'"),
        (["data.yaml", "labels/train/a.txt"], "train", "YOLO's labels .data.yaml, labels/train/a"),
        (["Annotations/a.xml", "JPEGImages/a.jpg"], "train", "Pascal VOC's XML .Annotations/a.xml"),
        (["coco/annotations/instances_train.json"], "train", "a dataset in its folder coco"),
        (["a.jpg", "b.jpg"], "train", "no annotations, only a.jpg, b.jpg"),
        ([], "train", "It holds nothing"),
    ],
)
def test_a_missing_split_names_what_is_there(
    tmp_path: Path, files: list[str], split: str, message: str
) -> None:
    _touch_files(tmp_path, *files)
    with pytest.raises(DataError, match=message) as error:
        find_split(tmp_path, split, flags="--this NAME")
    assert str(error.value).endswith("Give --this NAME.")


@pytest.mark.parametrize(
    ("files", "annotations", "images"),
    [
        (["train/_annotations.coco.json", "valid/_annotations.coco.json"], 1, "valid"),
        (
            ["annotations/instances_train2017.json", "annotations/instances_val2017.json"],
            1,
            "val2017",
        ),
        (["Validation/labels.json", "Train/labels.json"], 0, "Validation"),
        (["_annotations.coco.json"], 0, ""),
        (["train/_annotations.coco.json"], 0, "train"),
        (["annotations/instances_default.json"], 0, ""),
    ],
)
def test_a_general_set_is_the_validation_split_or_the_only_file(
    tmp_path: Path, files: list[str], annotations: int, images: str
) -> None:
    _touch_files(tmp_path, *files)
    (tmp_path / images).mkdir(exist_ok=True)
    assert find_general_set(tmp_path) == (tmp_path / files[annotations], tmp_path / images)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train.json", "test.json"], "no split val .* Give a folder with a validation split, or"),
        (["Val.json", "validation.json"], "more than one split for 'val'"),
        (["labels/a.txt", "data.yaml"], "It holds YOLO's labels"),
    ],
)
def test_a_general_set_that_is_not_clear_is_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    _touch_files(tmp_path, *files)
    with pytest.raises(DataError, match=f"^general_data_root: .*{message}"):
        find_general_set(tmp_path)
    with pytest.raises(DataError, match="^general_data_root: .*nowhere does not exist: give"):
        find_general_set(tmp_path / "nowhere")
    with pytest.raises(DataError, match="^general_data_root: .*is no folder: give"):
        find_general_set(tmp_path / files[0])


def test_files_of_other_tools_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"version": "5.0", "shapes": []}')
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(DataError, match=r"LabelMe's JSON \(a.json\), other JSON \(b.json\), which"):
        find_split(tmp_path, "train")
    with pytest.raises(DataError, match="is no folder: give --flags"):
        find_split(tmp_path / "a.json", "train", flags="--flags")


def test_a_split_folder_as_the_root_is_its_split(tmp_path: Path) -> None:
    _touch_files(tmp_path, "train/_annotations.coco.json", "valid/_annotations.coco.json")
    train, valid = tmp_path / "train", tmp_path / "valid"
    assert find_split(train, "train") == (train / "_annotations.coco.json", train)
    assert find_split(valid, "val") == (valid / "_annotations.coco.json", valid)
    for folder, split in ((train, "val"), (valid, "train")):
        with pytest.raises(DataError, match="It holds _annotations.coco.json"):
            find_split(folder, split)
