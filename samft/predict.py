"""Predicts masks with a checkpoint; writes COCO results or a COCO dataset.

    samft predict --checkpoint FILE --images FOLDER --output_dir OUT
    samft predict ... --images PHOTO.jpg --box 40,60,310,280
    samft predict ... --images PHOTO.jpg --point 120,90 --point 30,40,0
    samft predict ... --images DIR --points POINTS.json
    samft predict ... --images DIR --annotations COCO.json
    samft predict ... --images DIR --annotations COCO.json --boxes FILE

One mask is predicted for each box. Boxes are the ones given with --box, or
those of a detector's COCO results file (--boxes), or those of the objects in
--annotations, which need no masks. All --point, with --box if it is given,
prompt one object; --points names a JSON file of any number of objects: [{"image":
FILE NAME, "points": [[x, y], ...], "labels": [1, 0, ...], "box": [x0, y0, x1,
y1], "id": NUMBER}, ...], where labels (1: of the object, 0: not), box and id may
be missing. Without prompts, the automatic mask generator of segment_anything
finds the masks.

OUT/results.json can be read with pycocotools' COCO.loadRes. Each entry has
image_id, category_id, bbox (the given box, or else that of the mask),
segmentation (RLE), score (the predicted IoU) and, where they exist,
annotation_id, detector_score and stability_score. An image_id is that of
--annotations, also where it is text; an annotation_id that is no whole number
is the one that `samft check --fix` gives the object. Without --annotations,
OUT/images.json is a COCO file with the id of each image.

With --format coco, OUT/dataset.json holds the same masks as a COCO dataset, for
annotators, viewers and samft.check: its file names are relative to the folder
of --images, boxes and areas are those of the masks, and masks without a pixel
are left out.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from samft.cli import CommandParser, add_links_flag, run_command, user_path
from samft.errors import ConfigError, DataError, escape_unprintable, fold_for_terminal
from samft.images.flags import add_pixel_flags, pixel_flags
from samft.images.pixels import PLAIN, PixelFormat
from samft.interchange.coco_writer import POLYGONS, RLE
from samft.prediction.flags import (
    add_generator_flags,
    check_prompt_flags,
    generator_settings,
    parse_box,
    parse_point,
)
from samft.prediction.inputs import PredictionTask, build_task
from samft.prediction.outputs import (
    DATASET,
    IMAGES,
    MASKS,
    OVERLAYS,
    RESULTS,
    PictureWriter,
    PredictedDataset,
    ResultsWriter,
    is_own_output,
    is_part_of_prediction,
    overlay_labels,
    picture_names,
    result_row,
    write_images_json,
)
from samft.runtime.checkpoint_paths import find_weights_file
from samft.runtime.files import atomic_replacement, write_atomically
from samft.runtime.logs import progress_bar
from samft.runtime.output_dir import create_writable_dir, lock_output_dir
from samft.runtime.signals import check_launch_environment
from samft.views.flags import add_view_flags, view_flags
from samft.views.windows import View

if TYPE_CHECKING:
    from samft.prediction.predictors import PredictedMask, Predictor, PreparedImage
    from samft.prediction.windows import WindowedImage

_NUM_NAMED = 3  # images in an error or a warning
_UNLESS_SAVED = "; a checkpoint of samft says it by itself"


def main(argv: list[str]) -> dict[str, Any]:
    """Parses the command line, predicts, and writes the masks.

    Args:
        argv: The arguments after the program's name; `--help` lists them.

    Returns:
        Counts: `images`, `masks`, `boxes_left_out` by reason; and `images_left_out`, image name ->
        reason.

    Raises:
        UserError: A flag, an image, a box, the checkpoint or the output folder cannot be used.
        TrainingError: There is not enough memory.
    """
    options = _parse_options(argv)
    task = build_task(
        options.images,
        annotations=options.annotations,
        results=options.boxes,
        boxes=options.box,
        points=options.point,
        points_file=options.points,
        automatic=options.automatic,
        min_score=options.min_score,
        allow_links=options.allow_links,
        pixels=_pixel_format(options),
    )
    images = task.images
    bad = {images.names[row]: images.bad[row] for row in task.rows if row in images.bad}
    task = _without_bad_images(task, options)
    for line in task.images.pixels.lines():
        _print_line(line)
    _check_outputs(task, options)
    create_writable_dir(options.output_dir)
    parts: dict[str, Any] = {"is_part": is_part_of_prediction, "subfolders": (MASKS, OVERLAYS)}
    with lock_output_dir(options.output_dir, **parts):
        counts = _write_outputs(task, options)
    counts["images_left_out"] = {**bad, **counts["images_left_out"]}
    return counts


def _parse_options(argv: list[str]) -> argparse.Namespace:
    usage = "%(prog)s --checkpoint FILE --images PATH ...\n    --output_dir DIR [--FLAG VALUE ...]"
    parser = CommandParser("predict", __doc__, usage=usage)
    _add_input_flags(parser.add_argument_group("checkpoint and images").add_argument)
    _add_prompt_flags(parser.add_argument_group("prompts").add_argument)
    add_generator_flags(parser.add_argument_group("automatic masks").add_argument)
    _add_output_flags(parser.add_argument_group("output and computation").add_argument)
    options = parser.parse_args(argv)
    _check_options(options)
    return options


def _add_input_flags(add: Callable[..., Any]) -> None:
    add(
        "--checkpoint",
        type=user_path,
        required=True,
        metavar="FILE",
        help="SAM weights, .ckpt or .pth",
    )
    add(
        "--images",
        type=user_path,
        required=True,
        nargs="+",
        metavar="PATH",
        help="image files and folders; with --annotations the one folder that "
        "its file names are relative to",
    )
    add("--annotations", type=user_path, metavar="FILE", help="COCO file that lists the images")
    add_pixel_flags(add, of=_UNLESS_SAVED)
    add_view_flags(add, default="default as in training")


def _add_prompt_flags(add: Callable[..., Any]) -> None:
    add(
        "--boxes",
        type=user_path,
        metavar="FILE",
        help="a detector's COCO results for the images of --annotations",
    )
    add(
        "--min_score",
        type=float,
        default=0.0,
        metavar="S",
        help="leave out --boxes with a lower score; default 0",
    )
    add(
        "--box",
        type=parse_box,
        action="append",
        metavar="X0,Y0,X1,Y1",
        help="a box in pixels of the original image, used for every image; repeatable",
    )
    add(
        "--point",
        type=parse_point,
        action="append",
        metavar="X,Y[,0]",
        help="a point of the object in pixels of the original image; with ,0 a point of something "
        "else; repeatable: all of them, and one --box, are of one object of every image",
    )
    add("--points", type=user_path, metavar="FILE", help="JSON file of objects, see above")
    add("--automatic", action="store_true", help="automatic masks even if --annotations has boxes")


def _add_output_flags(add: Callable[..., Any]) -> None:
    add("--output_dir", type=user_path, required=True, metavar="DIR", help="folder to write to")
    add(
        "--format",
        choices=("results", "coco"),
        default="results",
        help=f"coco: write {DATASET} too, a COCO dataset; default results",
    )
    add(
        "--segmentation",
        choices=(RLE, POLYGONS),
        help=f"of --format coco: {RLE}, which every reader draws alike, or {POLYGONS} along the "
        f"edges of pixels, which annotators let people drag; default {RLE}",
    )
    add(
        "--masks",
        action="store_true",
        help="write masks/IMAGE.png: pixel value k is the image's k-th mask in "
        "results.json, 0 is background, smaller masks lie on top; 8 bits with a "
        "colour palette, 16 bits for more than 255 masks; "
        "np.array(PIL.Image.open(file)) reads both",
    )
    add(
        "--overlays",
        action="store_true",
        help="write overlays/IMAGE.jpg: masks and boxes drawn over the image, with class, id "
        "(of the annotation, or as in --masks) and score",
    )
    add(
        "--on_bad_image",
        choices=("error", "skip"),
        default="error",
        help="skip: leave out and name missing and broken images; default error",
    )
    add_links_flag(add)
    add("--num_workers", type=int, default=4, metavar="N", help="threads; default 4")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto")
    add(
        "--amp",
        choices=("auto", "off", "bf16", "fp16"),
        default="off",
        help="mixed precision, for boxes and points; default off",
    )
    add("--debug", action="store_true", help="show tracebacks of user errors too")


def _check_options(options: argparse.Namespace) -> None:
    unused = check_prompt_flags(options)
    if unused:
        _print_warning(f"not used, because masks are not automatic here: --{' --'.join(unused)}")
    if options.boxes and not options.annotations:
        raise ConfigError(
            "--boxes needs --annotations, a COCO file that says which image each image_id is; it "
            f"may list no objects, like the {IMAGES} that this command writes for a folder."
        )
    if options.annotations and (len(options.images) > 1 or not options.images[0].is_dir()):
        raise ConfigError("--annotations goes with one folder of --images.")
    if options.segmentation and options.format != "coco":
        raise ConfigError(f"--segmentation is of {DATASET}: give --format coco as well.")
    if options.num_workers < 0:
        raise ConfigError(f"--num_workers: {options.num_workers} must be at least 0.")
    find_weights_file(options.checkpoint, field="--checkpoint")
    written = {(options.output_dir / name).resolve() for name in (RESULTS, IMAGES, DATASET)}
    for name in ("annotations", "boxes", "points"):
        source = getattr(options, name)
        if source and source.resolve() in written:
            raise ConfigError(f"--output_dir: {source} would be overwritten: name another folder.")
    check_launch_environment()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("samft predict runs in one process: start it without torchrun.")


def _pixel_format(options: argparse.Namespace) -> PixelFormat:
    from samft.weights.saved_settings import saved_pixels, view_of  # which imports torch

    saved = saved_pixels(options.checkpoint) or PLAIN
    pixels = saved.completed(pixel_flags(options), flags_of=options.checkpoint.name)
    flags = view_flags(options)
    view = view_of(options.checkpoint, flags)
    if flags.keys() - {"view"} and not view.has_windows:
        raise ConfigError(
            f"--{min(flags.keys() - {'view'})}: images are seen as a whole here: give --view tiles "
            "or --view objects as well."
        )
    return replace(pixels, in_windows=view.has_windows)


def _without_bad_images(task: PredictionTask, options: argparse.Namespace) -> PredictionTask:
    images = task.images
    for note in images.notes:
        _print_warning(note)
    reasons = [f"{images.names[row]}: {images.bad[row]}" for row in task.rows if row in images.bad]
    if reasons and options.on_bad_image == "error":
        more = ", ..." if len(reasons) > _NUM_NAMED else ""
        raise DataError(
            f"{len(reasons)} of {len(task.rows)} images cannot be read "
            f"({', '.join(reasons[:_NUM_NAMED])}{more}): replace them, or leave them out with "
            "--on_bad_image skip."
        )
    for reason in reasons:
        _print_warning(f"left out: {reason}")
    for reason, count in task.prompts.left_out.items() if task.prompts else ():
        _print_warning(f"boxes left out: {count:,} with {reason}")
    rows = [row for row in task.rows if row not in images.bad]
    if not rows:
        reason = "none of its images can be read" if reasons else "it has no box"
        source = options.boxes or options.points or options.annotations or options.images[0]
        raise DataError(f"{source}: {reason}, so there is nothing to predict: check the input.")
    return replace(task, rows=rows)


def _check_outputs(task: PredictionTask, options: argparse.Namespace) -> None:
    # An earlier prediction is replaced, and no other file.
    paths = [options.output_dir / RESULTS]
    if not options.annotations:
        paths.append(options.output_dir / IMAGES)
    if options.format == "coco":
        paths.append(options.output_dir / DATASET)
    pictures = _picture_writer(options)
    names = picture_names(task.images.names, task.images.ids)
    paths += [path for row in task.rows for path in pictures.paths(names[row])]
    for path in paths:
        if os.path.lexists(path) and not is_own_output(path):
            raise ConfigError(
                f"--output_dir: {path} exists, and no prediction of samft has written it: name "
                "another folder."
            )


def _picture_writer(options: argparse.Namespace) -> PictureWriter:
    return PictureWriter(options.output_dir, masks=options.masks, overlays=options.overlays)


def _write_outputs(task: PredictionTask, options: argparse.Namespace) -> dict[str, Any]:
    predictor, view = _build_predictor(task, options)
    if view.has_windows:
        _print_line(f"images are seen through {view.describe()}")
    folder, start = options.output_dir, time.monotonic()
    rows: list[int] = []
    counts: dict[str, Any] = {"images": 0, "masks": 0, "images_left_out": {}, "objects_cut": {}}

    def write_rows(file: BinaryIO, dataset: PredictedDataset | None) -> None:
        writer = ResultsWriter(file)
        for row, entries in _predict_rows(task, predictor, view, options, counts["objects_cut"]):
            if isinstance(entries, DataError):
                counts["images_left_out"][task.images.names[row]] = str(entries)
                continue
            rows.append(row)
            for entry in entries:
                writer.add(entry)
                if dataset:
                    dataset.add(row, entry)
        writer.close()
        counts["masks"] = writer.num_rows

    def write_both(file: BinaryIO) -> None:
        def write_dataset(dataset_file: BinaryIO) -> None:
            kind = options.segmentation or RLE
            dataset = PredictedDataset(dataset_file, task, segmentation=kind)
            write_rows(file, dataset)
            dataset.close(rows)
            counts["empty_masks"] = dataset.writer.num_empty

        write_atomically(folder / DATASET, write_dataset)

    write_results = write_both if options.format == "coco" else partial(write_rows, dataset=None)
    # results.json is renamed into place last, so that it never exists without the other files.
    with _explain_write_errors(folder), atomic_replacement(folder / RESULTS, write_results):
        if not options.annotations:
            write_images_json(folder / IMAGES, task.images, rows)
    counts["images"] = len(rows)
    counts["boxes_left_out"] = task.prompts.left_out if task.prompts else {}
    _print_summary(counts, options, seconds=time.monotonic() - start)
    return counts


def _build_predictor(task: PredictionTask, options: argparse.Namespace) -> "tuple[Predictor, View]":
    # Imported here because torch takes seconds, and --help and wrong flags must answer at once.
    from samft.prediction.build import build_predictor
    from samft.weights.saved_settings import view_of

    predictor, notes = build_predictor(
        task,
        options.checkpoint,
        device=options.device,
        amp=options.amp,
        settings=generator_settings(options),
    )
    for line in notes:
        _print_warning(line)
    flags = view_flags(options)
    return predictor, view_of(options.checkpoint, flags, image_size=predictor.image_size)


def _predict_rows(
    task: PredictionTask,
    predictor: "Predictor",
    view: View,
    options: argparse.Namespace,
    objects_cut: dict[str, int],
) -> Iterator[tuple[int, list[dict[str, Any]] | DataError]]:
    # Yields the row of each image with its masks, or why it cannot be read; counts cut objects.
    from samft.prediction.predictors import predict_images
    from samft.prediction.windows import predict_through_windows

    images = task.images
    pictures = _picture_writer(options)
    names = picture_names(images.names, images.ids)
    inputs = [(images.paths[row], task.prompts_of(row)) for row in task.rows]

    def to_entries(
        k: int, prepared: "PreparedImage | WindowedImage", masks: Iterator["PredictedMask"]
    ) -> list[dict[str, Any]]:
        row, numbered = task.rows[k], {}
        for place, one in enumerate(masks):
            number = place if one.number is None else one.number
            entry = result_row(
                one.mask,
                box_original=one.box_original,
                size=prepared.size,
                score=one.iou_predicted,
                fields={**task.result_fields(row, number), **one.extra_fields},
            )
            numbered[number] = entry, one.mask if pictures else None
            if one.is_cut:
                objects_cut[images.names[row]] = objects_cut.get(images.names[row], 0) + 1
        entries = [entry for _, (entry, _) in sorted(numbered.items())]
        drawn = [mask for _, (_, mask) in sorted(numbered.items()) if mask is not None]
        labels = overlay_labels(entries, task.category_names)
        prompts: dict[str, Any] = {"boxes": task.boxes_of(row), "points": task.points_of(row)}
        if pictures:
            pictures.write(names[row], prepared.source, drawn, **prompts, labels=labels)
        return entries

    how: dict[str, Any] = {
        "num_workers": options.num_workers,
        "orientations": images.orientations[task.rows].tolist(),
        "pixels": images.pixels,
    }
    if view.has_windows:
        results = predict_through_windows(predictor, inputs, to_entries, view=view, **how)
    else:
        results = predict_images(predictor, inputs, to_entries, **how)
    bar = progress_bar(zip(task.rows, results, strict=True), total=len(inputs), unit="image")
    for row, entries in bar:
        if isinstance(entries, DataError):
            if options.on_bad_image == "error":
                raise entries
            bar.write(escape_unprintable(f"left out: {entries}"), file=sys.stderr)
        yield row, entries


@contextmanager
def _explain_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--output_dir: {folder} cannot be written ({error.strerror}): make room, or name "
            f"another folder. No {RESULTS} was written."
        ) from error


def _print_summary(counts: dict[str, Any], options: argparse.Namespace, *, seconds: float) -> None:
    rate = counts["images"] / max(seconds, 1e-9)
    _print_line(
        f"{counts['masks']:,} masks of {counts['images']:,} images in {seconds:.1f} s "
        f"({rate:.2f} images/s): {options.output_dir / RESULTS}"
    )
    if options.format == "coco":
        _print_line(f"COCO dataset: {options.output_dir / DATASET}")
        if counts["empty_masks"]:
            _print_warning(f"left out of {DATASET}: {counts['empty_masks']:,} masks with no pixel")
    for name in (MASKS, OVERLAYS):
        if getattr(options, name):
            _print_line(f"{name}: {options.output_dir / name}")
    if cut := counts["objects_cut"]:
        more = ", ..." if len(cut) > _NUM_NAMED else ""
        _print_warning(
            f"{sum(cut.values()):,} objects reach beyond the windows that they were seen through "
            f"({', '.join(list(cut)[:_NUM_NAMED])}{more}): their masks end there, and points "
            "beyond are not used. A larger --tile_size, or --view objects, shows them whole."
        )
    if not counts["masks"]:
        _print_warning(
            "no mask was found: lower --pred_iou_thresh and --stability_score_thresh, or give boxes"
        )


# File names may hold control characters of a terminal, so every line is escaped.


def _print_line(line: str) -> None:
    print(fold_for_terminal(escape_unprintable(line), sys.stdout), flush=True)


def _print_warning(line: str) -> None:
    print(fold_for_terminal(escape_unprintable(line), sys.stderr), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
