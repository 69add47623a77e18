"""The images and objects of a checked COCO file that a run uses, and how they are split.

Imports no torch.
"""

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samft.annotations.entries import CROWD
from samft.annotations.problems import BAD_IMAGES, KINDS, NO_MASKS, Issue, Problems
from samft.coco.index import CocoIndex, index_file
from samft.commands import shell_command
from samft.errors import DataError
from samft.images.decoder import EncodedImage
from samft.images.files import ImageError
from samft.images.names import encode_name, group_of
from samft.images.pixels import PLAIN, PixelFormat
from samft.runtime.files import open_file
from samft.views.pictures import WindowOfFile, WindowOfImage
from samft.views.windows import View, view_objects

Picture = EncodedImage | WindowOfFile | WindowOfImage


@dataclass(frozen=True)
class CocoSubset:
    """A selection of n images of a `CocoIndex`, each with some of its objects: k in all.

    Images may be seen through windows, see `see_through_windows`. Then each of the n is a window,
    and an image or an object may occur several times.

    Attributes:
        index: The checked file.
        rows: int64 [n], the images, as rows of `index`.
        first_object: int64 [n + 1]; image i has `objects[first_object[i] : first_object[i + 1]]`.
        objects: int64 [k], as indices into the object arrays of `index`.
        counts: Images and objects left out, by code of `problems.KINDS`.
        windows: int64 [n, 4], what is seen of each image, x0 y0 x1 y1, px; None: all of it.
    """

    index: CocoIndex
    rows: NDArray[np.int64]
    first_object: NDArray[np.int64]
    objects: NDArray[np.int64]
    counts: dict[str, int]
    windows: NDArray[np.int64] | None = None

    @property
    def num_images(self) -> int:
        """n, images or windows of them; each has at least one object."""
        return len(self.rows)

    @property
    def num_objects(self) -> int:
        """k, the selected objects of all images."""
        return len(self.objects)

    def file_name(self, i: int) -> str:
        """File name of image i, relative to the image folder."""
        return self.index.file_name(int(self.rows[i]))

    def path(self, i: int) -> Path:
        """Path of the file of image i."""
        return self.index.image_folder / self.file_name(i)

    def open_image(self, i: int) -> Picture:
        """The file of image i, to be decoded in the frame of its outlines.

        Raises:
            ImageError: It cannot be used; of a file that is seen through a window, when it is read.
        """
        row = int(self.rows[i])
        if self.windows is None:
            return self.index.open_image(row)
        if not self.index.has_files:
            return WindowOfImage(self.index.open_image(row), self.windows[i])
        height, width = self.index.sizes[row].tolist()
        return WindowOfFile(
            self.path(i),
            self.windows[i],
            whole_size=(height, width),
            orientation=int(self.index.orientations[row]),
            pixels=self.index.pixels,
        )

    def image_id(self, i: int) -> int:
        """Id of image i in the COCO file."""
        return int(self.index.image_ids[self.rows[i]])

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image i, px: those of its file, turned, or of the window of it."""
        height, width = self.sizes[i].tolist()
        return height, width

    @property
    def sizes(self) -> NDArray[np.integer]:
        """[n, 2], `size` of all."""
        if self.windows is None:
            return self.index.sizes[self.rows]
        return (self.windows[:, 2:] - self.windows[:, :2])[:, ::-1]

    def corner(self, i: int) -> tuple[int, int]:
        """y, x of the window of image i in it, px; 0, 0 if all of it is seen."""
        x0, y0 = (0, 0) if self.windows is None else self.windows[i, :2].tolist()
        return y0, x0

    def free_corners(self, i: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where window i may begin, from y, x to y, x, so that it holds all boxes it holds now."""
        assert self.windows is not None
        low, high = self.windows[i, :2], self.windows[i, 2:]
        boxes = self.index.boxes[self.objects_of(i)]
        boxes = boxes[(boxes[:, :2] >= low).all(axis=1) & (boxes[:, 2:] <= high).all(axis=1)]
        if not len(boxes):
            return low[::-1], low[::-1]
        sides, limit = high - low, self.index.sizes[self.rows[i]][::-1]
        first = np.maximum(np.ceil(boxes[:, 2:].max(axis=0)).astype(np.int64) - sides, 0)
        last = np.minimum(np.floor(boxes[:, :2].min(axis=0)).astype(np.int64), limit - sides)
        return first[::-1], last[::-1]

    def objects_of(self, i: int) -> NDArray[np.int64]:
        """The objects of image i, as indices into the object arrays of `index`."""
        return self.objects[self.first_object[i] : self.first_object[i + 1]]

    def row_of(self, k: int) -> int:
        """The first i whose objects include object k of `index`."""
        place = int(np.flatnonzero(self.objects == k)[0])
        return int(np.searchsorted(self.first_object, place, side="right")) - 1

    def visible_boxes(self, i: int) -> NDArray[np.float64]:
        """The boxes of the objects of image i, [k, 4], px of the image, cut by its window."""
        boxes = self.index.boxes[self.objects_of(i)]
        if self.windows is None:
            return boxes
        return np.clip(boxes, np.tile(self.windows[i, :2], 2), np.tile(self.windows[i, 2:], 2))

    def measure_pixels(self, pixels: PixelFormat) -> PixelFormat:
        """A pixel format with the ranges that it lacks, measured on these images."""
        return self.index.measure_pixels(pixels, self.rows)

    def with_pixels(self, pixels: PixelFormat) -> "CocoSubset":
        """The same images, whose values become 8 bits in another way."""
        return replace(self, index=replace(self.index, pixels=pixels))

    def select(self, images: Iterable[int]) -> "CocoSubset":
        """The subset of the given images, in that order, with empty `counts`."""
        chosen = np.fromiter(images, dtype=np.int64)
        lengths = np.diff(self.first_object)[chosen]
        first = np.cumsum([0, *lengths])
        within = np.arange(first[-1]) - np.repeat(first[:-1], lengths)
        objects = self.objects[np.repeat(self.first_object[chosen], lengths) + within]
        windows = None if self.windows is None else self.windows[chosen]
        return CocoSubset(self.index, self.rows[chosen], first, objects, {}, windows)


def see_through_windows(subset: CocoSubset, view: View, *, training: bool = False) -> CocoSubset:
    """The windows of the images of a subset that hold objects; for `image`, the subset as it is.

    Args:
        subset: Whole images.
        view: How they are seen.
        training: See `view_objects`; otherwise each object is in exactly one window.

    Raises:
        DataError: No window holds enough of any object.
    """
    if not view.has_windows:
        return subset
    seen, objects = [], []
    for i in range(subset.num_images):
        own = subset.objects_of(i)
        seen.append(view_objects(subset.index.boxes[own], subset.size(i), view, training=training))
        objects.append(own[seen[-1].objects])
    if not sum(map(len, objects)):
        raise DataError(
            f"tile_size: no window of {view.tile_size} px holds half of any object: take larger "
            "windows, or view objects, whose windows grow with the objects."
        )
    counts = np.concatenate([each.counts for each in seen])
    num_unseen = subset.num_objects - len(np.unique(np.concatenate(objects)))
    return replace(
        subset,
        counts=subset.counts | ({"object-in-no-window": num_unseen} if num_unseen else {}),
        rows=np.repeat(subset.rows, [len(each.windows) for each in seen]),
        first_object=np.cumsum([0, *counts]),
        objects=np.concatenate(objects),
        windows=np.concatenate([each.windows for each in seen]),
    )


def read_coco(
    annotations: Path,
    image_folder: Path,
    *,
    root: Path | None = None,
    allow_links: Sequence[Path] = (),
    cache: Path | None = None,
    pixels: PixelFormat = PLAIN,
    crowds: str = "auto",
    on_bad_image: str = "error",
    category_names: Iterable[str] = (),
    min_mask_area: float = 0,
) -> CocoSubset:
    """Reads and checks a COCO file; what is left out is counted in `CocoSubset.counts`.

    Args:
        annotations: The JSON file.
        image_folder: What its file names are relative to.
        root: See `index_file`.
        allow_links: See `index_file`.
        cache: See `index_file`.
        pixels: See `index_file`.
        crowds: See `crowds.mark_crowds`.
        on_bad_image: `error` refuses images that are missing or broken, `skip` leaves them out.
        category_names: Only objects of these classes are used; all if empty. Names may have been
            split at their commas.
        min_mask_area: Only masks of at least so many pixels are used.

    Raises:
        DataError: The file cannot be read or holds no usable object, images are missing or broken,
            or ids contradict each other.
    """
    index = index_file(
        annotations,
        image_folder,
        root=root,
        allow_links=allow_links,
        cache=cache,
        pixels=pixels,
        crowds=crowds,
    )
    raise_for_errors(index.problems, annotations, on_bad_image=on_bad_image)
    return choose_objects(
        index,
        source=str(annotations),
        category_names=category_names,
        min_mask_area=min_mask_area,
    )


def choose_objects(
    index: CocoIndex, *, source: str, category_names: Iterable[str], min_mask_area: float
) -> CocoSubset:
    """The objects of chosen classes and sizes, and the images that have any.

    Args:
        index: The checked data.
        source: Its name, for errors.
        category_names: See `read_coco`.
        min_mask_area: See `read_coco`.

    Raises:
        DataError: None is left, or there is no class of such a name.
    """
    subset = select_objects(
        index, categories=find_categories(index, category_names), min_mask_area=min_mask_area
    )
    if not subset.num_objects:
        raise DataError(
            f"{source}: no object is left with category_names "
            f"{', '.join(category_names) or 'empty'} and min_mask_area {min_mask_area}: choose "
            "others."
        )
    return subset


def raise_for_errors(problems: Problems, annotations: Path, *, on_bad_image: str = "error") -> None:
    """Refuses a file whose problems make training on it impossible.

    Raises:
        DataError: There is an error; missing and broken images are none with `skip`.
    """
    errors = problems.errors(on_bad_image=on_bad_image)
    if len(errors) > 1:
        # Where images are missing, too, they are the reason why no object is left.
        errors = {code: issue for code, issue in errors.items() if code not in NO_MASKS}
    if errors:
        raise DataError("\n".join(_describe_errors(errors, problems, annotations)))


def _describe_errors(errors: dict[str, Issue], problems: Problems, annotations: Path) -> list[str]:
    lines = [f"{annotations} cannot be used:"]
    for code, issue in errors.items():
        lines.append(f"  - {code}, {issue.count}: {KINDS[code][1]} ({issue.shown(3)})")
    if errors.keys() & NO_MASKS:
        counts = ", ".join(f"{code} {number}" for code, number in problems.left_out().items())
        lines.append(f"  - left out: {counts or 'nothing; it has no annotations'}")
    if errors.keys() & BAD_IMAGES:
        lines.append("`--on_bad_image skip` leaves such images out.")
    if problems.has_links_outside:
        lines.append("`--allow_links DIR` opens those behind links into a folder that you trust.")
    check = shell_command("check")
    lines.append(f"`{check}` lists everything, and repairs what it can with `--fix`.")
    return lines


def select_objects(
    index: CocoIndex, *, categories: set[int] | None = None, min_mask_area: float = 0
) -> CocoSubset:
    """The objects of a file that are no crowds, and the images that have any of them.

    Args:
        index: The checked file.
        categories: Ids of the classes to keep; None: all.
        min_mask_area: Area from which on masks are kept, px.
    """
    plain = (index.flags & CROWD) == 0
    chosen = plain & (index.areas >= min_mask_area)
    if categories is not None:
        chosen &= np.isin(index.categories, list(categories))
    objects = np.flatnonzero(chosen)
    image_of = np.repeat(np.arange(index.num_images), np.diff(index.first_object))
    per_image = np.bincount(image_of[objects], minlength=index.num_images)
    rows = np.flatnonzero(per_image)
    counts = index.problems.left_out()
    counts["image-without-objects"] = int((~index.bad).sum()) - len(rows)
    counts["objects-not-chosen"] = int(plain.sum()) - len(objects)
    counts = {code: number for code, number in counts.items() if number}
    return CocoSubset(index, rows, np.cumsum([0, *per_image[rows]]), objects, counts)


def find_categories(index: CocoIndex, names: Iterable[str]) -> set[int] | None:
    """The category ids of class names; None if no name is given.

    Raises:
        DataError: There is no class of that name.
    """
    known = {name.strip() for name in index.category_names.values()}
    names = _join_names(names, known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            some = ", ".join(sorted(known)[:20])
            raise DataError(f"category_names: there is no class {name!r} among {some}.{hint}")
    chosen = {key for key, name in index.category_names.items() if name.strip() in names}
    return chosen if names else None


def _join_names(parts: Iterable[str], known: set[str]) -> list[str]:
    # Text that was split at commas, put together where the name of a class has a comma.
    names, parts = [], list(parts)
    while parts:
        joined = [",".join(parts[:number]).strip() for number in range(len(parts), 0, -1)]
        number, name = next(
            ((len(parts) - k, one) for k, one in enumerate(joined) if one in known),
            (1, joined[-1]),
        )
        names += [name] if name else []
        del parts[:number]
    return names


def find_shared(train: CocoSubset, val: CocoSubset) -> NDArray[np.int64]:
    """Training images that are also in the validation split, whatever their names.

    Two files are the same image where their whole contents are equal. Those of equal sizes, in
    pixels and bytes, are compared by their first 64 KiB first. Where not all images are files, they
    are the same where their pixels are equal.

    Args:
        train: The training images.
        val: The validation images.

    Returns:
        int64, the positions of those images in `train`; a file that cannot be read is not shared.
    """
    if not (train.index.has_files and val.index.has_files):
        return _find_equal_pixels(train, val)
    keys = [_size_keys(subset) for subset in (train, val)]
    suspects = [np.flatnonzero(np.isin(mine, other)) for mine, other in (keys, keys[::-1])]
    paths = [
        {i: subset.path(i) for i in some.tolist()}
        for subset, some in zip((train, val), suspects, strict=True)
    ]
    for num_bytes in (1 << 16, -1):
        digests = [{i: _digest(path, num_bytes) for i, path in some.items()} for some in paths]
        common = set(digests[0].values()) & set(digests[1].values()) - {None}
        paths = [
            {i: path for i, path in some.items() if own[i] in common}
            for some, own in zip(paths, digests, strict=True)
        ]
    return np.array(list(paths[0]), dtype=np.int64)


def _find_equal_pixels(train: CocoSubset, val: CocoSubset) -> NDArray[np.int64]:
    sizes = [[subset.size(i) for i in range(subset.num_images)] for subset in (train, val)]
    common = set(sizes[0]) & set(sizes[1])
    digests: list[dict[int, bytes | None]] = [
        {i: _pixel_digest(subset, i) for i, size in enumerate(own) if size in common}
        for subset, own in zip((train, val), sizes, strict=True)
    ]
    of_val = set(digests[1].values()) - {None}
    return np.array([i for i, digest in digests[0].items() if digest in of_val], dtype=np.int64)


def _pixel_digest(subset: CocoSubset, i: int) -> bytes | None:
    try:
        return subset.index.pixel_digest(int(subset.rows[i]))
    except ImageError:  # whoever loads the image reports it
        return None


def _size_keys(subset: CocoSubset) -> NDArray[np.int64]:
    # One number for height, width and bytes, to compare images before any file is read.
    height, width = subset.index.sizes[subset.rows].astype(np.int64).T
    return np.asarray(
        (height * 1_000_003 + width) * 1_000_003 + subset.index.num_bytes[subset.rows]
    )


def _digest(path: Path, num_bytes: int) -> bytes | None:
    # Of the first bytes of a file, or with -1 of all; None for one that cannot be read.
    try:
        with open_file(path) as file:
            return hashlib.sha256(file.read(num_bytes)).digest()
    except OSError:  # whoever loads the image reports it
        return None


def find_siblings(train: CocoSubset, val: CocoSubset, *, group_by: str) -> NDArray[np.int64]:
    """Training images that are of one group with a validation image; see `names.group_of`.

    Args:
        train: The training images.
        val: The validation images.
        group_by: See `names.group_of`.

    Returns:
        int64, the positions of those images in `train`.
    """
    groups = [
        [group_of(subset.file_name(i), group_by) for i in range(subset.num_images)]
        for subset in (train, val)
    ]
    common = set(groups[0]) & set(groups[1]) - {None}
    return np.array([i for i, group in enumerate(groups[0]) if group in common], dtype=np.int64)


def split_by_hash(
    subset: CocoSubset, val_fraction: float, *, group_by: str = "none"
) -> tuple[CocoSubset, CocoSubset]:
    """Holds out a share of the images for validation: those whose file names hash lowest.

    The choice depends on the file names only, not on their order or on a seed. The images of a
    group stay together, where its name hashes to; an image without one is a group of its own.

    Args:
        subset: All images.
        val_fraction: Share to hold out, as nearly as groups allow; at least one goes to each side.
        group_by: Which images make up a group, see `names.group_of`.

    Returns:
        The training subset, which keeps `counts`, and the validation subset.

    Raises:
        DataError: If there are fewer than two groups to share out.
    """
    groups: dict[str, set[str]] = {}  # a group's name -> file names
    for i in range(subset.num_images):
        name = subset.file_name(i)
        group = group_of(name, group_by)
        groups.setdefault(name if group is None else group, set()).add(name)
    folder = subset.index.image_folder
    if len(groups) < 2:
        alone = f"{folder} has one image with objects, and holding out a share for validation takes"
        if subset.num_images > 1:
            alone = (
                f"all images with objects in {folder} are of one group by group_by {group_by}, as "
                "copies of a picture are, and holding out whole groups for validation takes"
            )
        raise DataError(f"{alone} at least two: give images to validate on.")
    ordered = sorted(groups, key=lambda name: hashlib.sha256(encode_name(name)).digest())
    sizes = np.cumsum([len(groups[name]) for name in ordered])
    wanted = min(max(round(val_fraction * sizes[-1]), 1), sizes[-1] - 1)
    num_groups = int(np.abs(sizes[:-1] - wanted).argmin()) + 1
    held_out = set().union(*(groups[name] for name in ordered[:num_groups]))
    rows = range(subset.num_images)
    train = subset.select([i for i in rows if subset.file_name(i) not in held_out])
    val = subset.select([i for i in rows if subset.file_name(i) in held_out])
    return replace(train, counts=subset.counts), val
