"""Images and masks of a caller's own dataset, read once and checked as those of a COCO file.

The masks are kept in memory as run lengths, in the index that COCO files have: so all that holds
for a COCO file holds for them. Pixels are not kept: an image is read from the dataset again
whenever it is needed, and has to be the same each time.
"""

import contextlib
import hashlib
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from torch.utils.data import DataLoader, IterableDataset

from samft import distributed
from samft.annotations.boxes import Evidence
from samft.annotations.crowds import mark_crowds
from samft.annotations.entries import read_objects
from samft.annotations.frame import OutlineFrame
from samft.annotations.image_entries import Categories, Images
from samft.annotations.json_reader import Raw
from samft.annotations.problems import Problems
from samft.coco.index import CheckedFile, CocoIndex
from samft.data.loaders import END, init_worker, iterate_loader, next_item
from samft.errors import DataError, RunStopped
from samft.images.decoder import EncodedImage
from samft.images.files import ImageError
from samft.images.orientation import UPRIGHT
from samft.images.pixels import PLAIN, PixelFormat, pixel_content
from samft.runtime import heartbeat
from samft.runtime.device import usable_cores
from samft.runtime.logs import progress_bar
from samft.runtime.signals import StopInterrupt, interruptible

_FIELDS = ("masks", "boxes", "labels", "iscrowd")  # of a target that are used
_NO_LABEL = 1
DIGEST_BYTES = 32


class MapStyleDataset(Protocol):
    """A dataset of pairs: an image, uint8 [H, W, 3] RGB, and its masks, bool [K, H, W].

    Instead of the masks alone, the target may be a mapping as of torchvision's detection datasets:
    `masks`, and if wanted `boxes` (x0 y0 x1 y1, px; else around the masks), `labels` (whole
    numbers) and `iscrowd`, one for each mask. NumPy arrays, tensors on the CPU and Pillow's images
    are taken alike. An item is the same whenever it is read: samft augments by itself.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class DatasetIndex(CocoIndex):
    """The index of a caller's dataset; its images are named as in Python: `train_data[3]`.

    Attributes:
        dataset: Gives the pixels.
        digests: uint8 [N, 32], SHA-256 of each image, see `pixel_content`; zeros for a bad one.
    """

    dataset: MapStyleDataset
    digests: NDArray[np.uint8]
    has_files = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_index, ({each.name: getattr(self, each.name) for each in fields(self)},)

    def open_image(self, row: int) -> EncodedImage:
        """Reads an image from the dataset.

        Raises:
            ImageError: The dataset raises, or gives another image than before.
        """
        name = self.file_name(row)
        image, _ = read_item(self.dataset, row, name=name)
        content = pixel_content(image)
        if hashlib.sha256(content).digest() != self.digests[row].tobytes():
            raise ImageError(
                f"{name} gives another image than when it was read first: a dataset has to give "
                "the same each time. Leave random augmentation to samft (`augment`, `box_jitter`)."
            )
        return EncodedImage(Path(name), content, image.shape[:2], values=image)

    def pixel_digest(self, row: int) -> bytes:
        """The SHA-256 of an image's pixels, which was taken when it was read first."""
        return self.digests[row].tobytes()

    def measure_pixels(self, pixels: PixelFormat, rows: NDArray[np.int64]) -> PixelFormat:
        """The format as it is: the pixels are 8-bit RGB, of which no range is measured."""
        return pixels


def _restore_index(values: dict[str, Any]) -> DatasetIndex:
    return DatasetIndex(**values)


def read_item(
    dataset: MapStyleDataset, i: int, *, name: str
) -> tuple[NDArray[np.uint8], dict[str, NDArray[Any]]]:
    """Reads an item of a dataset.

    Args:
        dataset: The dataset.
        i: Position of the item.
        name: Of the item, for errors.

    Returns:
        The image, uint8 [H, W, 3], a copy; and its arrays by name: `masks`, bool [K, H, W], and
        what else of `_FIELDS` there is, [K, ...] each.

    Raises:
        ImageError: The dataset raises an exception.
        DataError: It gives something else than an image and masks.
    """
    try:
        item = dataset[i]
    except Exception as error:
        # What a loader's worker raises arrives without its traceback.
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}"
        raise ImageError(f"{name} raises {type(error).__name__}: {error} ({where}).") from error
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise DataError(f"{name} is a {type(item).__name__}, not a pair of an image and masks.")
    target = item[1] if isinstance(item[1], Mapping) else {"masks": item[1]}
    if "masks" not in target:
        given = ", ".join(map(str, target)) or "nothing"
        raise DataError(f"{name} has no 'masks', bool [K, H, W], in its target, but {given}.")
    try:
        image = np.array(item[0])
        arrays = {field: np.asarray(target[field]) for field in _FIELDS if field in target}
    except Exception as error:  # a tensor on a GPU, say, or masks of different sizes
        raise DataError(f"{name} cannot be read as NumPy arrays: {error}") from error
    _check_image(image, name)
    return image, _check_target(arrays, image.shape[:2], name)


def _check_image(image: NDArray[Any], name: str) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        shape = " x ".join(map(str, image.shape))
        raise DataError(
            f"{name}: the image is {image.dtype} of {shape or 'no size'}; it has to be uint8 of "
            "height x width x 3, red, green and blue."
        )


def _check_target(
    arrays: dict[str, NDArray[Any]], size: tuple[int, int], name: str
) -> dict[str, NDArray[Any]]:
    masks = arrays["masks"]
    if not masks.size:
        masks = np.zeros((0, *size), dtype=bool)
    if masks.shape[1:] != size or masks.dtype.kind not in "bui":
        shape = " x ".join(map(str, masks.shape))
        raise DataError(
            f"{name}: the masks are {masks.dtype} of {shape}; they have to be bool of K x "
            f"{size[0]} x {size[1]}, one for each object, as large as the image."
        )
    one = (len(masks),)
    shapes: dict[str, tuple[int, ...]] = {"boxes": (*one, 4), "labels": one, "iscrowd": one}
    for field, wanted in shapes.items():
        values = arrays.get(field)
        if values is not None and values.size == 0 == len(masks):
            arrays[field] = values = values.reshape(wanted)
        kinds = "uif" if field == "boxes" else "bui"
        if values is not None and (
            values.shape != wanted or (values.dtype.kind not in kinds and values.size)
        ):
            numbers = "numbers" if field == "boxes" else "whole numbers"
            raise DataError(
                f"{name}: '{field}' is {values.dtype} of {values.shape}; with {len(masks)} masks "
                f"it has to be {numbers} of {wanted}."
            )
    return {**arrays, "masks": masks != 0}


class _ReadItem(NamedTuple):
    # What is kept of an item: the image's size and digest, and its objects as a COCO file has them.
    size: tuple[int, int]
    digest: bytes
    objects: list[dict[str, Any]]


class _ItemReader:
    # Reads items for a DataLoader, whose workers pass on what is returned, not what is raised.
    def __init__(self, dataset: MapStyleDataset, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __getitem__(self, i: int) -> tuple[int, "_ReadItem | DataError"]:
        try:
            image, arrays = read_item(self.dataset, i, name=f"{self.name}[{i}]")
        except DataError as error:
            return i, error
        digest = hashlib.sha256(pixel_content(image)).digest()
        return i, _ReadItem(image.shape[:2], digest, list(_encode_objects(arrays)))


def _encode_objects(arrays: dict[str, NDArray[Any]]) -> Iterator[dict[str, Any]]:
    masks = arrays["masks"]
    boxes, labels, crowds = (arrays.get(field) for field in _FIELDS[1:])
    for k, mask in enumerate(masks):  # one at a time: a second copy of all could be large
        rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
        bbox = mask_utils.toBbox(rle).tolist()
        if boxes is not None:
            x0, y0, x1, y1 = boxes[k].astype(float).tolist()
            bbox = [x0, y0, x1 - x0, y1 - y0]
        yield {
            "category_id": _NO_LABEL if labels is None else int(labels[k]),
            "iscrowd": 0 if crowds is None else int(crowds[k] != 0),
            "bbox": bbox,
            "area": int(mask_utils.area(rle)),
            "segmentation": {**rle, "counts": rle["counts"].decode()},
        }


def index_datasets(
    datasets: Mapping[str, MapStyleDataset], **options: Any
) -> dict[str, DatasetIndex]:
    """`index_dataset` of datasets by split, `train_data` for `train`. Collective."""
    return {
        split: index_dataset(dataset, name=f"{split}_data", **options)
        for split, dataset in datasets.items()
    }


def index_dataset(
    dataset: MapStyleDataset,
    *,
    name: str,
    num_workers: int = 0,
    on_bad_image: str = "error",
    crowds: str = "auto",
    timeout: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> DatasetIndex:
    """Reads and checks all items of a dataset, each rank its share. Collective: every rank calls.

    Args:
        dataset: See `MapStyleDataset`; the same on all ranks.
        name: What errors call it, such as `train_data`.
        num_workers: Processes that read, no more than there are cores; 0 reads in this one.
        on_bad_image: `error` raises for an item that the dataset raises for, `skip` leaves it out.
        crowds: See `crowds.mark_crowds`, of objects whose target has `iscrowd` 1.
        timeout: Seconds that a process may take to read an item; None: no limit.
        should_stop: Asked several times a second; all ranks stop if it is true on any.

    Raises:
        DataError: The dataset cannot be used.
        RunStopped: `should_stop` said so, on any rank.

    Example:
        >>> image, masks = np.zeros((4, 6, 3), dtype=np.uint8), np.ones((1, 4, 6), dtype=bool)
        >>> index = index_dataset([(image, masks)], name="train_data")
        >>> index.file_names(), index.boxes.tolist()
        (['train_data[0]'], [[0.0, 0.0, 6.0, 4.0]])
    """
    length = distributed.run_on_all_ranks(lambda: _length_of(dataset, name))
    if len(set(distributed.all_gather(length))) > 1:
        raise DataError(f"{name} has other lengths in other processes: it must be the same in all.")
    workers = min(num_workers, usable_cores())
    share = _read_share(dataset, name, length, workers, timeout, should_stop)
    errors = (one for one in share.values() if isinstance(one, DataError))
    skipped = ImageError if on_bad_image == "skip" else ()
    error = next((one for one in errors if not isinstance(one, skipped)), None)
    distributed.raise_on_all_ranks(error)
    if distributed.any_rank(should_stop()):
        raise RunStopped(f"stopped while {name} was read, before the first step.")
    items = {i: item for each in distributed.all_gather(share) for i, item in each.items()}
    return _build_index(dataset, name, [items[i] for i in range(length)], crowds)


def _length_of(dataset: MapStyleDataset, name: str) -> int:
    has_items = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    try:
        length = len(dataset) if has_items else None
    except (TypeError, NotImplementedError):
        length = None
    if length is None:
        raise DataError(
            f"{name} is a {type(dataset).__name__}, which is no map-style dataset: it needs "
            "__len__ and __getitem__."
        )
    if not length:
        raise DataError(f"{name} has no items.")
    return length


def _read_share(
    dataset: MapStyleDataset,
    name: str,
    length: int,
    num_workers: int,
    timeout: float | None,
    should_stop: Callable[[], bool],
) -> dict[int, "_ReadItem | DataError"]:
    # This rank's items, by position; not all of them if asked to stop.
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    positions = range(rank, length, world_size)
    loader: DataLoader[Any] = DataLoader(
        _ItemReader(dataset, name),  # type: ignore[arg-type]  # all that torch needs of it
        sampler=positions,
        batch_size=None,
        collate_fn=_identity,
        num_workers=num_workers if len(positions) else 0,
        timeout=timeout if timeout and num_workers and len(positions) else 0,
        worker_init_fn=init_worker,
        generator=torch.Generator().manual_seed(0),  # or it draws from the caller's generator
    )
    heartbeat.set_activity(f"reading {name}")
    share: dict[int, _ReadItem | DataError] = {}
    items = iterate_loader(loader)
    bar = progress_bar(
        total=len(positions), unit="image", desc=f"reading {name}", hidden=rank > 0, delay=2
    )
    with bar, contextlib.suppress(StopInterrupt), interruptible(should_stop):
        while (item := next_item(items)) is not END:
            share[item[0]] = item[1]
            bar.update()
    return share


def _identity(item: Any) -> Any:
    return item


def _build_index(
    dataset: MapStyleDataset, name: str, items: list["_ReadItem | DataError"], crowds: str
) -> DatasetIndex:
    # Of the items of all ranks; errors among them are images left out.
    read = [
        _ReadItem((0, 0), bytes(DIGEST_BYTES), []) if isinstance(one, DataError) else one
        for one in items
    ]
    images = _list_images(name, [item.size for item in read])
    numbers = itertools.count(1)
    entries: list[Raw] = [
        msgspec.Raw(msgspec.json.encode({"id": next(numbers), "image_id": i, **entry}))
        for i, item in enumerate(read)
        for entry in item.objects
    ]
    problems, categories, frame = Problems(), Categories({}), OutlineFrame()
    objects = read_objects(
        entries,
        images,
        categories=categories,
        problems=problems,
        frame=frame,
        evidence=Evidence(),
    )
    mark_crowds(objects, images.sizes, mode=crowds, problems=problems)
    for i, one in enumerate(items):
        if isinstance(one, DataError):
            images.codes[i] = "image-unreadable"
            problems.add("image-unreadable", str(one))
    checked = CheckedFile(images, objects, categories, frame, problems)
    arrays = checked.arrays()
    return DatasetIndex(
        folder=Path(),
        image_folder=Path(),
        segmentations=objects.segmentations,
        category_names=categories.names,
        category_keys=categories.keys,
        image_keys={},
        frame={},
        bad_images=checked.bad_images,
        problems=problems,
        pixels=PLAIN,
        dataset=dataset,
        digests=np.frombuffer(b"".join(item.digest for item in read), np.uint8).reshape(
            -1, DIGEST_BYTES
        ),
        **arrays,
    )


def _list_images(name: str, sizes: list[tuple[int, int]]) -> Images:
    number = len(sizes)
    both = np.array(sizes, dtype=np.int32).reshape(-1, 2)
    upright = np.full(number, UPRIGHT, dtype=np.uint8)
    return Images(
        names=[f"{name}[{i}]" for i in range(number)],
        ids=np.arange(number, dtype=np.int64),
        sizes=both,
        sizes_json=both,
        exif=upright,
        orientations=upright,
        num_bytes=both.astype(np.int64).prod(axis=1) * 3,
        pixel_types=np.zeros(number, dtype=np.uint8),
        codes=[""] * number,
        hints={},
        row_of={i: i for i in range(number)},
        keys={},
    )
