"""What masks are predicted for: images, and boxes in them. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.coco.coco_images import inspect_images
from samft.coco.coco_index import CocoFile, index_file
from samft.coco.coco_objects import NO_ID
from samft.coco.images import inspect_image
from samft.coco.problems import KINDS, Problems
from samft.coco.subset import refuse_errors
from samft.errors import DataError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # of files in a folder
PLAIN_CATEGORY = 1  # of objects in images without a COCO file
NO_CATEGORY = 0  # of objects without a class, beside a COCO file's classes


@dataclass(frozen=True)
class ImageList:
    """N images.

    Attributes:
        names: What they are called in `images.json` and in errors.
        paths: Where they are.
        ids: int64 [N].
        sizes: int32 [N, 2], H, W of the file, px; not known for those that cannot be read.
        bad: From the row of an image that cannot be read to the reason.
    """

    names: list[str]
    paths: list[Path]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int32]
    bad: dict[int, str]


@dataclass(frozen=True)
class Boxes:
    """K boxes to be turned into masks, grouped by image.

    Attributes:
        rows: int64 [K], the row in `ImageList` of each, ascending.
        boxes_original: float64 [K, 4], x0 y0 x1 y1, px, original frame.
        category_ids: int64 [K].
        annotation_ids: int64 [K]; `coco_objects.NO_ID` where there is none.
        scores: float64 [K], the detector's; NaN where there is none.
        left_out: How many cannot be used, by reason.
    """

    rows: NDArray[np.int64]
    boxes_original: NDArray[np.float64]
    category_ids: NDArray[np.int64]
    annotation_ids: NDArray[np.int64]
    scores: NDArray[np.float64]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    def of_image(self, row: int) -> range:
        """Which of the boxes are in an image."""
        first, last = np.searchsorted(self.rows, [row, row + 1]).tolist()
        return range(first, last)


@dataclass(frozen=True)
class Task:
    """What masks are wanted of.

    Attributes:
        images: All images.
        rows: Those to open.
        boxes: None: automatic masks.
        category: Of masks whose box has no class.
    """

    images: ImageList
    rows: list[int]
    boxes: Boxes | None
    category: int

    def boxes_of(self, row: int) -> NDArray[np.float64]:
        """The boxes of an image, [K, 4], x0 y0 x1 y1, px, original frame."""
        if self.boxes is None:
            return np.zeros((0, 4))
        own = self.boxes.of_image(row)
        return self.boxes.boxes_original[own.start : own.stop]

    def describe(self, row: int, k: int) -> dict[str, Any]:
        """What results say of the k-th mask of an image beside the mask itself."""
        words: dict[str, Any] = {"image_id": int(self.images.ids[row])}
        if self.boxes is None:
            return {**words, "category_id": self.category}
        place = self.boxes.of_image(row)[k]
        words["category_id"] = int(self.boxes.category_ids[place])
        if self.boxes.annotation_ids[place] != NO_ID:
            words["annotation_id"] = int(self.boxes.annotation_ids[place])
        if not np.isnan(self.boxes.scores[place]):
            words["detector_score"] = float(self.boxes.scores[place])
        return words


def list_images(places: Sequence[Path]) -> ImageList:
    """Finds image files, and looks at the head and the end of each.

    Args:
        places: Files, and folders of which the image files are taken, not those of folders within.

    Returns:
        The images, with ids from 1 on, in the order given and by name within a folder.

    Raises:
        DataError: A place does not exist, or a folder has no image file.
    """
    found: dict[Path, str] = {}
    for place in places:
        if place.is_dir():
            files = sorted(path for path in place.iterdir() if _is_image_name(path))
            if not files:
                raise DataError(
                    f"--images: the folder {place} holds no image file ({', '.join(SUFFIXES)}; "
                    "folders within are not looked into): check the path."
                )
        elif place.exists():
            files = [place]
        else:
            raise DataError(f"--images: there is no file or folder {place}: check the path.")
        for path in files:
            # A name is relative to the one folder that was given; of several, all is said.
            name = path.name if len(places) == 1 else str(path)
            found.setdefault(path.absolute(), name)
    paths, names = list(found), list(found.values())
    facts = list(inspect_images(paths))
    bad = {row: KINDS[fact.problem][1] for row, fact in enumerate(facts) if fact.problem}
    sizes = np.array([(fact.height, fact.width) for fact in facts], dtype=np.int32)
    return ImageList(names, paths, np.arange(1, len(paths) + 1), sizes, bad)


def _is_image_name(path: Path) -> bool:
    # Names that begin with a dot are what other systems leave beside a picture.
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_coco_images(annotations: Path, folder: Path) -> tuple[ImageList, CocoFile]:
    """The images of a COCO file, which need no objects.

    Raises:
        DataError: The file cannot be read, lists no image, or one id stands for several.
    """
    file = index_file(annotations, folder)
    found = {code: one for code, one in file.problems.found.items() if code != "no-objects"}
    refuse_errors(Problems(found), annotations, on_bad_image="skip")
    if not file.num_images:
        raise DataError(f"{annotations} lists no image: give a COCO file that does.")
    names = file.file_names()
    paths = [folder / name for name in names]
    bad = {row: _why(file, names[row]) for row in np.flatnonzero(file.bad).tolist()}
    return ImageList(names, paths, file.image_ids, file.sizes, bad), file


def _why(file: CocoFile, name: str) -> str:
    code = file.bad_images.get(name)
    if code is None and ".." not in Path(name).parts and not Path(name).is_absolute():
        code = inspect_image(file.image_folder / name).problem
    return KINDS[code or "image-outside"][1]
