"""Finds the splits of a dataset under its root. Imports no torch."""

import codecs
import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from samft.errors import DataError
from samft.images.names import is_image_name
from samft.runtime.files import open_file
from samft.runtime.logs import LOGGER

VAL_NAMES = ("val", "valid", "validation")  # of a validation split
_SPLIT_NAMES = {"val": VAL_NAMES}
_ROLES = (("train", "training"), VAL_NAMES, ("test", "testing"))
# Words in the name of an annotation file that name no split.
_NO_NAME = r"instances|annotations?|coco|labels?|results?|default|data|dataset|json"
_OTHER_TASKS = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")
_TEXT_FORMATS = {
    "YOLO's labels": ("data.yaml", "labels/*.txt", "labels/*/*.txt", "*/labels/*.txt"),
    "Pascal VOC's XML": ("*.xml", "*/*.xml"),
}
_JSON_FORMATS = {
    b'"shapes"': "LabelMe's JSON",
    b'"_via_': "VIA's JSON",
    b'"regions"': "VIA's JSON",
    b'"segments_info"': "panoptic JSON",
    b'"from_name"': "Label Studio's own JSON",
}
_HEAD = 1 << 20  # bytes of an annotation file that tell whether it may be COCO's
_MAX_FOLDERS, _MAX_FILES = 200, 50  # that are looked at; more JSON files are one for each image


@dataclass(frozen=True)
class SplitFiles:
    """An annotation file under a dataset's root, whatever its name.

    Attributes:
        name: Of the split; empty where neither the file nor its folder is called after one.
        annotations: The COCO file.
        images: The folder of its images.
    """

    name: str
    annotations: Path
    images: Path


def find_split(data_root: Path, split: str, *, flags: str = "") -> tuple[Path, Path]:
    """Finds a split's annotation file and image folder under a dataset's root.

    Two layouts: `SPLIT/_annotations.coco.json` beside its images, and the official
    `annotations/instances_SPLIT.json` with `SPLIT/`. For `val`, `valid` and `validation` are tried
    as well; a year at the end (`train2017`) may be left out where there is only one. Where neither
    is there, the only file that can be meant is taken, whatever its place: `Train` for `train`, or
    for `train` the only COCO file of all. That is logged.

    Args:
        data_root: The dataset's folder.
        split: The name of the split.
        flags: The flags of the command that name a split or its files, for the error.

    Raises:
        DataError: If there is no such folder, no such split, or more than one that fits.
    """
    flags = flags or "the name of the split, or the annotation file and the image folder"
    if not data_root.is_dir():
        if data_root.exists():
            raise DataError(f"{data_root} is no folder: give {flags}.")
        raise DataError(f"There is no dataset folder {data_root}: check --data_root.")
    named = _find_by_name(data_root, split)
    return named if named else _find_by_likeness(data_root, split, flags)


def find_test_split(data_root: Path) -> tuple[Path, Path] | None:
    """As `find_split` for `test`, which a dataset need not have: None where there is none.

    Raises:
        DataError: There is more than one.
    """
    if named := _find_by_name(data_root, "test"):
        return named
    has_one = any(role_of(each.name) == "test" for each in list_splits(data_root))
    return find_split(data_root, "test", flags="--test_split NAME, or none") if has_one else None


def find_general_set(data_root: Path) -> tuple[Path, Path]:
    """The validation split of another dataset or, where that has one COCO file only, all of it.

    Args:
        data_root: The dataset's folder, `general_data_root`.

    Raises:
        DataError: There is no such folder, no such file, or more than one.
    """
    if not data_root.is_dir():
        what = "is no folder" if data_root.exists() else "does not exist"
        raise DataError(
            f"general_data_root: {data_root} {what}: give the folder of a dataset, laid out as "
            "that of data_root."
        )
    try:
        if named := _find_by_name(data_root, "val"):
            return named
        splits = list_splits(data_root)
        if len(splits) == 1:
            return splits[0].annotations, splits[0].images
        return find_split(
            data_root, "val", flags="a folder with a validation split, or with a single COCO file"
        )
    except DataError as error:
        raise DataError(f"general_data_root: {error}") from error


def general_copy_files(folder: Path) -> tuple[Path, Path]:
    """Where `find_general_set` finds a copy of one: its COCO file, and a link to its images.

    The link is not `val`: through it, a COCO file beside the images would be found, not the copy.
    """
    return folder / "annotations" / "instances_val.json", folder / "images" / "val"


def _find_by_name(data_root: Path, split: str) -> tuple[Path, Path] | None:
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
            return annotations, _image_folder(data_root, annotations, fitting[0])
    return None


def _find_by_likeness(data_root: Path, split: str, flags: str) -> tuple[Path, Path]:
    tried = " or ".join(_SPLIT_NAMES.get(split, (split,)))
    splits = list_splits(data_root)
    fitting = [each for each in splits if role_of(each.name) == role_of(split)]
    fitting = fitting or [each for each in splits if _roles_in(each.name) == {role_of(split)}]
    if not fitting and role_of(split) == "train" and len(splits) == 1:
        fitting = [] if _roles_in(splits[0].name) else splits
    if len(fitting) == 1:
        annotations, images = fitting[0].annotations, fitting[0].images
        _log_once(f"split {split}: {annotations}, with the images in {images}")
        return annotations, images
    problem = f"more than one split for {split!r}" if fitting else f"no split {tried}"
    raise DataError(
        f"{data_root} has {problem}: neither {split}/_annotations.coco.json nor "
        f"annotations/instances_{split}.json. It holds {describe_folder(data_root)}. Give {flags}."
    )


@functools.cache
def _log_once(message: str) -> None:
    # A run finds its validation split again for its report.
    LOGGER.info("%s", message)


def role_of(name: str) -> str:
    """`train`, `val` or `test` for a split's name in any spelling, with or without a year."""
    plain = re.sub(r"\d{4}$", "", name.casefold())
    return next((role[0] for role in _ROLES if plain in role), name.casefold())


def _roles_in(name: str) -> set[str]:
    # Of the words of a file's name, such as lvis_v1_train or val_fold0.
    return {role_of(word) for word in name.split("_")} & {role[0] for role in _ROLES}


def list_splits(data_root: Path) -> list[SplitFiles]:
    """The COCO files in a dataset's folder, its folder `annotations` and its other subfolders."""
    splits = []
    for folder in _folders_of(data_root):
        for path in _json_files(folder):
            if not path.name.startswith(_OTHER_TASKS) and _may_be_coco(path):
                name = _split_name(data_root, path)
                splits.append(SplitFiles(name, path, _image_folder(data_root, path, name)))
    return splits


def describe_folder(data_root: Path) -> str:
    """What a dataset's folder holds in the place of a split: COCO files, or other formats."""
    splits = list_splits(data_root)
    parts = [
        f"{split.annotations.relative_to(data_root)} (images in {split.images})"
        for split in splits[:10]
    ]
    coco = {split.annotations for split in splits}
    files = [file for folder in _folders_of(data_root) for file in _json_files(folder)]
    others: dict[str, list[str]] = {}
    for file in files:
        if file not in coco:
            others.setdefault(_format_of(file), []).append(str(file.relative_to(data_root)))
    for name, patterns in _TEXT_FORMATS.items():
        matching = (file for pattern in patterns for file in data_root.glob(pattern))
        some = [str(file.relative_to(data_root)) for file in itertools.islice(matching, 6)]
        others |= {name: some} if some else {}
    parts += [f"{name} ({_shorten(paths)})" for name, paths in others.items()]
    if others and not splits:
        parts[-1] += ", which has to be exported or converted to COCO first"
    nested = [] if splits else [each for each in _folders_of(data_root)[1:] if list_splits(each)]
    parts += [f"a dataset in its folder {folder.name}" for folder in nested[:3]]
    if not parts:
        names = sorted(path.name for path in itertools.islice(data_root.iterdir(), 1000))
        return f"no annotations, only {_shorten(names)}" if names else "nothing"
    return ", ".join(parts)


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _folders_of(data_root: Path) -> list[Path]:
    folders = (path for path in data_root.iterdir() if not path.name.startswith("."))
    folders = (path for path in itertools.islice(folders, 10_000) if path.is_dir())
    return [data_root, *sorted(itertools.islice(folders, _MAX_FOLDERS))]


def _json_files(folder: Path) -> list[Path]:
    try:
        files = (path for path in folder.glob("*.json") if not path.name.startswith("."))
        some = list(itertools.islice(files, _MAX_FILES + 1))
    except OSError:
        return []
    return sorted(some) if len(some) <= _MAX_FILES else []


def _may_be_coco(path: Path) -> bool:
    head = _head_of(path)
    starts_well = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
    if len(head) < _HEAD:
        return starts_well and b'"images"' in head and b'"annotations"' in head
    return starts_well and not any(word in head for word in _JSON_FORMATS)


def _format_of(path: Path) -> str:
    head = _head_of(path)
    return next((name for word, name in _JSON_FORMATS.items() if word in head), "other JSON")


def _head_of(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def _split_name(data_root: Path, path: Path) -> str:
    # Of the file where it says one, else of its folder.
    pieces = re.split(r"[_.\-\s]+", path.stem)
    name = "_".join(word for word in pieces if word and not re.fullmatch(_NO_NAME, word.lower()))
    if not name and path.parent.name.lower() != "annotations":
        name = path.parent.resolve().name
        if path.parent == data_root and role_of(name) not in ("train", "val", "test"):
            name = ""  # the dataset's, not a split's
    return name


def _image_folder(data_root: Path, annotations: Path, name: str) -> Path:
    home = annotations.parent
    if home != data_root and (name == home.name or _holds_images(home)):
        return home
    places = (data_root, data_root / "images")
    exact = [place / name for place in places if name and (place / name).is_dir()]
    alike = [folder for place in places for folder in _folders_like(place, name)]
    general = [data_root / each for each in ("images", "data") if (data_root / each).is_dir()]
    return [*exact, *alike, *general, data_root][0]


def _holds_images(folder: Path) -> bool:
    return any(is_image_name(path.name) or path.name == "images" for path in folder.iterdir())


def _folders_like(place: Path, name: str) -> list[Path]:
    if not name or not place.is_dir():
        return []
    return [
        path
        for path in sorted(place.iterdir())
        if role_of(path.name) == role_of(name) and path.is_dir()
    ]


def _official_names(data_root: Path, name: str) -> list[str]:
    if (data_root / "annotations" / f"instances_{name}.json").is_file():
        return [name]
    pattern = re.compile(rf"instances_({re.escape(name)}\d{{4}})\.json")
    files = sorted((data_root / "annotations").glob("instances_*.json"))
    return [match[1] for match in map(pattern.fullmatch, (file.name for file in files)) if match]
