"""Objects prompted with points, and perhaps a box each. Imports no torch.

They come from the command line, one object for all images, or from a JSON file, any number of
objects for each image.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple
from unicodedata import normalize

import msgspec
import numpy as np
from numpy.typing import NDArray

from samft.annotations.entries import NO_ID
from samft.errors import DataError
from samft.prediction.images import ImageList
from samft.runtime.files import read_file

NO_BOX = (np.nan,) * 4
MAX_OVERHANG = 1.0  # px that a box may reach out of its image
_FORM = (
    '[{"image": FILE NAME, "points": [[x, y], ...], "labels": [1, 0, ...], '
    '"box": [x0, y0, x1, y1], "id": NUMBER}, ...], of which labels (1 where left out), box and id '
    "may be missing"
)


class PointPrompt(NamedTuple):
    """What one object of an image is prompted with.

    Attributes:
        points: float64 [P, 3]: x, y, px, original frame; and 1 for a point of the object, 0 for one
            of something else.
        box: float64 [4], x0 y0 x1 y1, px, original frame; NaN where there is none.
    """

    points: NDArray[np.float64]
    box: NDArray[np.float64]

    @property
    def has_box(self) -> bool:
        """Whether there is a box beside the points."""
        return not np.isnan(self.box).any()

    def problem(self) -> str | None:
        """What is wrong with it, whatever the image; None: nothing."""
        if self.has_box and not (self.box[2:] > self.box[:2]).all():
            return "has a box without width or height: it is x0, y0, x1, y1 with x1 > x0, y1 > y0"
        if not np.isin(self.points[:, 2], (0, 1)).all():
            return (
                "has a label that is neither 1, for a point of the object, nor 0, for a point of "
                "something else"
            )
        if not (self.has_box or self.points[:, 2].any()):
            return "has no point with label 1 and no box, so nothing says which object is meant"
        return None

    def problem_in(self, size: tuple[int, int]) -> str | None:
        """What lies outside of an image of H, W px; None: nothing."""
        height, width = size
        for x, y, _ in self.points.tolist():
            if not (0 <= x < width and 0 <= y < height):
                return f"point {x:g},{y:g} lies"
        if self.has_box and overhang(self.box[None], np.array([size]))[0] > MAX_OVERHANG:
            return f"box {','.join(f'{side:g}' for side in self.box)} lies, or reaches out,"
        return None


class PointedObject(NamedTuple):
    """An object to predict a mask for: the row of its image, its prompt, its id or `NO_ID`."""

    row: int
    prompt: PointPrompt
    annotation_id: int = NO_ID


def overhang(boxes: NDArray[np.float64], sizes: NDArray[np.integer]) -> NDArray[np.float64]:
    """The most px by which a box reaches out of any side of its image; negative inside.

    Args:
        boxes: [K, 4], x0 y0 x1 y1.
        sizes: [K, 2], H, W; or of one box in K images, or K boxes in one.
    """
    return np.asarray(
        np.concatenate([-boxes[:, :2] + 0 * sizes, boxes[:, 2:] - sizes[:, ::-1]], axis=1).max(1)
    )


def repeat_points(
    points: Sequence[Sequence[float]], box: Sequence[float] | None, images: ImageList
) -> list[PointedObject]:
    """The same object in every readable image.

    Args:
        points: x y, px, original frame, and the label of each.
        box: x0 y0 x1 y1, or None.
        images: All images.

    Raises:
        DataError: The points do not say which object is meant, or lie outside of an image.
    """
    prompt = _make_prompt(points, box)
    if (problem := prompt.problem()) is not None:
        raise DataError(f"--point: the object {problem}.")
    rows = [row for row in range(len(images.ids)) if row not in images.bad]
    for row in rows:
        _refuse_outside(prompt, images, row, source="--point")
    return [PointedObject(row, prompt) for row in rows]


def _make_prompt(
    points: Sequence[Sequence[float]], box: Sequence[float] | None = None
) -> PointPrompt:
    array = np.array(points, dtype=np.float64).reshape(-1, 3)
    return PointPrompt(array, np.array(NO_BOX if box is None else box, dtype=np.float64))


def _refuse_outside(prompt: PointPrompt, images: ImageList, row: int, *, source: str) -> None:
    height, width = images.sizes[row].tolist()
    outside = prompt.problem_in((height, width))
    if outside is not None:
        raise DataError(
            f"{source}: the {outside} outside of {images.names[row]}, which is {width} x {height} "
            "px: give pixels of the original image, x from the left and y from the top."
        )


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    image: str
    points: list[tuple[float, float]]
    labels: list[int] | None = None
    box: tuple[float, float, float, float] | None = None
    id: int | None = None


def read_points(file: Path, images: ImageList) -> list[PointedObject]:
    """Reads the objects of a JSON file; objects of unreadable images are kept, unchecked.

    Args:
        file: A list of objects with image, points, labels, box and id; see `_FORM`.
        images: Those that the file may name, by file name in any Unicode form.

    Raises:
        DataError: The file cannot be read, has another form, or names or points at what is not
            there.
    """
    row_of = _rows_by_name(images)
    objects = []
    for number, entry in enumerate(_read_entries(file), start=1):
        source = f"--points: in {file}, object {number}"
        prompt = _check_entry(entry, source)
        row = row_of.get(entry.image, row_of.get(normalize("NFC", entry.image)))
        if row is None:
            raise DataError(
                f"{source} is of {entry.image}, which is none of the images, or the name of "
                f"several: write names as {images.names[0]}."
            )
        if row not in images.bad:
            _refuse_outside(prompt, images, row, source=source)
        objects.append(PointedObject(row, prompt, NO_ID if entry.id is None else entry.id))
    if not objects:
        raise DataError(f"--points: {file} lists no object: it should be {_FORM}.")
    return objects


def _rows_by_name(images: ImageList) -> dict[str, int]:
    # By the name in results; where unique, also without folders, and in the composed Unicode form.
    bare = [PurePath(name).name for name in images.names]
    row_of: dict[str, int] = {}
    for names in (bare, images.names):
        for spelled in ([normalize("NFC", name) for name in names], names):
            counts = Counter(spelled)
            row_of |= {name: row for row, name in enumerate(spelled) if counts[name] == 1}
    return row_of


def _read_entries(file: Path) -> list[_Entry]:
    try:
        return msgspec.json.decode(read_file(file), type=list[_Entry])
    except OSError as error:
        raise DataError(
            f"--points: {file} cannot be read ({error.strerror}): check the path."
        ) from error
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise DataError(
            f"--points: {file} has another form ({error}): it should be {_FORM}."
        ) from error


def _check_entry(entry: _Entry, source: str) -> PointPrompt:
    labels = [1] * len(entry.points) if entry.labels is None else entry.labels
    if not entry.points:
        raise DataError(f"{source} has no point: give it some, or leave it out.")
    if len(labels) != len(entry.points):
        raise DataError(
            f"{source} has {len(labels)} labels for {len(entry.points)} points: give one for each."
        )
    if entry.id is not None and not 0 <= entry.id < 2**63:
        raise DataError(f"{source} has the id {entry.id}: give a whole number from 0 on.")
    pairs = zip(entry.points, labels, strict=True)
    prompt = _make_prompt([(*point, label) for point, label in pairs], entry.box)
    if (problem := prompt.problem()) is not None:
        raise DataError(f"{source} {problem}.")
    return prompt
