"""Checks a COCO dataset before anything is trained on it.

    samft check --data_root D
    samft check --annotations FILE --images DIR

Prints what is wrong and what samft does about it, what the dataset holds, and which settings suit
it. `--fix` writes repaired copies of the annotation files, `--pictures` contact sheets of objects,
`--suggest` a configuration for this dataset and this machine, with the reason of each line.
The exit code is 0 for a dataset that can be trained on, 2 for one that cannot.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import starmap
from pathlib import Path
from typing import Any

from samft.annotations.boxes import SAM_IMAGE_SIZE, advise_on_small_objects
from samft.annotations.problems import BAD_IMAGES, NO_MASKS, NOTE, WARNING
from samft.cli import (
    CommandParser,
    add_links_flag,
    image_size_problem,
    parse_image_size,
    run_command,
    simplest_image_size,
    user_path,
)
from samft.coco.layout import (
    describe_folder,
    find_general_set,
    find_split,
    general_copy_files,
)
from samft.coco.repair import write_repaired
from samft.coco.statistics import (
    GENERAL,
    TEST,
    TRAIN,
    VAL,
    CheckedSplit,
    Statistics,
    check_split,
    check_splits,
    compare_general_set,
    compute_statistics,
    suggest_view,
)
from samft.coco.subset import select_objects, split_by_hash
from samft.commands import shell_command, shell_program
from samft.config import TrainConfig
from samft.errors import ConfigError, DataError, escape_unprintable, fold_for_terminal
from samft.images.flags import add_pixel_flags, pixel_flags
from samft.images.pixels import PixelFormat
from samft.reports.contact_sheets import write_sheets
from samft.runtime.files import write_json, write_text
from samft.runtime.own_files import has_keys
from samft.settings import commented_yaml
from samft.suggested_settings import (
    SMALLEST_IMAGE_SIZE,
    Facts,
    Suggestion,
    Windows,
    suggest_settings,
)
from samft.views.fitting import describe_misfits

Splits = dict[str, CheckedSplit]  # by their names in the report
_is_own_report = has_keys("image_size", "errors", "warnings", "notes", "splits")


def main(argv: list[str]) -> dict[str, Any]:
    """Parses the command line, checks the dataset and reports.

    Args:
        argv: The arguments after the program's name; `--help` lists them.

    Returns:
        What `--json` writes.

    Raises:
        ConfigError: A flag is wrong, or names a place that must not or cannot be written to.
        DataError: There is nothing to check, or a split cannot be trained on.
    """
    options = _parse_options(argv)
    splits = _check_dataset(options)
    targets = _find_targets(splits, options)
    _print_report(splits, options)
    report = _to_json(splits, options)
    if options.json:
        with _naming_flag("json", options.json):
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.json, report)
    if options.fix:
        _write_repaired_copies(splits, targets, options)
    if options.pictures:
        _write_pictures(splits, options.pictures)
    _print_lines(["", _verdict_line(report)])
    _raise_for_errors(splits, options)
    if options.suggest:
        _write_suggestions(splits, options)
    return report


def _parse_options(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("check", __doc__)
    add = parser.add_argument
    add("--data_root", type=user_path, metavar="DIR", help="dataset folder, as for samft train")
    add("--train_split", default=TRAIN, metavar="NAME", help="default train")
    add("--val_split", default=VAL, metavar="NAME", help="default val, or valid or validation")
    add("--annotations", type=user_path, metavar="FILE", help="check this file alone")
    add("--images", type=user_path, metavar="DIR", help="its images")
    add(
        "--general_data_root",
        type=user_path,
        metavar="DIR",
        help="also check this dataset of other data, as for samft train",
    )
    add(
        "--image_size",
        type=simplest_image_size,
        default=1024,
        metavar="PX",
        help="model input, or 1024x768 say, as for samft train; default 1024",
    )
    add(
        "--on_bad_image",
        choices=("error", "skip"),
        default="error",
        help="skip: leave missing and broken images out instead of refusing them; default error",
    )
    add_links_flag(add)
    add(
        "--crowds",
        choices=("auto", "leave_out", "use"),
        default="auto",
        help="objects with iscrowd 1; auto: leave out those that look like crowds; default auto",
    )
    add_pixel_flags(add)
    add("--decode", action="store_true", help="decode JPEG and PNG files, too, not only others")
    add("--json", type=user_path, metavar="FILE", help="write the report to this file too")
    add("--fix", type=user_path, metavar="DIR", help="write repaired annotation files there")
    add("--pictures", type=user_path, metavar="DIR", help="write contact sheets of objects there")
    add("--suggest", type=user_path, metavar="FILE", help="write suggested settings to this file")
    add("--debug", action="store_true", help="show tracebacks of user errors too")
    options = parser.parse_args(argv)
    if bool(options.annotations) != bool(options.images):
        raise ConfigError("--annotations and --images go together: give both, or --data_root.")
    if not (options.data_root or options.annotations):
        raise ConfigError("nothing to check: give --data_root, or --annotations and --images.")
    if problem := image_size_problem(options.image_size):
        raise ConfigError(f"--image_size: {problem}.")
    return options


def _check_dataset(options: argparse.Namespace) -> Splits:
    pixels = PixelFormat.parse(**pixel_flags(options))
    splits = _check_own_splits(options, pixels)
    root = options.general_data_root
    if root is not None:
        annotations, images = find_general_set(root)
        train = next(iter(splits.values())).index
        general = _check_file(annotations, images, root, options, train.pixels if train else pixels)
        compare_general_set(general, splits)
        splits[GENERAL] = general
    return splits


def _check_own_splits(options: argparse.Namespace, pixels: PixelFormat) -> Splits:
    if options.annotations is None:
        return check_splits(
            options.data_root,
            train_split=options.train_split,
            val_split=options.val_split,
            image_size=options.image_size,
            allow_links=options.allow_links,
            crowds=options.crowds,
            pixels=pixels,
            decode=options.decode,
        )
    # Beside --annotations, --data_root says how far symbolic links of images may lead.
    path = options.annotations
    split = _check_file(path, options.images, options.data_root, options, pixels)
    beside_images = path.name.startswith("_annotations")
    return {path.resolve().parent.name if beside_images else path.stem: split}


def _check_file(
    annotations: Path,
    images: Path,
    root: Path | None,
    options: argparse.Namespace,
    pixels: PixelFormat,
) -> CheckedSplit:
    return check_split(
        annotations,
        images,
        root=root,
        allow_links=options.allow_links,
        pixels=pixels,
        decode=options.decode,
        image_size=options.image_size,
        crowds=options.crowds,
    )


def _find_targets(splits: Splits, options: argparse.Namespace) -> dict[str, Path]:
    # Of the repaired copies, in the layout of the dataset; refuses places that must not be written.
    sources = {split.annotations.resolve() for split in splits.values()}
    if options.json and options.json.resolve() in sources:
        raise ConfigError(f"--json: {options.json} is an annotation file: choose another name.")
    if options.json and options.json.exists() and not _is_own_report(options.json):
        raise ConfigError(
            f"--json: {options.json} exists, and no check of samft has written it: choose another "
            "name."
        )
    if options.suggest and options.suggest.exists():
        raise ConfigError(f"--suggest: {options.suggest} exists: choose another name.")
    for flag in ("fix", "pictures"):
        target = getattr(options, flag)
        if target and _is_among_data(target.resolve(), splits, options):
            raise ConfigError(
                f"--{flag}: {target} lies among the data, where nothing is written: choose a "
                "folder elsewhere."
            )
    if not options.fix:
        return {}
    targets = {}
    for name, split in splits.items():
        home = split.annotations.parent if options.annotations else options.data_root
        if name == GENERAL:  # which is a folder, and so is its copy
            targets[name], _ = general_copy_files(options.fix / GENERAL)
        else:
            targets[name] = options.fix / split.annotations.relative_to(home)
        if targets[name].exists():
            raise ConfigError(f"--fix: {targets[name]} exists: choose another folder.")
    return targets


def _is_among_data(target: Path, splits: Splits, options: argparse.Namespace) -> bool:
    roots = [root for root in (options.data_root, options.general_data_root) if root]
    folders = [*roots, *(split.images for split in splits.values())]
    inside = any(target.is_relative_to(folder.resolve()) for folder in folders)
    return inside or target in {split.annotations.resolve().parent for split in splits.values()}


def _print_report(splits: Splits, options: argparse.Namespace) -> None:
    for name, split in splits.items():
        title = f"{name}: {split.annotations}"
        suggest = name == TRAIN or (options.annotations is not None and name != GENERAL)
        pixels = split.index.pixels.lines() if split.index else []
        _print_lines(["", title, "=" * len(title), *split.lines(suggest=suggest), *pixels])
        frame_size = parse_image_size(options.image_size)
        if split.index and (misfits := describe_misfits(split.index.sizes, frame_size)):
            _print_lines([misfits])
    if options.data_root and not options.annotations and VAL not in splits:
        there = describe_folder(options.data_root)
        advice = f"name one (--val_split), or train with --val_fraction; {there} is there"
        _print_lines(["", f"no validation split: {advice}"])
    small_objects = {
        name: split.statistics.small
        for name, split in splits.items()
        if split.statistics and name != GENERAL and (name != TEST or options.annotations)
    }
    if advice_on_size := advise_on_small_objects(small_objects):
        _print_lines(["", advice_on_size])


def _to_json(splits: Splits, options: argparse.Namespace) -> dict[str, Any]:
    errors = _errors_of(splits, options)
    return {
        "image_size": options.image_size,
        "errors": sum(sum(counts.values()) for counts in errors.values()),
        "warnings": sum(split.problems.count(WARNING) for split in splits.values()),
        "notes": sum(split.problems.count(NOTE) for split in splits.values()),
        "splits": {name: split.to_json() for name, split in splits.items()},
    }


def _errors_of(splits: Splits, options: argparse.Namespace) -> dict[str, dict[str, int]]:
    # Of each split, how often each error occurs.
    return {
        name: {
            code: issue.count
            for code, issue in split.problems.errors(on_bad_image=options.on_bad_image).items()
        }
        for name, split in splits.items()
    }


def _verdict_line(report: dict[str, Any]) -> str:
    counts = {kind: report[kind] for kind in ("errors", "warnings", "notes")}
    verdict = "cannot be trained on" if counts["errors"] else "can be trained on"
    if not any(counts.values()):
        verdict = "clean"
    listed = ", ".join(f"{kind} {number:,}" for kind, number in counts.items())
    return f"verdict: {verdict} ({listed})"


def _raise_for_errors(splits: Splits, options: argparse.Namespace) -> None:
    errors = {name: counts for name, counts in _errors_of(splits, options).items() if counts}
    if not errors:
        return
    listed = "; ".join(
        f"{name}: {', '.join(f'{code} {number:,}' for code, number in counts.items())}"
        for name, counts in errors.items()
    )
    readable = any(splits[name].index for name in errors)
    advice = " `--fix DIR` writes repaired copies." if readable and not options.fix else ""
    # Where no image of a split can be used, that is why it has no object, and no rest to train on.
    pairs = [(bool(c.keys() & NO_MASKS), bool(c.keys() & BAD_IMAGES)) for c in errors.values()]
    if (True, False) in pairs:
        predict = shell_command("predict", "--annotations", "FILE", "--images", "DIR")
        advice = f" `{predict}` makes masks from boxes."
    if (False, True) in pairs:
        advice += " `--on_bad_image skip` leaves bad images out, here and in training."
    if any(split.problems.has_links_outside for split in splits.values()):
        advice += " `--allow_links DIR` opens those behind links into a folder that you trust."
    raise DataError(f"the dataset cannot be trained on ({listed}).{advice}")


def _write_repaired_copies(
    splits: Splits, targets: dict[str, Path], options: argparse.Namespace
) -> None:
    written: dict[str, Path] = {}
    _print_lines([""])
    for name, split in splits.items():
        if split.index is None:
            _print_lines([f"fix: {name} cannot be read, so there is no repaired copy of it"])
            continue
        target = targets[name]
        with _naming_flag("fix", target):
            try:
                repaired = write_repaired(
                    split.index,
                    split.annotations,
                    target=target,
                    root=options.general_data_root if name == GENERAL else options.data_root,
                    allow_links=options.allow_links,
                    without=split.shared_rows,
                )
            except DataError as error:
                _print_lines([f"fix: {name}: {error}"])
                continue
            if name == GENERAL:
                _, link = general_copy_files(options.fix / GENERAL)
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(split.images.resolve(), target_is_directory=True)
        written[name] = target
        counts = f"{repaired.num_images:,} images, {repaired.num_objects:,} annotations"
        _print_lines([f"fix: {target} ({counts})"])
    _print_lines(_next_commands(splits, written, options))


def _next_commands(
    splits: Splits, written: dict[str, Path], options: argparse.Namespace
) -> list[str]:
    # How to check the copies, and how to train on them.
    general = options.fix / GENERAL if GENERAL in written else options.general_data_root
    roots = {"data_root": options.data_root, GENERAL: general}
    train = [part for name, root in roots.items() if root for part in (f"--{name}", root)]
    can_train = GENERAL in written and not options.annotations
    lines = ["to check again:"] * bool(written)
    for name, target in written.items():
        images, root = splits[name].images, general if name == GENERAL else options.data_root
        home = ["--data_root", root] if root else []
        check = shell_command("check", *home, "--annotations", target, "--images", images)
        lines.append(f"  {check}")
        role = TRAIN if options.annotations else name
        if role not in (TEST, GENERAL):
            train += [f"--{role}_annotations", target, f"--{role}_images", images]
            can_train = True
    if can_train:
        lines += ["to train:", f"  {shell_command('train', *train)}"]
    return lines


def _write_pictures(splits: Splits, folder: Path) -> None:
    with _naming_flag("pictures", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, split in splits.items():
            if split.index is not None:
                paths = write_sheets(split.index, split.problems, folder, name=name)
                _print_lines([f"pictures: {len(paths)} sheets of {name} in {folder}"])


def _write_suggestions(splits: Splits, options: argparse.Namespace) -> None:
    # Only of splits that can be trained on, so all of them are read.
    path = options.suggest.absolute()
    train = next(iter(splits.values())) if options.annotations else splits[TRAIN]
    val = _read_val_split(options) if options.annotations else splits.get(VAL)
    with _naming_flag("suggest", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = _collect_facts(train, val, folder=path.parent)
    output_dir = path.with_suffix("") if path.suffix else path.with_name(f"{path.name}-run")
    suggestions = [
        *(Suggestion(name, value, "") for name, value in _data_settings(options).items()),
        Suggestion("output_dir", str(output_dir), "everything that the run writes"),
        *suggest_settings(facts),
    ]
    settings = {one.setting: one.value for one in suggestions}
    reasons = [(one.reason, {one.setting: one.value}) for one in suggestions]
    if problems := TrainConfig(**settings).check():
        raise ConfigError(f"--suggest: {' '.join(problems)}")
    command = shell_command("train", "--config", path)
    if facts.num_gpus > 1:
        each_gpu = f"--nproc_per_node={facts.num_gpus}"
        command = shell_program("torchrun", each_gpu, "-m", "samft.train", "--config", path)
    title = f"Suggested by samft check for this dataset and this machine. To train: {command}"
    with _naming_flag("suggest", path):
        write_text(path, "\n".join([commented_yaml(title), *starmap(commented_yaml, reasons)]))
    _print_lines(["", f"suggested: {options.suggest}", "to train:", f"  {command}"])


def _read_val_split(options: argparse.Namespace) -> CheckedSplit | None:
    # That of --data_root beside --annotations: a run on these would find it.
    root, pixels = options.data_root, PixelFormat.parse(**pixel_flags(options))
    with suppress(DataError):
        if root:
            return _check_file(*find_split(root, options.val_split), root, options, pixels)
    return None


def _collect_facts(train: CheckedSplit, val: CheckedSplit | None, *, folder: Path) -> Facts:
    from samft.runtime.device import gpu_memories_gib, host_memory_gib, usable_cores

    assert train.index and train.statistics
    numbers, gpus = train.statistics, gpu_memories_gib()
    if val is None:
        try:  # as the run will; any share asks for as many groups
            split_by_hash(select_objects(train.index), 0.5, group_by="auto")
        except DataError as error:
            raise ConfigError(f"--suggest: {error}") from error
    sizes = (SMALLEST_IMAGE_SIZE, SAM_IMAGE_SIZE)
    at_size = {size: _statistics_at(train, size, with_views=True) for size in sizes}
    small = [at_size[SMALLEST_IMAGE_SIZE].small]
    if val and val.index:
        small.append(_statistics_at(val, SMALLEST_IMAGE_SIZE, with_views=False).small)
    seen = {size: suggest_view(one.views) for size, one in at_size.items()}
    return Facts(
        num_images=numbers.num_images_with_objects,
        num_objects=numbers.num_objects,
        num_val_images=val.statistics.num_images_with_objects if val and val.statistics else 0,
        most_masks=numbers.max_masks_per_image,
        image_size=max(one.suggested_side for one in small),
        num_gpus=len(gpus),
        gpu_gib=min(gpus, default=0.0),
        memory_gib=host_memory_gib(),
        cores=usable_cores(),
        disk_gib=shutil.disk_usage(folder).free / 2**30,
        views={k: Windows(one.view.kind, one.windows_per_image) for k, one in seen.items() if one},
    )


def _statistics_at(split: CheckedSplit, image_size: int, *, with_views: bool) -> Statistics:
    # Those of the report, if they are of this size.
    assert split.index and split.statistics
    if split.statistics.image_size == image_size:
        return split.statistics
    return compute_statistics(split.index, image_size=image_size, with_views=with_views)


def _data_settings(options: argparse.Namespace) -> dict[str, Any]:
    # The flags of this command that are settings of a training, but for those at their defaults.
    paths = {
        "data_root": options.data_root,
        "train_annotations": options.annotations,
        "train_images": options.images,
        "general_data_root": options.general_data_root,
    }
    settings: dict[str, Any] = {name: str(p.absolute()) for name, p in paths.items() if p}
    if options.allow_links:
        settings["allow_links"] = ",".join(str(path.absolute()) for path in options.allow_links)
    for name in ("train_split", "val_split", "on_bad_image", "crowds"):
        if (value := getattr(options, name)) != getattr(TrainConfig, name):
            settings[name] = value
    return settings | pixel_flags(options)


@contextmanager
def _naming_flag(flag: str, path: Path) -> Iterator[None]:
    # Turns an OSError into a ConfigError that names the flag.
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--{flag}: {path} cannot be written ({error.strerror}).") from error


def _print_lines(lines: list[str]) -> None:
    # Names in a dataset may hold control characters and line ends, which must not forge a line.
    for line in lines:
        whole = escape_unprintable(line).replace("\n", r"\n").replace("\t", r"\t")
        print(fold_for_terminal(whole, sys.stdout, indent=6), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
