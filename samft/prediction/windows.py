"""Masks of images that are seen through windows: prompts by window, masks back in their image.

Windows are read and prepared ahead in threads, as images are; memory does not grow with the image.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.annotations.segmentation import decode_encoded
from samft.evaluation.tiled_masks import generate_in_tiles
from samft.images.files import ImageError
from samft.images.orientation import UPRIGHT
from samft.images.pixels import PLAIN, PixelFormat
from samft.prediction.points import MAX_OVERHANG, PointPrompt
from samft.prediction.predictors import (
    AutomaticPredictor,
    Finished,
    PredictedMask,
    Predictor,
    PreparedImage,
    explain_memory,
    predict_ahead,
)
from samft.runtime.logs import progress_bar
from samft.views.mapping import boxes_to_window, points_to_window
from samft.views.regions import ImageSource, open_source
from samft.views.windows import (
    View,
    WindowObjects,
    best_windows,
    held_shares,
    list_windows,
    view_objects,
)

_BAR_DELAY = 2.0  # seconds that an image may take before it gets a bar of its own

Prompts = NDArray[np.float64] | Sequence[PointPrompt]  # see `PredictionTask.prompts_of`


@dataclass(frozen=True)
class WindowedImage:
    """An image that is never in memory as a whole; see `PreparedImage`."""

    source: ImageSource

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the file, px."""
        return self.source.size


def predict_through_windows(
    predictor: Predictor,
    images: Sequence[tuple[Path, Any]],
    finish: Callable[[int, WindowedImage, Iterator[PredictedMask]], Finished],
    *,
    view: View,
    num_workers: int,
    orientations: Sequence[int] | None = None,
    pixels: PixelFormat = PLAIN,
) -> Iterator[Finished | ImageError]:
    """Predicts on image after image, window after window; see `predict_images`.

    Args:
        predictor: Predicts the masks of one window.
        images: See `predict_images`.
        finish: See there; the masks are not in the order of the prompts, see `predict_windows`.
        view: How images are seen. Automatic masks are those of its tiles.
        num_workers: See `predict_images`.
        orientations: See `predict_images`.
        pixels: See `predict_images`.

    Yields:
        See `predict_images`.

    Raises:
        TrainingError: There is not enough memory for an image.
    """
    for k, (path, prompts) in enumerate(images):
        orientation = UPRIGHT if orientations is None else orientations[k]
        try:
            source = open_source(path, orientation=orientation, pixels=pixels)
            if isinstance(predictor, AutomaticPredictor):
                masks = _predict_tiles(predictor, source, view)
            else:
                masks = predict_windows(
                    predictor, source, prompts, view=view, num_workers=num_workers
                )
            yield finish(k, WindowedImage(source), explain_memory(masks, path, len(prompts)))
        except ImageError as error:
            yield error


def predict_windows(
    predictor: Predictor, source: ImageSource, prompts: Prompts, *, view: View, num_workers: int
) -> Iterator[PredictedMask]:
    """The masks of the prompts of one image, each seen through one window.

    Args:
        predictor: Takes the prompts.
        source: The image.
        prompts: Boxes [K, 4] or K objects with points, px of the image.
        view: How it is seen.
        num_workers: Threads.

    Yields:
        Window by window, so not in the order of the prompts; `number` says whose each mask is.

    Raises:
        ImageError: A part of the file is damaged.
    """
    seen = group_prompts(prompts, source.size, view)
    first = np.cumsum([0, *seen.counts])

    def prepare(k: int) -> PreparedImage:
        return predictor.prepare(source.read(seen.windows[k]))

    def complete(k: int, prepared: PreparedImage) -> list[PredictedMask]:
        window, numbers = seen.windows[k], seen.objects[first[k] : first[k + 1]].tolist()
        masks = predictor.predict(prepared, prompts_to_window(prompts, numbers, window))
        return [
            _to_image(mask, window, prompts[number], number)
            for number, mask in zip(numbers, masks, strict=True)
        ]

    indices = range(len(seen.windows))
    results = predict_ahead(predictor, indices, prepare, complete, num_workers=num_workers)
    for masks in _with_bar(results, total=len(indices)):
        yield from masks


def _with_bar(items: Iterable[Any], *, total: int) -> Iterable[Any]:
    return progress_bar(
        items, total=total, unit="window", desc="this image", leave=False, delay=_BAR_DELAY
    )


def group_prompts(prompts: Prompts, size: tuple[int, int], view: View) -> WindowObjects:
    """The window that each prompt is seen through, as validation chooses it for a box.

    An object with points is where its box and its points are. If that is more than a window holds,
    and neither the box nor, without one, a point of the object is in the window, it is where its
    box is, or its first point.

    Args:
        prompts: See `predict_windows`.
        size: H, W of the image, px.
        view: How it is seen.
    """
    extents = np.array([_extent_of(one) for one in prompts], dtype=np.float64).reshape(-1, 4)
    if isinstance(prompts, np.ndarray) or view.kind != "tiles" or not len(prompts):
        return view_objects(extents, size, view)
    windows = list_windows(extents, size, view)
    chosen = windows[best_windows(extents, windows)]
    for k, one in enumerate(prompts):
        if not _is_seen(one, chosen[k]):
            extents[k] = one.box if one.has_box else np.tile(_points_of_object(one)[0], 2)
    return view_objects(extents, size, view)


def _points_of_object(prompt: PointPrompt) -> NDArray[np.float64]:
    own = prompt.points[prompt.points[:, 2] == 1, :2]
    return own if len(own) or prompt.has_box else prompt.points[:, :2]


def _extent_of(prompt: NDArray[np.float64] | PointPrompt) -> NDArray[np.float64]:
    if not isinstance(prompt, PointPrompt):
        return prompt
    corners = _points_of_object(prompt)
    if prompt.has_box:
        corners = np.concatenate([corners, prompt.box.reshape(2, 2)])
    return np.concatenate([corners.min(axis=0), corners.max(axis=0)])


def _are_inside(points: NDArray[np.float64], window: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray(((points >= window[:2]) & (points < window[2:])).all(axis=1))


def _is_seen(prompt: PointPrompt, window: NDArray[np.int64]) -> bool:
    if prompt.has_box:
        return bool(held_shares(prompt.box, window[None])[0, 0] > 0)
    return bool(_are_inside(_points_of_object(prompt), window).any())


def prompts_to_window(prompts: Prompts, numbers: list[int], window: NDArray[np.int64]) -> Any:
    """Some of the prompts in px of a window [4]: boxes cut at its edges, and points inside."""
    if isinstance(prompts, np.ndarray):
        return boxes_to_window(prompts[numbers], window)
    return [_point_prompt_to_window(prompts[number], window) for number in numbers]


def _point_prompt_to_window(prompt: PointPrompt, window: NDArray[np.int64]) -> PointPrompt:
    points = prompt.points[_are_inside(prompt.points[:, :2], window)]
    points[:, :2] = points_to_window(points[:, :2], window)
    box = boxes_to_window(prompt.box, window)[0] if prompt.has_box else prompt.box
    return PointPrompt(points, box)


def reaches_beyond(prompt: NDArray[np.float64] | PointPrompt, window: NDArray[np.int64]) -> bool:
    """Whether a window [4] shows a part only of the object that a box [4], or points, are about.

    The mask ends at the edge of the window, then, and points beyond it are not used. Points of
    something else say nothing of the object: where they are out of sight, nothing is lost.
    """
    if isinstance(prompt, PointPrompt):
        own = prompt.points[prompt.points[:, 2] == 1, :2]
        if not _are_inside(own, window).all():
            return True
        prompt = prompt.box
    low, high = prompt[:2] < window[:2] - MAX_OVERHANG, prompt[2:] > window[2:] + MAX_OVERHANG
    return bool(low.any() or high.any())  # not of NaN, where there is no box


def _to_image(
    predicted: PredictedMask,
    window: NDArray[np.int64],
    prompt: NDArray[np.float64] | PointPrompt,
    number: int,
) -> PredictedMask:
    left, top = window[:2].tolist()
    box: Sequence[float]
    if not isinstance(prompt, PointPrompt):
        box = prompt.tolist()
    elif prompt.has_box:
        box = prompt.box.tolist()
    elif predicted.mask.mask.any():
        box = (np.array(predicted.box_original) + [left, top, left, top]).tolist()
    else:
        box = predicted.box_original
    crop = predicted.mask
    mask = replace(crop, top=top + crop.top, left=left + crop.left)
    is_cut = reaches_beyond(prompt, window)
    return replace(predicted, mask=mask, box_original=box, number=number, is_cut=is_cut)


def _predict_tiles(
    predictor: AutomaticPredictor, source: ImageSource, view: View
) -> Iterator[PredictedMask]:
    def follow(tiles: NDArray[np.int64]) -> Iterable[Any]:
        return _with_bar(tiles, total=len(tiles))

    predictor.generator.show_progress = False  # a bar of tiles suffices
    masks = generate_in_tiles(predictor.generator, source, view, follow=follow)
    for number, one in enumerate(masks):
        extra = {"stability_score": one.stability_score}
        mask = decode_encoded(one.rle)
        yield PredictedMask(mask, one.box, one.iou_predicted, extra, number)
