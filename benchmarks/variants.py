"""Variants of one training step: the baseline's, and samft's with several options.

All variants have equal weights and train on the same images, boxes and masks, in the form that
their own loader returns. `assert_equal` compares loss and gradients before anything is timed.
"""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)

# isort: split
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from benchmarks.baseline import (
    FOCAL_WEIGHT,
    LEARNING_RATE,
    BaselineSample,
    BaselineTrainer,
    plain_losses,
)
from benchmarks.measure import PhaseSpan
from samft.data.dataset import NO_PIXELS, Batch
from samft.data.targets import WINDOW_CELLS, WINDOW_SCALE, make_windows
from samft.models.chunked_loss import BoxDecoder
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import MODEL_SHAPES, PATCH_SIZE, build_sam
from samft.models.trainable import freeze
from samft.runtime.device import exact_float32, pick_amp_dtype
from samft.training.engine import Trainer
from samft.training.losses import mask_losses
from samft.training.optim import build_optimizer
from samft.training.prompt_schedule import PromptSchedule

BASELINE, BASELINE_AMP = "baseline", "baseline+amp"
SAMFT, SAMFT_EXACT = "samft", "samft, exact loss"
CACHED, CACHED_EXACT = "samft cached", "samft cached, exact loss"
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
_WEIGHT_DECAY = 1e-2
# A gradient that is zero except for rounding, such as that of the bias of attention's keys, is
# compared with this share of the root mean square over the whole model.
_SMALL_GRADIENT = 1e-2


@dataclass(frozen=True)
class Workload:
    """A model and the size of its batch."""

    model_type: str
    image_size: int
    num_images: int
    boxes: int  # per image
    frozen: bool  # whether the image encoder is
    device: torch.device

    @property
    def num_masks(self) -> int:
        """Masks per step."""
        return self.num_images * self.boxes


def random_sam(workload: Workload, *, attention: str) -> Sam:
    """A model with the same random weights at each call, also where a new model has zeros."""
    torch.manual_seed(0)
    sam = build_sam(workload.model_type, workload.image_size, attention=attention)
    with torch.no_grad():
        for parameter in sam.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    freeze(sam, ["image_encoder"] if workload.frozen else [])
    return sam.to(workload.device)


def samft_trainer(
    model: PromptedSam, *, amp: str = "auto", prompts: PromptSchedule | None = None
) -> Trainer:
    """The trainer of `samft.train`, with a constant learning rate."""
    device = model.sam.device
    return Trainer(
        model,
        build_optimizer(model, learning_rate=LEARNING_RATE, weight_decay=_WEIGHT_DECAY),
        learning_rate_at=lambda step: LEARNING_RATE,
        loss=partial(mask_losses, focal_weight=FOCAL_WEIGHT),
        prompts=prompts,
        amp_dtype=pick_amp_dtype(amp, device),
    )


class SyntheticBatch:
    """Images of noise with elliptic masks; the bottom quarter of each frame is padding."""

    def __init__(self, workload: Workload) -> None:
        generator = torch.Generator().manual_seed(1)
        size, count = workload.image_size, workload.num_images
        self.workload = workload
        self.input_size = (3 * size // 4, size)
        self.images = torch.randint(0, 256, (count, 3, size, size), generator=generator).byte()
        self.images[:, :, self.input_size[0] :] = 0
        extent = torch.tensor([size, self.input_size[0]])
        half = extent * (0.03 + 0.15 * torch.rand(workload.num_masks, 2, generator=generator))
        place = torch.rand(workload.num_masks, 2, generator=generator)
        centre = half + place * (extent - 2 * half)
        self.boxes = torch.cat([centre - half, centre + half], dim=1)

    def mask(self, k: int) -> Tensor:
        """The ellipse in box k, uint8 [S, S]."""
        x0, y0, x1, y1 = self.boxes[k].tolist()
        at = torch.arange(self.workload.image_size) + 0.5
        across, down = ((2 * at - a - b) / (b - a) for a, b in ((x0, x1), (y0, y1)))
        return (across**2 + down[:, None] ** 2 <= 1).byte()

    def baseline_samples(self, pixel_mean: Tensor, pixel_std: Tensor) -> list[BaselineSample]:
        """On the device, as the baseline's loader returns it."""
        device, num_boxes = self.workload.device, self.workload.boxes
        samples = []
        for i, image in enumerate(self.images):
            pixels = (image.to(device) - pixel_mean) / pixel_std
            pixels[:, self.input_size[0] :] = 0
            rows = range(i * num_boxes, (i + 1) * num_boxes)
            masks = torch.stack([self.mask(k) for k in rows]).float().to(device)
            boxes = self.boxes[rows.start : rows.stop].to(device)
            samples.append(BaselineSample(pixels, boxes, masks, self.input_size))
        return samples

    def batch(self, *, exact: bool, embeddings: Tensor | None = None) -> Batch:
        """On the device, as samft's loader returns it; with embeddings, there are no images."""
        count, masks = self.workload.num_images, self.workload.num_masks
        sizes = torch.tensor([self.input_size] * count)
        whole_frame = torch.tensor([[0.0, 0.0, *[self.workload.image_size] * 2]])
        windows = torch.from_numpy(make_windows(self.boxes.numpy())).float()
        batch = Batch(
            images=self.images if embeddings is None else NO_PIXELS.expand(count, -1, -1, -1),
            boxes=self.boxes,
            windows=whole_frame.repeat(masks, 1) if exact else windows,
            image_index=torch.arange(count).repeat_interleave(self.workload.boxes),
            targets=torch.stack([self._target(k, exact=exact) for k in range(masks)]),
            input_sizes=sizes,
            original_sizes=sizes,
            image_ids=list(range(count)),
            object_ids=torch.arange(masks),
            truths=[],
            embeddings=embeddings,
        )
        return batch.to(self.workload.device)

    def _target(self, k: int, *, exact: bool) -> Tensor:
        if exact:
            return 255 * self.mask(k)
        # The ellipse fills its box, and the window is larger by the same factor along both sides.
        at = WINDOW_SCALE * ((2 * torch.arange(WINDOW_CELLS) + 1) / WINDOW_CELLS - 1)
        return 255 * (at**2 + at[:, None] ** 2 <= 1).byte()


class Variants:
    """The variants of a workload; models and batches are built when they are first used."""

    def __init__(self, workload: Workload, *, cuda_graphs: bool = False) -> None:
        self.workload, self.cuda_graphs = workload, cuda_graphs
        self.synthetic = SyntheticBatch(workload)

    @cached_property
    def baseline(self) -> BaselineTrainer:
        """The baseline; also optimizes the weights that box prompts do not reach."""
        sam = random_sam(self.workload, attention="stock")
        for name, parameter in sam.named_parameters():
            frozen = self.workload.frozen and name.startswith("image_encoder.")
            parameter.requires_grad_(not frozen)
        return BaselineTrainer(sam)

    @cached_property
    def baseline_amp(self) -> BaselineTrainer:
        """The baseline's model and optimizer under autocast."""
        trainer = BaselineTrainer(self.baseline.sam, amp=True)
        trainer.optimizer = self.baseline.optimizer
        return trainer

    @cached_property
    def samft(self) -> Trainer:
        """samft's trainer, for images and for embeddings."""
        sam = random_sam(self.workload, attention="fast")
        return samft_trainer(PromptedSam(sam, cuda_graphs=self.cuda_graphs))

    @cached_property
    def embeddings(self) -> Tensor:
        """Embeddings of the batch's images, without a gradient."""
        batch = self.synthetic.batch(exact=False)
        with torch.no_grad(), exact_float32():
            return self.samft.model.embed(batch.images, batch.input_sizes)

    def use_random_embeddings(self) -> None:
        """Uses noise as embeddings, for measurements that do not depend on their content."""
        grid = self.workload.image_size // PATCH_SIZE
        width = MODEL_SHAPES[self.workload.model_type].decoder_width
        shape = (self.workload.num_images, width, grid, grid)
        self.embeddings = torch.randn(shape, device=self.workload.device)

    @cached_property
    def samples(self) -> list[BaselineSample]:
        """The baseline's batch."""
        return self.synthetic.baseline_samples(
            self.baseline.sam.pixel_mean, self.baseline.sam.pixel_std
        )

    def step(self, name: str) -> Callable[[], Any]:
        """A training step of a variant, with its batch on the device."""
        if name in (BASELINE, BASELINE_AMP):
            trainer = self.baseline if name == BASELINE else self.baseline_amp
            return partial(trainer.train_step, self.samples)
        cached, exact = name.startswith(CACHED), name.endswith("exact loss")
        batch = self.synthetic.batch(exact=exact, embeddings=self.embeddings if cached else None)
        return partial(self.samft.train_step, [batch])

    def spans(self, name: str) -> list[PhaseSpan]:
        """The functions that make up the phases of a variant's step."""
        if name in (BASELINE, BASELINE_AMP):
            trainer = self.baseline if name == BASELINE else self.baseline_amp
            return baseline_spans(trainer)
        return samft_spans(self.samft)

    def decoder_step(self, name: str) -> Callable[[], Any]:
        """Forward and backward of decoder and loss, from embeddings."""
        if name == BASELINE:
            embeddings, samples = self.embeddings, self.samples
            return lambda: take_gradients(
                self.baseline.sam, self.baseline.decoder_loss(embeddings, samples)
            )
        batch = self.synthetic.batch(exact=name == SAMFT_EXACT, embeddings=self.embeddings)
        return lambda: take_gradients(self.samft.model, samft_loss(self.samft, batch))


def baseline_spans(trainer: BaselineTrainer) -> list[PhaseSpan]:
    """The phases of the baseline's step."""
    return [
        (trainer, "encode", "encoder"),
        (trainer, "decode", "decoder + loss"),
        (trainer, "losses", "decoder + loss"),
        *_update_spans(trainer.optimizer),
    ]


def samft_spans(trainer: Trainer) -> list[PhaseSpan]:
    """The phases of samft's step, which computes decoder gradients together with its losses."""
    prompt_encoder = trainer.model.sam.prompt_encoder
    return [
        (trainer.model, "embed", "encoder"),
        (prompt_encoder, "forward", "decoder + loss"),
        (prompt_encoder, "get_dense_pe", "decoder + loss"),
        (BoxDecoder, "sum_losses", "decoder + loss"),
        *_update_spans(trainer.optimizer),
    ]


def _update_spans(optimizer: torch.optim.Optimizer) -> list[PhaseSpan]:
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
        windows=batch.windows,
        gradient=weight,
    )
    return total * weight


def take_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Runs backward; returns the gradients by parameter name in SAM, and clears them."""
    loss.backward()
    names = ((name.removeprefix("sam."), p) for name, p in model.named_parameters())
    gradients = {name: p.grad for name, p in names if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return gradients


@exact_float32()
def assert_equal(variants: Variants, *, start: str, exact: bool = True) -> tuple[float, float]:
    """Checks that samft in float32 equals the baseline, without TF32 on a GPU.

    Args:
        variants: Those of the workload to compare.
        start: `images`: both encode them; `cached`: only the baseline does; `embeddings`: neither.
        exact: Whether to compare the baseline's own loss, or samft's default loss, with its plain
            form (`plain_losses`) on the stock decoder's masks.

    Returns:
        Relative difference of the losses, and the largest relative difference of a gradient.

    Raises:
        AssertionError: Weights, loss or gradients differ.
    """
    baseline, trainer = variants.baseline, variants.samft
    _assert_equal_weights(baseline.sam, trainer.model.sam)
    if not exact:
        loss = _plain_loss(variants, start=start)
    elif start == "embeddings":
        loss = baseline.decoder_loss(variants.embeddings, variants.samples)
    else:
        loss = baseline.loss(variants.samples)
    expected, gradients = loss.item(), take_gradients(baseline.sam, loss)
    embeddings = None if start == "images" else variants.embeddings
    loss = samft_loss(trainer, variants.synthetic.batch(exact=exact, embeddings=embeddings))
    loss_difference = abs(loss.item() - expected) / abs(expected)
    assert loss_difference <= LOSS_TOLERANCE, (
        f"the losses differ by {loss_difference:.1e} of {expected:.6f}"
    )
    worst = gradient_difference(take_gradients(trainer.model, loss), gradients)
    assert worst[0] <= GRADIENT_TOLERANCE, f"the gradients of {worst[1]} differ by {worst[0]:.1e}"
    return loss_difference, worst[0]


def _plain_loss(variants: Variants, *, start: str) -> Tensor:
    # The mean of `plain_losses` over all masks of the batch, decoded by the stock modules.
    baseline, batch = variants.baseline, variants.synthetic.batch(exact=False)
    embeddings = variants.embeddings
    if start != "embeddings":
        embeddings = baseline.encode(torch.stack([sample.image for sample in variants.samples]))
    totals = []
    for i, embedding in enumerate(embeddings):
        own = batch.image_index == i
        mask_logits, iou_predicted = baseline.decode(embedding[None], batch.boxes[own])
        losses = plain_losses(
            mask_logits[:, 0],
            iou_predicted[:, 0],
            targets=batch.targets[own],
            windows=batch.windows[own],
            image_index=batch.image_index[own],
            input_sizes=batch.input_sizes,
            focal_weight=FOCAL_WEIGHT,
        )
        totals.append(losses.total)
    return torch.cat(totals).mean()


def _assert_equal_weights(baseline: nn.Module, model: nn.Module) -> None:
    expected, actual = baseline.state_dict(), model.state_dict()
    assert expected.keys() == actual.keys(), "the models have different tensors"
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), f"the weights {name} differ"


def gradient_difference(
    gradients: dict[str, Tensor], expected: dict[str, Tensor]
) -> tuple[float, str]:
    """The largest relative difference of a gradient, and the name of its parameter.

    A gradient that is missing in one of the two counts as zero there.
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
        difference = (one - other).norm().item() / max(one.norm().item(), least, 1e-30)
        worst = max(worst, (difference, name))
    return worst
