"""Looks through a COCO dataset before anything is trained on it.

    python -m samft.check --data_root D
    python -m samft.check --annotations FILE --images DIR

Says what is wrong and what becomes of it, what the set holds, and which settings suit it. `--fix`
writes mended copies of the annotation files, `--pictures` contact sheets of objects. The exit code
is 0 for a set that can be trained on, 2 for one that cannot.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samft.cli import CommandParser, run_command, user_path
from samft.coco.problems import BAD_IMAGES, NOTE, WARNING
from samft.coco.repair import write_repaired
from samft.coco.statistics import TEST, TRAIN, VAL, CheckedSplit, check_split, check_splits
from samft.errors import ConfigError, DataError
from samft.reports.contact_sheets import write_sheets
from samft.runtime.files import write_json


def main(argv: list[str]) -> dict[str, Any]:
    """Parses the command line, checks, and reports.

    Args:
        argv: The arguments after the program's name; `--help` lists them.

    Returns:
        What `--json` writes.

    Raises:
        ConfigError: A flag is wrong, or names a place that must not or cannot be written to.
        DataError: There is nothing to check, or a split cannot be trained on.
    """
    options = _parse(argv)
    found = _check(options)
    targets = _find_targets(found, options)
    for name, split in found.items():
        title = f"{name}: {split.annotations}"
        suggest = name == TRAIN or options.annotations is not None
        _say(["", title, "=" * len(title), *split.lines(suggest=suggest)])
    if options.data_root and not options.annotations and VAL not in found:
        _say(["", "no validation split: name one (--val_split), or train with --val_fraction"])
    report = _to_json(found, options)
    if options.json:
        with _writing("json", options.json):
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.json, report)
    if options.fix:
        _fix(found, targets, options)
    if options.pictures:
        _draw(found, options.pictures)
    _say(["", _verdict(report)])
    _refuse(found, options)
    return report


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("python -m samft.check", __doc__)
    add = parser.add_argument
    add("--data_root", type=user_path, metavar="DIR", help="dataset folder, as for samft.train")
    add("--train_split", default=TRAIN, metavar="NAME", help="default train")
    add("--val_split", default=VAL, metavar="NAME", help="default val, or valid or validation")
    add("--annotations", type=user_path, metavar="FILE", help="check this file alone")
    add("--images", type=user_path, metavar="DIR", help="its images")
    add("--image_size", type=int, default=1024, metavar="PX", help="model input; default 1024")
    add(
        "--on_bad_image",
        choices=("error", "skip"),
        default="error",
        help="skip: missing and broken images are left out, and no errors; default error",
    )
    add("--json", type=user_path, metavar="FILE", help="write the report to this file too")
    add("--fix", type=user_path, metavar="DIR", help="write mended annotation files there")
    add("--pictures", type=user_path, metavar="DIR", help="write contact sheets of objects there")
    add("--debug", action="store_true", help="show tracebacks of user errors too")
    options = parser.parse_args(argv)
    if bool(options.annotations) != bool(options.images):
        raise ConfigError("--annotations and --images go together: give both, or --data_root.")
    if not (options.data_root or options.annotations):
        raise ConfigError("nothing to check: give --data_root, or --annotations and --images.")
    if options.image_size < 16 or options.image_size % 16:
        raise ConfigError(f"--image_size: {options.image_size} must be a multiple of 16.")
    return options


def _check(options: argparse.Namespace) -> dict[str, CheckedSplit]:
    if options.annotations is None:
        return check_splits(
            options.data_root,
            train_split=options.train_split,
            val_split=options.val_split,
            image_size=options.image_size,
        )
    # Beside --annotations, --data_root says how far symbolic links of images may lead.
    split = check_split(
        options.annotations,
        options.images,
        root=options.data_root,
        image_size=options.image_size,
    )
    file = options.annotations
    beside_images = file.name.startswith("_annotations")
    name = file.resolve().parent.name if beside_images else file.stem
    return {name: split}


def _find_targets(found: dict[str, CheckedSplit], options: argparse.Namespace) -> dict[str, Path]:
    """Where mended copies go, in the same layout.

    Raises:
        ConfigError: Something that is there already would be in the way or among what is written.
    """
    sources = {split.annotations.resolve() for split in found.values()}
    if options.json and options.json.resolve() in sources:
        raise ConfigError(f"--json: {options.json} is an annotation file: choose another name.")
    for flag in ("fix", "pictures"):
        target = getattr(options, flag)
        if target and _is_among_data(target.resolve(), found, options.data_root):
            raise ConfigError(
                f"--{flag}: {target} lies among the data, where nothing is written: choose a "
                "folder elsewhere."
            )
    if not options.fix:
        return {}
    targets = {}
    for name, split in found.items():
        home = split.annotations.parent if options.annotations else options.data_root
        targets[name] = options.fix / split.annotations.relative_to(home)
        if targets[name].exists():
            raise ConfigError(f"--fix: {targets[name]} exists: choose another folder.")
    return targets


def _is_among_data(target: Path, found: dict[str, CheckedSplit], root: Path | None) -> bool:
    own = [split.images for split in found.values()] + ([root] if root else [])
    inside = any(target.is_relative_to(folder.resolve()) for folder in own)
    return inside or target in {split.annotations.resolve().parent for split in found.values()}


def _to_json(found: dict[str, CheckedSplit], options: argparse.Namespace) -> dict[str, Any]:
    errors = [split.errors(on_bad_image=options.on_bad_image) for split in found.values()]
    return {
        "image_size": options.image_size,
        "errors": sum(sum(counts.values()) for counts in errors),
        "warnings": sum(split.problems.count(WARNING) for split in found.values()),
        "notes": sum(split.problems.count(NOTE) for split in found.values()),
        "splits": {name: split.to_json() for name, split in found.items()},
    }


def _verdict(report: dict[str, Any]) -> str:
    clean = not any(report[word] for word in ("errors", "warnings", "notes"))
    words = (
        "cannot be trained on" if report["errors"] else "clean" if clean else "can be trained on"
    )
    counts = ", ".join(f"{word} {report[word]:,}" for word in ("errors", "warnings", "notes"))
    return f"verdict: {words} ({counts})"


def _refuse(found: dict[str, CheckedSplit], options: argparse.Namespace) -> None:
    errors = {
        name: split.errors(on_bad_image=options.on_bad_image) for name, split in found.items()
    }
    texts = [
        f"{name}: {', '.join(f'{code} {number:,}' for code, number in counts.items())}"
        for name, counts in errors.items()
        if counts
    ]
    if not texts:
        return
    readable = any(split.index for split in found.values())
    advice = " `--fix DIR` writes mended copies." if readable and not options.fix else ""
    if any(code in BAD_IMAGES for counts in errors.values() for code in counts):
        advice += " `--on_bad_image skip` leaves bad images out, here and in training."
    raise DataError(f"the dataset cannot be trained on ({'; '.join(texts)}).{advice}")


def _fix(
    found: dict[str, CheckedSplit], targets: dict[str, Path], options: argparse.Namespace
) -> None:
    written: dict[str, Path] = {}
    _say([""])
    for name, split in found.items():
        if split.index is None:
            _say([f"fix: {name} cannot be read, so there is no mended copy of it"])
            continue
        with _writing("fix", targets[name]):
            try:
                mended = write_repaired(
                    split.index,
                    split.annotations,
                    targets[name],
                    root=options.data_root,
                    without=split.shared_rows,
                )
            except DataError as error:
                _say([f"fix: {name}: {error}"])
                continue
        written[name] = targets[name]
        counts = f"{mended.num_images:,} images, {mended.num_objects:,} annotations"
        _say([f"fix: {targets[name]} ({counts})"])
    _say(_next_commands(found, written, options))


def _next_commands(
    found: dict[str, CheckedSplit], written: dict[str, Path], options: argparse.Namespace
) -> list[str]:
    root = ["--data_root", options.data_root] if options.data_root else []
    lines = ["to check again:"] * bool(written)
    words: list[Any] = []
    for name, target in written.items():
        place = [target, "--images", found[name].images]
        lines.append(f"  python -m samft.check {_join(*root, '--annotations', *place)}")
        role = TRAIN if options.annotations else name
        if role != TEST:
            words += [f"--{role}_annotations", target, f"--{role}_images", found[name].images]
    if words:
        lines += ["to train:", f"  python -m samft.train {_join(*root, *words)}"]
    return lines


def _join(*words: Any) -> str:
    return shlex.join(map(str, words))


def _draw(found: dict[str, CheckedSplit], folder: Path) -> None:
    with _writing("pictures", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, split in found.items():
            if split.index is not None:
                paths = write_sheets(split.index, split.problems, folder, name=name)
                _say([f"pictures: {len(paths)} sheets of {name} in {folder}"])


@contextmanager
def _writing(flag: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--{flag}: {path} cannot be written ({error.strerror}).") from error


def _say(lines: list[str]) -> None:
    for line in lines:
        # The names in a dataset may hold control characters, and what no terminal can show.
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
