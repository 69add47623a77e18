from pathlib import Path

import pytest

from samft.coco.layout import find_split
from samft.errors import DataError
from samft.images.folder import ImageFolder


def _touch_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")

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


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a.png", "a.png"),
        ("sub/b.png", "sub/b.png"),
        ("./a.png", "a.png"),
        ("sub\\b.png", "sub/b.png"),
        ("c.png", "images/c.png"),
        ("train/a.png", "a.png"),
        ("train/c.png", "images/c.png"),
        ("A.PNG", "a.png"),
        ("sub/B.png", "sub/b.png"),
    ],
)
def test_images_are_found_under_other_spellings(tmp_path: Path, name: str, path: str) -> None:
    folder = tmp_path / "train"
    _touch_files(folder, "a.png", "sub/b.png", "images/c.png")
    assert ImageFolder(folder).find(name) == (path, "" if name == path else "image-name-mended")


@pytest.mark.parametrize("name", ["gone.png", "sub/gone.png", "none/a.png", "b.png"])
def test_missing_images_are_missing(tmp_path: Path, name: str) -> None:
    _touch_files(tmp_path, "a.png", "sub/b.png")
    assert ImageFolder(tmp_path).find(name) == (name, "image-missing")
    assert ImageFolder(tmp_path / "no folder").find(name) == (name, "image-missing")


OUTSIDE = ["../a.png", "x/../../a.png", "/etc/a.png", "..\\a.png", "C:\\a.png", "a\0.png", "../a"]


@pytest.mark.parametrize("name", [*OUTSIDE, "../../etc/passwd", "\\\\host\\a.png"])
def test_names_that_leave_the_folder_are_outside(tmp_path: Path, name: str) -> None:
    _touch_files(tmp_path, "a.png", "train/a.png")
    assert ImageFolder(tmp_path / "train", root=tmp_path).find(name) == (name, "image-outside")


def test_links_may_lead_within_the_data_folder_only(tmp_path: Path) -> None:
    _touch_files(tmp_path, "secret.png", "far/b.png", "data/all/a.png", "data/train/real.png")
    train = tmp_path / "data" / "train"
    (train / "inside.png").symlink_to("../all/a.png")
    (train / "outside.png").symlink_to(tmp_path / "secret.png")
    (train / "loop.png").symlink_to("loop.png")
    (train / "near").symlink_to("../all")
    (train / "far").symlink_to(tmp_path / "far")
    with_root = ImageFolder(train, root=tmp_path / "data")
    names = ("real.png", "inside.png", "near/a.png", "outside.png", "far/b.png")
    assert [with_root.find(name)[1] for name in names] == ["", "", "", *["image-outside"] * 2]
    alone = ImageFolder(train)
    assert [alone.find(name)[1] for name in names] == ["", *["image-outside"] * 4]
    assert with_root.find("loop.png")[1] in ("image-outside", "")
    # The folder itself may be anywhere: whoever names it means it.
    linked = tmp_path / "link"
    linked.symlink_to(train)
    assert ImageFolder(linked).find("real.png") == ("real.png", "")


def test_what_comes_and_goes_is_noticed(tmp_path: Path) -> None:
    _touch_files(tmp_path, "a.png", "sub/b.png")
    seen = ImageFolder(tmp_path)
    for name in ("a.png", "sub/b.png", "gone/c.png"):
        seen.find(name)
    digests = seen.listing_digests()
    assert not ImageFolder(tmp_path).has_changed(digests)
    _touch_files(tmp_path, "other/x.png")
    assert ImageFolder(tmp_path).has_changed(digests)  # a new folder is a new name
    (tmp_path / "other" / "x.png").unlink()
    (tmp_path / "other").rmdir()
    assert not ImageFolder(tmp_path).has_changed(digests)
    _touch_files(tmp_path, "gone/c.png")
    assert ImageFolder(tmp_path).has_changed(digests)
