"""Losses in closed form, windows, padding, and one denominator for all ranks."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.parallel import DistributedDataParallel

from benchmarks.baseline import plain_losses
from helpers.gloo_pool import GlooPool
from samft.distributed import all_reduce_sum, get_rank, get_world_size
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.models.trainable import freeze
from samft.training import losses as losses_module
from samft.training.losses import MaskLosses, mask_losses

S = 64  # the model frame; logits are 16 x 16
LOW = S // 4
PIXELS = LOW * LOW
AREA = 5 * 8
WHOLE_FRAME = [0.0, 0.0, S, S]  # a window of 16 x 16 cells, the decoder's own


def truth() -> Tensor:
    target = torch.zeros(1, LOW, LOW)
    target[:, 2:7, 4:12] = 1
    return target


def losses_of(mask_logits: Tensor, target: Tensor, **changes: Any) -> MaskLosses:
    count = len(mask_logits)
    arguments: dict[str, Any] = {
        "targets": (target * 255).round().to(torch.uint8).expand(count, -1, -1),
        "windows": torch.tensor([WHOLE_FRAME]).expand(count, -1),
        "image_index": torch.zeros(count, dtype=torch.int64),
        "input_sizes": torch.tensor([[S, S]]),
        **changes,
    }
    iou_predicted = arguments.pop("iou_predicted", torch.zeros(count))
    return mask_losses(mask_logits, iou_predicted, **arguments)


def approx(value: float, **tolerance: float) -> Any:
    return pytest.approx(value, **{"rel": 1e-5, "abs": 1e-6, **tolerance})


@pytest.mark.parametrize("size", [20.0, 1e4])
def test_a_perfect_mask(size: float) -> None:
    losses = losses_of(size * (2 * truth() - 1), truth())
    assert losses.focal.item() == approx(0)
    assert losses.dice.item() == approx(0)
    assert losses.iou_actual.item() == 1


@pytest.mark.parametrize("size", [20.0, 1e4])
def test_an_empty_mask(size: float) -> None:
    losses = losses_of(torch.full((1, LOW, LOW), -size), truth())
    assert losses.focal.item() == approx(0.25 * size * AREA / PIXELS)
    assert losses.dice.item() == approx(1 - 1 / (AREA + 1))
    assert losses.iou_actual.item() == 0


@pytest.mark.parametrize("size", [20.0, 1e4])
def test_an_inverted_mask(size: float) -> None:
    losses = losses_of(size * (1 - 2 * truth()), truth())
    expected = size * (0.25 * AREA + 0.75 * (PIXELS - AREA)) / PIXELS
    assert losses.focal.item() == approx(expected)
    assert losses.dice.item() == approx(1 - 1 / (PIXELS + 1))
    assert losses.iou_actual.item() == 0


def test_an_undecided_mask() -> None:
    losses = losses_of(torch.zeros(1, LOW, LOW), truth())
    alpha = (0.25 * AREA + 0.75 * (PIXELS - AREA)) / PIXELS
    assert losses.focal.item() == approx(alpha * 0.5**2 * math.log(2))
    assert losses.dice.item() == approx(1 - (AREA + 1) / ((PIXELS / 2 + AREA) + 1))
    assert losses.iou_actual.item() == 0  # a logit of 0 is not above the threshold


def test_a_mask_of_half_the_object() -> None:
    logits = torch.full((1, LOW, LOW), -1e4)
    logits[:, 2:7, 4:8] = 1e4
    losses = losses_of(logits, truth())
    assert losses.dice.item() == approx(1 - (AREA + 1) / (1.5 * AREA + 1))
    assert losses.iou_actual.item() == 0.5


def test_an_empty_mask_of_an_empty_target() -> None:
    losses = losses_of(torch.full((1, LOW, LOW), -1e4), torch.zeros(1, LOW, LOW))
    assert (losses.focal.item(), losses.dice.item(), losses.iou_actual.item()) == (0, 0, 1)


def test_soft_targets() -> None:
    share = 51 / 255
    target = torch.full((1, LOW, LOW), share)
    undecided = losses_of(torch.zeros(1, LOW, LOW), target)
    # p_t is 1/2 whatever the target; alpha_t is mixed by the share.
    alpha = 0.25 * share + 0.75 * (1 - share)
    assert undecided.focal.item() == approx(alpha * 0.25 * math.log(2))
    assert undecided.dice.item() == approx(1 - (PIXELS * share + 1) / (PIXELS * (0.5 + share) + 1))
    logit = 1.5
    p = 1 / (1 + math.exp(-logit))
    decided = losses_of(torch.full((1, LOW, LOW), logit), target)
    entropy = -(share * math.log(p) + (1 - share) * math.log(1 - p))
    missed = 1 - (p * share + (1 - p) * (1 - share))
    assert decided.focal.item() == approx(alpha * missed**2 * entropy)


def test_the_iou_of_soft_targets_counts_cells_at_least_half_full() -> None:
    target = torch.zeros(1, LOW, LOW)
    target[0, 0, :4] = torch.tensor([255, 128, 127, 1]) / 255
    logits = torch.full((1, LOW, LOW), -1.0)
    logits[0, 0, :2] = 1
    assert losses_of(logits, target).iou_actual.item() == 1


def test_an_object_smaller_than_half_a_cell_counts_as_the_cells_it_fills_most() -> None:
    target = torch.zeros(1, LOW, LOW)
    target[0, 0, :3] = torch.tensor([60, 60, 20]) / 255
    logits = torch.full((1, LOW, LOW), -1.0)
    logits[0, 0, :2] = 1
    assert losses_of(logits, target).iou_actual.item() == 1
    logits[0, 0, 2] = 1
    assert losses_of(logits, target).iou_actual.item() == approx(2 / 3)


def test_the_iou_loss_is_the_squared_error_of_the_prediction() -> None:
    logits = torch.full((1, LOW, LOW), -1e4)
    logits[:, 2:7, 4:8] = 1e4
    predicted = torch.tensor([0.8], requires_grad=True)
    losses = losses_of(logits, truth(), iou_predicted=predicted)
    assert losses.iou.item() == approx(0.3**2)
    losses.iou.sum().backward()
    assert predicted.grad is not None and predicted.grad.item() == approx(2 * 0.3)
    assert not losses.iou_actual.requires_grad


def test_the_total_is_weighted() -> None:
    logits, predicted = torch.randn(3, LOW, LOW), torch.rand(3)
    losses = losses_of(logits, truth(), iou_predicted=predicted)
    torch.testing.assert_close(losses.total, 10 * losses.focal + losses.dice + losses.iou)
    other = losses_of(
        logits, truth(), iou_predicted=predicted, focal_weight=1, dice_weight=2, iou_weight=0
    )
    torch.testing.assert_close(other.total, losses.focal + 2 * losses.dice)


def test_each_mask_has_its_own_losses() -> None:
    logits = torch.randn(3, LOW, LOW)
    batched = losses_of(logits, truth())
    for number in range(3):
        alone = losses_of(logits[number : number + 1], truth())
        for name in ("total", "focal", "dice", "iou", "iou_actual"):
            expected = getattr(alone, name)[0]
            torch.testing.assert_close(getattr(batched, name)[number], expected)


@pytest.mark.parametrize("side", [LOW, S])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_gradients_of_huge_logits_are_finite(size: float, side: int) -> None:
    target = interpolate(truth()[None], (side, side))[0]
    logits = torch.full((1, LOW, LOW), size, requires_grad=True)
    predicted = torch.zeros(1, requires_grad=True)
    losses = losses_of(logits, target, iou_predicted=predicted)
    losses.total.sum().backward()
    assert torch.isfinite(losses.total).all()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert logits.grad.any()  # and has the right sign, however wrong the mask is
    wrong = target[:, :: side // LOW, :: side // LOW] == (size < 0)
    assert (logits.grad[wrong] * size >= 0).all()


@pytest.mark.parametrize("window", [WHOLE_FRAME, [12.0, 8.0, 60.0, 56.0]])
def test_logits_in_the_padding_change_nothing(window: list[float]) -> None:
    logits = torch.randn(2, LOW, LOW)
    # The image ends inside the cells of row 9 and column 11; a cell of the window beyond row 38 is
    # interpolated from the decoder's rows 9 and 10, but has no area.
    changes = {
        "input_sizes": torch.tensor([[38, 46]]),
        "targets": torch.zeros(2, 24, 24, dtype=torch.uint8),
        "windows": torch.tensor([window] * 2),
    }
    changes["targets"][:, :6, :6] = 255
    changed = logits.clone()
    first_row, first_column = 11, 13
    changed[:, first_row:] = 50
    changed[:, :, first_column:] = 50
    changed.requires_grad_()
    before = losses_of(logits, truth(), **changes)
    after = losses_of(changed, truth(), **changes)
    for name in ("total", "focal", "dice", "iou", "iou_actual"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    after.total.sum().backward()
    assert changed.grad is not None
    assert not changed.grad[:, first_row:].any() and not changed.grad[:, :, first_column:].any()
    assert changed.grad[:, : first_row - 1, : first_column - 1].all()


def test_the_mean_is_over_the_image_not_the_padding() -> None:
    logits, target = torch.zeros(1, LOW, LOW), torch.zeros(1, LOW, LOW)
    losses = losses_of(logits, target, input_sizes=torch.tensor([[38, 46]]))
    assert losses.focal.item() == approx(0.75 * 0.25 * math.log(2))
    assert losses.dice.item() == approx(1 - 16 / (0.5 * 38 * 46 + 16))
    one_wrong = logits.clone()
    one_wrong[0, 0, 0] = 1e4
    more = losses_of(one_wrong, target, input_sizes=torch.tensor([[38, 46]]))
    added = 0.75 * (1e4 - 0.25 * math.log(2)) / (38 * 46 / 16)
    assert (more.focal - losses.focal).item() == approx(added)


def test_the_padding_of_each_mask_is_that_of_its_own_image() -> None:
    sizes, index = torch.tensor([[S, S], [24, S]]), torch.tensor([1, 0, 1])
    logits = torch.randn(3, LOW, LOW)
    batched = losses_of(logits, truth(), image_index=index, input_sizes=sizes)
    for number, image in enumerate(index.tolist()):
        alone = losses_of(
            logits[number : number + 1], truth(), input_sizes=sizes[image : image + 1]
        )
        torch.testing.assert_close(batched.total[number], alone.total[0])


WINDOWS = [
    [10.0, 6.5, 34.0, 26.0],
    [-9.0, 20.0, 15.0, 70.0],  # beyond the image on three sides
    WHOLE_FRAME,
    [30.0, 30.0, 34.5, 34.0],  # smaller than two cells of the decoder
    [-80.0, -80.0, 200.0, 200.0],
]


@pytest.mark.parametrize("cells", [LOW, 24, S])
@pytest.mark.parametrize("at_once", [1, 2 * S * S, 2**20])
def test_losses_and_gradients_equal_autograds(
    cells: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses_module.CELLS_AT_ONCE, "cpu", at_once)
    places = {
        "targets": torch.randint(0, 256, (5, cells, cells)).to(torch.uint8),
        "windows": torch.tensor(WINDOWS),
        "image_index": torch.tensor([2, 0, 1, 0, 0]),
        "input_sizes": torch.tensor([[38, S], [S, S], [S, 46]]),
    }
    places["targets"][2] = 0
    results: list[tuple[MaskLosses, Tensor, Tensor]] = []
    start, predicted = 4 * torch.randn(5, LOW, LOW), torch.rand(5)
    for function in (mask_losses, plain_losses):
        logits, iou = start.clone().requires_grad_(), predicted.clone().requires_grad_()
        losses = function(logits, iou, **places, focal_weight=7.0)
        (losses.total * torch.arange(1, 6)).sum().backward()
        assert logits.grad is not None and iou.grad is not None
        results.append((losses, logits.grad, iou.grad))
    (closed, gradient, iou_gradient), (plain, plain_gradient, plain_iou_gradient) = results
    for loss, plain_loss in zip(closed, plain, strict=True):
        torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    scale = plain_gradient.abs().max().item()
    torch.testing.assert_close(gradient, plain_gradient, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(iou_gradient, plain_iou_gradient)


def test_gradients_in_float64_are_those_of_finite_differences() -> None:
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    windows = torch.tensor([[1.0, 2.0, 9.0, 14.0], [-3.0, 0.0, 5.0, 6.0]], dtype=torch.float64)
    extents = torch.tensor([[12.0, 9.0], [10.0, 12.0]], dtype=torch.float64)
    targets = torch.randint(0, 256, (2, 5, 5)).to(torch.uint8)

    def sums(values: Tensor) -> tuple[Tensor, ...]:
        return losses_module.mask_sums(values, targets, windows, extents)[:3]

    assert torch.autograd.gradcheck(sums, logits)


@pytest.mark.parametrize("window", WINDOWS)
def test_window_and_surroundings_cover_the_image_once(window: list[float]) -> None:
    extents = torch.tensor([[38.0, 46.0]])
    targets = torch.zeros(1, 24, 24, dtype=torch.uint8)
    sums = losses_module.mask_sums(
        torch.full((1, LOW, LOW), 1e4), targets, torch.tensor([window]), extents
    )
    assert sums.area.item() == approx(38 * 46)
    assert sums.union.item() == approx(38 * 46)
    assert sums.overlap.item() == sums.target_area.item() == sums.intersection.item() == 0


def test_logits_are_interpolated_at_the_centres_of_the_window_s_cells() -> None:
    # Logits that rise by 1 a cell of 4 px, 0 at x = 31 px: masks begin there, wherever the window.
    ramp = (torch.arange(LOW) - 7.25).expand(1, LOW, LOW)
    for x0, x1 in ((20.0, 44.0), (27.0, 33.0), (12.5, 36.5)):
        window = torch.tensor([[x0, 8.0, x1, 56.0]])
        targets = torch.zeros(1, 48, 48, dtype=torch.uint8)
        cell = (x1 - x0) / 48
        centres = x0 + cell * (torch.arange(48) + 0.5)
        targets[:, :, centres > 31] = 255
        sums = losses_module.mask_sums(ramp, targets, window, torch.tensor([[float(S), S]]))
        assert sums.intersection.item() == approx(48 * cell * (centres > 31).sum().item())
        expected = 48 * cell * ((centres - 31) / 4).sigmoid()[centres > 31].sum()
        assert sums.overlap.item() == approx(expected.item())


@pytest.mark.parametrize("side", [LOW, S])
def test_saved_bytes_do_not_grow_with_the_resolution(side: int) -> None:
    logits = torch.randn(6, LOW, LOW, requires_grad=True)
    targets = torch.ones(6, side, side, dtype=torch.uint8)  # G = 16 and 64
    saved: dict[int, int] = {}

    def record_saved(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = 0 if tensor.dtype == torch.uint8 else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record_saved, lambda tensor: tensor):
        losses_of(logits, truth(), targets=targets)
    assert logits.nbytes <= sum(saved.values()) < 2 * logits.nbytes


def test_losses_are_float32_under_autocast() -> None:
    logits, predicted = torch.randn(2, LOW, LOW) * 3, torch.rand(2)
    plain = losses_of(logits, truth(), iou_predicted=predicted)
    for side in (LOW, S):
        changes = {"targets": torch.ones(2, side, side, dtype=torch.uint8)}
        expected = losses_of(logits, truth(), iou_predicted=predicted, **changes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = losses_of(logits, truth(), iou_predicted=predicted, **changes)
        for name in ("total", "focal", "dice", "iou", "iou_actual"):
            assert getattr(cast, name).dtype == torch.float32
            assert torch.equal(getattr(cast, name), getattr(expected, name))
    halves = losses_of(logits.bfloat16(), truth(), iou_predicted=predicted.bfloat16())
    assert halves.total.dtype == torch.float32
    torch.testing.assert_close(halves.total, plain.total, rtol=0.02, atol=0.02)


def test_without_masks_the_loss_is_zero() -> None:
    losses = losses_of(torch.zeros(0, LOW, LOW), truth())
    assert losses.total.shape == (0,) and losses.total.sum().item() == 0


# One step over three images with 3, 1 and 2 masks: rank 0 has the first, rank 1 the others.
IMAGES_OF_RANK = ([0], [1, 2])
NUM_MASKS = (3, 1, 2)


def step_gradients(model: torch.nn.Module, images: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    pictures = torch.randint(0, 256, (3, 3, S, S), dtype=torch.uint8, generator=generator)
    index = torch.arange(3).repeat_interleave(torch.tensor(NUM_MASKS))
    boxes = torch.tensor([[4.0, 8.0, 30.0, 40.0]]) + torch.arange(6)[:, None]
    targets = torch.randint(0, 256, (6, LOW, LOW), dtype=torch.uint8, generator=generator)
    windows = boxes + torch.tensor([-6.0, -8.0, 6.0, 8.0])
    of_rank = torch.isin(index, torch.tensor(images))
    sizes = torch.tensor([[S, S], [40, S], [S, 36]])[images]
    local = torch.searchsorted(torch.tensor(images), index[of_rank])
    logits, iou = model(pictures[images], boxes[of_rank], local, input_sizes=sizes)
    losses = mask_losses(
        logits,
        iou,
        targets=targets[of_rank],
        windows=windows[of_rank],
        image_index=local,
        input_sizes=sizes,
    )
    num_masks = all_reduce_sum(torch.tensor([float(of_rank.sum())])).item()
    (losses.total.sum() * get_world_size() / num_masks).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def prompted_model() -> PromptedSam:
    torch.manual_seed(4)
    model = PromptedSam(build_sam("vit_tiny", S))
    freeze(model.sam, [])
    return model


def gradients_of_rank() -> dict[str, Tensor]:
    wrapped = DistributedDataParallel(prompted_model())
    gradients = step_gradients(wrapped, IMAGES_OF_RANK[get_rank()])
    return {name.removeprefix("module."): grad.clone() for name, grad in gradients.items()}


def test_two_ranks_have_the_gradients_of_one_process(gloo2: GlooPool) -> None:
    model = prompted_model()
    alone = step_gradients(copy.deepcopy(model), [0, 1, 2])
    assert set(alone) == {n for n, p in model.named_parameters() if p.requires_grad}
    for batched in gloo2.run(gradients_of_rank):
        assert set(batched) == set(alone)
        for name, gradient in alone.items():
            # Some gradients are 0 but for rounding (a bias of keys cancels in the softmax).
            tolerance = 1e-7 + 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(batched[name], gradient, atol=tolerance, rtol=1e-4)
    assert sum(gradient.abs().max() > 1e-3 for gradient in alone.values()) > 100
