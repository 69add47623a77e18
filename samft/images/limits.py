"""Which images cannot be used, and why. Imports no torch."""

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs
MAX_PIXELS_IN_WINDOWS = (1 << 32) - 1  # COCO's run lengths have 32 bits
MAX_MASK_PIXELS = 1 << 30  # of an RLE; where its layout is wrong, all of it is decoded
_MAX_BYTES = 1 << 33  # of the values of an image, all bands


class UnusableImage(Exception):
    """Why an image cannot be used.

    Attributes:
        code: A key of `SENTENCES`.
        detail: What about this image, in a few words; may be empty.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        assert code in SENTENCES, code
        super().__init__(code, detail)
        self.code, self.detail = code, " ".join(detail.split())

    @property
    def sentence(self) -> str:
        """What goes on after the image's name in an error message."""
        reason, advice = SENTENCES[self.code]
        return f"{reason}{f' ({self.detail})' if self.detail else ''}: {advice}."


_REPLACE = "replace it, or remove it from the JSON"
# By code of `annotations.problems`: what is wrong, and what to do.
SENTENCES = {
    "image-empty": ("is empty", _REPLACE),
    "image-not-an-image": ("is no image", _REPLACE),
    "image-truncated": ("is cut short", _REPLACE),
    "image-damaged": ("is damaged", _REPLACE),
    "image-too-large": ("has too many pixels", "scale it down"),
    "image-unreadable": ("cannot be read", "check the file"),
    "image-format": ("is of a kind that samft does not read", "convert it to PNG, say"),
    "image-bands": (
        "has other bands than red, green and blue",
        "choose three of them with channels, such as 3,2,1 (counted from 1), or one",
    ),
    "image-pages": (
        "has several pages or frames",
        "choose one with page (counted from 1)",
    ),
}


def check_size(height: int, width: int, *, bytes_per_pixel: int = 1) -> None:
    """Refuses an image that would take too much memory.

    Args:
        height: px.
        width: px.
        bytes_per_pixel: Of all bands and pages that have to be decoded together.

    Raises:
        UnusableImage: It has no pixel, or more than `MAX_PIXELS`, or 8 GiB of values.
    """
    if height < 1 or width < 1:
        raise UnusableImage("image-not-an-image", "without a pixel")
    if height * width > MAX_PIXELS or height * width * bytes_per_pixel > _MAX_BYTES:
        raise UnusableImage("image-too-large", f"{width} x {height} pixels")
