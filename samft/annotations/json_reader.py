"""Reads a COCO file: its lists first, and then entry by entry, never all decoded at once.

Imports no torch.
"""

import codecs
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from samft.annotations.problems import Problems
from samft.errors import DataError
from samft.runtime.files import read_file, sha256_of

UNSET = msgspec.UNSET
_NUM_LOOKED_AT = 100  # annotations, to tell what kind of file it is
Raw = msgspec.Raw | Any  # an entry as JSON text, or as a value if the fast parser cannot read it


class UnusableFile(DataError):
    """An annotation file that cannot be read at all; `code` is a key of `problems.KINDS`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ImageEntry(msgspec.Struct):
    """The fields of an entry of 'images' that samft reads."""

    id: Any = UNSET
    file_name: Any = UNSET
    filename: Any = UNSET
    coco_url: Any = UNSET
    height: Any = UNSET
    width: Any = UNSET

    @property
    def name(self) -> str | None:
        """Where the file is; LVIS has only its URL."""
        names = (self.file_name, self.filename, self.coco_url)
        return next((one for one in names if isinstance(one, str) and one.strip()), None)


class ObjectEntry(msgspec.Struct):
    """The fields of an entry of 'annotations' that samft reads."""

    id: Any = UNSET
    image_id: Any = UNSET
    category_id: Any = UNSET
    iscrowd: Any = UNSET
    bbox: Any = UNSET
    area: Any = UNSET
    segmentation: Any = UNSET


class _Lists(msgspec.Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: msgspec.Raw = msgspec.Raw(b"null")


@dataclass
class Document:
    """The lists of a COCO file, their entries not decoded yet."""

    images: list[Raw]
    annotations: list[Raw]
    categories: Any


def file_digest(path: Path) -> str:
    """SHA-256 of an annotation file.

    Raises:
        UnusableFile: It cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise _unreadable_file(path, error) from error


def load_document(path: Path, problems: Problems) -> Document:
    """Reads the lists of a COCO file.

    Args:
        path: The JSON file.
        problems: Problems of the file as a whole are added to it.

    Raises:
        UnusableFile: It cannot be read, is not JSON, or is not a COCO instances file.
    """
    try:
        content = read_file(path)
    except OSError as error:
        raise _unreadable_file(path, error) from error
    if content.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise UnusableFile(
            "json-invalid", f"{path} is compressed: unpack it (gunzip, unzip) first."
        )
    if content.startswith(codecs.BOM_UTF8):
        problems.add("json-bom", path.name)
        content = content[len(codecs.BOM_UTF8) :]
    content = _to_utf8(path, content, problems)
    try:
        lists = msgspec.json.decode(content, type=_Lists)
        return Document(lists.images, lists.annotations, value_of(lists.categories))
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        pass
    return _load_with_json(path, content, problems)


def _to_utf8(path: Path, content: bytes, problems: Problems) -> bytes:
    # Programs on Windows write the code page of the machine. UTF-16 is left to Python's parser.
    if content.isascii() or json.detect_encoding(content) != "utf-8":
        return content
    try:
        content.decode()
    except UnicodeDecodeError:
        content = content.decode("cp1252", errors="replace").encode()
        problems.add("json-not-utf8", path.name)
    return content


def _load_with_json(path: Path, content: bytes, problems: Problems) -> Document:
    # Python's parser also reads NaN and UTF-16, and its errors name line and column.
    try:
        whole = json.loads(content)
    except json.JSONDecodeError as error:
        _refuse_placeholder(path, content)
        raise UnusableFile(
            "json-invalid",
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "it may be cut short, so export or copy it again.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise UnusableFile(
            "json-invalid", f"{path} is not valid JSON ({error}): export it again."
        ) from error
    for key in ("images", "annotations"):
        if not isinstance(whole, dict) or not isinstance(whole.get(key), list):
            raise UnusableFile(
                "json-not-coco",
                f"{path} {_name_format(whole) or f'has no list {key!r}'}: samft needs a COCO "
                "instances file, an object with 'images' and 'annotations'.",
            )
    problems.add("json-not-standard", path.name)
    return Document(whole["images"], whole["annotations"], whole.get("categories"))


def _refuse_placeholder(path: Path, content: bytes) -> None:
    # What version control leaves where the content of a file was not fetched.
    text = content[:1000].decode(errors="replace").strip()
    reason = ""
    if text.startswith("version https://git-lfs"):
        reason = "a pointer of Git LFS: fetch its content (`git lfs pull`)"
    elif len(content) < 1000 and "\n" not in text and not text.startswith(("{", "[", "<")):
        reason = f"only the path {text!r}, a link that was copied as text: copy what it leads to"
    if reason and "/" in text:
        raise UnusableFile("json-invalid", f"{path} is no JSON; it holds {reason}.")


_OTHER_FORMATS = {
    "shapes": "is a file of LabelMe, which labelme2coco converts",
    "_via_img_metadata": "is a project of VIA, which exports COCO, too",
    "features": "is GeoJSON",
    "predictions": "is a file of predictions",
}


def _name_format(whole: Any) -> str:
    # What a file is that is no COCO instances file, as a predicate; '' where that is not plain.
    first = whole[0] if isinstance(whole, list) and whole else {}
    if isinstance(first, dict) and "image_id" in first:
        return (
            "is a list of COCO results, which `samft predict --boxes` takes beside the annotation "
            "file that lists their images"
        )
    keys = whole if isinstance(whole, dict) else {}
    return next((what for key, what in _OTHER_FORMATS.items() if key in keys), "")


def find_kind(annotations: list[Raw]) -> str:
    """Why entries have no masks, as a code of `problems.NO_MASKS`; '' if they have no boxes either.

    Args:
        annotations: `Document.annotations`.
    """
    entries = [value_of(raw) for raw in annotations[:_NUM_LOOKED_AT]]
    fields = {key for entry in entries if isinstance(entry, dict) for key in entry}
    kinds = {
        "segments_info": "panoptic-only",
        "keypoints": "keypoints-only",
        "caption": "captions-only",
        "bbox": "boxes-only",
    }
    return next((kind for field, kind in kinds.items() if field in fields), "")


def _unreadable_file(path: Path, error: OSError) -> UnusableFile:
    if isinstance(error, FileNotFoundError):
        return UnusableFile("json-missing", f"There is no annotation file {path}: check the path.")
    return UnusableFile(
        "json-unreadable", f"{path} cannot be read ({error.strerror}): check the path."
    )


def value_of(raw: Raw) -> Any:
    """An entry decoded to Python values; None if its text cannot be decoded."""
    if not isinstance(raw, msgspec.Raw):
        return raw
    try:
        return msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(bytes(raw))  # reads numbers beyond a double, as infinite
    except (ValueError, RecursionError):
        return None


Entry = TypeVar("Entry", ImageEntry, ObjectEntry)


def read_entries(entries: list[Raw], kind: type[Entry]) -> Iterator[Entry | None]:
    """Decodes entries one after the other.

    Args:
        entries: A list of a `Document`.
        kind: `ImageEntry` or `ObjectEntry`.

    Yields:
        The entry; None for one that is not a JSON object.
    """
    decode = msgspec.json.Decoder(kind).decode
    for raw in entries:
        try:
            yield decode(raw)
        except (ValueError, TypeError, RecursionError):
            value = value_of(raw)
            if isinstance(value, dict):
                fields = kind.__struct_fields__
                yield kind(**{name: value[name] for name in fields if name in value})
            else:
                yield None


def to_id(raw: Any) -> int | None:
    """A whole number of 64 bits, even if written as text or as 5.0; None for anything else."""
    if type(raw) is int:
        return raw if -(2**63) <= raw < 2**63 else None
    if isinstance(raw, str):
        # int() also takes 1_000 and digits of other scripts.
        raw = raw.strip()
        raw = int(raw.partition(".")[0]) if _WHOLE_NUMBER.fullmatch(raw) else None
    try:
        number = int(raw)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number == raw and -(2**63) <= number < 2**63 else None


_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(\.0*)?")


def to_key(raw: Any) -> int | str | None:
    """What an id stands for, to compare ids by; None for what is no id.

    Returns:
        A whole number where `to_id` reads one; else the text, or the number as text.
    """
    if type(raw) is int and -(2**63) <= raw < 2**63:  # almost always
        return raw
    number = to_id(raw)
    if number is not None:
        return number
    if isinstance(raw, str):
        return raw.strip() or None
    if isinstance(raw, float) and math.isfinite(raw):
        return str(int(raw)) if raw.is_integer() else repr(raw)
    return str(raw) if type(raw) is int else None


def number_keys(keys: Iterable[int | str]) -> dict[str, int]:
    """Numbers for ids that are text: from 1 on, in their order, but not those of other ids."""
    keys = list(keys)
    taken = {key for key in keys if isinstance(key, int)}
    free = (number for number in itertools.count(1) if number not in taken)
    texts = dict.fromkeys(key for key in keys if isinstance(key, str))
    return dict(zip(texts, free, strict=False))


def number_of(raw: Any, numbers: Mapping[str, int]) -> int | None:
    """The number that stands for an id; None for what is no id, or unknown text.

    Args:
        raw: The id as written.
        numbers: Of ids that are text.
    """
    key = to_key(raw)
    return numbers.get(key) if isinstance(key, str) else key


def to_size(entry: ImageEntry) -> tuple[int, int]:
    """Height and width of an image entry, px; (0, 0) unless both are usable."""
    height, width = to_id(entry.height), to_id(entry.width)
    good = height and width and 0 < min(height, width) and max(height, width) < 2**31
    return (height or 0, width or 0) if good else (0, 0)
