"""Pictures of masks: what a person looks at to believe a number."""

from pathlib import Path

import cv2
import numpy as np

TRUTH_COLOUR = (255, 255, 255)
PADDING = 6


def mask_colour(number: int) -> tuple[int, int, int]:
    """A colour for the n-th mask, far from those of its neighbours (golden-angle hues)."""
    hue = np.array([[[number * 0.618034 % 1 * 179, 200, 255]]], dtype=np.uint8)
    red, green, blue = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue


def overlay(
    image: np.ndarray, masks: np.ndarray, *, boxes: np.ndarray, truths: np.ndarray | None = None
) -> np.ndarray:
    """Draws masks over an image: filled in colour, box outlined, true outline in white.

    Args:
        image: uint8 [H, W, 3] RGB.
        masks: bool [M, H, W], what the model says.
        boxes: float [M, 4], x0 y0 x1 y1 in pixels of the image.
        truths: bool [M, H, W], what is right.

    Returns:
        uint8 [H, W, 3] RGB.
    """
    canvas = image.copy()
    for number, mask in enumerate(masks):
        colour = np.array(mask_colour(number))
        canvas[mask] = (0.45 * canvas[mask] + 0.55 * colour).astype(np.uint8)
    for number, box in enumerate(boxes):
        x0, y0, x1, y1 = (int(round(float(side))) for side in box)
        cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), mask_colour(number), 1, cv2.LINE_AA)
    for truth in () if truths is None else truths:
        edges, _ = cv2.findContours(truth.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, edges, -1, TRUTH_COLOUR, 1, cv2.LINE_AA)
    return canvas


def row(pictures: list[np.ndarray]) -> np.ndarray:
    """Sets pictures side by side, tops aligned, with a white gap between.

    Args:
        pictures: uint8 [H, W, 3] each; at least one.

    Returns:
        uint8 [H, W, 3].
    """
    height = max(picture.shape[0] for picture in pictures)
    parts = []
    for picture in pictures:
        below = height - picture.shape[0]
        parts.append(np.pad(picture, ((0, below), (0, PADDING), (0, 0)), constant_values=255))
    return np.concatenate(parts, axis=1)[:, :-PADDING]


def stack(rows: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Sets rows of pictures one below the other, each under its title.

    Args:
        rows: Title and uint8 [H, W, 3] picture.

    Returns:
        uint8 [H, W, 3].
    """
    width = max(picture.shape[1] for _, picture in rows)
    parts = []
    for title, picture in rows:
        bar = np.full((30, width, 3), 255, np.uint8)
        cv2.putText(
            bar, title, (4, 21), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (40, 40, 40), 1, cv2.LINE_AA
        )
        beside = width - picture.shape[1]
        parts += [bar, np.pad(picture, ((0, 0), (0, beside), (0, 0)), constant_values=255)]
    return np.concatenate(parts)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Writes a picture, uint8 [H, W, 3] RGB, as PNG."""
    encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
    path.write_bytes(encoded.tobytes())


def read_png(path: Path) -> np.ndarray:
    """Reads what `write_png` wrote."""
    encoded = np.frombuffer(path.read_bytes(), np.uint8)
    picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError(f"{path} is not a picture")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
