"""The dataset: images with boxes and masks, drawn at random or as they are.

What a sample looks like depends on (seed, epoch, image id, copy) only: not on workers, processes,
accumulation or restarts.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from samft.coco.images import EncodedImage, ImageError, open_image
from samft.coco.masks import decode_cropped
from samft.coco.subset import CocoIndex, read_coco
from samft.data.augment import change_colour, cut_objects, draw_colour, draw_frame, touching
from samft.data.batch import NO_PIXELS, Sample
from samft.data.samplers import SAMPLE_STREAM, Key, generator_of
from samft.data.targets import CroppedMask, draw_targets, draw_truths
from samft.data.transforms import Frame, boxes_to_input, jitter_boxes, make_frame, resize_image
from samft.embeddings.store import CachedEmbeddings
from samft.errors import DataError

_MAX_DRAWS = 8  # of a crop that shows an object

# The frame, the objects to use, and their boxes [K, 4] in the original frame.
_Placement = tuple[Frame, NDArray[np.int64], NDArray[np.float64]]


class Coco2MaskDataset(Dataset[Sample]):
    """Images of a COCO file with a box and a mask for each object.

    Training draws a subset of the objects, a flip and the jitter of the boxes; validation gives all
    objects as annotated, with their masks at the original resolution as `truths`.

    Args:
        image_folder: What the file names are relative to.
        annotations: The COCO file; not read if `index` is given.
        image_size: Side S of the input frame.
        resize_mode: `pad` or `squash`, see `make_frame`.
        training: Whether to draw at random.
        max_masks_per_image: Size of the subset; 0 takes all.
        box_jitter: See `jitter_boxes`.
        augment: `none`, `flip` or `scale`, see `augment.draw_frame`; `scale` changes colours too.
        loss_resolution: Targets at `low` (S/4) or `input` (S).
        on_bad_image: `error` raises where an image cannot be read. `skip` takes the next that can
            in training, and gives a sample without objects in validation.
        seed: Of everything random.
        index: The checked file, if it has been read.

    Raises:
        DataError: As `read_coco`.
    """

    def __init__(
        self,
        image_folder: str | Path,
        annotations: str | Path | None = None,
        *,
        image_size: int = 1024,
        resize_mode: str = "pad",
        training: bool = False,
        max_masks_per_image: int = 64,
        box_jitter: float = 0.1,
        augment: str = "flip",
        loss_resolution: str = "low",
        on_bad_image: str = "error",
        seed: int = 0,
        index: CocoIndex | None = None,
    ) -> None:
        if index is None:
            if annotations is None:
                raise ValueError("Coco2MaskDataset needs annotations, or an index.")
            index = read_coco(Path(annotations), Path(image_folder))
        self.index = index
        self.image_size = image_size
        self.resize_mode = resize_mode
        self.training = training
        self.max_masks_per_image = max_masks_per_image
        self.box_jitter = box_jitter
        self.augment = augment
        self.loss_resolution = loss_resolution
        self.on_bad_image = on_bad_image
        self.seed = seed
        self.embeddings: CachedEmbeddings | None = (
            None  # in the place of pixels, once there are any
        )

    def __len__(self) -> int:
        return self.index.num_images

    def __getitem__(self, key: int | tuple[int, int] | Key) -> Sample:
        """Loads an image by i, (epoch, i) or (epoch, i, copy), which decide what is drawn.

        Raises:
            DataError: If the image is missing or broken; with `skip`, if all are.
        """
        epoch, i, copy = (*key, 0)[:3] if isinstance(key, tuple) else (0, key, 0)
        i = range(len(self))[i]  # an IndexError past the end, so that the dataset can be iterated
        words = (SAMPLE_STREAM, self.seed, epoch, self.index.image_id(i), copy)
        bad_images: dict[str, str] = {}
        for number in range(i, i + len(self)):
            row = number % len(self)
            try:
                # With the draws of the image that was asked for: no twin of the row's own sample.
                sample = self._load(row, generator_of(*words))
            except ImageError as error:
                if self.on_bad_image == "error":
                    raise
                bad_images[self.index.file_name(row)] = str(error)
                if self.training:
                    continue
                sample = self._without_objects(row)
            sample.bad_images = bad_images
            return sample
        first = next(iter(bad_images.values()))
        raise DataError(f"none of the {len(self)} images can be read; the first: {first}")

    def _load(self, row: int, generator: np.random.Generator) -> Sample:
        file = self.index.file
        encoded, size = self._open(row)
        frame, objects, boxes = self._place(row, size, generator)
        pixels = self.pixels(encoded, frame) if encoded else None
        boxes = boxes_to_input(boxes, frame)
        if self.training:
            boxes = jitter_boxes(boxes, share=self.box_jitter, frame=frame, generator=generator)
        if pixels is not None and self.training and self.augment == "scale":
            visible = pixels[: frame.input_size[0], : frame.input_size[1]]
            visible[:] = change_colour(visible, draw_colour(generator))
        segmentations = [file.segmentations[k] for k in objects.tolist()]
        truths: list[CroppedMask] = []
        if self.training:
            kept, targets = draw_targets(segmentations, frame, resolution=self.loss_resolution)
        else:
            find = draw_truths(segmentations, frame, resolution=self.loss_resolution)
            kept, targets, truths = find
        return Sample(
            image=NO_PIXELS if pixels is None else torch.from_numpy(pixels).permute(2, 0, 1),
            boxes=torch.from_numpy(boxes[kept].astype(np.float32)),
            targets=torch.from_numpy(targets),
            input_size=frame.input_size,
            original_size=size,
            image_id=self.index.image_id(row),
            object_ids=torch.from_numpy(file.object_ids[objects[kept]]),
            truths=truths,
            embedding=self._embedding(row, frame),
        )

    def _open(self, row: int) -> tuple[EncodedImage | None, tuple[int, int]]:
        if self.embeddings is not None:
            return None, self.embeddings.size(row)
        encoded = open_image(self.index.path(row))
        return encoded, encoded.size

    def _embedding(self, row: int, frame: Frame) -> torch.Tensor | None:
        if self.embeddings is None:
            return None
        return torch.from_numpy(self.embeddings.read(row, flipped=frame.flipped))

    def pixels(self, encoded: EncodedImage, frame: Frame) -> NDArray[np.uint8]:
        """Decodes an image into the input frame, uint8 [S, S, 3].

        Raises:
            ImageError: It is broken.
        """
        # Validation sees what SamPredictor would be given, to the level.
        image = encoded.decode(at_least=frame.resized_size if self.training else None)
        return resize_image(image, frame, exact=not self.training)

    def frame(self, size: tuple[int, int], *, flipped: bool = False) -> Frame:
        """The frame of a whole image of size H, W, as all but `scale` see it."""
        return make_frame(size, self.image_size, resize_mode=self.resize_mode, flipped=flipped)

    def _without_objects(self, row: int) -> Sample:
        frame = self.frame(self.index.size(row))
        side = self.image_size // 4 if self.loss_resolution == "low" else self.image_size
        return Sample(
            image=torch.zeros(self.image_size, self.image_size, 3, dtype=torch.uint8).movedim(2, 0),
            boxes=torch.zeros(0, 4),
            targets=torch.zeros(0, side, side, dtype=torch.uint8),
            input_size=frame.input_size,
            original_size=frame.original_size,
            image_id=self.index.image_id(row),
            object_ids=torch.zeros(0, dtype=torch.int64),
            truths=[],
        )

    def _place(self, row: int, size: tuple[int, int], generator: np.random.Generator) -> _Placement:
        if not self.training:
            return self._draw_place(row, size, "none", generator=generator)
        for _ in range(_MAX_DRAWS):
            place = self._draw_place(row, size, self.augment, generator=generator)
            if len(place[1]) or not place[0].is_cropped:
                return place
        # A crop never empties a sample.
        return self._draw_place(row, size, "flip", generator=generator)

    def _draw_place(
        self, row: int, size: tuple[int, int], augment: str, *, generator: np.random.Generator
    ) -> _Placement:
        file, objects = self.index.file, self.index.objects_of(row)
        frame = draw_frame(
            size,
            self.image_size,
            resize_mode=self.resize_mode,
            augment=augment,
            generator=generator,
        )
        if frame.is_cropped:
            objects = objects[touching(file.boxes[objects], frame)]
        if self.training and 0 < self.max_masks_per_image < len(objects):
            chosen = generator.choice(objects, self.max_masks_per_image, replace=False)
            objects = np.sort(chosen)
        kept, boxes = cut_objects(
            file.boxes[objects],
            frame,
            draw=lambda k: decode_cropped(file.segmentations[int(objects[k])], *size),
        )
        return frame, objects[kept], boxes
