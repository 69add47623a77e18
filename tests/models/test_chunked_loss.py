"""Chunked losses and gradients equal those of all boxes at once, in bounded memory."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.saved_bytes import SavedBytes
from samft.models.chunked_loss import BYTES_PER_VALUE, LossInputs, auto_mask_chunk
from samft.models.prompted_sam import PromptedSam
from samft.models.prompts import Prompts
from samft.models.sam import build_sam
from samft.models.trainable import freeze
from samft.training.losses import MaskLosses, mask_losses

S = 64
LOSS = mask_losses
INDEX = torch.tensor([2, 0, 0, 2, 0])  # no box in image 1, and not image by image
SIZES = torch.tensor([[S, S], [S, S], [40, S]])


@pytest.fixture(scope="module")
def start() -> PromptedSam:
    torch.manual_seed(2)
    model = PromptedSam(build_sam("vit_tiny", S))
    freeze(model.sam, [])
    return model


def boxes_and_targets(count: int, side: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(count, 2, 2, generator=generator) * S
    targets = torch.randint(0, 2, (count, side, side), dtype=torch.uint8, generator=generator)
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    windows = boxes + torch.tensor([-8.0, -8.0, 8.0, 8.0])
    return boxes, {"targets": 255 * targets, "windows": windows}


LossesAndGradients = tuple[MaskLosses, dict[str, Tensor]]


def run_step(
    start: PromptedSam, *, index: Tensor = INDEX, side: int = S // 4, **options: Any
) -> LossesAndGradients:
    """The losses of one step, and the gradients of half their sum."""
    model = copy.deepcopy(start)
    model.mask_chunk = options.get("mask_chunk", 64)
    model.decoder = options.get("decoder", "fast")
    generator = torch.Generator().manual_seed(4)
    num_images = options.get("num_images", 3)
    images = torch.randint(0, 256, (num_images, 3, S, S), dtype=torch.uint8, generator=generator)
    sizes = SIZES[:num_images]
    boxes, targets = boxes_and_targets(len(index), side)
    if options.get("in_chunks", True):
        total, values = model(
            images,
            boxes,
            index,
            input_sizes=sizes,
            loss=LOSS,
            **targets,
            gradient=options.get("gradient"),
        )
        losses = MaskLosses(*values)
        assert not any(value.requires_grad for value in values)
    else:
        logits, iou = model(images, boxes, index, input_sizes=sizes)
        losses = LOSS(logits, iou, **targets, image_index=index, input_sizes=sizes)
        total = losses.total.sum()
    torch.testing.assert_close(total, losses.total.sum())
    (total * 0.5).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: LossesAndGradients, expected: LossesAndGradients) -> None:
    (losses, gradients), (expected_losses, expected_gradients) = actual, expected
    for loss, expected_loss in zip(losses, expected_losses, strict=True):
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert set(gradients) == set(expected_gradients)
    for name, gradient in expected_gradients.items():
        # Some gradients are 0 but for rounding (a bias of keys cancels in the softmax).
        tolerance = 1e-6 + 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=tolerance)


@pytest.mark.parametrize("decoder", ["fast", "stock"])
@pytest.mark.parametrize("mask_chunk", [1, 3, 64])
@pytest.mark.parametrize("side", [S // 4, S])
def test_losses_and_gradients_equal_those_of_all_boxes_at_once(
    start: PromptedSam, decoder: str, mask_chunk: int, side: int
) -> None:
    expected = run_step(start, in_chunks=False, decoder="stock", side=side)
    assert sum(gradient.abs().max() > 1e-4 for gradient in expected[1].values()) > 100
    assert_same(run_step(start, decoder=decoder, mask_chunk=mask_chunk, side=side), expected)


@pytest.mark.parametrize("decoder", ["fast", "stock"])
@pytest.mark.parametrize("mask_chunk", [1, 3, 64])
def test_boxes_of_the_only_image_have_the_losses_that_they_have_beside_others(
    start: PromptedSam, decoder: str, mask_chunk: int
) -> None:
    index = torch.zeros_like(INDEX)
    beside_others = run_step(start, index=index, in_chunks=False, decoder="stock")
    alone = run_step(start, index=index, num_images=1, decoder=decoder, mask_chunk=mask_chunk)
    assert_same(alone, beside_others)


@pytest.mark.parametrize("mask_chunk", [2, 64])
@pytest.mark.parametrize("decoder", ["fast", "stock"])
def test_losses_of_points_and_masks_equal_those_of_all_at_once(
    start: PromptedSam, decoder: str, mask_chunk: int
) -> None:
    model = copy.deepcopy(start)
    model.decoder = decoder
    generator = torch.Generator().manual_seed(8)
    embeddings = torch.randn(3, 128, 4, 4, generator=generator).requires_grad_()
    points = torch.rand(5, 2, 2, generator=generator) * S
    masks = 5 * torch.randn(5, S // 4, S // 4, generator=generator)
    prompts = Prompts(points=points, labels=torch.tensor([[1, 0]] * 5), masks=masks)
    _, targets = boxes_and_targets(5, S // 4)
    loss_inputs = LossInputs(targets["targets"], targets["windows"], INDEX, SIZES)
    logits, iou = model.decode(embeddings, prompts, INDEX)
    expected = LOSS(logits, iou, **loss_inputs._asdict()).total
    total, values = model._box_decoder(INDEX, mask_chunk).sum_losses(
        model._decoder_inputs(embeddings, prompts),
        loss=LOSS,
        loss_inputs=loss_inputs,
        gradient=torch.ones(()),
    )
    torch.testing.assert_close(values[0], expected.detach())
    parameters = [embeddings, *(p for p in model.parameters() if p.requires_grad)]
    pairs = zip(
        *(torch.autograd.grad(t, parameters, allow_unused=True) for t in (expected.sum(), total)),
        strict=True,
    )
    compared = [(one, other) for one, other in pairs if one is not None]
    assert len(compared) > 80
    for one, other in compared:
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6 + 1e-4 * one.abs().max().item())


class OperationNames(TorchDispatchMode):
    """Notes the names of all operations, of backward as well."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_images", [1, 3])
def test_gradients_of_an_image_are_added_up_in_a_fixed_order(
    start: PromptedSam, num_images: int
) -> None:
    index = INDEX if num_images == 3 else torch.zeros_like(INDEX)
    with OperationNames() as operations:
        run_step(start, index=index, num_images=num_images, mask_chunk=2)
    # On a GPU these add by atomics, in whatever order threads arrive.
    assert not operations.names & {"index_add", "index_add_", "scatter_add", "scatter_add_"}
    # One image is read where it lies; of several, each box needs a copy of its own.
    assert ("index_select" in operations.names) == (num_images > 1)


def test_the_expected_gradient_makes_no_difference(start: PromptedSam) -> None:
    expected = run_step(start, mask_chunk=2)
    assert_same(run_step(start, mask_chunk=2, gradient=torch.tensor(96.0)), expected)


@pytest.mark.parametrize("num_images", [1, 3])
def test_without_boxes_every_trainable_parameter_gets_a_zero_gradient(
    start: PromptedSam, num_images: int
) -> None:
    losses, gradients = run_step(start, index=INDEX[:0], num_images=num_images)
    assert losses.total.shape == (0,)
    # DistributedDataParallel waits for every parameter, also on a rank without objects.
    assert set(gradients) == {n for n, p in start.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("frozen", ["image_encoder", "prompt_encoder", "mask_decoder"])
def test_frozen_parts_get_no_gradient(start: PromptedSam, frozen: str) -> None:
    model = copy.deepcopy(start)
    freeze(model.sam, [frozen])
    _, all_gradients = run_step(start, mask_chunk=2)
    _, gradients = run_step(model, mask_chunk=2)
    assert set(gradients) == {n for n in all_gradients if not n.startswith(f"sam.{frozen}.")}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, all_gradients[name])


def test_a_second_backward_is_refused(start: PromptedSam) -> None:
    boxes, targets = boxes_and_targets(1, S // 4)
    total, _ = start(
        torch.zeros(3, 3, S, S), boxes, INDEX[:1], input_sizes=SIZES, loss=LOSS, **targets
    )
    total.backward(retain_graph=True)
    start.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="backward before"):
        total.backward()


def test_small_gradients_survive_float16_if_they_are_expected(start: PromptedSam) -> None:
    weight, scale = 1e-8, 2.0**20  # a gradient far below what float16 can hold, and a scaler's
    gradients = {}
    boxes, targets = boxes_and_targets(5, S // 4)
    for expected in (None, weight, weight * scale):
        model = copy.deepcopy(start)
        embeddings = torch.randn(3, 128, 4, 4, generator=torch.Generator().manual_seed(1))
        inputs = embeddings.requires_grad_()
        model.embed = lambda *_, inputs=inputs, **__: inputs  # type: ignore[method-assign]
        gradient = None if expected is None else torch.tensor(expected)
        with torch.autocast("cpu", torch.float16, enabled=expected is not None):
            total, _ = model(
                torch.zeros(3, 3, S, S),
                boxes,
                INDEX,
                input_sizes=SIZES,
                loss=LOSS,
                **targets,
                gradient=gradient,
            )
        (total * weight * scale).backward()
        assert inputs.grad is not None
        gradients[expected] = inputs.grad
    exact = gradients[None]
    assert (gradients[weight * scale] - exact).norm() < 0.05 * exact.norm()
    assert (gradients[weight] - exact).norm() > 0.5 * exact.norm()


def peak_saved_bytes(
    model: PromptedSam, num_boxes: int, side: int, *, with_loss: bool = True
) -> int:
    """The most bytes that are saved for backward at a time, beside parameters."""
    boxes, targets = boxes_and_targets(num_boxes, side)
    index = torch.zeros(num_boxes, dtype=torch.int64)
    images = torch.zeros(1, 3, S, S)
    shape = (1, 128, 4, 4)
    model.embed = lambda *_, **__: torch.zeros(shape, requires_grad=True)  # type: ignore[method-assign]
    extra: dict[str, Any] = {"loss": LOSS, **targets} if with_loss else {}
    own = [*model.parameters(), *targets.values()]
    with SavedBytes(beside=own).watch() as saved_bytes:
        total, _ = model(images, boxes, index, input_sizes=torch.tensor([[S, S]]), **extra)
        total.sum().backward()
    return saved_bytes.peak


@pytest.mark.parametrize("decoder", ["fast", "stock"])
def test_saved_bytes_do_not_grow_with_boxes_beyond_the_chunk(
    start: PromptedSam, decoder: str
) -> None:
    model = copy.deepcopy(start)
    model.decoder, model.mask_chunk = decoder, 4
    few, many = (peak_saved_bytes(model, count, S // 4) for count in (8, 64))
    assert many < 1.25 * few
    # Without a loss all masks are in memory, but not what they were computed from.
    masks_only = peak_saved_bytes(model, 64, S // 4, with_loss=False)
    model.mask_chunk = 64
    assert peak_saved_bytes(model, 64, S // 4) > 3 * many
    assert peak_saved_bytes(model, 64, S // 4, with_loss=False) > 10 * masks_only


def test_saved_bytes_do_not_grow_with_the_resolution_of_the_loss(start: PromptedSam) -> None:
    model = copy.deepcopy(start)
    model.mask_chunk = 4
    assert peak_saved_bytes(model, 8, S) < 1.1 * peak_saved_bytes(model, 8, S // 4)


def test_a_chunk_is_as_large_as_a_quarter_of_the_free_memory() -> None:
    at_1024 = 4096 * 256
    box = BYTES_PER_VALUE * at_1024
    assert auto_mask_chunk(at_1024, "cuda", free_memory=4 * 10 * box) == 10
    assert auto_mask_chunk(at_1024, "cuda", free_memory=80e9) == 64
    assert auto_mask_chunk(at_1024, "cuda", free_memory=0) == 1
    assert auto_mask_chunk(at_1024, "cpu", free_memory=float("inf")) == 4
    assert auto_mask_chunk(at_1024 // 4, "cpu", free_memory=float("inf")) == 16
    assert auto_mask_chunk(at_1024 // 256, "cpu", free_memory=float("inf")) == 64
