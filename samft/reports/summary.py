"""What a run says at its end: its summary, whether it got worse, and what comes next."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samft.checkpoints.top_k import Checkpoint
from samft.evaluation.object_scores import LOST_IOU, Comparison
from samft.reports.validation_images import BEFORE_AFTER, draw_before_and_after
from samft.runtime.logs import LOGGER, format_duration
from samft.training.engine import Progress

_USUAL_RATE, _SAM_SIZE = 1e-4, 1024
LOST_SHARE = 0.1  # of objects that lost; above, the mean hides too much


def summarise_run(
    progress: Progress,
    best: Checkpoint | None,
    *,
    folder: Path,
    counts: dict[str, dict[str, Any]],
    config: dict[str, Any],
    comparison: Comparison | None,
) -> dict[str, Any]:
    """What `summary.json` holds.

    Args:
        progress: At the end of the run.
        best: The best checkpoint, if there is one.
        folder: The output folder.
        counts: Of images and masks, by split.
        config: The run's configuration.
        comparison: Of the objects at step 0 and at the best step, if both are known.
    """
    before, after = progress.baseline["per_mask_iou"], best.score if best else None
    met = progress.bad_images
    data = {
        split: {**found, "bad_images": {**found["bad_images"], **met.get(split, {})}}
        for split, found in counts.items()
    }
    worse = find_regressions(before, after, comparison)
    return {
        "got_worse": worse,
        "what_to_try": suggest_changes(config, progress, best) if worse else [],
        "best_step": best.step if best else None,
        "best_val_per_mask_iou": after,
        "baseline_val_per_mask_iou": before,
        "box_fill_iou": progress.box_fill_iou,
        "best_checkpoint": str(folder / best.name) if best else None,
        "steps": progress.step,
        "wall_seconds": progress.wall_seconds,
        "train_seconds": progress.train_seconds,
        "images_per_second": progress.train_images / max(progress.train_seconds, 1e-9),
        "skipped_steps": progress.skipped_steps,
        "objects": {
            "compared": len(comparison.before),
            "gained": comparison.num_gained,
            "lost": comparison.num_lost,
        }
        if comparison
        else None,
        "data": data,
    }


def find_regressions(
    before: float, after: float | None, comparison: Comparison | None
) -> list[str]:
    """In what a run got worse, a sentence each; none if it did not.

    Args:
        before: Mean IoU at step 0.
        after: At the best step; None if there is none.
        comparison: Of the objects at both, if it is known.
    """
    found = []
    if after is None:
        found.append("There is no best checkpoint: no validation after step 0 gave a number.")
    elif not after >= before:
        found.append(
            f"Validation IoU fell from {before:.4f} at step 0 to {after:.4f} at its best: no "
            "checkpoint of this run is better than the one that it started from."
        )
    lost = comparison.num_lost if comparison else 0
    if comparison and lost > LOST_SHARE * len(comparison.before):
        total = len(comparison.before)
        found.append(
            f"{lost:,} of {total:,} objects ({lost / total:.0%}) lost more than {LOST_IOU} IoU; "
            f"{comparison.num_gained:,} gained as much."
        )
    return found


def suggest_changes(
    config: dict[str, Any], progress: Progress, best: Checkpoint | None
) -> list[str]:
    """What to try where a run got worse, the likeliest first, a sentence each.

    Args:
        config: The run's configuration.
        progress: At its end.
        best: Its best checkpoint after step 0, if there is one.
    """
    rate = min(config["learning_rate"] / 10, _USUAL_RATE)
    advice = [f"A lower learning rate: --learning_rate {rate:.3g}."]
    filled = progress.box_fill_iou
    if progress.baseline["per_mask_iou"] < filled and config["image_size"] < _SAM_SIZE:
        advice.append(
            f"A larger --image_size, up to {_SAM_SIZE}: before training, filling each box scored "
            f"better ({filled:.3f}), so many objects may be too small at "
            f"{config['image_size']} px."
        )
    if not config["freeze_image_encoder"]:
        advice.append(
            "--freeze_image_encoder: with few images, a trained encoder forgets what it knew."
        )
    if best is not None and best.step <= config["metrics_interval"]:
        advice.append(
            "Looking earlier: the first validation was the best, so a smaller --metrics_interval "
            "may find a better checkpoint before it."
        )
    advice.append(
        "Looking at the objects that lost most: where their outlines are wrong in the annotations "
        "(python -m samft.check --pictures), the model was right before."
    )
    advice.append("More images, or --augment scale.")
    return advice


def next_commands(
    checkpoint: str, *, data: list[str], images: Path, annotations: Path, folder: Path
) -> list[str]:
    """What a person wants to do next, to be copied: two commands, and a line of Python.

    Args:
        checkpoint: The best one.
        data: The flags that name the validation split.
        images: Folder of its images.
        annotations: Its COCO file.
        folder: The output folder.
    """
    python = ["python", "-m"]
    predict = ["--images", str(images), "--annotations", str(annotations)]
    return [
        shlex.join([*python, "samft.evaluate", "--checkpoint", checkpoint, *data]),
        shlex.join(
            [*python, "samft.predict", "--checkpoint", checkpoint, *predict]
            + ["--output_dir", str(folder / "predictions")]
        ),
        f"from samft import load_sam; sam = load_sam({checkpoint!r})",
    ]


def log_summary(summary: dict[str, Any], folder: Path, *, commands: Sequence[str]) -> None:
    """Says how the run went, loudly if it got worse, where everything is, and what comes next.

    Args:
        summary: What `summary.json` holds.
        folder: The output folder.
        commands: See `next_commands`.
    """
    before, after = (
        float("nan") if summary[name] is None else summary[name]
        for name in ("baseline_val_per_mask_iou", "best_val_per_mask_iou")
    )
    draw_before_and_after(folder, before=before, after=after)
    LOGGER.info(
        "done: val_per_mask_iou %.4f -> %.4f (best at step %s; filling each box: %.4f) in %s",
        before,
        after,
        summary["best_step"],
        summary["box_fill_iou"],
        format_duration(summary["wall_seconds"]),
    )
    if objects := summary["objects"]:
        LOGGER.info(
            f"of %d objects, %d gained more than {LOST_IOU} IoU and %d lost as much",
            objects["compared"],
            objects["gained"],
            objects["lost"],
        )
    bad = sum(len(found["bad_images"]) for found in summary["data"].values())
    if bad:
        LOGGER.warning("%d images could not be used; summary.json names them all", bad)
    checkpoint = summary["best_checkpoint"]
    LOGGER.info(
        "everything is in %s: report.html (open it in a browser), %s (the best checkpoint), "
        "summary.json, metrics.jsonl, %s, tensorboard/ (look with `tensorboard --logdir %s`)",
        folder,
        Path(checkpoint).name if checkpoint else "no best checkpoint",
        BEFORE_AFTER,
        shlex.quote(str(folder)),
    )
    if commands:  # one record, so that no time stands before what is to be copied
        LOGGER.info("score it, use it, load it in Python:\n%s", "\n".join(commands))
    if summary["got_worse"]:
        LOGGER.warning("WARNING: %s", " ".join(summary["got_worse"]))
        LOGGER.warning("What to try: %s", " ".join(summary["what_to_try"]))
