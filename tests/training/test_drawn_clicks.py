"""Clicks against a plain loop over cells, and their distribution."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from samft.data.transforms import LOW_CELL
from samft.training import losses
from samft.training.clicks import TRUTH_SHARE, Clicks, first_clicks, next_clicks

S = 64  # the model frame; logits are 16 x 16
LOW = S // LOW_CELL
SIDE = 24  # cells of a window, along each side
SIZES = torch.tensor([[S, S], [37, S], [S, 21]])  # heights and widths of three images
UNIFORM = [0.99]  # a second draw that does not ask for a click anywhere in the object


def objects(count: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Windows that reach beyond their images, with targets of shares, some of them thin."""
    generator = torch.Generator().manual_seed(seed)
    image_index = torch.arange(count) % len(SIZES)
    extents = SIZES[image_index].float()
    centres = torch.rand(count, 2, generator=generator) * extents.flip(1)
    halves = 3 + 20 * torch.rand(count, 2, generator=generator)
    targets = torch.rand(count, 6, 6, generator=generator).repeat_interleave(4, 1)
    targets = (targets.repeat_interleave(4, 2) - 0.3).clamp(0, 1)
    targets[::5] *= 0.4  # covers no cell by half
    windows = torch.cat([centres - halves, centres + halves], 1)
    steps = (torch.arange(SIDE) + 0.5) / SIDE
    columns = windows[:, :1] + steps * (windows[:, 2:3] - windows[:, :1])
    rows = windows[:, 1:2] + steps * (windows[:, 3:] - windows[:, 1:2])
    rows_inside = (rows >= 0) & (rows < extents[:, :1])
    columns_inside = (columns >= 0) & (columns < extents[:, 1:])
    targets *= rows_inside[:, :, None] & columns_inside[:, None, :]  # the padding has no object
    return {
        "targets": (targets * 255).round().to(torch.uint8),
        "windows": windows,
        "image_index": image_index,
        "input_sizes": SIZES,
    }


def logits_of(count: int, *, seed: int = 1) -> Tensor:
    """Blobs of a few cells, positive in a third of the frame."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, 4, 4, generator=generator) - 0.4
    return interpolate(noise, size=(LOW, LOW), mode="bilinear")[:, 0]


Place = tuple[float, float, float, bool, bool]  # x, y, area, whether wrong, whether object


def places_of(logits: NDArray[Any], object_: dict[str, NDArray[Any]]) -> list[Place]:
    """Every place of one object where a click may be, in order, by a plain loop."""
    height, width = object_["input_sizes"].tolist()
    x0, y0, x1, y1 = object_["windows"].tolist()
    shares = object_["targets"] / 255
    threshold = min(max(shares.max(), 1e-6), 0.5)
    dx, dy = (x1 - x0) / SIDE, (y1 - y0) / SIDE

    def length(low: float, high: float, most: float) -> float:
        return max(0.0, min(high, most) - max(low, 0.0))

    def logit_at(x: float, y: float) -> float:
        rows, columns = (np.clip(at / LOW_CELL - 0.5, 0, LOW - 1) for at in (y, x))
        top, left = (min(int(at), LOW - 2) for at in (rows, columns))
        down, right = rows - top, columns - left
        upper = logits[top, left] * (1 - right) + logits[top, left + 1] * right
        lower = logits[top + 1, left] * (1 - right) + logits[top + 1, left + 1] * right
        return upper * (1 - down) + lower * down

    places: list[Place] = []
    for row in range(SIDE):
        for column in range(SIDE):
            x, y = x0 + (column + 0.5) * dx, y0 + (row + 0.5) * dy
            if 0 <= x < width and 0 <= y < height:
                area = length(x - dx / 2, x + dx / 2, width) * length(
                    y - dy / 2, y + dy / 2, height
                )
                is_object = shares[row, column] >= threshold
                places.append((x, y, area, (logit_at(x, y) > 0) != is_object, is_object))
    for row in range(LOW):
        for column in range(LOW):
            x, y = (column + 0.5) * LOW_CELL, (row + 0.5) * LOW_CELL
            if x < width and y < height and not (x0 <= x < x1 and y0 <= y < y1):
                left, top = column * LOW_CELL, row * LOW_CELL
                area = length(left, left + 4, width) * length(top, top + 4, height)
                across = length(max(left, x0), min(left + 4, x1), width)
                area -= across * length(max(top, y0), min(top + 4, y1), height)
                places.append((x, y, area, bool(logits[row, column] > 0), False))
    return places


def plain_click(places: list[Place], draws: list[float]) -> tuple[float, float, int]:
    """The click of one object, by a plain loop over its places."""
    wrong = [place for place in places if place[3]]
    if draws[1] < TRUTH_SHARE or not wrong:
        wrong = [place for place in places if place[4]]
    left = draws[0] * sum(place[2] for place in wrong)
    for x, y, area, _, is_object in wrong:
        left -= area
        if left < 0:
            return x - 0.5, y - 0.5, int(is_object)
    raise AssertionError("there is no place for a click")


def places_of_each(logits: Tensor, given: dict[str, Tensor]) -> list[list[Place]]:
    extents = given["input_sizes"][given["image_index"]]
    arrays = {"targets": given["targets"], "windows": given["windows"], "input_sizes": extents}
    rows = range(len(logits))
    doubles = {name: tensor.double().numpy() for name, tensor in arrays.items()}
    return [
        places_of(logits[k].double().numpy(), {name: a[k] for name, a in doubles.items()})
        for k in rows
    ]


def test_clicks_are_those_of_a_plain_loop_over_cells() -> None:
    count = 30
    given, logits = objects(count), logits_of(count)
    draws = torch.rand(count, 2, generator=torch.Generator().manual_seed(2))
    draws[::3, 1] = TRUTH_SHARE / 2
    clicks = next_clicks(logits, draws, **given)
    assert clicks.points.dtype == torch.float32 and clicks.labels.dtype == torch.int64
    expected = [
        plain_click(places, draw.tolist())
        for places, draw in zip(places_of_each(logits, given), draws.double(), strict=True)
    ]
    np.testing.assert_allclose(clicks.points, np.array(expected)[:, :2], atol=1e-4)
    assert clicks.labels.tolist() == [label for _, _, label in expected]
    assert {label for _, _, label in expected} == {0, 1}


def test_the_first_click_is_that_of_a_mask_of_nothing() -> None:
    count = 12
    given = objects(count)
    draws = torch.rand(count, 2, generator=torch.Generator().manual_seed(3))
    clicks = first_clicks(draws, **given)
    nothing = torch.full((count, LOW, LOW), -1.0)
    expected = [
        plain_click(places, draw.tolist())
        for places, draw in zip(places_of_each(nothing, given), draws.double(), strict=True)
    ]
    np.testing.assert_allclose(clicks.points, np.array(expected)[:, :2], atol=1e-4)
    assert clicks.labels.tolist() == [1] * count


def chi_square(counts: NDArray[Any], shares: NDArray[Any]) -> float:
    """How improbable counts are, in standard deviations of the chi-square statistic."""
    expected = counts.sum() * shares
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(shares) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def counts_of(clicks: Clicks, places: list[Place]) -> NDArray[np.int64]:
    """How many of the clicks are at each place."""
    numbers = {(round(p[0] - 0.5, 2), round(p[1] - 0.5, 2)): n for n, p in enumerate(places)}
    at = [numbers[round(x, 2), round(y, 2)] for x, y in clicks.points.double().tolist()]
    return np.bincount(at, minlength=len(places))


@pytest.mark.parametrize("first", [True, False])
def test_clicks_are_uniform_over_the_area(first: bool) -> None:
    trials = 10_000
    one, logits = objects(2), logits_of(2)[1:]
    given = {name: tensor[1:] for name, tensor in one.items() if name != "input_sizes"}
    places = places_of_each(logits, {**given, "input_sizes": SIZES})[0]
    repeated = {name: t.expand(trials, *t.shape[1:]) for name, t in given.items()}
    repeated["input_sizes"] = SIZES
    draws = torch.rand(trials, 2, generator=torch.Generator().manual_seed(4))
    areas, wrong, is_object = (np.array([p[k] for p in places]) for k in (2, 3, 4))
    in_truth = areas * is_object / (areas * is_object).sum()
    if first:
        clicks, shares = first_clicks(draws, **repeated), in_truth
    else:
        clicks = next_clicks(logits.expand(trials, -1, -1), draws, **repeated)
        in_error = areas * wrong / (areas * wrong).sum()
        shares = TRUTH_SHARE * in_truth + (1 - TRUTH_SHARE) * in_error
        negative = (clicks.labels == 0).double().mean().item()
        assert negative == pytest.approx(shares[~is_object].sum(), abs=0.02) and negative > 0.1
    counts = counts_of(clicks, places)
    possible = shares > 0
    assert counts[~possible].sum() == 0
    assert abs(chi_square(counts[possible], shares[possible])) < 4
    if not first:  # the test can fail: it tells places by their area from places in equal numbers
        assert chi_square(counts[possible], np.full(possible.sum(), 1 / possible.sum())) > 20


def test_neither_other_masks_nor_the_chunk_change_a_click(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 9
    given, logits = objects(count), logits_of(count)
    draws = torch.rand(count, 2, generator=torch.Generator().manual_seed(5))
    at_once = next_clicks(logits, draws, **given)
    monkeypatch.setattr(losses, "CELLS_AT_ONCE", {"cpu": 1})
    one_by_one = next_clicks(logits, draws, **given)
    assert torch.equal(at_once.points, one_by_one.points)
    assert torch.equal(at_once.labels, one_by_one.labels)


def test_no_click_is_in_the_padding_however_wrong_it_is_there() -> None:
    given = objects(3)
    everywhere = torch.full((3, LOW, LOW), 5.0)
    draws = torch.tensor([[k / 100, *UNIFORM] for k in range(100)])
    for k in range(3):
        own = {name: t[k].expand(100, *t.shape[1:]) for name, t in given.items()}
        own["input_sizes"] = SIZES
        clicks = next_clicks(everywhere[k].expand(100, -1, -1), draws, **own)
        height, width = SIZES[k].tolist()
        assert (clicks.points >= -0.5).all()
        assert (clicks.points < torch.tensor([width - 0.5, height - 0.5])).all()
        assert (clicks.labels == 0).any()


def test_a_mask_without_a_mistake_gets_a_positive_click_on_the_object() -> None:
    target = torch.zeros(1, LOW, LOW)
    target[:, 2:7, 4:12] = 1
    clicks = next_clicks(
        (2 * target - 1).expand(50, -1, -1),
        torch.tensor([[k / 50, *UNIFORM] for k in range(50)]),
        targets=(255 * target).to(torch.uint8).expand(50, -1, -1),
        windows=torch.tensor([[0.0, 0.0, S, S]]).expand(50, -1),  # cells of 4 px, as the logits'
        image_index=torch.zeros(50, dtype=torch.int64),
        input_sizes=torch.tensor([[S, S]]),
    )
    x, y = (clicks.points + 0.5).unbind(1)
    assert ((x > 16) & (x < 48) & (y > 8) & (y < 28)).all()
    assert clicks.labels.tolist() == [1] * 50
    assert len(torch.unique(clicks.points, dim=0)) == 40  # each cell of the object


def test_an_object_without_a_cell_is_clicked_in_the_middle_of_its_window() -> None:
    clicks = next_clicks(
        torch.full((2, LOW, LOW), -3.0),
        torch.tensor([[0.3, 0.5], [0.9, 0.01]]),
        targets=torch.zeros(2, SIDE, SIDE, dtype=torch.uint8),
        windows=torch.tensor([[10.0, 20.0, 30.0, 36.0], [50.0, 30.0, 90.0, 44.0]]),
        image_index=torch.tensor([0, 1]),
        input_sizes=SIZES,
    )
    torch.testing.assert_close(clicks.points, torch.tensor([[19.5, 27.5], [63.5, 36.5]]))
    assert clicks.labels.tolist() == [1, 1]


def test_without_objects_there_are_no_clicks() -> None:
    given = {name: t[:0] for name, t in objects(1).items() if name != "input_sizes"}
    clicks = next_clicks(logits_of(1)[:0], torch.zeros(0, 2), **given, input_sizes=SIZES)
    assert clicks.points.shape == (0, 2) and clicks.labels.shape == (0,)


def test_half_precision_logits_are_taken() -> None:
    given, logits = objects(6), logits_of(6).bfloat16()
    draws = torch.rand(6, 2, generator=torch.Generator().manual_seed(6))
    clicks = next_clicks(logits, draws, **given)
    expected = next_clicks(logits.float(), draws, **given)
    assert torch.equal(clicks.points, expected.points)
