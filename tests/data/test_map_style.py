"""A caller's own dataset gives what a COCO file with the same images and masks gives."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from helpers.gloo_pool import GlooPool
from helpers.own_datasets import Discs, write_as_coco
from samft.annotations.segmentation import decode_cropped
from samft.coco.subset import (
    CocoSubset,
    choose_objects,
    find_shared,
    read_coco,
    select_objects,
    split_by_hash,
)
from samft.data.dataset import Coco2MaskDataset, Sample
from samft.data.map_style import DatasetIndex, index_dataset
from samft.distributed import get_rank
from samft.errors import DataError, RunStopped, UserError


def a_subset(dataset: Any, name: str = "train_data", **options: Any) -> CocoSubset:
    return select_objects(index_dataset(dataset, name=name, **options))


class Items(list):
    """A list of items, which raises the exceptions among them."""

    def __getitem__(self, i):
        item = super().__getitem__(i)
        if isinstance(item, Exception):
            raise item
        return item


def check_equal_samples(ours: Sample, theirs: Sample) -> None:
    for name, value in vars(theirs).items():
        own = getattr(ours, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(own, value), name
        elif name == "truths":
            for mask, other in zip(own, value, strict=True):
                assert mask.extent == other.extent and np.array_equal(mask.mask, other.mask)
        else:
            assert own == value, name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("augment", ["flip", "scale"])
def test_samples_are_those_of_a_coco_file_of_the_same(tmp_path: Path, training, augment) -> None:
    dataset = Discs(6)
    coco = read_coco(write_as_coco(dataset, tmp_path), tmp_path / "train")
    pairs = [
        Coco2MaskDataset(
            tmp_path, subset=each, image_size=64, training=training, augment=augment, seed=3
        )
        for each in (a_subset(dataset), coco)
    ]
    assert len(pairs[0]) == len(pairs[1]) == 6
    for key in [(epoch, i) for epoch in range(2) for i in range(6)]:
        check_equal_samples(pairs[0][key], pairs[1][key])


def test_masks_boxes_and_names_are_those_of_the_items() -> None:
    dataset = Discs(4)
    subset = a_subset(dataset, num_workers=2)
    assert subset.num_objects == 1 + 3 + 2 + 1 and subset.counts == {}
    for i in range(4):
        image, masks = dataset[i]
        assert subset.file_name(i) == f"train_data[{i}]" and subset.image_id(i) == i
        assert np.array_equal(subset.open_image(i).decode(), image)
        for k, mask in zip(subset.objects_of(i).tolist(), masks, strict=True):
            crop = decode_cropped(subset.index.segmentations[k], subset.size(i))
            ys, xs = np.nonzero(mask)
            box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert crop.extent == box and crop.mask.sum() == mask.sum()
            assert subset.index.boxes[k].tolist() == list(box)
            assert subset.index.areas[k] == mask.sum()


def test_a_target_may_be_torchvisions() -> None:
    image, masks = Discs(2, objects=(3,))[0]
    tight = a_subset([(image, masks)]).index.boxes
    # One that is used, one that has nothing to do with its mask, and one that is none.
    boxes = np.array([tight[0] + [-1, -1, 1, 1], [0, 0, 2, 2], [np.nan, 0, 5, 5]])
    target = {
        "masks": torch.from_numpy(masks.astype(np.uint8)),
        "boxes": torch.from_numpy(boxes),
        "labels": torch.tensor([7, 7, 9]),
        "iscrowd": torch.tensor([0, 0, 1]),
        "image_id": 12,
    }
    subset = a_subset([(Image.fromarray(image), target)], crowds="leave_out")
    index = subset.index
    assert index.categories.tolist() == [7, 7, 9]
    assert index.category_names == {7: "category 7", 9: "category 9"}
    assert len(subset.objects_of(0)) == 2 and subset.counts == {"crowd": 1}
    assert np.array_equal(index.boxes, [boxes[0], *tight[1:]])
    chosen = choose_objects(index, source="it", category_names=["category 7"], min_mask_area=0)
    assert chosen.num_objects == 2
    with pytest.raises(DataError, match="no object is left"):
        choose_objects(index, source="it", category_names=["category 9"], min_mask_area=0)


GREY = np.zeros((4, 5), np.uint8)
RGB = np.zeros((4, 5, 3), np.uint8)
MASKS = np.ones((2, 4, 5), bool)
WRONG = [
    (RGB, "train_data[1] is a ndarray, not a pair of an image and masks."),
    ((RGB, {"boxes": [[0, 0, 1, 1]]}), "train_data[1] has no 'masks'"),
    ((GREY, MASKS), "train_data[1]: the image is uint8 of 4 x 5; it has to be uint8 of height"),
    ((RGB / 255, MASKS), "train_data[1]: the image is float64 of 4 x 5 x 3"),
    ((RGB.transpose(2, 0, 1), MASKS), "train_data[1]: the image is uint8 of 3 x 4 x 5"),
    ((RGB, MASKS[0]), "train_data[1]: the masks are bool of 4 x 5; they have to be bool of K x 4"),
    ((RGB, MASKS[:, :3]), "train_data[1]: the masks are bool of 2 x 3 x 5"),
    ((RGB, MASKS * 0.5), "train_data[1]: the masks are float64 of 2 x 4 x 5"),
    ((RGB, [MASKS[0], MASKS[1, :3]]), "train_data[1] cannot be read as NumPy arrays"),
    ((RGB, {"masks": MASKS, "boxes": [[0, 0, 1, 1]]}), "train_data[1]: 'boxes' is int64 of (1, 4)"),
    ((RGB, {"masks": MASKS, "labels": ["a", "b"]}), "train_data[1]: 'labels' is <U1 of (2,)"),
    ((RGB, {"masks": MASKS, "iscrowd": [0]}), "train_data[1]: 'iscrowd' is int64 of (1,)"),
    (KeyError("no such file"), "train_data[1] raises KeyError: 'no such file' (" + __file__),
]


@pytest.mark.parametrize(("item", "message"), WRONG, ids=lambda value: str(value)[11:40])
def test_what_is_no_image_with_masks_is_named(item: Any, message: str) -> None:
    with pytest.raises(DataError) as failure:
        index_dataset(Items([(RGB, MASKS), item]), name="train_data")
    assert message in str(failure.value)


def test_an_iterable_and_an_empty_dataset_are_refused() -> None:
    class Stream(IterableDataset):
        def __len__(self):
            return 2

        def __iter__(self):
            return iter(())

    class Endless(Discs):
        def __len__(self):
            raise TypeError("no length")

    for dataset in ((item for item in Discs(2)), Stream(), Endless(2), DataLoader(Discs(2))):
        kind = type(dataset).__name__
        with pytest.raises(DataError, match=f"val_data is a {kind}, which is no map-style dataset"):
            index_dataset(dataset, name="val_data")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="val_data has no items"):
        index_dataset([], name="val_data")


def test_images_without_masks_and_empty_masks_are_left_out() -> None:
    none, empty = np.zeros((0, 4, 5), bool), np.zeros((1, 4, 5), bool)
    subset = a_subset([(RGB, none), (RGB + 1, MASKS), (RGB + 2, []), (RGB + 3, empty)])
    assert subset.num_images == 1 and subset.image_id(0) == 1
    assert subset.counts == {"image-without-objects": 3, "rle-empty": 1}
    with pytest.raises(DataError, match="val_data: no object is left"):
        choose_objects(
            index_dataset([(RGB, none)], name="val_data"),
            source="val_data",
            category_names=[],
            min_mask_area=0,
        )


def test_items_that_raise_can_be_skipped() -> None:
    items = Items([(RGB, MASKS), OSError("disk"), (RGB + 1, MASKS)])
    subset = a_subset(items, on_bad_image="skip")
    assert [subset.image_id(i) for i in range(2)] == [0, 2]
    assert subset.index.bad_images == {"train_data[1]": "image-unreadable"}
    items[1] = GREY  # not what a bad disk gives, but a bad program
    with pytest.raises(DataError, match=r"train_data\[1\] is a ndarray"):
        a_subset(items, on_bad_image="skip")


def test_an_image_that_differs_at_the_next_reading_is_refused() -> None:
    items = [(RGB, MASKS), (RGB, MASKS)]
    subset = a_subset(items)
    items[1] = (RGB[:, ::-1].copy() + 1, MASKS)
    dataset = Coco2MaskDataset("", subset=subset, image_size=64)
    assert len(dataset[0].boxes) == 2
    with pytest.raises(DataError, match=r"train_data\[1\] gives another image than when it was"):
        dataset[1]


def test_what_the_caller_gave_is_not_written_to() -> None:
    image, masks = Discs(1)[0]
    before = image.copy()
    decoded = a_subset([(image, masks)]).open_image(0).decode()
    decoded[:] = 0
    assert np.array_equal(image, before)


def test_equal_images_of_both_splits_are_known_by_their_pixels(tmp_path: Path) -> None:
    train, val = a_subset(Discs(5)), a_subset([Discs(5)[3], Discs(2, seed=9)[1]])
    assert find_shared(train, val).tolist() == [3]
    write_as_coco([Discs(5)[3], Discs(2, seed=9)[1]], tmp_path, split="val")
    files = read_coco(tmp_path / "val" / "_annotations.coco.json", tmp_path / "val")
    assert find_shared(train, files).tolist() == [3]
    assert find_shared(files, train).tolist() == [0]


def test_an_index_can_be_sent_to_another_process_and_split() -> None:
    subset = pickle.loads(pickle.dumps(a_subset(Discs(6))))
    assert isinstance(subset.index, DatasetIndex)
    train, val = split_by_hash(subset, 0.3)
    assert train.num_images + val.num_images == 6
    dataset = Coco2MaskDataset("", subset=replace(val), image_size=64)
    assert [dataset[i].image_id for i in range(len(dataset))] == [
        val.image_id(i) for i in range(val.num_images)
    ]


def test_reading_stops_when_asked_to() -> None:
    with pytest.raises(RunStopped, match="stopped while train_data was read"):
        index_dataset(Discs(4), name="train_data", should_stop=lambda: True)


def index_on_rank(rank_items: list[list[Any]]) -> Any:
    """The index of the items of this rank, as plain values; or its error's message."""
    try:
        index = index_dataset(Items(rank_items[get_rank()]), name="train_data")
    except UserError as error:
        return str(error)
    return index.file_names(), index.boxes.tolist(), index.digests.tolist()


@pytest.mark.processes
def test_ranks_read_their_share_and_have_the_whole(gloo2: GlooPool) -> None:
    items = [Discs(5)[i] for i in range(5)]
    one = index_on_rank([items])
    assert gloo2.run(index_on_rank, [items, items]) == [one, one]
    # Rank 1 reads items 1 and 3: what it sees is raised on both ranks.
    broken = [items[0], items[1], items[2], OSError("disk"), items[4]]
    messages = gloo2.run(index_on_rank, [items, broken])
    assert all(text.startswith("train_data[3] raises OSError: disk (") for text in messages)
    messages = gloo2.run(index_on_rank, [items, items[:4]])
    assert all("train_data has other lengths in other processes" in text for text in messages)
