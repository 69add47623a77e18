"""One training step in several dresses: the plain recipe, and what samft makes of it.

All dresses of a wardrobe have equal weights and get the same images, boxes and masks, each in the
form that its own loader gives. `assert_equal` holds loss and gradients equal before any is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baseline import LEARNING_RATE, PlainSample, PlainTrainer
from benchmarks.measure import Span
from samft.data.dataset import NO_PIXELS, Batch
from samft.models.chunked_loss import BoxDecoder
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import MODEL_SHAPES, PATCH_SIZE, build_sam, freeze
from samft.runtime.device import pick_amp_dtype
from samft.training.engine import Trainer
from samft.training.losses import mask_losses
from samft.training.optim import build_optimizer

PLAIN, PLAIN_AMP = "plain", "plain+amp"
SAMFT, SAMFT_EXACT = "samft", "samft, exact loss"
CACHED, CACHED_EXACT = "samft cached", "samft cached, exact loss"
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
_WEIGHT_DECAY = 1e-2
# A gradient that is zero but for rounding, as of the bias of attention's keys, is measured against
# this share of the root mean square over the whole model.
_SMALL_GRADIENT = 1e-2


@dataclass(frozen=True)
class Setting:
    """What is trained on what."""

    model_type: str
    image_size: int
    num_images: int
    boxes: int  # of each image
    frozen: bool  # the image encoder
    device: torch.device

    @property
    def num_masks(self) -> int:
        """Of a step."""
        return self.num_images * self.boxes


def random_sam(setting: Setting, *, attention: str) -> Sam:
    """The same random weights at each call, also where a fresh model has zeros."""
    torch.manual_seed(0)
    sam = build_sam(setting.model_type, setting.image_size, attention=attention)
    with torch.no_grad():
        for parameter in sam.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    freeze(sam, ["image_encoder"] if setting.frozen else [])
    return sam.to(setting.device)


def samft_trainer(model: PromptedSam, *, amp: str = "auto") -> Trainer:
    """As `samft.train` builds it, with a constant learning rate."""
    device = model.sam.device
    return Trainer(
        model,
        build_optimizer(model, learning_rate=LEARNING_RATE, weight_decay=_WEIGHT_DECAY),
        learning_rate_at=lambda step: LEARNING_RATE,
        loss=partial(mask_losses, image_size=model.sam.image_encoder.img_size),
        amp_dtype=pick_amp_dtype(amp, device),
    )


class Scene:
    """Noise with ellipses to segment, in frames of which the lowest quarter is padding."""

    def __init__(self, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(1)
        size, count = setting.image_size, setting.num_images
        self.setting = setting
        self.input_size = (3 * size // 4, size)
        self.images = torch.randint(0, 256, (count, 3, size, size), generator=generator).byte()
        self.images[:, :, self.input_size[0] :] = 0
        extent = torch.tensor([size, self.input_size[0]])
        half = extent * (0.03 + 0.15 * torch.rand(setting.num_masks, 2, generator=generator))
        place = torch.rand(setting.num_masks, 2, generator=generator)
        centre = half + place * (extent - 2 * half)
        self.boxes = torch.cat([centre - half, centre + half], dim=1)

    def mask(self, k: int) -> Tensor:
        """The ellipse in box k, uint8 [S, S]."""
        x0, y0, x1, y1 = self.boxes[k].tolist()
        at = torch.arange(self.setting.image_size) + 0.5
        across, down = ((2 * at - a - b) / (b - a) for a, b in ((x0, x1), (y0, y1)))
        return (across**2 + down[:, None] ** 2 <= 1).byte()

    def plain(self, pixel_mean: Tensor, pixel_std: Tensor) -> list[PlainSample]:
        """On the device, as the plain recipe's loader gives it."""
        device, boxes = self.setting.device, self.setting.boxes
        samples = []
        for i, image in enumerate(self.images):
            pixels = (image.to(device) - pixel_mean) / pixel_std
            pixels[:, self.input_size[0] :] = 0
            rows = range(i * boxes, (i + 1) * boxes)
            masks = torch.stack([self.mask(k) for k in rows]).float().to(device)
            own = self.boxes[rows.start : rows.stop].to(device)
            samples.append(PlainSample(pixels, own, masks, self.input_size))
        return samples

    def batch(self, *, exact: bool, embeddings: Tensor | None = None) -> Batch:
        """On the device, as samft's loader gives it; embeddings stand in for images."""
        count, masks = self.setting.num_images, self.setting.num_masks
        sizes = torch.tensor([self.input_size] * count)
        batch = Batch(
            images=self.images if embeddings is None else NO_PIXELS.expand(count, -1, -1, -1),
            boxes=self.boxes,
            image_index=torch.arange(count).repeat_interleave(self.setting.boxes),
            targets=torch.stack([self._target(k, exact=exact) for k in range(masks)]),
            input_sizes=sizes,
            original_sizes=sizes,
            image_ids=list(range(count)),
            object_ids=torch.arange(masks),
            truths=[],
            embeddings=embeddings,
        )
        return batch.to(self.setting.device)

    def _target(self, k: int, *, exact: bool) -> Tensor:
        mask = self.mask(k)
        return mask if exact else (255 * F.avg_pool2d(mask[None].float(), 4)[0]).round().byte()


class Variants:
    """Builds each model, and each form of the batch, when a dress first asks for it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.scene = Scene(setting)

    @cached_property
    def plain(self) -> PlainTrainer:
        """The plain recipe, as it was before anyone knew which weights boxes do not reach."""
        sam = random_sam(self.setting, attention="stock")
        for name, parameter in sam.named_parameters():
            frozen = self.setting.frozen and name.startswith("image_encoder.")
            parameter.requires_grad_(not frozen)
        return PlainTrainer(sam)

    @cached_property
    def plain_amp(self) -> PlainTrainer:
        """The same model and optimizer under autocast."""
        trainer = PlainTrainer(self.plain.sam, amp=True)
        trainer.optimizer = self.plain.optimizer
        return trainer

    @cached_property
    def samft(self) -> Trainer:
        """From images, or from embeddings."""
        return samft_trainer(PromptedSam(random_sam(self.setting, attention="fast")))

    @cached_property
    def embeddings(self) -> Tensor:
        """Of the scene's images, without a gradient."""
        batch = self.scene.batch(exact=False)
        with torch.no_grad():
            return self.samft.model.embed(batch.images, batch.input_sizes)

    def draw_embeddings(self) -> None:
        """Takes noise for the embeddings where what they show does not matter."""
        grid = self.setting.image_size // PATCH_SIZE
        width = MODEL_SHAPES[self.setting.model_type].decoder_width
        shape = (self.setting.num_images, width, grid, grid)
        self.embeddings = torch.randn(shape, device=self.setting.device)

    @cached_property
    def samples(self) -> list[PlainSample]:
        """The plain recipe's batch."""
        return self.scene.plain(self.plain.sam.pixel_mean, self.plain.sam.pixel_std)

    def step(self, name: str) -> Callable[[], Any]:
        """A training step of the dress, its batch on the device."""
        if name in (PLAIN, PLAIN_AMP):
            trainer = self.plain if name == PLAIN else self.plain_amp
            return partial(trainer.train_step, self.samples)
        cached, exact = name.startswith(CACHED), name.endswith("exact loss")
        batch = self.scene.batch(exact=exact, embeddings=self.embeddings if cached else None)
        return partial(self.samft.train_step, [batch])

    def spans(self, name: str) -> list[Span]:
        """Where the phases of the dress's step begin and end."""
        if name in (PLAIN, PLAIN_AMP):
            trainer = self.plain if name == PLAIN else self.plain_amp
            return plain_spans(trainer)
        return samft_spans(self.samft)

    def decoder_step(self, name: str) -> Callable[[], Any]:
        """Decoder and loss, forward and backward, from the embeddings."""
        if name == PLAIN:
            embeddings, samples = self.embeddings, self.samples
            return lambda: backward(self.plain.sam, self.plain.decoder_loss(embeddings, samples))
        batch = self.scene.batch(exact=name == SAMFT_EXACT, embeddings=self.embeddings)
        return lambda: backward(self.samft.model, samft_loss(self.samft, batch))


def plain_spans(trainer: PlainTrainer) -> list[Span]:
    """The phases of the plain step."""
    return [
        (trainer, "encode", "encoder"),
        (trainer, "decode", "decoder + loss"),
        (trainer, "losses", "decoder + loss"),
        *_update_spans(trainer.optimizer),
    ]


def samft_spans(trainer: Trainer) -> list[Span]:
    """The phases of samft's step, which takes the decoder's gradients together with its losses."""
    prompt_encoder = trainer.model.sam.prompt_encoder
    return [
        (trainer.model, "embed", "encoder"),
        (prompt_encoder, "forward", "decoder + loss"),
        (prompt_encoder, "get_dense_pe", "decoder + loss"),
        (BoxDecoder, "sum_losses", "decoder + loss"),
        *_update_spans(trainer.optimizer),
    ]


def _update_spans(optimizer: torch.optim.Optimizer) -> list[Span]:
    return [
        (Tensor, "backward", "backward"),
        (nn.utils, "clip_grad_norm_", "optimizer"),
        (optimizer, "step", "optimizer"),
        (optimizer, "zero_grad", "optimizer"),
    ]


def samft_loss(trainer: Trainer, batch: Batch) -> Tensor:
    """Mean loss over all masks of a batch, in float32."""
    weight = torch.tensor(1 / batch.num_masks, device=batch.boxes.device)
    total, _ = trainer.model(
        batch.images,
        batch.boxes,
        batch.image_index,
        input_sizes=batch.input_sizes,
        embeddings=batch.embeddings,
        loss=trainer.loss,
        targets=batch.targets,
        gradient=weight,
    )
    return total * weight


def backward(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by the parameter's name in SAM."""
    loss.backward()
    names = ((name.removeprefix("sam."), p) for name, p in model.named_parameters())
    gradients = {name: p.grad for name, p in names if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return gradients


def assert_equal(wardrobe: Variants, *, start: str) -> tuple[float, float]:
    """Holds samft's exact options in float32 equal to the plain recipe.

    Args:
        wardrobe: Its models are compared.
        start: `images`: both encode them; `cached`: only the plain recipe does; `embeddings`: none.

    Returns:
        Relative difference of the losses, and the largest of the gradients.

    Raises:
        AssertionError: Weights, loss or gradients differ.
    """
    plain, trainer = wardrobe.plain, wardrobe.samft
    _assert_equal_weights(plain.sam, trainer.model.sam)
    if start == "embeddings":
        loss = plain.decoder_loss(wardrobe.embeddings, wardrobe.samples)
    else:
        loss = plain.loss(wardrobe.samples)
    expected, gradients = loss.item(), backward(plain.sam, loss)
    embeddings = None if start == "images" else wardrobe.embeddings
    loss = samft_loss(trainer, wardrobe.scene.batch(exact=True, embeddings=embeddings))
    off = abs(loss.item() - expected) / abs(expected)
    assert off <= LOSS_TOLERANCE, f"the losses differ by {off:.1e} of {expected:.6f}"
    worst = gradient_difference(backward(trainer.model, loss), gradients)
    assert worst[0] <= GRADIENT_TOLERANCE, f"the gradients of {worst[1]} differ by {worst[0]:.1e}"
    return off, worst[0]


def _assert_equal_weights(plain: nn.Module, own: nn.Module) -> None:
    expected, found = plain.state_dict(), own.state_dict()
    assert expected.keys() == found.keys(), "the models have different tensors"
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), f"the weights {name} differ"


def gradient_difference(
    gradients: dict[str, Tensor], expected: dict[str, Tensor]
) -> tuple[float, str]:
    """The largest relative difference of a tensor's gradient, and which tensor that is.

    What has no gradient in one of the two counts as zero there.
    """
    numbers = sum(g.numel() for g in expected.values())
    total = sum(g.double().square().sum().item() for g in expected.values())
    mean_square = total / max(numbers, 1)
    worst = (0.0, "none")
    for name in expected.keys() | gradients.keys():
        present = expected[name] if name in expected else gradients[name]
        zero = torch.zeros_like(present)
        one, other = expected.get(name, zero), gradients.get(name, zero)
        least = _SMALL_GRADIENT * (mean_square * present.numel()) ** 0.5
        off = (one - other).norm().item() / max(one.norm().item(), least, 1e-30)
        worst = max(worst, (off, name))
    return worst
