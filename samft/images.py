"""Image files: read as the annotator saw them, or refused by name. Imports no torch."""

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samft.errors import DataError

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs


def header_size(source: Path | io.BytesIO, *, name: str | None = None) -> tuple[int, int]:
    """Height and width that an image file's header gives, without decoding it.

    Args:
        source: The file, or its content.
        name: What errors call it.

    Raises:
        DataError: If it is missing, not an image, or larger than `MAX_PIXELS`.
    """
    name = name or str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} has too many pixels ({error}): scale it down.") from error
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or "not an image format that is known here"
        raise DataError(f"{name} cannot be read as an image ({reason}): replace it.") from error
    if width * height > MAX_PIXELS:
        raise DataError(f"{name} has {width} x {height} pixels, too many: scale it down.")
    return height, width


def find_missing(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the names, relative to a folder, under which there is no file."""
    # One listing per folder: a question per file takes minutes on a network disk.
    listings: dict[Path, set[str]] = {}
    missing = []
    for name in names:
        path = folder / name
        if path.parent not in listings:
            exists = path.parent.is_dir()
            listings[path.parent] = set(os.listdir(path.parent)) if exists else set()
        if path.name not in listings[path.parent]:
            missing.append(name)
    return missing


def read_image(path: Path) -> NDArray[np.uint8]:
    """Reads an image file: uint8 [H, W, 3], RGB, in the file's own pixels.

    An EXIF orientation is not applied: COCO annotations are drawn without it.

    Raises:
        DataError: If it is missing, cut short, not an image, or larger than `MAX_PIXELS`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the file.") from error
    size = header_size(io.BytesIO(content), name=str(path))
    image = None
    if not _is_cut_short(content):
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            image = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flags)
        except cv2.error:
            image = None
    if image is None or image.shape[:2] != size:
        raise DataError(f"{path} is broken or cut short: replace it, or remove it from the JSON.")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _is_cut_short(content: bytes) -> bool:
    # OpenCV fills what is missing with grey and says nothing.
    if content.startswith(b"\x89PNG"):
        return b"IEND" not in content[-1024:]
    if not content.startswith(b"\xff\xd8"):
        return False
    # Past the header segments (which may hold a thumbnail with an end marker of its own), the end
    # marker cannot occur in the pixel data.
    position = 2
    while content[position : position + 1] == b"\xff" and content[position + 1 : position + 2]:
        marker = content[position + 1]
        if marker == 0xDA:
            return content.find(b"\xff\xd9", position) < 0
        if marker == 0xFF:
            position += 1
            continue
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return True
