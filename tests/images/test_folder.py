import os
import socket
from pathlib import Path

import pytest

from samft.images.folder import ImageFolder


def _touch_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


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


@pytest.mark.parametrize("name", ["gone.png", "sub/gone.png", "none/gone.png", "b.png"])
def test_missing_images_are_missing(tmp_path: Path, name: str) -> None:
    _touch_files(tmp_path, "a.png", "sub/b.png")
    assert ImageFolder(tmp_path).find(name) == (name, "image-missing")
    assert ImageFolder(tmp_path / "no folder").find(name) == (name, "image-missing")


FOREIGN = [
    "../a.png",
    "x/../../../a.png",
    "/etc/a.png",
    "..\\..\\a.png",
    "C:\\Users\\me\\a.png",
    "\\\\host\\share\\a.png",
    "D:/data/other/a.png",
    "file:///home/me/a.png",
    "s3://bucket/data/a.png",
    "https://host/x/a.png?size=full&X-Sign=1#top",
    "/data/local-files/?d=data/a.png",
    "images/a.png",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_path_means_the_one_file_of_its_name_inside(tmp_path: Path, name: str) -> None:
    _touch_files(tmp_path, "data/sub/a.png", "data/b.png")
    assert ImageFolder(tmp_path / "data").find(name) == ("sub/a.png", "image-name-mended")


@pytest.mark.parametrize("name", FOREIGN[:-1])
def test_names_that_leave_the_folder_are_outside(tmp_path: Path, name: str) -> None:
    _touch_files(tmp_path, "a.png", "data/b.png")
    assert ImageFolder(tmp_path / "data").find(name) == (name, "image-outside")


@pytest.mark.parametrize("name", ["a\0.png", "../a", "../../etc/passwd", "https://[/a", "//"])
def test_names_that_no_file_inside_has_are_outside(tmp_path: Path, name: str) -> None:
    _touch_files(tmp_path, "a.png", "data/a.png", "data/passwd")
    assert ImageFolder(tmp_path / "data", root=tmp_path).find(name) == (name, "image-outside")


def test_a_foreign_path_that_lies_inside_is_taken_at_its_word(tmp_path: Path) -> None:
    _touch_files(tmp_path, "all/a b.png", "all/c.png", "train/c.png")
    (tmp_path / "link").symlink_to(".")
    train = ImageFolder(tmp_path / "link" / "train", root=tmp_path / "link")
    for start in (tmp_path, tmp_path / "link"):
        assert train.find(f"{start}/train/c.png") == ("c.png", "image-name-mended")
        assert train.find(f"{start}/train/x/../c.png") == ("c.png", "image-name-mended")
        assert train.find(f"{start}/all/c.png") == ("../all/c.png", "image-name-mended")
        assert train.find(f"file://{start}/all/a%20b.png")[0] == "../all/a b.png"
    assert train.find("../all/c.png") == ("../all/c.png", "")
    assert train.find("..\\all\\c.png") == ("../all/c.png", "image-name-mended")


def test_of_files_of_one_name_the_one_with_most_of_the_path_is_meant(tmp_path: Path) -> None:
    _touch_files(tmp_path, "cats/1.png", "dogs/1.png", "dogs/2.png", "dogs/old/2.png")
    folder = ImageFolder(tmp_path)
    assert folder.find("C:\\data\\dogs\\1.png") == ("dogs/1.png", "image-name-mended")
    places = folder.find_all(["/cats/1.png", "/dogs/1.png", "/birds/1.png"])
    assert [path for path, _ in places.values()] == ["cats/1.png", "dogs/1.png", "/birds/1.png"]
    assert folder.find("C:\\data\\birds\\1.png")[1] == "image-ambiguous"
    assert folder.hints["C:\\data\\birds\\1.png"] == "cats/1.png and dogs/1.png fit"


def test_a_file_that_is_listed_under_its_own_name_is_no_other_image(tmp_path: Path) -> None:
    _touch_files(tmp_path, "x/1.png", "x/2.png")
    places = ImageFolder(tmp_path).find_all(["x/1.png", "/a/1.png", "/a/2.png", "/b/2.png"])
    assert [places[name][1] for name in places] == ["", *["image-ambiguous"] * 3]
    # One path, written twice.
    places = ImageFolder(tmp_path).find_all(["C:\\a\\2.png", "c:/a/2.png"])
    assert {path for path, _ in places.values()} == {"x/2.png"}


def test_a_folder_that_holds_images_is_taken_at_its_word(tmp_path: Path) -> None:
    _touch_files(tmp_path, "cats/1.png", "dogs/2.png")
    folder = ImageFolder(tmp_path)
    assert folder.find("dogs/1.png") == ("dogs/1.png", "image-missing")
    assert folder.hints["dogs/1.png"] == "there is cats/1.png"
    # Nor is a frame of another video the one that is missing.
    assert folder.find("birds/1.png") == ("birds/1.png", "image-missing")
    assert folder.find("images/1.png") == ("cats/1.png", "image-name-mended")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("caf\u00e9.jpg", "cafe\u0301.jpg"),
        ("cafe\u0301.jpg", "caf\u00e9.jpg"),
        ("my%20photo.jpg", "my photo.jpg"),
        ("my photo.jpg", "my%20photo.jpg"),
        ("my+photo.jpg", "my photo.jpg"),
        ("my%2520photo.jpg", "my photo.jpg"),
        ("caf%C3%A9.jpg", "caf\u00e9.jpg"),
        ("My%20Folder/a.jpg", "my folder/A.jpg"),
        ("sub/a.jpg", "sub\\a.jpg"),
        ("sub\\deep/a.jpg", "sub/deep/a.jpg"),
        ("a.jpg", "a.JPG"),
        ("a.jpeg", "a.jpg"),
        ("a.tif", "A.TIFF"),
        ("a&amp;b.jpg", "a&b.jpg"),
        ("a.jpg ", "a.jpg"),
        ("sub/a", "sub/a.jpg"),
        ("img_6.jpg", "cb0618f6-img_6.jpg"),
        ("cb0618f6-img_6.jpg", "img_6.jpg"),
        ("my photo (1).jpg", "cb0618f6-my_photo_1.jpg"),
        ("img_6.jpg", "img_6_jpg.rf.0a1b2c3d4e5f60718293a4b5c6d7e8f9.jpg"),
        ("img_6_jpg.rf.0a1b2c3d4e5f60718293a4b5c6d7e8f9.jpg", "img_6.jpg"),
    ],
)
def test_names_that_tools_have_rewritten_are_found(tmp_path: Path, name: str, path: str) -> None:
    _touch_files(tmp_path, path, "other.jpg")
    assert ImageFolder(tmp_path).find(name) == (path, "image-name-mended")


def test_a_near_name_is_offered_and_not_taken(tmp_path: Path) -> None:
    _touch_files(tmp_path, "img_0001.jpg", "sub/portrait.jpg", "a.json")
    folder = ImageFolder(tmp_path)
    for name in ("img_001.jpg", "../portrayt.jpg", "zebra.jpg", "a.jpg", "img_2.jpg"):
        assert folder.find(name)[0] == name
    assert folder.hints == {
        "img_001.jpg": "did you mean img_0001.jpg?",
        "../portrayt.jpg": "did you mean sub/portrait.jpg?",
    }


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    _touch_files(tmp_path, "data/sub.jpg/x.jpg")
    os.mkfifo(tmp_path / "data" / "pipe.jpg")
    (tmp_path / "data" / "link.jpg").symlink_to("pipe.jpg")
    (tmp_path / "data" / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "data" / "socket.jpg"))
    folder = ImageFolder(tmp_path / "data")
    for name in ("pipe.jpg", "link.jpg", "socket.jpg", "zero.jpg"):
        assert folder.find(name) == (name, "image-not-a-file")
    assert folder.find("sub.jpg") == ("sub.jpg", "image-unreadable")


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".jpg", "y" * 300 + "/a.jpg", "\ud800.jpg", "\ud800/c"]
)
def test_names_that_no_file_system_knows_are_missing(tmp_path: Path, name: str) -> None:
    _touch_files(tmp_path, "b.jpg")
    assert ImageFolder(tmp_path).find(name) == (name, "image-missing")


def test_names_that_are_not_utf8_are_found(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_text("{}")
    assert ImageFolder(tmp_path).find("caf\udce9.jpg") == ("caf\udce9.jpg", "")


def test_links_into_a_pool_open_with_its_folder(tmp_path: Path) -> None:
    _touch_files(tmp_path, "pool/aa/1", "pool/bb/2", "other/3")
    train = tmp_path / "data"
    train.mkdir()
    for name, target in (("1.jpg", "pool/aa/1"), ("2.jpg", "pool/bb/2"), ("3.jpg", "other/3")):
        (train / name).symlink_to(tmp_path / target)
    (train / "4.jpg").symlink_to(tmp_path / "pool/cc/4")
    folder = ImageFolder(train)
    assert {code for _, code in folder.find_all(["1.jpg", "2.jpg"]).values()} == {"image-outside"}
    hint = f"behind a link: --allow_links {tmp_path / 'pool'} opens it"
    assert folder.hints == {"1.jpg": hint, "2.jpg": hint}
    assert folder.find("4.jpg") == ("4.jpg", "image-missing")
    assert folder.hints["4.jpg"] == f"a link to {tmp_path / 'pool/cc/4'}, which is not there"
    opened = ImageFolder(train, allow_links=[tmp_path / "pool"]).find_all(
        ["1.jpg", "2.jpg", "3.jpg"]
    )
    assert [code for _, code in opened.values()] == ["", "", "image-outside"]


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


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "none")
    assert folder.find("a.jpg") == ("a.jpg", "image-missing")
    assert folder.hints["a.jpg"] == f"there is no folder {tmp_path / 'none'}"
