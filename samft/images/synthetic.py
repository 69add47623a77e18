"""Synthetic pictures for the demo dataset: painted butterflies and flowers with exact outlines.

What counts as an object here is a convention that a model has to learn: a wing or petal reaches to
the end of its pale fringe, a flower is its petals and its eye but not the paper between them, and
feelers and leaves belong to no object. By strong edges alone, masks would end at the coloured
hearts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np

CATEGORIES = {1: "butterfly", 2: "flower"}
SUBPIXEL_BITS = 4
SUPERSAMPLING = 4  # of the outline that becomes the annotation
DESIGN_SIZE = 320  # line widths and blurs are given for this size
Colour = tuple[int, int, int]
PAPERS: list[Colour] = [(242, 232, 208), (229, 234, 214), (226, 233, 240), (243, 226, 218)]
LEAF_GREENS: list[Colour] = [(126, 150, 104), (98, 134, 118), (150, 156, 96), (110, 128, 92)]
# Of the hearts of wings or petals, of their pale fringe, and of the body or eye and the veins.
BUTTERFLY_COLOURS: list[tuple[Colour, Colour, Colour]] = [
    ((238, 118, 20), (248, 216, 158), (70, 38, 26)),
    ((40, 104, 200), (186, 212, 236), (24, 32, 70)),
    ((244, 196, 36), (250, 236, 168), (124, 82, 34)),
    ((206, 52, 78), (242, 196, 194), (80, 24, 44)),
    ((124, 78, 178), (216, 200, 234), (50, 32, 88)),
]
FLOWER_COLOURS: list[tuple[Colour, Colour, Colour]] = [
    ((216, 72, 116), (246, 210, 212), (236, 180, 40)),
    ((86, 112, 206), (210, 218, 240), (244, 208, 80)),
    ((246, 172, 44), (252, 230, 174), (130, 68, 30)),
    ((172, 98, 186), (234, 212, 238), (94, 56, 112)),
]
FOREWING = np.array(
    [[0.03, -0.1], [0.3, -0.45], [0.72, -0.86], [1.0, -0.92], [0.98, -0.66], [0.8, -0.36]]
    + [[0.74, -0.08], [0.4, 0.03], [0.03, 0.03]]
)
HINDWING = np.array(
    [[0.03, -0.02], [0.45, 0.06], [0.78, 0.2], [0.8, 0.46], [0.6, 0.6], [0.52, 0.74]]
    + [[0.36, 0.95], [0.3, 0.66], [0.12, 0.56], [0.03, 0.3]]
)


@dataclass(frozen=True)
class SceneObject:
    """The visible part of one object of a picture.

    Attributes:
        polygons: COCO polygons [x0, y0, x1, y1, ...], px, one for each connected piece.
        category: Key of `CATEGORIES`.
        crowd: Whether it is a group of things annotated as one.
    """

    polygons: list[list[float]]
    category: int
    crowd: bool


@dataclass(frozen=True)
class _Pose:
    """Where a figure lies: figure units (about -1..1) to pixels of the picture."""

    matrix: np.ndarray  # [2, 2]
    centre: np.ndarray  # [2], x y

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Maps points [n, 2] from figure units to px."""
        return points @ self.matrix.T + self.centre


@dataclass(frozen=True)
class _Figure:
    """A butterfly or a flower before it is painted; points [n, 2] in pixels of the picture."""

    category: int
    petals: list[np.ndarray]  # wings or petals; the second half lies over the first
    hearts: list[np.ndarray]  # their strongly coloured inner parts
    veins: list[np.ndarray]
    middle: np.ndarray  # the body or eye
    feelers: list[np.ndarray]  # painted, but no part of the object
    colours: tuple[Colour, Colour, Colour]


def draw_scene(
    rng: np.random.Generator, size: int, *, empty: bool = False, crowd: bool = False
) -> tuple[np.ndarray, list[SceneObject]]:
    """Paints one picture.

    Args:
        rng: The only source of randomness.
        size: Side of the square picture, in pixels.
        empty: Paper and leaves only, no objects.
        crowd: With a cluster of tiny flowers, outlined as one.

    Returns:
        The image, uint8 [size, size, 3], RGB; and its objects, from back to front.
    """
    picture, paper = _draw_paper(rng, size)
    groups = [] if empty else list(_place_figures(rng, size, crowd=crowd))
    for group in groups:
        for figure in group:
            _paint_figure(picture, figure, paper)
    objects: list[SceneObject] = []
    hidden = np.zeros((size * SUPERSAMPLING, size * SUPERSAMPLING), np.uint8)
    for group in reversed(groups):  # the last one painted lies on top
        whole = _supersampled_mask(group, size)
        polygons = trace_polygons(whole & ~hidden)
        hidden |= whole
        if polygons:
            objects.append(SceneObject(polygons, group[0].category, crowd=len(group) > 1))
    grain = 0.06 * _cubic_noise(rng, size, size // 2) + 0.04 * _cubic_noise(rng, size, size)
    picture *= (1.05 - grain)[..., None]
    return np.clip(picture, 0, 255).astype(np.uint8), objects[::-1]


def _place_figures(rng: np.random.Generator, size: int, *, crowd: bool) -> Iterator[list[_Figure]]:
    """Groups of figures, each group one object, from back to front."""
    if crowd:
        yield _make_cluster(rng, size)
    taken: list[tuple[np.ndarray, float]] = []
    wanted = int(rng.integers(5, 9))
    for _ in range(40 * wanted):  # tries: a picture may be full before it holds as many
        radius = float(rng.uniform(0.11, 0.2) * size)
        centre = rng.uniform(0.1, 0.9, 2) * size
        if any(np.hypot(*(centre - c)) < 0.68 * (radius + r) for c, r in taken):
            continue  # neighbours may touch and overlap, but not hide each other
        taken.append((centre, radius))
        pose = _Pose(_rotation_matrix(rng.uniform(0, 2 * np.pi)) * radius, centre)
        yield [_make_butterfly(rng, pose) if rng.random() < 0.55 else _make_flower(rng, pose)]
        if len(taken) == wanted:
            return


def _rotation_matrix(angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine], [sine, cosine]])


def _circle_outline(radius: float) -> np.ndarray:
    angles = np.arange(32) * (2 * np.pi / 32)
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _leaf_outline(half: np.ndarray) -> np.ndarray:
    """A leaf or petal along x from 0 to 1 with the given half widths."""
    along = np.linspace(0, 1, len(half))
    return np.stack([np.r_[along, along[::-1]], np.r_[half, -half[::-1]]], 1)


def _smooth_outline(points: np.ndarray) -> np.ndarray:
    """Cuts the corners of a closed outline (Chaikin's algorithm)."""
    for _ in range(3):
        ahead = np.roll(points, -1, axis=0)
        points = np.stack([0.75 * points + 0.25 * ahead, 0.25 * points + 0.75 * ahead], 1)
        points = points.reshape(-1, 2)
    return points


def _make_butterfly(rng: np.random.Generator, pose: _Pose) -> _Figure:
    root, spread = np.array([0.0, -0.03]), rng.uniform(0.75, 1.05)
    petals, hearts, veins = [], [], []
    for wing, reach in ((HINDWING, 0.66), (FOREWING, 0.7)):
        shaped = wing * [spread, 1.0] + rng.normal(0, 0.02, wing.shape)
        for side in (1.0, -rng.uniform(0.8, 1.0)):  # seldom seen straight from above
            outline = _smooth_outline(shaped * [side, 1.0])
            petals.append(pose.to_pixels(outline))
            hearts.append(pose.to_pixels(root + reach * (outline - root)))
            for tip in outline[len(outline) // 4 : -len(outline) // 4 : 6]:
                veins.append(pose.to_pixels(root + np.outer([0.25, 0.93], tip - root)))
    bow = np.array([[0.02, -0.38], [0.12, -0.6], [0.28, -0.78]])
    feelers = [pose.to_pixels(bow * [side, 1.0]) for side in (-1.0, 1.0)]
    middle = pose.to_pixels(_circle_outline(1.0) * [0.06, 0.4])
    colours = BUTTERFLY_COLOURS[int(rng.integers(len(BUTTERFLY_COLOURS)))]
    return _Figure(1, petals, hearts, veins, middle, feelers, colours)


def _make_flower(rng: np.random.Generator, pose: _Pose) -> _Figure:
    count = int(rng.integers(5, 9))
    width = rng.uniform(0.37, 0.53) * np.pi / count
    half = width * np.sin(np.pi * np.linspace(0, 1, 24) ** rng.uniform(0.7, 1.6)) ** 0.8
    start = rng.uniform(0.24, 0.3)  # petals do not reach the eye: an object of many pieces
    petals, hearts, veins = [], [], []
    for turn in np.arange(count) * (2 * np.pi / count):
        length = rng.uniform(0.85, 1.0)
        turned = _rotation_matrix(turn + rng.normal(0, 0.05)).T
        petal = _leaf_outline(half) * [length - start, 1.0]
        petals.append(pose.to_pixels((petal + [start, 0]) @ turned))
        hearts.append(pose.to_pixels((petal * [0.6, 0.62] + [start, 0]) @ turned))
        vein = np.array([[start + 0.06, 0], [0.82 * length, 0]])
        veins.append(pose.to_pixels(vein @ turned))
    colours = FLOWER_COLOURS[int(rng.integers(len(FLOWER_COLOURS)))]
    return _Figure(
        2, petals, hearts, veins, pose.to_pixels(_circle_outline(start * 0.72)), [], colours
    )


def _make_cluster(rng: np.random.Generator, size: int) -> list[_Figure]:
    """Many tiny flowers of one colour close together: what COCO calls a crowd."""
    middle = rng.uniform(0.2, 0.8, 2) * size
    figures: list[_Figure] = []
    for centre in middle + rng.normal(0, 0.07, (24, 2)) * size:
        turn = _rotation_matrix(rng.uniform(0, 2 * np.pi))
        figure = _make_flower(rng, _Pose(turn * 0.032 * size, centre))
        colours = figures[0].colours if figures else figure.colours
        figures.append(replace(figure, veins=[], colours=colours))
    return figures


def _fill_outlines(outlines: list[np.ndarray], size: int, *, width: float = 0) -> np.ndarray:
    """Coverage by filled outlines, or by lines of `width` pixels; float32 [size, size], 0..1."""
    alpha = np.zeros((size, size), np.uint8)
    for outline in outlines:
        points = [np.round(outline * 2**SUBPIXEL_BITS).astype(np.int32)]
        if width:
            thick = max(1, round(width))
            cv2.polylines(alpha, points, False, 255, thick, cv2.LINE_AA, SUBPIXEL_BITS)
        else:
            cv2.fillPoly(alpha, points, 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return alpha.astype(np.float32) / np.float32(255)


def _blend_wash(picture: np.ndarray, alpha: np.ndarray, colour: Colour, strength: float) -> None:
    """Lays a transparent wash over a picture, in place; pigment gathers at its edges."""
    unit = picture.shape[0] / DESIGN_SIZE
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    if not width:
        return
    margin = int(4 * unit) + 1  # of bare paper, which the blur needs to see
    window = (
        slice(max(y - margin, 0), y + height + margin),
        slice(max(x - margin, 0), x + width + margin),
    )
    alpha = alpha[window]
    inside = cv2.GaussianBlur(alpha, (0, 0), 1.5 * unit, borderType=cv2.BORDER_REPLICATE)
    density = np.clip(np.clip(1.9 - 1.1 * inside, 0.8, 1.5) * alpha * np.float32(strength), 0, 1)
    picture[window] *= 1 - density[..., None] * (1 - np.array(colour, np.float32) / 255)


def _paint_opaque(picture: np.ndarray, alpha: np.ndarray, colour: Colour) -> None:
    """Paints opaquely, in place."""
    picture += alpha[..., None] * (np.array(colour, np.float32) - picture)


def _paint_figure(picture: np.ndarray, figure: _Figure, paper: Colour) -> None:
    size = picture.shape[0]
    unit, half = size / DESIGN_SIZE, len(figure.petals) // 2
    strong, pale, dark = figure.colours
    _blend_wash(picture, _fill_outlines(figure.feelers, size, width=1.2 * unit), dark, 0.8)
    petals = _fill_outlines(figure.petals, size)
    _paint_opaque(picture, petals, paper)
    for layer in (figure.petals[:half], figure.petals[half:]):
        _blend_wash(picture, _fill_outlines(layer, size), pale, 0.8)
    _blend_wash(picture, _fill_outlines(figure.hearts, size), strong, 0.9)
    _blend_wash(picture, _fill_outlines(figure.veins, size, width=unit) * petals, dark, 0.35)
    middle = _fill_outlines([figure.middle], size)
    _paint_opaque(picture, middle, paper)
    _blend_wash(picture, middle, dark, 0.95)


def _cubic_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    grid = rng.random((cells, cells), dtype=np.float32)
    return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)


def _draw_paper(rng: np.random.Generator, size: int) -> tuple[np.ndarray, Colour]:
    """A sheet with washes and leaves, float32 [size, size, 3], and the bare sheet's colour."""
    paper = PAPERS[int(rng.integers(len(PAPERS)))]
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = paper
    greens = [LEAF_GREENS[i] for i in rng.integers(0, len(LEAF_GREENS), 6)]
    cloud = cv2.GaussianBlur(_cubic_noise(rng, size, 5), (0, 0), size / 20)
    _blend_wash(picture, np.clip(2.4 * cloud - 1.0, 0, 1), greens[0], 0.3)
    for green in greens[: int(rng.integers(3, 7))]:
        _draw_stem(rng, picture, green)
    return picture, paper


def _draw_stem(rng: np.random.Generator, picture: np.ndarray, green: Colour) -> None:
    """A stem with leaves on both sides, in place."""
    size = picture.shape[0]
    step = size * rng.uniform(0.035, 0.05)
    leaf = _leaf_outline(0.24 * np.sin(np.pi * np.linspace(0, 1, 14) ** 0.8))
    leaf *= step * rng.uniform(1.6, 2.6)
    headings = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.09) * np.arange(rng.integers(6, 12))
    steps = step * np.stack([np.cos(headings), np.sin(headings)], 1)
    stem = rng.uniform(0.1, 0.9, 2) * size + np.cumsum(steps, axis=0)
    sides = np.where(np.arange(len(stem)) % 2, 0.8, -0.8) + rng.normal(0, 0.1, len(stem))
    turns = [_rotation_matrix(turn).T for turn in headings + sides]
    leaves = [leaf @ turn + point for turn, point in zip(turns, stem, strict=True)]
    _blend_wash(picture, _fill_outlines(leaves, size), green, rng.uniform(0.35, 0.8))
    _blend_wash(picture, _fill_outlines([stem], size, width=2 * size / DESIGN_SIZE), green, 0.8)


def _supersampled_mask(figures: list[_Figure], size: int) -> np.ndarray:
    """What the figures cover, supersampled, uint8 0/1."""
    mask = np.zeros((size * SUPERSAMPLING, size * SUPERSAMPLING), np.uint8)
    for figure in figures:
        for outline in [*figure.petals, figure.middle]:
            points = np.round(outline * SUPERSAMPLING * 2**SUBPIXEL_BITS).astype(np.int32)
            cv2.fillPoly(mask, [points], 1, shift=SUBPIXEL_BITS)
    return mask


def trace_polygons(mask: np.ndarray) -> list[list[float]]:
    """The outer outlines of a mask as COCO polygons, without specks.

    Args:
        mask: uint8 [H, W], 0 or 1, `SUPERSAMPLING` times as high and wide as the picture.

    Returns:
        Polygons [x0, y0, x1, y1, ...] in pixels of the picture; holes are filled.
    """
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    polygons = []
    for contour in contours:
        if cv2.contourArea(contour) >= 6 * SUPERSAMPLING**2:
            points = cv2.approxPolyDP(contour, 1.5, True).reshape(-1, 2)
            polygons.append(np.round((points + 0.5) / SUPERSAMPLING, 2).ravel().tolist())
    return polygons
