"""Runs an evaluation: scores each checkpoint on a split, compares them, writes the results."""

import argparse
import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import samft
from samft import distributed
from samft.coco.layout import find_general_set, find_split
from samft.coco.subset import CocoSubset, read_coco, see_through_windows, split_by_hash
from samft.data.dataset import Coco2MaskDataset
from samft.data.loaders import BatchLoader, val_loader
from samft.distributed import run_on_all_ranks
from samft.errors import DataError
from samft.evaluation.automatic import (
    AutomaticScores,
    ImageMasks,
    compare_scores,
    generate_split,
    sample_images,
    score_masks,
)
from samft.evaluation.clicks import ClickExamples
from samft.evaluation.coco_ap import (
    average_precision,
    category_ids_of,
    coco_results,
    coco_truth,
    load_backend,
)
from samft.evaluation.evaluator import (
    Clicking,
    EvaluatedObjects,
    evaluate_split,
)
from samft.evaluation.tables import format_tables, summarise_comparison, summarise_scores
from samft.images.flags import pixel_flags
from samft.images.pixels import PLAIN, PixelFormat
from samft.models.mask_generator import MaskGenerator
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import open_checkpoint
from samft.prediction.flags import generator_settings
from samft.recipes.datasets import choose_general_images
from samft.reports.click_pictures import ExampleMasks
from samft.reports.drawing import image_row_of
from samft.reports.evaluation_files import (
    ScoredCheckpoints,
    check_output,
    file_names,
    ids_as_written,
    write_evaluation,
)
from samft.reports.validation_images import choose_fixed
from samft.runtime import heartbeat, host_checks
from samft.runtime.device import (
    check_device,
    freed_memory_kept,
    log_hidden_gpus,
    pick_device,
)
from samft.runtime.heartbeat import explain_distributed_errors
from samft.runtime.logs import LOGGER, format_duration, logging_to_terminal, progress_bar
from samft.views.flags import view_flags
from samft.views.windows import View
from samft.weights.saved_settings import (
    describe_point_prompts,
    held_out_by,
    saved_pixels,
    saved_prompts,
    view_of,
)

_NUM_EXAMPLES, _CLICKS_SHOWN = 6, 3  # objects on the page, and clicks on each
STEP_SECONDS = 600.0  # after which a process or a loader worker that hangs ends the evaluation
# The same with automatic masks or clicks: a large model on a CPU may need half an hour an image.
LONG_STEP_SECONDS = 3600.0


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Evaluates checkpoints on a split. Collective: every rank must call.

    Args:
        options: As `samft.evaluate` parses them.

    Returns:
        What `--output` writes, and lines for the terminal; on ranks other than 0 both empty.

    Raises:
        UserError: The checkpoints, the data or the output cannot be used.
        TrainingError: Another process failed.
    """
    seconds = LONG_STEP_SECONDS if options.automatic or options.clicks else STEP_SECONDS
    with joined_group(options.device, step_seconds=seconds) as device:
        return _evaluate_checkpoints(options, device)


@contextlib.contextmanager
def joined_group(wanted: str, *, step_seconds: float = STEP_SECONDS) -> Iterator[torch.device]:
    """The processes of an evaluation, within the block. Collective: every rank must call.

    Args:
        wanted: `--device`.
        step_seconds: After which a process or a loader worker that hangs ends the evaluation.

    Yields:
        This process's device.
    """
    with (
        distributed.process_group(
            partial(pick_device, wanted), step_seconds=step_seconds
        ) as device,
        freed_memory_kept(device),
        logging_to_terminal(distributed.get_rank()),
        heartbeat.posting(),
    ):
        try:
            with explain_distributed_errors():
                run_on_all_ranks(lambda: check_device(device))
                log_hidden_gpus(device)
                yield device
        except BaseException as error:
            heartbeat.report_failure(f"{type(error).__name__}: {error}")
            raise


def _evaluate_checkpoints(
    options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], list[str]]:
    load_backend(options.ap_backend)  # a missing package is better noticed before an hour of work
    formats = run_on_all_ranks(lambda: pixel_formats(options))
    subset = run_on_all_ranks(lambda: _read_subset(options, formats[0]))
    evaluations: list[dict[str, Any]] = []
    tables: list[EvaluatedObjects] = []
    examples: list[ExampleMasks] = []
    automatic: list[AutomaticScores] = []
    for path, pixels in zip(options.checkpoint, formats, strict=True):
        seen = subset.with_pixels(subset.measure_pixels(pixels))
        clicking = _build_clicking(path, subset, options)
        model, metadata = run_on_all_ranks(partial(load_model, path, device))
        view = view_of(path, view_flags(options), image_size=max(model.frame_size))
        metadata["view"] = view.to_json()
        if view.has_windows:
            LOGGER.info("%s: images are seen through %s", path, view.describe())
        through = see_through_windows(seen, view)
        objects, counts = _score_boxes(model, metadata, through, options, clicking=clicking)
        metadata |= counts
        masks = _generate_masks(model, metadata, seen, options, view) if options.automatic else []
        if distributed.is_main():
            tables.append(objects)
            examples += [clicking.examples.masks] if clicking.examples else []
            evaluations.append(_summarise_checkpoint(objects, subset, metadata, options))
            if masks:
                automatic.append(score_masks(masks, subset))
                settings = generator_settings(options)
                evaluations[-1]["automatic"] = {**automatic[-1].summarise(), "settings": settings}
            if len(tables) > 1:
                comparison = summarise_comparison(tables[0], objects, seed=options.seed)
                if masks:
                    changes = compare_scores(automatic[0], automatic[-1], seed=options.seed)
                    comparison["automatic"] = changes
                evaluations[-1]["comparison"] = _add_names(comparison, subset)
    report: dict[str, Any] = {}
    lines: list[str] = []
    if distributed.is_main():
        report = _build_report(evaluations, options)
        lines = format_tables(evaluations, data=describe_data(options))
        if options.output:
            scored = ScoredCheckpoints(options.checkpoint, tables, examples, subset, automatic)
            report |= write_evaluation(
                options.output, report, scored, lines, data=describe_data(options)
            )
            lines += [
                "",
                f"written: {options.output}, and beside it {report['objects_file']} and "
                f"{report['page_file']}",
            ]
    distributed.barrier()  # torchrun kills the other processes when the first one exits
    return report, lines


def _build_report(evaluations: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    paths = {
        "data_root": options.data_root,
        "split": options.split,
        "annotations": options.annotations,
        "images_folder": options.images,
    }
    data = {key: None if value is None else str(value) for key, value in paths.items()}
    return {
        **evaluations[0],
        "others": evaluations[1:],
        "data": {**data, "val_fraction": options.val_fraction},
        "seed": options.seed,
        "samft_version": samft.__version__,
        "torch_version": torch.__version__,
    }


def describe_data(options: argparse.Namespace) -> str:
    """The name of the split for a heading."""
    held_out = "" if options.val_fraction is None else f", held out {options.val_fraction:g}"
    if options.annotations:
        return f"{options.annotations}{held_out}"
    return f"{options.data_root.resolve().name} {options.split}{held_out}"


def pixel_formats(options: argparse.Namespace) -> list[PixelFormat]:
    """How each checkpoint reads images; one that does not say, as the first that does."""
    flags = pixel_flags(options)
    saved = [saved_pixels(path) for path in options.checkpoint]
    known = [one for one in saved if one is not None]
    other = known[0] if known else PLAIN
    return [
        replace(
            (one or other).completed(flags, flags_of=path.name),
            in_windows=view_of(path, view_flags(options)).has_windows,
        )
        for path, one in zip(options.checkpoint, saved, strict=True)
    ]


def _read_subset(options: argparse.Namespace, pixels: PixelFormat) -> CocoSubset:
    annotations, images = find_files(options)
    if options.output:
        check_output(options.output, [annotations, *options.checkpoint])
    return read_subset(options, annotations, images=images, pixels=pixels)


def find_files(options: argparse.Namespace) -> tuple[Path, Path]:
    """The annotation file and the folder of images that the flags of a split name.

    Raises:
        DataError: There are none.
    """
    if options.annotations:
        return options.annotations, options.images
    return find_split(
        options.data_root,
        options.split,
        flags="--split NAME, or --annotations FILE and --images DIR",
    )


def read_subset(
    options: argparse.Namespace, annotations: Path, *, images: Path, pixels: PixelFormat
) -> CocoSubset:
    """Reads the split, and chooses the objects that the flags ask for.

    Args:
        options: As `prediction.split_flags` adds them.
        annotations: See `find_files`.
        images: See `find_files`.
        pixels: How images are read.

    Raises:
        DataError: The data cannot be used.
    """
    read = partial(
        read_coco,
        annotations,
        images,
        root=options.data_root,
        allow_links=options.allow_links,
        pixels=pixels,
        on_bad_image=options.on_bad_image,
    )
    subset = read(**_choosing(vars(options)))
    skipped = ", ".join(f"{code} {number:,}" for code, number in subset.counts.items())
    if options.val_fraction is not None:
        by = held_out_by(options.checkpoint, vars(options))
        whole = read(**_choosing(by))
        _, held_out = split_by_hash(whole, options.val_fraction, group_by=by["group_by"])
        subset = _select_images(subset, held_out)
        of_training = by["val_fraction"]
        if of_training is not None and options.val_fraction > of_training and distributed.is_main():
            LOGGER.warning(
                "--val_fraction %g: the training held out %g, so that some of these images were "
                "trained on",
                options.val_fraction,
                of_training,
            )
    LOGGER.info(
        "%s: %d images, %d masks%s",
        annotations,
        subset.num_images,
        subset.num_objects,
        f"; left out: {skipped}" if skipped else "",
    )
    for line in subset.index.problems.frame_lines():
        LOGGER.info("  %s", line)
    return subset


def read_general_subset(
    options: argparse.Namespace, root: Path, *, pixels: PixelFormat, known: dict[str, CocoSubset]
) -> CocoSubset:
    """Reads a general set as a training does: its images as wholes, with objects of all classes.

    Args:
        options: See `read_subset`; what names or selects a split is not used.
        root: The folder of the general set.
        pixels: How images are read.
        known: See `choose_general_images`.

    Raises:
        DataError: The data cannot be used.
    """
    annotations, images = find_general_set(root)
    own = {"data_root": root, "category_names": None, "val_fraction": None}
    changed = argparse.Namespace(**{**vars(options), **own})
    pixels = replace(pixels, in_windows=False)
    whole = read_subset(changed, annotations, images=images, pixels=pixels)
    subset = choose_general_images(whole, known)
    return subset.with_pixels(subset.measure_pixels(pixels))


def _choosing(settings: Mapping[str, Any]) -> dict[str, Any]:
    # The arguments of `read_coco` that choose objects.
    names = (settings["category_names"] or "").split(",")
    return {"category_names": names, **{n: settings[n] for n in ("min_mask_area", "crowds")}}


def _select_images(subset: CocoSubset, chosen: CocoSubset) -> CocoSubset:
    names = {chosen.file_name(i) for i in range(chosen.num_images)}
    rows = [i for i in range(subset.num_images) if subset.file_name(i) in names]
    if not rows:
        raise DataError(
            "--val_fraction: none of the images that are held out has an object that was chosen: "
            "leave out --category_names or --min_mask_area."
        )
    return subset.select(rows)


def _build_clicking(path: Path, subset: CocoSubset, options: argparse.Namespace) -> Clicking:
    # As `predict` does: a model that was tuned to give one mask for a point begins with that one.
    saved = saved_prompts(path)
    multimask = saved is None or saved.three_masks
    if not (options.clicks and options.output):  # no page, no pictures
        return Clicking(options.clicks, multimask)
    index, chosen = subset.index, choose_fixed(subset, _NUM_EXAMPLES)
    image_ids = [int(index.image_ids[image_row_of(index, k)]) for k in chosen.tolist()]
    keys = zip(image_ids, index.object_ids[chosen].tolist(), strict=True)
    examples = ClickExamples(keys, num_masks=_CLICKS_SHOWN)
    return Clicking(options.clicks, multimask, examples)


def _score_boxes(
    model: PromptedSam,
    metadata: dict[str, Any],
    subset: CocoSubset,
    options: argparse.Namespace,
    *,
    clicking: Clicking,
) -> tuple[EvaluatedObjects, dict[str, Any]]:
    # The rows of all objects, and what else is said of a checkpoint.
    start = time.monotonic()
    run_on_all_ranks(lambda: host_checks.check_open_files(options.num_workers))
    for line in subset.index.pixels.lines():
        LOGGER.info("%s", line)
    loader = build_loader(model, metadata, subset, options)
    with progress_bar(total=len(loader), unit="image", hidden=not distributed.is_main()) as bar:
        objects, bad_images = evaluate_split(
            model, loader, seed=options.seed, clicking=clicking, on_image=bar.update
        )
    for reason in bad_images.values():
        LOGGER.info("left out: %s", reason)
    if not len(objects):
        raise DataError(f"none of the images in {subset.index.image_folder} can be read.")
    seconds = time.monotonic() - start
    LOGGER.info(
        "%s evaluated in %s, %.1f images/s",
        metadata["checkpoint"],
        format_duration(seconds),
        subset.num_images / seconds,
    )
    counts = {"bad_images": bad_images, "seconds": seconds, "pixels": subset.index.pixels.to_json()}
    if clicking.most:
        counts["first_click"] = "best of three masks" if clicking.multimask else "one mask"
    return objects, counts


def build_loader(
    model: PromptedSam, metadata: dict[str, Any], subset: CocoSubset, options: argparse.Namespace
) -> BatchLoader:
    """This rank's share of the images, one a batch.

    Args:
        model: On its device.
        metadata: See `load_model`.
        subset: Of all images.
        options: With `on_bad_image` and `num_workers`.
    """
    dataset = Coco2MaskDataset(
        subset.index.image_folder,
        subset=subset,
        image_size=metadata["image_size"],
        resize_mode=metadata["resize_mode"],
        on_bad_image=options.on_bad_image,
    )
    return val_loader(
        dataset,
        num_workers=options.num_workers,
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        timeout=STEP_SECONDS,
        pin_memory=model.sam.device.type == "cuda",
    )


def _generate_masks(
    model: PromptedSam,
    metadata: dict[str, Any],
    subset: CocoSubset,
    options: argparse.Namespace,
    view: View,
) -> list[ImageMasks]:
    sample = sample_images(subset, options.automatic, seed=options.seed)
    is_main = distributed.is_main()
    for line in describe_point_prompts(Path(metadata["checkpoint"]), automatic=True) * is_main:
        LOGGER.warning("%s", line)
    generator = MaskGenerator(model.sam, show_progress=is_main, **generator_settings(options))
    loader = build_loader(model, metadata, sample, options)
    with progress_bar(
        total=len(loader), unit="image", desc="automatic masks", hidden=not is_main
    ) as bar:
        images = generate_split(generator, sample, loader, view=view, on_image=bar.update)
    if not images:
        raise DataError(
            f"none of the {sample.num_images} images that --automatic drew can be read: give more, "
            "or another --seed."
        )
    return images


def load_model(path: Path, device: torch.device) -> tuple[PromptedSam, dict[str, Any]]:
    """A checkpoint's model on its device, and what it is: type, image size, resize mode.

    Raises:
        CheckpointError: The file cannot be read or is not a SAM.
    """
    opened = open_checkpoint(path, attention="fast", as_trained=True)
    sam, model_type, image_size, resize_mode = opened
    LOGGER.info("%s: %s at %s px, %s", path, model_type, image_size, resize_mode)
    metadata = {
        "checkpoint": str(path),
        "model_type": model_type,
        "image_size": image_size,
        "resize_mode": resize_mode,
    }
    return PromptedSam(sam.to(device)), metadata


def _summarise_checkpoint(
    objects: EvaluatedObjects,
    subset: CocoSubset,
    metadata: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    category_ids = category_ids_of(subset, objects.object_ids)
    names = subset.index.category_names
    scores = summarise_scores(objects, category_ids, names=names, seed=options.seed)
    truth, results = coco_truth(objects, subset), coco_results(objects, category_ids)
    return {
        "per_mask_iou": scores["per_mask_iou"],  # first in the file
        **metadata,
        **scores,
        "coco": average_precision(truth, results, backend=options.ap_backend),
    }


def _add_names(comparison: dict[str, Any], subset: CocoSubset) -> dict[str, Any]:
    names, ids = file_names(subset), ids_as_written(subset)
    for row in comparison["most_improved"] + comparison["most_harmed"]:
        category = int(category_ids_of(subset, np.array([row["object_id"]]))[0])
        row["category"] = subset.index.category_names[category]
        row["file_name"] = names[row["image_id"]]
        row["image_id"] = ids[row["image_id"]]
    return comparison
