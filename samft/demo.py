"""Writes a small COCO dataset to try things on.

    samft demo --output_dir D

Painted butterflies and flowers, the same for the same seed, with every form of annotation that COCO
has: polygons of one part and of many, compressed and uncompressed RLE, a crowd, an image without
objects.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from samft.cli import CommandParser, run_command
from samft.commands import shell_command
from samft.errors import ConfigError, DataError, fold_for_terminal
from samft.images.synthetic import CATEGORIES, SceneObject, draw_scene
from samft.runtime.files import read_json, write_text
from samft.runtime.own_files import is_marked_picture, is_part_of, mark_picture

DESCRIPTION = "samft demo: painted butterflies and flowers"
ANNOTATIONS = "_annotations.coco.json"
FORMS = ("polygons", "compressed", "polygons", "uncompressed", "polygons")
# Those of configs/demo.yaml, which an installed samft does not have.
TRAIN_FLAGS = (
    *("--model_type", "vit_tiny", "--checkpoint_path", "auto", "--image_size", 256),
    *("--batch_size", 4, "--steps", 200, "--learning_rate", "5e-4", "--lr_schedule", "cosine"),
)
MIN_IMAGES = 3  # of a split: one with objects, one with a crowd, one without objects
MIN_SIZE, MAX_SIZE = 64, 4096


def write_demo(
    output_dir: Path, *, seed: int = 0, num_train: int = 30, num_val: int = 10, size: int = 320
) -> Path:
    """Writes the dataset as `<output_dir>/{train,val}/_annotations.coco.json` beside its images.

    Args:
        output_dir: A folder that is missing, empty, or holds nothing but an earlier demo dataset,
            which is replaced.
        seed: Any non-negative integer; the same seed gives the same files.
        num_train: Images in `train`, at least 3.
        num_val: Images in `val`, at least 3.
        size: Side of the square images, in pixels.

    Returns:
        `output_dir`.

    Raises:
        ConfigError: A number is out of range.
        DataError: The folder holds something else, or cannot be written.
    """
    _check_numbers(seed=seed, num_train=num_train, num_val=num_val, size=size)
    try:
        # Before anything is written: after an interruption, old annotations beside new images would
        # look like a valid dataset.
        for path in _earlier_files(output_dir):
            path.unlink()
        for number, (split, num_images) in enumerate((("train", num_train), ("val", num_val))):
            _write_split(output_dir / split, seed=(seed, number), num_images=num_images, size=size)
    except OSError as error:
        raise DataError(f"The demo dataset cannot be written: {error}.") from error
    return output_dir


def main(argv: list[str]) -> Path:
    """Parses the command line, writes the dataset and prints a summary.

    Args:
        argv: The arguments after the program's name.

    Returns:
        The dataset's folder.

    Raises:
        UserError: As `write_demo`.
    """
    parser = CommandParser("demo", __doc__)
    add, images = parser.add_argument, "number of images, a quarter for validation; default 40"
    add("--output_dir", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--seed", type=int, default=0, metavar="N", help="another seed draws others; default 0")
    add("--images", type=int, default=40, metavar="N", help=images)
    add("--size", type=int, default=320, metavar="PX", help="side of the images; default 320")
    add("--debug", action="store_true", help="show tracebacks of user errors too")
    arguments = parser.parse_args(argv)
    num_val = arguments.images // 4
    folder = write_demo(
        arguments.output_dir,
        seed=arguments.seed,
        num_train=arguments.images - num_val,
        num_val=num_val,
        size=arguments.size,
    )
    summary, command = _summarise(folder)
    print(f"{fold_for_terminal(summary, sys.stdout)}\n  {command}", flush=True)
    return folder


def _check_numbers(*, seed: int, num_train: int, num_val: int, size: int) -> None:
    if seed < 0:
        raise ConfigError(f"The demo's seed is {seed}; it must be 0 or more.")
    if min(num_train, num_val) < MIN_IMAGES:
        raise ConfigError(
            f"{num_train} training and {num_val} validation images are too few for the demo: "
            f"each split needs {MIN_IMAGES} or more, so ask for at least {4 * MIN_IMAGES} images."
        )
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ConfigError(
            f"The demo's size is {size} pixels; it must be between {MIN_SIZE} and {MAX_SIZE}."
        )


def _earlier_files(output_dir: Path) -> list[Path]:
    """The files of an earlier demo dataset, complete or interrupted.

    Raises:
        DataError: There is a file that is not part of a demo dataset; nothing is overwritten.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise DataError(f"'{output_dir}' is a file; name a folder for the demo dataset.")
    files = []
    for path in output_dir.rglob("*"):
        if path.is_dir():
            continue
        if not _is_demo_file(path, output_dir):
            raise DataError(
                f"'{output_dir}' holds '{path.relative_to(output_dir)}', which is not part of a "
                "demo dataset, and nothing was written so as not to overwrite your data: name a "
                "new or empty folder."
            )
        files.append(path)
    return files


def _is_demo_file(path: Path, output_dir: Path) -> bool:
    if path.parent not in (output_dir / "train", output_dir / "val"):
        return False
    if path.name == ANNOTATIONS:
        try:
            content = read_json(path)
            return bool(content["info"]["description"] == DESCRIPTION)
        except (OSError, ValueError, KeyError, TypeError):
            return False
    if is_part_of(path.name, re.escape(ANNOTATIONS)):  # left behind when it was killed
        return True
    # An earlier version did not mark its pictures; those of a whole dataset can still be told.
    annotations = path.with_name(ANNOTATIONS)
    is_listed = _is_demo_file(annotations, output_dir) and any(
        image["file_name"] == path.name for image in read_json(annotations)["images"]
    )
    return path.match("image_[0-9]*.jpg") and (is_listed or is_marked_picture(path))


def _image_name(index: int) -> str:
    return f"image_{index + 1:04d}.jpg"


def _write_split(folder: Path, *, seed: tuple[int, int], num_images: int, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num_images):
        picture, objects = draw_scene(
            np.random.default_rng([*seed, index]),
            size,
            empty=index == num_images - 1,
            crowd=index % 4 == 1,
        )
        name = _image_name(index)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 92]
        encoded = cv2.imencode(".jpg", picture[..., ::-1], quality)[1].tobytes()
        (folder / name).write_bytes(mark_picture(encoded))
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for item in objects:
            ids = {"id": len(annotations) + 1, "image_id": index + 1}
            form = "uncompressed" if item.crowd else FORMS[len(annotations) % len(FORMS)]
            annotations.append(ids | _annotation_entry(item, size, form=form))
    content = {
        "info": {"description": DESCRIPTION},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }
    write_text(folder / ANNOTATIONS, json.dumps(content))


def _annotation_entry(item: SceneObject, size: int, *, form: str) -> dict[str, Any]:
    """A COCO annotation without its ids; `form` is one of `FORMS`."""
    rle = mask_utils.merge(mask_utils.frPyObjects(item.polygons, size, size))
    segmentation: Any = item.polygons
    if form == "compressed":
        segmentation = {"size": [size, size], "counts": rle["counts"].decode("ascii")}
    elif form == "uncompressed":
        segmentation = {"size": [size, size], "counts": _run_lengths(mask_utils.decode(rle))}
    return {
        "category_id": item.category,
        "segmentation": segmentation,
        "area": float(mask_utils.area(rle)),
        "bbox": [float(value) for value in mask_utils.toBbox(rle)],
        "iscrowd": int(item.crowd),
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts: column by column, zeros first."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs: list[int] = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def _summarise(folder: Path) -> tuple[str, str]:
    # What was written, and the command to go on with.
    counts = []
    for split in ("train", "val"):
        content = json.loads((folder / split / ANNOTATIONS).read_text(encoding="utf-8"))
        crowds = sum(annotation["iscrowd"] for annotation in content["annotations"])
        objects = len(content["annotations"]) - crowds
        counts.append(
            f"{split}: {len(content['images'])} images, {objects} objects, {crowds} crowds"
        )
    folders = ("--data_root", folder, "--output_dir", folder.with_name(f"{folder.name}-run"))
    summary = (
        f"Wrote a demo dataset of painted butterflies and flowers to {folder} "
        f"({'; '.join(counts)}). Next, tune on it:"
    )
    return summary, shell_command("train", *TRAIN_FLAGS, *folders)


if __name__ == "__main__":
    sys.exit(run_command(main))
