"""What each training step prompts with: a function of the seed and the step's place in the data.

All ranks draw the same, so DistributedDataParallel sees them use the same parameters; and a resumed
run draws it again. Only the clicks themselves differ from object to object: their numbers come with
the batch.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from samft.data.samplers import ROUND_STREAM, generator_of
from samft.training.losses import LossFunction
from samft.training.multimask import best_of_masks
from samft.training.rounds import Rounds


@dataclass(frozen=True)
class PromptSchedule:
    """The prompts of a run.

    Attributes:
        prompts: What a step begins with: `box`, `point`, or `mixed`, which is either by a draw.
        corrections: Rounds after the first, each with one more click.
        mask_prompt: Probability that such a round has the last mask as a prompt.
        multimask: `off`, or `best`: a step that begins with a point gives three masks of it, the
            best of which is trained.
        iou_weight: Weight of the IoU's loss; None: not known; see `multimask.best_of_masks`.
        seed: Of the draws.
    """

    prompts: str = "box"
    corrections: int = 0
    mask_prompt: float = 0.5
    multimask: str = "off"
    iou_weight: float | None = 1.0
    seed: int = 0

    @property
    def has_clicks(self) -> bool:
        """Whether any step has any; without, a batch needs no draws."""
        return self.prompts != "box" or self.corrections > 0

    def rounds_at(self, position: int | None, *, click_draws: Tensor, loss: LossFunction) -> Rounds:
        """The rounds of a micro-batch.

        Args:
            position: Of the step in the data, see `Progress.position`; None: for the rounds that
                take most memory, whatever is drawn.
            click_draws: float32 [M, corrections + 1, 2], see `Coco2MaskDataset`.
            loss: Of one mask for each object.
        """
        if position is None:
            draws = [0.0] * (self.corrections + 1)
        else:
            generator = generator_of(ROUND_STREAM, self.seed, position)
            draws = generator.random(self.corrections + 1).tolist()
        from_point = self.prompts == "point" or (self.prompts == "mixed" and draws[0] < 0.5)
        best = partial(best_of_masks, loss=loss, iou_weight=self.iou_weight)
        return Rounds(
            click_draws,
            mask_prompts=tuple(draw < self.mask_prompt for draw in draws[1:]),
            from_point=from_point,
            with_box=from_point and self.prompts == "mixed",
            multimask_loss=best if from_point and self.multimask == "best" else None,
        )
