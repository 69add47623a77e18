from pathlib import Path

import pytest

from samft.coco.layout import find_split
from samft.errors import DataError


def _touch_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


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
