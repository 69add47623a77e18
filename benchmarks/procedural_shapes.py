"""Random shapes of the procedural images: polygons, blobs, leaves, creatures and others.

Each shape function returns parts in arbitrary units; `normalise_parts` scales them to a longer side
of 2 around the centre 0, 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np

SUBPIXEL_BITS = 4


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
class DrawnShape:
    """The pixels that a shape covers, in a window of the image."""

    rows: slice
    columns: slice
    alpha: np.ndarray  # uint8 [h, w], 0..255, antialiased
    part_alphas: list[np.ndarray]  # of each part, as `alpha`


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


def superellipse(rng: np.random.Generator) -> list[Part]:
    """Between an ellipse and a rectangle; some taper to one side."""
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


def blob(rng: np.random.Generator) -> list[Part]:
    """A closed, smooth outline."""
    return [Part([_polar(_blob_radii(rng, rng.uniform(0.1, 0.9)))])]


def _rosette(rng: np.random.Generator) -> list[Part]:
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


def _perforated_blob(rng: np.random.Generator) -> list[Part]:
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
    nodes[1:, 0] = nodes[:-1, 1]  # each stroke starts where the last one ended
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
    simple: list[Callable[[np.random.Generator], list[Part]]] = [superellipse, blob, _polygon]
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
            parts.append(Part([outline @ rotation_matrix(heading).T + stem[node]]))
    return parts


_SHAPES: list[tuple[Callable[[np.random.Generator], list[Part]], float]] = [
    (_polygon, 1.5),
    (_star, 1.0),
    (superellipse, 2.5),
    (blob, 2.5),
    (_rosette, 1.0),
    (_leaf, 1.5),
    (_ring, 0.6),
    (_perforated_blob, 0.6),
    (_crescent, 0.8),
    (_stroke, 1.3),
    (_glyph, 0.8),
    (_creature, 1.5),
    (_compound, 2.0),
    (_plant, 0.6),
]
_SHAPE_SHARES = np.array([weight for _, weight in _SHAPES]) / sum(w for _, w in _SHAPES)


def rotation_matrix(angle: float) -> np.ndarray:
    """Rotation in the plane, [2, 2]; `angle` in radians."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine], [sine, cosine]])


def random_shape(rng: np.random.Generator) -> list[Part]:
    """A random shape, squeezed and rotated."""
    make, _ = _SHAPES[int(rng.choice(len(_SHAPES), p=_SHAPE_SHARES))]
    squeeze = np.diag([1.0, np.exp(rng.uniform(-1.0, 0.0))]) if rng.random() < 0.5 else np.eye(2)
    tilt = 0.0 if rng.random() < 0.25 else rng.uniform(0, 2 * np.pi)  # upright things are common
    matrix = rotation_matrix(tilt) @ squeeze @ rotation_matrix(rng.uniform(0, 2 * np.pi))
    parts = [replace(part, contours=[c @ matrix.T for c in part.contours]) for part in make(rng)]
    return normalise_parts(parts)


def normalise_parts(parts: list[Part]) -> list[Part]:
    """Scales the whole shape to a longer side of 2, with its centre at 0, 0."""
    points = np.concatenate([contour for part in parts for contour in part.contours])
    low, high = points.min(0), points.max(0)
    scale = 2 / max(float((high - low).max()), 1e-6)
    centre = (low + high) / 2
    return [Part([(c - centre) * scale for c in p.contours], p.width * scale) for p in parts]


def draw_shape(
    parts: list[Part], matrix: np.ndarray, *, centre: np.ndarray, size: int
) -> DrawnShape:
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
    return DrawnShape(slice(low[1], high[1]), slice(low[0], high[0]), whole, alphas)
