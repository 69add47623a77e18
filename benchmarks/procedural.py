"""Procedural images with exact masks, to pre-train a small SAM from scratch.

`make_scene(seed)` is a pure function of its arguments. Scenes aim for variety: a model that was
trained on nothing else must work on photographs, micrographs and dense crops. Therefore objects
have inner edges, backgrounds have edges and clutter, contrast is often low, objects overlap, and
the camera adds blur, noise and JPEG artefacts.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from benchmarks.procedural_shapes import (
    DrawnShape,
    blob,
    draw_shape,
    normalise_parts,
    random_shape,
    rotation_matrix,
    superellipse,
)
from benchmarks.procedural_textures import (
    NUM_TEXTURES,
    draw_texture,
    fractal_noise,
    random_colour,
    to_three_channels,
)

MIN_VISIBLE_PIXELS = 40  # per object at size 256; scales with the image's area
MIN_CONTRAST = 14.0  # between the mean colours of an object and of what it covers, in 0..255
MIN_VISIBLE_SHARE = 0.12  # of the object's area; with less, its shape cannot be recognised
_GAUSSIAN_OF_BYTE = (
    np.sort(np.random.default_rng(0).standard_normal(256 * 64)).reshape(256, 64).mean(1)
).astype(np.float32)


@dataclass(frozen=True)
class Scene:
    """An image with the masks and boxes of its objects, in pixels of the image.

    Attributes:
        image: uint8 [size, size, 3], RGB.
        masks: uint8 [K, size, size], 0 or 1, the visible part of each object; disjoint; K >= 1.
        boxes: float32 [K, 4], x0 y0 x1 y1, tight around the visible part, x1 and y1 exclusive.
    """

    image: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Style:
    """The look of the objects of one kind; colours are RGB, float [3] in 0..255."""

    colour: np.ndarray
    spread: float  # standard deviation of the texture's colours
    texture: int
    second_colour: np.ndarray
    pattern: str  # of the second colour, an inner edge: "plain" (none), "parts", "core", "patch"
    opacity: float
    border_blur: float  # pixels at size 256
    rim: float  # strength of an outline; negative: dark
    relief: float  # strength of the shading that makes an object look round
    highlight: float
    shadow: float


@dataclass(frozen=True)
class Light:
    """The light of a scene, for all of its objects."""

    direction: np.ndarray  # float [2], unit vector towards the light
    shadow_offset: float  # pixels at size 256
    shadow_blur: float  # pixels at size 256


def make_scene(seed: int, *, size: int = 256, max_objects: int = 8) -> Scene:
    """Draws one scene.

    Args:
        seed: Any non-negative integer; the only source of randomness.
        size: Side of the square image, in pixels.
        max_objects: The most objects with masks; crowds draw more, and a random choice is kept.

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
    base = random_colour(rng)
    image = _draw_background(rng, base, size)
    labels = np.zeros((size, size), np.int16)
    areas = [0]
    draw = _draw_crowd if rng.random() < 0.25 else _draw_mixture
    for drawn in draw(rng, image, base=base, light=light, count=max_objects):
        inside = drawn.alpha >= 128
        labels[drawn.rows, drawn.columns][inside] = len(areas)
        areas.append(int(np.count_nonzero(inside)))
    masks, boxes = _visible_objects(labels, areas)
    if len(masks) > max_objects:
        kept = np.sort(rng.choice(len(masks), max_objects, replace=False))
        masks, boxes = masks[kept], boxes[kept]
    return Scene(image=_apply_camera(rng, image), masks=masks, boxes=boxes)


def _visible_objects(labels: np.ndarray, areas: list[int]) -> tuple[np.ndarray, np.ndarray]:
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


def _draw_background(rng: np.random.Generator, base: np.ndarray, size: int) -> np.ndarray:
    """A textured background, float32 [size, size, 3], with edges and clutter."""
    spread = float(rng.choice([2, 10, 25]))
    kind = int(rng.integers(NUM_TEXTURES))
    unit = size * float(np.exp(rng.uniform(np.log(0.008), np.log(0.12))))
    shape = (size, size)
    image = draw_texture(rng, shape, colour=base, spread=spread, kind=kind, unit=unit)
    if rng.random() < 0.35:
        image = image * np.float32(0.7) + np.float32(0.3) * draw_texture(
            rng, shape, colour=base, spread=25, kind=int(rng.integers(1, 3)), unit=size * 0.06
        )
    if rng.random() < 0.35:
        _draw_half_plane(rng, image, base)
    if rng.random() < 0.35:
        _draw_clutter(rng, image, base)
    return np.ascontiguousarray(image)


def _draw_half_plane(rng: np.random.Generator, image: np.ndarray, base: np.ndarray) -> None:
    """Another texture on one side of a line or in a band, like a horizon, a wall or a path."""
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
    colour = random_colour(rng) if rng.random() < 0.5 else base + rng.normal(0, 25, 3)
    kind = int(rng.integers(NUM_TEXTURES))
    other = draw_texture(
        rng, (size, size), colour=colour, spread=12, kind=kind, unit=size * rng.uniform(0.01, 0.1)
    )
    image += to_three_channels(alpha) * (other - image)


def _draw_clutter(rng: np.random.Generator, image: np.ndarray, base: np.ndarray) -> None:
    """Lines and specks that are too thin or too small to be objects."""
    size = image.shape[0]
    for _ in range(int(rng.integers(2, 16))):
        colour = tuple(np.clip(base + rng.normal(0, 30, 3), 0, 255).tolist())
        start = rng.uniform(0, size, 2)
        end = start + rng.normal(0, size * rng.choice([0.01, 0.05, 0.5]), 2)
        points = np.stack([start, end]).astype(np.int32)
        cv2.line(image, points[0].tolist(), points[1].tolist(), colour, int(rng.integers(1, 3)))


# Objects.


def _random_style(rng: np.random.Generator, ground: np.ndarray) -> Style:
    """A random look whose colour differs from `ground`, sometimes only a little."""
    if rng.random() < 0.3:
        shift = rng.normal(0, 1, 3) + rng.normal(0, 1.5)
        colour = ground + shift / (np.abs(shift).max() + 1e-6) * rng.uniform(14, 40)
    else:
        colour = random_colour(rng)
        if np.abs(colour - ground).max() < 30:
            colour = colour + (60 if ground.mean() < 128 else -60)
    return Style(
        colour=np.clip(colour, 0, 255),
        spread=float(rng.choice([2.0, 8.0, 18.0, 35.0])),
        texture=int(rng.integers(NUM_TEXTURES)),
        second_colour=random_colour(rng),
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
) -> list[DrawnShape]:
    """Draws objects of all kinds and sizes, later ones over earlier ones."""
    size = image.shape[0]
    drawn = []
    number = min(count, 1 + int(count * rng.random() ** 0.7))
    smallest = 0.04 if rng.random() < 0.2 else 0.1
    sides = np.exp(rng.uniform(np.log(smallest), np.log(0.8), number))
    if rng.random() < 0.7:
        sides = np.sort(sides)[::-1]  # small objects in front of large ones stay visible
    heap, spread = rng.uniform(0.2, 0.8, 2), rng.uniform(0.08, 0.3)
    heaped = rng.random() < 0.4  # objects that touch and cover each other, not spread out
    for side in sides * size:
        if heaped:
            centre = np.clip(rng.normal(heap, spread), 0.02, 0.98) * size
        else:
            centre = rng.uniform(0.05, 0.95, 2) * size
        x, y = np.clip(centre, 0, size - 1).astype(int)
        ground = image[y, x].astype(np.float64) if rng.random() < 0.5 else base
        drawn_shape = draw_shape(
            random_shape(rng), np.eye(2) * (side / 2), centre=centre, size=size
        )
        _draw_object(rng, image, drawn_shape, style=_random_style(rng, ground), light=light)
        drawn.append(drawn_shape)
    return drawn


def _draw_crowd(
    rng: np.random.Generator, image: np.ndarray, *, base: np.ndarray, light: Light, count: int
) -> list[DrawnShape]:
    """Draws many nearly identical objects, like cells in a dish or nuts in a box."""
    size = image.shape[0]
    style = _random_style(rng, base)
    if (
        style.relief == style.rim == style.shadow == 0
    ):  # else borders of neighbours would be invisible
        style = replace(style, relief=0.5, rim=-0.4)
    plain = normalise_parts((superellipse if rng.random() < 0.5 else blob)(rng))
    shape = plain if rng.random() < 0.4 else random_shape(rng)
    side = size * float(np.exp(rng.uniform(np.log(0.1), np.log(0.3))))
    variation = rng.uniform(0.02, 0.25)
    aligned = rng.random() < 0.25
    drawn = []
    for centre in _crowd_centres(rng, size, side, int(rng.integers(count, 3 * count + 1))):
        angle = rng.normal(0, 0.1) if aligned else rng.uniform(0, 2 * np.pi)
        matrix = rotation_matrix(angle) @ np.diag(1 + rng.normal(0, variation, 2)) * (side / 2)
        if np.linalg.det(matrix) < (side / 6) ** 2:
            matrix = rotation_matrix(angle) * (side / 2)
        drawn_shape = draw_shape(shape, matrix, centre=centre, size=size)
        own = np.clip(style.colour + rng.normal(0, 40 * variation, 3), 0, 255)
        _draw_object(rng, image, drawn_shape, style=replace(style, colour=own), light=light)
        drawn.append(drawn_shape)
    return drawn


def _crowd_centres(rng: np.random.Generator, size: int, side: float, count: int) -> np.ndarray:
    if rng.random() < 0.5:
        return rng.uniform(0, size, (count, 2))
    pitch = side * rng.uniform(0.65, 1.3)
    steps = np.arange(0.5, max(1.0, size / pitch))
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2) * pitch
    grid = rng.permutation(grid)[:count] + rng.normal(0, 0.12 * side, (min(count, len(grid)), 2))
    return grid


def _draw_object(
    rng: np.random.Generator, image: np.ndarray, shape: DrawnShape, *, style: Style, light: Light
) -> None:
    """Draws one object, and its shadow, into `image` in place."""
    scale = image.shape[0] / 256
    if style.shadow:
        _draw_shadow(image, shape, style.shadow, light)
    region = image[shape.rows, shape.columns]
    height, width = shape.alpha.shape
    unit = max(1.5, max(height, width) * float(np.exp(rng.uniform(np.log(0.02), np.log(0.3)))))
    paint = draw_texture(
        rng,
        (height, width),
        colour=style.colour,
        spread=style.spread,
        kind=style.texture,
        unit=unit,
    )
    _add_pattern(rng, paint, shape, style)
    alpha: np.ndarray = shape.alpha.astype(np.float32) * np.float32(1 / 255)
    _shade_object(paint, alpha, style=style, light=light)
    if style.border_blur:
        alpha = cv2.GaussianBlur(alpha, (0, 0), style.border_blur * scale)
    _ensure_contrast(paint, region, shape.alpha)
    region += to_three_channels(alpha * np.float32(style.opacity)) * (paint - region)


def _ensure_contrast(paint: np.ndarray, region: np.ndarray, alpha: np.ndarray) -> None:
    """Shifts `paint`, in place, to `MIN_CONTRAST` with the mean colour of what it covers."""
    own, ground = np.array(cv2.mean(paint, alpha)[:3]), np.array(cv2.mean(region, alpha)[:3])
    missing = MIN_CONTRAST - float(np.abs(own - ground).max())
    if missing > 0:
        towards = 1.0 if own.mean() > ground.mean() else -1.0
        if not 30 < ground.mean() < 225:
            towards = 1.0 if ground.mean() < 128 else -1.0
        paint += np.float32(towards * (missing + MIN_CONTRAST / 2))


def _draw_shadow(image: np.ndarray, shape: DrawnShape, strength: float, light: Light) -> None:
    size = image.shape[0]
    scale = size / 256
    blur = max(0.5, light.shadow_blur * scale)
    offset = np.round(-light.direction * light.shadow_offset * scale).astype(int)
    margin = int(np.ceil(2.5 * blur))
    padded = cv2.copyMakeBorder(
        shape.alpha, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=0
    )
    soft = cv2.GaussianBlur(padded, (0, 0), blur)
    top = shape.rows.start - margin + int(offset[1])
    left = shape.columns.start - margin + int(offset[0])
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + soft.shape[0], size), min(left + soft.shape[1], size)
    if y1 <= y0 or x1 <= x0:
        return
    dark = soft[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.float32)
    image[y0:y1, x0:x1] *= to_three_channels(1 - dark * np.float32(strength / 255))


def _add_pattern(
    rng: np.random.Generator, paint: np.ndarray, shape: DrawnShape, style: Style
) -> None:
    """Paints some of the object in its second colour, which makes edges inside of it."""
    height, width = shape.alpha.shape
    if style.pattern == "parts" and len(shape.part_alphas) > 1:
        second = np.maximum.reduce(shape.part_alphas[1:]).astype(np.float32)
        second *= np.float32(1 / 255)
    elif style.pattern == "core":
        inner = cv2.distanceTransform(
            np.pad((shape.alpha >= 128).astype(np.uint8), 1), cv2.DIST_L2, 3
        )[1:-1, 1:-1]
        level = np.float32(rng.uniform(0.3, 0.7) * max(float(inner.max()), 1.0))
        second = np.clip(inner - level, 0, 1)
    elif style.pattern == "patch":
        noise = fractal_noise(rng, height, width, max(height, width) * rng.uniform(0.2, 0.6))
        second = np.clip((noise - np.float32(rng.uniform(0.4, 0.6))) * 20, 0, 1)
    else:
        return
    colour = style.second_colour.astype(np.float32)
    paint += second[..., None] * (colour + np.float32(0.4) * (paint - paint.mean((0, 1))) - paint)


def _shade_object(paint: np.ndarray, alpha: np.ndarray, *, style: Style, light: Light) -> None:
    """Adds relief, highlight and rim of the style, in place."""
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


def _apply_camera(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Applies illumination, blur, noise, gamma and JPEG: float32 -> uint8 [size, size, 3]."""
    size = image.shape[0]
    scale = size / 256
    image = _add_illumination(rng, image)
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
        image = image + (noise if channels == 3 else to_three_channels(noise)) * strength
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


def _add_illumination(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    size = image.shape[0]
    cast = 1 + rng.normal(0, 0.08, 3) * (rng.random() < 0.4)
    gain = (cast * rng.uniform(0.75, 1.1)).astype(np.float32)
    if rng.random() < 0.4:
        grid = rng.uniform(0.6, 1.25, (3, 3)).astype(np.float32)
        if rng.random() < 0.4:
            grid[:] = 0.7
            grid[1, 1] = 1.1
        image = image * to_three_channels(
            cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
        )
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
