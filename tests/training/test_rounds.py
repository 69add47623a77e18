"""Rounds of clicks: losses and gradients of a loop over stock's modules, in bounded memory."""

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.saved_bytes import SavedBytes
from samft.models.chunked_loss import BoxDecoder
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.models.trainable import freeze, unreached_by
from samft.training.clicks import first_clicks, next_clicks
from samft.training.losses import MaskLosses, mask_losses
from samft.training.multimask import best_of_masks
from samft.training.prompt_schedule import PromptSchedule

S = 64
INDEX = torch.tensor([2, 0, 0, 2, 0])  # no object in image 1, and not image by image
SIZES = torch.tensor([[S, S], [S, S], [40, S]])
ROUNDS = 3
LossesAndGradients = tuple[list[Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def start() -> PromptedSam:
    """A model whose every weight is random, so that every prompt matters."""
    torch.manual_seed(2)
    model = PromptedSam(build_sam("vit_tiny", S))
    freeze(model.sam, [], unreached=())
    return model


def objects(count: int = len(INDEX)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([S, 40.0])
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 4], 1)
    targets = torch.randint(0, 2, (count, 8, 8), dtype=torch.uint8, generator=generator)
    return {
        "boxes": boxes,
        "targets": 255 * targets,
        "windows": boxes + torch.tensor([-8.0, -8.0, 8.0, 8.0]),
        "draws": torch.rand(count, ROUNDS + 1, 2, generator=generator),
    }


def schedule(prompts: str, *, mask_prompt: float = 0.5, multimask: str = "off") -> PromptSchedule:
    return PromptSchedule(prompts, ROUNDS, mask_prompt, multimask)


def images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (count, 3, S, S), dtype=torch.uint8, generator=generator)


def run_rounds(
    start: PromptedSam,
    prompts: PromptSchedule,
    *,
    index: Tensor = INDEX,
    num_images: int = 3,
    mask_chunk: int = 64,
    decoder: str = "fast",
    position: int = 5,
) -> LossesAndGradients:
    """The losses of one step, and the gradients of half their sum."""
    model = copy.deepcopy(start)
    model.mask_chunk, model.decoder = mask_chunk, decoder
    given = objects(len(index))
    draws = given.pop("draws")[:, : prompts.corrections + 1]
    total, values = model(
        images(num_images),
        given.pop("boxes"),
        index,
        input_sizes=SIZES[:num_images],
        loss=mask_losses,
        rounds=prompts.rounds_at(position, click_draws=draws, loss=mask_losses),
        **given,
    )
    assert not any(value.requires_grad for value in values)
    torch.testing.assert_close(total, values[0].sum())
    (total * 0.5).backward()
    return list(values), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def run_stock(
    start: PromptedSam, prompts: PromptSchedule, *, position: int = 5
) -> LossesAndGradients:
    """The same, object by object, and round by round, with stock's modules."""
    model = copy.deepcopy(start)
    sam, given = model.sam, objects()
    rounds = prompts.rounds_at(position, click_draws=given["draws"], loss=mask_losses)
    embeddings = sam.image_encoder(model.preprocess(images(3), SIZES))
    rows: list[list[Tensor]] = []
    total = torch.zeros(())
    for k, image in enumerate(INDEX.tolist()):
        own = {
            "targets": given["targets"][k, None],
            "windows": given["windows"][k, None],
            "image_index": INDEX[k, None],
            "input_sizes": SIZES,
        }
        box, masks = given["boxes"][k, None], None
        points = torch.zeros(1, 0, 2)
        labels = torch.zeros(1, 0, dtype=torch.int64)
        if rounds.from_point:
            box = None
            point, label = first_clicks(given["draws"][k, None, 0], **own)
            points, labels = point[:, None], label[:, None]
        of_rounds: list[MaskLosses] = []
        for number in range(ROUNDS + 1):
            three = number == 0 and rounds.multimask_loss is not None
            sparse, dense = sam.prompt_encoder(
                points=(points, labels) if points.shape[1] else None, boxes=box, masks=masks
            )
            logits, iou = sam.mask_decoder(
                image_embeddings=embeddings[image, None],
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=three,
            )
            if three:
                of_rounds.append(
                    best_of_masks(logits, iou, loss=mask_losses, iou_weight=1.0, **own)
                )
                logits = logits[:, iou[0].argmax()]
            else:
                logits = logits[:, 0]
                of_rounds.append(mask_losses(logits, iou[:, 0], **own))
            if number == ROUNDS:
                break
            point, label = next_clicks(logits.detach(), given["draws"][k, None, number + 1], **own)
            points = torch.cat([points, point[:, None]], 1)
            labels = torch.cat([labels, label[:, None]], 1)
            masks = logits.detach()[:, None] if rounds.mask_prompts[number] else None
        # Half of the loss is the first mask's, half that of the corrections together.
        first, *corrections = of_rounds
        means = [(f + sum(c) / ROUNDS) / 2 for f, *c in zip(first, *corrections, strict=True)]
        if prompts.prompts == "mixed" and rounds.from_point:  # and a quarter is the box's
            sparse, dense = sam.prompt_encoder(
                points=None, boxes=given["boxes"][k, None], masks=None
            )
            logits, iou = sam.mask_decoder(
                image_embeddings=embeddings[image, None],
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            of_box = mask_losses(logits[:, 0], iou[:, 0], **own)
            means = [0.75 * mean + 0.25 * b for mean, b in zip(means, of_box, strict=True)]
        rows.append([*means, *first, *corrections[-1]])
        total = total + means[0].sum()
    (total * 0.5).backward()
    values = [torch.cat(column).detach() for column in zip(*rows, strict=True)]
    return values, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: LossesAndGradients, expected: LossesAndGradients) -> None:
    for value, expected_value in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-6)
    for name, gradient in expected[1].items():
        # Some gradients are 0 but for rounding (a bias of keys cancels in the softmax).
        tolerance = 1e-6 + 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(actual[1][name], gradient, rtol=0, atol=tolerance)


SCHEDULES = [
    schedule("box", mask_prompt=0.0),
    schedule("box", mask_prompt=1.0),
    schedule("point"),
    schedule("point", multimask="best"),
    PromptSchedule("mixed", ROUNDS, multimask="best", seed=1),  # from a point at position 5
]


def test_mixed_prompts_begin_with_a_point_here() -> None:
    # So that the loop over stock modules answers boxes beside points.
    rounds = SCHEDULES[-1].rounds_at(5, click_draws=torch.zeros(1, 4, 2), loss=mask_losses)
    assert rounds.from_point and rounds.shares() == pytest.approx([3 / 8, *[1 / 8] * 3, 1 / 4])


def test_without_corrections_a_first_point_and_the_box_share_the_loss() -> None:
    none = torch.zeros(1, 1, 2)
    mixed = PromptSchedule("mixed", 0)
    rounds = [mixed.rounds_at(n, click_draws=none, loss=mask_losses) for n in range(9)]
    expected = {True: [0.75, 0.25], False: [1.0]}
    assert all(one.shares() == expected[one.from_point] for one in rounds)
    assert len({one.from_point for one in rounds}) == 2


@pytest.mark.parametrize("decoder", ["fast", "stock"])
@pytest.mark.parametrize("prompts", SCHEDULES)
def test_losses_and_gradients_are_those_of_a_loop_over_stock_modules(
    start: PromptedSam, prompts: PromptSchedule, decoder: str
) -> None:
    expected = run_stock(start, prompts)
    assert sum(gradient.abs().max() > 1e-5 for gradient in expected[1].values()) > 100
    first, last = expected[0][9], expected[0][14]
    assert not torch.equal(first, last)  # the actual IoU: clicks do change masks
    for mask_chunk in (1, 3, 64):
        actual = run_rounds(start, prompts, mask_chunk=mask_chunk, decoder=decoder)
        assert_same(actual, expected)
        others = set(actual[1]) - set(expected[1])
        assert not any(actual[1][name].any() for name in others)


def test_the_only_image_is_decoded_as_beside_others(start: PromptedSam) -> None:
    prompts, index = schedule("point", multimask="best"), torch.zeros_like(INDEX)
    alone = run_rounds(start, prompts, index=index, num_images=1, mask_chunk=2)
    assert_same(alone, run_rounds(start, prompts, index=index, mask_chunk=64))


def test_rounds_with_masks_take_the_image_tensors_of_those_without(
    start: PromptedSam, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    rows_of_boxes = BoxDecoder.rows_of_boxes
    monkeypatch.setattr(
        BoxDecoder, "rows_of_boxes", lambda *given: calls.append(1) or rows_of_boxes(*given)
    )
    for mask_prompt in (0.0, 1.0):
        run_rounds(start, schedule("box", mask_prompt=mask_prompt))
    assert len(calls) == 2 * 4  # tokens, keys, values and queries, once for all rounds of a chunk


def run_single(start: PromptedSam, *, in_rounds: bool) -> LossesAndGradients:
    if in_rounds:
        return run_rounds(start, PromptSchedule("box", 0))
    model = copy.deepcopy(start)
    given = objects()
    del given["draws"]
    boxes = given.pop("boxes")
    total, values = model(images(3), boxes, INDEX, input_sizes=SIZES, loss=mask_losses, **given)
    (total * 0.5).backward()
    return list(values), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_one_round_with_boxes_is_a_step_without_rounds(start: PromptedSam) -> None:
    values, gradients = run_single(start, in_rounds=True)
    expected = run_single(start, in_rounds=False)
    assert_same((values[:5], gradients), expected)
    for part in (values[5:10], values[10:]):
        assert all(torch.equal(a, b) for a, b in zip(part, values[:5], strict=True))


@pytest.mark.parametrize("index", [INDEX, INDEX[:0]])
@pytest.mark.parametrize("prompts", ["box", "point"])
def test_every_trained_parameter_gets_a_gradient_in_every_step(
    start: PromptedSam, prompts: str, index: Tensor
) -> None:
    # DistributedDataParallel waits for all of them, also on a rank without objects.
    values, gradients = run_rounds(start, schedule(prompts, mask_prompt=0.0), index=index)
    assert set(gradients) == {n for n, p in start.named_parameters() if p.requires_grad}
    assert all(value.shape == (len(index),) for value in values)
    idle = {name for name, gradient in gradients.items() if not gradient.any()}
    assert (len(idle) == len(gradients)) == (len(index) == 0)
    assert any("mask_downscaling" in name for name in idle)


@pytest.mark.parametrize(
    ("prompts", "corrections", "mask_prompt", "multimask"),
    [
        ("box", 0, 0.0, "off"),
        ("box", 2, 0.0, "off"),
        ("box", 2, 0.5, "off"),
        ("point", 0, 0.5, "off"),
        ("point", 0, 0.0, "best"),
        ("point", 2, 0.0, "best"),
        ("mixed", 0, 0.0, "off"),
        ("mixed", 2, 0.5, "off"),
        ("mixed", 2, 0.5, "best"),
    ],
)
def test_what_is_trained_is_exactly_what_the_prompts_reach(
    start: PromptedSam, prompts: str, corrections: int, mask_prompt: float, multimask: str
) -> None:
    own = PromptSchedule(prompts, corrections, mask_prompt, multimask)
    reached: set[str] = set()
    model = copy.deepcopy(start)
    networks = model.sam.mask_decoder.output_hypernetworks_mlps
    # With boxes and with points, with mask prompts and without; and of the three masks one is the
    # best of all these objects, so each network has its turn there.
    for position, _ in itertools.product(range(4), range(3 if multimask == "best" else 1)):
        networks[1], networks[2], networks[3] = networks[2], networks[3], networks[1]
        _, gradients = run_rounds(model, own, position=position)
        reached |= {name for name, gradient in gradients.items() if gradient.any()}
    unreached = unreached_by(
        prompts, corrections=corrections, mask_prompt=mask_prompt, multimask=multimask
    )
    freeze(model.sam, [], unreached=unreached)
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}


def test_frozen_parts_get_no_gradient(start: PromptedSam) -> None:
    prompts = schedule("point")
    _, all_gradients = run_rounds(start, prompts, mask_chunk=2)
    for part in ("image_encoder", "prompt_encoder", "mask_decoder"):
        model = copy.deepcopy(start)
        freeze(model.sam, [part], unreached=())
        _, gradients = run_rounds(model, prompts, mask_chunk=2)
        assert set(gradients) == {n for n in all_gradients if not n.startswith(f"sam.{part}.")}
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, all_gradients[name])


def peak_saved_bytes(start: PromptedSam, prompts: PromptSchedule, num_objects: int) -> int:
    """The most bytes saved for backward at a time, beside parameters; 4 objects in a chunk."""
    model, given = copy.deepcopy(start), objects(num_objects)
    model.mask_chunk = 4
    index = torch.zeros(num_objects, dtype=torch.int64)
    embeddings = torch.zeros(1, *model.embedding_shape, requires_grad=True)
    with SavedBytes(beside=[*model.parameters(), *given.values()]).watch() as saved_bytes:
        draws = given.pop("draws")[:, : prompts.corrections + 1]
        total, _ = model(
            torch.zeros(1, 3, S, S),
            given.pop("boxes"),
            index,
            input_sizes=SIZES[:1],
            embeddings=embeddings,
            loss=mask_losses,
            rounds=prompts.rounds_at(None, click_draws=draws, loss=mask_losses),
            **given,
        )
        total.backward()
    return saved_bytes.peak


def test_saved_bytes_grow_with_neither_rounds_nor_objects(start: PromptedSam) -> None:
    one_chunk = peak_saved_bytes(start, schedule("point"), 4)
    assert peak_saved_bytes(start, schedule("point"), 64) < 1.1 * one_chunk
    # A round has one token more than the one before it, but nothing of the one before it.
    fewer_rounds = peak_saved_bytes(start, PromptSchedule("point", 1), 4)
    assert one_chunk < 1.3 * fewer_rounds


def test_rounds_with_masks_save_few_bytes_more(start: PromptedSam) -> None:
    without = peak_saved_bytes(start, schedule("box", mask_prompt=0.0), 4)
    assert peak_saved_bytes(start, schedule("box", mask_prompt=1.0), 4) < 1.1 * without


def test_steps_are_drawn_from_the_seed_and_the_position() -> None:
    draws = torch.zeros(1, 8, 2)
    mixed = PromptSchedule("mixed", 7, 0.25, "best", seed=3)
    rounds_at = partial(mixed.rounds_at, click_draws=draws, loss=mask_losses)
    rounds = [rounds_at(position) for position in range(2000)]
    from_point = [one.from_point for one in rounds]
    assert sum(from_point) == pytest.approx(1000, abs=4 * 22.4)  # 4 standard deviations
    with_mask = sum(sum(one.mask_prompts) for one in rounds)
    assert with_mask == pytest.approx(14_000 / 4, abs=4 * 51.3)
    assert all(
        (one.multimask_loss is not None) == point
        for one, point in zip(rounds, from_point, strict=True)
    )
    again = [rounds_at(position) for position in range(20)]
    assert [one.mask_prompts for one in again] == [one.mask_prompts for one in rounds[:20]]
    # Fewer rounds draw the same; another seed draws others.
    few = PromptSchedule("mixed", 2, 0.25, "best", seed=3)
    other = PromptSchedule("mixed", 7, 0.25, "best", seed=4)
    draw = {"click_draws": draws, "loss": mask_losses}
    assert all(
        few.rounds_at(n, **draw).mask_prompts == rounds[n].mask_prompts[:2] for n in range(9)
    )
    assert any(other.rounds_at(n, **draw).mask_prompts != rounds[n].mask_prompts for n in range(9))
    largest = mixed.rounds_at(None, **draw)
    assert largest.mask_prompts == (True,) * 7 and largest.multimask_loss is not None


def test_a_loss_of_ones_own_is_taken(start: PromptedSam) -> None:
    def squared_dice(mask_logits: Any, iou_predicted: Any, **inputs: Any) -> MaskLosses:
        losses = mask_losses(mask_logits, iou_predicted, **inputs)
        return losses._replace(total=losses.total + losses.dice.square())

    model, given = copy.deepcopy(start), objects()
    prompts = schedule("point", multimask="best")
    rounds = prompts.rounds_at(0, click_draws=given.pop("draws"), loss=squared_dice)
    boxes = given.pop("boxes")
    total, values = model(
        images(3), boxes, INDEX, input_sizes=SIZES, loss=squared_dice, rounds=rounds, **given
    )
    total.backward()
    first = MaskLosses(*values[5:10])
    plain = 10 * first.focal + first.dice + first.iou
    torch.testing.assert_close(first.total, plain + first.dice.square())
