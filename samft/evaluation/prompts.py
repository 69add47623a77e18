"""What a model is asked beside the annotated boxes: boxes that are off, and single points."""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from samft.data.samplers import PROMPT_STREAM, generator_of
from samft.data.targets import CroppedMask
from samft.data.transforms import Frame, jitter_boxes


def moved_boxes(
    boxes: NDArray[np.floating],
    object_ids: NDArray[np.int64],
    *,
    share: float,
    frame: Frame,
    seed: int,
) -> NDArray[np.float64]:
    """Moves each side of each box uniformly by up to a share of the box's width or height.

    How depends on the seed and on the object alone, not on its image, the model, workers or
    processes. All shares take the same draw, scaled, so that levels differ in nothing else.

    Args:
        boxes: [K, 4] in the input frame.
        object_ids: [K].
        share: Furthest that a side moves; unlike in training, there is no limit in pixels.
        frame: Of the image, which no side leaves.
        seed: Of the draws.

    Returns:
        [K, 4] in the input frame.
    """
    moved = np.zeros((len(boxes), 4))
    for row, (box, object_id) in enumerate(zip(boxes, object_ids.tolist(), strict=True)):
        generator = generator_of(PROMPT_STREAM, seed, object_id)
        moved[row] = jitter_boxes(
            box[None], share=share, frame=frame, generator=generator, most=math.inf
        )
    return moved


def centre_point(mask: CroppedMask) -> tuple[int, int]:
    """The pixel of a mask that is farthest from its border; the first of several.

    Args:
        mask: Not empty, in the original frame.

    Returns:
        x, y of the pixel, as `SamPredictor` is given them.

    Source: the maximum of the mask's distance transform, where SAM's paper puts the first point
    (Kirillov et al., Segment Anything, 2023, D.1); the image's edge is a border.
    """
    padded = np.pad(mask.mask.astype(np.uint8), 1)
    distances = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(int(np.argmax(distances)), distances.shape)
    return mask.left + int(x), mask.top + int(y)


def points_to_input(points: NDArray[np.integer], frame: Frame) -> NDArray[np.float64]:
    """Pixels [K, 2], x y, of the original to the input frame of a whole image, not flipped.

    Source: `ResizeLongestSide.apply_coords` of segment_anything.
    """
    return np.asarray(points, dtype=np.float64).reshape(-1, 2) * (frame.scale_x, frame.scale_y)
