"""The predictor of a checkpoint, for prompts or for automatic masks."""

from pathlib import Path
from typing import Any

from samft.models.prompted_sam import PromptedSam
from samft.models.sam import open_checkpoint
from samft.prediction.inputs import PredictionTask
from samft.prediction.predictors import (
    AutomaticPredictor,
    BoxPredictor,
    PointPredictor,
    Predictor,
)
from samft.runtime.device import check_device, pick_amp_dtype, pick_device
from samft.weights.saved_settings import describe_point_prompts, saved_prompts


def build_predictor(
    task: PredictionTask, checkpoint: Path, *, device: str, amp: str, settings: dict[str, Any]
) -> tuple[Predictor, list[str]]:
    """Loads a checkpoint for what is to be predicted.

    Args:
        task: Its prompts.
        checkpoint: SAM weights.
        device: `auto`, `cuda` or `cpu`.
        amp: See `pick_amp_dtype`.
        settings: Of automatic masks, see `MaskGenerator`.

    Returns:
        The predictor, and sentences on points that the checkpoint was not trained with.
    """
    chosen = pick_device(device)
    check_device(chosen)
    sam, *_, resize_mode = open_checkpoint(checkpoint, attention="fast", as_trained=True)
    model = PromptedSam(sam.to(chosen).requires_grad_(False))
    amp_dtype = pick_amp_dtype(amp, chosen)
    if task.prompts is not None and task.prompts.points is None:
        return BoxPredictor(model, resize_mode=resize_mode, amp_dtype=amp_dtype), []
    is_automatic = task.prompts is None
    notes = describe_point_prompts(checkpoint, automatic=is_automatic)
    if is_automatic:
        return AutomaticPredictor(model, **settings), notes
    trained = saved_prompts(checkpoint)
    three_masks = trained is None or trained.three_masks
    options: dict[str, Any] = {"resize_mode": resize_mode, "amp_dtype": amp_dtype}
    return PointPredictor(model, three_masks=three_masks, **options), notes
