"""Clicks where a mask is wrong, drawn on the device from uniform numbers that the dataset drew.

A mask is compared with its target on the grids where its loss is taken: the cells of the object's
window, and outside of it the decoder's own. Their centres are the places where a click can be. A
uniform number picks one among those that are wrong, in proportion to their area: it is a share of
the whole wrong area, which is counted cell by cell. Areas are whole numbers, so their sums are
exact: neither the order of additions, the device nor the other masks change the place. Nothing is
read on the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from samft.data.transforms import LOW_CELL
from samft.training.losses import (
    Geometry,
    Grids,
    cell_centres,
    mask_chunks,
    object_threshold,
    outer_product,
)

# The share of clicks that are in the object wherever the mask is wrong, as in SAM 2's training.
# Source: `prob_to_sample_from_gt_for_train` in the configurations of facebookresearch/sam2.
TRUTH_SHARE = 0.1
_UNITS = 2**20  # of area, in a square pixel: the smallest cells, of 1/16 x 1/16 px, have 4096


class Clicks(NamedTuple):
    """One click for each of M objects.

    Attributes:
        points: float32 [M, 2], x y in pixels of the model frame, as SAM takes points: those of a
            pixel are its numbers, and SAM adds one half to get to its centre.
        labels: int64 [M], 1 on the object, 0 beside it.
    """

    points: Tensor
    labels: Tensor


def first_clicks(
    draws: Tensor, *, targets: Tensor, windows: Tensor, image_index: Tensor, input_sizes: Tensor
) -> Clicks:
    """A click in each object, uniform over its area: where a mask of nothing is wrong.

    See `next_clicks` for the arguments.
    """
    return next_clicks(
        windows.new_zeros(len(windows), 1, 1),
        draws,
        targets=targets,
        windows=windows,
        image_index=image_index,
        input_sizes=input_sizes,
    )


def next_clicks(
    mask_logits: Tensor,
    draws: Tensor,
    *,
    targets: Tensor,
    windows: Tensor,
    image_index: Tensor,
    input_sizes: Tensor,
) -> Clicks:
    """A click for each mask where it is wrong, uniform over the wrong area.

    Where a mask covers what is not object, the click is negative, else positive. One click in ten,
    and that of a mask without a mistake, is anywhere in the object, and positive.

    Args:
        mask_logits: float [M, s, s'], in cells of 4 x 4 px; a cell is mask where they are above 0,
            and in the window where they are so when interpolated at its centre.
        draws: float32 [M, 2], uniform in 0..1 (below 1): the place, and whether it is anywhere in
            the object.
        targets: uint8 [M, G, G], as in `mask_losses`, which says which cells are object.
        windows: float32 [M, 4], x0 y0 x1 y1 in pixels of the model frame.
        image_index: int64 [M], the image of each object.
        input_sizes: int [N, 2], height and width of each image inside the frame; no click is in
            the padding.

    Returns:
        The clicks. That of an object without a cell is in the middle of its window.
    """
    extents = input_sizes[image_index].to(windows.dtype)
    clicks = [
        _clicks_of(mask_logits[rows], draws[rows], targets[rows], windows[rows], extents[rows])
        for rows in mask_chunks(mask_logits, targets)
    ]
    if not clicks:
        return Clicks(windows.new_zeros(0, 2), image_index.new_zeros(0))
    points, labels = zip(*clicks, strict=True)
    return Clicks(torch.cat(points), torch.cat(labels))


def _clicks_of(
    mask_logits: Tensor, draws: Tensor, targets: Tensor, windows: Tensor, extents: Tensor
) -> Clicks:
    """`next_clicks` for a few masks; `extents` is [m, 2], height and width of each one's image."""
    size = targets.shape[-1]
    geometry = Geometry.from_windows(windows, extents, size, *mask_logits.shape[1:])
    grids = Grids(mask_logits, targets, geometry)
    shares = grids.window_targets()
    truth = shares >= object_threshold(shares)
    window, around = _window_places(geometry, extents), _places_around(grids, windows, extents)
    wrong = window.areas * (truth ^ (grids.window_logits() > 0))
    wrong_around = around.areas * (mask_logits > 0)

    is_right = wrong.sum((1, 2)) + wrong_around.sum((1, 2)) == 0
    in_truth = is_right | (draws[:, 1] < TRUTH_SHARE)
    areas = torch.where(in_truth[:, None, None], window.areas * truth, wrong)
    areas_around = wrong_around * ~in_truth[:, None, None]
    place, total = _pick(torch.cat([areas.flatten(1), areas_around.flatten(1)], 1), draws[:, 0])

    in_window, first_around = place < size**2, place.clamp(max=size**2 - 1)
    centres = torch.where(
        in_window[:, None],
        window.centres_of(first_around),
        around.centres_of((place - size**2).clamp(min=0)),
    )
    middle = ((windows[:, :2] + windows[:, 2:]) / 2).clamp(min=0).minimum(extents.flip(1))
    centres = torch.where(total[:, None] > 0, centres, middle)
    on_object = truth.flatten(1).gather(1, first_around[:, None])[:, 0] & in_window
    return Clicks(centres.float() - 0.5, (on_object | in_truth).long())


class _Places(NamedTuple):
    """The cells of a grid for each of m masks, at whose centres clicks can be.

    Attributes:
        areas: int64 [m, g, g'], in units; 0 where no click can be.
        centres: [m, 2, n], of rows and columns, px; n is the larger of g and g'.
    """

    areas: Tensor
    centres: Tensor

    def centres_of(self, cells: Tensor) -> Tensor:
        """The centres, x y, of one cell for each mask, given by its number: [m, 2]."""
        width = self.areas.shape[-1]
        along = torch.stack([cells // width, cells % width], 1)[..., None]
        return self.centres.gather(2, along)[..., 0].flip(1)


def _window_places(geometry: Geometry, extents: Tensor) -> _Places:
    centres = cell_centres(geometry.start, geometry.cell, geometry.inside.shape[-1])
    areas = outer_product(geometry.inside * _are_between(centres, 0 * extents, extents))
    return _Places(_in_units(areas), centres)


def _places_around(grids: Grids, windows: Tensor, extents: Tensor) -> _Places:
    logits, areas = grids.surroundings()
    zeros, cells = torch.zeros_like(extents), logits.shape[1:]
    centres = cell_centres(zeros, zeros + LOW_CELL, max(cells))
    start, end = windows.reshape(-1, 2, 2).flip(2).unbind(1)
    in_image = outer_product(_are_between(centres, zeros, extents), *cells)
    in_window = outer_product(_are_between(centres, start, end), *cells)
    return _Places(_in_units(areas * (in_image & ~in_window)), centres)


def _are_between(centres: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (centres >= low[..., None]) & (centres < high[..., None])


def _in_units(areas: Tensor) -> Tensor:
    return (areas.double() * _UNITS).round().long()


def _pick(areas: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The cell [m] in which a share of the area lies, of areas [m, n]; and all the area [m]."""
    cumulative = areas.cumsum(1)  # of whole numbers, which has a deterministic kernel on a GPU
    total = cumulative[:, -1]
    share = (draws.double() * total).long()  # 0 .. total - 1
    place = torch.searchsorted(cumulative, share[:, None], right=True)[:, 0]
    return place.clamp(max=areas.shape[1] - 1), total
