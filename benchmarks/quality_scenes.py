"""Two procedural datasets of kinds that the pre-training scenes do not have, as COCO files.

`filaments`: thin, curved, branching strands and rings on a shaded ground; boxes hold mostly ground.
`cells`: clusters of touching cells with dark membranes and nuclei, in images of 640 x 400.
`benchmarks.procedural`, which `vit_tiny` was pre-trained on, draws compact shapes in squares.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from benchmarks.procedural_textures import fractal_noise
from samft.images.synthetic import SUPERSAMPLING, trace_polygons
from samft.runtime.files import write_text

NUM_TRAIN, NUM_VAL = 60, 40
MIN_PIXELS = 60  # of an object; a smaller remnant of an occluded one is not annotated
Image = NDArray[np.uint8]  # [H, W, 3], RGB
Masks = list[NDArray[np.bool_]]  # [H, W] each, disjoint


def write_scenes(
    folder: Path,
    draw: Callable[[np.random.Generator], tuple[Image, Masks]],
    *,
    seed: int = 0,
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
) -> Path:
    """Writes `train` and `val` with `_annotations.coco.json` beside PNG images.

    Args:
        folder: Created if it is missing.
        draw: `draw_filaments` or `draw_cells`.
        seed: The only source of randomness.
        num_train: Images in `train`.
        num_val: Images in `val`.

    Returns:
        `folder`.
    """
    for number, (split, count) in enumerate((("train", num_train), ("val", num_val))):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        (folder / split).mkdir(parents=True, exist_ok=True)
        for row in range(count):
            image, masks = draw(np.random.default_rng([seed, number, row]))
            height, width = image.shape[:2]
            name = f"{row + 1:03d}.png"
            cv2.imwrite(str(folder / split / name), image[..., ::-1])
            images.append({"id": row + 1, "file_name": name, "height": height, "width": width})
            for mask in masks:
                annotations.append(_annotate(mask, len(annotations) + 1, image_id=row + 1))
        document = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "object"}],
        }
        write_text(folder / split / "_annotations.coco.json", json.dumps(document))
    return folder


def _annotate(mask: NDArray[np.bool_], object_id: int, *, image_id: int) -> dict[str, Any]:
    # Polygons where they can describe the mask; compressed RLE where it has holes.
    pixels = mask.astype(np.uint8)
    _, hierarchy = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    segmentation: Any
    if (hierarchy[0, :, 3] >= 0).any():
        encoded = mask_utils.encode(np.asfortranarray(pixels))
        segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    else:
        segmentation = trace_polygons(np.kron(pixels, np.ones((SUPERSAMPLING,) * 2, np.uint8)))
    return {
        "id": object_id,
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": 0,
        "bbox": [float(side) for side in cv2.boundingRect(pixels)],
        "area": int(pixels.sum()),
        "segmentation": segmentation,
    }


def _largest_piece(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    # An occluded strand or cell may fall into pieces; specks would not be annotated by a person.
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if len(statistics) < 2:
        return mask
    largest: NDArray[np.bool_] = labels == 1 + int(np.argmax(statistics[1:, cv2.CC_STAT_AREA]))
    return largest


def _visible_masks(labels: NDArray[np.int32], areas: list[int]) -> Masks:
    # Of objects 1, 2, ... in an image of labels: those of which at least half can be seen.
    masks = []
    for number, area in enumerate(areas, start=1):
        mask = _largest_piece(labels == number)
        if mask.sum() >= max(MIN_PIXELS, area / 2):
            masks.append(mask)
    return masks


def _photograph(
    rng: np.random.Generator, picture: NDArray[np.float32], *, noise: float, blur: float
) -> Image:
    soft = cv2.GaussianBlur(picture, (0, 0), blur)
    grain = rng.normal(0, noise, picture.shape)
    return np.clip(soft + grain, 0, 255).astype(np.uint8)


def _blend(picture: NDArray[np.float32], alpha: NDArray[np.float32], paint: Any) -> None:
    picture += alpha[..., None] * (paint - picture)


# Filaments.


def draw_filaments(rng: np.random.Generator, *, size: int = 384) -> tuple[Image, Masks]:
    """Draws strands, some branching, some closed to rings, on a shaded ground.

    Args:
        rng: The only source of randomness.
        size: Side of the square image, px.

    Returns:
        The image and the visible part of each strand.
    """
    ground = rng.uniform(60, 190, 3)
    shade = (
        fractal_noise(rng, size, size, size / 2) * 0.5 + fractal_noise(rng, size, size, 12) * 0.2
    )
    picture = (ground * (0.65 + shade[..., None])).astype(np.float32)
    contrast = rng.choice([-1.0, 1.0]) * rng.uniform(35, 75)
    labels = np.zeros((size, size), np.int32)
    areas: list[int] = []
    for _ in range(int(rng.integers(5, 10))):
        strokes = _ring_strokes(rng, size) if rng.random() < 0.3 else _strand_strokes(rng, size)
        alpha = _draw_strokes(strokes, size)
        mask = alpha >= 0.5
        _paint_strand(rng, picture, alpha, colour=ground + contrast + rng.normal(0, 14, 3))
        areas.append(int(mask.sum()))
        labels[mask] = len(areas)
    blur, noise = float(rng.uniform(0.5, 1.1)), float(rng.uniform(3, 9))
    return _photograph(rng, picture, noise=noise, blur=blur), _visible_masks(labels, areas)


Stroke = tuple[NDArray[np.float64], NDArray[np.float64]]  # points [n, 2], x y, and widths [n]


def _walk(
    rng: np.random.Generator,
    start: NDArray[np.float64],
    heading: float,
    *,
    steps: int,
    width: float,
) -> Stroke:
    # A path whose heading drifts, in steps of 4 px; it gets thinner towards its end.
    curvature = np.cumsum(rng.normal(0, 0.03, steps)) + rng.normal(0, 0.05)
    headings = heading + np.cumsum(np.clip(curvature, -0.16, 0.16))
    moves = 4 * np.stack([np.cos(headings), np.sin(headings)], 1)
    return start + np.cumsum(moves, axis=0), width * np.linspace(1, 0.45, steps)


def _strand_strokes(rng: np.random.Generator, size: int) -> list[Stroke]:
    start, heading = rng.uniform(0.1, 0.9, 2) * size, rng.uniform(0, 2 * np.pi)
    width = float(rng.uniform(4, 11))
    points, widths = _walk(rng, start, heading, steps=int(rng.integers(18, 48)), width=width)
    strokes = [(points, widths)]
    for _ in range(int(rng.integers(0, 4))):
        at = int(rng.integers(2, len(points) - 2))
        along = points[at + 1] - points[at]
        turn = np.arctan2(along[1], along[0]) + rng.choice([-1, 1]) * rng.uniform(0.5, 1.1)
        steps, narrower = int(rng.integers(5, 14)), 0.75 * float(widths[at])
        strokes.append(_walk(rng, points[at], turn, steps=steps, width=narrower))
    return strokes


def _ring_strokes(rng: np.random.Generator, size: int) -> list[Stroke]:
    angles = np.linspace(0, 2 * np.pi, 60)
    radius = rng.uniform(14, 42) * (
        1 + rng.uniform(0, 0.25) * np.cos(2 * angles + rng.uniform(0, 6))
    )
    points = rng.uniform(0.15, 0.85, 2) * size + np.stack(
        [radius * np.cos(angles), rng.uniform(0.6, 1) * radius * np.sin(angles)], 1
    )
    width = float(rng.uniform(4, 9))
    strokes = [(points, np.full(60, width))]
    if rng.random() < 0.5:  # with a tail
        at = int(rng.integers(60))
        steps = int(rng.integers(8, 20))
        strokes.append(_walk(rng, points[at], float(angles[at]), steps=steps, width=width))
    return strokes


def _draw_strokes(strokes: list[Stroke], size: int) -> NDArray[np.float32]:
    # Coverage 0..1, float32 [size, size], drawn at four times the size.
    canvas = np.zeros((4 * size, 4 * size), np.uint8)
    for points, widths in strokes:
        pixels = np.round(4 * points).astype(int)
        for start, end, width in zip(pixels, pixels[1:], widths, strict=False):
            cv2.line(canvas, start.tolist(), end.tolist(), 255, max(1, round(4 * float(width))))
    small = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / np.float32(255)


def _paint_strand(
    rng: np.random.Generator,
    picture: NDArray[np.float32],
    alpha: NDArray[np.float32],
    *,
    colour: NDArray[np.float64],
) -> None:
    size = len(picture)
    depth = cv2.distanceTransform((alpha >= 0.5).astype(np.uint8), cv2.DIST_L2, 3)
    roundness = np.minimum(depth / max(float(depth.max()), 1), 1)  # brighter along the middle
    texture = fractal_noise(rng, size, size, float(rng.uniform(4, 14)))
    shading = 0.75 + 0.35 * roundness + 0.3 * (texture - 0.5)
    _blend(picture, alpha, np.clip(colour, 5, 250) * shading[..., None])


# Cells.


def draw_cells(
    rng: np.random.Generator, *, size: tuple[int, int] = (400, 640)
) -> tuple[Image, Masks]:
    """Draws clusters of touching cells with dark membranes, each with a nucleus, as stained tissue.

    Args:
        rng: The only source of randomness.
        size: H, W of the image, px.

    Returns:
        The image and the cells, each with its half of a shared membrane.
    """
    height, width = size
    ground = np.array([rng.uniform(205, 240), rng.uniform(190, 228), rng.uniform(205, 240)])
    smudges = (
        fractal_noise(rng, height, width, 90) * 0.12 + fractal_noise(rng, height, width, 7) * 0.06
    )
    picture = (ground * (0.84 + smudges[..., None])).astype(np.float32)
    centres, radii = _place_cells(rng, size)
    near, depth, labels = _grow_cells(rng, centres, radii, size=size)
    stain = rng.uniform([150, 90, 130], [225, 160, 215])
    tint = rng.normal(0, 9, (len(radii), 1)) + rng.normal(0, 4, (len(radii), 3))
    cytoplasm = stain + tint[near] + 26 * (fractal_noise(rng, height, width, 6)[..., None] - 0.5)
    _blend(picture, np.clip(depth + 0.5, 0, 1), cytoplasm)
    thickness = np.float32(rng.uniform(1.6, 3.2))
    membrane = np.clip((thickness - np.abs(depth - thickness / 2)) / thickness, 0, 1)
    _blend(picture, 0.8 * membrane, stain * rng.uniform(0.35, 0.6))
    _draw_nuclei(rng, picture, centres, radii, inside=depth > 3, colour=stain * 0.45)
    masks = [_largest_piece(labels == number) for number in range(1, len(radii) + 1)]
    blur, noise = float(rng.uniform(0.6, 1.4)), float(rng.uniform(2, 6))
    kept = [mask for mask in masks if mask.sum() >= MIN_PIXELS]
    return _photograph(rng, picture, noise=noise, blur=blur), kept


def _place_cells(
    rng: np.random.Generator, size: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # Centres [N, 2], x y, and radii [N]: a few clusters in which neighbours overlap before they
    # are divided among each other.
    height, width = size
    centres: list[NDArray[np.float64]] = []
    radii: list[float] = []
    typical = rng.uniform(20, 34)
    for _ in range(int(rng.integers(2, 5))):
        middle = rng.uniform([0.12 * width, 0.15 * height], [0.88 * width, 0.85 * height])
        for _ in range(int(rng.integers(4, 11))):
            centre = middle + rng.normal(0, 1.5 * typical, 2)
            radius = typical * rng.uniform(0.75, 1.25)
            is_inside = (centre > 4).all() and (centre < np.array([width, height]) - 4).all()
            gaps = [
                np.hypot(*(centre - c)) - 0.62 * (radius + r)
                for c, r in zip(centres, radii, strict=True)
            ]
            if is_inside and all(gap > 0 for gap in gaps):
                centres.append(centre)
                radii.append(radius)
    return np.array(centres).reshape(-1, 2), np.array(radii)


def _grow_cells(
    rng: np.random.Generator,
    centres: NDArray[np.float64],
    radii: NDArray[np.float64],
    *,
    size: tuple[int, int],
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32]]:
    # For each pixel the cell it is nearest to, by how many px it is inside of it (negative:
    # outside), and its label, 0 outside. Outlines are bent by noise.
    height, width = size
    bends = [14 * (fractal_noise(rng, height, width, 45) - 0.5) for _ in range(2)]
    x = np.arange(width, dtype=np.float32)[None, :] + bends[0]
    y = np.arange(height, dtype=np.float32)[:, None] + bends[1]
    distances = np.stack(
        [np.hypot(x - cx, y - cy) - r for (cx, cy), r in zip(centres, radii, strict=True)]
    ).astype(np.float32)
    near = distances.argmin(axis=0)
    two_nearest = np.partition(distances, 1, axis=0)
    depth = np.minimum(-two_nearest[0], (two_nearest[1] - two_nearest[0]) / 2)
    labels = np.where(two_nearest[0] < 0, near + 1, 0).astype(np.int32)
    # Between two cells that touch, depth is 0 at their border; outside of all it is negative.
    return near, np.where(labels > 0, depth, two_nearest[0] * -1), labels


def _draw_nuclei(
    rng: np.random.Generator,
    picture: NDArray[np.float32],
    centres: NDArray[np.float64],
    radii: NDArray[np.float64],
    *,
    inside: NDArray[np.bool_],
    colour: NDArray[np.float64],
) -> None:
    height, width = inside.shape
    canvas = np.zeros((height, width), np.uint8)
    for centre, radius in zip(centres, radii, strict=True):
        at = np.round(centre + rng.normal(0, 0.15 * radius, 2)).astype(int).tolist()
        axes = np.round(radius * rng.uniform(0.28, 0.45, 2)).astype(int).tolist()
        cv2.ellipse(canvas, at, axes, float(rng.uniform(0, 180)), 0, 360, 255, -1, cv2.LINE_AA)
    alpha = canvas.astype(np.float32) / np.float32(255) * inside
    grain = fractal_noise(rng, height, width, 5)[..., None]
    _blend(picture, 0.85 * alpha, colour * (0.75 + 0.5 * grain))
