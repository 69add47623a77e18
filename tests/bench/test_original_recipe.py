"""The original tool's recipe has its loss, its schedule and its geometry."""

import itertools

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from benchmarks import original_recipe
from benchmarks.original_recipe import (
    OriginalSamples,
    draw_batches,
    learning_rate_factor,
    original_iou,
    original_losses,
    squash_masks,
    train_original,
    unpack_masks,
)
from helpers.coco_files import write_coco
from samft.annotations.segmentation import CroppedMask
from samft.coco.subset import read_coco
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.models.trainable import freeze


def test_loss_is_the_sum_of_three_parts_over_the_whole_square() -> None:
    mask_logits = torch.randn(3, 4, 4)
    masks = (torch.rand(3, 16, 16) > 0.5).float()
    iou_predicted = torch.rand(3)
    logits = F.interpolate(mask_logits[:, None], (16, 16), mode="bilinear")[:, 0]
    focal = sigmoid_focal_loss(logits, masks, alpha=0.25, gamma=2.0).flatten(1).mean(1)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * masks).sum((1, 2)) + 1) / (p.sum((1, 2)) + masks.sum((1, 2)) + 1)
    iou = (iou_predicted - original_iou(logits, masks)) ** 2
    actual = original_losses(mask_logits, iou_predicted, masks)
    torch.testing.assert_close(actual, 20 * focal + dice + iou)


def test_loss_of_flat_logits_in_closed_form() -> None:
    masks = torch.ones(1, 8, 8)
    masks[:, :, :2] = 0  # 48 of 64 pixels
    # p = 1/2: the focal loss of a pixel is alpha_t / 4 * log 2, with alpha 1/4 where there is mask.
    focal = 0.25 * np.log(2) * (0.75 * 0.25 + 0.25 * 0.75)
    dice = 1 - (2 * 24 + 1) / (32 + 48 + 1)
    actual = original_losses(torch.zeros(1, 2, 2), torch.tensor([0.3]), masks)
    assert actual.item() == pytest.approx(20 * focal + dice + 0.3**2)  # no logit reaches .5: IoU 0


def test_iou_takes_logits_of_a_half_for_mask() -> None:
    logits = torch.tensor([[[0.5, 0.49, -1.0, 2.0]], [[0.0, 0.0, 0.0, 0.0]]])
    masks = torch.tensor([[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    assert original_iou(logits, masks).tolist() == pytest.approx([1 / 3, 1.0])


def test_schedule_warms_up_for_250_steps_whatever_the_number_of_steps() -> None:
    def factors(steps: int, *at: int) -> list[float]:
        return [learning_rate_factor(step, steps=steps) for step in at]

    assert factors(1500, 0, 124, 249, 250, 1000) == [1 / 250, 0.5, 1, 1, 1]
    # 1000.005 and 1299.99 are the milestones of 1500.
    assert factors(1500, 1001, 1299, 1300) == pytest.approx([0.1, 0.1, 0.01])
    assert factors(300, 199, 201, 249) == [200 / 250, 202 / 250, 1]  # the milestone is hidden
    assert factors(300, 250, 259, 260) == pytest.approx([0.1, 0.1, 0.01])
    assert factors(100, 0, 99) == [1 / 250, 100 / 250]


def test_masks_are_resized_bilinearly_and_thresholded_above_a_half() -> None:
    whole = np.zeros((30, 50), np.uint8)
    cv2.ellipse(whole, (22, 14), (13, 8), 20, 0, 360, 1, -1)
    truth = CroppedMask(3, 5, whole[3:27, 5:40].astype(bool))
    (squashed,) = squash_masks([truth], (30, 50), 16)
    expected = cv2.resize(whole.astype(np.float64), (16, 16), interpolation=cv2.INTER_LINEAR) > 0.5
    assert squashed.tolist() == expected.tolist()
    # At the same size nothing changes; of a mask that covers half of each cell, nothing is left.
    assert squash_masks([truth], (30, 50), 30)[0, :, 0].sum() == 0
    half = CroppedMask(0, 0, np.ones((16, 1), dtype=bool))
    assert squash_masks([half], (16, 2), 1).tolist() == [[[False]]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> OriginalSamples:
    path = write_coco(tmp_path_factory.mktemp("original"), 5)
    return OriginalSamples(read_coco(path, path.parent), image_size=64)


def test_images_and_boxes_are_squashed(samples: OriginalSamples) -> None:
    sample, subset = samples.sample(0), samples.dataset.subset
    height, width = sample.original_size
    assert (height, width) == (48, 64) and sample.input_size == (64, 64)
    with Image.open(subset.path(0)) as file:
        expected = np.asarray(file.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
    assert (sample.image.permute(1, 2, 0).numpy() == expected).all()
    boxes = subset.index.boxes[subset.objects_of(0)] * [1, 64 / 48, 1, 64 / 48]
    np.testing.assert_allclose(sample.boxes.numpy(), boxes, rtol=1e-6)
    masks = unpack_masks(sample)
    assert masks.shape == (len(boxes), 64, 64) and set(masks.unique().tolist()) == {0, 1}
    for mask, box in zip(masks, sample.boxes.tolist(), strict=True):
        y, x = mask.nonzero().T
        assert np.abs(np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) - box).max() < 2.5


def test_an_epoch_ends_with_a_smaller_batch() -> None:
    batches = list(itertools.islice(draw_batches(5, 2, seed=0), 6))
    assert [len(batch) for batch in batches] == [2, 2, 1] * 2
    first, second = (sum(batches[start : start + 3], []) for start in (0, 3))
    assert sorted(first) == sorted(second) == list(range(5)) and first != second


@pytest.mark.parametrize("frozen", [["image_encoder"], []])
def test_one_step_is_adamw_with_decay_on_everything(
    frozen: list[str], samples: OriginalSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(original_recipe, "LEARNING_RATE", 0.25)
    monkeypatch.setattr(original_recipe, "WEIGHT_DECAY", 100.0)
    samples.samples.clear()
    model = PromptedSam(build_sam("vit_tiny", 64))
    freeze(model.sam, frozen)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_original(model, samples, steps=1, batch_size=4, seed=0)
    after = dict(model.named_parameters())
    # AdamW's first step has the size of the rate, .25 / 250, whatever the gradient; the decay, a
    # tenth of the value, comes on top, also of norms and biases. A clipped gradient or another
    # number of masks would change neither.
    trained = ["mask_decoder.transformer.norm_final_attn.weight", "mask_decoder.mask_tokens.weight"]
    trained += (
        [] if frozen else ["image_encoder.neck.1.weight", "image_encoder.patch_embed.proj.bias"]
    )
    for name in (f"sam.{part}" for part in trained):
        moved = after[name].detach() - 0.9 * before[name]
        assert moved[:1].abs().median().item() == pytest.approx(1e-3, rel=0.02), name
    encoder = "sam.image_encoder.neck.1.weight"
    assert torch.equal(after[encoder], before[encoder]) == bool(frozen)


def test_embeddings_are_kept_of_a_frozen_encoder_only(samples: OriginalSamples) -> None:
    model = PromptedSam(build_sam("vit_tiny", 64))
    samples.samples.clear()
    freeze(model.sam, [])
    assert samples.embed(model, 1).requires_grad
    assert samples.sample(1).embedding is None
    freeze(model.sam, ["image_encoder"])
    first = samples.embed(model, 1)
    assert samples.embed(model, 1) is first and not first.requires_grad
    samples.samples.clear()  # of this encoder
