"""`samft.load_predictor`: the calls of `SamPredictor`, with the windows that a checkpoint knows."""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)

# isort: split
import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam

from samft.errors import ConfigError
from samft.images.pixels import PLAIN, PixelFormat
from samft.models.mask_generator import make_predictor
from samft.models.sam import load_sam, open_checkpoint, warn_of_squash
from samft.prediction.points import NO_BOX, PointPrompt
from samft.prediction.windows import group_prompts, prompts_to_window, reaches_beyond
from samft.views.regions import DecodedImage, ImageSource, open_source
from samft.views.windows import View
from samft.weights.saved_settings import check_view, saved_pixels, saved_rectangle, view_of

_KEPT_WINDOWS = 16  # whose embeddings are kept: 4 MB each at 1024 px
_STATE = ("features", "original_size", "input_size", "is_image_set")  # of a `SamPredictor`

Masks = tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]


class WindowPredictor:
    """`SamPredictor` on windows of an image; with `view image`, on all of it, as `SamPredictor`.

    Attributes:
        model: The SAM.
        view: How images are seen.
        window: What the last prompt was seen through, x0 y0 x1 y1, px; None before the first.
    """

    def __init__(self, model: Sam, view: View, pixels: PixelFormat = PLAIN) -> None:
        """Wraps a model without copying it; see `load_predictor`."""
        self.model, self.view = model, view
        self._pixels, self._stock = pixels, make_predictor(model)
        self.reset_image()

    @property
    def device(self) -> torch.device:
        """That of the model."""
        return self.model.device

    def reset_image(self) -> None:
        """Forgets the image and its embeddings."""
        self._source: ImageSource | None = None
        self._shown: OrderedDict[tuple[int, ...], dict[str, Any]] = OrderedDict()
        self.window: NDArray[np.int64] | None = None
        self._stock.reset_image()

    def set_image(self, image: NDArray[np.uint8] | str | Path, image_format: str = "RGB") -> None:
        """Takes the image that `predict` is about; windows are encoded when a prompt needs them.

        Args:
            image: uint8 [H, W, 3]; or a file, of which only windows are read, as training read it,
                but not turned as EXIF says.
            image_format: `RGB` or `BGR`, of an array.

        Raises:
            ImageError: The file cannot be used.
            ValueError: `image_format` is neither, or the image is no such array.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', not {image_format!r}.")
        self.reset_image()
        if isinstance(image, (str, Path)):
            self._source = open_source(Path(image), pixels=self._pixels)
            return
        _check_pixels(image)
        # A copy: windows are cut later, when the caller may have drawn masks on the image.
        self._source = DecodedImage((image if image_format == "RGB" else image[..., ::-1]).copy())

    def predict(
        self,
        point_coords: NDArray[np.floating] | None = None,
        point_labels: NDArray[np.integer] | None = None,
        box: NDArray[np.floating] | None = None,
        mask_input: NDArray[np.float32] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Masks:
        """The masks of one object, as `SamPredictor.predict` on the window that shows it best.

        Args:
            point_coords: [P, 2], x y, px of the image. Those outside of the window are left out; of
                the object's own, that is a warning.
            point_labels: [P], 1 for points of the object, 0 for others.
            box: [4], x0 y0 x1 y1, px of the image; cut at the window's edges.
            mask_input: [1, H/4, W/4], the logits of the last prediction; its window is used again.
            multimask_output: Three masks instead of one.
            return_logits: Logits instead of masks; outside of the window they are -inf.

        Returns:
            Masks bool [C, H, W] of the whole image, the predicted IoU of each, and the logits
            [C, H/4, W/4] of the window.

        Raises:
            RuntimeError: There is no image.
            ValueError: Nothing says which object is meant, or the last window does not show it.
        """
        if self._source is None:
            raise RuntimeError("An image must be set with .set_image(...) before mask prediction.")
        prompt: dict[str, Any] = {"point_coords": point_coords, "point_labels": point_labels}
        prompt["box"] = box
        if self.view.has_windows:
            prompt = self._choose_window(_to_prompt(**prompt), keep=mask_input is not None)
        else:
            self.window = np.array([0, 0, *self._source.size[::-1]], dtype=np.int64)
        assert self.window is not None
        self._show_window(self.window)
        masks, scores, logits = self._stock.predict(
            **prompt,
            mask_input=mask_input,
            multimask_output=multimask_output,
            return_logits=return_logits,
        )
        return self._paste_masks(masks), scores, logits

    def get_image_embedding(self) -> torch.Tensor:
        """The embedding of `window`, as `SamPredictor.get_image_embedding`."""
        return self._stock.get_image_embedding()

    def _choose_window(self, prompt: PointPrompt, *, keep: bool) -> dict[str, Any]:
        # Sets the window, and returns the prompt in it.
        assert self._source is not None
        if not keep:
            self.window = group_prompts([prompt], self._source.size, self.view).windows[0]
        elif self.window is None:
            raise ValueError("mask_input: there is no earlier prediction on this image.")
        (moved,) = prompts_to_window([prompt], [0], self.window)
        if moved.has_box and not (moved.box[2:] > moved.box[:2]).all():
            raise ValueError("box: it lies outside of the image, or of the window of mask_input.")
        if not (moved.has_box or len(moved.points)):
            raise ValueError("point_coords: all lie outside of the image, or of the last window.")
        if reaches_beyond(prompt, self.window):
            warnings.warn(
                f"the object reaches beyond its window, {self.window.tolist()}: masks end at its "
                "edge, and points beyond it are not used. A larger tile_size shows more.",
                stacklevel=3,
            )
        return {
            "point_coords": moved.points[:, :2] if len(moved.points) else None,
            "point_labels": moved.points[:, 2].astype(int) if len(moved.points) else None,
            "box": moved.box if moved.has_box else None,
        }

    def _show_window(self, window: NDArray[np.int64]) -> None:
        assert self._source is not None
        key = tuple(window.tolist())
        if key not in self._shown:
            self._stock.set_image(self._source.read(window))
            self._shown[key] = {name: getattr(self._stock, name) for name in _STATE}
            if len(self._shown) > _KEPT_WINDOWS:
                self._shown.popitem(last=False)
        self._shown.move_to_end(key)
        for name, value in self._shown[key].items():
            setattr(self._stock, name, value)

    def _paste_masks(self, masks: NDArray[Any]) -> NDArray[Any]:
        assert self._source is not None and self.window is not None
        x0, y0, x1, y1 = self.window.tolist()
        if masks.shape[1:] == self._source.size:
            return masks
        outside = False if masks.dtype == bool else -np.inf
        whole = np.full((len(masks), *self._source.size), outside, dtype=masks.dtype)
        whole[:, y0:y1, x0:x1] = masks
        return whole


def _check_pixels(image: Any) -> None:
    # Other types would be taken for 8 bits in silence, or fail somewhere within torchvision.
    is_image = isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3
    if not (is_image and image.size and image.dtype == np.uint8):
        facts = [str(getattr(image, name)) for name in ("dtype", "shape") if hasattr(image, name)]
        what = " ".join(facts) or type(image).__name__
        raise ValueError(
            f"image: it must be a NumPy array, uint8 [height, width, 3], not {what}: take "
            "np.array(image.convert('RGB')) of a PIL image, or give the file itself."
        )


def _to_prompt(
    point_coords: NDArray[np.floating] | None,
    point_labels: NDArray[np.integer] | None,
    box: NDArray[np.floating] | None,
) -> PointPrompt:
    if point_coords is None and box is None:
        raise ValueError("give a box or points: windows are chosen by where the object is.")
    coords = np.zeros((0, 2)) if point_coords is None else np.asarray(point_coords).reshape(-1, 2)
    labels = np.zeros(0) if point_labels is None else np.asarray(point_labels).reshape(-1)
    if len(coords) != len(labels):
        raise ValueError("point_labels: give one for each of point_coords.")
    if not np.isfinite(coords).all():
        raise ValueError("point_coords: they must be finite numbers.")
    points = np.column_stack([coords, labels]).astype(np.float64)
    if box is None:
        return PointPrompt(points, np.array(NO_BOX))
    corners = np.asarray(box, dtype=np.float64).reshape(-1)
    if len(corners) != 4:
        raise ValueError("box: it is x0, y0, x1, y1 of one object; call predict for each.")
    if not (np.isfinite(corners).all() and (corners[2:] > corners[:2]).all()):
        raise ValueError("box: it is x0, y0, x1, y1, finite numbers with x1 > x0 and y1 > y0.")
    return PointPrompt(points, corners)


def load_predictor(
    path: str | Path, *, view: View | None = None, device: str | torch.device = "cpu"
) -> WindowPredictor:
    """Loads a checkpoint to predict as it was trained: with `SamPredictor`'s calls, on its windows.

    Args:
        path: See `load_sam`.
        view: Other windows than those of training, see `samft.views.windows.View`.
        device: The device to put it on.

    Raises:
        CheckpointError: The file cannot be read or is not a SAM.
        ConfigError: `view` is no view; or it has windows, and the checkpoint is for whole images
            that are not square.

    Example:
        >>> from importlib.resources import files
        >>> predictor = load_predictor(files("samft") / "pretrained" / "vit_tiny.pth")
        >>> predictor.set_image(np.zeros((96, 128, 3), dtype=np.uint8))
        >>> masks, scores, logits = predictor.predict(box=np.array([8, 8, 40, 40]))
        >>> masks.shape, predictor.window.tolist()
        ((3, 96, 128), [0, 0, 128, 96])
    """
    if view is not None:
        if not isinstance(view, View):
            kind = type(view).__name__
            raise ConfigError(f"view: give a samft.views.windows.View('tiles'), say, not a {kind}.")
        check_view(view, path, name="view")
    if saved_rectangle(path) is None:
        sam = load_sam(path, device=device)
    else:  # which `load_sam` and stock's attention do not know
        opened = open_checkpoint(Path(path), attention="fast", as_trained=True)
        warn_of_squash(path, opened)
        sam = opened.sam.to(device)
    if view is None:
        view = view_of(Path(path), {}, image_size=sam.image_encoder.img_size)
    pixels = saved_pixels(path) or PLAIN
    return WindowPredictor(sam, view, replace(pixels, in_windows=view.has_windows))
