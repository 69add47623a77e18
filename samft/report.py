"""What a run shows at its end: pictures before and after, and its last words."""

from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import functional as F

from samft import pictures
from samft.checkpoint import BestCheckpoint
from samft.logs import LOGGER, format_duration
from samft.progress import Progress
from samft.validation import Validation

BEFORE, AFTER, BOTH = "before.png", "after.png", "before_after.png"


def draw_masks(found: Validation) -> np.ndarray:
    """Draws the images that a validation kept, with their boxes and masks, side by side.

    Args:
        found: With at least one image in `shown`.

    Returns:
        uint8 [H, W, 3] RGB.
    """
    drawn = []
    for batch, logits in found.shown:
        height, width = batch.input_sizes[0].tolist()
        size = batch.images.shape[-2:]
        masks = F.interpolate(logits[:, None], size, mode="bilinear")[:, 0] > 0
        image = batch.images[0].permute(1, 2, 0)[:height, :width].numpy()
        masks_inside = masks[:, :height, :width].numpy()
        drawn.append(pictures.overlay(image, masks_inside, boxes=batch.boxes.numpy()))
    return pictures.row(drawn)


def draw_before_and_after(folder: Path, *, before: float, after: float) -> None:
    """Sets the pictures of step 0 and of the best step one below the other, in one file.

    Args:
        folder: Holds both, and gets `before_after.png`.
        before: Mean IoU at step 0.
        after: Mean IoU at the best step.
    """
    titles = (f"before: mean IoU {before:.3f}", f"after: mean IoU {after:.3f}")
    files = (folder / BEFORE, folder / AFTER)
    if all(file.exists() for file in files):
        rows = [(title, pictures.read_png(file)) for title, file in zip(titles, files, strict=True)]
        pictures.write_png(folder / BOTH, pictures.stack(rows))


def summarise(
    progress: Progress,
    best: BestCheckpoint | None,
    *,
    folder: Path,
    counts: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """What `summary.json` holds.

    Args:
        progress: At the end of the run.
        best: The best checkpoint, if there is one.
        folder: The output folder.
        counts: Of images and masks, by split.
    """
    met = progress.bad_images
    data = {
        split: {**found, "bad_images": {**found["bad_images"], **met.get(split, {})}}
        for split, found in counts.items()
    }
    return {
        "best_step": best.step if best else None,
        "best_val_per_mask_iou": best.score if best else None,
        "baseline_val_per_mask_iou": progress.baseline["per_mask_iou"],
        "box_fill_iou": progress.box_fill_iou,
        "best_checkpoint": str(folder / best.name) if best else None,
        "steps": progress.step,
        "wall_seconds": progress.wall_seconds,
        "train_seconds": progress.train_seconds,
        "images_per_second": progress.train_images / max(progress.train_seconds, 1e-9),
        "skipped_steps": progress.skipped_steps,
        "data": data,
    }


def report(summary: dict[str, Any], folder: Path) -> None:
    """Says how the run went, loudly if it got worse, where everything is, and what comes next.

    Args:
        summary: What `summary.json` holds.
        folder: The output folder.
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
    if not after >= before:
        LOGGER.warning(
            "IT GOT WORSE: no checkpoint of this run beats the one it started from. Try a "
            "learning_rate ten times lower, freeze_image_encoder, or more images."
        )
    bad = sum(len(found["bad_images"]) for found in summary["data"].values())
    if bad:
        LOGGER.warning("%d images could not be used; summary.json names them all", bad)
    checkpoint = summary["best_checkpoint"]
    LOGGER.info(
        "everything is in %s: %s (the best checkpoint), summary.json, metrics.jsonl, %s, "
        "tensorboard/ (look with `tensorboard --logdir %s`)",
        folder,
        Path(checkpoint).name if checkpoint else "no best checkpoint",
        BOTH,
        folder,
    )
    LOGGER.info(
        "load it: `from samft import load_sam`, then load_sam(%r) gives a Sam for "
        "segment_anything.SamPredictor",
        checkpoint,
    )
    LOGGER.info(
        "your own data: bash launch.sh --data_root YOUR_COCO_FOLDER --model_type vit_b "
        "--checkpoint_path auto --freeze_image_encoder --output_dir runs/mine"
    )
