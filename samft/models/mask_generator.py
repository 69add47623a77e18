"""SAM's predictor and automatic mask generator: the package's own, for images that are not square.

The generator has a progress bar inside of an image, too.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, automatic_mask_generator
from segment_anything.modeling import Sam
from segment_anything.utils.amg import MaskData
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from tqdm import tqdm

from samft.models.sam import RectangleSam
from samft.runtime.device import exact_float32
from samft.runtime.logs import progress_bar
from samft.runtime.torchvision_compat import replace_missing_nms
from samft.views.fitting import fit_size

_DEFAULT_POINTS_PER_BATCH = 64  # the automatic mask generator's own
_PIXELS_OF_DEFAULT = 1024 * 1024  # the largest image for which that many are decoded
_BAR_DELAY = 2.0  # seconds that an image may take before it gets a bar of its own


class _FitIntoRectangle(ResizeLongestSide):
    # As in validation: the image just fits, which its longer side does not decide alone.
    def __init__(self, frame_size: tuple[int, int]) -> None:
        super().__init__(max(frame_size))
        self.frame_size = frame_size

    def get_preprocess_shape(self, oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        return fit_size((oldh, oldw), self.frame_size)


class _RectanglePredictor(SamPredictor):
    def __init__(self, sam: RectangleSam) -> None:
        super().__init__(sam)
        self.transform = _FitIntoRectangle(sam.frame_size)

    @torch.no_grad()
    def set_torch_image(self, transformed_image: Tensor, original_image_size: Any) -> None:
        # Stock's, which insists on a longer side of S.
        self.reset_image()
        self.original_size = original_image_size
        self.input_size = tuple(transformed_image.shape[-2:])
        self.features = self.model.image_encoder(self.model.preprocess(transformed_image))
        self.is_image_set = True


def make_predictor(sam: Sam) -> SamPredictor:
    """Stock's `SamPredictor`; of a `RectangleSam` one with the same calls that pads to its shape.

    Args:
        sam: On its device, in eval mode; not copied.
    """
    return _RectanglePredictor(sam) if isinstance(sam, RectangleSam) else SamPredictor(sam)


class MaskGenerator(SamAutomaticMaskGenerator):
    """`SamAutomaticMaskGenerator` in exact float32; its masks are uncompressed RLE.

    The masks are the package's own. It stops with an error where there are crops and no mask at
    all, or where a crop of a tiny image has no pixel: here these are no masks.

    Attributes:
        show_progress: Whether an image that takes long gets a progress bar.
    """

    def __init__(
        self,
        sam: Sam,
        *,
        points_per_batch: int | None = None,
        show_progress: bool = True,
        **settings: Any,
    ) -> None:
        """Wraps a model without copying it.

        Args:
            sam: On its device, in eval mode, at any image size.
            points_per_batch: Points decoded at once; None: `choose_points_per_batch`.
            show_progress: See there.
            settings: The others of `SamAutomaticMaskGenerator`: `points_per_side`, ...
        """
        replace_missing_nms(automatic_mask_generator)
        super().__init__(sam, output_mode="uncompressed_rle", **settings)
        self.predictor = make_predictor(sam)
        self._given_points_per_batch, self.show_progress = points_per_batch, show_progress
        self._bar: tqdm[Any] | None = None

    @property
    def num_points(self) -> int:
        """Points that the model is prompted with in an image of any size, those of crops included.

        Source: `generate_crop_boxes` of segment_anything, with 2^k x 2^k crops in layer k.
        """
        return sum(4**layer * len(grid) for layer, grid in enumerate(self.point_grids))

    def generate(self, image: NDArray[np.uint8]) -> list[dict[str, Any]]:
        """The masks of an image, see the package's `generate`.

        Args:
            image: uint8 [H, W, 3], RGB.
        """
        height, width = image.shape[:2]
        fitting = choose_points_per_batch((height, width))
        self.points_per_batch = self._given_points_per_batch or fitting
        with (
            exact_float32(),
            progress_bar(
                total=self.num_points,
                unit="point",
                desc="this image",
                hidden=not self.show_progress,
                leave=False,
                delay=_BAR_DELAY,
            ) as self._bar,
        ):
            masks: list[dict[str, Any]] = super().generate(image)
        return masks

    def _process_crop(self, image: NDArray[np.uint8], crop_box: list[int], *layer: Any) -> MaskData:
        x0, y0, x1, y1 = crop_box
        if x1 <= x0 or y1 <= y0:  # of an image that is a few pixels wide
            return MaskData()
        data = super()._process_crop(image, crop_box, *layer)
        data["crop_boxes"] = data["crop_boxes"].reshape(-1, 4)  # of shape [0] without a mask
        return data

    def _process_batch(self, points: NDArray[np.float64], *place: Any) -> MaskData:
        data = super()._process_batch(points, *place)
        if self._bar is not None:
            self._bar.update(len(points))
        return data


def choose_points_per_batch(size: tuple[int, int]) -> int:
    """The generator's `points_per_batch` for an image, so that memory does not grow with its size.

    The generator holds three masks per point at the image's own resolution. The masks that it finds
    do not depend on this number.

    Args:
        size: H, W of the image, px.
    """
    fitting = _DEFAULT_POINTS_PER_BATCH * _PIXELS_OF_DEFAULT // (size[0] * size[1])
    return max(1, min(_DEFAULT_POINTS_PER_BATCH, fitting))
