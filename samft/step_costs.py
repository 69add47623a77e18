"""What a training step takes, by model: memory, and seconds of a CPU core; and how many to take.

All are scaled from what was measured on a CPU (docs/benchmarks.md); nothing is of a GPU. Imports no
torch.
"""

import math
from typing import NamedTuple

DECODER, LORA, LAST_HALF, ALL = range(4)  # what is trained, from little to all

_DECODER_GIB = 1.44  # a cached step of vit_b at 1024 px, one image: docs/benchmarks.md
_ENCODER_GIB = 4.2  # of activations of vit_b's encoder, everything trained: docs/benchmarks.md
_MAX_TIMES_SEEN = 200  # an image in a run
VIT_B_ENCODING = 19  # core seconds an image at 1024 px: 9.6 s on two cores (docs/benchmarks.md)


class StepCosts(NamedTuple):
    """What decides how long a step of a model takes, and in how much memory."""

    parameters: float  # millions
    blocks: int
    width: int
    image_size: int  # of its pre-training, px
    # Core seconds at the size of its pre-training: an image through the encoder, and a box through
    # decoder and losses, there and back.
    encoder_seconds: float
    box_seconds: float

    @property
    def relative_activations(self) -> float:
        """Of the encoder, of those of `vit_b` at the same size."""
        return self.blocks * self.width / (12 * 768)


# Seconds: docs/benchmarks.md, two threads; of vit_l and vit_h nothing was measured on a CPU.
COSTS = {
    "vit_h": StepCosts(641, 32, 1280, 1024, math.inf, math.inf),
    "vit_l": StepCosts(312, 24, 1024, 1024, math.inf, math.inf),
    "vit_b": StepCosts(94, 12, 768, 1024, VIT_B_ENCODING, 0.17),
    "vit_tiny": StepCosts(1.85, 4, 128, 256, 0.02, 0.007),
}


def memory_gib(model_type: str, trained: int, *, image_size: int, batch_size: int) -> float:
    """Memory that a training step takes, an estimate from steps of `vit_b` on a CPU in float32.

    Weights, gradients and AdamW's moments are counted; activations grow with blocks x width of the
    encoder that gradients pass, with pixels and with images.

    Args:
        model_type: A key of `config.MODEL_TYPES`.
        trained: `DECODER`, `LORA`, `LAST_HALF` or `ALL`.
        image_size: The model's input, px.
        batch_size: Images of a micro-batch.

    Returns:
        GiB.
    """
    model = COSTS[model_type]
    # Adapters everywhere keep nearly as much for backward as training everything (19.6 of 20.5 GB,
    # Teuber et al., 2025); a frozen encoder keeps nothing.
    passed = {DECODER: 0.0, LORA: 1.0, LAST_HALF: 0.5, ALL: 1.0}[trained]
    moved = {DECODER: 0.0, LORA: 0.02, LAST_HALF: 0.5, ALL: 1.0}[trained]
    pixels = (image_size / 1024) ** 2
    activations = _DECODER_GIB + _ENCODER_GIB * model.relative_activations * passed
    weights = model.parameters * 1e6 * (4 + 12 * moved) / 2**30
    return weights + batch_size * pixels * activations


def justified_steps(num_images: int, images_per_step: int) -> int:
    """How many steps so many images, or windows of images, are worth.

    The images of a run grow with the square root of their number, from 1,000 for 5 of them; but
    each is seen at least once, and at most `_MAX_TIMES_SEEN` times.
    """
    images = 1000 * math.sqrt(num_images / 5)
    images = min(max(images, num_images), _MAX_TIMES_SEEN * num_images)
    return max(1, round(images / images_per_step))
