"""The datasets of a run, read and checked: to train, to validate, to test, and a general set."""

import hashlib
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft import distributed
from samft.annotations.boxes import SmallObjects, advise_on_small_objects, find_small_objects
from samft.annotations.problems import NOTE, WARNING
from samft.cli import link_folders, parse_image_size
from samft.coco.layout import find_general_set, find_split, find_test_split
from samft.coco.subset import (
    CocoSubset,
    choose_objects,
    read_coco,
    see_through_windows,
)
from samft.config import TrainConfig
from samft.config_checks import trains_whole_encoder
from samft.data.dataset import Coco2MaskDataset
from samft.data.map_style import DatasetIndex
from samft.data.samplers import repeat_factors
from samft.data.split_overlaps import (
    hold_out_images,
    remove_seen_images,
    remove_validated_images,
    warn_of_known_images,
    warn_of_siblings,
)
from samft.errors import DataError
from samft.evaluation.automatic import sample_images
from samft.images.names import encode_name
from samft.images.pixels import PLAIN, PixelFormat
from samft.runtime.logs import LOGGER
from samft.views.fitting import describe_misfits
from samft.views.windows import WHOLE, View

_MAX_LOGGED = 100  # names of images that could not be read
# Of the general set: the whole of COCO's validation split would take ten times as long, at every
# validation, and 55 images gave the mean change to .01 (docs/experiments.md, Forgetting).
MOST_GENERAL_IMAGES = 500


@dataclass(frozen=True)
class Splits:
    """The datasets of a run, and what was counted while reading them.

    Attributes:
        train: Augmented, at random.
        val: Not augmented, with masks at the original resolution.
        test: As `val`, of images that are in neither; it is scored once, at the end. None: there is
            none.
        general: As `val`, of other data, whose images are seen whole; None: there is none.
        counts: For each split: `images`, their `windows` if any, `masks`, `skipped` by reason,
            `bad_images` by name, and `frame` where outlines are in another one than the pixels.
        fingerprint: Of the training images, see `hash_data`; a resumed run must have the same.
        view: How images are seen.
    """

    train: Coco2MaskDataset
    val: Coco2MaskDataset
    test: Coco2MaskDataset | None
    general: Coco2MaskDataset | None
    counts: dict[str, dict[str, Any]]
    fingerprint: str
    view: View

    @property
    def _datasets(self) -> list[Coco2MaskDataset]:
        # In the order of `counts`.
        return [self.train, self.val, *filter(None, (self.test, self.general))]

    @cached_property
    def val_fingerprint(self) -> str:
        """Of the validation images, see `hash_data`; a resumed run must have the same."""
        return hash_data(self.val.subset)

    @cached_property
    def general_fingerprint(self) -> str:
        """Of the general set, see `hash_data`; empty if there is none."""
        return hash_data(self.general.subset) if self.general else ""

    @property
    def pixels(self) -> PixelFormat:
        """How values of all splits' images become 8 bits, with the ranges that were measured."""
        return self.train.subset.index.pixels

    def use_pixels(self, pixels: PixelFormat) -> None:
        """Takes the ranges of the run that is resumed, instead of those that were measured."""
        for dataset in self._datasets:  # the run may have had another test split or general set
            pixels = dataset.subset.measure_pixels(pixels)
        for dataset in self._datasets:
            dataset.subset = _with_pixels(dataset.subset, pixels)

    @property
    def are_of_one_file(self) -> bool:
        """Whether the validation images were held out of the training file, by `val_fraction`."""
        return self.train.subset.index.problems is self.val.subset.index.problems

    @cached_property
    def small_objects(self) -> dict[str, SmallObjects]:
        """How many objects of each split are small at the run's image size; reads no pixels."""
        splits = {"train": self.train, "val": self.val}
        return {split: _measure_objects(dataset) for split, dataset in splits.items()}

    def _role_of(self, dataset: Coco2MaskDataset) -> str:
        if dataset is self.test:
            return "scored once, at the end of the run"
        return "other data, scored at each validation"

    def log_counts(self) -> None:
        """Logs the number of images and masks, what was left out or repaired, what is small."""
        for dataset, (split, counts) in zip(self._datasets, self.counts.items(), strict=True):
            skipped = ", ".join(f"{reason} {n}" for reason, n in counts["skipped"].items())
            LOGGER.info(
                "%s: %d images%s, %d masks%s%s",
                split,
                counts["images"],
                f" in {counts['windows']} windows" if "windows" in counts else "",
                counts["masks"],
                f"; left out: {skipped}" if skipped else "",
                f"; {self._role_of(dataset)}" if dataset in (self.test, self.general) else "",
            )
            if dataset in (self.test, self.general) or not self.are_of_one_file:
                _log_problems(dataset.subset, counts["bad_images"])
        if self.view.has_windows:
            LOGGER.info("images are seen through %s", self.view.describe())
        if self.are_of_one_file:
            LOGGER.info("of the annotation file that both are parts of:")
            _log_problems(self.train.subset, self.counts["train"]["bad_images"])
        for line in self.pixels.lines():
            LOGGER.info("%s", line)
        for split, small in self.small_objects.items():
            if small.num_small and not small.are_many:
                LOGGER.info("%s: %s", split, small.count("objects"))
        if distributed.is_main():  # a warning is for the other ranks' logs, too
            self._log_warnings()

    def _log_warnings(self) -> None:
        for dataset, split in zip(self._datasets, self.counts, strict=True):
            misfits = describe_misfits(dataset.subset.sizes, dataset.frame_size)
            if misfits and dataset.resize_mode == "pad":  # squashed, they fill it
                LOGGER.warning("%s: %s", split, misfits)
        if advice := advise_on_small_objects(self.small_objects):
            LOGGER.warning("%s", advice)


def _with_pixels(subset: CocoSubset, pixels: PixelFormat) -> CocoSubset:
    # Whether images are only ever read in windows is a matter of the split.
    return subset.with_pixels(replace(pixels, in_windows=subset.index.pixels.in_windows))


def _measure_objects(dataset: Coco2MaskDataset) -> SmallObjects:
    subset = dataset.subset
    objects, places = np.unique(subset.objects, return_index=True)  # as in its first window
    small = find_small_objects(
        subset.index.boxes[objects],
        np.repeat(subset.sizes, np.diff(subset.first_object), axis=0)[places],
        image_size=dataset.image_size,
        resize_mode=dataset.resize_mode,
    )
    return replace(small, in_windows=subset.windows is not None)


def _log_problems(subset: CocoSubset, bad_images: dict[str, str]) -> None:
    # Of the whole file, of which the subset may be a part.
    for line in subset.index.problems.lines(WARNING, NOTE, num_examples=1):
        LOGGER.info("  %s", line)
    if bad_images:
        first = itertools.islice(bad_images.items(), _MAX_LOGGED)
        names = ", ".join(f"{name} ({code})" for name, code in first)
        num_more = len(bad_images) - _MAX_LOGGED
        more = f", and {num_more} more in summary.json" if num_more > 0 else ""
        LOGGER.info("  images left out: %s%s", names, more)


def load_splits(
    config: TrainConfig, own: Mapping[str, DatasetIndex] = MappingProxyType({})
) -> Splits:
    """Reads and checks the annotation files and sets up the datasets.

    Args:
        config: The configuration.
        own: By split, a caller's datasets, which are used instead of files.

    Returns:
        Datasets without an image in common.

    Raises:
        DataError: Files are missing or broken, or there is nothing to validate on. Of a test split
            that is not named by the configuration, that is only logged.
    """
    train_subset = _read_split(config, "train", own)
    val_split = find_val_split(config, own)
    if val_split == "train":
        assert config.val_fraction is not None
        train_subset, val_subset = hold_out_images(
            train_subset, config.val_fraction, group_by=config.group_by
        )
    else:
        val_subset = _read_split(config, "val", own)
        warn_of_siblings(train_subset, val_subset, group_by=config.group_by, split="validation")
        if config.val_fraction is not None:
            LOGGER.warning("val_fraction is not used: there is a validation split")
    train_subset = remove_validated_images(train_subset, val_subset)
    subsets = {"train": train_subset, "val": val_subset}
    used = {"train", val_split} - own.keys()
    own_files = {_find_files(config, split)[0].resolve() for split in used}
    if test_subset := _load_test_subset(config, **subsets, files=own_files):
        subsets["test"] = test_subset
    if config.general_data_root is not None:
        root = Path(config.general_data_root).expanduser()
        subsets["general"] = _load_general_subset(config, root, **subsets)
    return _build_splits(config, subsets)


def _build_splits(config: TrainConfig, subsets: dict[str, CocoSubset]) -> Splits:
    # Of the training images; only what does not occur in them is measured on the others. A caller's
    # own dataset is 8-bit RGB, and says nothing of the files of others.
    files = [subset.index for subset in subsets.values() if subset.index.has_files]
    pixels = files[0].pixels if files else PLAIN
    for subset in subsets.values():
        pixels = subset.measure_pixels(pixels)
    subsets = {split: _with_pixels(subset, pixels) for split, subset in subsets.items()}
    view = view_of(config)
    datasets, counts = {}, {}
    for split, subset in subsets.items():
        through = WHOLE if split == "general" else view
        seen = see_through_windows(subset, through, training=split == "train")
        datasets[split] = _build_dataset(seen, config, training=split == "train")
        counts[split] = _count_subset(seen)
    if config.on_bad_image == "skip":
        _refuse_unreadable(datasets["val"], _NO_VALIDATION)
        if "general" in datasets:
            _refuse_unreadable(datasets["general"], _NO_GENERAL_SET)
    return Splits(
        train=datasets["train"],
        val=datasets["val"],
        test=datasets.get("test"),
        general=datasets.get("general"),
        counts=counts,
        fingerprint=hash_data(datasets["train"].subset),
        view=view,
    )


def view_of(config: TrainConfig) -> View:
    """How a configuration has images seen."""
    tile_size = config.tile_size or max(parse_image_size(config.image_size))
    return View(config.view, tile_size, config.tile_overlap, config.view_context)


# What is wrong where no image can be used: the images, the consequence, what to do.
_NO_VALIDATION = (
    "validation images",
    ", so nothing would tell which checkpoint is best",
    "name another validation split, or set val_fraction.",
)
_NO_GENERAL_SET = ("images of general_data_root", "", "name another folder, or leave it out.")


def _refuse_unreadable(val: Coco2MaskDataset, consequence: tuple[str, str, str]) -> None:
    # Nearly always the first image can be decoded, so that this takes no time.
    bad_images: dict[str, str] = {}
    for i in range(len(val)):
        bad_of_sample = val[i].bad_images
        if not bad_of_sample:
            return
        bad_images |= bad_of_sample
    images, so, advice = consequence
    raise DataError(
        f"none of the {len(val)} {images} can be used{so} (the first: "
        f"{next(iter(bad_images.values()))}) Replace them, or {advice}"
    )


def find_val_files(config: TrainConfig) -> tuple[str, tuple[Path, Path]]:
    """Finds the files of the validation images, which may be held out of the training split.

    Returns:
        The split that the images belong to, `val` or `train`; its COCO file and its image folder.

    Raises:
        DataError: There is no validation split, and none is to be held out.
    """
    try:
        return "val", _find_files(config, "val")
    except DataError as error:
        if config.val_fraction is None:
            hint = " With no validation split, set val_fraction (say 0.2) to hold images out."
            raise DataError(f"{error}{hint}") from error
        return "train", _find_files(config, "train")


def _load_test_subset(
    config: TrainConfig, *, train: CocoSubset, val: CocoSubset, files: set[Path]
) -> CocoSubset | None:
    # The images of the test split that are in no other, whose annotation files are given; None
    # where there are none.
    is_named = config.test_annotations is not None or config.test_split != "auto"
    try:
        test_files = _find_test_files(config)
        if test_files is None or (not is_named and test_files[0].resolve() in files):
            return None
        subset = _read_subset(config, test_files)
    except DataError as error:
        if is_named:
            raise
        LOGGER.info("test_split auto: nothing is scored at the end of the run: %s", error)
        return None
    warn_of_siblings(train, subset, group_by=config.group_by, split="test")
    return remove_seen_images(subset, train, val)


def _load_general_subset(config: TrainConfig, root: Path, **others: CocoSubset) -> CocoSubset:
    # Of all classes, as they are not those of data_root, and of images as a whole.
    files = find_general_set(root)
    whole = _read_subset(replace(config, category_names=None, view="image"), files, root=root)
    return choose_general_images(whole, {split: others[split] for split in ("train", "val")})


def choose_general_images(whole: CocoSubset, known: Mapping[str, CocoSubset]) -> CocoSubset:
    """The images of a general set that are scored, the same in all runs and commands.

    Args:
        whole: All of its images, with objects of all classes.
        known: The other splits, by name; images that are also in them are warned of.
    """
    subset = sample_images(whole, MOST_GENERAL_IMAGES, seed=0)
    num_left_out = whole.num_images - subset.num_images
    counts = whole.counts | ({"image-not-drawn": num_left_out} if num_left_out else {})
    warn_of_known_images(subset, known)
    return replace(subset, counts=counts)


def _find_test_files(config: TrainConfig) -> tuple[Path, Path] | None:
    if config.test_annotations is None:
        if config.test_split == "none":
            return None
        if config.test_split == "auto":
            root = config.data_root
            return None if root is None else find_test_split(Path(root).expanduser())
    return _find_files(config, "test")


def find_val_split(config: TrainConfig, own: Collection[str]) -> str:
    """The split that the validation images belong to: `val`, or `train` if they are held out of it.

    Args:
        config: The configuration.
        own: The splits that are a caller's datasets.

    Raises:
        DataError: There is no validation split, and none is to be held out.
    """
    has_files = config.data_root is not None or config.val_annotations is not None
    if "val" in own:
        return "val"
    if "train" not in own or has_files:
        return find_val_files(config)[0]
    if config.val_fraction is None:
        raise DataError(
            "there is nothing to validate on: give val_data, or val_fraction (say 0.2), which "
            "holds out items of train_data; or data_root with a validation split."
        )
    return "train"


def _read_split(config: TrainConfig, split: str, own: Mapping[str, DatasetIndex]) -> CocoSubset:
    if split not in own:
        return _read_subset(config, _find_files(config, split))
    return choose_objects(
        own[split],
        source=f"{split}_data",
        category_names=(config.category_names or "").split(","),
        min_mask_area=config.min_mask_area,
    )


def _read_subset(
    config: TrainConfig, files: tuple[Path, Path], *, root: Path | None = None
) -> CocoSubset:
    if root is None and config.data_root is not None:
        root = Path(config.data_root).expanduser()
    pixels = PixelFormat.parse(
        pixel_range=config.pixel_range, channels=config.channels, page=config.page
    )
    return read_coco(
        *files,
        root=root,
        allow_links=link_folders(config.allow_links),
        crowds=config.crowds,
        pixels=replace(pixels, in_windows=view_of(config).has_windows),
        on_bad_image=config.on_bad_image,
        category_names=(config.category_names or "").split(","),
        min_mask_area=config.min_mask_area,
    )


def _find_files(config: TrainConfig, split: str) -> tuple[Path, Path]:
    annotations = getattr(config, f"{split}_annotations")
    if annotations is not None:
        return Path(annotations).expanduser(), Path(getattr(config, f"{split}_images")).expanduser()
    if config.data_root is None:
        raise DataError(f"there is no {split} split: data_root and {split}_annotations are empty.")
    return find_split(
        Path(config.data_root).expanduser(),
        getattr(config, f"{split}_split"),
        flags=f"--{split}_split NAME, or --{split}_annotations FILE and --{split}_images DIR",
    )


def _count_subset(subset: CocoSubset) -> dict[str, Any]:
    return {
        "images": len(np.unique(subset.rows)),
        **({"windows": subset.num_images} if subset.windows is not None else {}),
        "masks": len(np.unique(subset.objects)),
        "skipped": dict(subset.counts),
        "bad_images": dict(subset.index.bad_images),
        **({"frame": subset.index.frame} if subset.index.frame else {}),
    }


def count_repeats(subset: CocoSubset, threshold: float | None) -> NDArray[np.float64] | None:
    """How often each training image is shown in an epoch, to show rare classes more often.

    Args:
        subset: The training images and objects.
        threshold: See `samplers.repeat_factors`; None: show each image once.

    Returns:
        float64 [N]; None without a threshold.
    """
    if threshold is None:
        return None
    image_of = np.repeat(np.arange(subset.num_images), np.diff(subset.first_object))
    categories = subset.index.categories[subset.objects]
    repeats = repeat_factors(
        image_of, categories, num_images=subset.num_images, threshold=threshold
    )
    LOGGER.info(
        "repeat_threshold %g: %d of %d images are shown more than once in an epoch, up to %.1f "
        "times",
        threshold,
        (repeats > 1).sum(),
        len(repeats),
        repeats.max(),
    )
    return repeats


def _build_dataset(subset: CocoSubset, config: TrainConfig, *, training: bool) -> Coco2MaskDataset:
    return Coco2MaskDataset(
        subset.index.image_folder,
        None,
        subset=subset,
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        training=training,
        max_masks_per_image=config.max_masks_per_image,
        box_jitter=config.box_jitter,
        augment=config.augment,
        loss_resolution=config.loss_resolution,
        num_clicks=config.num_clicks,
        move_windows=config.view == "objects" and trains_whole_encoder(config),
        on_bad_image=config.on_bad_image,
        seed=config.seed,
    )


def hash_data(subset: CocoSubset) -> str:
    """SHA-256 of the names of images, and of all ids and boxes."""
    index = subset.index
    names = "\n".join(subset.file_name(i) for i in range(subset.num_images))
    digest = hashlib.sha256(encode_name(names))
    for array in (index.image_ids[subset.rows], index.object_ids[subset.objects]):
        digest.update(array.tobytes())
    digest.update(index.boxes[subset.objects].tobytes())
    if index.frame:
        digest.update(index.orientations[subset.rows].tobytes())
    if subset.windows is not None:
        digest.update(subset.windows.tobytes())
    if isinstance(index, DatasetIndex):  # its names say nothing of what is in it
        digest.update(index.digests[subset.rows].tobytes())
        digest.update(index.segmentations.buffer.tobytes())
    return digest.hexdigest()
