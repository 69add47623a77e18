"""The encoder's two parts are the whole, in values and gradients; what is frozen, and where."""

import re

import pytest
import torch
from torch import Tensor

from samft.models.frozen_encoder import (
    count_frozen_blocks,
    encode_first_blocks,
    encode_last_blocks,
    move_first_blocks,
)
from samft.models.image_encoder import checkpoint_activations
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.models.trainable import freeze
from samft.training.optim import parameter_groups

S = 64
BLOCKS = 4  # of vit_tiny


def a_model(train_blocks: int | None, *, attention: str = "fast", how: str = "none") -> PromptedSam:
    torch.manual_seed(3)
    sam = build_sam("vit_tiny", S, attention=attention)
    freeze(sam, [], train_blocks=train_blocks)
    sam.image_encoder = checkpoint_activations(sam.image_encoder, how)
    return PromptedSam(sam)


def gradients_of(model: PromptedSam, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["fast", "stock"])
@pytest.mark.parametrize("how", ["none", "blocks", "full"])
@pytest.mark.parametrize("trained", [1, 3, BLOCKS])
def test_both_parts_are_the_whole(attention: str, how: str, trained: int) -> None:
    model = a_model(trained, attention=attention, how=how)
    images = torch.randn(2, 3, S, S)
    whole = model.sam.image_encoder(images)
    expected = gradients_of(model, whole)
    tokens = model.encode_frozen(images)
    assert tokens.shape == (2, *model.frozen_shape) == (2, 4, 4, 128) and not tokens.requires_grad
    for parts in (model.embed(images), model.embed(images[:, :, :0], cached=tokens)):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)
        actual = gradients_of(model, parts)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4)
    first = encode_first_blocks(model.sam.image_encoder, images, BLOCKS - trained)
    torch.testing.assert_close(
        encode_last_blocks(model.sam.image_encoder, first, BLOCKS - trained), whole
    )


@pytest.mark.parametrize("trained", range(1, BLOCKS + 1))
def test_the_last_blocks_and_the_neck_are_trained(trained: int) -> None:
    model = a_model(trained)
    names = {n for n, p in model.sam.image_encoder.named_parameters() if p.requires_grad}
    last = tuple(f"blocks.{i}." for i in range(BLOCKS - trained, BLOCKS))
    assert names == {
        n for n, _ in model.sam.image_encoder.named_parameters() if n.startswith((*last, "neck."))
    }
    assert model.num_frozen_blocks == BLOCKS - trained


NORMS = r"norm\d\.(weight|bias)$|neck\.[13]\."
BIASES = r"bias$"


@pytest.mark.parametrize("parts", [["image_encoder"], ["image_encoder", "mask_decoder"]])
@pytest.mark.parametrize(
    ("apart", "pattern", "num_frozen"),
    [
        ({"train_norms": True}, NORMS, 0),
        ({"train_biases": True}, BIASES, None),  # that of the patches is trained
        ({"train_norms": True, "train_biases": True}, f"{NORMS}|{BIASES}", None),
    ],
)
def test_norms_and_biases_of_a_frozen_encoder_are_trained_and_no_more(
    parts: list[str], apart: dict[str, bool], pattern: str, num_frozen: int | None
) -> None:
    model = a_model(None)
    freeze(model.sam, parts, **apart)
    in_encoder = {name: p.requires_grad for name, p in model.sam.image_encoder.named_parameters()}
    assert in_encoder == {name: bool(re.search(pattern, name)) for name in in_encoder}
    assert model.num_frozen_blocks == num_frozen
    assert not model.encoder_is_frozen
    # They have no weight decay, and a gradient each.
    groups = parameter_groups(model.sam.image_encoder, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0]
    images = torch.randint(0, 256, (1, 3, S, S), dtype=torch.uint8)
    model.embed(images).square().sum().backward()
    trained = {name: p for name, p in model.sam.image_encoder.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())


def test_with_the_last_block_all_norms_are_trained() -> None:
    model = a_model(None)
    freeze(model.sam, [], train_blocks=1, train_norms=True)
    for name, parameter in model.sam.image_encoder.named_parameters():
        is_last = name.startswith((f"blocks.{BLOCKS - 1}.", "neck."))
        assert parameter.requires_grad == (is_last or bool(re.search(NORMS, name))), name


def test_blocks_count_as_frozen_only_from_the_start() -> None:
    encoder = a_model(1).sam.image_encoder
    assert count_frozen_blocks(encoder) == 3
    encoder.blocks[1].norm1.bias.requires_grad_(True)
    assert count_frozen_blocks(encoder) == 1
    encoder.pos_embed.requires_grad_(True)
    assert count_frozen_blocks(encoder) is None
    encoder.requires_grad_(False)
    assert count_frozen_blocks(encoder) == BLOCKS


@pytest.mark.parametrize(
    ("parts", "trained", "shape"),
    [([], None, None), (["image_encoder"], None, (128, 4, 4)), ([], 2, (4, 4, 128))],
)
def test_what_can_be_kept_of_an_image(
    parts: list[str], trained: int | None, shape: tuple[int, ...] | None
) -> None:
    model = a_model(None)
    freeze(model.sam, parts, train_blocks=trained)
    assert model.frozen_shape == shape


def test_autocast_gives_the_same_with_a_cache() -> None:
    model = a_model(2)
    images = torch.randn(1, 3, S, S)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.encode_frozen(images)
        assert torch.equal(model.embed(images), model.embed(images, cached=tokens))


def test_what_is_frozen_is_moved_and_no_more() -> None:
    model = a_model(1)
    encoder = model.sam.image_encoder
    move_first_blocks(encoder, 3, torch.device("meta"))
    away = {n for n, p in encoder.named_parameters() if p.device.type == "meta"}
    frozen = {n for n, p in encoder.named_parameters() if not p.requires_grad}
    assert away == frozen and "pos_embed" in away
    tokens = torch.randn(1, *model.frozen_shape)
    assert model.embed(tokens[:0], cached=tokens).isfinite().all()
