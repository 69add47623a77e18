"""What masks are predicted for: images, and boxes in them. Imports no torch.

Where boxes come from: the command line, a COCO file, a detector's results. Imports no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from samft.coco.entries import CROWD, NO_ID, inspect_images
from samft.coco.images import inspect_image
from samft.coco.index import CocoIndex, index_file
from samft.coco.json_reader import ObjectEntry, load_document, read_entries, to_id
from samft.coco.problems import KINDS, WARNING, Problems
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


def read_coco_images(annotations: Path, folder: Path) -> tuple[ImageList, CocoIndex]:
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


def _why(file: CocoIndex, name: str) -> str:
    code = file.bad_images.get(name)
    if code is None and ".." not in Path(name).parts and not Path(name).is_absolute():
        code = inspect_image(file.image_folder / name).problem
    return KINDS[code or "image-outside"][1]


_NUM_NAMED = 3  # examples in an error


def find_task(
    places: Sequence[Path],
    *,
    annotations: Path | None = None,
    results: Path | None = None,
    boxes: Sequence[Sequence[float]] | None = None,
    automatic: bool = False,
    min_score: float = 0.0,
) -> Task:
    """Finds images and boxes; with neither annotations nor boxes, masks are automatic.

    Args:
        places: Image files and folders; with `annotations` one folder.
        annotations: COCO file that lists the images, and has boxes unless those below are given.
        results: A detector's, see `detected_boxes`.
        boxes: The same for all images, see `boxes_everywhere`.
        automatic: No boxes, also where there are annotations.
        min_score: See `detected_boxes`.

    Returns:
        The task, images that cannot be read included.

    Raises:
        DataError: There are no images, or boxes are not of them.
    """
    file, category = None, PLAIN_CATEGORY
    if annotations is None:
        images = list_images(places)
    else:
        images, file = read_coco_images(annotations, places[0])
        category = NO_CATEGORY
    if results is not None:
        detected = detected_boxes(results, images, min_score=min_score)
        return Task(images, sorted(set(detected.rows.tolist())), detected, category)
    if annotations is not None and file is not None and not (boxes or automatic):
        annotated = annotated_boxes(annotations, file)
        lost = {row for row in images.bad if images.names[row] in file.bad_images}
        return Task(images, sorted(lost | set(annotated.rows.tolist())), annotated, category)
    rows = list(range(len(images.ids)))
    everywhere = boxes_everywhere(boxes, images, category) if boxes else None
    return Task(images, rows, everywhere, category)


def boxes_everywhere(boxes: Sequence[Sequence[float]], images: ImageList, category: int) -> Boxes:
    """The same boxes in every image.

    Args:
        boxes: x0 y0 x1 y1 each, px, original frame.
        images: Where.
        category: Their category id.

    Raises:
        DataError: A box reaches beyond an image by more than a pixel.
    """
    good = np.array([row for row in range(len(images.ids)) if row not in images.bad], dtype=int)
    for box in boxes:
        beyond = _beyond(np.array([box], dtype=float), images.sizes[good])
        for row in good[beyond > 1].tolist():
            height, width = images.sizes[row].tolist()
            words = ",".join(f"{side:g}" for side in box)
            raise DataError(
                f"--box {words} lies outside of {images.names[row]}, which is {width} x {height} "
                "px, or reaches beyond it: give x0,y0,x1,y1 in pixels of the original image."
            )
    rows = np.repeat(good, len(boxes))
    return _boxes(rows, np.tile(np.array(boxes, dtype=float), (len(good), 1)), category)


def _beyond(boxes: NDArray[np.float64], sizes: NDArray[np.int32]) -> NDArray[np.float64]:
    # By how many pixels a box reaches out of its image, at most.
    return np.asarray(
        np.concatenate([-boxes[:, :2] + 0 * sizes, boxes[:, 2:] - sizes[:, ::-1]], axis=1).max(1)
    )


def annotated_boxes(annotations: Path, file: CocoIndex) -> Boxes:
    """The boxes of a COCO file's objects, as training and validation use them, without crowds.

    An object whose mask is missing or cannot be used has its box still.

    Args:
        annotations: The JSON file.
        file: Its index.
    """
    plain = np.flatnonzero((file.flags & CROWD) == 0)
    rows = np.repeat(np.arange(file.num_images), np.diff(file.first_object))[plain]
    boxes, ids = file.boxes[plain], file.object_ids[plain]
    categories = np.maximum(file.categories[plain], NO_CATEGORY)
    left_out: dict[str, int] = {}
    if any(severity == WARNING and _is_of_a_mask(code) for code, severity, _ in file.problems):
        more, left_out = _boxes_without_masks(annotations, file)
        if more:
            more_rows, more_boxes, more_categories, more_ids = zip(*more, strict=True)
            rows, boxes = np.append(rows, more_rows), np.append(boxes, more_boxes, axis=0)
            categories, ids = np.append(categories, more_categories), np.append(ids, more_ids)
    return _boxes(rows, boxes, categories, annotation_ids=ids, left_out=left_out)


def _is_of_a_mask(code: str) -> bool:
    return code.startswith(("mask-", "polygon-", "rle-"))


_Object = tuple[int, list[float], int, int]  # row, box, category, id


def _boxes_without_masks(
    annotations: Path, file: CocoIndex
) -> tuple[list[_Object], dict[str, int]]:
    known, taken = set(file.positions.tolist()), set(file.object_ids.tolist())
    row_of = {image_id: row for row, image_id in enumerate(file.image_ids.tolist())}
    found: list[_Object] = []
    unusable = 0
    entries = load_document(annotations, Problems()).annotations
    for position, entry in enumerate(read_entries(entries, ObjectEntry)):
        if position in known or entry is None or to_id(entry.iscrowd):
            continue
        row, object_id = row_of.get(to_id(entry.image_id) or 0), to_id(entry.id)
        if row is None or file.bad[row] or object_id in taken:
            continue
        box = _corners(entry.bbox)
        if box is None or _is_outside(box, file.sizes[row].tolist()):
            unusable += 1
            continue
        category = to_id(entry.category_id)
        taken.add(object_id)
        found.append((row, box, category or NO_CATEGORY, NO_ID if object_id is None else object_id))
    return found, {"neither a mask nor a usable bbox": unusable} if unusable else {}


def _corners(bbox: Any) -> list[float] | None:
    try:
        x, y, width, height = (float(side) for side in bbox)
    except (TypeError, ValueError):
        return None
    corners = [x, y, x + width, y + height]
    return corners if np.isfinite(corners).all() and min(width, height) > 0 else None


def _is_outside(box: Sequence[float], size: Iterable[int]) -> bool:
    height, width = size
    return box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0


class _Detection(msgspec.Struct):
    image_id: int
    bbox: tuple[float, float, float, float]
    category_id: int = NO_CATEGORY
    score: float | None = None


def detected_boxes(results: Path, images: ImageList, *, min_score: float = 0.0) -> Boxes:
    """The boxes of a detector's COCO results file.

    Args:
        results: A list of image_id, category_id, bbox (x y width height, px) and score.
        images: Those that it is of.
        min_score: Boxes that score lower are left out.

    Raises:
        DataError: It cannot be read, or is of other images.
    """
    detections = _read_detections(results)
    row_of = {image_id: row for row, image_id in enumerate(images.ids.tolist())}
    _refuse_others(
        results,
        [f"image_id {one.image_id}" for one in detections if one.image_id not in row_of],
        len(detections),
        "images that the annotation file does not list",
    )
    left_out = {"no width or height": 0, "score below --min_score": 0}
    kept: list[tuple[int, list[float], int, float]] = []
    outside: list[str] = []
    for one in detections:
        row, box = row_of[one.image_id], _corners(one.bbox)
        score = float("nan") if one.score is None else one.score
        if score < min_score:
            left_out["score below --min_score"] += 1
        elif box is None:
            left_out["no width or height"] += 1
        elif row not in images.bad and _is_outside(box, images.sizes[row].tolist()):
            outside.append(f"{list(one.bbox)} in {images.names[row]}")
        else:
            kept.append((row, box, one.category_id, score))
    _refuse_others(results, outside, len(detections), "places outside of their images")
    rows, boxes, categories, scores = zip(*kept, strict=True) if kept else ((), (), (), ())
    left_out = {reason: count for reason, count in left_out.items() if count}
    return _boxes(rows, boxes, categories, scores=scores, left_out=left_out)


def _read_detections(results: Path) -> list[_Detection]:
    try:
        return msgspec.json.decode(results.read_bytes(), type=list[_Detection], strict=False)
    except OSError as error:
        raise DataError(
            f"--boxes: {results} cannot be read ({error.strerror}): check the path."
        ) from error
    except (ValueError, RecursionError) as error:  # msgspec's errors are of the first kind
        raise DataError(
            f"--boxes: {results} is no COCO results file ({error}): it should be a list of objects "
            "with image_id, category_id, bbox [x, y, width, height] and score."
        ) from error


def _refuse_others(results: Path, found: list[str], total: int, where: str) -> None:
    if found:
        some = ", ".join(list(dict.fromkeys(found))[:_NUM_NAMED])
        raise DataError(
            f"--boxes: of the {total:,} boxes in {results}, {len(found):,} are of {where} "
            f"({some}{', ...' if len(found) > _NUM_NAMED else ''}): give the results of these "
            "images, with bbox as x, y, width, height in pixels of the original image."
        )


def _boxes(
    rows: Any,
    boxes: Any,
    categories: Any,
    *,
    annotation_ids: Any = NO_ID,
    scores: Any = np.nan,
    left_out: dict[str, int] | None = None,
) -> Boxes:
    rows = np.asarray(rows, dtype=np.int64)
    order = np.argsort(rows, kind="stable")

    def column(values: Any, dtype: type) -> NDArray[Any]:
        return np.broadcast_to(np.asarray(values, dtype=dtype), rows.shape)[order]

    return Boxes(
        rows=rows[order],
        boxes_original=np.asarray(boxes, dtype=np.float64).reshape(-1, 4)[order],
        category_ids=column(categories, np.int64),
        annotation_ids=column(annotation_ids, np.int64),
        scores=column(scores, np.float64),
        left_out=left_out or {},
    )
