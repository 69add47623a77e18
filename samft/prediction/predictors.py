"""Masks without prompts: stock's generator, also where torchvision lacks its operators.

From images to masks: one encoder pass an image, all of its boxes after it, images read ahead.

A way to predict (`BoxPredictor`, `AutomaticPredictor`) has two halves: `prepare` for a thread that
reads ahead, and `predict` for the device, which on a CPU may do two images side by side.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamAutomaticMaskGenerator, automatic_mask_generator
from segment_anything.modeling import Sam
from torch import Tensor

from samft.coco.images import ImageError, read_image
from samft.coco.segmentation import CroppedMask, decode_cropped
from samft.data.transforms import Frame, boxes_to_input, make_frame, resize_image
from samft.errors import TrainingError
from samft.evaluation.validation import MASK_CHUNK
from samft.models.prompted_sam import PromptedSam, original_masks
from samft.runtime.torchvision_compat import LIBRARY

_POINTS = 64  # decoded at once, as is stock's default
_PIXELS = 1024 * 1024  # of an image that they are decoded at once for


def build_mask_generator(sam: Sam, **options: Any) -> SamAutomaticMaskGenerator:
    """The stock generator, with run lengths as its output.

    Args:
        sam: The model, at any image size.
        options: Of `SamAutomaticMaskGenerator`: `points_per_side`, `pred_iou_thresh`, ...
    """
    if LIBRARY is not None:  # torchvision's own operators did not load, see `torchvision_compat`
        automatic_mask_generator.batched_nms = _one_class_nms
    return SamAutomaticMaskGenerator(sam, output_mode="uncompressed_rle", **options)


def points_at_once(size: tuple[int, int]) -> int:
    """How many points to decode at once, so that memory does not grow with the image.

    The generator holds three masks a point at the image's own resolution. What it finds does not
    depend on this number.

    Args:
        size: H, W of the image, px.
    """
    return max(1, min(_POINTS, _POINTS * _PIXELS // (size[0] * size[1])))


def non_maximum_suppression(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes to keep: from the best score on, those that no kept one overlaps too much.

    Args:
        boxes: float [K, 4], x0 y0 x1 y1.
        scores: float [K].
        iou_threshold: The largest IoU of two boxes that are both kept.

    Returns:
        int64, the kept ones in the order of falling scores.

    Source: `torchvision.ops.nms`, which it equals.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    sorted_boxes = boxes[order]
    areas = (sorted_boxes[:, 2:] - sorted_boxes[:, :2]).prod(1)
    alive = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for k in range(len(order)):
        if alive[k]:
            low = torch.maximum(sorted_boxes[k, :2], sorted_boxes[k + 1 :, :2])
            high = torch.minimum(sorted_boxes[k, 2:], sorted_boxes[k + 1 :, 2:])
            common = (high - low).clamp(min=0).prod(1)
            alive[k + 1 :] &= ~(common / (areas[k] + areas[k + 1 :] - common) > iou_threshold)
    return order[alive]


def _one_class_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    # In the place of `batched_nms`: the generator has one class only.
    assert not idxs.any()
    return non_maximum_suppression(boxes, scores, iou_threshold)


# On a CPU, as many boxes are decoded at once as have so many values in their image tokens. With
# vit_tiny that was the best of 1 to 20 at 256 px (20) and 1024 px (2), and near it at 512 px.
_VALUES_AT_ONCE = 2**20
# Images at once on a CPU. Its cores wait for each other between the small operations of one image;
# more than two would hold too many of a large encoder's activations.
_IMAGES_AT_ONCE = 2

Item = TypeVar("Item")
Finished = TypeVar("Finished")


@dataclass(frozen=True)
class PredictedMask:
    """A mask at the original resolution, cropped if not tightly.

    Attributes:
        mask: [0, 0] where it is empty.
        box_original: x0 y0 x1 y1, px: the box that it was predicted for, or its own without one.
        iou_predicted: What the model says that its IoU with the truth is.
        words: More that results are to say of it.
    """

    mask: CroppedMask
    box_original: Sequence[float]
    iou_predicted: float
    words: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedImage:
    """An image as read, and as a predictor wants it."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB, original frame
    frame: Frame | None = None
    pixels: Tensor | None = None  # uint8 [3, S, S], input frame

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the file, px."""
        height, width = self.image.shape[:2]
        return height, width


class Predictor(Protocol):
    """A way to predict the masks of an image.

    Attributes:
        at_once: Images that may be predicted side by side, in threads.
    """

    at_once: int

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """What of the work can be done ahead, in another thread; `image` is [H, W, 3], RGB."""
        ...

    def predict(
        self, prepared: PreparedImage, boxes_original: NDArray[np.float64]
    ) -> Iterator[PredictedMask]:
        """The masks, one at a time; `boxes_original` is [K, 4], x0 y0 x1 y1, px."""
        ...


class BoxPredictor:
    """A mask for each box, as stock `SamPredictor` gives it with the same weights in float32."""

    def __init__(
        self,
        model: PromptedSam,
        *,
        resize_mode: str = "pad",
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        """Puts the parts together.

        Args:
            model: On its device.
            resize_mode: What it was tuned with; stock knows `pad` only.
            amp_dtype: To autocast to; None: float32.
        """
        self.model, self.resize_mode, self.amp_dtype = model, resize_mode, amp_dtype
        on_cpu = model.sam.device.type == "cpu"
        self.at_once = _IMAGES_AT_ONCE if on_cpu else 1
        if model.mask_chunk is None and on_cpu:
            fitting = _VALUES_AT_ONCE // math.prod(model.embedding_shape)
            model.mask_chunk = min(max(fitting, 1), MASK_CHUNK)

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """See `Predictor`."""
        image_size = self.model.sam.image_encoder.img_size
        frame = make_frame(image.shape[:2], image_size, resize_mode=self.resize_mode)
        pixels = torch.from_numpy(resize_image(image, frame)).permute(2, 0, 1)
        return PreparedImage(image, frame, pixels)

    @torch.no_grad()
    def predict(
        self, prepared: PreparedImage, boxes_original: NDArray[np.float64]
    ) -> Iterator[PredictedMask]:
        """See `Predictor`; in the order of the boxes."""
        frame, pixels = prepared.frame, prepared.pixels
        assert frame is not None and pixels is not None
        device = self.model.sam.device
        boxes = torch.from_numpy(boxes_to_input(boxes_original, frame).astype(np.float32))
        input_sizes = torch.tensor([frame.input_size], device=device)
        with self._autocast():
            embedding = self.model.embed(pixels[None].to(device), input_sizes)
        for first in range(0, len(boxes), MASK_CHUNK):
            part = slice(first, first + MASK_CHUNK)
            own = boxes[part].to(device)
            with self._autocast():
                index = torch.zeros(len(own), dtype=torch.int64, device=device)
                logits, scores = self.model.decode(embedding, own, index)
            masks = original_masks(
                logits,
                input_size=frame.input_size,
                original_size=frame.original_size,
                image_size=frame.image_size,
            )
            rows = zip(masks, boxes_original[part], scores.tolist(), strict=True)
            for mask, box, score in rows:
                yield PredictedMask(mask, box.tolist(), score)

    def _autocast(self) -> torch.autocast:
        device_type, dtype = self.model.sam.device.type, self.amp_dtype
        return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


class AutomaticPredictor:
    """All that stock `SamAutomaticMaskGenerator` finds; boxes are not asked for."""

    def __init__(self, model: PromptedSam, **options: Any) -> None:
        """As `mask_generation.build_mask_generator`."""
        self.generator = build_mask_generator(model.sam, **options)
        self.at_once = 1  # it keeps the image that it is at

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """See `Predictor`."""
        return PreparedImage(image)

    def predict(
        self, prepared: PreparedImage, boxes_original: NDArray[np.float64]
    ) -> Iterator[PredictedMask]:
        """See `Predictor`; in the generator's order."""
        self.generator.points_per_batch = points_at_once(prepared.size)
        for found in self.generator.generate(prepared.image):
            counts = np.array(found["segmentation"]["counts"])
            rle = {"size": list(prepared.size), "counts": counts}
            top, left, crop = decode_cropped(rle, *prepared.size)
            x, y, width, height = found["bbox"]
            yield PredictedMask(
                CroppedMask(top, left, crop.astype(bool)),
                (x, y, x + width, y + height),
                found["predicted_iou"],
                {"stability_score": found["stability_score"]},
            )


def predict_images(
    predictor: Predictor,
    images: Sequence[tuple[Path, NDArray[np.float64]]],
    finish: Callable[[int, PreparedImage, Iterator[PredictedMask]], Finished],
    *,
    num_workers: int,
) -> Iterator[Finished | ImageError]:
    """Predicts image after image; memory does not grow with their number.

    Args:
        predictor: How.
        images: The file and the boxes of each, [K, 4] as `Predictor.predict` takes them.
        finish: Is given the number of the image in `images`, what was read, and its masks, which it
            takes one at a time. In several threads at once where images are predicted so.
        num_workers: Threads; 0: none.

    Yields:
        For each image, in order: what `finish` returned; or why it cannot be read.

    Raises:
        TrainingError: Memory is not enough.
    """

    def prepare(k: int) -> PreparedImage | ImageError:
        try:
            return predictor.prepare(read_image(images[k][0]))
        except ImageError as error:
            return error

    def complete(k: int, prepared: PreparedImage | ImageError) -> Finished | ImageError:
        if isinstance(prepared, ImageError):
            return prepared
        path, boxes = images[k]
        masks = predictor.predict(prepared, boxes)
        return finish(k, prepared, _naming_what_is_too_large(masks, path, len(boxes)))

    rows, threads = range(len(images)), torch.get_num_threads()
    at_once = min(predictor.at_once, threads, num_workers)
    if at_once < 2:
        for k, prepared in enumerate(work_ahead(rows, prepare, num_workers=num_workers)):
            yield complete(k, prepared)
        return
    share = partial(torch.set_num_threads, threads // at_once)
    try:
        yield from work_ahead(
            rows, lambda k: complete(k, prepare(k)), num_workers=at_once, begin=share
        )
    finally:
        torch.set_num_threads(threads)  # a part of it is shared by all threads


def _naming_what_is_too_large(
    masks: Iterator[PredictedMask], path: Path, num_boxes: int
) -> Iterator[PredictedMask]:
    try:
        yield from masks
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"not enough memory for {path} with {num_boxes} boxes: give --device cpu, or a "
            "checkpoint of a smaller model or image size."
        ) from error


def work_ahead(
    items: Iterable[Item],
    work: Callable[[Item], Finished],
    *,
    num_workers: int,
    begin: Callable[[], object] | None = None,
) -> Iterator[Finished]:
    """Works on items in threads, no further ahead of what is taken than there are threads.

    Decoding and resizing an image, and the larger operations on tensors, leave Python free, so
    threads do what processes would, without a copy of the pixels.

    Args:
        items: What to work on.
        work: What to do with each.
        num_workers: Threads; 0: none, and nothing is done ahead.
        begin: Called in each thread first.
    """
    if not num_workers:
        yield from map(work, items)
        return
    ahead: deque[Future[Finished]] = deque()
    with ThreadPoolExecutor(num_workers, initializer=begin) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
