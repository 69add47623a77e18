"""Finds the splits of a dataset under its root. Imports no torch."""

import re
from pathlib import Path

from samft.errors import DataError

_SPLIT_NAMES = {"val": ("val", "valid", "validation")}


def find_split(data_root: Path, split: str) -> tuple[Path, Path]:
    """Finds a split's annotation file and image folder under a dataset's root.

    Two layouts: `SPLIT/_annotations.coco.json` beside its images, and the official
    `annotations/instances_SPLIT.json` with `SPLIT/`. For `val`, `valid` and `validation` are tried
    as well; a year at the end (`train2017`) may be left out where there is only one.

    Raises:
        DataError: If there is no such folder, no such split, or more than one that fits.
    """
    if not data_root.is_dir():
        raise DataError(f"There is no dataset folder {data_root}: check --data_root.")
    for name in _SPLIT_NAMES.get(split, (split,)):
        beside = data_root / name / "_annotations.coco.json"
        if beside.is_file():
            return beside, beside.parent
        fitting = _official_names(data_root, name)
        if len(fitting) > 1:
            raise DataError(
                f"{data_root} has more than one split for {split!r}: name one of "
                f"{', '.join(fitting)}."
            )
        if fitting:
            annotations = data_root / "annotations" / f"instances_{fitting[0]}.json"
            folders = [data_root / fitting[0], data_root / "images" / fitting[0]]
            return annotations, next((folder for folder in folders if folder.is_dir()), folders[0])
    tried = " or ".join(_SPLIT_NAMES.get(split, (split,)))
    raise DataError(
        f"{data_root} has no split {tried}: neither {split}/_annotations.coco.json nor "
        f"annotations/instances_{split}.json; name the split, or give the annotation file and the "
        "image folder."
    )


def _official_names(data_root: Path, name: str) -> list[str]:
    if (data_root / "annotations" / f"instances_{name}.json").is_file():
        return [name]
    pattern = re.compile(rf"instances_({re.escape(name)}\d{{4}})\.json")
    files = sorted((data_root / "annotations").glob("instances_*.json"))
    return [match[1] for match in map(pattern.fullmatch, (file.name for file in files)) if match]
