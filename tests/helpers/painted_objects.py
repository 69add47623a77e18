"""Pictures of plain rectangles with their COCO file, and where a colour is in a picture."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from samft.coco.index import CocoIndex, index_file

MAGENTA, CYAN, GREY = (255, 40, 220), (0, 220, 255), 128
HEIGHT, WIDTH = 100, 200


def rectangle(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def write_painted(folder: Path, objects: list[dict[str, Any]], *, images: int = 1) -> CocoIndex:
    """Writes green images of 100 x 200 px and the COCO file of the objects, and indexes it."""
    entries = []
    for number in range(1, images + 1):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((HEIGHT, WIDTH, 3), (0, 90, 0)))
        entries.append(
            {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH}
        )
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "a/b ä"}, {"id": 3, "name": "a b ä"}]
    document = {"images": entries, "annotations": objects, "categories": categories}
    path = folder / "file.json"
    path.write_text(json.dumps(document))
    return index_file(path, folder, cache=folder / "cache")


def bounds_of_colour(tile: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The box around all pixels of a colour: x0, y0, x1, y1."""
    ys, xs = np.nonzero((tile == colour).all(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
