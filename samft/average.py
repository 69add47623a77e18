"""Averages the weights of two checkpoints, and keeps the average that scores best.

    samft average UNTOUCHED.pth TUNED.ckpt --data_root D --output averaged.pth
    torchrun --nproc_per_node=8 -m samft.average A B --data_root D --output averaged.pth

Tuned weights are better on what they were tuned on, and often worse on everything else. Points on
the line from A, the weights before, to B, those after, lie in between, and some may be better than
both. Each point is scored on a split as samft evaluate does it, in a table; the best one, by IoU,
is written with a sidecar that says which files it is of. A and B are points, too, so it scores no
less than either on this split; a split that has chosen nothing tells how good it is.
"""

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samft.cli import CommandParser, parse_image_size, run_command, user_path
from samft.commands import shell_command
from samft.ending import end_process
from samft.errors import CheckpointError, ConfigError, escape_unprintable
from samft.prediction.split_flags import (
    add_computation_flags,
    add_selection_flags,
    add_split_flags,
    check_split_flags,
)
from samft.runtime.output_dir import create_writable_dir
from samft.runtime.signals import check_launch_environment, die_with_parent

if TYPE_CHECKING:
    import torch
    from segment_anything.modeling import Sam
    from torch import Tensor

    from samft.coco.subset import CocoSubset
    from samft.data.dataset import Batch
    from samft.evaluation.evaluator import EvaluatedObjects
    from samft.images.pixels import PixelFormat
    from samft.models.prompted_sam import PromptedSam
    from samft.views.windows import View

    State = dict[str, Tensor]

POINTS = tuple(k / 10 for k in range(11))
MOST_POINTS = 101


def main(argv: list[str]) -> dict[str, Any]:
    """Parses the command line, scores the averages, writes the best one, prints a table.

    Args:
        argv: The arguments after the program's name; `--help` lists them.

    Returns:
        The content of the sidecar; empty on ranks other than 0.

    Raises:
        UserError: The flags, the checkpoints, the data or the output cannot be used.
        TrainingError: Another process failed.
    """
    if "RANK" in os.environ:  # before the seconds that importing torch takes
        die_with_parent()
    check_launch_environment()
    options = _parse_options(argv)
    # Imported late: torch takes seconds, and --help and wrong flags must answer at once.
    from samft.recipes.evaluate import joined_group

    with joined_group(options.device) as device:
        sidecar, lines = _average_checkpoints(options, device)
    for line in lines:
        print(escape_unprintable(line), flush=True)
    return sidecar


def _parse_options(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        "average", __doc__, usage="%(prog)s A B --output FILE [--FLAG VALUE ...]"
    )
    group = parser.add_argument_group("checkpoints and data")
    group.add_argument(
        "checkpoint",
        type=user_path,
        nargs=2,
        metavar="FILE",
        help="A and B, two checkpoints of the same model and image size: the weights before and "
        "after tuning, say",
    )
    group.add_argument(
        "--points",
        type=_parse_points,
        default=POINTS,
        metavar="W,W",
        help="shares of B in the averages, 0 to 1; those of A and B themselves, 0 and 1, are "
        "always among them (default: 0,0.1,...,1)",
    )
    add_split_flags(group.add_argument)
    group.add_argument(
        "--general_data_root",
        type=user_path,
        metavar="DIR",
        help="folder of other data, as for samft train, that is scored at all points and chooses "
        "none; none: no such data (default: that of the tuned checkpoint's run)",
    )
    add_selection_flags(parser.add_argument_group("which objects").add_argument)
    group = parser.add_argument_group("output and computation")
    group.add_argument(
        "--output",
        type=user_path,
        required=True,
        metavar="FILE.pth",
        help="file for the best average; its sidecar, FILE.json, is written beside it",
    )
    group.add_argument("--force", action="store_true", help="replace an earlier file at --output")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of jittered boxes (default: 0)"
    )
    add_computation_flags(group.add_argument)
    options = parser.parse_args(argv)
    check_split_flags(options, field=None)
    _check_files(options)
    return options


def _parse_points(text: str) -> tuple[float, ...]:
    try:
        points = {float(part) for part in text.split(",")}
    except ValueError:
        points = {math.nan}
    if not all(0 <= point <= 1 for point in points):  # nan is not
        raise argparse.ArgumentTypeError(
            f"'{text}' is no list of numbers from 0 to 1, separated by commas, such as 0.25,0.5"
        )
    if len(points) > MOST_POINTS:
        raise argparse.ArgumentTypeError(f"{len(points)} points: give {MOST_POINTS} at most")
    return tuple(sorted({0.0, 1.0} | points))


def _check_files(options: argparse.Namespace) -> None:
    first, second = options.checkpoint
    if first.samefile(second):
        raise ConfigError(f"{first} and {second} are the same file: give two checkpoints.")
    output: Path = options.output
    if output.suffix != ".pth":
        raise ConfigError(f"--output: {output} does not end in .pth: name a .pth file.")
    sidecar = output.with_suffix(".json")
    inputs = {
        file.resolve() for path in (first, second) for file in (path, path.with_suffix(".json"))
    }
    for path in (output, sidecar):
        if path.is_dir():
            raise ConfigError(f"--output: {path} is a folder: name a file in it.")
        if path.resolve() in inputs:
            raise ConfigError(
                f"--output: {path} is one of the checkpoints or its sidecar: choose another name."
            )
        if path.exists() and not options.force:
            raise ConfigError(
                f"--output: {path} exists: choose another name, or replace it with --force."
            )
    create_writable_dir(output.parent, field="--output")


def _average_checkpoints(
    options: argparse.Namespace, device: "torch.device"
) -> tuple[dict[str, Any], list[str]]:
    # Collective. The sidecar of what was written, and lines for the terminal; rank 0's alone.
    from samft import distributed
    from samft.coco.subset import see_through_windows
    from samft.distributed import run_on_all_ranks
    from samft.evaluation.tables import summarise_line
    from samft.recipes.evaluate import find_files, read_subset
    from samft.weights.averages import best_point

    ends, metadata = run_on_all_ranks(lambda: _read_ends(options))
    view, pixels = run_on_all_ranks(lambda: _read_formats(options, metadata))
    metadata["view"] = view.to_json()
    annotations, images = run_on_all_ranks(lambda: find_files(options))
    subset = run_on_all_ranks(
        lambda: read_subset(options, annotations, images=images, pixels=pixels)
    )
    subset = subset.with_pixels(subset.measure_pixels(pixels))
    general = run_on_all_ranks(lambda: _read_general_set(options, pixels, subset))
    through = see_through_windows(subset, view)
    tables = _score_points(ends, metadata, through, options, device)
    of_general = _score_points(ends, metadata, general, options, device) if general else []
    ious = [float(objects.iou_actual.mean()) for objects in tables]
    best = best_point(ious, options.points)
    sidecar: dict[str, Any] = {}
    lines: list[str] = []
    if distributed.is_main():
        scores = summarise_line(options.points, tables, of_general)
        subsets = [subset, *([general] if general else [])]
        sidecar = _make_sidecar(scores, best, metadata, subsets, options)
        lines = _format_report(scores, best, metadata, subsets, options)
    run_on_all_ranks(lambda: _write_best(ends, options.points[best], sidecar, options))
    return sidecar, lines


def _read_ends(
    options: argparse.Namespace,
) -> "tuple[tuple[State, State], dict[str, Any]]":
    # The weights of A and B, and what model they are of.
    from samft.models.sam import identify_model, read_state
    from samft.weights.averages import differing_names
    from samft.weights.saved_settings import recorded_resize_mode, same_setting, saved_rectangle

    first, second = options.checkpoint
    states = read_state(first), read_state(second)
    models = [
        identify_model(state, source=path)
        for state, path in zip(states, options.checkpoint, strict=True)
    ]
    (model_type, image_size), _ = models
    if models[0] != models[1]:
        (type_a, size_a), (type_b, size_b) = models
        raise CheckpointError(
            f"{first} is a {type_a} at {size_a} px, and {second} a {type_b} at {size_b} px: only "
            "weights of the same model and image size can be averaged. Weights of another image "
            "size become those of this one by a tuning with --image_size."
        )
    if not differing_names(*states):
        raise CheckpointError(
            f"{first} and {second} hold the same weights: there is nothing to average."
        )
    modes = [recorded_resize_mode(path) for path in options.checkpoint]
    mode = same_setting(
        "resizes images", options.checkpoint, [one or modes[0] or modes[1] for one in modes]
    )
    shapes = [saved_rectangle(path) or image_size for path in options.checkpoint]
    if None in modes:  # a checkpoint that says nothing, as Meta's, goes with the other one
        shapes = [shapes[modes[0] is None]] * 2
    shape = same_setting("sees images of the size", options.checkpoint, shapes)
    metadata = {"model_type": model_type, "image_size": shape, "resize_mode": mode or "pad"}
    return states, metadata


def _read_formats(
    options: argparse.Namespace, metadata: dict[str, Any]
) -> "tuple[View, PixelFormat]":
    # How both see images; one that does not say, as the other.
    from samft.recipes.evaluate import pixel_formats
    from samft.views.flags import view_flags
    from samft.weights.saved_settings import same_setting, saved_view, view_of

    saying = [path for path in options.checkpoint if saved_view(path)] or options.checkpoint
    flags, size = view_flags(options), max(parse_image_size(metadata["image_size"]))
    first, view = (view_of(path, flags, image_size=size) for path in (saying[0], saying[-1]))
    if not first.shows_as(view):
        same_setting("sees images", options.checkpoint, [first, view])
    formats = [replace(one, in_windows=view.has_windows) for one in pixel_formats(options)]
    return view, same_setting("reads images", options.checkpoint, formats)


def _score_points(
    ends: "tuple[State, State]",
    metadata: dict[str, Any],
    subset: "CocoSubset",
    options: argparse.Namespace,
    device: "torch.device",
) -> "list[EvaluatedObjects]":
    from samft import distributed
    from samft.distributed import run_on_all_ranks
    from samft.errors import DataError
    from samft.models.prompted_sam import PromptedSam
    from samft.models.sam import build_sam
    from samft.recipes.evaluate import build_loader
    from samft.runtime import host_checks
    from samft.runtime.logs import LOGGER, format_duration, progress_bar
    from samft.weights.averages import have_same_encoder

    run_on_all_ranks(lambda: host_checks.check_open_files(options.num_workers))
    sam = build_sam(metadata["model_type"], metadata["image_size"], attention="fast")
    run_on_all_ranks(lambda: _load_both(sam, ends, options))
    model = PromptedSam(sam.to(device))
    start, passes = time.monotonic(), 1 if have_same_encoder(*ends) else len(options.points)
    if passes == 1:
        LOGGER.info("both have the same image encoder: each image is encoded once")
    total = passes * len(build_loader(model, metadata, subset, options))
    with progress_bar(total=total, unit="image", hidden=not distributed.is_main()) as bar:
        tables, bad_images = evaluate_line(
            model,
            ends,
            options.points,
            open_batches=lambda: build_loader(model, metadata, subset, options),
            seed=options.seed,
            on_image=bar.update,
        )
    for reason in bad_images.values():
        LOGGER.info("left out: %s", reason)
    if not len(tables[0]):
        raise DataError(f"none of the images in {subset.index.image_folder} can be read.")
    seconds = format_duration(time.monotonic() - start)
    LOGGER.info("%d points evaluated in %s", len(options.points), seconds)
    return tables


def evaluate_line(
    model: "PromptedSam",
    ends: "tuple[State, State]",
    weights: Sequence[float],
    *,
    open_batches: "Callable[[], Iterable[Batch]]",
    seed: int = 0,
    on_image: Callable[[], object] = lambda: None,
) -> "tuple[list[EvaluatedObjects], dict[str, str]]":
    """Scores averages of two models as `evaluate_split` does. Collective: every rank must call.

    Where both have the same image encoder, each image is encoded once for all points.

    Args:
        model: On its device, of the type and image size of both; it gets other weights.
        ends: Their state dicts, SAM's own keys.
        weights: Of the second in each average, 0 to 1.
        open_batches: Called for each pass over this rank's images.
        seed: Of the jittered boxes.
        on_image: Called after each image of each pass, of this rank.

    Returns:
        The rows of each point, and the images that could not be read: name, reason.

    Raises:
        UserError: An image cannot be read, on any rank.
    """
    from samft.evaluation.evaluator import evaluate_models
    from samft.models.sam import load_state
    from samft.weights.averages import average_states, have_same_encoder

    averages = (average_states(*ends, weight) for weight in weights)
    if have_same_encoder(*ends):
        models = [_with_weights(model, state) for state in averages]
        return evaluate_models(models, open_batches(), seed=seed, on_image=on_image)
    objects: list[EvaluatedObjects] = []
    bad_images: dict[str, str] = {}
    for state in averages:
        load_state(model.sam, state)
        rows, bad = evaluate_models([model], open_batches(), seed=seed, on_image=on_image)
        objects += rows
        bad_images |= bad
    return objects, bad_images


def _with_weights(model: "PromptedSam", state: "State") -> "PromptedSam":
    # With the same module for its image encoder, whose weights are the same.
    from samft.models.prompted_sam import PromptedSam
    from samft.models.sam import load_state

    encoder = model.sam.image_encoder
    sam = copy.deepcopy(model.sam, {id(encoder): encoder})
    load_state(sam, state)
    return PromptedSam(sam, decoder=model.decoder, mask_chunk=model.boxes_at_once())


def _load_both(sam: "Sam", ends: "tuple[State, State]", options: argparse.Namespace) -> None:
    # So that weights that are not finite are named by their file.
    from samft.models.sam import load_state

    for state, path in zip(ends, options.checkpoint, strict=True):
        load_state(sam, state, source=path)


def _read_general_set(
    options: argparse.Namespace, pixels: "PixelFormat", split: "CocoSubset"
) -> "CocoSubset | None":
    # Other data, to see what is forgotten of it; None: there is none.
    from samft.errors import DataError
    from samft.recipes.evaluate import read_general_subset
    from samft.runtime.logs import LOGGER
    from samft.weights.saved_settings import saved_config

    root: Path | None = options.general_data_root
    if root is not None:
        known = {"scored": split}
        is_none = str(root) == "none"
        return None if is_none else read_general_subset(options, root, pixels=pixels, known=known)
    saved = [(saved_config(path) or {}).get("general_data_root") for path in options.checkpoint]
    if not (name := saved[1] or saved[0]):
        return None
    try:
        return read_general_subset(options, user_path(name), pixels=pixels, known={"scored": split})
    except DataError as error:  # the data of that run may not be here
        LOGGER.warning("%s It is not scored; --general_data_root names another.", error)
        return None


def _make_sidecar(
    scores: list[dict[str, float]],
    best: int,
    metadata: dict[str, Any],
    subsets: "Sequence[CocoSubset]",
    options: argparse.Namespace,
) -> dict[str, Any]:
    import torch

    import samft
    from samft.checkpoints.top_k import SCORE, git_commit
    from samft.recipes.evaluate import describe_data
    from samft.runtime.checkpoint_paths import find_weights_file
    from samft.runtime.files import sha256_of
    from samft.weights.saved_settings import record_image_size, saved_config

    weight = scores[best]["weight"]
    shares = (round(1 - weight, 12), weight)
    # Of B, the tuned one; what it was trained with is what its users have to know.
    configs = [saved_config(path) for path in reversed(options.checkpoint)]
    config = next((one for one in configs if one is not None), None)
    return {
        **metadata,
        **record_image_size(metadata["image_size"]),
        "pixels": subsets[0].index.pixels.to_json(),
        "metrics": {
            SCORE: scores[best]["per_mask_iou"],
            **{name: scores[best][name] for name in scores[best] if name == "general_per_mask_iou"},
        },
        "average": {
            "checkpoints": [
                {
                    "path": str(path),
                    "sha256": sha256_of(find_weights_file(path)),
                    "weight": share,
                }
                for path, share in zip(options.checkpoint, shares, strict=True)
            ],
            "data": describe_data(options),
            "images": subsets[0].num_images,
            **({"general": _describe_images(subsets[1])} if subsets[1:] else {}),
            "points": scores,
        },
        **({"config": config} if config is not None else {}),
        "samft_version": samft.__version__,
        "torch_version": torch.__version__,
        "git_commit": git_commit(),
    }


def _describe_images(subset: "CocoSubset") -> dict[str, Any]:
    return {
        "images_folder": str(subset.index.image_folder),
        "images": subset.num_images,
        "masks": subset.num_objects,
    }


def _format_report(
    scores: list[dict[str, float]],
    best: int,
    metadata: dict[str, Any],
    subsets: "Sequence[CocoSubset]",
    options: argparse.Namespace,
) -> list[str]:
    from samft.evaluation.tables import format_line
    from samft.recipes.evaluate import describe_data

    model = "{model_type}, {image_size} px, {resize_mode}".format(**metadata)
    first, second = options.checkpoint
    counts = [f"{subset.num_images:,} images, {subset.num_objects:,} masks" for subset in subsets]
    general = [f"general set {subset.index.image_folder}: {counts[1]}" for subset in subsets[1:]]
    lines = [f"{describe_data(options)}: {counts[0]}", *general]
    lines += [f"A  {first} ({model})", f"B  {second}", "", *format_line(scores, best)]
    ends = {0: "A itself", len(scores) - 1: "B itself"}
    what = f", {ends[best]}" if best in ends else ""
    command = shell_command("evaluate", "--checkpoint", first, options.output, "--split", "test")
    return [
        *lines,
        f"written: {options.output}{what}. Its score has chosen it: another split tells how good "
        f"it is (`{command} ...`)",
    ]


def _write_best(
    ends: "tuple[State, State]",
    weight: float,
    sidecar: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    from samft import distributed
    from samft.checkpoints.top_k import write_checkpoint
    from samft.weights.averages import average_states

    if not distributed.is_main():
        return
    output: Path = options.output
    try:
        write_checkpoint(output, average_states(*ends, weight), sidecar)
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written ({error}).") from error


if __name__ == "__main__":
    end_process(run_command(main))
