"""Text, numbers and pictures as HTML. Imports no torch."""

import base64
from collections.abc import Iterable
from html import escape
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from samft.errors import printable

_QUALITY = 92  # of JPEG: what an outline of one pixel takes


def text(value: object) -> str:
    """A value as text, whatever it holds: escaped, and without what is not printable."""
    # A file's name may hold what is no text at all (half of a surrogate pair), or turns it around.
    return escape(printable(str(value)))


def score(value: float | None) -> str:
    """A score to three places."""
    return "none" if value is None else f"{value:.3f}"


def signed(value: float) -> str:
    """A change of a score, in the colour of a gain or of a loss."""
    if abs(value) < 0.0005:
        return '<span class="soft">\N{PLUS-MINUS SIGN}0</span>'
    number = f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
    return f'<span class="{"gain" if value > 0 else "loss"}">{number}</span>'


def short(name: str) -> str:
    """The name of a file, without its middle if it is long."""
    # Begin and end of a long name tell it from others; the whole of it shows under the pointer.
    whole = printable(name)
    cut = f"{whole[:16]}\N{HORIZONTAL ELLIPSIS}{whole[-20:]}" if len(whole) > 38 else whole
    return f'<span title="{escape(whole)}">{escape(cut)}</span>'


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values, one pair a row."""
    cells = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in rows)
    return f'<div class="wide"><table class="plain">{cells}</table></div>'


def picture_uri(picture: NDArray[np.uint8]) -> str:
    """A picture, uint8 [H, W, 3] RGB, as a data: address."""
    options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1]
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode('ascii')}"
