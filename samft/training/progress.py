"""How far a run has come: what a resumed run goes on from, beside the model."""

import math
from dataclasses import dataclass, field

LOSS_NAMES = ("loss", "loss_focal", "loss_dice", "loss_iou", "per_mask_iou")


@dataclass
class Progress:
    """How far a run has come; plain values, so that it goes into `last.ckpt` as it is.

    Attributes:
        step: Optimizer steps taken.
        position: Global batches consumed; more than `step` where a step was skipped.
        bad_steps: Steps skipped in a row, up to now.
        skipped_steps: Steps skipped in all.
        window: Sums over the masks since the last train line: `LOSS_NAMES`, then masks, images.
        window_seconds: Seconds of training in that window.
        train_seconds: Seconds of training in all, without validation and saving.
        train_images: Images trained on in all.
        wall_seconds: Seconds since the start, without the time between a stop and its resume.
        baseline: Validation of the untouched checkpoint.
        box_fill_iou: What filling each box of the validation set would score.
        bad_images: By split, images that could not be read on the way: name, what is wrong.
        pending: The train line of an interval whose validation was broken off; else empty.
    """

    step: int = 0
    position: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    window: list[float] = field(default_factory=lambda: [0.0] * (len(LOSS_NAMES) + 2))
    window_seconds: float = 0.0
    train_seconds: float = 0.0
    train_images: int = 0
    wall_seconds: float = 0.0
    baseline: dict[str, float] = field(default_factory=dict)
    box_fill_iou: float = math.nan
    bad_images: dict[str, dict[str, str]] = field(default_factory=dict)
    pending: dict[str, float] = field(default_factory=dict)

    def note_bad_images(self, split: str, found: dict[str, str]) -> dict[str, str]:
        """Adds images that could not be read; gives those back that were not known yet."""
        known = self.bad_images.setdefault(split, {})
        new = {name: why for name, why in found.items() if name not in known}
        known.update(new)
        return new
