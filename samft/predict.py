"""Predicts masks with a checkpoint, and writes them as COCO results.

    python -m samft.predict --checkpoint FILE --images FOLDER --output_dir DIR
    python -m samft.predict ... --images PHOTO.jpg --box 40,60,310,280 --overlays
    python -m samft.predict ... --annotations COCO.json --images FOLDER [--boxes results.json]

Boxes to be turned into masks are the --box that are given; or those of a detector's results
(--boxes); or those of the objects in --annotations, with which masks are optional; or there are
none, and then everything is masked that segment_anything's automatic mask generator finds.

DIR gets results.json, which `COCO.loadRes` reads: image_id, category_id, bbox (the box that was
given; of automatic masks their own), segmentation (RLE), score (the predicted IoU), and where there
are any annotation_id, detector_score, stability_score. Without --annotations it gets images.json as
well, a COCO file that gives each image its id.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tqdm import tqdm

from samft.cli import CommandParser, run_command, user_path
from samft.errors import CheckpointError, ConfigError, DataError, escape_unprintable
from samft.prediction.inputs import Task, find_task
from samft.prediction.outputs import (
    Pictures,
    ResultsWriter,
    picture_names,
    result_row,
    write_images_json,
)
from samft.runtime.files import atomic_replacement
from samft.runtime.output_dir import create_writable_dir, lock_output_dir

if TYPE_CHECKING:
    from samft.prediction.predictors import PredictedMask, Predictor, PreparedImage

RESULTS, IMAGES = "results.json", "images.json"
_NUM_NAMED = 3  # bad images in an error


def main(argv: list[str]) -> dict[str, Any]:
    """Parses the command line, predicts, and writes what was found.

    Args:
        argv: The arguments after the program's name; `--help` lists them.

    Returns:
        Counts: `images`, `masks`, `boxes_left_out` and `images_left_out` by reason.

    Raises:
        UserError: A flag, an image, a box, the checkpoint or the output folder cannot be used.
        TrainingError: Memory is not enough.
    """
    options = _parse(argv)
    task = find_task(
        options.images,
        annotations=options.annotations,
        results=options.boxes,
        boxes=options.box,
        automatic=options.automatic,
        min_score=options.min_score,
    )
    task = _without_bad_images(task, options)
    create_writable_dir(options.output_dir)
    with lock_output_dir(options.output_dir):
        return _predict(task, options)


# The command line.


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("python -m samft.predict", __doc__)
    _add_flags(parser.add_argument)
    options = parser.parse_args(argv)
    _check(options)
    return options


def _add_flags(add: Callable[..., Any]) -> None:
    add(
        "--checkpoint", type=user_path, required=True, metavar="FILE", help="a .ckpt or .pth of SAM"
    )
    add(
        "--output_dir",
        type=user_path,
        required=True,
        metavar="DIR",
        help="what is written goes there",
    )
    add(
        "--images",
        type=user_path,
        required=True,
        nargs="+",
        metavar="PATH",
        help="files and folders; with --annotations the one folder that its names are relative to",
    )
    add("--annotations", type=user_path, metavar="FILE", help="COCO file that lists the images")
    add(
        "--boxes", type=user_path, metavar="FILE", help="a detector's COCO results for these images"
    )
    add("--min_score", type=float, default=0.0, metavar="S", help="leave out lower --boxes")
    add(
        "--box",
        type=_box,
        action="append",
        metavar="X0,Y0,X1,Y1",
        help="in pixels of the original image; repeatable; the same for all images",
    )
    add("--automatic", action="store_true", help="no boxes, also where --annotations has some")
    add("--points_per_side", type=int, default=32, metavar="N", help="automatic; default 32")
    for name, default in (("pred_iou_thresh", 0.88), ("stability_score_thresh", 0.95)):
        words = f"automatic; lower finds more; default {default}"
        add(f"--{name}", type=float, default=default, metavar="X", help=words)
    add(
        "--masks",
        action="store_true",
        help="write masks/IMAGE.png: pixel k is the k-th mask of that image in results.json, 0 is "
        "none, smaller masks on top; 8 bits with colours, or 16 bits beyond 255 masks; "
        "np.array(PIL.Image.open(file)) reads either",
    )
    add("--overlays", action="store_true", help="write overlays/IMAGE.jpg, to look at")
    add(
        "--on_bad_image",
        choices=("error", "skip"),
        default="error",
        help="skip: missing and broken images are left out, and named; default error",
    )
    add("--num_workers", type=int, default=4, metavar="N", help="threads; default 4")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="off", help="default off")
    add("--debug", action="store_true", help="show tracebacks of user errors too")


def _box(text: str) -> list[float]:
    try:
        x0, y0, x1, y1 = (float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not x0,y0,x1,y1") from None
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 <= x0 or y1 <= y0:
        raise argparse.ArgumentTypeError(
            f"'{text}' has no width or no height: it is x0,y0,x1,y1 with x1 > x0 and y1 > y0"
        )
    return [x0, y0, x1, y1]


def _check(options: argparse.Namespace) -> None:
    sources = [name for name in ("boxes", "box", "automatic") if getattr(options, name)]
    if len(sources) > 1:
        raise ConfigError(f"--{' and --'.join(sources)} exclude each other: give one of them.")
    if options.boxes and not options.annotations:
        raise ConfigError(
            "--boxes needs --annotations, a COCO file that says which image each image_id is; one "
            f"without objects will do, such as the {IMAGES} that this command writes for a folder."
        )
    if options.annotations and (len(options.images) > 1 or not options.images[0].is_dir()):
        raise ConfigError("--annotations goes with one folder of --images.")
    for name, least in (("num_workers", 0), ("points_per_side", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name}: {getattr(options, name)} must be at least {least}.")
    if not options.checkpoint.is_file():
        raise CheckpointError(
            f"--checkpoint: there is no file {options.checkpoint}: give a SAM .pth or .ckpt file; "
            "a run's summary.json names its best."
        )
    written = {(options.output_dir / name).resolve() for name in (RESULTS, IMAGES)}
    for name in ("annotations", "boxes"):
        source = getattr(options, name)
        if source and source.resolve() in written:
            raise ConfigError(f"--output_dir: {source} would be written over: name another folder.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("samft.predict is one process: start it without torchrun.")


def _without_bad_images(task: Task, options: argparse.Namespace) -> Task:
    images = task.images
    reasons = [f"{images.names[row]}: {images.bad[row]}" for row in task.rows if row in images.bad]
    if reasons and options.on_bad_image == "error":
        more = ", ..." if len(reasons) > _NUM_NAMED else ""
        raise DataError(
            f"{len(reasons)} of {len(task.rows)} images cannot be read "
            f"({', '.join(reasons[:_NUM_NAMED])}{more}): replace them, or leave them out with "
            "--on_bad_image skip."
        )
    for reason in reasons:
        _say(f"left out: {reason}", warn=True)
    for reason, count in task.boxes.left_out.items() if task.boxes else ():
        _say(f"boxes left out: {count:,} with {reason}", warn=True)
    rows = [row for row in task.rows if row not in images.bad]
    if not rows:
        words = "none of its images can be read" if reasons else "it has no box"
        place = options.boxes or options.annotations or options.images[0]
        raise DataError(f"{place}: {words}, so there is nothing to predict: check the input.")
    return replace(task, rows=rows)


# The masks.


def _predict(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    predictor = _build_predictor(task, options)
    folder, start = options.output_dir, time.monotonic()
    found: dict[str, Any] = {"rows": [], "masks": 0, "images_left_out": {}}

    def write(file: BinaryIO) -> None:
        writer = ResultsWriter(file)
        for row, error in _predict_into(writer, task, predictor, options):
            if error is None:
                found["rows"].append(row)
            else:
                found["images_left_out"][task.images.names[row]] = str(error)
        writer.close()
        found["masks"] = writer.num_rows

    with _writing(folder), atomic_replacement(folder / RESULTS, write):
        rows = found.pop("rows")
        if not options.annotations:
            write_images_json(folder / IMAGES, task.images, rows)
    found = {"images": len(rows), **found}
    found["boxes_left_out"] = task.boxes.left_out if task.boxes else {}
    _report(found, options, seconds=time.monotonic() - start)
    return found


def _build_predictor(task: Task, options: argparse.Namespace) -> "Predictor":
    # Only now: torch takes seconds to import, and --help and wrong flags must answer at once.
    from samft.distributed import start
    from samft.models.prompted_sam import PromptedSam
    from samft.models.sam import open_checkpoint
    from samft.prediction.predictors import AutomaticPredictor, BoxPredictor
    from samft.runtime.device import pick_amp_dtype

    device = start(options.device)
    sam, *_, resize_mode = open_checkpoint(options.checkpoint, attention="fast")
    model = PromptedSam(sam.to(device))
    if task.boxes is not None:
        amp_dtype = pick_amp_dtype(options.amp, device)
        return BoxPredictor(model, resize_mode=resize_mode, amp_dtype=amp_dtype)
    if resize_mode == "squash":
        _say(
            "the checkpoint was tuned with resize_mode squash, but automatic masks are stock's, "
            "which pads: expect them to be worse than validation said",
            warn=True,
        )
    names = ("points_per_side", "pred_iou_thresh", "stability_score_thresh")
    return AutomaticPredictor(model, **{name: getattr(options, name) for name in names})


def _predict_into(
    writer: ResultsWriter, task: Task, predictor: "Predictor", options: argparse.Namespace
) -> Iterator[tuple[int, DataError | None]]:
    # Gives the row of each image when its masks have been written, or why it cannot be read.
    from samft.prediction.predictors import predict_images

    images = task.images
    pictures = Pictures(options.output_dir, masks=options.masks, overlays=options.overlays)
    names = picture_names(images.names, images.ids)
    todo = [(images.paths[row], task.boxes_of(row)) for row in task.rows]

    def finish(
        k: int, prepared: "PreparedImage", masks: Iterator["PredictedMask"]
    ) -> list[dict[str, Any]]:
        row, entries, kept = task.rows[k], [], []
        for number, one in enumerate(masks):
            words = {**task.describe(row, number), **one.words}
            box, score = one.box_original, one.iou_predicted
            entries.append(
                result_row(one.mask, box_original=box, size=prepared.size, score=score, words=words)
            )
            if pictures:
                kept.append(one.mask)
        pictures.write(names[row], prepared.image, kept, boxes=todo[k][1])
        return entries

    found = predict_images(predictor, todo, finish, num_workers=options.num_workers)
    bar = tqdm(zip(task.rows, found, strict=True), total=len(todo), unit="image", disable=None)
    for row, entries in bar:
        if isinstance(entries, DataError):
            if options.on_bad_image == "error":
                raise entries
            bar.write(escape_unprintable(f"left out: {entries}"), file=sys.stderr)
            yield row, entries
            continue
        for entry in entries:
            writer.add(entry)
        yield row, None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--output_dir: {folder} cannot be written ({error.strerror}): make room, or name "
            f"another folder. No {RESULTS} was written."
        ) from error


def _report(counts: dict[str, Any], options: argparse.Namespace, *, seconds: float) -> None:
    rate = counts["images"] / max(seconds, 1e-9)
    _say(
        f"{counts['masks']:,} masks of {counts['images']:,} images in {seconds:.1f} s "
        f"({rate:.2f} images/s): {options.output_dir / RESULTS}"
    )
    for name in ("masks", "overlays"):
        if getattr(options, name):
            _say(f"{name}: {options.output_dir / name}")
    if not counts["masks"]:
        _say(
            "no mask was found: lower --pred_iou_thresh and --stability_score_thresh, or give "
            "boxes",
            warn=True,
        )


def _say(line: str, *, warn: bool = False) -> None:
    # The names of files may hold what steers a terminal.
    print(escape_unprintable(line), file=sys.stderr if warn else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
