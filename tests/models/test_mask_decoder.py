"""All prompts of all images in one call, against the stock decoder image by image."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from samft.models.mask_decoder import FAST, STOCK, choose_decoder
from samft.models.prompted_sam import PromptedSam
from samft.models.prompts import Prompts
from samft.models.sam import build_sam

SIZE = 64
RAGGED = (3, 0, 1)  # prompts of each image
MIXED = torch.tensor([2, 3, 0, 1])  # the same prompts, but not image by image


def make_sam(model_type: str, *, size: int = SIZE) -> Sam:
    torch.manual_seed(1)
    sam = build_sam(model_type, size)
    for name, parameter in sam.mask_decoder.named_parameters():
        if name.endswith("bias"):  # zero, many of them, when fresh
            torch.nn.init.normal_(parameter, std=0.3)
    return sam


@pytest.fixture(scope="module")
def sam() -> Sam:
    return make_sam("vit_tiny")


@pytest.fixture
def small_sam() -> Sam:
    return make_sam("vit_tiny", size=32)


@pytest.fixture(scope="module")
def wide_sam() -> Sam:
    return make_sam("vit_b", size=32)


# What the prompts of a kind consist of; a number is that of points.
KINDS: dict[str, tuple[Any, ...]] = {
    "box": ("box",),
    "point": (1,),
    "4 points": (4,),
    "8 points": (8,),
    "box, 2 points": ("box", 2),
    "box, 7 points": ("box", 7),
    "mask": ("mask",),
    "box, mask": ("box", "mask"),
    "3 points, mask": (3, "mask"),
    "box, 7 points, mask": ("box", 7, "mask"),
    "30 points": (30,),
    "30 points, mask": (30, "mask"),
}


def make_prompts(kind: str, count: int, *, size: int = SIZE) -> Prompts:
    generator = torch.Generator().manual_seed(5)
    given: dict[str, Tensor] = {}
    for part in KINDS[kind]:
        if part == "box":
            corners = torch.rand(count, 2, 2, generator=generator) * size
            given["boxes"] = torch.cat([corners.amin(1), corners.amax(1)], 1)
        elif part == "mask":
            given["masks"] = 9 * torch.randn(count, size // 4, size // 4, generator=generator)
        else:
            given["points"] = torch.rand(count, part, 2, generator=generator) * size
            labels = torch.arange(count * part).view(count, part) % 3  # of both labels, and none
            given["labels"] = torch.where(labels == 2, -1, 1 - labels)
    return Prompts(**given)


def index_of(counts: tuple[int, ...]) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def make_embeddings(sam: Sam, num_images: int) -> Tensor:
    encoder, generator = sam.prompt_encoder, torch.Generator().manual_seed(6)
    shape = (num_images, encoder.embed_dim, *encoder.image_embedding_size)
    return torch.randn(shape, generator=generator)


def decode_stock(
    sam: Sam, embeddings: Tensor, prompts: Prompts, index: Tensor, *, multimask: bool = False
) -> tuple[Tensor, Tensor]:
    # The prompts are embedded together, so that only the decoders are compared.
    points = None if prompts.points is None else (prompts.points, prompts.labels)
    dtype = sam.prompt_encoder.no_mask_embed.weight.dtype
    masks = None if prompts.masks is None else prompts.masks[:, None].to(dtype)
    sparse, dense = sam.prompt_encoder(points=points, boxes=prompts.boxes, masks=masks)
    rows, logits, ious = [], [], []
    for number in index.unique().tolist():
        own = (index == number).nonzero()[:, 0]
        low, iou = sam.mask_decoder(
            image_embeddings=embeddings[number : number + 1],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse[own].to(embeddings.dtype),
            dense_prompt_embeddings=dense[own].to(embeddings.dtype),
            multimask_output=multimask,
        )
        rows.append(own)
        logits.append(low if multimask else low[:, 0])
        ious.append(iou if multimask else iou[:, 0])
    order = torch.cat(rows).argsort()
    return torch.cat(logits)[order], torch.cat(ious)[order]


def assert_near(ours: Tensor, stock: Tensor, relative: float) -> None:
    """Equal up to a share of the largest value: what cancels to zero has rounding errors."""
    scale = stock.abs().max().item() if stock.numel() else 0.0
    torch.testing.assert_close(ours, stock, atol=relative * scale, rtol=0)


def compare_masks(
    sam: Sam, decoder: str, kind: str, *, counts: tuple[int, ...], mask_chunk: int, multimask: bool
) -> None:
    size = sam.image_encoder.img_size
    embeddings, index = make_embeddings(sam, len(counts)), index_of(counts)
    prompts = make_prompts(kind, sum(counts), size=size)
    model = PromptedSam(sam, decoder=decoder, mask_chunk=mask_chunk)
    with torch.no_grad():
        expected = decode_stock(sam, embeddings, prompts, index, multimask=multimask)
        logits, iou = model.decode(embeddings, prompts, index, multimask=multimask)
    masks = (sum(counts), 3) if multimask else (sum(counts),)
    assert logits.shape == (*masks, size // 4, size // 4) and iou.shape == masks
    assert_near(logits, expected[0], 1e-5)
    assert_near(iou, expected[1], 1e-5)
    # The test would pass on anything if prompts, images or masks made no difference.
    assert sum(counts) < 2 or (expected[0][0] - expected[0][-1]).abs().max() > 1e-3
    assert not multimask or (expected[0][:, 1] - expected[0][:, 2]).abs().max() > 1e-3


@pytest.mark.parametrize("decoder", ["fast", "stock"])
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("counts", "mask_chunk"), [(RAGGED, 1), (RAGGED, 3), (RAGGED, 64), ((2,), 1), ((0, 2), 64)]
)
def test_masks_equal_those_of_the_stock_decoder_image_by_image(
    sam: Sam, decoder: str, kind: str, counts: tuple[int, ...], mask_chunk: int, multimask: bool
) -> None:
    options = {"counts": counts, "mask_chunk": mask_chunk, "multimask": multimask}
    compare_masks(sam, decoder, kind, **options)


@pytest.mark.run
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_a_wider_decoder_equal_those_of_stock(
    wide_sam: Sam, kind: str, multimask: bool
) -> None:
    compare_masks(wide_sam, "fast", kind, counts=RAGGED, mask_chunk=3, multimask=multimask)


@pytest.mark.parametrize("decoder", ["fast", "stock"])
@pytest.mark.parametrize("kind", ["box", "3 points, mask"])
def test_prompts_in_any_order_and_no_prompts(sam: Sam, decoder: str, kind: str) -> None:
    embeddings, index = make_embeddings(sam, 3), index_of(RAGGED)
    prompts = make_prompts(kind, 4)
    model = PromptedSam(sam, decoder=decoder, mask_chunk=2)
    given = {name: value for name, value in vars(prompts).items() if value is not None}
    mixed = Prompts(**{name: value[MIXED] for name, value in given.items()})
    with torch.no_grad():
        stock_logits, stock_iou = decode_stock(sam, embeddings, prompts, index)
        logits, iou = model.decode(embeddings, mixed, index[MIXED])
        none, no_iou = model.decode(embeddings, prompts.rows(slice(0)), index[:0])
        nothing, _ = model.decode(embeddings, prompts.rows(slice(0)), index[:0], multimask=True)
    assert_near(logits, stock_logits[MIXED], 1e-5)
    assert_near(iou, stock_iou[MIXED], 1e-5)
    assert none.shape == (0, SIZE // 4, SIZE // 4) and no_iou.shape == (0,)
    assert nothing.shape == (0, 3, SIZE // 4, SIZE // 4)


Decoded = tuple[Tensor, Tensor]


def gradients_of(sam: Sam, start: Tensor, decode: Callable[[Tensor], Decoded]) -> dict[str, Tensor]:
    sam.zero_grad(set_to_none=True)
    embeddings = start.clone().requires_grad_()
    logits, iou = decode(embeddings)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    ((logits * weights).sum() + iou.square().sum()).backward()
    gradients = {name: p.grad for name, p in sam.named_parameters() if p.grad is not None}
    assert embeddings.grad is not None
    return {**gradients, "embeddings": embeddings.grad}


def convert(sam: Sam, dtype: torch.dtype) -> None:
    """All but the embedding of points and boxes, which stock computes in float32 alone."""
    encoder = sam.prompt_encoder
    for module in (sam.mask_decoder, encoder.mask_downscaling, encoder.no_mask_embed):
        module.to(dtype)


def compare_gradients(
    sam: Sam,
    kind: str,
    *,
    multimask: bool,
    mask_chunk: int,
    relative: float,
    counts: tuple[int, ...] = RAGGED,
) -> None:
    size, dtype = sam.image_encoder.img_size, sam.mask_decoder.iou_token.weight.dtype
    # A ReLU whose input is zero but for rounding may pass a gradient in one and not in the other.
    activation = nn.GELU if dtype == torch.float32 else nn.ReLU
    for layer in sam.mask_decoder.transformer.layers:
        layer.mlp.act = activation()
    start, index = make_embeddings(sam, len(counts)).to(dtype), index_of(counts)
    prompts = make_prompts(kind, sum(counts), size=size)
    stock = gradients_of(
        sam, start, lambda e: decode_stock(sam, e, prompts, index, multimask=multimask)
    )
    model = PromptedSam(sam, decoder="fast", mask_chunk=mask_chunk)
    ours = gradients_of(sam, start, lambda e: model.decode(e, prompts, index, multimask=multimask))
    # The stock decoder computes the other masks and drops them: zeros instead of nothing.
    dropped = set(stock) - set(ours)
    numbers = (0,) if multimask else (1, 2, 3)
    idle = {f"mask_decoder.output_hypernetworks_mlps.{number}." for number in numbers}
    assert {name[: name.index(".layers") + 1] for name in dropped} == idle
    assert all(not stock[name].any() for name in dropped)
    assert set(ours) < set(stock) and len(ours) > 80
    largest = max(gradient.abs().max().item() for gradient in stock.values())
    for name in ours:
        # A bias of keys shifts all scores of a query alike: its gradient is 0 but for rounding.
        scale = largest if name.endswith("k_proj.bias") else stock[name].abs().max().item()
        in_float32 = "point_embeddings" in name or "not_a_point" in name
        tolerance = max(relative, 1e-6 if in_float32 else 0)
        difference = (ours[name] - stock[name]).abs().max().item()
        assert difference <= tolerance * scale, (name, difference, scale)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "mask_chunk", "relative"), [(torch.float32, 64, 1e-4), (torch.float64, 3, 1e-10)]
)
def test_gradients_equal_those_of_the_stock_decoder(
    small_sam: Sam, kind: str, dtype: torch.dtype, mask_chunk: int, relative: float, multimask: bool
) -> None:
    convert(small_sam, dtype)
    options = {"mask_chunk": mask_chunk, "relative": relative, "multimask": multimask}
    compare_gradients(small_sam, kind, **options)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", ["box", "mask", "box, 7 points, mask"])
@pytest.mark.parametrize("mask_chunk", [1, 3, 64])
def test_gradients_of_the_only_image_equal_those_of_the_stock_decoder(
    small_sam: Sam, kind: str, mask_chunk: int, multimask: bool
) -> None:
    options = {"mask_chunk": mask_chunk, "relative": 1e-4, "multimask": multimask}
    compare_gradients(small_sam, kind, counts=(4,), **options)


@pytest.mark.parametrize("counts", [RAGGED, (4,)])
@pytest.mark.parametrize(("part", "others"), [("prompt_encoder", 83), ("mask_decoder", 10)])
def test_gradients_beside_a_frozen_part_are_those_beside_a_trained_one(
    small_sam: Sam, counts: tuple[int, ...], part: str, others: int
) -> None:
    start, index = make_embeddings(small_sam, len(counts)), index_of(counts)
    prompts, model = make_prompts("3 points, mask", 4, size=32), PromptedSam(small_sam)
    decode = lambda embeddings: model.decode(embeddings, prompts, index)  # noqa: E731
    expected = gradients_of(small_sam, start, decode)
    getattr(small_sam, part).requires_grad_(False)
    gradients = gradients_of(small_sam, start, decode)
    assert set(gradients) == {name for name in expected if not name.startswith(part)}
    assert len(gradients) > others
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("num_images", [1, 4])
def test_a_mask_prompt_costs_few_multiplications(num_images: int) -> None:
    sam = make_sam("vit_tiny", size=128)
    index = torch.arange(num_images).repeat_interleave(8 // num_images)

    def count(kind: str) -> int:
        prompts = make_prompts(kind, 8, size=128)
        with FlopCounterMode(display=False) as counter:
            PromptedSam(sam).decode(make_embeddings(sam, num_images), prompts, index)
        return counter.get_total_flops()

    assert count("box, 7 points, mask") < 1.1 * count("box, 7 points")


# Points without a box are followed by a token of no point: 1 to 9 tokens.
@pytest.mark.parametrize("num_points", range(9))
def test_any_number_of_tokens(
    small_sam: Sam, monkeypatch: pytest.MonkeyPatch, num_points: int
) -> None:
    monkeypatch.setitem(KINDS, "points", (num_points,))
    monkeypatch.setitem(KINDS, "points, mask", (num_points, "mask"))
    for kind in ("points", "points, mask"):
        compare_masks(small_sam, "fast", kind, counts=RAGGED, mask_chunk=64, multimask=False)
        compare_gradients(small_sam, kind, multimask=False, mask_chunk=64, relative=1e-4)


@pytest.mark.run
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_gradients_of_a_wider_decoder_equal_those_of_stock(
    wide_sam: Sam, kind: str, dtype: torch.dtype, relative: float, multimask: bool
) -> None:
    convert(wide_sam, dtype)
    compare_gradients(wide_sam, kind, mask_chunk=3, relative=relative, multimask=multimask)
    convert(wide_sam, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["box", "8 points", "3 points, mask", "30 points, mask"])
def test_half_precision_is_as_accurate_as_stock(sam: Sam, dtype: torch.dtype, kind: str) -> None:
    start, index, prompts = make_embeddings(sam, 3), index_of(RAGGED), make_prompts(kind, 4)
    exact, _ = decode_stock(sam, start, prompts, index)
    with torch.autocast("cpu", dtype):
        stock, _ = decode_stock(sam, start, prompts, index)
        embeddings = start.clone().requires_grad_()
        logits, iou = PromptedSam(sam, mask_chunk=3).decode(embeddings, prompts, index)
    assert (logits - exact).norm() < 1.5 * (stock - exact).norm()
    (logits.float().sum() + iou.float().sum()).backward()
    assert embeddings.grad is not None and torch.isfinite(embeddings.grad).all()
    assert embeddings.grad.dtype == torch.float32 and embeddings.grad[[0, 2]].any()
    sam.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("num_points", "stock_layers"), [(1, 0), (7, 0), (10, 0), (11, 2), (30, 2)]
)
def test_stock_layers_run_only_for_prompts_of_many_tokens(
    sam: Sam, num_points: int, stock_layers: int
) -> None:
    calls: list[int] = []
    hooks = [
        layer.cross_attn_image_to_token.register_forward_hook(lambda *_: calls.append(1))
        for layer in sam.mask_decoder.transformer.layers
    ]
    prompts = Prompts(points=torch.zeros(1, num_points, 2), labels=torch.ones(1, num_points))
    with torch.no_grad():
        PromptedSam(sam).decode(make_embeddings(sam, 1), prompts, index_of((1,)))
    for hook in hooks:
        hook.remove()
    assert len(calls) == stock_layers  # more than 5 + 10 + 1 tokens, see `MOST_TO_ABSORB`


def test_the_implementation_that_is_asked_for() -> None:
    assert choose_decoder("fast") is FAST and choose_decoder("stock") is STOCK
    with pytest.raises(ValueError, match="'fast' or 'stock'"):
        choose_decoder("quick")
