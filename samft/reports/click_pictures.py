"""Rows of pictures of objects after one click, two, three: where the clicks went, and the masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samft.annotations.segmentation import decode_cropped
from samft.coco.index import CocoIndex
from samft.evaluation.clicks import CorrectedMask
from samft.evaluation.metrics import cropped_iou
from samft.images.files import ImageError
from samft.reports.drawing import annotate_crop, crop_around, image_row_of
from samft.reports.validation_images import find_objects

_TILE = 232  # px: sharp where it is shown at two thirds of the size

ExampleMasks = Mapping[tuple[int, int], Sequence[CorrectedMask]]


@dataclass(frozen=True)
class ClickTile:
    """A mask after some clicks, drawn on a crop around its object."""

    pixels: NDArray[np.uint8]  # [T, T, 3]
    num_clicks: int
    iou: float


@dataclass(frozen=True)
class ClickRow:
    """One object, and its masks after each click, by each model.

    Attributes:
        file_name: Of its image.
        class_name: Of its class.
        object_id: Of its annotation.
        models: Of each model, the tiles after one click, two, and so on.
    """

    file_name: str
    class_name: str
    object_id: int
    models: list[list[ClickTile]]


def draw_click_rows(index: CocoIndex, examples: Sequence[ExampleMasks]) -> list[ClickRow]:
    """Draws the masks of objects after their first clicks.

    Args:
        index: The checked annotation file.
        examples: Of each model, the masks of the same objects, by image id and object id.

    Returns:
        A row for each object, in order; without those whose image cannot be read any more.
    """
    keys = list(examples[0]) if examples else []
    rows = []
    for key, k in zip(
        keys, find_objects(index, np.array(keys).reshape(-1, 2)).tolist(), strict=True
    ):
        try:
            image = index.open_image(image_row_of(index, k)).decode()
        except ImageError:
            continue
        row = _draw_object(index, k, image, [masks[key] for masks in examples])
        rows += [row] if any(row.models) else []
    return rows


def _draw_object(
    index: CocoIndex,
    k: int,
    image: NDArray[np.uint8],
    models: Sequence[Sequence[CorrectedMask]],
) -> ClickRow:
    image_row = image_row_of(index, k)
    truth = decode_cropped(index.segmentations[k], index.sizes[image_row].tolist())
    crop = crop_around(index.boxes[k], image, tile=_TILE)
    return ClickRow(
        file_name=index.file_name(image_row),
        class_name=index.category_names[int(index.categories[k])],
        object_id=int(index.object_ids[k]),
        models=[
            [
                ClickTile(
                    annotate_crop(index, k, crop, predicted=one.mask, clicks=one.clicks),
                    num_clicks=len(one.clicks),
                    iou=cropped_iou(one.mask, truth),
                )
                for one in masks
            ]
            for masks in models
        ],
    )
