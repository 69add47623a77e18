"""Images with the outlines or masks of their objects, as the layouts of other tools give them."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from samft.annotations.segmentation import CroppedMask
from samft.errors import DataError
from samft.images.files import JPEG_START, inspect_image
from samft.images.limits import SENTENCES, UnusableImage, check_size
from samft.images.names import IMAGE_SUFFIXES
from samft.images.orientation import turned_size
from samft.images.tiff import is_tiff
from samft.runtime.files import read_file

_INDEXED = ("1", "P", "L", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes of one whole number


@dataclass(frozen=True)
class LabelledObject:
    """An object of an image.

    Attributes:
        name: Of its class.
        shape: Its mask, or its polygons [x0, y0, x1, y1, ...], px.
        source: Where it is written, for messages: a file, with a line or a value.
    """

    name: str
    shape: CroppedMask | list[list[float]]
    source: str


@dataclass
class LabelledImage:
    """An image and its objects.

    Attributes:
        path: The image file.
        size: H, W, px, in the frame of the objects.
        objects: Its objects.
        split: The split it belongs to.
    """

    path: Path
    size: tuple[int, int]
    objects: list[LabelledObject] = field(default_factory=list)
    split: str = "train"


def read_numbers(path: Path) -> NDArray[Any]:
    """The whole numbers of a label image: a palette's indices, not its colours.

    Returns:
        An array of integers [H, W].

    Raises:
        DataError: The file cannot be read, is a JPEG, or holds colours or fractions.
    """
    try:
        content = read_file(path)
        numbers = _decode_tiff(content) if is_tiff(content) else _decode(content)
    except UnusableImage as error:
        raise DataError(f"{path} {error.sentence}") from error
    except Exception as error:  # whatever the decoders raise for a damaged file
        raise DataError(f"{path} cannot be read as a label image ({error}).") from error
    if content.startswith(JPEG_START):
        raise DataError(
            f"{path} is a JPEG, which changes numbers near the borders of objects: save the labels "
            "as PNG or TIFF where they were drawn."
        )
    if numbers.ndim == 3 and (numbers == numbers[..., :1]).all():
        numbers = numbers[..., 0]  # grey, saved as colours
    if numbers.dtype.kind == "f" and (numbers == np.rint(numbers)).all():
        numbers = numbers.astype(np.int64)
    if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
        raise DataError(
            f"{path} holds colours or fractions, not one whole number for each pixel (its values "
            f"are {numbers.dtype} {list(numbers.shape)}): save it as PNG or TIFF of 8, 16 or 32 "
            "bits with the number of the object in each pixel."
        )
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers


def _decode_tiff(content: bytes) -> NDArray[Any]:
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        series = tiff.series[0]
        numbers, axes = series.asarray(), series.axes
    # An image may be one pixel high or wide, so only other axes of length 1 are dropped.
    lengths = zip(axes, numbers.shape, strict=True)
    single = [k for k, (axis, length) in enumerate(lengths) if axis not in "YX" and length == 1]
    return np.squeeze(numbers, axis=tuple(single))


def _decode(content: bytes) -> NDArray[Any]:
    with Image.open(io.BytesIO(content)) as image:
        check_size(image.height, image.width, bytes_per_pixel=4)
        return np.array(image if image.mode in _INDEXED else image.convert("RGB"))


def image_size(path: Path) -> tuple[int, int]:
    """H, W of an image file, px, as it is stored.

    Raises:
        DataError: It cannot be used.
    """
    facts = inspect_image(path)
    if facts.problem:
        reason = SENTENCES.get(facts.problem, ("is no file", ""))[0]
        raise DataError(f"{path} {reason}.")
    return facts.height, facts.width


def viewed_size(path: Path) -> tuple[int, int]:
    """H, W of an image file, px, as viewers show it: turned as EXIF says.

    Raises:
        DataError: It cannot be used.
    """
    return turned_size(image_size(path), inspect_image(path).orientation)


def check_sizes(image: Path, labels: Path, size: tuple[int, int]) -> None:
    """Makes sure that labels are of the size of their image, which EXIF may turn.

    Raises:
        DataError: They are not.
    """
    height, width = image_size(image)
    turned = inspect_image(image).orientation >= 5  # by a quarter
    if size != (height, width) and not (turned and size == (width, height)):
        raise DataError(
            f"{labels} is {size[1]} x {size[0]} px, and its image {image} {width} x {height} px: "
            "give the labels of this image at its own size."
        )


def objects_of_numbers(
    numbers: NDArray[Any], *, name: str, source: Path, background: Iterable[int] = ()
) -> list[LabelledObject]:
    """One object for each number in a label image, ascending.

    Args:
        numbers: Integers [H, W].
        name: The class.
        source: The file.
        background: Numbers that are no object; negative ones never are.
    """
    values, flat = np.unique(numbers, return_inverse=True)
    places = flat.reshape(numbers.shape)
    ignored = set(background)
    objects = []
    for k, value in enumerate(values.tolist()):
        if value > 0 and value not in ignored:
            objects.append(LabelledObject(name, _crop(places == k), f"{source}, value {value}"))
    return objects


def _crop(mask: NDArray[np.bool_]) -> CroppedMask:
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(ys):
        return CroppedMask(0, 0, np.zeros((0, 0), dtype=bool))
    crop = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    return CroppedMask(int(ys[0]), int(xs[0]), np.ascontiguousarray(crop))


def mask_object(path: Path, *, name: str) -> tuple[LabelledObject, tuple[int, int]]:
    """The object that a picture of one mask shows, where it is above 0; and H, W of the picture."""
    numbers = read_numbers(path)
    height, width = numbers.shape
    return LabelledObject(name, _crop(numbers > 0), str(path)), (height, width)


def _is_image(path: Path) -> bool:
    # macOS leaves files such as "._a.png" beside the image "a.png".
    is_hidden = path.name.startswith(".")
    return not is_hidden and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def has_images(folder: Path) -> bool:
    """Whether a folder itself holds any image file."""
    return any(map(_is_image, folder.iterdir()))


def find_images(folder: Path) -> dict[str, Path]:
    """The image files of a folder, by name without suffix.

    Raises:
        DataError: There is none, or two differ only in their suffix.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: check the path.")
    images: dict[str, Path] = {}
    for path in filter(_is_image, sorted(folder.iterdir())):
        if path.stem in images:
            raise DataError(
                f"{images[path.stem]} and {path} differ only in their suffix, so their labels "
                "cannot be told apart: rename one of them and its labels."
            )
        images[path.stem] = path
    if not images:
        raise DataError(f"the folder {folder} holds no image file: check the path.")
    return images
