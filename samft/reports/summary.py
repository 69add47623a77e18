"""The summary of a run: summary.json, the verdict and advice for a bad one, the last log lines."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from samft.annotations.boxes import SmallObjects, advise_on_small_objects
from samft.checkpoints.top_k import Checkpoint
from samft.commands import shell_command, shell_program
from samft.evaluation.object_scores import (
    LOST_IOU,
    Comparison,
    describe_against_box_fill,
    describe_share,
    mean_change,
)
from samft.reports.validation_images import BEFORE_AFTER
from samft.runtime.logs import LOGGER, WITH_COMMANDS, format_duration
from samft.runtime.own_files import TENSORBOARD
from samft.training.engine import Progress
from samft.weights.saved_settings import saved_rectangle

ANCHOR_WEIGHT = 30  # of those measured, the largest gain on the tuned data (docs/experiments.md)
LOST_SHARE = 0.1  # a larger share of objects that lost is a warning, even if the mean rose


def summarise_run(
    progress: Progress,
    best: Checkpoint | None,
    *,
    folder: Path,
    counts: dict[str, dict[str, Any]],
    config: dict[str, Any],
    defaults: dict[str, Any],
    small_objects: dict[str, SmallObjects],
    comparison: Comparison | None,
    test: dict[str, Any] | None = None,
    general: dict[str, Any] | None = None,
    has_files: bool = True,
) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        progress: At the end of the run.
        best: The best checkpoint, if there is one.
        folder: The output folder.
        counts: Of images and masks, by split.
        config: The run's configuration.
        defaults: The default configuration.
        small_objects: Of each split.
        comparison: Of the objects' scores at step 0 and at the best step, if both are known.
        test: The scores of the test split, if there is one: `images`, `masks`, `before`, `after`,
            `box_fill`, `interval`, `bad_images`.
        general: Those of the general set, if there is one, and how many objects `gained` and `lost`
            more than `LOST_IOU`.
        has_files: Whether validation data are files, which commands can read.
    """
    before, after = progress.baseline["per_mask_iou"], best.score if best else None
    box_fill_iou = progress.box_fill_iou
    regressions = find_regressions(before, after, box_fill_iou=box_fill_iou, comparison=comparison)
    regressions += find_test_regressions(test) if test else []
    parts: dict[str, Any] = {"best": best, "defaults": defaults, "small_objects": small_objects}
    parts["has_files"] = has_files
    advice = suggest_changes(config, progress, **parts) if regressions else []
    forgotten = find_general_regressions(general) if general else []
    return {
        "got_worse": regressions + forgotten,
        "what_to_try": advice
        + (suggest_forgetting_less(config, has_files=has_files) if forgotten else []),
        "best_step": best.step if best else None,
        "best_val_per_mask_iou": after,
        "baseline_val_per_mask_iou": before,
        "box_fill_iou": box_fill_iou,
        "above_box_fill": None if after is None else after - box_fill_iou,
        "best_checkpoint": str(folder / best.name) if best else None,
        "steps": progress.step,
        "wall_seconds": progress.wall_seconds,
        "train_seconds": progress.train_seconds,
        "images_per_second": progress.train_images / max(progress.train_seconds, 1e-9),
        "skipped_steps": progress.skipped_steps,
        "objects": _count_changes(comparison) if comparison else None,
        "test": test,
        "general": general,
        "too_small": {split: asdict(small) for split, small in small_objects.items()},
        "data": _count_data(counts, progress, test=test, general=general),
    }


def _count_data(
    counts: dict[str, dict[str, Any]], progress: Progress, **scored: dict[str, Any] | None
) -> dict[str, dict[str, Any]]:
    # With the images that turned out bad only while they were used.
    bad_images = dict(progress.bad_images)
    for split, scores in scored.items():
        bad_images[split] = bad_images.get(split, {}) | (scores["bad_images"] if scores else {})
    return {
        split: {**own, "bad_images": {**own["bad_images"], **bad_images.get(split, {})}}
        for split, own in counts.items()
    }


def _count_changes(comparison: Comparison) -> dict[str, Any]:
    image_ids = comparison.before.image_ids
    return {
        "compared": len(comparison.before),
        "images": len(np.unique(image_ids)),
        "change": mean_change(comparison.change, image_ids, seed=0) if len(image_ids) else None,
        "gained": comparison.num_gained,
        "lost": comparison.num_lost,
        "above_box_fill": comparison.after.num_above_box_fill,
    }


def find_regressions(
    before: float, after: float | None, *, box_fill_iou: float, comparison: Comparison | None
) -> list[str]:
    """Describes why a run is no success, a sentence or two each; an empty list if it is one.

    Args:
        before: Mean IoU at step 0.
        after: Mean IoU at the best step; None if there is none.
        box_fill_iou: Mean IoU of filling each box.
        comparison: Of the objects' scores at both steps, if it is known.
    """
    regressions = []
    if after is None:
        regressions.append("There is no best checkpoint: no validation after step 0 gave a number.")
    elif not after >= before:
        regressions.append(
            f"Validation IoU fell from {before:.4f} at step 0 to {after:.4f} at its best: no "
            "checkpoint of this run is better than the one that it started from."
        )
    if after is not None and after < box_fill_iou:
        regressions.append(
            "The result is worse than no model at all: the masks of the best checkpoint score "
            f"{after:.4f}, {describe_against_box_fill(after, box_fill_iou)}."
        )
        if comparison:
            share = describe_share(comparison.after.num_above_box_fill, len(comparison.after))
            regressions[-1] += f" Better than their filled boxes are {share}."
    if comparison and comparison.num_lost > LOST_SHARE * len(comparison.before):
        lost, total = comparison.num_lost, len(comparison.before)
        regressions.append(
            f"{describe_share(lost, total)} lost more than {LOST_IOU} IoU; "
            f"{comparison.num_gained:,} gained as much."
        )
    return regressions


def find_test_regressions(test: dict[str, Any]) -> list[str]:
    """As `find_regressions`, on the test split.

    Args:
        test: See `summarise_run`.
    """
    before, after, box_fill_iou = test["before"], test["after"], test["box_fill"]
    regressions = []
    if after < before:
        interval = describe_interval(test, before="; the mean change ")
        regressions.append(
            "On the test split, whose images had no part in choosing the checkpoint, IoU fell "
            f"from {before:.4f} to {after:.4f}{interval}."
        )
    if after < box_fill_iou:
        against = describe_against_box_fill(after, box_fill_iou)
        regressions.append(f"On the test split, the masks score {after:.4f}, {against}.")
    return regressions


def find_general_regressions(general: dict[str, Any]) -> list[str]:
    """What a run has forgotten of other data, in a sentence; empty where that may be chance.

    Args:
        general: See `summarise_run`.
    """
    before, after, lost = general["before"], general["after"], general["lost"]
    interval = general["interval"]
    fell = after < before and (interval is None or interval[1] < 0)
    share = describe_share(lost, general["masks"])
    many = f"{share} lost more than {LOST_IOU} IoU; {general['gained']:,} gained as much."
    if fell:
        chance = describe_interval(general, before="; the mean change ")
        return [
            f"On the general set, the data of general_data_root, IoU fell from {before:.4f} to "
            f"{after:.4f}{chance}. {many}"
        ]
    if lost > LOST_SHARE * general["masks"]:
        return [f"On the general set, the data of general_data_root, {many}"]
    return []


def suggest_forgetting_less(config: dict[str, Any], *, has_files: bool = True) -> list[str]:
    """Suggests what to do about other data that a run has got worse on.

    Args:
        config: The run's configuration.
        has_files: See `summarise_run`.

    Returns:
        A sentence each, what was measured to keep most first (docs/experiments.md, Forgetting).
    """
    of_files = "" if has_files else ", with the validation data as a COCO dataset"
    advice = [
        "Against forgetting, without another training: samft average, of the weights before and "
        f"after{of_files}. Where it was measured, with a share of 0.7 of the tuned ones nothing "
        "was lost of other data, at about the same gain."
    ]
    weight, stronger = config["anchor_weight"], 3 * config["anchor_weight"] or ANCHOR_WEIGHT
    rate = max(config["learning_rate"], config["encoder_learning_rate"] or 0)
    if stronger * rate > 1:  # further than the whole way back, which is refused
        stronger = math.floor(1 / rate)
    if stronger > weight:
        advice.append(
            f"In another training: --anchor_weight {stronger:g}, which pulls the weights to their "
            f"start. Where it was measured, {ANCHOR_WEIGHT} kept half or more of what was lost "
            "without it, at about the same gain."
        )
    return advice


def suggest_changes(
    config: dict[str, Any],
    progress: Progress,
    *,
    best: Checkpoint | None,
    defaults: dict[str, Any],
    small_objects: dict[str, SmallObjects],
    has_files: bool = True,
) -> list[str]:
    """Suggests what to change after a run that is no success.

    Args:
        config: The run's configuration.
        progress: At the end of the run.
        best: Its best checkpoint after step 0, if there is one.
        defaults: The default configuration.
        small_objects: Of each split.
        has_files: See `summarise_run`.

    Returns:
        A sentence each, what changed measured scores most first (docs/experiments.md): the
        resolution of the loss, the image size where objects are small, the learning rate.
    """
    advice = []
    if config["loss_resolution"] != defaults["loss_resolution"]:
        advice.append(
            f"The default --loss_resolution {defaults['loss_resolution']}: it made better masks "
            f"than {config['loss_resolution']} where both were measured."
        )
    if of_size := advise_on_small_objects(small_objects):
        advice.append(f"Larger objects: {of_size}.")
    advice.append(_suggest_rate_or_steps(config, progress, best=best, defaults=defaults))
    advice += _suggest_freezing(config)
    if best is not None and best.step <= config["metrics_interval"] > 1:
        advice.append(
            "A smaller --metrics_interval: the first validation was the best, so there may be a "
            "better checkpoint before it."
        )
    look = " (samft check --pictures)" * has_files
    advice.append(
        f"A look at the objects that lost most: if their annotated outlines are wrong{look}, "
        "correct them; the model was right before."
    )
    can_scale = config["augment"] != "scale" and config["cache_embeddings"] != "on"
    advice.append(f"More images{', or --augment scale' * can_scale}.")
    return advice


def _suggest_freezing(config: dict[str, Any]) -> list[str]:
    # With what is refused beside it, and nothing where it would leave nothing to train.
    if config["freeze_image_encoder"] or config["freeze_mask_decoder"]:
        return []
    of_encoder = ("train_blocks", "encoder_learning_rate", "lora_rank", "lora_alpha")
    given = [f"--{name}" for name in (*of_encoder, "lora_decoder") if config[name]]
    instead = f" instead of {' and '.join(given)}" if given else ""
    return [
        f"--freeze_image_encoder{instead}: with few images, an encoder that is trained forgets "
        "what it had learnt before."
    ]


def _suggest_rate_or_steps(
    config: dict[str, Any],
    progress: Progress,
    *,
    best: Checkpoint | None,
    defaults: dict[str, Any],
) -> str:
    before = progress.baseline["per_mask_iou"]
    if best is not None and before <= best.score < progress.box_fill_iou:
        return (
            f"More steps: --steps {2 * config['steps']}. The score did not fall, so a lower "
            "learning rate is no remedy."
        )
    learning_rate = min(config["learning_rate"] / 10, defaults["learning_rate"])
    return f"A lower learning rate: --learning_rate {learning_rate:.3g}."


def next_commands(
    checkpoint: str,
    *,
    data: list[str],
    images: Path,
    annotations: Path,
    links: list[str],
    folder: Path,
) -> list[str]:
    """Commands that use the best checkpoint, to be copied into a shell.

    Args:
        checkpoint: Path of the best checkpoint.
        data: The flags that name the validation split.
        images: Folder of its images.
        annotations: Its COCO file.
        links: The flag that names the folders that links of its images lead to, if they lead out.
        folder: The output folder.

    Returns:
        `samft evaluate`, `samft predict`, and a line of Python that loads the model.
    """
    predict = ["--images", str(images), "--annotations", str(annotations)]
    return [
        shell_command("evaluate", "--checkpoint", checkpoint, *data),
        shell_command(
            *("predict", "--checkpoint", checkpoint, *predict, *links),
            *("--output_dir", folder / "predictions"),
        ),
        loading_line(checkpoint),
    ]


def loading_line(checkpoint: str) -> str:
    """A line of Python that loads a checkpoint; stock's predictor would pad a rectangle."""
    if saved_rectangle(checkpoint):
        return f"from samft import load_predictor; predictor = load_predictor({checkpoint!r})"
    return f"from samft import load_sam; sam = load_sam({checkpoint!r})"


def describe_interval(change: dict[str, Any] | None, *, before: str) -> str:
    """The interval of a mean change, behind some words; empty where there is none.

    Args:
        change: From `mean_change`, or any with its `interval`; None if no objects were compared.
        before: What the text begins with.
    """
    if change is None or change["interval"] is None:
        return ""
    low, high = change["interval"]
    return f"{before}on other images like these is {low:+.3f} to {high:+.3f} (95 % interval)"


def _log_test(test: dict[str, Any]) -> None:
    LOGGER.info(
        "test split: per_mask_iou %.4f -> %.4f on %d masks of %d images, %s%s",
        test["before"],
        test["after"],
        test["masks"],
        test["images"],
        describe_against_box_fill(test["after"], test["box_fill"]),
        describe_interval(test, before="; the mean change "),
    )


def _log_general(general: dict[str, Any]) -> None:
    LOGGER.info(
        f"general set: per_mask_iou %.4f -> %.4f on %d masks of %d images, of which %d gained more "
        f"than {LOST_IOU} IoU and %d lost as much%s",
        general["before"],
        general["after"],
        general["masks"],
        general["images"],
        general["gained"],
        general["lost"],
        describe_interval(general, before="; the mean change "),
    )


def log_summary(summary: dict[str, Any], folder: Path, *, commands: Sequence[str]) -> None:
    """Logs the scores, the files and the next commands of a run, and last what got worse, if any.

    Args:
        summary: The content of `summary.json`.
        folder: The output folder.
        commands: See `next_commands`.
    """
    before, after = (
        float("nan") if summary[name] is None else summary[name]
        for name in ("baseline_val_per_mask_iou", "best_val_per_mask_iou")
    )
    LOGGER.info(
        "done: val_per_mask_iou %.4f -> %.4f (best at step %s), %s, in %s",
        before,
        after,
        summary["best_step"],
        describe_against_box_fill(after, summary["box_fill_iou"]),
        format_duration(summary["wall_seconds"]),
    )
    if objects := summary["objects"]:
        LOGGER.info(
            f"of %d objects in %d images, %d gained more than {LOST_IOU} IoU and %d lost as much; "
            "better than their filled boxes are %s%s",
            objects["compared"],
            objects["images"],
            objects["gained"],
            objects["lost"],
            describe_share(objects["above_box_fill"], objects["compared"]),
            describe_interval(objects["change"], before="; the mean change "),
        )
    if summary["test"]:
        _log_test(summary["test"])
    if summary["general"]:
        _log_general(summary["general"])
    num_bad_images = sum(len(counts["bad_images"]) for counts in summary["data"].values())
    if num_bad_images:
        LOGGER.warning("%d images could not be used; summary.json names them all", num_bad_images)
    checkpoint = summary["best_checkpoint"]
    board = shell_program("tensorboard", "--logdir", folder, module="tensorboard.main")
    results = {
        "report.html": " (open it in a browser)",
        Path(checkpoint or "").name: " (the best checkpoint)",
        "summary.json": "",
        "metrics.jsonl": "",
        BEFORE_AFTER: "",
        f"{TENSORBOARD}/": f" (view with `{board}`)",
    }
    # The report and the pictures are missing where they could not be written.
    there = [name + what for name, what in results.items() if name and (folder / name).exists()]
    LOGGER.info("all results are in %s: %s", folder, ", ".join(there))
    if commands:  # in one record, so that no time is printed before a line that is to be copied
        text = "\n".join(commands)
        LOGGER.info("to evaluate, use or load the checkpoint:\n%s", text, extra=WITH_COMMANDS)
    if summary["got_worse"]:
        LOGGER.warning("WARNING: %s", " ".join(summary["got_worse"]))
        LOGGER.warning("What to try: %s", " ".join(summary["what_to_try"]))
