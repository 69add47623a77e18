"""PromptedSam gives what stock `Sam.forward` gives, for many images and boxes in one call."""

import math
import os
import weakref
from typing import Any

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from samft.models.chunked_loss import BYTES_PER_VALUE
from samft.models.prompted_sam import PromptedSam, inside_image
from samft.models.prompts import Prompts
from samft.models.sam import build_sam
from samft.runtime.device import deterministic_algorithms

slow = pytest.mark.skipif(not os.environ.get("SAMFT_SLOW"), reason="slow: set SAMFT_SLOW=1")


def padded(images: list[Tensor], size: int, *, filler: int = 0) -> Tensor:
    frames = torch.full((len(images), 3, size, size), filler, dtype=torch.uint8)
    for frame, image in zip(frames, images, strict=True):
        frame[:, : image.shape[1], : image.shape[2]] = image
    return frames


def boxes_in(sizes: list[tuple[int, int]], counts: list[int]) -> list[Tensor]:
    boxes = []
    for (height, width), count in zip(sizes, counts, strict=True):
        corners = torch.rand(count, 2, 2) * torch.tensor([width, height])
        boxes.append(torch.cat([corners.amin(1), corners.amax(1)], dim=1))
    return boxes


def compare_with_stock(sam: Sam, sizes: list[tuple[int, int]], counts: list[int]) -> None:
    size = sam.image_encoder.img_size
    images = [torch.randint(0, 256, (3, *hw), dtype=torch.uint8) for hw in sizes]
    boxes = boxes_in(sizes, counts)
    records: list[dict[str, Any]] = [
        {"image": image, "original_size": image.shape[1:], "boxes": box}
        for image, box in zip(images, boxes, strict=True)
    ]
    stock = sam(records, multimask_output=False)
    stock_logits = torch.cat([output["low_res_logits"][:, 0] for output in stock])
    stock_iou = torch.cat([output["iou_predictions"][:, 0] for output in stock])
    with torch.no_grad():
        logits, iou = PromptedSam(sam)(
            padded(images, size),
            torch.cat(boxes),
            torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts)),
            input_sizes=torch.tensor(sizes),
        )
    assert logits.shape == (sum(counts), size // 4, size // 4)
    torch.testing.assert_close(logits, stock_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iou, stock_iou, atol=1e-4, rtol=1e-4)
    assert stock_logits.std() > 1e-2  # or any two masks would be near each other


@pytest.fixture(scope="module")
def tiny() -> Sam:
    torch.manual_seed(3)
    return build_sam("vit_tiny", 64)


def test_same_as_stock_on_images_of_different_shapes(tiny: Sam) -> None:
    compare_with_stock(tiny, [(64, 47), (30, 64), (64, 64)], [3, 1, 2])


def test_points_beside_boxes_same_as_stock(tiny: Sam) -> None:
    sizes = [(64, 47), (30, 64)]
    images = [torch.randint(0, 256, (3, *hw), dtype=torch.uint8) for hw in sizes]
    boxes = boxes_in(sizes, [2, 1])
    points = [torch.tensor([[10.0, 20.5]]), torch.tensor([[3.0, 4.0], [60.25, 29.0]])]
    records: list[list[dict[str, Any]]] = []
    for image, own, clicked in zip(images, boxes, points, strict=True):
        frame = {"image": image, "original_size": image.shape[1:]}
        labels = torch.ones(len(clicked), 1)
        of_points = {"point_coords": clicked[:, None], "point_labels": labels}
        records.append([{**frame, "boxes": own}, {**frame, **of_points}])
    stock = [tiny(list(kind), multimask_output=False) for kind in zip(*records, strict=True)]
    logits, iou = (
        torch.cat([output[name][:, 0] for outputs in stock for output in outputs])
        for name in ("low_res_logits", "iou_predictions")
    )
    model = PromptedSam(tiny, mask_chunk=2)
    labels = torch.ones(3, 1, dtype=torch.int64)
    prompts = (
        Prompts(boxes=torch.cat(boxes)),
        Prompts(points=torch.cat(points)[:, None], labels=labels),
    )
    with torch.no_grad():
        embeddings = model.embed(padded(images, 64), torch.tensor(sizes))
        indices = (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
        decoded = [model.decode(embeddings, *own) for own in zip(prompts, indices, strict=True)]
    torch.testing.assert_close(torch.cat([d[0] for d in decoded]), logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([d[1] for d in decoded]), iou, atol=1e-4, rtol=1e-4)
    assert (logits[:3] - logits[3:]).abs().max() > 1e-2


def test_vit_b_at_256_same_as_stock() -> None:
    compare_with_stock(build_sam("vit_b", 256), [(256, 171), (200, 256)], [1, 3])


@slow
def test_vit_b_at_1024_same_as_stock() -> None:
    compare_with_stock(build_sam("vit_b", 1024), [(1024, 683), (768, 1024)], [1, 3])


def test_the_content_of_the_padding_makes_no_difference(tiny: Sam) -> None:
    images = [torch.randint(0, 256, (3, 40, 64), dtype=torch.uint8)]
    boxes, index = torch.tensor([[3.0, 4.0, 30.0, 39.0]]), torch.zeros(1, dtype=torch.int64)
    model = PromptedSam(tiny)
    with torch.no_grad():
        outputs = [
            model(padded(images, 64, filler=f), boxes, index, input_sizes=torch.tensor([[40, 64]]))
            for f in (0, 201)
        ]
        without_sizes, _ = model(padded(images, 64, filler=0), boxes, index)
    assert torch.equal(outputs[0][0], outputs[1][0])
    # Black pixels are not the zeros that SAM pads with.
    assert not torch.equal(outputs[0][0], without_sizes)


def test_preprocessing_is_sams_own(tiny: Sam) -> None:
    images = [torch.randint(0, 256, (3, 17, 64), dtype=torch.uint8)]
    model = PromptedSam(tiny)
    ours = model.preprocess(padded(images, 64, filler=9), torch.tensor([[17, 64]]))
    torch.testing.assert_close(ours[0], tiny.preprocess(images[0].float()), atol=1e-6, rtol=0)
    assert (ours[0, :, 17:] == 0).all()
    white = model.preprocess(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), None)
    expected = [(255 - 123.675) / 58.395, (255 - 116.28) / 57.12, (255 - 103.53) / 57.375]
    torch.testing.assert_close(white[0, :, 0, 63], torch.tensor(expected))


def test_floating_point_images_are_taken_as_preprocessed(tiny: Sam) -> None:
    model = PromptedSam(tiny)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    ready = model.preprocess(image, None)
    assert model.preprocess(ready, torch.tensor([[5, 5]])) is ready
    with torch.no_grad():
        assert torch.equal(model.embed(ready), model.embed(image))


def test_a_frozen_encoder_keeps_no_graph() -> None:
    model = PromptedSam(build_sam("vit_tiny", 64))
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert model.embed(image).requires_grad
    with torch.no_grad():
        assert not model.embed(image).requires_grad
    model.sam.image_encoder.requires_grad_(False)
    assert not model.embed(image).requires_grad
    logits, _ = model(image, torch.tensor([[1.0, 1, 9, 9]]), torch.zeros(1, dtype=torch.int64))
    assert logits.requires_grad
    model.sam.image_encoder.pos_embed.requires_grad_(True)
    assert model.embed(image).requires_grad


def test_sam_is_wrapped_without_copying(tiny: Sam) -> None:
    model = PromptedSam(tiny)
    assert model.sam is tiny
    assert list(model.state_dict()) == [f"sam.{name}" for name in tiny.state_dict()]


def test_inside_image_at_pixels_is_one_or_zero() -> None:
    inside = inside_image(torch.tensor([[2, 3]]), 4, 4)
    assert inside.tolist() == [[[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]]
    assert inside.dtype == torch.float32


def test_autocast_does_not_round_the_positions_of_boxes() -> None:
    sam = build_sam("vit_tiny", 1024)
    embedded: list[torch.Tensor] = []
    sam.mask_decoder.transformer.layers[0].self_attn.register_forward_pre_hook(
        lambda module, inputs: embedded.append(inputs[0][:, -2:].float())
    )
    model = PromptedSam(sam)
    embeddings = torch.zeros(1, 128, 64, 64)
    boxes, index = torch.tensor([[701.0, 703.0, 901.0, 903.0]]), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        model.decode(embeddings, Prompts(boxes=boxes), index)
        with torch.autocast("cpu", torch.bfloat16):
            model.decode(embeddings, Prompts(boxes=boxes), index)
    torch.testing.assert_close(embedded[1], embedded[0], rtol=0, atol=1e-6)


def test_the_dense_positions_are_computed_once_and_again_when_their_matrix_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = PromptedSam(build_sam("vit_tiny", 64))
    calls, compute = [], model._compute_dense_pe
    monkeypatch.setattr(model, "_compute_dense_pe", lambda: calls.append(1) or compute())
    embeddings, boxes = torch.randn(1, 128, 4, 4), torch.tensor([[8.0, 8, 40, 40]])
    index = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        first = model.decode(embeddings, Prompts(boxes=boxes), index)[0]
    model.decode(embeddings, Prompts(boxes=boxes), index)[0].sum().backward()
    assert len(calls) == 1
    state = model.sam.state_dict()
    name = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    model.sam.load_state_dict({**state, name: state[name] * 1.5})
    assert not torch.allclose(model.decode(embeddings, Prompts(boxes=boxes), index)[0], first)
    assert len(calls) == 2


@pytest.mark.parametrize("size", [64, 1024])
def test_the_dense_positions_are_those_of_stock(size: int) -> None:
    model = PromptedSam(build_sam("vit_tiny", size))
    assert torch.equal(model._dense_pe(), model.sam.prompt_encoder.get_dense_pe())


def test_an_encoder_that_is_unloaded_leaves_no_graphs_behind() -> None:
    model = PromptedSam(build_sam("vit_tiny", 64), cuda_graphs=True)
    graphs = weakref.ref(model.encoder_graphs)
    model.unload_encoder()
    assert graphs() is None and model.encoder_graphs is not None


def decoded_at_once(model: PromptedSam, **options: Any) -> list[int]:
    """The number of boxes in each chunk of a call with seven of them."""
    chunks: list[int] = []
    hypernetwork = model.sam.mask_decoder.output_hypernetworks_mlps[0]
    handle = hypernetwork.register_forward_pre_hook(lambda _, inputs: chunks.append(len(inputs[0])))
    boxes, index = torch.tensor([[8.0, 8, 40, 40]]).expand(7, -1), torch.zeros(7, dtype=torch.int64)
    with torch.no_grad():
        model.decode(torch.zeros(1, 128, 4, 4), Prompts(boxes=boxes), index, **options)
    handle.remove()
    return chunks


def test_the_chunk_can_be_set_at_any_time_and_for_one_call() -> None:
    model = PromptedSam(build_sam("vit_tiny", 64))
    assert decoded_at_once(model) == [7]  # of up to 64
    assert model.mask_chunk is None and model.boxes_at_once() == 64
    assert decoded_at_once(model, mask_chunk=5) == [5, 2]
    assert model.mask_chunk is None and model.boxes_at_once() == 64
    model.mask_chunk = 3
    assert decoded_at_once(model) == [3, 3, 1]
    assert decoded_at_once(model, mask_chunk=4) == [4, 3]


@pytest.mark.parametrize("count", [1, 3])
def test_an_image_is_named_for_each_prompt(tiny: Sam, count: int) -> None:
    index, boxes = torch.zeros(2, dtype=torch.int64), torch.tensor([[8.0, 8, 40, 40]] * count)
    with pytest.raises(ValueError, match=f"{count} prompts with the images of 2"):
        PromptedSam(tiny).decode(torch.zeros(1, 128, 4, 4), Prompts(boxes), index)


def test_masks_are_embedded_a_chunk_at_a_time_and_boxes_at_once() -> None:
    model = PromptedSam(build_sam("vit_tiny", 64), mask_chunk=3)
    chunks: list[int] = []
    encoder, index = model.sam.prompt_encoder, torch.zeros(7, dtype=torch.int64)
    note = lambda _, inputs: chunks.append(len(inputs[0]))  # noqa: E731
    encoder.mask_downscaling[0].register_forward_pre_hook(note)
    encoder.register_forward_pre_hook(lambda *_: chunks.append(0))
    boxes = torch.tensor([[8.0, 8, 40, 40]]).expand(7, -1)
    masks = torch.randn(7, 16, 16)
    for multimask in (False, True):
        model.decode(torch.zeros(1, 128, 4, 4), Prompts(masks=masks), index, multimask=multimask)
    assert chunks == [3, 3, 1] * 2
    chunks.clear()
    logits, _ = model.decode(torch.zeros(1, 128, 4, 4), Prompts(boxes, masks=masks), index)
    assert chunks == [0, 3, 3, 1]
    logits.sum().backward()  # which decodes each chunk once more
    assert sorted(chunks) == [0, 1, 1, 3, 3, 3, 3]
    weight = encoder.mask_downscaling[0].weight
    assert weight.grad is not None and weight.grad.abs().max() > 0
    chunks.clear()
    model.decode(torch.zeros(1, 128, 4, 4), Prompts(boxes), index)
    assert chunks == [0]  # the prompt encoder itself, for all boxes


def test_the_automatic_chunk_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PromptedSam(build_sam("vit_tiny", 64))
    assert model.boxes_at_once() == 64
    monkeypatch.setattr("samft.models.prompted_sam.free_memory_bytes", lambda device: 0.0)
    assert model.boxes_at_once() == 64
    assert PromptedSam(model.sam).boxes_at_once() == 1


def test_with_deterministic_algorithms_the_automatic_chunk_is_that_of_the_whole_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = PromptedSam(build_sam("vit_tiny", 64))
    box = BYTES_PER_VALUE * math.prod(model.embedding_shape)
    kept = 16 * sum(parameter.numel() for parameter in model.parameters())
    total = kept + 4 * 10 * box  # a quarter is for ten boxes
    monkeypatch.setattr("samft.models.prompted_sam.free_memory_bytes", lambda device: 0.0)
    monkeypatch.setattr("samft.models.prompted_sam.total_memory_bytes", lambda device: total)
    assert PromptedSam(model.sam).boxes_at_once() == 1
    with deterministic_algorithms(True):
        assert model.boxes_at_once() == 10
