"""A model for images that are not square: the square's numbers, where padding takes no part."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import (
    add_decomposed_rel_pos,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

from samft.models import sam as sam_module
from samft.models.frozen_encoder import cast_frozen_weights
from samft.models.image_encoder import checkpoint_activations
from samft.models.lora import AdapterSettings, add_adapters
from samft.models.mask_generator import make_predictor
from samft.models.prompted_sam import PromptedSam
from samft.models.prompts import Prompts
from samft.models.sam import MODEL_SHAPES, build_sam, load_state
from samft.models.trainable import freeze

LARGE_HEADS = replace(  # as wide a head as that of vit_h
    MODEL_SHAPES["vit_h"], encoder_width=160, encoder_heads=2, encoder_depth=2, decoder_width=64
)
# Tokens of rectangle and square: cut windows on both axes, whole ones, portrait, one row.
SIZES = {
    "vit_tiny": ["256x192", "192x256", "256x128", "256x16", "240x208"],
    "vit_b": ["256x192"],
    "vit_h": ["288x192"],
}


def random_state(model_type: str, side: int) -> dict[str, Tensor]:
    torch.manual_seed(4)
    sam = build_sam(model_type, side)
    for name, parameter in sam.named_parameters():
        if "pos" in name:  # built as zeros, which would hide a wrong place
            nn.init.normal_(parameter, std=0.5)
    return sam.state_dict()


def models_of(model_type: str, size: str) -> tuple[Sam, Sam]:
    """The square of stock modules, and the rectangle, with the same weights."""
    sides = [int(side) for side in size.split("x")]
    state = random_state(model_type, max(sides))
    square, rectangle = (
        build_sam(model_type, max(sides)),
        build_sam(model_type, size, attention="fast"),
    )
    for sam in (square, rectangle):
        load_state(sam, state)
        sam.requires_grad_(False)
    return square, rectangle


@pytest.fixture(autouse=True)
def shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sam_module.MODEL_SHAPES, "vit_h", LARGE_HEADS)
    monkeypatch.setitem(
        sam_module.MODEL_SHAPES,
        "vit_b",
        replace(MODEL_SHAPES["vit_b"], encoder_depth=3, global_attention_blocks=(2,)),
    )


def masked_attention(attn: nn.Module, x: Tensor, inside: Tensor) -> Tensor:
    """Stock's attention over the whole map, in which no token looks at the padding."""
    _, height, width, _ = x.shape
    qkv = attn.qkv(x).reshape(1, height * width, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.reshape(3, attn.num_heads, height * width, -1)
    logits = (q * attn.scale) @ k.transpose(-2, -1)
    size = (height, width)
    logits = add_decomposed_rel_pos(logits, q, attn.rel_pos_h, attn.rel_pos_w, size, size)
    weights = logits.masked_fill(~inside.flatten(), -torch.inf).softmax(-1)
    attended = (weights @ v).view(1, attn.num_heads, height, width, -1)
    return attn.proj(attended.permute(0, 2, 3, 1, 4).reshape(1, height, width, -1))


def masked_embedding(square: Sam, images: Tensor, inside: Tensor) -> Tensor:
    """Stock's image encoder where padding is nothing: zeros of windows, and outside of the map."""
    encoder, zeros = square.image_encoder, inside[..., None]
    x = encoder.patch_embed(images) + encoder.pos_embed
    for block in encoder.blocks:
        y = block.norm1(x)
        if block.window_size:
            windows, padded = window_partition(y * zeros, block.window_size)
            y = window_unpartition(block.attn(windows), block.window_size, padded, x.shape[1:3])
        else:
            y = masked_attention(block.attn, y, inside)
        x = x + y
        x = x + block.mlp(block.norm2(x))
    first, norm, second, last_norm = encoder.neck
    return last_norm(second(norm(first(x.permute(0, 3, 1, 2))) * inside))


@contextmanager
def masked_image_tokens(square: Sam, inside: Tensor) -> Iterator[None]:
    """Has the stock decoder's tokens look at no padding."""
    transformer = square.mask_decoder.transformer
    attentions = [layer.cross_attn_token_to_image for layer in transformer.layers]
    for attn in (*attentions, transformer.final_attn_token_to_image):

        def forward(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = attn.q_proj(q), attn.k_proj(k), attn.v_proj(v)
            q, k, v = (attn._separate_heads(x, attn.num_heads) for x in (q, k, v))
            logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            weights = logits.masked_fill(~inside.flatten(), -torch.inf).softmax(-1)
            return attn.out_proj(attn._recombine_heads(weights @ v))

        attn.forward = MethodType(forward, attn)
    yield
    for attn in (*attentions, transformer.final_attn_token_to_image):
        del attn.forward


def inputs_of(size: str) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Pixels of the square, padded by black; which tokens are of the rectangle; its H, W."""
    width, height = (int(side) for side in size.split("x"))
    side = max(width, height)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    shape = (1, 3, height, width)
    pixels[..., :height, :width] = torch.randint(0, 256, shape, generator=generator)
    inside = torch.zeros(side // 16, side // 16, dtype=torch.bool)
    inside[: height // 16, : width // 16] = True
    return pixels, inside, (height, width)


CASES = [(model_type, size) for model_type, sizes in SIZES.items() for size in sizes]


@pytest.mark.parametrize(("model_type", "size"), CASES)
def test_rectangle_is_the_square_without_its_padding(model_type: str, size: str) -> None:
    square, rectangle = models_of(model_type, size)
    pixels, inside, (height, width) = inputs_of(size)
    model = PromptedSam(rectangle)
    assert model.frame_size == (height, width)
    sizes = torch.tensor([[height, width]])
    of_square = masked_embedding(square, PromptedSam(square).preprocess(pixels, sizes), inside)
    embedding = model.embed(pixels[..., :height, :width], sizes)
    expected = of_square[..., : height // 16, : width // 16]
    torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-5)

    boxes = torch.tensor([[3.0, 2.0, width / 2, height / 1.5], [0.0, 0.0, width, height]])
    points = torch.tensor([[[5.0, 4.0], [width - 3.0, height - 2.0]]]).expand(2, -1, -1)
    labels = torch.tensor([[1, 0], [1, 1]])
    previous = torch.randn(2, square.prompt_encoder.mask_input_size[0], max(height, width) // 4)
    part = previous[:, : height // 4, : width // 4]
    index = torch.zeros(2, dtype=torch.int64)
    for of_part, of_whole in (
        (Prompts(boxes), Prompts(boxes)),
        (Prompts(None, points, labels), Prompts(None, points, labels)),
        (Prompts(boxes, points, labels, part), Prompts(boxes, points, labels, previous)),
    ):
        for multimask in (False, True):
            own, own_iou = model.decode(embedding, of_part, index, multimask=multimask)
            whole = torch.zeros_like(of_square)
            whole[..., : height // 16, : width // 16] = embedding
            stock = PromptedSam(square, decoder="stock")
            with masked_image_tokens(square, inside):
                logits, iou = stock.decode(whole, of_whole, index, multimask=multimask)
            logits = logits[..., : height // 4, : width // 4]
            torch.testing.assert_close(own, logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(own_iou, iou, atol=1e-5, rtol=1e-5)


def test_padding_does_take_part_in_the_square() -> None:
    # Else the test above could not fail.
    square, rectangle = models_of("vit_tiny", "256x192")
    pixels, _, (height, width) = inputs_of("256x192")
    sizes = torch.tensor([[height, width]])
    whole = PromptedSam(square).embed(pixels, sizes)[..., :12, :]
    part = PromptedSam(rectangle).embed(pixels[..., :height, :], sizes)
    assert (whole - part).abs().max() > 1e-3


def test_rectangle_that_is_a_square_is_the_stock_model() -> None:
    assert type(build_sam("vit_tiny", "128x128")) is Sam
    assert build_sam("vit_tiny", "128x96", attention="fast").state_dict().keys() == {
        *build_sam("vit_tiny", 128).state_dict()
    }


def test_weights_have_the_shapes_of_the_square() -> None:
    part, whole = build_sam("vit_tiny", "96x128", attention="fast"), build_sam("vit_tiny", 128)
    shapes = [{name: t.shape for name, t in sam.state_dict().items()} for sam in (part, whole)]
    assert shapes[0] == shapes[1]


def test_stock_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="not square needs attention 'fast'"):
        build_sam("vit_tiny", "128x96")


@pytest.mark.parametrize("decoder", ["fast", "stock"])
def test_decoders_agree(decoder: str) -> None:
    _, rectangle = models_of("vit_tiny", "256x192")
    embeddings = torch.randn(2, *PromptedSam(rectangle).embedding_shape)
    boxes, index = torch.tensor([[4.0, 4, 90, 90], [0, 0, 250, 190]]), torch.tensor([1, 0])
    logits, _ = PromptedSam(rectangle, decoder=decoder, mask_chunk=1).decode(
        embeddings, Prompts(boxes), index
    )
    others, _ = PromptedSam(rectangle, decoder="stock").decode(embeddings, Prompts(boxes), index)
    assert logits.shape == (2, 48, 64)
    torch.testing.assert_close(logits, others, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["none", "blocks", "full", "cast", "prefix", "adapters"])
def test_every_way_through_the_encoder_sees_the_same(how: str) -> None:
    _, sam = models_of("vit_tiny", "256x192")
    images = torch.randn(1, 3, 192, 256)
    expected = sam.image_encoder(images)
    if how == "cast":
        # The copy has the vectors of positions made once.
        encoder = cast_frozen_weights(sam.image_encoder, torch.float32)
        assert encoder.blocks[1].positions.plain[0].shape == (12, 32, 12)
        torch.testing.assert_close(encoder(images), expected)
        return
    if how == "adapters":
        add_adapters(sam, AdapterSettings(2, 2.0, ("q", "v"), None, True, False))
    if how == "prefix":
        freeze(sam, [], train_blocks=2)
        model = PromptedSam(sam)
        assert model.frozen_shape == (12, 16, 128)
        cached = model.encode_frozen(images)
        torch.testing.assert_close(model.embed(images, cached=cached), expected)
        return
    encoder = checkpoint_activations(sam.image_encoder, how if how != "adapters" else "none")
    torch.testing.assert_close(encoder(images), expected)


def test_positions_get_the_gradients_of_their_part() -> None:
    _, sam = models_of("vit_tiny", "256x192")
    encoder = sam.image_encoder.requires_grad_(True)
    encoder(torch.randn(1, 3, 192, 256)).square().sum().backward()
    assert encoder.pos_embed.grad[:, :12].all() and not encoder.pos_embed.grad[:, 12:].any()
    rows, columns = (encoder.blocks[1].attn.get_parameter(f"rel_pos_{x}").grad for x in "hw")
    assert rows.shape == columns.shape == (31, 32)
    assert rows[4:27].any(1).all() and not rows[:4].any() and not rows[27:].any()
    assert columns.any(1).all()


@pytest.mark.parametrize("size", [(90, 120), (96, 128), (120, 90), (40, 128), (7, 9)])
def test_predictor_fits_images_of_any_shape(size: tuple[int, int]) -> None:
    # As `PromptedSam`, which validates: with the sizes and pixels of `make_frame`.
    from samft.data.transforms import boxes_to_input, make_frame, resize_image
    from samft.models.prompted_sam import original_masks

    _, sam = models_of("vit_tiny", "128x96")
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy()
    box = torch.tensor([[1.0, 2.0, size[1] / 2, size[0] - 1.0]]).double().numpy()
    predictor = make_predictor(sam)
    predictor.set_image(image)
    masks, iou, low = predictor.predict(box=box[0], multimask_output=False)

    frame, model = make_frame(size, (96, 128), resize_mode="pad"), PromptedSam(sam)
    assert predictor.input_size == frame.input_size
    pixels = torch.from_numpy(resize_image(image, frame)).permute(2, 0, 1)[None]
    embedding = model.embed(pixels, torch.tensor([frame.input_size]))
    torch.testing.assert_close(embedding, predictor.features, atol=1e-5, rtol=1e-5)
    boxes = torch.from_numpy(boxes_to_input(box, frame)).float()
    logits, own_iou = model.decode(embedding, Prompts(boxes), torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(torch.from_numpy(low), logits, atol=1e-4, rtol=1e-4)
    assert iou[0] == pytest.approx(own_iou.item(), abs=1e-4)
    (mask,) = original_masks(logits, input_size=frame.input_size, original_size=size)
    whole = torch.zeros(size, dtype=torch.bool).numpy()
    height, width = mask.mask.shape
    whole[mask.top : mask.top + height, mask.left : mask.left + width] = mask.mask
    assert (whole == masks[0]).mean() > 0.999

    # Once more, as people correct masks: with a click, and the last logits.
    click = {"point_coords": np.array([[2.0, 3.0]]), "point_labels": np.array([1])}
    _, _, again = predictor.predict(**click, mask_input=low, multimask_output=False)
    points = torch.tensor([[[2.0 * frame.scale_x, 3.0 * frame.scale_y]]])
    prompts = Prompts(None, points, torch.ones(1, 1, dtype=torch.int64), torch.from_numpy(low))
    logits, _ = model.decode(embedding, prompts, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(torch.from_numpy(again), logits, atol=1e-4, rtol=1e-4)
