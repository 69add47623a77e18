"""All boxes of all images in one call, against the stock decoder image by image."""

import copy

import pytest
import torch
from torch import Tensor

from samft.decoder import decode_boxes
from samft.sam import build_sam

from segment_anything.modeling import Sam

BOXES_PER_IMAGE = (3, 1)
SIZE = 64


@pytest.fixture(scope="module")
def sam() -> Sam:
    torch.manual_seed(1)
    return build_sam("vit_tiny", SIZE)


def some_boxes(count: int) -> Tensor:
    corners = torch.rand(count, 2, 2) * SIZE
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


def decode_ours(
    sam: Sam, embeddings: Tensor, boxes: list[Tensor], order: Tensor
) -> tuple[Tensor, Tensor]:
    image_index = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(b) for b in boxes]))
    sparse, _ = sam.prompt_encoder(points=None, boxes=torch.cat(boxes)[order], masks=None)
    return decode_boxes(
        sam.mask_decoder,
        embeddings,
        image_index=image_index[order],
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_embeddings=sparse,
        dense_embedding=sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1),
    )


def decode_stock(sam: Sam, embeddings: Tensor, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    logits, ious = [], []
    for embedding, box in zip(embeddings, boxes, strict=True):
        sparse, dense = sam.prompt_encoder(points=None, boxes=box, masks=None)
        low, iou = sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        logits.append(low[:, 0])
        ious.append(iou[:, 0])
    return torch.cat(logits), torch.cat(ious)


def test_same_numbers_as_the_stock_decoder_image_by_image(sam: Sam) -> None:
    embeddings = torch.randn(2, 128, 4, 4)
    boxes = [some_boxes(count) for count in BOXES_PER_IMAGE]
    straight, mixed = torch.arange(4), torch.tensor([2, 3, 0, 1])
    with torch.no_grad():
        stock_logits, stock_iou = decode_stock(sam, embeddings, boxes)
        for order in (straight, mixed):
            logits, iou = decode_ours(sam, embeddings, boxes, order)
            assert logits.shape == (4, SIZE // 4, SIZE // 4) and iou.shape == (4,)
            torch.testing.assert_close(logits, stock_logits[order], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(iou, stock_iou[order], atol=1e-5, rtol=1e-5)
    # The test would pass on anything if boxes or images made no difference.
    assert (stock_logits[0] - stock_logits[1]).abs().max() > 1e-3
    assert (stock_logits[0] - stock_logits[3]).abs().max() > 1e-3


def test_an_image_without_boxes_and_no_boxes_at_all(sam: Sam) -> None:
    embeddings = torch.randn(2, 128, 4, 4)
    boxes = [some_boxes(0), some_boxes(2)]
    with torch.no_grad():
        logits, iou = decode_ours(sam, embeddings, boxes, torch.arange(2))
        stock_logits, stock_iou = decode_stock(sam, embeddings[1:], boxes[1:])
        none, _ = decode_ours(sam, embeddings, [some_boxes(0)] * 2, torch.arange(0))
    torch.testing.assert_close(logits, stock_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(iou, stock_iou, atol=1e-5, rtol=1e-5)
    assert none.shape == (0, SIZE // 4, SIZE // 4)


def test_same_gradients_as_the_stock_decoder(sam: Sam) -> None:
    boxes = [some_boxes(count) for count in BOXES_PER_IMAGE]
    start = torch.randn(2, 128, 4, 4)
    weights = torch.randn(4, SIZE // 4, SIZE // 4)
    gradients = []
    for ours in (True, False):
        model, embeddings = copy.deepcopy(sam), start.clone().requires_grad_()
        if ours:
            logits, iou = decode_ours(model, embeddings, boxes, torch.arange(4))
        else:
            logits, iou = decode_stock(model, embeddings, boxes)
        ((logits * weights).sum() + iou.square().sum()).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append({**found, "embeddings": embeddings.grad})
    mine, stock = gradients
    idle = {f"mask_decoder.output_hypernetworks_mlps.{number}." for number in (1, 2, 3)}
    # The stock decoder computes the other three masks and drops them: zeros instead of nothing.
    dropped = set(stock) - set(mine)
    assert {name[: name.index(".layers") + 1] for name in dropped} == idle
    assert all(not stock[name].any() for name in dropped)
    assert set(mine) < set(stock) and len(mine) > 80
    for name in mine:
        scale = stock[name].abs().max().item()
        torch.testing.assert_close(mine[name], stock[name], atol=1e-5 * (1 + scale), rtol=1e-5)
