"""The dataset: images of a COCO file with boxes and masks, as samples and as batches of samples.

A training sample is a function of (seed, epoch, image id, copy, window), whatever the number of
workers, processes and micro-batches, and however often the run was resumed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from samft.annotations.segmentation import CroppedMask, decode_cropped
from samft.cli import parse_image_size
from samft.coco.subset import CocoSubset, Picture, read_coco
from samft.data.augment import (
    apply_colour_jitter,
    boxes_in_frame,
    draw_colour_jitter,
    draw_frame,
    filter_cropped_objects,
)
from samft.data.samplers import CLICK_STREAM, SAMPLE_STREAM, generator_of
from samft.data.targets import draw_targets, make_grids, rasterize_ground_truth
from samft.data.transforms import Frame, boxes_to_input, jitter_boxes, make_frame, resize_image
from samft.errors import DataError
from samft.images.files import ImageError
from samft.views.pictures import WindowOfFile, WindowOfImage

NO_PIXELS = torch.zeros(3, 0, 0, dtype=torch.uint8)
_MAX_CROP_DRAWS = 8  # until a random crop shows an object


@dataclass
class Sample:
    """One image with its K objects."""

    image: Tensor  # uint8 [3, H, W], RGB, input frame, channels last; `NO_PIXELS` with an embedding
    boxes: Tensor  # float32 [K, 4], input frame
    windows: Tensor  # float32 [K, 4], input frame, what the targets cover; may exceed the image
    targets: Tensor  # uint8 [K, s, s], see `draw_targets`
    input_size: tuple[int, int]  # h, w of the image area in the input frame
    original_size: tuple[int, int]  # H, W of the image or window, in the frame of its outlines
    image_id: int
    object_ids: Tensor  # int64 [K]
    truths: list[CroppedMask]  # the K masks in validation, none in training
    bad_images: dict[str, str] = field(default_factory=dict)  # that were skipped: name, reason
    embedding: Tensor | None = None  # float16 or float32 [C, H/16, W/16], if cached
    click_draws: Tensor | None = None  # float32 [K, num_clicks, 2] in 0..1, if there are clicks
    origin: tuple[int, int] = (0, 0)  # y, x of the window in its image, original px
    whole_size: tuple[int, int] | None = None  # H, W of the image that a window is of


@dataclass
class Batch:
    """N images, and the M objects of all of them, concatenated."""

    images: Tensor  # uint8 [N, 3, H, W], RGB, input frame, channels last; [N, 3, 0, 0] if cached
    boxes: Tensor  # float32 [M, 4], input frame
    image_index: Tensor  # int64 [M], which of the N images an object is in
    windows: Tensor  # float32 [M, 4], input frame, what the targets cover; may exceed the image
    targets: Tensor  # uint8 [M, s, s], see `draw_targets`
    input_sizes: Tensor  # int64 [N, 2], h, w of the image areas in the input frame
    original_sizes: Tensor  # int64 [N, 2], H, W of the image files, or of the windows of them
    image_ids: list[int]
    object_ids: Tensor  # int64 [M]
    truths: list[CroppedMask]  # the M masks in validation, none in training
    bad_images: dict[str, str] = field(default_factory=dict)  # that were skipped: name, reason
    embeddings: Tensor | None = None  # float16 or float32 [N, C, H/16, W/16], if cached
    click_draws: Tensor | None = None  # float32 [M, num_clicks, 2] in 0..1, if there are clicks
    origins: list[tuple[int, int]] = field(default_factory=list)  # [N], see `Sample`
    whole_sizes: list[tuple[int, int] | None] = field(default_factory=list)  # [N], see `Sample`

    @property
    def num_masks(self) -> int:
        """M, the number of objects."""
        return len(self.boxes)

    @property
    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """Sizes of the only image, and where a window begins, as keyword arguments of metrics."""
        (height, width), (original_height, original_width) = (
            sizes[0].tolist() for sizes in (self.input_sizes, self.original_sizes)
        )
        return {
            "input_size": (height, width),
            "original_size": (original_height, original_width),
            "origin": self.origins[0] if self.origins else (0, 0),
        }

    @property
    def file_size(self) -> tuple[int, int]:
        """H, W of the only image, of which a window may be seen."""
        whole = self.whole_sizes[0] if self.whole_sizes else None
        return whole or self.image_sizes["original_size"]

    def take_objects(self, part: slice) -> "Batch":
        """The same images with some of their objects; the tensors are views."""
        names = ["boxes", "image_index", "windows", "targets", "object_ids", "truths"]
        names += [] if self.click_draws is None else ["click_draws"]
        return replace(self, **{name: getattr(self, name)[part] for name in names})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """A batch with all tensors on a device."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """A batch with all tensors in page-locked memory; `DataLoader` calls this."""
        return self._map_tensors(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps the allocator from reusing the memory of all tensors while a stream uses them."""
        for value in vars(self).values():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(stream)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **tensors})


def collate(samples: Sequence[Sample]) -> Batch:
    """Stacks images and concatenates objects; what only some samples may have, all or none have."""
    embeddings = [sample.embedding for sample in samples if sample.embedding is not None]
    click_draws = [sample.click_draws for sample in samples if sample.click_draws is not None]
    num_objects = torch.tensor([len(sample.boxes) for sample in samples])
    return Batch(
        # Stacked as they lie in memory (channels last) and then permuted: a change of layout would
        # cost more than everything else here.
        images=torch.stack([s.image.permute(1, 2, 0) for s in samples]).permute(0, 3, 1, 2),
        boxes=torch.cat([sample.boxes for sample in samples]),
        image_index=torch.repeat_interleave(torch.arange(len(samples)), num_objects),
        windows=torch.cat([sample.windows for sample in samples]),
        targets=torch.cat([sample.targets for sample in samples]),
        input_sizes=torch.tensor([sample.input_size for sample in samples]),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        image_ids=[sample.image_id for sample in samples],
        object_ids=torch.cat([sample.object_ids for sample in samples]),
        truths=[truth for sample in samples for truth in sample.truths],
        bad_images={name: why for s in samples for name, why in s.bad_images.items()},
        embeddings=torch.stack(embeddings) if embeddings else None,
        click_draws=torch.cat(click_draws) if click_draws else None,
        origins=[sample.origin for sample in samples],
        whole_sizes=[sample.whole_size for sample in samples],
    )


class EmbeddingSource(Protocol):
    """Embeddings of the images of a `CocoSubset`, by row; see `CachedEmbeddings`."""

    def size(self, i: int) -> tuple[int, int]:
        """H, W of image or window i, original px.

        Raises:
            ImageError: The image cannot be used.
        """
        ...

    def read(self, i: int, *, flipped: bool) -> NDArray[np.floating]:
        """The embedding of image i, or of its mirror image: [C, H/16, W/16]."""
        ...


class _Placement(NamedTuple):
    # Where an image is in the input frame, and which of its objects are used.
    frame: Frame
    objects: NDArray[np.int64]  # [K], rows of the index
    boxes: NDArray[np.float64]  # [K, 4], original frame


class Coco2MaskDataset(Dataset[Sample]):
    """Images of a COCO file with a box and a mask for each object.

    In training, a random subset of the objects is used, with random flips (and crops) and jittered
    boxes. In validation, all objects are used as annotated, with their masks at the original
    resolution as `truths`.

    Args:
        image_folder: The folder that file names are relative to.
        annotations: The COCO file; not read if `subset` is given.
        image_size: Side of the input frame, or `WIDTHxHEIGHT` of one that is not square, as in the
            setting of this name.
        resize_mode: `pad` or `squash`, see `make_frame`.
        training: Whether to augment and to draw objects at random.
        max_masks_per_image: Most objects of a training sample; 0: no limit.
        box_jitter: See `jitter_boxes`.
        augment: `none`, `flip` or `scale`, see `augment.draw_frame`; `scale` changes colours too.
        loss_resolution: Grid of the targets: `window` or `input`, see `make_grids`.
        num_clicks: Clicks that a step may need for each object; a training sample has two numbers
            for each, which depend on nothing but seed, epoch, image, object, and the click's own
            number, so that they are the same whatever else a sample has.
        move_windows: In training, move each window at random, as far as the objects that it holds
            stay in it.
        on_bad_image: `error` raises for an image that cannot be read. `skip` uses the next readable
            image in training, and returns a sample without objects in validation.
        seed: Of all randomness.
        subset: The images and objects to use, if they have been read.

    Raises:
        DataError: As `read_coco`.
        ValueError: `image_size` is no size, see `cli.parse_image_size`.
    """

    def __init__(
        self,
        image_folder: str | Path,
        annotations: str | Path | None = None,
        *,
        image_size: int | str = 1024,
        resize_mode: str = "pad",
        training: bool = False,
        max_masks_per_image: int = 64,
        box_jitter: float = 0.1,
        augment: str = "flip",
        loss_resolution: str = "window",
        num_clicks: int = 0,
        move_windows: bool = False,
        on_bad_image: str = "error",
        seed: int = 0,
        subset: CocoSubset | None = None,
    ) -> None:
        if subset is None:
            if annotations is None:
                raise ValueError("Coco2MaskDataset needs annotations, or a subset.")
            subset = read_coco(Path(annotations), Path(image_folder))
        self.subset = subset
        self.image_size, self.frame_size = image_size, parse_image_size(image_size)
        self.resize_mode = resize_mode
        self.training = training
        self.max_masks_per_image = max_masks_per_image
        self.box_jitter = box_jitter
        self.augment = augment
        self.loss_resolution = loss_resolution
        self.num_clicks = num_clicks if training else 0
        self.move_windows = move_windows and training
        self.on_bad_image = on_bad_image
        self.seed = seed
        self.embeddings: EmbeddingSource | None = None  # read instead of pixels, once it is set

    def __len__(self) -> int:
        return self.subset.num_images

    def __getitem__(self, key: int | tuple[int, int] | tuple[int, int, int]) -> Sample:
        """Loads an image by i, (epoch, i) or (epoch, i, copy), which seed the augmentation.

        Raises:
            DataError: The image is missing or broken; with `skip` in training, all images are.
        """
        epoch, i, copy = (*key, 0)[:3] if isinstance(key, tuple) else (0, key, 0)
        i = range(len(self))[i]  # raises IndexError past the end, so that iteration ends
        seed = (self.seed, epoch, self.subset.image_id(i), copy, *self._seed_of_window(i))
        bad_images: dict[str, str] = {}
        for number in range(i, i + len(self)):
            row = number % len(self)
            try:
                # Seeded by the image that was asked for, also where another one replaces it: so the
                # replacement is not the same sample as that image's own.
                sample = self._load_sample(row, generator_of(SAMPLE_STREAM, *seed))
            except ImageError as error:
                if self.on_bad_image == "error":
                    raise
                bad_images[self.subset.file_name(row)] = str(error)
                if self.training:
                    continue
                sample = self._sample_without_objects(row)
            sample.bad_images = bad_images
            sample.click_draws = self._draw_for_clicks(sample.object_ids, seed)
            return sample
        first = next(iter(bad_images.values()))
        raise DataError(f"none of the {len(self)} images can be read; the first: {first}")

    def _seed_of_window(self, row: int) -> tuple[int, ...]:
        return () if self.subset.windows is None else self.subset.corner(row)

    def _draw_for_clicks(self, object_ids: Tensor, seed: tuple[int, ...]) -> Tensor | None:
        if not self.num_clicks:
            return None
        draws = np.zeros((len(object_ids), self.num_clicks, 2), dtype=np.float32)
        for row, object_id in zip(draws, object_ids.tolist(), strict=True):
            generator_of(CLICK_STREAM, *seed, object_id).random(out=row, dtype=np.float32)
        return torch.from_numpy(draws)

    def _load_sample(self, row: int, generator: np.random.Generator) -> Sample:
        index = self.subset.index
        encoded, size = self._open_image(row)
        corner = self.subset.corner(row)
        if self.move_windows and isinstance(encoded, WindowOfFile | WindowOfImage):
            corner = self._draw_corner(row, generator)
            encoded = encoded.move_to(corner)
        frame, objects, boxes_original = self._choose_placement(row, size, corner, generator)
        pixels = self.decode_pixels(encoded, frame) if encoded else None
        boxes = boxes_to_input(boxes_original, frame)
        grids = make_grids(boxes, frame, resolution=self.loss_resolution)
        if self.training:
            boxes = jitter_boxes(boxes, share=self.box_jitter, frame=frame, generator=generator)
        if pixels is not None and self.training and self.augment == "scale":
            visible = pixels[: frame.input_size[0], : frame.input_size[1]]
            visible[:] = apply_colour_jitter(visible, draw_colour_jitter(generator))
        segmentations = [index.segmentations[k] for k in objects.tolist()]
        truths: list[CroppedMask] = []
        if self.training:
            kept, targets = draw_targets(segmentations, frame, grids)
        else:
            kept, targets, truths = rasterize_ground_truth(segmentations, frame, grids)
        return Sample(
            image=NO_PIXELS if pixels is None else torch.from_numpy(pixels).permute(2, 0, 1),
            boxes=torch.from_numpy(boxes[kept].astype(np.float32)),
            windows=torch.from_numpy(grids.windows[kept].astype(np.float32)),
            targets=torch.from_numpy(targets),
            input_size=frame.input_size,
            original_size=size,
            image_id=self.subset.image_id(row),
            object_ids=torch.from_numpy(index.object_ids[objects[kept]]),
            truths=truths,
            embedding=self._read_embedding(row, frame),
            origin=frame.origin,
            whole_size=frame.whole_size,
        )

    def _open_image(self, row: int) -> tuple[Picture | None, tuple[int, int]]:
        # The file, unless an embedding replaces it, and its H, W.
        if self.embeddings is not None:
            return None, self.embeddings.size(row)
        encoded = self.subset.open_image(row)
        return encoded, encoded.size

    def _read_embedding(self, row: int, frame: Frame) -> Tensor | None:
        if self.embeddings is None:
            return None
        return torch.from_numpy(self.embeddings.read(row, flipped=frame.flipped))

    def decode_pixels(self, encoded: Picture, frame: Frame) -> NDArray[np.uint8]:
        """Decodes an image into the input frame, uint8 [H, W, 3] of the frame.

        Raises:
            ImageError: It is broken.
        """
        # In validation, the very pixels that SamPredictor would get.
        image = encoded.decode(at_least=frame.resized_size if self.training else None)
        return resize_image(image, frame, exact=not self.training)

    def full_frame(self, size: tuple[int, int], *, flipped: bool = False) -> Frame:
        """The frame of a whole image of size H, W: that of all samples but those of `scale`."""
        return make_frame(size, self.frame_size, resize_mode=self.resize_mode, flipped=flipped)

    def _place_window(self, frame: Frame, row: int, corner: tuple[int, int]) -> Frame:
        # The frame of a window, with the place of the window in its image.
        if self.subset.windows is None:
            return frame
        size = self.subset.index.sizes[self.subset.rows[row]].tolist()
        return replace(frame, origin=corner, whole_size=tuple(size))

    def _sample_without_objects(self, row: int) -> Sample:
        # Stands for an image that cannot be read, so that validation's order stays the same.
        frame = self.full_frame(self.subset.size(row))
        grids = make_grids(np.zeros((0, 4)), frame, resolution=self.loss_resolution)
        return Sample(
            image=torch.zeros(*self.frame_size, 3, dtype=torch.uint8).movedim(2, 0),
            boxes=torch.zeros(0, 4),
            windows=torch.zeros(0, 4),
            targets=torch.from_numpy(grids.empty_targets()),
            input_size=frame.input_size,
            original_size=frame.original_size,
            image_id=self.subset.image_id(row),
            object_ids=torch.zeros(0, dtype=torch.int64),
            truths=[],
        )

    def _draw_corner(self, row: int, generator: np.random.Generator) -> tuple[int, int]:
        # y, x of a window that may be anywhere where it holds the objects that it holds now.
        low, high = self.subset.free_corners(row)
        y, x = generator.integers(low, high, endpoint=True).tolist()
        return y, x

    def _choose_placement(
        self,
        row: int,
        size: tuple[int, int],
        corner: tuple[int, int],
        generator: np.random.Generator,
    ) -> _Placement:
        draw = partial(self._draw_placement, row, size, corner=corner, generator=generator)
        if not self.training:
            return draw(augment="none")
        for _ in range(_MAX_CROP_DRAWS):
            placement = draw(augment=self.augment)
            # Only a crop can leave out all objects of an image: try another one.
            if len(placement.objects) or not placement.frame.is_cropped:
                return placement
        return draw(augment="flip")

    def _draw_placement(
        self,
        row: int,
        size: tuple[int, int],
        *,
        corner: tuple[int, int],
        augment: str,
        generator: np.random.Generator,
    ) -> _Placement:
        index, objects = self.subset.index, self.subset.objects_of(row)
        frame = draw_frame(
            size,
            self.frame_size,
            resize_mode=self.resize_mode,
            augment=augment,
            generator=generator,
        )
        frame = self._place_window(frame, row, corner)
        if not self.training:
            return _Placement(frame, objects, self.subset.visible_boxes(row))
        if frame.is_cropped:  # before the random subset, which is then full of visible objects
            objects = objects[boxes_in_frame(index.boxes[objects], frame)]
        if 0 < self.max_masks_per_image < len(objects):
            chosen = generator.choice(objects, self.max_masks_per_image, replace=False)
            objects = np.sort(chosen)
        kept, boxes = filter_cropped_objects(
            index.boxes[objects],
            frame,
            decode_mask=lambda k: decode_cropped(
                index.segmentations[int(objects[k])], frame.file_size
            ),
        )
        return _Placement(frame, objects[kept], boxes)
