import json
import logging
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from helpers.coco_files import annotation, write_coco, write_json
from helpers.short_runs import a_config, write_data
from samft.errors import DataError
from samft.recipes import datasets
from samft.recipes.datasets import count_repeats, load_splits


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one_split(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("one_split")
    write_coco(root, 20)
    return root


def test_splits_are_counted_with_what_was_left_out(data):
    splits = load_splits(a_config(data))
    objects = (1, 4, 2, 7, 3)
    assert splits.counts == {
        "train": {
            "images": 13,
            "masks": 2 * sum(objects) + sum(objects[:3]),
            "skipped": {},
            "bad_images": {},
        },
        "val": {
            "images": 5,
            "masks": sum(objects),
            "skipped": {"annotation-orphan": 1, "crowd": 1, "mask-missing": 1},
            "bad_images": {},
        },
    }
    assert splits.train.training and not splits.val.training


def test_skipped_objects_of_real_data(data_root):
    coco = load_splits(a_config(data_root / "coco_open104")).counts
    assert sum(split["skipped"]["crowd"] for split in coco.values()) == 13
    assert coco["val"]["images"] + coco["val"]["skipped"]["image-without-objects"] == 57
    flakes = load_splits(a_config(data_root / "hbn_flakes", val_split="test")).counts
    assert flakes["val"]["skipped"] == {"mask-missing": 1}


def test_valid_is_found_for_val(data_root):
    splits = load_splits(a_config(data_root / "hbn_flakes"))
    assert splits.val.subset.index.image_folder.name == "valid"


@pytest.mark.parametrize(
    ("resize_mode", "side", "expected"),
    [
        ("pad", 9.9, "4 of 4 train objects (100.0%) are too small for image_size 64"),
        ("pad", 10.1, None),
        ("squash", 5.1, None),  # the height of the image, too, becomes 64 px
    ],
)
def test_the_log_tells_in_time_that_objects_are_too_small(
    resize_mode: str, side: float, expected: str | None, tmp_path, caplog
):
    for split in ("train", "val"):
        path = write_coco(tmp_path, 2, split=split, seed=len(split), sizes=((40, 80),))
        document = json.loads(path.read_text())
        right, bottom = 1 + 2 * side, 1 + side  # twice as wide as high
        corners = [1, 1, right, 1, right, bottom, 1, bottom]
        objects = [annotation(k, 10 + k % 2, corners) for k in range(1, 5)]
        write_json(path, document["images"], objects)
    with caplog.at_level(logging.INFO, logger="samft"):
        load_splits(a_config(tmp_path, image_size=64, resize_mode=resize_mode)).log_counts()
    loud = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(loud) == (expected is not None)
    if expected:
        assert caplog.messages[-1].startswith(expected)
        assert "--image_size 128 leaves 0 of them, at 4.0 times" in caplog.messages[-1]


def test_the_log_tells_of_few_small_objects_too(tmp_path, caplog):
    for split in ("train", "val"):
        path = write_coco(tmp_path, 2, split=split, seed=len(split), sizes=((64, 64),))
        document = json.loads(path.read_text())
        squares = [[1, 1, s, 1, s, s, 1, s] for s in (5, 21, 31, 41, 51)]
        objects = [annotation(k, 10 + k % 2, corners) for k, corners in enumerate(squares, 1)]
        write_json(path, document["images"], objects)
    with caplog.at_level(logging.INFO, logger="samft"):
        load_splits(a_config(tmp_path, image_size=64)).log_counts()
    assert "val: 1 of 5 objects (20.0%) are too small for image_size 64" in caplog.messages
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_notes_on_a_file_are_logged_once_for_both_parts_of_it(tmp_path, caplog):
    write_coco(tmp_path, 8, split="train")
    splits = load_splits(a_config(tmp_path, val_fraction=0.25))
    with caplog.at_level(logging.INFO, logger="samft"):
        splits.log_counts()
    columns = [message.split() for message in caplog.messages]
    (note,) = (number for number, line in enumerate(columns) if line[:2] == ["note", "area-is-box"])
    assert [line[0] for line in columns[note - 3 : note - 1]] == ["train:", "val:"]
    assert columns[note - 1] == "of the annotation file that both are parts of:".split()


def test_the_log_names_what_was_left_out(data, caplog):
    splits = load_splits(a_config(data))
    with caplog.at_level(logging.INFO, logger="samft"):
        splits.log_counts()
    messages = [" ".join(message.split()) for message in caplog.messages]
    assert messages[0] == "train: 13 images, 41 masks"
    val = messages.index(
        "val: 5 images, 17 masks; left out: annotation-orphan 1, mask-missing 1, crowd 1"
    )
    assert [line.split()[:3] for line in messages[val + 1 : val + 4]] == [
        ["warning", "annotation-orphan", "1"],
        ["warning", "mask-missing", "1"],
        ["note", "image-unused-bad", "1"],
    ]
    assert "images left out" not in caplog.text


def test_broken_images_are_named_one_by_one(tmp_path, caplog):
    for split in ("train", "val"):
        annotations = write_coco(tmp_path, 4, split=split)
        (annotations.parent / "image_1.png").unlink()
        (annotations.parent / "image_2.png").write_bytes(b"")
    with pytest.raises(DataError, match="image-missing, 1"):
        load_splits(a_config(tmp_path))
    splits = load_splits(a_config(tmp_path, on_bad_image="skip", val_split="train"))
    assert splits.counts["train"]["images"] == 2
    bad = {"image_1.png": "image-missing", "image_2.png": "image-empty"}
    assert splits.counts["train"]["bad_images"] == bad
    with caplog.at_level(logging.INFO, logger="samft"):
        splits.log_counts()
    assert "images left out: image_1.png (image-missing), image_2.png (image-empty)" in caplog.text


def test_images_of_the_validation_split_are_not_trained_on(tmp_path, caplog):
    write_coco(tmp_path, 6)
    write_coco(tmp_path, 3, split="val")  # the first three
    splits = load_splits(a_config(tmp_path))
    assert names(splits.train) == {"image_3.png", "image_4.png", "image_5.png"}
    assert splits.counts["train"]["skipped"] == {"image-in-train-and-val": 3}
    assert splits.counts["val"]["images"] == 3
    assert "3 training images are also in the validation split" in caplog.text


def test_one_split_for_both_is_a_warning(data, caplog):
    splits = load_splits(a_config(data, val_split="train"))
    assert len(splits.train) == len(splits.val) == 13
    assert "EVERY TRAINING IMAGE IS ALSO IN THE VALIDATION SPLIT" in caplog.text


def test_classes_and_small_masks_are_chosen(data_root):
    config = a_config(data_root / "coco_open104", category_names="person, dog", min_mask_area=100)
    splits = load_splits(config)
    for dataset in (splits.train, splits.val):
        index, objects = dataset.subset.index, dataset.subset.objects
        chosen = {index.category_names[k] for k in index.categories[objects].tolist()}
        assert chosen <= {"person", "dog"} and index.areas[objects].min() >= 100
    assert splits.counts["train"]["skipped"]["objects-not-chosen"] > 100
    with pytest.raises(DataError, match=r"no class 'persons'.*Did you mean 'person'"):
        load_splits(a_config(data_root / "coco_open104", category_names="persons"))


def test_rare_classes_are_repeated(data_root, caplog):
    caplog.set_level(logging.INFO, logger="samft")
    subset = load_splits(a_config(data_root / "coco_open104")).train.subset
    assert count_repeats(subset, None) is None
    repeats = count_repeats(subset, 0.1)
    assert repeats is not None and len(repeats) == 47
    # A class in one of 47 images asks for sqrt(0.1 * 47) of them.
    assert repeats.max() == pytest.approx((0.1 * 47) ** 0.5)
    assert "are shown more than once" in caplog.text


def names(dataset: Any) -> set[str]:
    return {dataset.subset.file_name(i) for i in range(dataset.subset.num_images)}


def test_held_out_images_are_a_share_by_file_name_and_are_logged(one_split, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="samft"):
        splits = load_splits(a_config(one_split, val_fraction=0.2, seed=1))
    train, val = names(splits.train), names(splits.val)
    assert (len(train), len(val)) == (16, 4) and not train & val
    message = next(text for text in caplog.messages if "held out" in text)
    assert "4 of 20" in message and all(name in message for name in val)

    # Neither the seed nor the order of the file, nor what else is in it, decides.
    document = json.loads((one_split / "train" / "_annotations.coco.json").read_text())
    document["images"].reverse()
    document["annotations"].reverse()
    shuffled = tmp_path / "shuffled.json"
    shuffled.write_text(json.dumps(document))
    again = load_splits(
        a_config(
            None,  # type: ignore[arg-type]
            train_annotations=shuffled,
            train_images=one_split / "train",
            val_fraction=0.2,
            seed=2,
        )
    )
    assert names(again.val) == val and names(again.train) == train


def test_larger_share_contains_the_smaller(one_split):
    shares = [load_splits(a_config(one_split, val_fraction=s)).val for s in (0.2, 0.5)]
    assert names(shares[0]) < names(shares[1])


def _rename_as_copies(annotations: Path) -> None:
    document = json.loads(annotations.read_text())
    for k, image in enumerate(document["images"]):
        name = f"p{k % 4}_png.rf.{k:032x}.png"
        (annotations.parent / image["file_name"]).rename(annotations.parent / name)
        image["file_name"] = name
    annotations.write_text(json.dumps(document))


def test_copies_of_a_picture_are_kept_together_and_said(tmp_path, caplog):
    _rename_as_copies(write_coco(tmp_path, 12))
    with caplog.at_level(logging.INFO, logger="samft"):
        splits = load_splits(a_config(tmp_path, val_fraction=0.25))
    assert "12 images are in 4 groups, each of which stays on one side (p" in caplog.text
    held_out = {name.split(".rf.")[0] for name in names(splits.val)}
    assert len(held_out) == 1 and len(splits.val) == 3
    alone = load_splits(a_config(tmp_path, val_fraction=0.25, group_by="none"))
    assert len({name.split(".rf.")[0] for name in names(alone.val)}) > 1


def test_copies_in_both_splits_are_a_warning(tmp_path, caplog):
    _rename_as_copies(write_coco(tmp_path, 4))
    _rename_as_copies(write_coco(tmp_path, 2, split="val", seed=1))
    splits = load_splits(a_config(tmp_path))
    assert len(splits.train) == 4
    assert "2 training images are, by their names, of one group with validation" in caplog.text


def test_a_validation_split_that_cannot_be_decoded_is_refused(tmp_path):
    write_coco(tmp_path, 2)
    val = write_coco(tmp_path, 2, split="val", seed=1).parent
    for path in val.glob("*.png"):
        content = path.read_bytes()
        half = len(content) // 2
        path.write_bytes(content[:half] + bytes(40) + content[half + 40 :])
    with pytest.raises(DataError, match="image can be used|images can be used|no usable object"):
        load_splits(a_config(tmp_path, on_bad_image="skip"))


def test_validation_split_wins_over_val_fraction(data, caplog):
    splits = load_splits(a_config(data, val_fraction=0.5))
    assert splits.counts["val"]["images"] == 5
    assert "val_fraction is not used" in caplog.text


def test_without_a_validation_split_the_error_names_val_fraction(one_split):
    with pytest.raises(DataError, match="set val_fraction"):
        load_splits(a_config(one_split))


def test_broken_validation_split_is_not_replaced_by_val_fraction(one_split, tmp_path):
    (tmp_path / "train").symlink_to(one_split / "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "_annotations.coco.json").write_text('{"images": [')
    with pytest.raises(DataError, match="not valid JSON") as caught:
        load_splits(a_config(tmp_path, val_fraction=0.2))
    assert "set val_fraction" not in str(caught.value)


def test_fingerprint_changes_with_the_training_objects_only(data, tmp_path):
    before = load_splits(a_config(data)).fingerprint
    assert load_splits(a_config(data, val_split="train")).fingerprint == before
    document = json.loads((data / "train" / "_annotations.coco.json").read_text())
    document["annotations"][0]["bbox"][2] += 1
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(document))
    config = a_config(data, train_annotations=changed, train_images=data / "train")
    assert load_splits(config).fingerprint != before


def with_test_split(root: Path, name: str = "test", *, seed: int = 5) -> Path:
    for split, number in (("train", 1), ("val", 2), (name, seed)):
        write_coco(root, 3, split=split, seed=number)
    return root


def test_a_test_split_is_read_where_there_is_one(data, tmp_path):
    assert load_splits(a_config(data)).test is None
    root = with_test_split(tmp_path)
    splits = load_splits(a_config(root))
    assert splits.test is not None and not splits.test.training
    assert splits.test.subset.index.image_folder == root / "test"
    assert list(splits.counts) == ["train", "val", "test"]
    off = load_splits(a_config(root, test_split="none"))
    assert off.test is None and list(off.counts) == ["train", "val"]
    assert off.fingerprint == splits.fingerprint


@pytest.mark.parametrize(
    ("place", "images"),
    [
        ("annotations/instances_test.json", "test"),
        ("annotations/instances_test2017.json", "test2017"),
        ("Test/labels.json", "Test"),
        ("testing.json", "testing"),
    ],
)
def test_a_test_split_in_any_layout(place: str, images: str, tmp_path):
    root = with_test_split(tmp_path, images)
    (root / place).parent.mkdir(exist_ok=True)
    (root / images / "_annotations.coco.json").rename(root / place)
    test = load_splits(a_config(root)).test
    assert test is not None and test.subset.index.image_folder == root / images


def test_a_named_test_split_has_to_be_there(tmp_path):
    root = with_test_split(tmp_path, "held_out")
    assert load_splits(a_config(root)).test is None
    named = load_splits(a_config(root, test_split="held_out")).test
    assert named is not None and len(named) == 3
    with pytest.raises(DataError, match="no split held-out.*--test_split NAME"):
        load_splits(a_config(root, test_split="held-out"))
    files = {"test_annotations": root / "held_out/_annotations.coco.json"}
    files["test_images"] = root / "held_out"
    by_file = load_splits(a_config(root, **files)).test
    assert by_file is not None and names(by_file) == names(named)


def test_two_test_splits_are_left_for_the_user_to_choose(tmp_path, caplog):
    root = with_test_split(tmp_path)
    (root / "annotations").mkdir()
    content = (root / "test/_annotations.coco.json").read_text()
    (root / "test/_annotations.coco.json").unlink()
    for year in (2015, 2017):
        (root / f"annotations/instances_test{year}.json").write_text(content)
    with caplog.at_level(logging.INFO, logger="samft"):
        assert load_splits(a_config(root)).test is None
    assert "more than one split for 'test': name one of test2015, test2017" in caplog.text


def test_a_split_that_is_used_already_is_no_test(tmp_path, caplog):
    root = with_test_split(tmp_path)
    assert load_splits(a_config(root, val_split="test")).test is None
    assert load_splits(a_config(root, train_split="test")).test is None
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("other", ["train", "val"])
def test_images_of_other_splits_are_no_test_images(other: str, tmp_path, caplog):
    root = with_test_split(tmp_path)
    shutil.copy(root / other / "image_1.png", root / "test/image_1.png")
    splits = load_splits(a_config(root))
    assert names(splits.test) == {"image_0.png", "image_2.png"}
    assert splits.counts["test"]["skipped"] == {"image-in-train-or-val": 1}
    assert len(splits.train) == len(splits.val) == 3
    assert "1 of 3 images of the test split are also trained or validated on" in caplog.text


def test_a_test_split_of_seen_images_only_is_none(tmp_path, caplog):
    root = with_test_split(tmp_path, seed=2)  # as val
    assert load_splits(a_config(root)).test is None
    assert "3 of 3 images of the test split are also trained or validated on" in caplog.text


# The general set


def with_general_set(root: Path, **changes: Any) -> Path:
    write_coco(root / "general", 6, split="photos", seed=4, **changes)
    return root / "general"


def test_a_general_set_is_of_all_classes_and_seen_whole(data, tmp_path):
    general = with_general_set(tmp_path)
    document = json.loads((general / "photos/_annotations.coco.json").read_text())
    document["categories"] = [{"id": 1, "name": "something else"}]
    (general / "photos/_annotations.coco.json").write_text(json.dumps(document))
    windows = {"view": "tiles", "tile_size": 32, "category_names": "thing"}
    splits = load_splits(a_config(data, general_data_root=general, **windows))
    alone = load_splits(a_config(data, **windows))
    assert alone.general is None and alone.general_fingerprint == ""
    assert splits.general is not None and not splits.general.training
    assert splits.general.subset.windows is None and splits.val.subset.windows is not None
    assert splits.counts["general"]["masks"] == 1 + 4 + 2 + 7 + 3 + 1
    assert splits.general_fingerprint and splits.fingerprint == alone.fingerprint
    assert {k: v for k, v in splits.counts.items() if k != "general"} == alone.counts


def test_of_a_large_general_set_the_same_images_are_drawn(data, tmp_path, monkeypatch):
    general = with_general_set(tmp_path)
    monkeypatch.setattr(datasets, "MOST_GENERAL_IMAGES", 4)
    drawn = [load_splits(a_config(data, general_data_root=general, seed=n)) for n in (0, 1)]
    first, second = (names(each.general) for each in drawn)
    assert len(first) == 4 and first == second
    assert drawn[0].counts["general"]["skipped"] == {"image-not-drawn": 2}


def test_images_that_are_trained_or_validated_on_are_a_warning(data, tmp_path, caplog):
    general = with_general_set(tmp_path)
    shutil.copy(data / "train/image_3.png", general / "photos/image_5.png")
    splits = load_splits(a_config(data, general_data_root=general))
    assert splits.counts["general"]["images"] == 6
    (text,) = (one for one in caplog.messages if "general_data_root" in one)
    assert "1 of its 6 images are also in the train split (image_5.png)" in text
    caplog.clear()
    load_splits(a_config(data, general_data_root=data))
    (text,) = (one for one in caplog.messages if "general_data_root" in one)
    assert "ALL of its 5 images are also in the val split" in text


def test_ranges_of_pixels_that_a_resumed_run_lacks_are_measured(data, tmp_path):
    general = with_general_set(tmp_path)
    before = load_splits(a_config(data)).pixels
    for path in general.rglob("*.png"):
        cv2.imwrite(str(path), cv2.imread(str(path)).astype(np.uint16) * 257)
    splits = load_splits(a_config(data, general_data_root=general))
    measured = splits.pixels
    splits.use_pixels(before)
    assert splits.pixels == measured and not before.ranges and measured.ranges
    assert not splits.general[0].bad_images and splits.general[0].image.dtype == torch.uint8
