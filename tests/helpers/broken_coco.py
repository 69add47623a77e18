"""A dataset that has every kind of problem, with the number of each."""

import io
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from PIL import Image
from pycocotools import mask as mask_utils

from helpers.coco_files import annotation

HEIGHT, WIDTH = 20, 30
SQUARE = [2.0, 3.0, 8.0, 3.0, 8.0, 9.0, 2.0, 9.0]
BOX = [2.0, 3.0, 6.0, 6.0]
NAN = float("nan")


def encode_image(number: int, kind: str = "PNG", **options: Any) -> bytes:
    """A small image that differs from that of any other number."""
    noise = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind, **options)
    return stream.getvalue()


def encode_rotated() -> bytes:
    """A JPEG whose EXIF asks for a quarter turn."""
    exif = Image.Exif()
    exif[274] = 6
    return encode_image(15, "JPEG", exif=exif)


def encode_bomb(height: int = 30_000, width: int = 30_000) -> bytes:
    """A PNG of 900 megapixels in 109 KB, complete and valid."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x01\x00\x00\x00\x00"
    pixels = zlib.compress(bytes((1 + -(-width // 8)) * height), 9)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


class BrokenSplit:
    """Collects the entries of one COCO file and counts their problems."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: list[Any] = []
        self.annotations: list[Any] = []
        self.expected: Counter[str] = Counter()
        self.good = 0  # usable objects, crowds not counted
        folder.mkdir(parents=True)

    def write_file(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def add_image(self, image_id: Any, name: str, *codes: str, **fields: Any) -> None:
        self.images.append(
            {"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH, **fields}
        )
        self.expected.update(codes)

    def add_object(
        self, *codes: str, good: bool = True, image_id: Any = 1, drop: str = "", **fields: Any
    ) -> None:
        entry = annotation(len(self.annotations) + 100, image_id, SQUARE, area=36.0, **fields)
        entry.pop(drop, None)
        self.annotations.append(entry)
        self.expected.update(codes)
        self.good += good

    def write_json(self, name: str, categories: Any, *, start: str = "") -> None:
        document = {
            "info": {"description": "broken on purpose"},
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }
        (self.folder / name).write_text(start + json.dumps(document), encoding="utf-8")


def rle(*, compressed: bool, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    """The square as RLE."""
    mask = np.zeros((height, width), np.uint8)
    mask[3:9, 2:8] = 1
    if compressed:
        encoded = mask_utils.encode(np.asfortranarray(mask))
        return {"size": [height, width], "counts": encoded["counts"].decode()}
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    return {"size": [height, width], "counts": np.diff(edges, prepend=0).tolist()}


def _add_images(train: BrokenSplit, outside: Path) -> None:
    for number, name in enumerate(("a.png", "b.png", "c.png", "sub/d.png", "images/h.png")):
        train.write_file(name, encode_image(number))
    outside.write_bytes(encode_image(99))
    train.add_image(1, "a.png")
    train.add_image(2, "b.png", "image-size-differs", height=99)
    train.add_image(3, "c.png", "image-size-missing", height=None, width=0)
    train.add_image(4, "sub\\d.png", "image-name-mended")
    train.add_image(5, "h.png", "image-name-mended")
    train.add_image(6, "missing.png", "image-missing")
    train.add_image(7, "empty.jpg", "image-empty")
    train.write_file("empty.jpg", b"")
    train.add_image(8, "page.jpg", "image-not-an-image")
    train.write_file("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>")
    train.add_image(9, "cut.jpg", "image-truncated")
    train.write_file("cut.jpg", encode_image(9, "JPEG")[:-300])
    train.add_image(10, "huge.png", "image-too-large")
    train.write_file("huge.png", encode_bomb())
    train.add_image(11, f"../{outside.name}", "image-outside")
    train.add_image(12, "link.png", "image-outside")
    (train.folder / "link.png").symlink_to(outside)
    train.add_image(13, "folder.png", "image-unreadable")
    (train.folder / "folder.png").mkdir()
    train.add_image(14, "gone.png", "image-unused-bad")
    train.add_image(15, "turned.jpg", "image-exif-rotated")
    train.write_file("turned.jpg", encode_rotated())
    train.add_image(16, "a.png", "image-listed-twice")
    train.add_image("17", "text_id.png", "id-not-integer")
    train.write_file("text_id.png", encode_image(17))
    train.add_image(18, "nothing.png", "image-without-objects")
    train.write_file("nothing.png", encode_image(18))
    train.add_image(19, "shared.png", "image-in-train-and-val")
    train.write_file("shared.png", encode_image(19))
    train.images += ["text", {"id": 20}, {"file_name": "a.png"}]
    train.expected["image-malformed"] += 3
    for image_id in range(6, 14):
        train.add_object(image_id=image_id, good=False)
    for image_id in (2, 3, 4, 5, 15, 16, 17, 19):
        train.add_object(image_id=image_id)


def _add_images_of_other_kinds(train: BrokenSplit) -> None:
    damaged = bytearray(encode_image(31))
    damaged[len(damaged) // 2 : len(damaged) // 2 + 100] = bytes(100)
    frame = Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8))
    animation, bands = io.BytesIO(), io.BytesIO()
    frame.save(animation, "GIF", save_all=True, append_images=[frame.point(lambda _: 9)])
    tifffile.imwrite(bands, np.zeros((5, HEIGHT, WIDTH), np.uint16), planarconfig="separate")
    deep = cv2.imencode(".png", np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH))
    for image_id, name, code, content in (
        (31, "damaged.png", "image-damaged", bytes(damaged)),
        (32, "phone.heic", "image-format", b"\0\0\0\x18ftypheic" + bytes(100)),
        (33, "five.tif", "image-bands", bands.getvalue()),
        (34, "moving.gif", "image-pages", animation.getvalue()),
        (35, "deep.png", "image-pixel-type", deep[1].tobytes()),
    ):
        train.write_file(name, content)
        train.add_image(image_id, name, code)
        train.add_object(image_id=image_id, good=code == "image-pixel-type")


def _add_ids(train: BrokenSplit) -> None:
    train.add_object()
    first = train.annotations[-1]
    train.annotations += [first, "text", None]
    train.expected.update(["annotation-duplicate"] + ["annotation-malformed"] * 2)
    train.add_object("annotation-id-twice", id=first["id"], bbox=[2, 3, 6, 5])
    train.add_object("annotation-id-missing", drop="id")
    train.add_object("annotation-id-zero", id=0)
    train.add_object("id-not-integer", id="901")
    train.add_object("id-not-integer", image_id="1")
    train.add_object("id-not-integer", category_id=1.0)
    train.add_object("annotation-image-missing", image_id=None, good=False)
    train.add_object("annotation-orphan", image_id=1.5, good=False)
    train.add_object("id-renumbered", id="a1")
    train.add_object("category-unknown", category_id="dog")
    train.add_object("category-named", category_id="thing")
    train.add_object("annotation-orphan", image_id=777, good=False)
    train.add_object("category-missing", drop="category_id")
    train.add_object("category-unknown", category_id=55)
    train.add_object("iscrowd-missing", drop="iscrowd")
    train.add_object("iscrowd-malformed", iscrowd="0")
    train.add_object("iscrowd-malformed", iscrowd=None)
    train.add_object("crowd", iscrowd=1, good=False)


def _add_boxes(train: BrokenSplit) -> None:
    train.add_object("box-missing", drop="bbox")
    train.add_object("box-missing", bbox=None)
    train.add_object("box-malformed", bbox=[1, 2, 3])
    train.add_object("box-malformed", bbox=["1", 2, 3, 4])
    train.add_object("box-not-finite", bbox=[NAN, 2, 3, 4])
    train.add_object("box-not-finite", bbox=[float("inf"), 2, 3, 4])
    train.add_object("box-empty", bbox=[2, 3, 0, 6])
    train.add_object("box-empty", bbox=[8, 9, -6, -6])
    train.add_object("box-outside", bbox=[500, 500, 6, 6])
    train.add_object("box-outside", bbox=[1e9, 1e9, 5, 5])
    train.add_object("box-unlike-mask", bbox=[15, 12, 6, 6])
    train.add_object("box-leaves-image", bbox=[-0.5, 3, 8.5, 6])
    edge = [28.5, 3.0, 30.0, 3.0, 30.0, 9.0, 28.5, 9.0]
    train.add_object("box-thin", "mask-tiny", segmentation=[edge], bbox=[28.5, 3, 1.5, 6])
    triangle = [2.0, 3.0, 8.0, 3.0, 8.0, 9.0]
    train.add_object("area-is-box", "mask-tiny", segmentation=[triangle])


def _add_masks(train: BrokenSplit) -> None:
    part = [12.0, 3.0, 18.0, 3.0, 18.0, 9.0, 12.0, 9.0]
    both = {"segmentation": [SQUARE, part], "bbox": [2, 3, 16, 6]}
    train.add_object("polygon-parts", **both)
    around = [2.0, 3.0, 9.0, 3.0, 9.0, 9.0, 2.0, 9.0]
    hole = [4.0, 5.0, 7.0, 5.0, 7.0, 7.0, 4.0, 7.0]  # 42 - 6 = 36 px
    train.add_object("polygon-holes", segmentation=[around, hole], bbox=[2, 3, 7, 6])
    train.add_object("polygon-part-left-out", segmentation=[SQUARE, [1, 2, 3]])
    train.add_object("polygon-flat", segmentation=SQUARE)
    pairs = [SQUARE[k : k + 2] for k in range(0, 8, 2)]
    train.add_object("mask-notation", segmentation=pairs)
    beyond = [[-4.0, 3.0, 8.0, 3.0, 8.0, 9.0, -4.0, 9.0]]
    train.add_object("polygon-leaves-image", segmentation=beyond, bbox=[0, 3, 8, 6])
    train.add_object(segmentation=rle(compressed=True))
    train.add_object(segmentation=rle(compressed=False))
    train.add_object("rle-size-differs", segmentation=rle(compressed=True, height=40))
    bad = {
        "mask-missing": [None, [], {}],
        "mask-malformed": ["polygon", 7],
        "mask-outside": [[[v + 100 for v in SQUARE]]],
        "mask-without-pixels": [[[2.1, 2.1, 2.2, 2.1, 2.2, 2.2]]],
        "polygon-malformed": [[["a"] * 6], [[0, 0, 10**400, 5, 5, 5]]],
        "polygon-too-short": [[[1, 1, 5, 5]], [[]]],
        "polygon-odd": [[[1, 1, 5, 1, 5, 5, 2]]],
        "polygon-not-finite": [[[0, 0, NAN, 5, 5, 5]]],
        "polygon-far-outside": [[[1e9, 1e9, 2e9, 1e9, 2e9, 2e9]]],
        "polygon-too-long": [[[0, 0, 9e4, 9e4] * 100]],
        "rle-malformed": [
            {"size": [HEIGHT, WIDTH], "counts": [1, 1]},
            {"size": [HEIGHT, WIDTH], "counts": "zz"},
            {"counts": [0, 600]},
        ],
        "rle-empty": [
            {"size": [HEIGHT, WIDTH], "counts": [600]},
            {"size": [HEIGHT, WIDTH], "counts": ""},
        ],
        "rle-size-foreign": [{"size": [HEIGHT, 1000], "counts": [0, 1000 * HEIGHT]}],
        "rle-too-large": [{"size": [10**6, 10**6], "counts": [0, 10**12]}],
    }
    for code, segmentations in bad.items():
        for segmentation in segmentations:
            train.add_object(code, segmentation=segmentation, good=False)
    train.add_object("mask-missing", drop="segmentation", good=False)


CATEGORIES = [
    {"id": 0, "name": "things", "supercategory": "none"},
    {"id": 1, "name": "thing", "supercategory": "things"},
    {"id": 2, "name": "thing", "supercategory": "things"},
    {"id": 2, "name": "other"},
    {"id": 7, "name": "seventh"},
    {"name": "no id"},
]
CATEGORY_CODES = (
    "category-placeholder",
    "category-name-twice",
    "category-id-twice",
    "category-ids-not-contiguous",
    "category-malformed",
)


def write_broken(root: Path) -> dict[str, dict[str, int]]:
    """Writes splits train (every problem of entries), val (all crowd) and test (cut short).

    Args:
        root: A folder that does not exist yet.

    Returns:
        For each split, the count of every code that a check has to name; for train also
        `good_objects`, the usable ones before any is left out for being in val, and
        `good_images`, which have them.
    """
    root.mkdir(parents=True)
    train, val = BrokenSplit(root / "train"), BrokenSplit(root / "val")
    _add_images(train, root.parent / "outside.png")
    _add_images_of_other_kinds(train)
    _add_ids(train)
    train.expected["object-twice"] = 23  # most of the first image's are the same square
    _add_boxes(train)
    _add_masks(train)
    train.expected.update([*CATEGORY_CODES, "json-bom", "json-not-standard"])
    train.write_json("_annotations.coco.json", CATEGORIES, start="\ufeff")
    val.write_file("other_name.png", encode_image(19))
    val.write_file("v.png", encode_image(50))
    val.add_image(1, "other_name.png")
    val.add_image(2, "v.png")
    for image_id in (1, 2):
        val.add_object("crowd-used", image_id=image_id, iscrowd=1)
    val.expected["categories-missing"] += 1
    val.write_json("_annotations.coco.json", [])
    (root / "test").mkdir()
    (root / "test" / "_annotations.coco.json").write_text('{"images": [], "annotations": [')
    return {
        "train": {**train.expected, "good_objects": train.good, "good_images": 9},
        "val": {**val.expected, "good_objects": val.good, "good_images": 2},
        "test": {"json-invalid": 1},
    }
