"""Losses and clicks on masks that are not square: those of the square around, in the image."""

import pytest
import torch
from torch import Tensor

from samft.training.clicks import next_clicks
from samft.training.losses import mask_losses

LOW, ROWS = 32, 20  # cells of the square, and of the rectangle's shorter side
EXTENTS = torch.tensor([[78, 128], [80, 101]])  # images that fill the rectangle nearly, or quite


def masks_of(portrait: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of the rectangle; of the square with the outermost ones repeated; and the rest."""
    torch.manual_seed(3)
    part = torch.randn(3, ROWS, LOW)
    windows = torch.tensor([[5.0, 50, 60, 90], [-3, 1, 30, 40], [90, 60, 140, 100]])
    targets = (torch.rand(3, 16, 16) * 255).to(torch.uint8)
    extents, index = EXTENTS, torch.tensor([0, 1, 0])
    if portrait:
        part, targets = part.transpose(1, 2).contiguous(), targets.transpose(1, 2).contiguous()
        windows, extents = windows[:, [1, 0, 3, 2]], extents.flip(1)
    rows, columns = (torch.arange(LOW).clamp(max=n - 1) for n in part.shape[1:])
    whole = part[:, rows][:, :, columns]
    rest = {"targets": targets, "windows": windows, "image_index": index, "input_sizes": extents}
    return part, whole, rest


@pytest.mark.parametrize("portrait", [False, True])
def test_losses_are_those_of_the_square(portrait: bool) -> None:
    part, whole, rest = masks_of(portrait)
    iou = torch.full((3,), 0.5)
    gradients = []
    for logits in (part, whole):
        logits.requires_grad_(True)
        losses = mask_losses(logits, iou, **rest)
        losses.total.sum().backward()
        gradients.append(logits.grad)
        gradients.append(torch.stack([*losses]).detach())
    of_part, own, of_whole, expected = gradients
    torch.testing.assert_close(own, expected)
    # The repeated logits are the outermost one: their gradients add up to its own.
    rows, columns = part.shape[1:]
    of_whole = torch.cat([of_whole[:, : rows - 1], of_whole[:, rows - 1 :].sum(1, True)], 1)
    folded = of_whole[..., columns - 1 :].sum(2, True)
    torch.testing.assert_close(of_part, torch.cat([of_whole[..., : columns - 1], folded], 2))


@pytest.mark.parametrize("portrait", [False, True])
def test_clicks_are_those_of_the_square(portrait: bool) -> None:
    part, whole, rest = masks_of(portrait)
    for seed in range(20):
        draws = torch.rand(3, 2, generator=torch.Generator().manual_seed(seed))
        own, other = (next_clicks(logits, draws, **rest) for logits in (part, whole))
        assert torch.equal(own.points, other.points) and torch.equal(own.labels, other.labels)
