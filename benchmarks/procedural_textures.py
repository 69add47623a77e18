"""Random textures of the procedural images: a scalar field in 0..1, mapped to a palette."""

import cv2
import numpy as np

NUM_TEXTURES = 8


def fractal_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
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


def _bent_waves(
    rng: np.random.Generator, height: int, width: int, period: float
) -> tuple[np.ndarray, np.ndarray]:
    """Phases of two perpendicular waves, float32 [height, width], bent by noise."""
    angle = rng.uniform(0, np.pi)
    along = np.float32(2 * np.pi / period * np.cos(angle))
    across = np.float32(2 * np.pi / period * np.sin(angle))
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(height, dtype=np.float32)[:, None]
    bend = np.float32(rng.uniform(0, 6) * (rng.random() < 0.6))
    noise = bend * fractal_noise(rng, height, width, 4 * period)
    start = np.float32(rng.uniform(0, 6))
    return along * x + across * y + noise + start, along * y - across * x + noise


def _voronoi_cells(rng: np.random.Generator, height: int, width: int, period: float) -> np.ndarray:
    """Voronoi cells with a value each, some with dark seams."""
    count = int(np.clip(height * width / period**2, 2, 400))
    seeds = np.full((height, width), 255, np.uint8)
    seeds[rng.integers(0, height, count), rng.integers(0, width, count)] = 0
    distance, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 3)
    values = rng.random(count + 2, dtype=np.float32)[labels % (count + 2)]
    if rng.random() < 0.5:
        values = values * np.float32(0.4) + np.minimum(distance / np.float32(period), 0.6)
    return values


def _texture_field(
    rng: np.random.Generator, height: int, width: int, *, kind: int, unit: float
) -> np.ndarray:
    """A texture of one kind, float32 [height, width] in 0..1; its details are `unit` px large."""
    if kind == 0:
        return np.full((height, width), 0.5, np.float32)
    if kind == 1:
        return fractal_noise(rng, height, width, unit * 4)
    if kind == 2:
        noise = fractal_noise(rng, height, width, unit * 4)
        return 1 / (1 + np.exp((np.float32(rng.uniform(0.3, 0.7)) - noise) * 25))
    if kind == 3:
        first, _ = _bent_waves(rng, height, width, unit * 2)
        return np.float32(0.5) + np.clip(
            np.sin(first) * np.float32(rng.choice([0.5, 3])), -0.5, 0.5
        )
    if kind == 4:
        first, second = _bent_waves(rng, height, width, unit * 2.5)
        product = np.sin(first) * np.sin(second)
        return np.float32(0.5) + np.clip(product * np.float32(rng.choice([0.5, 8])), -0.5, 0.5)
    if kind == 5:
        return _voronoi_cells(rng, height, width, unit * 2)
    if kind == 6:
        grid = rng.random((2, 2), dtype=np.float32)
        return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    step = float(rng.uniform(1, 2.5))
    grid = rng.random((int(height / step) + 1, int(width / step) + 1), dtype=np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)


def _apply_palette(field: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Maps 0..1 to a palette [n, 3]; returns float32 [h, w, 3]."""
    stops = np.linspace(0, 1, len(colours))
    levels = np.linspace(0, 1, 256)
    table = np.stack([np.interp(levels, stops, colours[:, c]) for c in range(3)], 1)
    indices = np.clip(field * np.float32(255), 0, 255).astype(np.uint8)
    colour_map = np.round(table).astype(np.uint8).reshape(256, 1, 3)
    return cv2.applyColorMap(indices, colour_map).astype(np.float32)


def to_three_channels(field: np.ndarray) -> np.ndarray:
    """[h, w] -> [h, w, 3]: numpy multiplies equal shapes several times faster than broadcasts."""
    return cv2.merge([field, field, field])


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """RGB, float [3] in 10..240; greyish colours are more frequent."""
    grey = rng.uniform(25, 225)
    return np.clip(grey + rng.normal(0, rng.choice([6.0, 22.0, 55.0]), 3), 10, 240)


def _palette(rng: np.random.Generator, colour: np.ndarray, spread: float) -> np.ndarray:
    count = int(rng.integers(2, 5))
    common = rng.normal(0, spread, (count, 1))
    return np.clip(colour + common + rng.normal(0, spread * 0.4, (count, 3)), 0, 255)


def draw_texture(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    colour: np.ndarray,
    spread: float,
    kind: int,
    unit: float,
) -> np.ndarray:
    """Draws a texture, float32 [h, w, 3].

    Args:
        rng: The source of randomness.
        shape: h, w, px.
        colour: Mean colour.
        spread: Standard deviation of the palette's colours.
        kind: Of texture, below `NUM_TEXTURES`.
        unit: Size of its details, px.
    """
    field = _texture_field(rng, *shape, kind=kind, unit=unit)
    return _apply_palette(field, _palette(rng, colour, spread))
