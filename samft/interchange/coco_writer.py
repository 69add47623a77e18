"""Writes a COCO dataset, one object at a time."""

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import msgspec
import numpy as np

from samft.annotations.segmentation import CroppedMask, encode_cropped
from samft.interchange.outlines import trace_outlines

RLE, POLYGONS = "rle", "polygons"
NO_CLASS = "object"  # what an object without a class is called


class DatasetWriter:
    """Writes a COCO dataset and holds only one object of it in memory.

    Attributes:
        num_objects: Objects written.
        num_empty: Masks left out because they have no pixel: COCO has no such object.
    """

    def __init__(self, file: BinaryIO, *, description: str, segmentation: str = RLE) -> None:
        """Begins the dataset in an open file, which `close` leaves open.

        Args:
            file: The file.
            description: Where the objects come from, for `info`.
            segmentation: `RLE`, or `POLYGONS` along the edges of pixels; both are exactly the mask.
        """
        self.num_objects = self.num_empty = 0
        self._file, self._segmentation = file, segmentation
        self._encode = msgspec.json.Encoder().encode
        file.write(dataset_head(description))

    def add(
        self,
        mask: CroppedMask,
        *,
        polygons: list[list[float]] | None = None,
        size: tuple[int, int],
        image_id: int,
        category_id: int,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        """Appends an object, with the next id, the box and the area of its mask.

        Args:
            mask: In the original frame; it need not be tight.
            polygons: What the mask was drawn from, written as it is; None: see `segmentation`.
            size: H, W of the image, px.
            image_id: Its image.
            category_id: Its class.
            fields: Further fields, such as `score`.

        Raises:
            OSError: The file cannot be written, for example because the disk is full.
        """
        ys, xs = np.nonzero(mask.mask)
        if not len(ys):
            self.num_empty += 1
            return
        x, y = mask.left + int(xs.min()), mask.top + int(ys.min())
        if polygons is not None:
            segmentation: Any = polygons
        elif self._segmentation == RLE:
            segmentation = encode_cropped(mask, size)
        else:
            segmentation = trace_outlines(mask)
        entry = {
            "id": self.num_objects + 1,
            "image_id": image_id,
            "category_id": category_id,
            "iscrowd": 0,
            "area": len(ys),
            "bbox": [x, y, int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1],
            "segmentation": segmentation,
            **(fields or {}),
        }
        self._file.write((b",\n" if self.num_objects else b"\n") + self._encode(entry))
        self.num_objects += 1

    def close(self, images: Sequence[Mapping[str, Any]], categories: Mapping[int, str]) -> None:
        """Ends the dataset; the file stays open.

        Args:
            images: Entries with `id`, `file_name`, `height` and `width`.
            categories: From id to name.
        """
        listed = [{"id": key, "name": name} for key, name in sorted(categories.items())]
        for name, entries in (("images", images), ("categories", listed)):
            lines = b",\n".join(map(self._encode, entries))
            self._file.write(b'\n],\n"%s": [\n%s' % (name.encode(), lines))
        self._file.write(b"\n]}\n")


def dataset_head(description: str) -> bytes:
    """What such a file begins with, by which it is recognised."""
    info = msgspec.json.encode({"description": description})
    return b'{"info": ' + info + b',\n"licenses": [],\n"annotations": ['


def category_without_class(categories: Mapping[int, str]) -> int:
    """The id of the class for objects that have none: of `NO_CLASS`, or the next one."""
    same = [key for key, name in categories.items() if name == NO_CLASS]
    return min(same, default=max(categories, default=0) + 1)
