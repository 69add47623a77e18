"""Windows of an image, and which of its objects each window holds.

The model's input has a fixed size. A large image that is shrunk to it loses its small objects; seen
through windows, it keeps them. A window is x0 y0 x1 y1, whole px of the image, and never exceeds
the image. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.config_checks import MAX_OVERLAP, has_effect
from samft.errors import ConfigError

KINDS = ("image", "tiles", "objects")
_FIELDS = {"view": "kind", "view_context": "context"}  # by setting, where the names differ
MIN_SHARE = 0.5  # of a box that a window must hold, to train on an object that its edge cuts
_MOST_PAIRS = 1 << 20  # of boxes and windows that are compared at once
_SMALLEST_SIDE = 1e-6  # px; keeps the area of a flat box above 0

Boxes = NDArray[np.floating]
Windows = NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """How images are seen.

    A window is scaled to the model's input as a whole image is: so `tile_size` also says how large
    objects are seen, and equal to the image size of the model, it keeps every pixel.

    Attributes:
        kind: `image` (as a whole), `tiles` (a grid of windows) or `objects` (a window around each
            group of objects).
        tile_size: Side of a window, px of the image.
        tile_overlap: Of neighbouring tiles, as a share of `tile_size`: 0 to less than 1.
        context: With `objects`, how many times as wide and high as an object its window is at
            least: 1 or more. One that does not fit in `tile_size` gets a larger window of its own.
    """

    kind: str = "image"
    tile_size: int = 1024
    tile_overlap: float = 0.25
    context: float = 2.0

    def __post_init__(self) -> None:
        """Refuses what is no view.

        Raises:
            ConfigError: A value is out of its range.
        """
        side, numbers = self.tile_size, (self.tile_overlap, self.context)
        sound = isinstance(side, (int, np.integer)) and side >= 1 and self.kind in KINDS
        sound = sound and all(isinstance(number, (int, float)) for number in numbers)
        if not (sound and 0 <= self.tile_overlap <= MAX_OVERLAP and self.context >= 1):
            raise ConfigError(
                f"view: {self} cannot be: kind is one of {', '.join(KINDS)}, tile_size a whole "
                f"number above 0, tile_overlap from 0 to {MAX_OVERLAP}, and context at least 1."
            )

    @property
    def has_windows(self) -> bool:
        """Whether images are seen in parts."""
        return self.kind != "image"

    def to_json(self) -> dict[str, Any]:
        """As plain values; of whole images, nothing but that they are."""
        return asdict(self) if self.has_windows else {"kind": self.kind}

    @staticmethod
    def from_json(value: Any) -> "View | None":
        """What `to_json` returned; None for anything else."""
        try:
            return View(**value)
        except (TypeError, ConfigError):
            return None

    def completed(self, flags: Mapping[str, Any]) -> "View":
        """The view with the settings that were given as flags, by name, instead of its own."""
        names = {_FIELDS.get(name, name): value for name, value in flags.items()}
        return replace(self, **names)

    def shows_as(self, other: "View") -> bool:
        """Whether both show the same of every image: settings without effect make no difference."""
        return self._effective() == other._effective()

    def _effective(self) -> tuple[Any, ...]:
        settings = {"view": self.kind, **asdict(self)}
        names = {field: name for name, field in _FIELDS.items()}
        return tuple(
            value if has_effect(names.get(field, field), SimpleNamespace(**settings)) else None
            for field, value in asdict(self).items()
        )

    def describe(self) -> str:
        """One phrase for the log."""
        if self.kind == "tiles":
            overlap = round(self.tile_overlap * self.tile_size)
            return f"tiles of {self.tile_size} px that overlap by {overlap} px"
        if self.kind == "objects":
            return f"windows of {self.tile_size} px or more around groups of objects"
        return "whole images"


WHOLE = View()


@dataclass(frozen=True)
class WindowObjects:
    """Windows of one image, each with some of its objects.

    Attributes:
        windows: int64 [n, 4], x0 y0 x1 y1, px.
        counts: int64 [n], objects of each window, at least 1.
        objects: int64 [sum of counts], positions among the boxes, window after window, ascending.
    """

    windows: Windows
    counts: NDArray[np.int64]
    objects: NDArray[np.int64]


def view_objects(
    boxes: Boxes, size: tuple[int, int], view: View, *, training: bool = False
) -> WindowObjects:
    """The windows of an image that hold objects.

    Args:
        boxes: [K, 4], x0 y0 x1 y1, px of the image, which they may exceed.
        size: H, W of the image, px.
        view: How it is seen.
        training: To train on: each object is in every window that holds `MIN_SHARE` of its box,
            perhaps in none. Otherwise to score: each object is in exactly one window, see
            `best_windows`.

    Example:
        >>> boxes = np.array([[10, 10, 20, 20], [90, 40, 98, 50]])
        >>> seen = view_objects(boxes, (100, 100), View("tiles", tile_size=64, tile_overlap=0))
        >>> seen.windows.tolist(), seen.objects.tolist()
        ([[0, 0, 64, 64], [36, 0, 100, 64]], [0, 1])
    """
    windows = list_windows(boxes, size, view)
    if training and view.has_windows:
        owner, objects = _pairs_to_train(boxes, windows)
    else:
        owner = best_windows(boxes, windows)
        objects = np.arange(len(owner))
    order = np.lexsort((objects, owner))
    counts = np.bincount(owner, minlength=len(windows))
    return WindowObjects(windows[counts > 0], counts[counts > 0], objects[order])


def list_windows(boxes: Boxes, size: tuple[int, int], view: View) -> Windows:
    """All windows of an image of H, W with boxes [K, 4]: [n, 4]; tiles also where no box is."""
    if view.kind == "tiles":
        return tile_windows(size, view)
    if view.kind == "objects":
        return object_windows(boxes, size, view)
    return np.array([[0, 0, size[1], size[0]]], dtype=np.int64)


def tile_windows(size: tuple[int, int], view: View) -> Windows:
    """A grid of windows that together cover an image.

    The last column and row are moved inside, so that all are of one size; an image that is smaller
    than a tile is one.

    Args:
        size: H, W of the image, px.
        view: Its `tile_size` and `tile_overlap`.

    Returns:
        int64 [n, 4], row by row.

    Example:
        >>> tile_windows((64, 150), View("tiles", tile_size=64, tile_overlap=0.25))[:, [0, 2]]
        array([[  0,  64],
               [ 48, 112],
               [ 86, 150]])
    """
    stride = max(view.tile_size - round(view.tile_overlap * view.tile_size), 1)
    tops, lefts = (_tile_starts(side, view.tile_size, stride) for side in size)
    y0, x0 = (grid.ravel() for grid in np.meshgrid(tops, lefts, indexing="ij"))
    height, width = (min(side, view.tile_size) for side in size)
    return np.stack([x0, y0, x0 + width, y0 + height], axis=1)


def _tile_starts(side: int, tile: int, stride: int) -> NDArray[np.int64]:
    last = max(side - tile, 0)
    return np.minimum(np.arange(-(-last // stride) + 1, dtype=np.int64) * stride, last)


def object_windows(boxes: Boxes, size: tuple[int, int], view: View) -> Windows:
    """Windows around groups of objects whose surroundings fit in one together.

    Groups are formed from the top of the image down, each around the first object that is left, of
    those that are nearest to it. The surroundings of an object are its box `view.context` times as
    wide and high, as far as the image reaches.

    Args:
        boxes: [K, 4], px of the image.
        size: H, W of the image, px.
        view: Its `tile_size` and `context`.

    Returns:
        int64 [n, 4], squares unless the image is too small for them.
    """
    surroundings = _surroundings(boxes, size, view.context)
    centres = (surroundings[:, :2] + surroundings[:, 2:]) / 2
    left = np.lexsort((surroundings[:, 0], surroundings[:, 1]))
    windows = []
    while len(left):
        group, members = _grow_group(surroundings, centres, left, view.tile_size)
        windows.append(_square_around(group, size, view.tile_size))
        left = left[~np.isin(left, members)]
    return np.array(windows, dtype=np.int64).reshape(-1, 4)


def _surroundings(boxes: Boxes, size: tuple[int, int], context: float) -> Windows:
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 2, 2)
    limit = np.array(size[::-1])
    half, centre = (corners[:, 1] - corners[:, 0]) * context / 2, corners.mean(axis=1)
    low = np.clip(np.floor(centre - half), 0, limit - 1)
    high = np.clip(np.ceil(centre + half), low + 1, limit)
    return np.concatenate([low, high], axis=1).astype(np.int64)


def _grow_group(
    surroundings: Windows, centres: NDArray[np.float64], left: NDArray[np.int64], tile_size: int
) -> tuple[Windows, list[int]]:
    # What is around the first of the objects that are left and those that fit in with it, and
    # which objects those are.
    first, *members = left[:1].tolist() * 2
    group = surroundings[first]
    others = left[1:]
    fits = _union(group, surroundings[others])
    others = others[(fits[:, 2:] - fits[:, :2]).max(axis=1, initial=0) <= tile_size]
    distance = ((centres[others] - centres[first]) ** 2).sum(axis=1)
    for k in others[np.argsort(distance, kind="stable")].tolist():
        wider = _union(group, surroundings[k : k + 1])[0]
        if (wider[2:] - wider[:2]).max() <= tile_size:
            group = wider
            members.append(k)
    return group, members


def _union(window: Windows, others: Windows) -> Windows:
    low, high = np.minimum(window[:2], others[:, :2]), np.maximum(window[2:], others[:, 2:])
    return np.concatenate([low, high], axis=1)


def _square_around(group: Windows, size: tuple[int, int], tile_size: int) -> list[int]:
    sides = group[2:] - group[:2]
    side = max(tile_size, int(sides.max()))
    limit = np.array(size[::-1])
    shape = np.minimum(side, limit)
    low = np.clip(group[:2] - (shape - sides) // 2, 0, limit - shape)
    return [*low.tolist(), *(low + shape).tolist()]


def best_windows(boxes: Boxes, windows: Windows) -> NDArray[np.int64]:
    """The window of each object: where it is scored, and predicted.

    It is the one that holds most of the object's box; of several, the one whose centre is nearest
    to the box's, and then the first.

    Args:
        boxes: [K, 4], px of the image.
        windows: [n, 4], at least one if there are boxes.

    Returns:
        int64 [K], positions in `windows`.
    """
    return np.concatenate(
        [
            np.zeros(0, dtype=np.int64),
            *(_best_of(part, windows) for part in _chunks(boxes, windows)),
        ]
    )


def _best_of(boxes: NDArray[np.float64], windows: Windows) -> NDArray[np.int64]:
    shares = held_shares(boxes, windows)
    # Twice the centres, so that windows give whole numbers, and equal distances are equal.
    offsets = (boxes[:, :2] + boxes[:, 2:])[:, None] - (windows[:, :2] + windows[:, 2:])
    distances = np.where(
        shares >= shares.max(axis=1, keepdims=True) - 1e-9, (offsets**2).sum(axis=2), np.inf
    )
    return np.asarray(distances.argmin(axis=1))


def held_shares(boxes: Boxes, windows: Windows) -> NDArray[np.float64]:
    """The share of the area of each box [K, 4] that each window [n, 4] holds: [K, n], 0 to 1."""
    low, high = _corners(boxes)
    inside = np.minimum(high[:, None], windows[:, 2:]) - np.maximum(low[:, None], windows[:, :2])
    return np.asarray((np.maximum(inside, 0) / (high - low)[:, None]).prod(axis=2))


def _corners(boxes: Boxes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = np.moveaxis(np.asarray(boxes, dtype=np.float64).reshape(-1, 2, 2), 1, 0)
    return low, np.maximum(high, low + _SMALLEST_SIDE)


def _pairs_to_train(boxes: Boxes, windows: Windows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # Windows, and objects that are trained on in them.
    none = np.zeros(0, dtype=np.int64)
    owners, objects, first = [none], [none], 0
    for part in _chunks(boxes, windows):
        rows, columns = np.nonzero(held_shares(part, windows) >= MIN_SHARE)
        owners.append(columns)
        objects.append(first + rows)
        first += len(part)
    return np.concatenate(owners), np.concatenate(objects)


def _chunks(boxes: Boxes, windows: Windows) -> list[NDArray[np.float64]]:
    # Few enough boxes at a time that a table of them and all windows is small.
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    rows = max(_MOST_PAIRS // max(len(windows), 1), 1)
    return [boxes[start : start + rows] for start in range(0, len(boxes), rows)]
