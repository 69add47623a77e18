"""Image names as annotation tools write them: foreign paths, URLs, other spellings. No torch."""

import functools
import html
import re
import unicodedata
from pathlib import PureWindowsPath
from urllib.parse import unquote, urlsplit

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jpeg .jpg .jp2 .pbm .pcx .pgm .png .ppm .tga .tif .tiff .webp".split()
)
_SAME_SUFFIX = {".jpeg": ".jpg", ".jpe": ".jpg", ".tiff": ".tif"}
_SUFFIXES = IMAGE_SUFFIXES | _SAME_SUFFIX.keys()
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_LOCAL_FILES = "/local-files/?d="  # Label Studio's, before the path
_LABEL_STUDIO = re.compile(r"[0-9a-f]{8}-(?=.)")  # before the name of an uploaded file
# NAME_jpg.rf.HASH.jpg: Roboflow's name of each augmented copy of NAME.jpg
_ROBOFLOW = re.compile(r"(?P<name>.+)\.rf\.(?=[0-9A-Za-z]*[0-9])[0-9A-Za-z]{16,}$", re.DOTALL)
_REPLACED = re.compile(r"(?:(?![\x00-\x1f\x7f])[\W_])+")  # exporters write - or _ for these
_OLD_SUFFIX = re.compile(r"_(jpe?g|png|bmp|tiff?|webp)$", re.IGNORECASE)


def encode_name(name: str) -> bytes:
    """A file name as the bytes on disk; also of names with half a character, which no file has."""
    try:
        return name.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return name.encode(errors="surrogatepass")


@functools.lru_cache(1 << 18)  # of a file's names, of which each is split several times
def split_name(name: str) -> tuple[tuple[str, ...], bool]:
    """Splits the path of an image into its parts, without a drive, host or leading folders `..`.

    Args:
        name: A path with either separator, or a URL.

    Returns:
        The parts, at least one; and whether the name points out of the folder that it is relative
        to, so that only the last parts can mean anything.
    """
    _, local, path = name.partition(_LOCAL_FILES)
    path = path if local else name
    is_url = _URL.match(path) is not None
    if is_url:
        try:
            path = urlsplit(path).path
        except ValueError:  # no host in brackets, say
            path = path.partition("://")[2]
    windows = PureWindowsPath(path)
    outside = bool(is_url or local or windows.anchor or path.startswith("/") or "\0" in name)
    parts: list[str] = []
    for part in windows.parts[bool(windows.anchor) :]:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            outside = True
    return tuple(parts) or (name,), outside


def roboflow_original(name: str) -> str | None:
    """The picture that Roboflow made a copy of, `NAME_jpg` of `NAME_jpg.rf.HASH.jpg`, or None."""
    stem = name[: -len(_suffix_of(name)) or None]
    match = _ROBOFLOW.match(stem)
    return match["name"] if match else None


def group_of(name: str, group_by: str) -> str | None:
    """The group of images that belong together: copies of a picture, frames of a video.

    Args:
        name: The file name, relative to the image folder.
        group_by: `auto`: Roboflow's copies of a picture; `folder`; `none`; or a regular expression,
            whose first group in brackets is the name of the group.

    Returns:
        The group's name; None for an image that belongs to none.

    Example:
        >>> group_of("video_3/frame_0012.png", "(.*)/frame_")
        'video_3'
        >>> group_of("cat_jpg.rf.0123456789abcdef.jpg", "auto")
        'cat_jpg'
    """
    parent, slash, last = name.rpartition("/")
    if group_by == "none":
        return None
    if group_by == "folder":
        return parent
    if group_by == "auto":
        original = roboflow_original(last)
        return None if original is None else f"{parent}{slash}{original}"
    match = re.search(group_by, name)
    return match[1] if match else None


def _suffix_of(name: str) -> str:
    dot = name.rfind(".")
    suffix = name[dot:] if dot > 0 else ""
    return suffix if suffix.lower() in _SUFFIXES else ""


def is_image_name(name: str) -> bool:
    """Whether a name ends like an image file's; `._a.jpg` is macOS's, beside `a.jpg`."""
    return bool(_suffix_of(name)) and not name.startswith(".")


def _as_written(part: str) -> str:
    return part


def _any_case(part: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", part).casefold()).strip(" ")


def _decoded(part: str) -> str:
    for _ in range(3):  # some exporters encode twice
        if "%" in part:
            part = unquote(part, errors="surrogateescape")
    if "&" in part:
        part = html.unescape(part)
    return _any_case(part.replace("+", " "))


def _any_suffix(part: str) -> str:
    part = _decoded(part)
    suffix = _suffix_of(part)
    return part.removesuffix(suffix) + _SAME_SUFFIX.get(suffix, suffix)


def _before_export(part: str) -> str:
    part = _any_suffix(part)
    suffix = _suffix_of(part)
    stem = _LABEL_STUDIO.sub("", part.removesuffix(suffix), count=1)
    if original := _ROBOFLOW.match(stem):
        stem = _OLD_SUFFIX.sub("", original["name"])
    return _REPLACED.sub("-", stem).strip("-") + suffix


def _without_suffix(part: str) -> str:
    part = _before_export(part)
    return part.removesuffix(_suffix_of(part))


# From the strictest to the loosest: names are the same at a level where these are equal. The last
# is for wanted names that have no suffix.
SPELLINGS = (_as_written, _any_case, _decoded, _any_suffix, _before_export, _without_suffix)
# Folders that say nothing about the images in them.
_GENERAL_FOLDER = re.compile(
    r"(jpe?g)?(images?|imgs?|pictures|photos|data|raw|upload|media|train|val|valid|validation|test)"
    r"(\d{4})?",
    re.IGNORECASE,
)


def are_of_other_folders(wanted: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """Whether two files lie in different folders whose names say what is in them, as of videos."""
    folders = [parts[-2] for parts in (wanted, path) if len(parts) > 1]
    telling = [_decoded(each) for each in folders if not _GENERAL_FOLDER.fullmatch(each)]
    return len(telling) == 2 and telling[0] != telling[1]


def numbers_in(name: str) -> list[int]:
    """The numbers in a name: image 1 is not image 2, however near their names are."""
    return [int(digits) for digits in re.findall(r"[0-9]+", name[:1000])]


def common_parts(wanted: tuple[str, ...], path: tuple[str, ...], level: int) -> int:
    """How many of the last parts of two paths are the same at a level of `SPELLINGS`."""
    number = 0
    for one, other in zip(reversed(wanted), reversed(path), strict=False):
        spell = SPELLINGS[level if number == 0 else min(level, 2)]  # folders have no suffix
        if spell(one) != spell(other):
            break
        number += 1
    return number
