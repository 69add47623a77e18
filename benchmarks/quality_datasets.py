"""The datasets of the quality lab: where each is, its image size, its validation images.

Real ones are looked for in `SAMFT_DATA`, else in `../shared/data`; the others are drawn into the
lab's folder at their first use.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality_scenes import draw_cells, draw_filaments, write_scenes
from samft.demo import write_demo
from samft.errors import DataError
from samft.runtime.files import file_lock

Settings = dict[str, Any]  # fields of TrainConfig
_REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class QualityDataset:
    """A dataset of the lab.

    Attributes:
        image_size: Of the model's input.
        locate: From the lab's folder to the fields of `TrainConfig` that name the data; the data
            is written first if the lab draws it itself.
    """

    image_size: int
    locate: Callable[[Path], Settings]

    def settings(self, lab_dir: Path) -> Settings:
        """Fields of `TrainConfig`: the files and the image size.

        Raises:
            DataError: There is no such data.
        """
        return {**self.locate(lab_dir), "image_size": self.image_size}


def shared_dataset(name: str, **settings: Any) -> Callable[[Path], Settings]:
    """A `locate` for a folder of real data, which it does not write.

    Args:
        name: Of the folder.
        settings: More fields of `TrainConfig`; those that end in `_annotations` and `_images` are
            paths within the folder, and then there is no `data_root`.
    """

    def locate(_lab_dir: Path) -> Settings:
        root = Path(os.environ.get("SAMFT_DATA", _REPOSITORY.parent / "shared" / "data")) / name
        if not root.is_dir():
            raise DataError(
                f"there is no folder {root}: set SAMFT_DATA to the folder that holds {name}, or "
                "leave this dataset out with --datasets."
            )
        is_path = {key: key.endswith(("_annotations", "_images")) for key in settings}
        found_by = {} if any(is_path.values()) else {"data_root": str(root)}
        paths = {key: str(root / value) for key, value in settings.items() if is_path[key]}
        return {**settings, **found_by, **paths}

    return locate


def drawn_dataset(name: str, write: Callable[[Path], object]) -> Callable[[Path], Settings]:
    """A `locate` for data that the lab draws, once, also if two labs begin at the same time."""

    def locate(lab_dir: Path) -> Settings:
        folder, done = lab_dir / "data" / name, lab_dir / "data" / f"{name}.done"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.with_suffix(".lock")):
            if not done.exists():
                write(folder)
                done.touch()
        return {"data_root": str(folder)}

    return locate


DATASETS = {
    "hbn_flakes": QualityDataset(256, shared_dataset("hbn_flakes")),
    "hbn_flakes_512": QualityDataset(512, shared_dataset("hbn_flakes")),
    "mushrooms": QualityDataset(256, shared_dataset("mushrooms")),
    "coco_open104": QualityDataset(
        256, shared_dataset("coco_open104", train_split="train2017", val_split="val2017")
    ),
    "coco_open104_512": QualityDataset(
        512, shared_dataset("coco_open104", train_split="train2017", val_split="val2017")
    ),
    "fruits_nuts": QualityDataset(
        256,
        shared_dataset(
            "fruits_nuts",
            train_annotations="data/trainval.json",
            train_images="data/images",
            val_fraction=0.4,
        ),
    ),
    "demo": QualityDataset(256, drawn_dataset("demo", write_demo)),
    "filaments": QualityDataset(
        256, drawn_dataset("filaments", lambda folder: write_scenes(folder, draw_filaments))
    ),
    "cells": QualityDataset(
        256, drawn_dataset("cells", lambda folder: write_scenes(folder, draw_cells))
    ),
}
