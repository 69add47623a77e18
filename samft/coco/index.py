"""The checked content of a COCO file as memory-mapped arrays, built once and kept on disk.

A folder in the cache holds one index: a `.npy` file for each array and `index.json` for the rest.
Its name is a hash of the JSON's content and the paths of the images. It is written beside its place
and renamed, under a lock, so that processes of a node never see a part of it and build it once.
Whoever opens it verifies the checksums of all files first: one that is damaged is built again.
Imports no torch.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.annotations.crowds import mark_crowds
from samft.annotations.entries import (
    CROWD,
    Objects,
    read_objects,
)
from samft.annotations.frame import OutlineFrame, read_in_frame
from samft.annotations.image_entries import (
    Categories,
    Images,
    check_category_ids,
    read_categories,
    read_images,
)
from samft.annotations.json_reader import file_digest, find_kind, load_document
from samft.annotations.problems import Problems
from samft.annotations.segmentation import Segmentations
from samft.errors import TOO_MANY_FILES, DataError
from samft.images.decoder import EncodedImage, open_image
from samft.images.folder import ImageFolder
from samft.images.pixels import PIXEL_TYPES, PLAIN, PixelFormat, pixel_content
from samft.images.ranges import measure_ranges
from samft.runtime.checksums import is_intact, write_checksums
from samft.runtime.files import cache_folder, file_lock, private_temporary_folder, write_json
from samft.runtime.logs import LOGGER

FORMAT = 7  # of the files of an index; part of its name
_META = "index.json"
_UNUSED_DAYS = 30  # an index that was not opened for so long is deleted
_ESCAPE = "surrogatepass"  # keeps names that are not UTF-8, or that no file can have
_BUFFER, _STARTS = "segmentations", "segmentation_starts"  # the arrays of `Segmentations`


@dataclass(frozen=True)
class CocoIndex:
    """The checked content of a COCO file: N images, K objects grouped by image, with crowds.

    All arrays are files mapped into memory, so that processes share them; a pickle of an index
    holds paths, no data.

    Attributes:
        folder: Where the arrays are.
        image_folder: What file names are relative to.
        names: uint8, the file names one after the other, see `file_name`.
        name_ends: int64 [N], the end of each in `names`.
        image_ids: int64 [N].
        sizes: int32 [N, 2], H, W of the files, px, turned by `orientations`.
        orientations: uint8 [N], how each image is turned when decoded, as EXIF numbers it; 1: not.
        box_scales: float64 [N, 4], for boxes of the JSON: factors for x and y, and what is then
            added to x and y, px.
        num_bytes: int64 [N], sizes of the files.
        pixel_types: uint8 [N], positions in `pixels.PIXEL_TYPES`.
        bad: bool [N], whether the file cannot be used.
        first_object: int64 [N + 1]; image i has objects `first_object[i]` to
            `first_object[i + 1] - 1`.
        positions: int64 [K], positions in the list 'annotations'.
        object_ids: int64 [K], unique.
        categories: int64 [K], category ids, or `entries.NO_CATEGORY`.
        flags: uint8 [K], bits: `entries.CROWD`.
        boxes: float64 [K, 4], x0 y0 x1 y1, px, original frame.
        areas: float64 [K], of the masks, px.
        segmentations: [K].
        category_names: By category id, of all that are listed or used; `category 99` or `unknown`
            where the file has no name.
        category_keys: From names, and from ids that are text, to category ids.
        image_keys: From image ids that are text to those in `image_ids`.
        frame: How outlines became outlines on the pixels, see `OutlineFrame.to_json`; empty if they
            are as in the file.
        bad_images: Codes in `problems.KINDS` by file name, of bad images that have objects.
        problems: Everything that is wrong with the file.
        pixels: How the values of its images become 8 bits; not a part of what is on disk.
    """

    folder: Path
    image_folder: Path
    names: NDArray[np.uint8]
    name_ends: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    sizes: NDArray[np.int32]
    orientations: NDArray[np.uint8]
    box_scales: NDArray[np.float64]
    num_bytes: NDArray[np.int64]
    pixel_types: NDArray[np.uint8]
    bad: NDArray[np.bool_]
    first_object: NDArray[np.int64]
    positions: NDArray[np.int64]
    object_ids: NDArray[np.int64]
    categories: NDArray[np.int64]
    flags: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    segmentations: Segmentations
    category_names: dict[int, str]
    category_keys: dict[str, int]
    image_keys: dict[str, int]
    frame: dict[str, Any]
    bad_images: dict[str, str]
    problems: Problems
    pixels: PixelFormat
    has_files = True  # of no annotated type, which would make it a field

    def __reduce__(self) -> tuple[Any, ...]:
        return open_index, (self.folder, self.image_folder, self.pixels)

    @property
    def num_images(self) -> int:
        """N, all images: bad ones and those without objects included."""
        return len(self.image_ids)

    def file_name(self, row: int) -> str:
        """File name of an image, relative to the image folder."""
        start = int(self.name_ends[row - 1]) if row else 0
        return self.names[start : int(self.name_ends[row])].tobytes().decode(errors=_ESCAPE)

    def open_image(self, row: int) -> EncodedImage:
        """The file of an image, to be decoded in the frame of its outlines.

        Raises:
            ImageError: See `decoder.open_image`.
        """
        path = self.image_folder / self.file_name(row)
        return open_image(path, orientation=int(self.orientations[row]), pixels=self.pixels)

    def pixel_digest(self, row: int) -> bytes:
        """SHA-256 of an image's decoded pixels, see `pixel_content`; raises as `open_image`."""
        return hashlib.sha256(pixel_content(self.open_image(row).decode())).digest()

    def image_ids_as_written(self) -> list[int | str]:
        """The ids of all images as the file has them: text where that is no whole number."""
        texts = {number: text for text, number in self.image_keys.items()}
        return [texts.get(number, number) for number in self.image_ids.tolist()]

    def measure_pixels(self, pixels: PixelFormat, rows: NDArray[np.int64]) -> PixelFormat:
        """A pixel format with the ranges that it lacks, measured on the images of some rows."""
        return measure_ranges(
            pixels,
            [PIXEL_TYPES[one] for one in self.pixel_types[rows].tolist()],
            path=lambda k: self.image_folder / self.file_name(int(rows[k])),
        )

    def file_names(self) -> list[str]:
        """File names of all images."""
        return [self.file_name(row) for row in range(self.num_images)]


# Every other field is an array in a file `<name>.npy`.
_OTHER_FIELDS = {
    "folder",
    "image_folder",
    "segmentations",
    "category_names",
    "category_keys",
    "image_keys",
    "frame",
    "bad_images",
    "problems",
    "pixels",
}
_ARRAYS = (
    *(name for name in CocoIndex.__annotations__ if name not in _OTHER_FIELDS),
    *(_BUFFER, _STARTS),
)
_FILES = (_META, *(f"{name}.npy" for name in _ARRAYS))


def index_file(
    annotations: Path,
    image_folder: Path,
    *,
    root: Path | None = None,
    allow_links: Sequence[Path] = (),
    cache: Path | None = None,
    pixels: PixelFormat = PLAIN,
    decode: bool = False,
    crowds: str = "auto",
) -> CocoIndex:
    """Opens the index of a COCO file; the first time, the file is checked and the index built.

    It is built again when the JSON's content changes, when image files come or go, and when a
    broken one is replaced. The processes of a node build it once.

    Args:
        annotations: The JSON file.
        image_folder: What its file names are relative to.
        root: The dataset's folder; symbolic links of images may lead to anywhere below it.
        allow_links: Other folders that symbolic links of images may lead to.
        cache: Folder of all indexes; by default `index` in samft's cache folder.
        pixels: Says which bands and page of the image files are used.
        decode: Decode every image file; whoever opens the index later knows what came out.
        crowds: See `crowds.mark_crowds`.

    Raises:
        UnusableFile: The JSON cannot be read.
        DataError: The index cannot be written.
    """
    digest = file_digest(annotations)
    images = ImageFolder(image_folder, root=root, allow_links=allow_links)
    parts = [FORMAT, digest, image_folder.resolve(), root and root.resolve(), pixels.layout, crowds]
    parts += [*(folder.resolve() for folder in allow_links), *["in windows"] * pixels.in_windows]
    key = hashlib.sha256("\n".join(map(str, parts)).encode(errors=_ESCAPE)).hexdigest()[:32]
    try:
        cache = _make_cache_folder(cache)
        folder, lock = cache / key, cache / f"{key}.lock"
        with file_lock(lock, shared=True):
            index = _open_current(folder, images, decode=decode)
        if index is None:
            with file_lock(lock):
                # Listed anew: while this process waited, another one may have built it.
                images = ImageFolder(image_folder, root=root, allow_links=allow_links)
                index = _open_current(folder, images, decode=decode) or _build_index(
                    annotations,
                    folder,
                    images,
                    pixels=pixels.layout,
                    decode=decode,
                    crowds=crowds,
                )
        return replace(index, pixels=pixels)
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise
        raise DataError(
            f"the index of {annotations} cannot be written to {cache or error.filename} "
            f"({error.strerror}): set SAMFT_CACHE to a folder of your own with room."
        ) from error


def _build_index(
    annotations: Path,
    folder: Path,
    images: ImageFolder,
    *,
    pixels: PixelFormat,
    decode: bool,
    crowds: str,
) -> CocoIndex:
    started = time.monotonic()
    if os.path.lexists(folder) and not is_intact(folder, _FILES, identity=folder.name):
        LOGGER.warning("the index in %s is damaged: it is built again", folder)
    checked = check_file(annotations, images, pixels=pixels, decode=decode, crowds=crowds)
    _write_index(checked, folder, images, decode=decode)
    _delete_unused(folder.parent)
    seconds = time.monotonic() - started
    LOGGER.info("checked and indexed %s in %.1f s", annotations, seconds)
    return open_index(folder, images.folder)


def open_index(folder: Path, image_folder: Path, pixels: PixelFormat = PLAIN) -> CocoIndex:
    """Maps an index into memory that `index_file` has built or verified.

    Args:
        folder: Where the arrays are.
        image_folder: What file names are relative to.
        pixels: How the values of its images become 8 bits.
    """
    meta = json.loads((folder / _META).read_text())
    arrays = {name: _map_array(folder / f"{name}.npy") for name in _ARRAYS}
    segmentations = Segmentations(arrays.pop(_BUFFER), arrays.pop(_STARTS))
    return CocoIndex(
        folder=folder,
        image_folder=image_folder,
        segmentations=segmentations,
        category_names={int(key): name for key, name in meta["categories"].items()},
        category_keys=meta["category_keys"],
        image_keys=meta["image_keys"],
        frame=meta["frame"],
        bad_images=meta["bad_images"],
        problems=Problems.from_json(meta["problems"]),
        pixels=pixels,
        **arrays,
    )


def _map_array(path: Path) -> NDArray[Any]:
    # A plain array over the mapped file, since slices of np.memmap cost several times as much.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


@dataclass
class CheckedFile:
    """The checked content of a COCO file, before it is stored."""

    images: Images
    objects: Objects
    categories: Categories
    frame: OutlineFrame
    problems: Problems

    @property
    def bad_images(self) -> dict[str, str]:
        """As in `CocoIndex`."""
        named = zip(self.images.names, self.images.codes, strict=True)
        return {name: code for name, code in named if code not in ("", "image-unused-bad")}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of a `CocoIndex`, by name."""
        images, objects = self.images, self.objects
        names = [name.encode(errors=_ESCAPE) for name in images.names]
        per_image = np.bincount(objects.rows, minlength=len(names))
        return {
            "names": np.frombuffer(b"".join(names), dtype=np.uint8),
            "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
            "image_ids": images.ids,
            "sizes": images.sizes,
            "orientations": images.orientations,
            "box_scales": self.frame.box_scales(len(names)),
            "num_bytes": images.num_bytes,
            "pixel_types": images.pixel_types,
            "bad": np.array([code != "" for code in images.codes], dtype=bool),
            "first_object": np.cumsum([0, *per_image], dtype=np.int64),
            "object_ids": objects.ids,
            **{name: getattr(objects, name) for name in _OBJECT_ARRAYS},
        }


def check_file(
    annotations: Path,
    folder: ImageFolder,
    *,
    pixels: PixelFormat = PLAIN,
    decode: bool = False,
    crowds: str = "auto",
) -> CheckedFile:
    """Reads a COCO file and checks all of it.

    Args:
        annotations: The JSON file.
        folder: Where its images are.
        pixels: See `index_file`.
        decode: See `index_file`.
        crowds: See `crowds.mark_crowds`.

    Returns:
        Usable images and objects, and all problems.

    Raises:
        UnusableFile: It cannot be read, is not JSON, or is not a COCO instances file.
    """
    problems = Problems()
    document = load_document(annotations, problems)
    images = read_images(document.images, folder, problems=problems, pixels=pixels, decode=decode)
    categories = read_categories(document.categories, problems, annotations=document.annotations)
    read = partial(read_objects, document.annotations, images, categories=categories)
    objects, frame = read_in_frame(
        read, images, entries=document.annotations, folder=folder, problems=problems
    )
    mark_crowds(objects, images.sizes, mode=crowds, problems=problems)
    used = set(np.unique(objects.categories).tolist())
    check_category_ids(categories.listed, used, problems=problems)
    plain = objects.rows[objects.flags & CROWD == 0]
    filled = np.bincount(plain, minlength=len(images.names)) > 0
    empty = [
        name
        for name, code, full in zip(images.names, images.codes, filled, strict=True)
        if not (code or full)
    ]
    problems.add("image-without-objects", *empty)
    if not len(plain):
        kind = find_kind(document.annotations) if problems["mask-missing"] else ""
        problems.add(kind or "no-objects", annotations.name)
    return CheckedFile(images, objects, categories, frame, problems)


def _make_cache_folder(cache: Path | None) -> Path:
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        return cache
    folder = cache_folder() / "index"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        # In containers, the home folder often cannot be written.
        other = private_temporary_folder() / "index"
        LOGGER.warning("%s cannot be written (%s); indexes are kept in %s", folder, error, other)
        other.mkdir(exist_ok=True)
        return other


def _open_current(folder: Path, images: ImageFolder, *, decode: bool) -> CocoIndex | None:
    # None where there is none, or it is damaged, or files have come, gone or been replaced, or it
    # knows less than is asked for.
    if not is_intact(folder, _FILES, identity=folder.name):
        return None
    meta = json.loads((folder / _META).read_text())
    if decode and not meta["decoded"]:
        return None
    if images.has_changed(meta["listings"]) or any(
        _stamp_of(images.folder, name, meta["bad_images"].get(name, "")) != stamp
        for name, stamp in meta["stamps"].items()
    ):
        return None
    os.utime(folder / _META)  # when it was opened last, for `_delete_unused`
    return open_index(folder, images.folder)


def _stamp_of(folder: Path, name: str, code: str) -> list[int] | None:
    # Changes when a file is replaced, turned or resized. One outside of the data folder is never
    # touched.
    if code == "image-outside":
        return None
    try:
        status = (folder / name).lstat()
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _write_index(
    checked: CheckedFile, target: Path, image_folder: ImageFolder, *, decode: bool
) -> None:
    images, segmentations = checked.images, checked.objects.segmentations
    bad, arrays = checked.bad_images, checked.arrays()
    packed = {_BUFFER: segmentations.buffer, _STARTS: segmentations.starts}
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _make_part_folder(target.parent)
    try:
        for name, values in (arrays | packed).items():
            with (part / f"{name}.npy").open("wb") as file:
                np.save(file, values, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        meta = {
            "listings": image_folder.listing_digests(),
            "decoded": decode,
            "bad_images": bad,
            "stamps": {
                images.names[row]: _stamp_of(
                    image_folder.folder, images.names[row], bad.get(images.names[row], "")
                )
                for row in np.flatnonzero(images.is_odd() | arrays["bad"]).tolist()
                if not images.codes[row] or images.names[row] in bad
            },
            "categories": checked.categories.names,
            "category_keys": checked.categories.keys,
            "image_keys": images.keys,
            "frame": checked.frame.to_json(),
            "problems": checked.problems.to_json(),
        }
        write_json(part / _META, meta)
        write_checksums(part, _FILES, identity=target.name)
        _replace_folder(target, part)
    finally:
        shutil.rmtree(part, ignore_errors=True)


_OBJECT_ARRAYS = ("positions", "categories", "flags", "boxes", "areas")


def _make_part_folder(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=parent, prefix=".index.", suffix=".part"))


def _replace_folder(target: Path, part: Path) -> None:
    # Processes that have the old files mapped keep them.
    if os.path.lexists(target):  # also a link that leads nowhere
        old = _make_part_folder(target.parent)
        target.rename(old / "old")
        part.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        part.rename(target)


def _delete_unused(cache: Path) -> None:
    limit = time.time() - _UNUSED_DAYS * 86_400
    for folder in cache.iterdir():
        used = folder if folder.name.endswith(".part") else folder / _META
        with contextlib.suppress(OSError):  # no index, or another process has just deleted it
            if used.stat().st_mtime < limit:
                shutil.rmtree(folder, ignore_errors=True)
