"""All boxes of all images in one call, against the stock decoder image by image."""

import copy
from collections.abc import Callable

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from samft.models.mask_decoder import FAST, STOCK, choose_decoder
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam

SIZE = 64
RAGGED = (3, 0, 1)  # boxes of each image
MIXED = torch.tensor([2, 3, 0, 1])  # the same boxes, but not image by image


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


def make_boxes(counts: tuple[int, ...], size: int = SIZE) -> list[Tensor]:
    corners = [torch.rand(count, 2, 2) * size for count in counts]
    return [torch.cat([c.amin(1), c.amax(1)], dim=1) for c in corners]


def index_of(boxes: list[Tensor]) -> Tensor:
    return torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(b) for b in boxes]))


def make_embeddings(sam: Sam, num_images: int) -> Tensor:
    encoder = sam.prompt_encoder
    dtype = encoder.no_mask_embed.weight.dtype
    return torch.randn(num_images, encoder.embed_dim, *encoder.image_embedding_size, dtype=dtype)


def decode_stock(sam: Sam, embeddings: Tensor, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    # The prompts are embedded in float32, and together, so that only the decoders are compared.
    all_boxes, dense = sam.prompt_encoder(points=None, boxes=torch.cat(boxes), masks=None)
    prompts = all_boxes.to(embeddings.dtype).split([len(box) for box in boxes])
    logits, ious = [], []
    for embedding, sparse in zip(embeddings, prompts, strict=True):
        if not len(sparse):  # which the stock decoder cannot do
            continue
        low, iou = sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense[:1],
            multimask_output=False,
        )
        logits.append(low[:, 0])
        ious.append(iou[:, 0])
    return torch.cat(logits), torch.cat(ious)


def assert_near(ours: Tensor, stock: Tensor, relative: float) -> None:
    """Equal up to a share of the largest value: what cancels to zero has rounding errors."""
    scale = stock.abs().max().item() if stock.numel() else 0.0
    torch.testing.assert_close(ours, stock, atol=relative * scale, rtol=0)


@pytest.mark.parametrize("kind", ["fast", "stock"])
@pytest.mark.parametrize("mask_chunk", [1, 3, 64])
@pytest.mark.parametrize("counts", [RAGGED, (1,), (0, 2)])
def test_masks_equal_those_of_the_stock_decoder_image_by_image(
    sam: Sam, kind: str, mask_chunk: int, counts: tuple[int, ...]
) -> None:
    embeddings, boxes = make_embeddings(sam, len(counts)), make_boxes(counts)
    model = PromptedSam(sam, decoder=kind, mask_chunk=mask_chunk)
    with torch.no_grad():
        stock_logits, stock_iou = decode_stock(sam, embeddings, boxes)
        logits, iou = model.decode(embeddings, torch.cat(boxes), index_of(boxes))
    assert logits.shape == (sum(counts), SIZE // 4, SIZE // 4) and iou.shape == (sum(counts),)
    assert_near(logits, stock_logits, 1e-5)
    assert_near(iou, stock_iou, 1e-5)
    # The test would pass on anything if boxes or images made no difference.
    assert sum(counts) < 2 or (stock_logits[0] - stock_logits[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["fast", "stock"])
def test_boxes_in_any_order_and_no_boxes(sam: Sam, kind: str) -> None:
    embeddings, boxes = make_embeddings(sam, 3), make_boxes(RAGGED)
    model = PromptedSam(sam, decoder=kind, mask_chunk=2)
    index, all_boxes = index_of(boxes), torch.cat(boxes)
    with torch.no_grad():
        stock_logits, stock_iou = decode_stock(sam, embeddings, boxes)
        logits, iou = model.decode(embeddings, all_boxes[MIXED], index[MIXED])
        none, no_iou = model.decode(embeddings, all_boxes[:0], index[:0])
    assert_near(logits, stock_logits[MIXED], 1e-5)
    assert_near(iou, stock_iou[MIXED], 1e-5)
    assert none.shape == (0, SIZE // 4, SIZE // 4) and no_iou.shape == (0,)


def test_a_wider_decoder() -> None:
    sam = make_sam("vit_b", size=32)
    embeddings, boxes = make_embeddings(sam, 3), make_boxes(RAGGED, 32)
    with torch.no_grad():
        stock_logits, stock_iou = decode_stock(sam, embeddings, boxes)
        logits, iou = PromptedSam(sam).decode(embeddings, torch.cat(boxes), index_of(boxes))
    assert_near(logits, stock_logits, 1e-5)
    assert_near(iou, stock_iou, 1e-5)


Decoded = tuple[Tensor, Tensor]


def gradients_of(
    sam: Sam, start: Tensor, decode: Callable[[Sam, Tensor], Decoded]
) -> dict[str, Tensor]:
    model, embeddings = copy.deepcopy(sam), start.clone().requires_grad_()
    logits, iou = decode(model, embeddings)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    ((logits * weights).sum() + iou.square().sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert embeddings.grad is not None
    return {**gradients, "embeddings": embeddings.grad}


@pytest.mark.parametrize("model_type", ["vit_tiny", "vit_b"])
@pytest.mark.parametrize(
    ("dtype", "mask_chunk", "relative"),
    [(torch.float32, 64, 1e-4), (torch.float64, 64, 1e-10), (torch.float64, 3, 1e-10)],
)
def test_gradients_equal_those_of_the_stock_decoder(
    model_type: str, dtype: torch.dtype, mask_chunk: int, relative: float
) -> None:
    sam, size = make_sam(model_type, size=32), 32
    start, boxes = make_embeddings(sam, 3).to(dtype), make_boxes(RAGGED, size)
    sam.to(dtype).prompt_encoder.pe_layer.float()  # positions are float32, whatever the model is
    index, all_boxes = index_of(boxes), torch.cat(boxes)
    stock = gradients_of(sam, start, lambda model, e: decode_stock(model, e, boxes))
    chunk = {"decoder": "fast", "mask_chunk": mask_chunk}
    ours = gradients_of(
        sam, start, lambda model, e: PromptedSam(model, **chunk).decode(e, all_boxes, index)
    )
    idle = {f"mask_decoder.output_hypernetworks_mlps.{number}." for number in (1, 2, 3)}
    # The stock decoder computes the other three masks and drops them: zeros instead of nothing.
    dropped = set(stock) - set(ours)
    assert {name[: name.index(".layers") + 1] for name in dropped} == idle
    assert all(not stock[name].any() for name in dropped)
    assert set(ours) < set(stock) and len(ours) > 80
    largest = max(gradient.abs().max().item() for gradient in stock.values())
    for name in ours:
        # A bias of keys shifts all scores of a query alike: its gradient is 0 but for rounding.
        scale = largest if name.endswith("k_proj.bias") else stock[name].abs().max().item()
        # Stock's prompt encoder adds these to positions in float32, whatever they are.
        tolerance = max(relative, 1e-6 if "point_embeddings" in name else 0)
        difference = (ours[name] - stock[name]).abs().max().item()
        assert difference <= tolerance * scale, (name, difference, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_stock(sam: Sam, dtype: torch.dtype) -> None:
    start, boxes = make_embeddings(sam, 3), make_boxes(RAGGED)
    index, all_boxes = index_of(boxes), torch.cat(boxes)
    exact, _ = decode_stock(sam, start, boxes)
    with torch.autocast("cpu", dtype):
        stock, _ = decode_stock(sam, start, boxes)
        embeddings = start.clone().requires_grad_()
        logits, iou = PromptedSam(sam, mask_chunk=3).decode(embeddings, all_boxes, index)
    assert (logits - exact).norm() < 1.5 * (stock - exact).norm()
    (logits.float().sum() + iou.float().sum()).backward()
    assert embeddings.grad is not None and torch.isfinite(embeddings.grad).all()
    assert embeddings.grad.dtype == torch.float32 and embeddings.grad[[0, 2]].any()
    sam.zero_grad(set_to_none=True)


def test_fast_is_used_only_where_it_is_cheaper(sam: Sam) -> None:
    assert choose_decoder(sam.mask_decoder, "fast") is FAST  # 8 heads x 7 tokens < 64
    assert choose_decoder(sam.mask_decoder, "fast", num_tokens=8) is STOCK
    assert choose_decoder(sam.mask_decoder, "stock") is STOCK
    with pytest.raises(ValueError, match="'fast' or 'stock'"):
        choose_decoder(sam.mask_decoder, "quick")
