"""Where the next click goes, what a session of clicks asks of the model, and clicks needed."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch

from samft.annotations.segmentation import CroppedMask
from samft.data.transforms import make_frame
from samft.evaluation.clicks import (
    Click,
    ClickExamples,
    ClickSession,
    centre_point,
    clicks_needed,
    next_click,
    score_clicks,
)
from samft.models.prompts import NOT_THIS, OBJECT, Prompts

NOTHING = CroppedMask(0, 0, np.zeros((0, 0), dtype=bool))


def rectangle(left: int, top: int, right: int, bottom: int) -> CroppedMask:
    return CroppedMask(top, left, np.ones((bottom - top, right - left), dtype=bool))


def crop_of(whole: np.ndarray) -> CroppedMask:
    """Of a mask of the whole image, the tight crop."""
    ys, xs = np.nonzero(whole)
    if not len(ys):
        return NOTHING
    top, left = ys.min(), xs.min()
    return CroppedMask(int(top), int(left), whole[top : ys.max() + 1, left : xs.max() + 1])


@pytest.mark.parametrize(
    "mask, truth, click",
    [
        (NOTHING, rectangle(10, 20, 15, 25), Click(12, 22, OBJECT)),
        (NOTHING, rectangle(4, 3, 5, 4), Click(4, 3, OBJECT)),  # one pixel
        (NOTHING, rectangle(0, 0, 5, 5), Click(2, 2, OBJECT)),  # the image's edge is a border
        (rectangle(0, 0, 20, 10), rectangle(0, 0, 9, 10), Click(13, 4, NOT_THIS)),
        (rectangle(0, 0, 9, 10), rectangle(0, 0, 20, 10), Click(13, 4, OBJECT)),
        (
            rectangle(0, 0, 5, 5),
            rectangle(9, 0, 14, 5),
            Click(2, 2, NOT_THIS),
        ),  # as far: what is wrong
        (rectangle(0, 0, 5, 5), rectangle(9, 0, 16, 7), Click(12, 3, OBJECT)),
        # The largest circle, not the largest area: 5 x 5 of 25 px before 3 x 30 of 90 px.
        (rectangle(0, 0, 3, 30), rectangle(10, 0, 15, 5), Click(12, 2, OBJECT)),
        (rectangle(3, 3, 8, 8), rectangle(3, 3, 8, 8), None),
        (NOTHING, NOTHING, None),
    ],
)
def test_the_click_is_in_the_middle_of_the_largest_error(
    mask: CroppedMask, truth: CroppedMask, click: Click | None
) -> None:
    assert next_click(mask, truth) == click


def test_a_crop_need_not_be_tight() -> None:
    loose = CroppedMask(2, 3, np.pad(np.ones((5, 5), bool), 4))
    assert next_click(NOTHING, loose) == next_click(NOTHING, rectangle(7, 6, 12, 11))
    assert next_click(loose, rectangle(7, 6, 12, 11)) is None


def test_a_pixel_is_clicked_once() -> None:
    truth = rectangle(10, 20, 13, 21)  # three pixels, all 1 px from the border
    first = next_click(NOTHING, truth)
    assert first == Click(10, 20, OBJECT)
    second = next_click(NOTHING, truth, [first])
    assert second == Click(11, 20, OBJECT)
    third = next_click(NOTHING, truth, [first, second, Click(500, 500, NOT_THIS)])
    assert third == Click(12, 20, OBJECT)
    assert next_click(NOTHING, truth, [first, second, third]) is None
    # Clicked as missed, a pixel is not clicked as wrong either.
    assert next_click(truth, NOTHING, [first, second, third]) is None


def slow_click(mask: np.ndarray, truth: np.ndarray) -> Click | None:
    """By the distances of all pixels of an error from all others, with a border around."""
    best: tuple[float, int, int, int] | None = None
    for label, error in ((NOT_THIS, mask & ~truth), (OBJECT, truth & ~mask)):
        padded = np.pad(error, 1)
        others = np.argwhere(~padded)
        for y, x in np.argwhere(padded):
            distance = np.sqrt(((others - (y, x)) ** 2).sum(1).min())
            if best is None or distance > best[0] + 1e-6:
                best = distance, int(x) - 1, int(y) - 1, label
    return None if best is None else Click(*best[1:])


def test_clicks_are_those_of_a_plain_search() -> None:
    generator = np.random.default_rng(0)
    labels = []
    for _ in range(60):
        height, width = generator.integers(1, 24, size=2)
        smooth = generator.random((2, -(-height // 4), -(-width // 4))) > 0.5
        mask, truth = smooth.repeat(4, 1).repeat(4, 2)[:, :height, :width]
        click = next_click(crop_of(mask), crop_of(truth))
        assert click == slow_click(mask, truth)
        labels.append(click and click.label)
    assert {0, 1} <= set(labels)


FRAME = make_frame((64, 64), 64, resize_mode="pad")


class Painter:
    """In place of a model: rectangles by the number of clicks, and what it was asked."""

    def __init__(self, masks: list[list[CroppedMask]]) -> None:
        self.masks, self.asked = masks, []

    def logits(self, rows: list[int], num_clicks: int) -> torch.Tensor:
        drawn = torch.full((len(rows), 16, 16), -1.0)
        for place, row in enumerate(rows):
            x0, y0, x1, y1 = (side // 4 for side in self.masks[row][num_clicks].extent)
            drawn[place, y0:y1, x0:x1] = 1
            drawn[place, 15, 15] = -2 - row  # by which the object is known again
        return drawn

    def __call__(self, prompts: Prompts) -> torch.Tensor:
        assert prompts.masks is not None and prompts.points is not None
        self.asked.append(prompts)
        rows = [int(-own.min()) - 2 for own in prompts.masks]
        return self.logits(rows, prompts.points.shape[1])


# SAM's resizing draws strips from top to bottom to the pixel, if their sides are multiples of 4 px.
HALF, WHOLE, SMALL = rectangle(0, 0, 16, 64), rectangle(0, 0, 32, 64), rectangle(40, 0, 48, 64)


def session_of(painter: Painter, boxes: torch.Tensor | None = None) -> ClickSession:
    return ClickSession(painter, boxes, [WHOLE, SMALL, WHOLE], FRAME)


def test_of_pixels_that_are_as_deep_the_first_is_clicked() -> None:
    # To the whole number of the squared distance: roots in float32 are equal by chance only.
    rng, num_ties = np.random.default_rng(0), 0
    for _ in range(400):
        drawn = np.zeros((80, 80), dtype=np.uint8)
        axes, angle = rng.integers(3, 30, 2).tolist(), float(rng.uniform(0, 180))
        cv2.ellipse(drawn, (40, 40), axes, angle, 0, 360, 1, -1)
        crop = crop_of(drawn.astype(bool))
        padded = np.pad(crop.mask, 1)
        inside, outside = np.argwhere(padded), np.argwhere(~padded)
        squares = ((inside[:, None] - outside) ** 2).sum(2).min(1)
        num_ties += (squares == squares.max()).sum() > 1
        y, x = (inside[squares.argmax()] - 1 + (crop.top, crop.left)).tolist()
        assert centre_point(crop) == (x, y)
    assert num_ties > 100


def test_all_clicks_the_box_and_the_last_logits_are_given() -> None:
    painter = Painter([[HALF, HALF, WHOLE], [SMALL] * 3, [HALF, HALF, HALF]])
    boxes = torch.arange(12.0).view(3, 4)
    first = painter.logits([0, 1, 2], 0)
    corrected = list(session_of(painter, boxes).correct(first, clicks=[[]] * 3, most=2))
    # The second object is right at once: it is neither clicked nor decoded again.
    assert [(one.row, len(one.clicks)) for one in corrected] == [
        *((0, 0), (1, 0), (2, 0)),
        *((0, 1), (2, 1)),
        *((0, 2), (2, 2)),
    ]
    one, two = painter.asked
    for prompts, num in ((one, 1), (two, 2)):
        assert torch.equal(prompts.boxes, boxes[[0, 2]])
        assert prompts.points.shape == (2, num, 2) and prompts.labels.tolist() == [[1] * num] * 2
    assert torch.equal(one.masks, first[[0, 2]])
    assert torch.equal(two.masks, painter.logits([0, 2], 1))
    x, y = one.points[0, 0].tolist()
    assert 16 <= x < 32 and 0 <= y < 64  # in what is missed
    assert torch.equal(two.points[:, :1], one.points)  # earlier clicks are given again
    assert corrected[-1].clicks[:1] == corrected[-3].clicks


def test_scores_after_each_click() -> None:
    painter = Painter([[HALF, HALF, WHOLE], [SMALL] * 3, [HALF, WHOLE, HALF]])
    masks = session_of(painter).correct(painter.logits([0, 1, 2], 0), clicks=[[]] * 3, most=2)
    scores = score_clicks(masks, [WHOLE, SMALL, WHOLE], num_rounds=3, original_size=(64, 64))
    # The third is right after one click and keeps its score.
    assert scores.iou.tolist() == [[0.5, 0.5, 1], [1, 1, 1], [0.5, 1, 1]]
    assert (scores.iou_boundary[scores.iou == 1] == 1).all()
    assert (scores.iou_boundary[scores.iou < 1] < 1).all()


def test_a_session_may_begin_with_a_click() -> None:
    painter = Painter([[HALF] * 4, [SMALL] * 4, [HALF] * 4])
    clicks = [[Click(8, 8, OBJECT)], [Click(44, 44, OBJECT)], [Click(8, 8, OBJECT)]]
    masks = session_of(painter).correct(painter.logits([0, 1, 2], 1), clicks=clicks, most=3)
    scores = score_clicks(masks, [WHOLE, SMALL, WHOLE], num_rounds=3, original_size=(64, 64))
    assert scores.iou.tolist() == [[0.5] * 3, [1] * 3, [0.5] * 3]
    assert [prompts.points.shape for prompts in painter.asked] == [(2, 2, 2), (2, 3, 2)]
    assert all(prompts.boxes is None for prompts in painter.asked)
    assert painter.asked[0].points[:, 0].tolist() == [[8, 8], [8, 8]]


def test_clicks_are_scaled_into_the_model_frame() -> None:
    frame = make_frame((64, 128), 64, resize_mode="pad")
    painter = Painter([[HALF, WHOLE]])
    truth = rectangle(0, 0, 100, 64)
    session = ClickSession(painter, None, [truth], frame)
    (_, second) = session.correct(painter.logits([0], 0), clicks=[[]], most=1)
    x, y, label = second.clicks[0]
    assert label == OBJECT and painter.asked[0].points.tolist() == [[[x / 2, y / 2]]]


def test_examples_keep_the_first_masks_of_chosen_objects() -> None:
    painter = Painter([[HALF] * 4, [SMALL] * 4, [HALF] * 4])
    examples = ClickExamples([(7, 101), (7, 102), (8, 100)], num_masks=2)
    masks = session_of(painter).correct(painter.logits([0, 1, 2], 0), clicks=[[]] * 3, most=3)
    passed = list(examples.watch(masks, [(7, 100), (7, 101), (7, 102)]))
    examples.gather()
    assert len(passed) == 9
    kept = {key: [len(one.clicks) for one in own] for key, own in examples.masks.items()}
    assert kept == {(7, 101): [0], (7, 102): [0, 1], (8, 100): []}


@pytest.mark.parametrize(
    "ious, target, first, needed, ever",
    [
        ([0.2, 0.86, 0.7], 0.85, 0, 1, True),
        ([0.2, 0.86, 0.7], 0.85, 1, 2, True),
        ([0.85, 0.1, 0.1], 0.85, 0, 0, True),
        ([0.2, 0.3, 0.4], 0.85, 0, 2, False),
        ([0.2, 0.3, 0.4], 0.85, 1, 3, False),
        ([0.2, 0.3, 0.9], 0.9, 1, 3, True),  # as many as one that never gets there
    ],
)
def test_clicks_needed(ious: Any, target: float, first: int, needed: int, ever: bool) -> None:
    counts, reached = clicks_needed(np.array([ious]), target, first=first)
    assert (counts.tolist(), reached.tolist()) == ([needed], [ever])
