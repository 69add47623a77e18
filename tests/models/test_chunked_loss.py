"""Losses and their gradients, a chunk of boxes at a time: the same sums in bounded memory."""

import copy
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from samft.models.chunked_loss import BYTES_PER_VALUE, auto_mask_chunk
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam, freeze
from samft.training.losses import MaskLosses, mask_losses

S = 64
LOSS = partial(mask_losses, image_size=S)
INDEX = torch.tensor([2, 0, 0, 2, 0])  # no box in image 1, and not image by image
SIZES = torch.tensor([[S, S], [S, S], [40, S]])


@pytest.fixture(scope="module")
def start() -> PromptedSam:
    torch.manual_seed(2)
    model = PromptedSam(build_sam("vit_tiny", S))
    freeze(model.sam, [])
    return model


def boxes_and_targets(count: int, side: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(count, 2, 2, generator=generator) * S
    targets = torch.randint(0, 2, (count, side, side), dtype=torch.uint8, generator=generator)
    return torch.cat([corners.amin(1), corners.amax(1)], 1), targets * (255 if side < S else 1)


Found = tuple[MaskLosses, dict[str, Tensor]]


def step(start: PromptedSam, *, index: Tensor = INDEX, side: int = S // 4, **options: Any) -> Found:
    """The losses of one step, and the gradients of half their sum."""
    model = copy.deepcopy(start)
    model.mask_chunk = options.get("mask_chunk", 64)
    model.decoder = options.get("decoder", "fast")
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (3, 3, S, S), dtype=torch.uint8, generator=generator)
    boxes, targets = boxes_and_targets(len(index), side)
    if options.get("in_chunks", True):
        total, values = model(
            images,
            boxes,
            index,
            input_sizes=SIZES,
            loss=LOSS,
            targets=targets,
            gradient=options.get("gradient"),
        )
        losses = MaskLosses(*values)
        assert not any(value.requires_grad for value in values)
    else:
        logits, iou = model(images, boxes, index, input_sizes=SIZES)
        losses = LOSS(logits, iou, targets=targets, image_index=index, input_sizes=SIZES)
        total = losses.total.sum()
    torch.testing.assert_close(total, losses.total.sum())
    (total * 0.5).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Found, expected: Found) -> None:
    for mine, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert set(found[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        # Some gradients are 0 but for rounding (a bias of keys cancels in the softmax).
        tolerance = 1e-6 + 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=tolerance)


@pytest.mark.parametrize("decoder", ["fast", "stock"])
@pytest.mark.parametrize("mask_chunk", [1, 3, 64])
@pytest.mark.parametrize("side", [S // 4, S])
def test_the_same_losses_and_gradients_as_all_at_once(
    start: PromptedSam, decoder: str, mask_chunk: int, side: int
) -> None:
    expected = step(start, in_chunks=False, decoder="stock", side=side)
    assert sum(gradient.abs().max() > 1e-4 for gradient in expected[1].values()) > 100
    assert_same(step(start, decoder=decoder, mask_chunk=mask_chunk, side=side), expected)


def test_the_foreseen_gradient_makes_no_difference(start: PromptedSam) -> None:
    expected = step(start, mask_chunk=2)
    assert_same(step(start, mask_chunk=2, gradient=torch.tensor(96.0)), expected)


def test_no_boxes_give_zeros_to_all_that_boxes_reach(start: PromptedSam) -> None:
    losses, gradients = step(start, index=INDEX[:0])
    assert losses.total.shape == (0,)
    # DistributedDataParallel waits for every parameter, on a rank without objects, too.
    assert set(gradients) == {n for n, p in start.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("frozen", ["image_encoder", "prompt_encoder", "mask_decoder"])
def test_frozen_parts_get_no_gradient(start: PromptedSam, frozen: str) -> None:
    model = copy.deepcopy(start)
    freeze(model.sam, [frozen])
    _, every = step(start, mask_chunk=2)
    losses, gradients = step(model, mask_chunk=2)
    assert set(gradients) == {n for n in every if not n.startswith(f"sam.{frozen}.")}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, every[name])


def test_backward_runs_once(start: PromptedSam) -> None:
    boxes, targets = boxes_and_targets(1, S // 4)
    total, _ = start(
        torch.zeros(3, 3, S, S), boxes, INDEX[:1], input_sizes=SIZES, loss=LOSS, targets=targets
    )
    total.backward(retain_graph=True)
    start.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="backward before"):
        total.backward()


def test_small_gradients_survive_float16_where_they_are_foreseen(start: PromptedSam) -> None:
    weight, scale = 1e-8, 2.0**20  # a gradient far below what float16 can hold, and a scaler's
    found = {}
    boxes, targets = boxes_and_targets(5, S // 4)
    for foreseen in (None, weight, weight * scale):
        model = copy.deepcopy(start)
        embeddings = torch.randn(3, 128, 4, 4, generator=torch.Generator().manual_seed(1))
        inputs = embeddings.requires_grad_()
        model.embed = lambda *_, inputs=inputs, **__: inputs  # type: ignore[method-assign]
        gradient = None if foreseen is None else torch.tensor(foreseen)
        with torch.autocast("cpu", torch.float16, enabled=foreseen is not None):
            total, _ = model(
                torch.zeros(3, 3, S, S),
                boxes,
                INDEX,
                input_sizes=SIZES,
                loss=LOSS,
                targets=targets,
                gradient=gradient,
            )
        (total * weight * scale).backward()
        assert inputs.grad is not None
        found[foreseen] = inputs.grad
    exact = found[None]
    assert (found[weight * scale] - exact).norm() < 0.05 * exact.norm()
    assert (found[weight] - exact).norm() > 0.5 * exact.norm()


class Ledger:
    """How many bytes of tensors kept for backward are held at a time."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[int, int]] = {}  # place: tensors that lie there, bytes
        self.peak = 0

    def enter(self, tensor: Tensor) -> "Held":
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        count, _ = self.held.get(place, (0, 0))
        self.held[place] = (count + 1, size)
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        held = Held(tensor)
        weakref.finalize(held, self.leave, place)
        return held

    def leave(self, place: int) -> None:
        count, size = self.held.pop(place)
        if count > 1:
            self.held[place] = (count - 1, size)


@dataclass(eq=False)
class Held:
    """A tensor kept for backward."""

    tensor: Tensor


def bytes_kept(model: PromptedSam, num_boxes: int, side: int, *, with_loss: bool = True) -> int:
    """The most bytes that are held for backward at a time, beside parameters."""
    boxes, targets = boxes_and_targets(num_boxes, side)
    index = torch.zeros(num_boxes, dtype=torch.int64)
    images = torch.zeros(1, 3, S, S)
    shape = (1, 128, 4, 4)
    model.embed = lambda *_, **__: torch.zeros(shape, requires_grad=True)  # type: ignore[method-assign]
    extra: dict[str, Any] = {"loss": LOSS, "targets": targets} if with_loss else {}
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), targets)}

    ledger = Ledger()

    def keep(tensor: Tensor) -> Tensor | Held:
        return tensor if tensor.untyped_storage().data_ptr() in own else ledger.enter(tensor)

    def give(kept: Tensor | Held) -> Tensor:
        return kept.tensor if isinstance(kept, Held) else kept

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        total, _ = model(images, boxes, index, input_sizes=torch.tensor([[S, S]]), **extra)
        total.sum().backward()
    return ledger.peak


@pytest.mark.parametrize("decoder", ["fast", "stock"])
def test_what_is_kept_does_not_grow_with_boxes_beyond_the_chunk(
    start: PromptedSam, decoder: str
) -> None:
    model = copy.deepcopy(start)
    model.decoder, model.mask_chunk = decoder, 4
    few, many = (bytes_kept(model, count, S // 4) for count in (8, 64))
    assert many < 1.25 * few
    # Without a loss the masks are all there, but not what they were made of.
    masks_only = bytes_kept(model, 64, S // 4, with_loss=False)
    model.mask_chunk = 64
    assert bytes_kept(model, 64, S // 4) > 3 * many
    assert bytes_kept(model, 64, S // 4, with_loss=False) > 10 * masks_only


def test_what_is_kept_does_not_grow_with_the_resolution_of_the_loss(start: PromptedSam) -> None:
    model = copy.deepcopy(start)
    model.mask_chunk = 4
    assert bytes_kept(model, 8, S) < 1.1 * bytes_kept(model, 8, S // 4)


def test_a_chunk_is_what_a_quarter_of_the_memory_holds() -> None:
    at_1024 = 4096 * 256
    box = BYTES_PER_VALUE * at_1024
    assert auto_mask_chunk(at_1024, "cuda", free_memory=4 * 10 * box) == 10
    assert auto_mask_chunk(at_1024, "cuda", free_memory=80e9) == 64
    assert auto_mask_chunk(at_1024, "cuda", free_memory=0) == 1
    assert auto_mask_chunk(at_1024, "cpu", free_memory=float("inf")) == 8
