"""Endless drawn images with exact masks, to pre-train a small SAM from nothing.

`make_scene(seed)` is a pure function of its arguments. What it aims for is variety rather than
beauty: a model that has seen only these must find its way on photographs, micrographs and dense
crops. So inner edges are often no object borders, background edges never are, contrast is often
low, things overlap, and the camera is bad.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np

SUBPIXEL_BITS = 4
MIN_VISIBLE_PIXELS = 40  # of an object at size 256; scales with the image's area
MIN_CONTRAST = 14.0  # between the mean colours of an object and of what it covers, of 255
MIN_VISIBLE_SHARE = 0.12  # of the object's own area: a smaller rest says nothing about the object
_GAUSSIAN_OF_BYTE = (
    np.sort(np.random.default_rng(0).standard_normal(256 * 64)).reshape(256, 64).mean(1)
).astype(np.float32)


@dataclass(frozen=True)
class Scene:
    """One image and what is to be found in it; frame: the image, pixels.

    Attributes:
        image: uint8 [size, size, 3], RGB.
        masks: uint8 [K, size, size], 0 or 1, the visible part of each object; disjoint; K >= 1.
        boxes: float32 [K, 4], x0 y0 x1 y1, tight around the visible part, x1 and y1 exclusive.
    """

    image: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Part:
    """A piece of a shape, in shape units (the whole shape has a longer side of 2, centre 0, 0).

    Attributes:
        contours: float [n, 2] point lists; filled by the even-odd rule, or stroked.
        width: stroke width in shape units; 0 fills.
    """

    contours: list[np.ndarray]
    width: float = 0.0


@dataclass(frozen=True)
class Style:
    """How the objects of one kind look; colours are float [3], 0..255."""

    colour: np.ndarray
    spread: float  # how far the texture's colours lie from `colour`
    texture: int
    second_colour: np.ndarray
    pattern: str  # "plain", "parts", "core", "patch": inner edges that are no object borders
    opacity: float
    border_blur: float  # pixels at size 256
    rim: float  # strength of an outline, negative is dark
    relief: float  # strength of the shading that makes it look round
    highlight: float
    shadow: float


@dataclass(frozen=True)
class Light:
    """What is common to all objects of a scene."""

    direction: np.ndarray  # float [2], unit vector towards the light
    shadow_offset: float  # pixels at size 256
    shadow_blur: float  # pixels at size 256


@dataclass(frozen=True)
class Drawn:
    """An object's place in the image: its window and its coverage there."""

    rows: slice
    columns: slice
    alpha: np.ndarray  # uint8 [h, w], 0..255, antialiased
    part_alphas: list[np.ndarray]


def make_scene(seed: int, *, size: int = 256, max_objects: int = 8) -> Scene:
    """Draws one scene.

    Args:
        seed: Any non-negative integer; the only source of randomness.
        size: Side of the square image, in pixels.
        max_objects: The most objects that are annotated (some crops hold more of a kind).

    Returns:
        The scene, with between 1 and `max_objects` objects.
    """
    attempt = 0
    while True:
        rng = np.random.default_rng([seed, attempt])
        scene = _try_scene(rng, size, max_objects)
        if len(scene.masks):
            return scene
        attempt += 1


def _try_scene(rng: np.random.Generator, size: int, max_objects: int) -> Scene:
    angle = rng.uniform(0, 2 * np.pi)
    light = Light(
        direction=np.array([np.cos(angle), np.sin(angle)]),
        shadow_offset=rng.uniform(1, 8),
        shadow_blur=rng.uniform(0.7, 5),
    )
    base = _random_colour(rng)
    image = _background(rng, base, size)
    labels = np.zeros((size, size), np.int16)
    areas = [0]
    draw = _draw_crowd if rng.random() < 0.25 else _draw_mixture
    for drawn in draw(rng, image, base=base, light=light, count=max_objects):
        inside = drawn.alpha >= 128
        labels[drawn.rows, drawn.columns][inside] = len(areas)
        areas.append(int(np.count_nonzero(inside)))
    masks, boxes = _visible(labels, areas)
    if len(masks) > max_objects:
        kept = np.sort(rng.choice(len(masks), max_objects, replace=False))
        masks, boxes = masks[kept], boxes[kept]
    return Scene(image=_camera(rng, image), masks=masks, boxes=boxes)


def _visible(labels: np.ndarray, areas: list[int]) -> tuple[np.ndarray, np.ndarray]:
    size = labels.shape[0]
    least = MIN_VISIBLE_PIXELS * (size / 256) ** 2
    counts = np.bincount(labels.ravel(), minlength=len(areas))
    masks, boxes = [], []
    for label in range(1, len(areas)):
        if counts[label] < max(least, MIN_VISIBLE_SHARE * areas[label]):
            continue
        mask = (labels == label).astype(np.uint8)
        x, y, width, height = cv2.boundingRect(mask)
        masks.append(mask)
        boxes.append((x, y, x + width, y + height))
    if not masks:
        return np.zeros((0, size, size), np.uint8), np.zeros((0, 4), np.float32)
    return np.stack(masks), np.array(boxes, np.float32)


# Shapes: each returns parts in arbitrary units, which `_normalised` brings to a longer side of 2.


def _polar(radii: np.ndarray) -> np.ndarray:
    angles = np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _polygon(rng: np.random.Generator) -> list[Part]:
    count = int(rng.integers(3, 10))
    angles = np.sort((np.arange(count) + rng.uniform(-0.4, 0.4, count)) * 2 * np.pi / count)
    radii = rng.uniform(rng.uniform(0.25, 1), 1, count)
    return [Part([np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)])]


def _star(rng: np.random.Generator) -> list[Part]:
    count = int(rng.integers(3, 12))
    radii = np.ones(2 * count)
    radii[1::2] = rng.uniform(0.25, 0.75)
    return [Part([_polar(radii * rng.uniform(0.85, 1, 2 * count))])]


def _superellipse(rng: np.random.Generator) -> list[Part]:
    power = rng.choice([2.0, 2.0, 3.0, 5.0, 30.0])
    angles = np.arange(48) * (2 * np.pi / 48) + np.pi / 4
    cosine, sine = np.cos(angles), np.sin(angles)
    radii = (np.abs(cosine) ** power + np.abs(sine) ** power) ** (-1 / power)
    points = np.stack([radii * cosine, radii * sine], 1)
    points[:, 0] *= 1 + rng.uniform(-0.5, 0.5) * (rng.random() < 0.4) * points[:, 1]  # taper
    return [Part([points])]


def _blob_radii(rng: np.random.Generator, roughness: float, count: int = 72) -> np.ndarray:
    angles = np.arange(count) * (2 * np.pi / count)
    orders = np.arange(2, 9)
    sizes = rng.normal(0, roughness, 7) / (orders - 0.5)
    waves = np.cos(orders[:, None] * angles + rng.uniform(0, 2 * np.pi, (7, 1)))
    return np.clip(1 + sizes @ waves, 0.2, None)


def _blob(rng: np.random.Generator) -> list[Part]:
    return [Part([_polar(_blob_radii(rng, rng.uniform(0.1, 0.9)))])]


def _lobed(rng: np.random.Generator) -> list[Part]:
    angles = np.arange(120) * (2 * np.pi / 120)
    lobes = int(rng.integers(3, 9))
    wave = np.abs(np.cos(lobes * angles / 2)) ** rng.uniform(0.5, 2)
    radii = rng.uniform(0.2, 0.6) + wave * (1 + 0.3 * np.cos(angles))
    teeth = rng.uniform(0, 0.15) * np.abs(np.sin(angles * lobes * rng.integers(2, 5)))
    return [Part([_polar(radii * (1 - teeth))])]


def _leaf(rng: np.random.Generator) -> list[Part]:
    along = np.linspace(0, 1, 48)
    teeth = int(rng.integers(4, 12))
    saw = 1 - rng.uniform(0, 0.7) * ((along * teeth) % 1.0)
    half = np.sin(np.pi * along ** rng.uniform(0.6, 1.4)) * saw * rng.uniform(0.2, 0.7)
    spine = rng.uniform(-0.6, 0.6) * np.sin(np.pi * along)
    upper, lower = spine + half, spine - half
    outline = np.stack([np.r_[along, along[::-1]] * 2, np.r_[upper, lower[::-1]]], 1)
    parts = [Part([outline])]
    if rng.random() < 0.5:
        stem = np.array([[0.05, 0.0], [-rng.uniform(0.2, 0.6), rng.uniform(-0.2, 0.2)]])
        parts.append(Part([stem], width=rng.uniform(0.05, 0.12)))
    return parts


def _ring(rng: np.random.Generator) -> list[Part]:
    radii = _blob_radii(rng, rng.uniform(0, 0.5))
    inner = radii * rng.uniform(0.35, 0.8)
    return [Part([_polar(radii), _polar(inner) + rng.uniform(-0.08, 0.08, 2)])]


def _holed(rng: np.random.Generator) -> list[Part]:
    contours = [_polar(_blob_radii(rng, 0.3))]
    for place in np.array([[0.45, 0], [-0.25, 0.4], [-0.25, -0.4]])[: rng.integers(1, 4)]:
        contours.append(_polar(_blob_radii(rng, 0.3, 24) * rng.uniform(0.12, 0.3)) + place)
    return [Part(contours)]


def _crescent(rng: np.random.Generator) -> list[Part]:
    half = rng.uniform(0.5, 0.85) * np.pi
    sweep = np.linspace(-half, half, 40)
    depth = rng.uniform(0.3, 0.9)
    outer = np.stack([np.cos(sweep), np.sin(sweep)], 1)
    inner = outer[::-1].copy()
    inner[:, 0] -= depth * (np.cos(sweep[::-1]) - np.cos(half))
    return [Part([np.concatenate([outer, inner])])]


def _curve(rng: np.random.Generator, count: int = 32) -> np.ndarray:
    turns = np.cumsum(rng.normal(0, 0.12)) + np.cumsum(rng.normal(0, 0.13, count))
    heading = rng.uniform(0, 2 * np.pi) + turns + np.arange(count) * rng.normal(0, 0.06)
    return np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1), 0)


def _stroke(rng: np.random.Generator) -> list[Part]:
    points = _curve(rng)
    points = 2 * points / np.ptp(points, axis=0).max()
    return [Part([points], width=rng.uniform(0.08, 0.4))]


def _glyph(rng: np.random.Generator) -> list[Part]:
    nodes = rng.integers(0, 3, (int(rng.integers(2, 5)), 2, 2)) - 1.0
    nodes[1:, 0] = nodes[:-1, 1]  # each stroke goes on where the last one ended
    nodes[:, 1] += 1.0 * (np.abs(nodes[:, 0] - nodes[:, 1]).sum(1, keepdims=True) == 0)
    width = rng.uniform(0.2, 0.5)
    parts = [Part([nodes.reshape(-1, 2)], width=width)]
    if rng.random() < 0.4:
        parts.append(Part([_polar(np.full(32, 0.6)) + nodes[0, 0] * 0.5], width=width))
    return parts


def _creature(rng: np.random.Generator) -> list[Part]:
    body = _polar(_blob_radii(rng, 0.25)) * np.array([1.0, rng.uniform(0.35, 0.7)])
    parts = [Part([body])]
    width = rng.uniform(0.08, 0.25)
    for start in np.linspace(-0.75, 0.75, int(rng.integers(2, 6))):
        knee = np.array([start + rng.uniform(-0.2, 0.2), rng.uniform(0.5, 0.9)])
        foot = knee + np.array([rng.uniform(-0.2, 0.2), rng.uniform(0.2, 0.6)])
        parts.append(Part([np.stack([np.array([start, 0.0]), knee, foot])], width=width))
    if rng.random() < 0.7:
        head = _polar(_blob_radii(rng, 0.2, 40)) * rng.uniform(0.25, 0.5)
        parts.append(Part([head + np.array([1.0, -rng.uniform(0.1, 0.7)])]))
    return parts


def _compound(rng: np.random.Generator) -> list[Part]:
    simple: list[Callable[[np.random.Generator], list[Part]]] = [_superellipse, _blob, _polygon]
    parts = list(simple[int(rng.integers(3))](rng))
    for _ in range(int(rng.integers(1, 4))):
        extra = simple[int(rng.integers(3))](rng)[0].contours[0]
        extra = extra * rng.uniform(0.25, 0.7, 2)
        angle = rng.uniform(0, 2 * np.pi)
        place = np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(0.7, 1.1)
        parts.append(Part([extra + place]))
    return parts


def _plant(rng: np.random.Generator) -> list[Part]:
    stem = _curve(rng, 16)
    stem = 2 * stem / np.linalg.norm(stem[-1] - stem[0])
    parts = [Part([stem], width=rng.uniform(0.05, 0.15))]
    for node in range(3, 16, int(rng.integers(2, 5))):
        for side in (-1.0, 1.0):
            outline = _leaf(rng)[0].contours[0] * rng.uniform(0.25, 0.5)
            ahead = stem[node] - stem[node - 1]
            heading = np.arctan2(ahead[1], ahead[0]) + side * rng.uniform(0.5, 1.2)
            parts.append(Part([outline @ _rotation(heading).T + stem[node]]))
    return parts


_SHAPES: list[tuple[Callable[[np.random.Generator], list[Part]], float]] = [
    (_polygon, 1.5),
    (_star, 1.0),
    (_superellipse, 2.5),
    (_blob, 2.5),
    (_lobed, 1.0),
    (_leaf, 1.5),
    (_ring, 0.6),
    (_holed, 0.6),
    (_crescent, 0.8),
    (_stroke, 1.3),
    (_glyph, 0.8),
    (_creature, 1.5),
    (_compound, 2.0),
    (_plant, 0.6),
]
_SHAPE_SHARES = np.array([weight for _, weight in _SHAPES]) / sum(w for _, w in _SHAPES)


def _rotation(angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine], [sine, cosine]])


def _random_shape(rng: np.random.Generator) -> list[Part]:
    make, _ = _SHAPES[int(rng.choice(len(_SHAPES), p=_SHAPE_SHARES))]
    squeeze = np.diag([1.0, np.exp(rng.uniform(-1.0, 0.0))]) if rng.random() < 0.5 else np.eye(2)
    tilt = 0.0 if rng.random() < 0.25 else rng.uniform(0, 2 * np.pi)  # upright things are common
    matrix = _rotation(tilt) @ squeeze @ _rotation(rng.uniform(0, 2 * np.pi))
    parts = [replace(part, contours=[c @ matrix.T for c in part.contours]) for part in make(rng)]
    return _normalised(parts)


def _normalised(parts: list[Part]) -> list[Part]:
    points = np.concatenate([contour for part in parts for contour in part.contours])
    low, high = points.min(0), points.max(0)
    scale = 2 / max(float((high - low).max()), 1e-6)
    centre = (low + high) / 2
    return [Part([(c - centre) * scale for c in p.contours], p.width * scale) for p in parts]


def _draw_shape(parts: list[Part], matrix: np.ndarray, *, centre: np.ndarray, size: int) -> Drawn:
    """Draws the parts, mapped by `matrix` [2, 2] (shape units to pixels) and moved to `centre`."""
    placed = [[c @ matrix.T + centre for c in part.contours] for part in parts]
    scale = float(np.sqrt(abs(np.linalg.det(matrix))))
    widths = [max(2, round(part.width * scale)) if part.width else 0 for part in parts]
    points = np.concatenate([contour for contours in placed for contour in contours])
    margin = 2 + max(widths) / 2
    low = np.clip(np.floor(points.min(0) - margin), 0, size - 1).astype(int)
    high = np.clip(np.ceil(points.max(0) + margin), low + 1, size).astype(int)
    alphas = []
    for contours, width in zip(placed, widths, strict=True):
        alpha = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
        fixed = [np.round((c - low) * 2**SUBPIXEL_BITS).astype(np.int32) for c in contours]
        if width:
            cv2.polylines(
                alpha, fixed, False, 255, width, lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS
            )
        else:
            cv2.fillPoly(alpha, fixed, 255, lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS)
        alphas.append(alpha)
    whole = alphas[0].copy()
    for alpha in alphas[1:]:
        np.maximum(whole, alpha, out=whole)
    return Drawn(slice(low[1], high[1]), slice(low[0], high[0]), whole, alphas)


# Textures: a scalar field in 0..1, then a palette.


def _fractal(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise in 0..1 with details down to about a quarter of `cell` pixels."""
    total = np.zeros((height, width), np.float32)
    weight = 1.0
    stretch = np.exp(rng.uniform(-1, 1)) if rng.random() < 0.3 else 1.0
    for _ in range(3):
        rows = int(np.clip(height / (cell * stretch), 1, height)) + 1
        columns = int(np.clip(width * stretch / cell, 1, width)) + 1
        grid = rng.random((rows, columns), dtype=np.float32) * np.float32(weight)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
        cell, weight = max(cell / 2.3, 1.0), weight * 0.55
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def _waves(
    rng: np.random.Generator, height: int, width: int, period: float
) -> tuple[np.ndarray, np.ndarray]:
    """Two perpendicular phases, float32 [height, width], bent a little by noise."""
    angle = rng.uniform(0, np.pi)
    along = np.float32(2 * np.pi / period * np.cos(angle))
    across = np.float32(2 * np.pi / period * np.sin(angle))
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(height, dtype=np.float32)[:, None]
    bend = np.float32(rng.uniform(0, 6) * (rng.random() < 0.6))
    noise = bend * _fractal(rng, height, width, 4 * period)
    start = np.float32(rng.uniform(0, 6))
    return along * x + across * y + noise + start, along * y - across * x + noise


def _cells(rng: np.random.Generator, height: int, width: int, period: float) -> np.ndarray:
    """Voronoi cells, each of its own value, some with dark seams."""
    count = int(np.clip(height * width / period**2, 2, 400))
    seeds = np.full((height, width), 255, np.uint8)
    seeds[rng.integers(0, height, count), rng.integers(0, width, count)] = 0
    distance, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 3)
    values = rng.random(count + 2, dtype=np.float32)[labels % (count + 2)]
    if rng.random() < 0.5:
        values = values * np.float32(0.4) + np.minimum(distance / np.float32(period), 0.6)
    return values


def _field(
    rng: np.random.Generator, height: int, width: int, *, kind: int, unit: float
) -> np.ndarray:
    """A texture of one kind, float32 [height, width] in 0..1; `unit`: its detail in pixels."""
    if kind == 0:
        return np.full((height, width), 0.5, np.float32)
    if kind == 1:
        return _fractal(rng, height, width, unit * 4)
    if kind == 2:
        noise = _fractal(rng, height, width, unit * 4)
        return 1 / (1 + np.exp((np.float32(rng.uniform(0.3, 0.7)) - noise) * 25))
    if kind == 3:
        first, _ = _waves(rng, height, width, unit * 2)
        return np.float32(0.5) + np.clip(
            np.sin(first) * np.float32(rng.choice([0.5, 3])), -0.5, 0.5
        )
    if kind == 4:
        first, second = _waves(rng, height, width, unit * 2.5)
        product = np.sin(first) * np.sin(second)
        return np.float32(0.5) + np.clip(product * np.float32(rng.choice([0.5, 8])), -0.5, 0.5)
    if kind == 5:
        return _cells(rng, height, width, unit * 2)
    if kind == 6:
        grid = rng.random((2, 2), dtype=np.float32)
        return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    step = float(rng.uniform(1, 2.5))
    grid = rng.random((int(height / step) + 1, int(width / step) + 1), dtype=np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)


NUM_TEXTURES = 8


def _paint(field: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Maps 0..1 to a palette [n, 3]; returns float32 [h, w, 3]."""
    stops = np.linspace(0, 1, len(colours))
    levels = np.linspace(0, 1, 256)
    table = np.stack([np.interp(levels, stops, colours[:, c]) for c in range(3)], 1)
    indices = np.clip(field * np.float32(255), 0, 255).astype(np.uint8)
    colour_map = np.round(table).astype(np.uint8).reshape(256, 1, 3)
    return cv2.applyColorMap(indices, colour_map).astype(np.float32)


def _as_colour(field: np.ndarray) -> np.ndarray:
    """[h, w] to [h, w, 3]: numpy multiplies equal shapes several times faster than unequal ones."""
    return cv2.merge([field, field, field])


def _random_colour(rng: np.random.Generator) -> np.ndarray:
    grey = rng.uniform(25, 225)
    return np.clip(grey + rng.normal(0, rng.choice([6.0, 22.0, 55.0]), 3), 10, 240)


def _palette(rng: np.random.Generator, colour: np.ndarray, spread: float) -> np.ndarray:
    count = int(rng.integers(2, 5))
    common = rng.normal(0, spread, (count, 1))
    return np.clip(colour + common + rng.normal(0, spread * 0.4, (count, 3)), 0, 255)


def _texture(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    colour: np.ndarray,
    spread: float,
    kind: int,
    unit: float,
) -> np.ndarray:
    field = _field(rng, *shape, kind=kind, unit=unit)
    return _paint(field, _palette(rng, colour, spread))


def _background(rng: np.random.Generator, base: np.ndarray, size: int) -> np.ndarray:
    """A textured ground, float32 [size, size, 3], with edges and clutter that are no objects."""
    spread = float(rng.choice([2, 10, 25]))
    kind = int(rng.integers(NUM_TEXTURES))
    unit = size * float(np.exp(rng.uniform(np.log(0.008), np.log(0.12))))
    shape = (size, size)
    image = _texture(rng, shape, colour=base, spread=spread, kind=kind, unit=unit)
    if rng.random() < 0.35:
        image = image * np.float32(0.7) + np.float32(0.3) * _texture(
            rng, shape, colour=base, spread=25, kind=int(rng.integers(1, 3)), unit=size * 0.06
        )
    if rng.random() < 0.35:
        _half_plane(rng, image, base)
    if rng.random() < 0.35:
        _clutter(rng, image, base)
    return np.ascontiguousarray(image)


def _half_plane(rng: np.random.Generator, image: np.ndarray, base: np.ndarray) -> None:
    """A horizon, a wall's edge, a path: ground of another look on one side of a line or band."""
    size = image.shape[0]
    angle = rng.uniform(0, 2 * np.pi)
    normal = np.array([np.cos(angle), np.sin(angle)])
    x = np.arange(size, dtype=np.float32)[None, :] - size / 2
    y = np.arange(size, dtype=np.float32)[:, None] - size / 2
    distance = x * np.float32(normal[0]) + y * np.float32(normal[1])
    distance -= np.float32(rng.uniform(-0.4, 0.4) * size)
    if rng.random() < 0.3:
        distance = np.abs(distance) - np.float32(rng.uniform(0.02, 0.15) * size)
    alpha = np.clip(distance / np.float32(rng.uniform(0.7, 6)) + 0.5, 0, 1)
    colour = _random_colour(rng) if rng.random() < 0.5 else base + rng.normal(0, 25, 3)
    kind = int(rng.integers(NUM_TEXTURES))
    other = _texture(
        rng, (size, size), colour=colour, spread=12, kind=kind, unit=size * rng.uniform(0.01, 0.1)
    )
    image += _as_colour(alpha) * (other - image)


def _clutter(rng: np.random.Generator, image: np.ndarray, base: np.ndarray) -> None:
    """Lines and specks, too thin or too small to be taken for objects."""
    size = image.shape[0]
    for _ in range(int(rng.integers(2, 16))):
        colour = tuple(np.clip(base + rng.normal(0, 30, 3), 0, 255).tolist())
        start = rng.uniform(0, size, 2)
        end = start + rng.normal(0, size * rng.choice([0.01, 0.05, 0.5]), 2)
        points = np.stack([start, end]).astype(np.int32)
        cv2.line(image, points[0].tolist(), points[1].tolist(), colour, int(rng.integers(1, 3)))


# Objects.


def _random_style(rng: np.random.Generator, ground: np.ndarray) -> Style:
    """A look that can be told from a ground of colour `ground`, though sometimes barely."""
    if rng.random() < 0.3:
        shift = rng.normal(0, 1, 3) + rng.normal(0, 1.5)
        colour = ground + shift / (np.abs(shift).max() + 1e-6) * rng.uniform(14, 40)
    else:
        colour = _random_colour(rng)
        if np.abs(colour - ground).max() < 30:
            colour = colour + (60 if ground.mean() < 128 else -60)
    return Style(
        colour=np.clip(colour, 0, 255),
        spread=float(rng.choice([2.0, 8.0, 18.0, 35.0])),
        texture=int(rng.integers(NUM_TEXTURES)),
        second_colour=_random_colour(rng),
        pattern=str(rng.choice(["plain", "parts", "core", "patch"], p=[0.5, 0.2, 0.15, 0.15])),
        opacity=float(rng.uniform(0.6, 0.95)) if rng.random() < 0.1 else 1.0,
        border_blur=float(rng.uniform(0.5, 2.5)) if rng.random() < 0.2 else 0.0,
        rim=float(rng.uniform(-0.5, 0.4)) if rng.random() < 0.25 else 0.0,
        relief=float(rng.uniform(0.1, 0.7)) if rng.random() < 0.5 else 0.0,
        highlight=float(rng.uniform(0.2, 0.8)) if rng.random() < 0.2 else 0.0,
        shadow=float(rng.uniform(0.15, 0.6)) if rng.random() < 0.45 else 0.0,
    )


def _draw_mixture(
    rng: np.random.Generator, image: np.ndarray, *, base: np.ndarray, light: Light, count: int
) -> list[Drawn]:
    """Objects of all kinds and sizes, drawn one over the other."""
    size = image.shape[0]
    drawn = []
    number = min(count, 1 + int(count * rng.random() ** 0.7))
    smallest = 0.04 if rng.random() < 0.2 else 0.1
    sides = np.exp(rng.uniform(np.log(smallest), np.log(0.8), number))
    if rng.random() < 0.7:
        sides = np.sort(sides)[::-1]  # small things in front of large ones stay visible
    heap, spread = rng.uniform(0.2, 0.8, 2), rng.uniform(0.08, 0.3)
    heaped = rng.random() < 0.4  # things that touch and hide each other, rather than spread out
    for side in sides * size:
        if heaped:
            centre = np.clip(rng.normal(heap, spread), 0.02, 0.98) * size
        else:
            centre = rng.uniform(0.05, 0.95, 2) * size
        x, y = np.clip(centre, 0, size - 1).astype(int)
        ground = image[y, x].astype(np.float64) if rng.random() < 0.5 else base
        place = _draw_shape(_random_shape(rng), np.eye(2) * (side / 2), centre=centre, size=size)
        _render(rng, image, place, style=_random_style(rng, ground), light=light)
        drawn.append(place)
    return drawn


def _draw_crowd(
    rng: np.random.Generator, image: np.ndarray, *, base: np.ndarray, light: Light, count: int
) -> list[Drawn]:
    """Many of one kind, near-identical, as in a dish of cells or a box of nuts."""
    size = image.shape[0]
    style = _random_style(rng, base)
    if style.relief == style.rim == style.shadow == 0:  # else neighbours could not be told apart
        style = replace(style, relief=0.5, rim=-0.4)
    plain = _normalised((_superellipse if rng.random() < 0.5 else _blob)(rng))
    shape = plain if rng.random() < 0.4 else _random_shape(rng)
    side = size * float(np.exp(rng.uniform(np.log(0.1), np.log(0.3))))
    variation = rng.uniform(0.02, 0.25)
    aligned = rng.random() < 0.25
    drawn = []
    for centre in _crowd_centres(rng, size, side, int(rng.integers(count, 3 * count + 1))):
        angle = rng.normal(0, 0.1) if aligned else rng.uniform(0, 2 * np.pi)
        matrix = _rotation(angle) @ np.diag(1 + rng.normal(0, variation, 2)) * (side / 2)
        if np.linalg.det(matrix) < (side / 6) ** 2:
            matrix = _rotation(angle) * (side / 2)
        place = _draw_shape(shape, matrix, centre=centre, size=size)
        own = np.clip(style.colour + rng.normal(0, 40 * variation, 3), 0, 255)
        _render(rng, image, place, style=replace(style, colour=own), light=light)
        drawn.append(place)
    return drawn


def _crowd_centres(rng: np.random.Generator, size: int, side: float, count: int) -> np.ndarray:
    if rng.random() < 0.5:
        return rng.uniform(0, size, (count, 2))
    pitch = side * rng.uniform(0.65, 1.3)
    steps = np.arange(0.5, max(1.0, size / pitch))
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2) * pitch
    grid = rng.permutation(grid)[:count] + rng.normal(0, 0.12 * side, (min(count, len(grid)), 2))
    return grid


def _render(
    rng: np.random.Generator, image: np.ndarray, place: Drawn, *, style: Style, light: Light
) -> None:
    """Paints one object, and its shadow, into `image` in place."""
    scale = image.shape[0] / 256
    if style.shadow:
        _cast_shadow(image, place, style.shadow, light)
    region = image[place.rows, place.columns]
    height, width = place.alpha.shape
    unit = max(1.5, max(height, width) * float(np.exp(rng.uniform(np.log(0.02), np.log(0.3)))))
    paint = _texture(
        rng,
        (height, width),
        colour=style.colour,
        spread=style.spread,
        kind=style.texture,
        unit=unit,
    )
    _add_pattern(rng, paint, place, style)
    alpha: np.ndarray = place.alpha.astype(np.float32) * np.float32(1 / 255)
    _shade(paint, alpha, style=style, light=light)
    if style.border_blur:
        alpha = cv2.GaussianBlur(alpha, (0, 0), style.border_blur * scale)
    _keep_apart(paint, region, place.alpha)
    region += _as_colour(alpha * np.float32(style.opacity)) * (paint - region)


def _keep_apart(paint: np.ndarray, region: np.ndarray, alpha: np.ndarray) -> None:
    """Moves `paint`, in place, off the mean colour of what it covers, so that it can be seen."""
    own, ground = np.array(cv2.mean(paint, alpha)[:3]), np.array(cv2.mean(region, alpha)[:3])
    missing = MIN_CONTRAST - float(np.abs(own - ground).max())
    if missing > 0:
        towards = 1.0 if own.mean() > ground.mean() else -1.0
        if not 30 < ground.mean() < 225:
            towards = 1.0 if ground.mean() < 128 else -1.0
        paint += np.float32(towards * (missing + MIN_CONTRAST / 2))


def _cast_shadow(image: np.ndarray, place: Drawn, strength: float, light: Light) -> None:
    size = image.shape[0]
    scale = size / 256
    blur = max(0.5, light.shadow_blur * scale)
    offset = np.round(-light.direction * light.shadow_offset * scale).astype(int)
    margin = int(np.ceil(2.5 * blur))
    padded = cv2.copyMakeBorder(
        place.alpha, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=0
    )
    soft = cv2.GaussianBlur(padded, (0, 0), blur)
    top = place.rows.start - margin + int(offset[1])
    left = place.columns.start - margin + int(offset[0])
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + soft.shape[0], size), min(left + soft.shape[1], size)
    if y1 <= y0 or x1 <= x0:
        return
    dark = soft[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.float32)
    image[y0:y1, x0:x1] *= _as_colour(1 - dark * np.float32(strength / 255))


def _add_pattern(rng: np.random.Generator, paint: np.ndarray, place: Drawn, style: Style) -> None:
    """Paints parts of the object in its second colour: edges inside it that are no border."""
    height, width = place.alpha.shape
    if style.pattern == "parts" and len(place.part_alphas) > 1:
        second = np.maximum.reduce(place.part_alphas[1:]).astype(np.float32)
        second *= np.float32(1 / 255)
    elif style.pattern == "core":
        inner = cv2.distanceTransform(
            np.pad((place.alpha >= 128).astype(np.uint8), 1), cv2.DIST_L2, 3
        )[1:-1, 1:-1]
        level = np.float32(rng.uniform(0.3, 0.7) * max(float(inner.max()), 1.0))
        second = np.clip(inner - level, 0, 1)
    elif style.pattern == "patch":
        noise = _fractal(rng, height, width, max(height, width) * rng.uniform(0.2, 0.6))
        second = np.clip((noise - np.float32(rng.uniform(0.4, 0.6))) * 20, 0, 1)
    else:
        return
    colour = style.second_colour.astype(np.float32)
    paint += second[..., None] * (colour + np.float32(0.4) * (paint - paint.mean((0, 1))) - paint)


def _shade(paint: np.ndarray, alpha: np.ndarray, *, style: Style, light: Light) -> None:
    """Makes the object look round and lit, in place, with a rim where the style has one."""
    if not (style.relief or style.rim or style.highlight):
        return
    side = max(alpha.shape)
    soft = cv2.GaussianBlur(alpha, (0, 0), max(1.0, side * 0.08))
    if style.rim:
        edge = np.clip(4 * soft * (1 - soft) - 0.45, 0, 1) if side > 24 else 1 - soft
        paint *= (1 + np.float32(style.rim) * 1.6 * edge)[..., None]
    if not (style.relief or style.highlight):
        return
    slope = cv2.Sobel(soft, cv2.CV_32F, 1, 0) * np.float32(light.direction[0])
    slope += cv2.Sobel(soft, cv2.CV_32F, 0, 1) * np.float32(light.direction[1])
    slope *= np.float32(-1 / max(float(np.abs(slope).max()), 1e-6))
    if style.relief:
        paint *= (1 + np.float32(style.relief) * slope)[..., None]
    if style.highlight:
        spot = np.clip(slope - 0.6, 0, None) * np.float32(style.highlight * 350)
        paint += spot[..., None]


# The camera.


def _camera(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light, lens, sensor and file: float32 in, uint8 [size, size, 3] out."""
    size = image.shape[0]
    scale = size / 256
    image = _illuminate(rng, image)
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.8)) * scale)
    elif rng.random() < 0.12:
        image = cv2.filter2D(image, -1, _motion_kernel(rng, scale))
    if rng.random() < 0.5:
        channels = 3 if rng.random() < 0.4 else 1
        noise = _GAUSSIAN_OF_BYTE[rng.integers(0, 256, (size, size, channels), dtype=np.uint8)]
        strength = np.float32(np.exp(rng.uniform(np.log(1.5), np.log(18))))
        if rng.random() < 0.4:  # shot noise: brighter is noisier
            green = np.clip(image[..., 1:2], 0, 255)
            noise = noise * np.sqrt(green * np.float32(1 / 128))
        image = image + (noise if channels == 3 else _as_colour(noise)) * strength
    if rng.random() < 0.15:
        image = cv2.transform(image, np.tile(np.array([0.3, 0.59, 0.11], np.float32), (3, 1)))
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        gamma = np.exp(rng.uniform(-0.5, 0.5))
        pixels = cv2.LUT(pixels, (255 * (np.arange(256) / 255) ** gamma).astype(np.uint8))
    if rng.random() < 0.25:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 90))]
        pixels = cv2.imdecode(cv2.imencode(".jpg", pixels, quality)[1], cv2.IMREAD_COLOR)
    return np.ascontiguousarray(pixels)


def _illuminate(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    size = image.shape[0]
    cast = 1 + rng.normal(0, 0.08, 3) * (rng.random() < 0.4)
    gain = (cast * rng.uniform(0.75, 1.1)).astype(np.float32)
    if rng.random() < 0.4:
        grid = rng.uniform(0.6, 1.25, (3, 3)).astype(np.float32)
        if rng.random() < 0.4:
            grid[:] = 0.7
            grid[1, 1] = 1.1
        image = image * _as_colour(cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC))
    return cv2.transform(image, np.diag(gain))


def _motion_kernel(rng: np.random.Generator, scale: float) -> np.ndarray:
    length = max(3, int(rng.uniform(3, 8) * scale)) | 1
    kernel = np.zeros((length, length), np.float32)
    middle = length // 2
    reach = np.array([np.cos(a := rng.uniform(0, np.pi)), np.sin(a)]) * middle
    start = np.round(middle - reach).astype(int).tolist()
    end = np.round(middle + reach).astype(int).tolist()
    cv2.line(kernel, start, end, 1.0, 1)
    return kernel / kernel.sum()
