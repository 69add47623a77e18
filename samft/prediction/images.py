"""The images to predict on, from the command line or from a COCO file. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samft.annotations.problems import KINDS, NO_MASKS, Problems
from samft.coco.index import CocoIndex, index_file
from samft.coco.subset import raise_for_errors
from samft.errors import DataError
from samft.images.files import ImageFacts, inspect_image, inspect_images
from samft.images.folder import ImageFolder
from samft.images.names import IMAGE_SUFFIXES
from samft.images.orientation import UPRIGHT
from samft.images.pixels import PLAIN, PixelFormat
from samft.images.ranges import measure_ranges

SUFFIXES = tuple(sorted(IMAGE_SUFFIXES))  # of files in a folder


@dataclass(frozen=True)
class ImageList:
    """N images.

    Attributes:
        names: Their file names in `images.json` and in error messages.
        paths: Their paths.
        ids: int64 [N].
        sizes: int32 [N, 2], H, W of the file, px, turned by `orientations`; undefined for
            unreadable images.
        orientations: uint8 [N], how images are turned when decoded, as EXIF numbers it; 1: not.
        bad: Row of each unreadable image -> the reason.
        pixels: How the values of the images become 8 bits.
        notes: What is said of the frame of outlines in the COCO file, or of images to be turned.
        text_ids: From those in `ids` to the file's own, where these are no whole numbers.
    """

    names: list[str]
    paths: list[Path]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int32]
    orientations: NDArray[np.uint8]
    bad: dict[int, str]
    pixels: PixelFormat = PLAIN
    notes: Sequence[str] = ()
    text_ids: dict[int, str] = field(default_factory=dict)

    def id_as_written(self, row: int) -> int | str:
        """The id of an image in the COCO file."""
        number = int(self.ids[row])
        return self.text_ids.get(number, number)


def list_images(
    paths: Sequence[Path], *, allow_links: Sequence[Path] = (), pixels: PixelFormat = PLAIN
) -> ImageList:
    """Lists image files, and inspects each.

    Args:
        paths: Image files, and folders; subfolders are not searched.
        allow_links: See `build_task`.
        pixels: See `build_task`.

    Returns:
        The images, each once, with ids from 1; in the order given, by name within a folder.

    Raises:
        DataError: A path does not exist, or a folder holds no image file.
    """
    name_of: dict[Path, str] = {}
    reasons: dict[Path, str] = {}
    for path in paths:
        for file, reason in _image_files(path, allow_links):
            # Names are relative to the folder if there is only one, so that they are unique.
            name_of.setdefault(file.absolute(), file.name if len(paths) == 1 else str(file))
            if reason:
                reasons[file.absolute()] = reason
    files, names = list(name_of), list(name_of.values())
    inspected = inspect_images([file for file in files if file not in reasons], pixels)
    facts = [ImageFacts() if file in reasons else next(inspected) for file in files]
    bad = {row: reasons[file] for row, file in enumerate(files) if file in reasons}
    bad |= {
        row: _describe(fact.problem, fact.detail) for row, fact in enumerate(facts) if fact.problem
    }
    good = [row for row in range(len(files)) if row not in bad]
    types = [facts[row].pixel_type for row in good]
    pixels = measure_ranges(pixels, types, path=lambda k: files[good[k]])
    sizes = np.array([(fact.height, fact.width) for fact in facts], dtype=np.int32)
    upright = np.full(len(files), UPRIGHT, dtype=np.uint8)
    ids = np.arange(1, len(files) + 1)
    turned = [names[row] for row in good if facts[row].orientation != UPRIGHT]
    notes = [_describe_turned(turned, len(good))] if turned else []
    return ImageList(names, files, ids, sizes, upright, bad, pixels, notes)


def _describe_turned(turned: list[str], num_images: int) -> str:
    return (
        f"{len(turned):,} of {num_images:,} images with an EXIF orientation ({turned[0]}): viewers "
        "apply it, and a prediction does not. The model sees the stored pixels, and boxes, points "
        "and masks are on these. For what a viewer shows, store the files upright "
        "(PIL.ImageOps.exif_transpose)."
    )


def _image_files(path: Path, allow_links: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    # Each file, and why it is not to be opened, if so.
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"--images: there is no file or folder {path}: check the path.")
        yield path, ""
        return
    folder = ImageFolder(path, allow_links=allow_links)
    places = folder.find_all(folder.image_names(SUFFIXES))
    if not places:
        raise DataError(
            f"--images: the folder {path} holds no image file ({', '.join(SUFFIXES)}; "
            "subfolders are not searched): check the path."
        )
    for name, (_, code) in places.items():
        yield path / name, _describe(code, folder.hints.get(name)) if code else ""


def _describe(code: str, hint: str | None) -> str:
    return f"{KINDS[code][1]} ({hint})" if hint else KINDS[code][1]


def read_coco_images(
    annotations: Path,
    folder: Path,
    *,
    allow_links: Sequence[Path] = (),
    pixels: PixelFormat = PLAIN,
) -> tuple[ImageList, CocoIndex]:
    """The images that a COCO file lists, with or without objects.

    Args:
        annotations: The COCO file.
        folder: What its file names are relative to.
        allow_links: See `build_task`.
        pixels: See `build_task`.

    Raises:
        DataError: The file cannot be read, lists no image, or gives one id to several images.
    """
    index = index_file(annotations, folder, allow_links=allow_links, pixels=pixels)
    problems = {
        code: issue for code, issue in index.problems.issues.items() if code not in NO_MASKS
    }
    raise_for_errors(Problems(problems), annotations, on_bad_image="skip")
    if not index.num_images:
        raise DataError(f"{annotations} lists no image: give a COCO file that does.")
    names = index.file_names()
    paths = [folder / name for name in names]
    bad = _reasons_unreadable(index, ImageFolder(folder, allow_links=allow_links))
    pixels = index.measure_pixels(pixels, np.flatnonzero(~index.bad))
    notes = index.problems.frame_lines()
    texts = {number: text for text, number in index.image_keys.items()}
    columns = names, paths, index.image_ids, index.sizes, index.orientations
    return ImageList(*columns, bad, pixels, notes, texts), index


def _reasons_unreadable(index: CocoIndex, folder: ImageFolder) -> dict[int, str]:
    names = {row: index.file_name(row) for row in np.flatnonzero(index.bad).tolist()}
    places = folder.find_all(names.values())
    reasons = {}
    for row, name in names.items():
        code = index.bad_images.get(name) or places[name][1]
        facts = ImageFacts()
        if not places[name][1]:
            facts = inspect_image(index.image_folder / name, index.pixels)
        code = code or facts.problem or "image-unreadable"
        reasons[row] = _describe(code, folder.hints.get(name) or facts.detail)
    return reasons
