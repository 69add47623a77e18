"""Masks of images: for boxes or points, or all that SAM's automatic mask generator finds.

Each image is encoded once, and all of its prompts are decoded with that embedding. A predictor
(`BoxPredictor`, `PointPredictor`, `AutomaticPredictor`) has two halves: `prepare` runs ahead in
another thread, and `predict` runs on the device; a CPU may predict two images at the same time.
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
from torch import Tensor

from samft.annotations.segmentation import CroppedMask, decode_cropped, uncompressed_rle
from samft.data.transfers import send_to
from samft.data.transforms import Frame, boxes_to_input, make_frame, resize_image
from samft.errors import explain_out_of_memory
from samft.evaluation.evaluator import MEMORY_ADVICE
from samft.evaluation.validation import MASK_CHUNK
from samft.images.decoder import read_image
from samft.images.files import ImageError
from samft.images.orientation import UPRIGHT
from samft.images.pixels import PLAIN, PixelFormat
from samft.models.mask_generator import MaskGenerator
from samft.models.prompted_sam import PromptedSam, original_masks
from samft.models.prompts import Prompts
from samft.prediction.points import PointPrompt
from samft.runtime.device import exact_float32
from samft.views.regions import DecodedImage, ImageSource

# Values of image tokens per chunk of boxes on a CPU: with vit_tiny the fastest of chunks of 1 to 20
# boxes at 256 px (20 boxes) and at 1024 px (2 boxes), and near the fastest at 512 px.
_TOKEN_VALUES_PER_CHUNK = 2**20
# Images predicted at the same time on a CPU. The small operations of one image leave cores idle;
# more than two images would hold too many of a large encoder's activations.
_CPU_IMAGES_AT_ONCE = 2

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Finished = TypeVar("Finished")


@dataclass(frozen=True)
class PredictedMask:
    """A mask at the original resolution.

    Attributes:
        mask: Cropped, not always tightly; of shape [0, 0] if it is empty.
        box_original: x0 y0 x1 y1, px: the box that was given, or else the mask's own.
        iou_predicted: The model's estimate of the mask's IoU with the ground truth.
        extra_fields: Further fields of its COCO result.
        number: Of its prompt, or of the mask where there are no prompts, among those of the image;
            None: masks come in this order.
        is_cut: The object reaches beyond the window that it was seen through.
    """

    mask: CroppedMask
    box_original: Sequence[float]
    iou_predicted: float
    extra_fields: dict[str, float] = field(default_factory=dict)
    number: int | None = None
    is_cut: bool = False


@dataclass(frozen=True)
class PreparedImage:
    """An image, and the model input that `Predictor.prepare` made of it, if it makes one."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB, original frame
    frame: Frame | None = None
    pixels: Tensor | None = None  # uint8 [3, H, W], input frame

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the file, px."""
        height, width = self.image.shape[:2]
        return height, width

    @property
    def source(self) -> ImageSource:
        """The image, to be read in windows."""
        return DecodedImage(self.image)


class Predictor(Protocol):
    """Predicts the masks of one image after the other.

    Attributes:
        images_at_once: Number of images that threads may predict at the same time.
        image_size: Side of the model's input, px.
    """

    images_at_once: int
    image_size: int

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """The part of the work that needs no device; `image` is uint8 [H, W, 3], RGB."""
        ...

    def predict(self, prepared: PreparedImage, prompts: Any, /) -> Iterator[PredictedMask]:
        """Yields masks one at a time, of the prompts of `PredictionTask.prompts_of`."""
        ...


class _EncodingPredictor:
    # Encodes an image by itself, as the model was trained, for whatever decodes prompts of it.
    def __init__(
        self, model: PromptedSam, *, resize_mode: str, amp_dtype: torch.dtype | None
    ) -> None:
        self.model, self.resize_mode, self.amp_dtype = model, resize_mode, amp_dtype
        self.image_size = model.sam.image_encoder.img_size
        self.images_at_once = _CPU_IMAGES_AT_ONCE if model.sam.device.type == "cpu" else 1

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """See `Predictor`."""
        frame = make_frame(image.shape[:2], self.model.frame_size, resize_mode=self.resize_mode)
        pixels = torch.from_numpy(resize_image(image, frame)).permute(2, 0, 1)
        return PreparedImage(image, frame, pixels)

    def _embed_image(self, prepared: PreparedImage) -> tuple[Tensor, Frame]:
        frame, pixels = prepared.frame, prepared.pixels
        assert frame is not None and pixels is not None
        device = self.model.sam.device
        input_sizes = send_to(device, torch.tensor([frame.input_size]))
        with exact_float32(), self._autocast():
            return self.model.embed(send_to(device, pixels[None]), input_sizes), frame

    def _autocast(self) -> torch.autocast:
        device_type, dtype = self.model.sam.device.type, self.amp_dtype
        return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


class BoxPredictor(_EncodingPredictor):
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
        super().__init__(model, resize_mode=resize_mode, amp_dtype=amp_dtype)
        on_cpu = model.sam.device.type == "cpu"
        if mask_chunk is None and model.mask_chunk is None and on_cpu:
            fitting = _TOKEN_VALUES_PER_CHUNK // math.prod(model.embedding_shape)
            mask_chunk = min(max(fitting, 1), MASK_CHUNK)
        self.mask_chunk = mask_chunk

    @torch.no_grad()
    def predict(
        self, prepared: PreparedImage, boxes_original: NDArray[np.float64], /
    ) -> Iterator[PredictedMask]:
        """See `Predictor`; masks are in the order of the boxes, [K, 4], x0 y0 x1 y1, px."""
        embedding, frame = self._embed_image(prepared)
        device = self.model.sam.device
        boxes = torch.from_numpy(boxes_to_input(boxes_original, frame).astype(np.float32))
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
            )
            rows = zip(masks, boxes_original[part], scores.tolist(), strict=True)
            for mask, box, score in rows:
                yield PredictedMask(mask, box.tolist(), score)


class PointPredictor(_EncodingPredictor):
    """One mask per object, prompted with points and perhaps a box.

    In float32 it is the mask of `segment_anything.SamPredictor`: with `multimask_output=False`, or
    for a single point without a box, where the model knows three, the best by predicted IoU.
    """

    def __init__(
        self,
        model: PromptedSam,
        *,
        resize_mode: str = "pad",
        amp_dtype: torch.dtype | None = None,
        three_masks: bool,
    ) -> None:
        """See `BoxPredictor`.

        Args:
            model: The same.
            resize_mode: The same.
            amp_dtype: The same.
            three_masks: Whether a single point gives the best of three masks.
        """
        super().__init__(model, resize_mode=resize_mode, amp_dtype=amp_dtype)
        self.three_masks = three_masks

    @torch.no_grad()
    def predict(
        self, prepared: PreparedImage, prompts: Sequence[PointPrompt], /
    ) -> Iterator[PredictedMask]:
        """See `Predictor`; masks are in the order of the prompts."""
        embedding, frame = self._embed_image(prepared)
        for prompt in prompts:
            logits, score = self._decode_prompt(embedding, prompt, frame)
            (mask,) = original_masks(
                logits[None],
                input_size=frame.input_size,
                original_size=frame.original_size,
            )
            size = frame.original_size
            box = prompt.box.tolist() if prompt.has_box else _extent_of(mask, size)
            yield PredictedMask(mask, box, float(score))

    def _decode_prompt(
        self, embedding: Tensor, prompt: PointPrompt, frame: Frame
    ) -> tuple[Tensor, Tensor]:
        # Mask logits [H/4, W/4] and predicted IoU.
        device = self.model.sam.device
        scale = np.array([frame.scale_x, frame.scale_y])
        points = torch.from_numpy((prompt.points[None, :, :2] * scale).astype(np.float32))
        labels = torch.from_numpy(prompt.points[None, :, 2].astype(np.int64))
        boxes = torch.from_numpy(boxes_to_input(prompt.box, frame).astype(np.float32))
        prompts = Prompts(
            boxes=send_to(device, boxes) if prompt.has_box else None,
            points=send_to(device, points),
            labels=send_to(device, labels),
        )
        image_index = torch.zeros(1, dtype=torch.int64, device=device)
        multimask = self.three_masks and len(labels[0]) == 1 and not prompt.has_box
        with exact_float32(), self._autocast():
            logits, scores = self.model.decode(
                embedding, prompts, image_index, multimask=multimask, mask_chunk=1
            )
        if not multimask:
            return logits[0], scores[0]
        best = int(scores[0].argmax())
        return logits[0, best], scores[0, best]


def _extent_of(mask: CroppedMask, size: tuple[int, int]) -> tuple[int, int, int, int]:
    return decode_cropped(uncompressed_rle(mask, size), size).extent  # cropped tightly


class AutomaticPredictor:
    """All masks that `SamAutomaticMaskGenerator` finds; takes no prompts."""

    def __init__(self, model: PromptedSam, **options: Any) -> None:
        """Takes the settings of `MaskGenerator`."""
        self.generator = MaskGenerator(model.sam, **options)
        self.image_size = model.sam.image_encoder.img_size
        self.images_at_once = 1  # the generator holds the current image

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """See `Predictor`."""
        return PreparedImage(image)

    def predict(self, prepared: PreparedImage, prompts: object, /) -> Iterator[PredictedMask]:
        """See `Predictor`; masks are in the generator's order, and prompts are ignored."""
        for entry in self.generator.generate(prepared.image):
            counts = np.array(entry["segmentation"]["counts"])
            rle = {"size": list(prepared.size), "counts": counts}
            x, y, width, height = entry["bbox"]
            yield PredictedMask(
                decode_cropped(rle, prepared.size),
                (x, y, x + width, y + height),
                entry["predicted_iou"],
                {"stability_score": entry["stability_score"]},
            )


def predict_images(
    predictor: Predictor,
    images: Sequence[tuple[Path, Any]],
    finish: Callable[[int, PreparedImage, Iterator[PredictedMask]], Finished],
    *,
    num_workers: int,
    orientations: Sequence[int] | None = None,
    pixels: PixelFormat = PLAIN,
) -> Iterator[Finished | ImageError]:
    """Predicts on image after image; memory does not grow with their number.

    Args:
        predictor: Predicts the masks of one image.
        images: File and prompts of each image, the prompts as `predictor.predict` takes them.
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
        path, prompts = images[k]
        masks = predictor.predict(prepared, prompts)
        return finish(k, prepared, explain_memory(masks, path, len(prompts)))

    yield from predict_ahead(
        predictor, range(len(images)), prepare, complete, num_workers=num_workers
    )


def predict_ahead(
    predictor: Predictor,
    indices: range,
    prepare: Callable[[int], Prepared],
    complete: Callable[[int, Prepared], Finished],
    *,
    num_workers: int,
) -> Iterator[Finished]:
    """Prepares images, or windows of one, ahead of those that are predicted on.

    Args:
        predictor: Says how many may be predicted at the same time.
        indices: What is predicted on.
        prepare: Reads one of them, in another thread.
        complete: Predicts on what was prepared.
        num_workers: Threads; 0: none.

    Yields:
        What `complete` returned, in order.
    """
    torch_threads = torch.get_num_threads()
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


def explain_memory(
    masks: Iterator[PredictedMask], path: Path, num_prompts: int
) -> Iterator[PredictedMask]:
    """The masks of an image; if there is not enough memory for it, the error names it."""
    what_for = f"for {path} with {num_prompts} prompts" if num_prompts else f"for {path}"
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
