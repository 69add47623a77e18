"""The splits of a dataset, checked one by one and against each other. Imports no torch."""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.coco.coco_index import CocoFile, index_file
from samft.coco.dataset_report import Statistics, measure, statistics_lines, suggestion_lines
from samft.coco.json_reader import UnusableFile
from samft.coco.layout import find_split
from samft.coco.problems import BAD_IMAGES, ERROR, Problems
from samft.coco.subset import choose, find_shared
from samft.errors import DataError

TRAIN, VAL, TEST = "train", "val", "test"
_WIDTH = 120  # characters
_HANGING = 45  # where `Problems.lines` say what was found


@dataclass
class CheckedSplit:
    """One annotation file, what was found in it, or why it could not be read.

    Attributes:
        annotations: The JSON file.
        images: Its image folder.
        problems: Of the file, and of the file beside the others.
        file: The index; None if the JSON cannot be read.
        statistics: None if the JSON cannot be read.
        failure: The sentence that says why it cannot be read.
        shared_rows: int64, rows of `file` whose images are in validation as well.
    """

    annotations: Path
    images: Path
    problems: Problems = field(default_factory=Problems)
    file: CocoFile | None = None
    statistics: Statistics | None = None
    failure: str = ""
    shared_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def errors(self, *, on_bad_image: str = "error") -> dict[str, int]:
        """Counts of what makes training impossible, by code; bad images are none with `skip`."""
        passed = BAD_IMAGES if on_bad_image == "skip" else frozenset()
        return {
            code: found.count
            for code, severity, found in self.problems
            if severity == ERROR and code not in passed
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "annotations": str(self.annotations),
            "image_folder": str(self.images),
            **(self.statistics.to_json() if self.statistics else {}),
            "problems": self.problems.to_json(),
        }

    def lines(self, *, suggest: bool) -> list[str]:
        """What a person reads: problems, counts, and with `suggest` settings that suit."""
        if self.statistics is None:
            return [self.failure, "", *self._problem_lines()]
        counts, *histograms = statistics_lines(self.statistics)
        suggestions = ["", *suggestion_lines(self.statistics)] if suggest else []
        problems = self._problem_lines() or ["no problems"]
        return [counts, "", *problems, *histograms, *suggestions]

    def _problem_lines(self) -> list[str]:
        wrapper = textwrap.TextWrapper(
            _WIDTH,
            subsequent_indent=" " * _HANGING,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return [part for line in self.problems.lines() for part in wrapper.wrap(line)]


def check_split(
    annotations: Path, images: Path, *, root: Path | None = None, image_size: int
) -> CheckedSplit:
    """Checks one annotation file; one that cannot be read is a problem like any other.

    Args:
        annotations: The JSON file.
        images: What its file names are relative to.
        root: See `index_file`.
        image_size: What sizes of objects refer to, px.
    """
    split = CheckedSplit(annotations, images)
    try:
        split.file = index_file(annotations, images, root=root)
    except UnusableFile as error:
        return _unusable(split, error.code, str(error))
    split.problems = split.file.problems
    split.statistics = measure(split.file, image_size=image_size)
    return split


def _unusable(split: CheckedSplit, code: str, failure: str) -> CheckedSplit:
    split.failure = failure
    split.problems.add(code, split.annotations.name)
    return split


def check_splits(
    data_root: Path, *, train_split: str, val_split: str, image_size: int
) -> dict[str, CheckedSplit]:
    """Checks the splits that a dataset has, and whether images are in train and in val.

    Args:
        data_root: The dataset's folder.
        train_split: Name of the training split.
        val_split: Name of the validation split.
        image_size: What sizes of objects refer to, px.

    Returns:
        By `train`, `val` and `test`. A missing training split is in it as a failure; the others may
        be missing, for training can hold a part of its images out.

    Raises:
        DataError: There is none of them.
    """
    found: dict[str, CheckedSplit] = {}
    missing: dict[str, DataError] = {}
    for name, split in ((TRAIN, train_split), (VAL, val_split), (TEST, TEST)):
        try:
            annotations, images = find_split(data_root, split)
        except DataError as error:
            missing[name] = error
            if name == TRAIN:
                folder = data_root / split
                found[name] = _unusable(CheckedSplit(folder, folder), "json-missing", str(error))
            continue
        found[name] = check_split(annotations, images, root=data_root, image_size=image_size)
    if len(missing) == 3:
        raise missing[TRAIN]
    if VAL in found:
        _compare(found[TRAIN], found[VAL])
    return found


def _compare(train: CheckedSplit, val: CheckedSplit) -> None:
    name = val.images.name
    if name.startswith("valid"):
        val.problems.add("split-name", name)
    if train.file and val.file:
        index = choose(train.file)
        shared = find_shared(index, choose(val.file))
        train.shared_rows = index.rows[shared]
        names = [index.file_name(i) for i in shared.tolist()]
        train.problems.add("image-in-train-and-val", *names)
