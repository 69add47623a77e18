"""Masks of images: for boxes, or for everything that SAM's automatic mask generator finds.

Each image is encoded once, and all of its boxes are decoded with that embedding. A predictor
(`BoxPredictor`, `AutomaticPredictor`) has two halves: `prepare` runs ahead in another thread, and
`predict` runs on the device; a CPU may predict two images at the same time.
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

from samft.coco.segmentation import CroppedMask, decode_cropped
from samft.data.transfers import send_to
from samft.data.transforms import Frame, boxes_to_input, make_frame, resize_image
from samft.errors import explain_out_of_memory
from samft.evaluation.evaluator import MEMORY_ADVICE
from samft.evaluation.validation import MASK_CHUNK
from samft.images.decoder import read_image
from samft.images.files import ImageError
from samft.images.orientation import UPRIGHT
from samft.images.pixels import PLAIN, PixelFormat
from samft.models.prompted_sam import PromptedSam, original_masks
from samft.models.prompts import Prompts
from samft.runtime.device import exact_float32
from samft.runtime.torchvision_compat import replace_missing_nms

# Values of image tokens per chunk of boxes on a CPU: with vit_tiny the fastest of chunks of 1 to 20
# boxes at 256 px (20 boxes) and at 1024 px (2 boxes), and near the fastest at 512 px.
_TOKEN_VALUES_PER_CHUNK = 2**20
# Images predicted at the same time on a CPU. The small operations of one image leave cores idle;
# more than two images would hold too many of a large encoder's activations.
_CPU_IMAGES_AT_ONCE = 2
_DEFAULT_POINTS_PER_BATCH = 64  # the automatic mask generator's own
_PIXELS_OF_DEFAULT = 1024 * 1024  # the largest image for which that many are decoded

Item = TypeVar("Item")
Finished = TypeVar("Finished")


@dataclass(frozen=True)
class PredictedMask:
    """A mask at the original resolution.

    Attributes:
        mask: Cropped, not always tightly; of shape [0, 0] if it is empty.
        box_original: x0 y0 x1 y1, px: the box that was given, or an automatic mask's own.
        iou_predicted: The model's estimate of the mask's IoU with the ground truth.
        extra_fields: Further fields of its COCO result.
    """

    mask: CroppedMask
    box_original: Sequence[float]
    iou_predicted: float
    extra_fields: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedImage:
    """An image, and the model input that `Predictor.prepare` made of it, if it makes one."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB, original frame
    frame: Frame | None = None
    pixels: Tensor | None = None  # uint8 [3, S, S], input frame

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the file, px."""
        height, width = self.image.shape[:2]
        return height, width


class Predictor(Protocol):
    """Predicts the masks of one image after the other.

    Attributes:
        images_at_once: Number of images that threads may predict at the same time.
    """

    images_at_once: int

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """The part of the work that needs no device; `image` is uint8 [H, W, 3], RGB."""
        ...

    def predict(
        self, prepared: PreparedImage, boxes_original: NDArray[np.float64]
    ) -> Iterator[PredictedMask]:
        """Yields masks one at a time; `boxes_original` is [K, 4], x0 y0 x1 y1, px."""
        ...


class BoxPredictor:
    """One mask per box; in float32 the mask of `segment_anything.SamPredictor`."""

    def __init__(
        self,
        model: PromptedSam,
        *,
        resize_mode: str = "pad",
        amp_dtype: torch.dtype | None = None,
        mask_chunk: int | None = None,
    ) -> None:
        """Sets the number of boxes per chunk and of images at once for the model's device.

        Args:
            model: On its device, in eval mode.
            resize_mode: The one that it was tuned with; `SamPredictor` always pads.
            amp_dtype: To autocast to; None: exact float32.
            mask_chunk: Boxes decoded at once; None: the model's `mask_chunk`, and if that is None
                as well, what is fastest on a CPU, or on a GPU what fits into its memory.
        """
        self.model, self.resize_mode, self.amp_dtype = model, resize_mode, amp_dtype
        on_cpu = model.sam.device.type == "cpu"
        self.images_at_once = _CPU_IMAGES_AT_ONCE if on_cpu else 1
        if mask_chunk is None and model.mask_chunk is None and on_cpu:
            fitting = _TOKEN_VALUES_PER_CHUNK // math.prod(model.embedding_shape)
            mask_chunk = min(max(fitting, 1), MASK_CHUNK)
        self.mask_chunk = mask_chunk

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
        """See `Predictor`; masks are in the order of the boxes."""
        frame, pixels = prepared.frame, prepared.pixels
        assert frame is not None and pixels is not None
        device = self.model.sam.device
        boxes = torch.from_numpy(boxes_to_input(boxes_original, frame).astype(np.float32))
        input_sizes = send_to(device, torch.tensor([frame.input_size]))
        with exact_float32(), self._autocast():
            embedding = self.model.embed(send_to(device, pixels[None]), input_sizes)
        for first in range(0, len(boxes), MASK_CHUNK):
            part = slice(first, first + MASK_CHUNK)
            chunk = send_to(device, boxes[part])
            with exact_float32(), self._autocast():
                image_index = torch.zeros(len(chunk), dtype=torch.int64, device=device)
                logits, scores = self.model.decode(
                    embedding, Prompts(boxes=chunk), image_index, mask_chunk=self.mask_chunk
                )
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
    """All masks that `SamAutomaticMaskGenerator` finds; takes no boxes."""

    def __init__(self, model: PromptedSam, **options: Any) -> None:
        """Takes the options of `build_mask_generator`."""
        self.generator = build_mask_generator(model.sam, **options)
        self.images_at_once = 1  # the generator holds the current image

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """See `Predictor`."""
        return PreparedImage(image)

    def predict(
        self, prepared: PreparedImage, boxes_original: NDArray[np.float64]
    ) -> Iterator[PredictedMask]:
        """See `Predictor`; masks are in the generator's order, and boxes are ignored."""
        self.generator.points_per_batch = choose_points_per_batch(prepared.size)
        with exact_float32():
            entries = self.generator.generate(prepared.image)
        for entry in entries:
            counts = np.array(entry["segmentation"]["counts"])
            rle = {"size": list(prepared.size), "counts": counts}
            x, y, width, height = entry["bbox"]
            yield PredictedMask(
                decode_cropped(rle, prepared.size),
                (x, y, x + width, y + height),
                entry["predicted_iou"],
                {"stability_score": entry["stability_score"]},
            )


def build_mask_generator(sam: Sam, **options: Any) -> SamAutomaticMaskGenerator:
    """SAM's own generator, which returns masks as uncompressed RLE.

    Args:
        sam: The model, at any image size.
        options: Of `SamAutomaticMaskGenerator`: `points_per_side`, `pred_iou_thresh`, ...
    """
    replace_missing_nms(automatic_mask_generator)
    return SamAutomaticMaskGenerator(sam, output_mode="uncompressed_rle", **options)


def choose_points_per_batch(size: tuple[int, int]) -> int:
    """The generator's `points_per_batch` for an image, so that memory does not grow with its size.

    The generator holds three masks per point at the image's own resolution. The masks that it finds
    do not depend on this number.

    Args:
        size: H, W of the image, px.
    """
    fitting = _DEFAULT_POINTS_PER_BATCH * _PIXELS_OF_DEFAULT // (size[0] * size[1])
    return max(1, min(_DEFAULT_POINTS_PER_BATCH, fitting))


def predict_images(
    predictor: Predictor,
    images: Sequence[tuple[Path, NDArray[np.float64]]],
    finish: Callable[[int, PreparedImage, Iterator[PredictedMask]], Finished],
    *,
    num_workers: int,
    orientations: Sequence[int] | None = None,
    pixels: PixelFormat = PLAIN,
) -> Iterator[Finished | ImageError]:
    """Predicts on image after image; memory does not grow with their number.

    Args:
        predictor: Predicts the masks of one image.
        images: File and boxes of each image; boxes are [K, 4] as `Predictor.predict` takes them.
        finish: Called with the index of an image in `images`, the image and an iterator over its
            masks; called from several threads if `predictor.images_at_once` is more than 1.
        num_workers: Threads; 0: none.
        orientations: How to turn each image, as EXIF numbers it; None: not at all.
        pixels: How the values of the images become 8 bits.

    Yields:
        For each image, in order: what `finish` returned, or the error of a file that is unreadable.

    Raises:
        TrainingError: There is not enough memory for an image.
    """

    def prepare(k: int) -> PreparedImage | ImageError:
        try:
            orientation = UPRIGHT if orientations is None else orientations[k]
            return predictor.prepare(
                read_image(images[k][0], orientation=orientation, pixels=pixels)
            )
        except ImageError as error:
            return error

    def complete(k: int, prepared: PreparedImage | ImageError) -> Finished | ImageError:
        if isinstance(prepared, ImageError):
            return prepared
        path, boxes = images[k]
        masks = predictor.predict(prepared, boxes)
        return finish(k, prepared, _explain_out_of_memory(masks, path, len(boxes)))

    indices, torch_threads = range(len(images)), torch.get_num_threads()
    at_once = min(predictor.images_at_once, torch_threads, num_workers)
    if at_once < 2:
        for k, prepared in enumerate(map_in_threads(prepare, indices, num_workers=num_workers)):
            yield complete(k, prepared)
        return
    share_cores = partial(torch.set_num_threads, torch_threads // at_once)
    try:
        yield from map_in_threads(
            lambda k: complete(k, prepare(k)),
            indices,
            num_workers=at_once,
            initializer=share_cores,
        )
    finally:
        # Part of what torch.set_num_threads sets is per process, so the workers changed it here.
        torch.set_num_threads(torch_threads)


def _explain_out_of_memory(
    masks: Iterator[PredictedMask], path: Path, num_boxes: int
) -> Iterator[PredictedMask]:
    what_for = f"for {path} with {num_boxes} boxes"
    with explain_out_of_memory(lambda: what_for, advice=MEMORY_ADVICE):
        yield from masks


def map_in_threads(
    function: Callable[[Item], Finished],
    items: Iterable[Item],
    *,
    num_workers: int,
    initializer: Callable[[], object] | None = None,
) -> Iterator[Finished]:
    """`map` in threads: results in order, at most `num_workers` of them ahead of the consumer.

    Decoding and resizing an image, and the larger operations on tensors, release the GIL, so that
    threads are as fast as processes and need no copy of the pixels.

    Args:
        function: Applied to each item.
        items: Taken one at a time, as results are consumed.
        num_workers: Threads; 0: none, and no result is computed ahead.
        initializer: Called first in each thread.
    """
    if not num_workers:
        yield from map(function, items)
        return
    ahead: deque[Future[Finished]] = deque()
    with ThreadPoolExecutor(num_workers, initializer=initializer) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
