"""Prompts of many objects, embedded as stock's prompt encoder does it."""

from typing import Any

import pytest
import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from samft.models.prompts import DenseEmbedding, Prompts
from samft.models.sam import build_sam

SIZE = 64
BOXES = torch.tensor([[3.0, 4.5, 30.0, 39.0], [0.0, 0.0, 64.0, 64.0], [9.0, 9.0, 9.0, 9.0]])
POINTS = torch.tensor([[[1.0, 2.0], [60.25, 3.0]], [[5.5, 64.0], [0.0, 0.0]], [[7.0, 7.0]] * 2])
LABELS = torch.tensor([[1, 0], [0, -1], [-1, -1]])
MASKS = torch.linspace(-20, 20, 3 * 16 * 16).reshape(3, 16, 16)
GIVEN: dict[str, dict[str, Any]] = {
    "box": {"boxes": BOXES},
    "points": {"points": POINTS, "labels": LABELS},
    "box and points": {"boxes": BOXES, "points": POINTS, "labels": LABELS},
    "mask": {"masks": MASKS},
    "box and mask": {"boxes": BOXES, "masks": MASKS},
    "all": {"boxes": BOXES, "points": POINTS, "labels": LABELS, "masks": MASKS},
}


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    torch.manual_seed(3)
    return build_sam("vit_tiny", SIZE).prompt_encoder


def embed_ours(encoder: PromptEncoder, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """As stock's, from the parts that a decoder takes."""
    embedded = Prompts(**given).embed(encoder)
    with_masks = embedded.mask_features is not None
    no_mask, matrix = DenseEmbedding.of(encoder, all_masked=with_masks)
    if embedded.mask_features is None:
        shape = (len(embedded.sparse), -1, *encoder.image_embedding_size)
        return embedded.sparse, no_mask[None, :, None, None].expand(shape)
    features = torch.cat([embedded.mask_features, torch.ones(3, 1, 4, 4)], 1)
    masks = torch.einsum("cf,mfhw->mchw", matrix, features)
    return embedded.sparse, no_mask[:, None, None] + masks


def embed_stock(encoder: PromptEncoder, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    points = (given["points"], given["labels"]) if "points" in given else None
    masks = given["masks"][:, None] if "masks" in given else None
    return encoder(points=points, boxes=given.get("boxes"), masks=masks)


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("autocast", [False, True])
def test_embeddings_are_those_of_stock_to_the_bit(
    encoder: PromptEncoder, kind: str, autocast: bool
) -> None:
    given = GIVEN[kind]
    sparse, _ = embed_stock(encoder, given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embedded = Prompts(**given).embed(encoder)
    assert torch.equal(embedded.sparse, sparse)
    if "masks" in given:
        features = encoder.mask_downscaling[:-1](given["masks"][:, None])
        assert embedded.mask_features is not None
        assert torch.equal(embedded.mask_features, features)
    else:
        assert embedded.mask_features is None


@pytest.mark.parametrize("kind", GIVEN)
def test_what_is_added_to_image_embeddings_is_what_stock_adds(
    encoder: PromptEncoder, kind: str
) -> None:
    (_, stock), (_, ours) = embed_stock(encoder, GIVEN[kind]), embed_ours(encoder, GIVEN[kind])
    assert stock.abs().max() > 0.1
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", GIVEN)
def test_gradients_are_those_of_stock(encoder: PromptEncoder, kind: str) -> None:
    given, gradients = GIVEN[kind], []
    for embedded in (embed_stock(encoder, given), embed_ours(encoder, given)):
        encoder.zero_grad(set_to_none=True)
        weighted = [t * torch.linspace(-1, 2, t.numel()).view(t.shape) for t in embedded]
        sum(tensor.sum() for tensor in weighted).backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    stock, ours = gradients
    assert set(ours) == set(stock) and (len(ours) > 0)
    for name, gradient in stock.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-4)


class OperationNames(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_gpu_need_not_tell_how_many_points_there_are_of_a_label(encoder: PromptEncoder) -> None:
    waits = {"nonzero", "index", "index_put", "index_put_", "item", "_local_scalar_dense"}
    with OperationNames() as operations:
        embed_stock(encoder, GIVEN["all"])
    assert operations.names & waits
    with OperationNames() as operations:
        Prompts(**GIVEN["all"]).embed(encoder)
    assert not operations.names & waits


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_labels_of_any_type(encoder: PromptEncoder, dtype: torch.dtype) -> None:
    labels = torch.tensor([[1, 0], [0, 1], [1, 1]])
    expected, _ = embed_stock(encoder, {"points": POINTS, "labels": labels})
    embedded = Prompts(points=POINTS, labels=labels.to(dtype)).embed(encoder)
    assert torch.equal(embedded.sparse, expected)


def test_masks_of_another_resolution_are_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(ValueError, match=r"\[1, 64, 64\] as prompts: .* \[M, 16, 16\]"):
        Prompts(masks=torch.zeros(1, 64, 64)).embed(encoder)


def test_some_of_the_prompts(encoder: PromptEncoder) -> None:
    prompts = Prompts(**GIVEN["all"])
    assert len(prompts) == 3
    part = prompts.rows(slice(1, 9))
    assert len(part) == 2
    embedded, all_embedded = part.embed(encoder), prompts.embed(encoder).rows(slice(1, 3))
    for one, other in zip(embedded, all_embedded, strict=True):
        torch.testing.assert_close(one, other)
    assert len(Prompts(boxes=BOXES[:0])) == 0
    assert Prompts(boxes=BOXES[:0]).embed(encoder).sparse.shape == (0, 2, 128)
    moved = prompts.to(torch.device("meta"))
    assert {t.device.type for t in (moved.boxes, moved.points, moved.labels, moved.masks)} == {
        "meta"
    }


def test_points_are_added_after_those_that_there_are() -> None:
    first = Prompts(boxes=BOXES).add_points(POINTS, LABELS)
    assert first.boxes is BOXES and first.points is POINTS and first.labels is LABELS
    second = first.add_points(POINTS[:, :1] + 1, 1 - LABELS[:, 1:])
    assert second.points is not None and second.labels is not None
    assert torch.equal(second.points, torch.cat([POINTS, POINTS[:, :1] + 1], 1))
    assert second.labels.tolist() == [[1, 0, 1], [0, -1, 2], [-1, -1, 2]]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"points": POINTS},
        {"labels": LABELS},
        {"points": POINTS, "labels": LABELS[:, :1]},
        {"points": POINTS[:, 0], "labels": LABELS[:, 0]},
        {"boxes": BOXES[:, :2]},
        {"boxes": BOXES[0]},
        {"boxes": BOXES, "masks": MASKS[:2]},
        {"boxes": BOXES[:1], "points": POINTS, "labels": LABELS},
        {"masks": MASKS[:, None]},
        {"masks": MASKS[0]},
    ],
)
def test_shapes_that_do_not_fit_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="for the same M masks"):
        Prompts(**given)
