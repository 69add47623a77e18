"""SAM of any model type at any image size: built, and loaded from a checkpoint.

Everything is made of the modules of the `segment_anything` package, with its keys, so what is saved
is what that package reads.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from samft import distributed
from samft.cli import parse_image_size
from samft.errors import CheckpointError, escape_paragraph
from samft.images import decoder
from samft.images.pixels import PLAIN
from samft.models.image_encoder import FastBlock, add_positions, use_fast_attention
from samft.runtime.checkpoint_paths import find_weights_file
from samft.runtime.files import matches_sidecar
from samft.runtime.logs import LOGGER
from samft.weights.checkpoint_files import read_checkpoint_file
from samft.weights.huggingface_names import from_huggingface_names
from samft.weights.saved_settings import saved_pixels, saved_rectangle, saved_resize_mode
from samft.weights.state_dicts import HUGGINGFACE_POSITIONS, POSITIONS, find_state, to_float32

PATCH_SIZE = 16
PIXEL_MEAN = [123.675, 116.28, 103.53]
PIXEL_STD = [58.395, 57.12, 57.375]


@dataclass(frozen=True)
class ModelShape:
    """The numbers in which one SAM differs from another.

    Source: `segment_anything/build_sam.py` for Meta's three; `vit_tiny` is ours.
    """

    encoder_width: int
    encoder_depth: int
    encoder_heads: int
    global_attention_blocks: tuple[int, ...]
    window_size: int = 14
    decoder_width: int = 256
    decoder_mlp_width: int = 2048


MODEL_SHAPES = {
    "vit_h": ModelShape(1280, 32, 16, (7, 15, 23, 31)),
    "vit_l": ModelShape(1024, 24, 16, (5, 11, 17, 23)),
    "vit_b": ModelShape(768, 12, 12, (2, 5, 8, 11)),
    "vit_tiny": ModelShape(128, 4, 4, (1, 3), 8, decoder_width=128, decoder_mlp_width=512),
}


class RectangleEncoder(ImageEncoderViT):
    """The stock encoder, for images that are the top left of its square; see `image_encoder`."""

    def see_part(self, grid: tuple[int, int]) -> None:
        """Has the blocks that attend to the whole map take it for a part of the square.

        Args:
            grid: Its h, w in tokens.

        Raises:
            ValueError: They are stock's blocks.
        """
        for block in self.blocks:
            if not isinstance(block, FastBlock):
                raise ValueError("an image size that is not square needs attention 'fast'.")
            block.part = None if block.window_size else grid

    def forward(self, x: Tensor) -> Tensor:
        """Float [N, 3, H, W] to [N, C, H/16, W/16]."""
        x = add_positions(self, self.patch_embed(x))
        for block in self.blocks:
            x = block(x)
        embeddings: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return embeddings


class RectangleSam(Sam):
    """SAM for images of H x W px, with the parameters of the square around them.

    Everything is where it is in the square of S px, the longer side: it sees the same pixels and
    prompts, without the padding (`image_encoder`, "Rectangles"). Its weights are those of a square.

    Attributes:
        frame_size: H, W.
    """

    def __init__(self, frame_size: tuple[int, int], **parts: Any) -> None:
        """Takes the arguments of `Sam`."""
        super().__init__(**parts)
        self.frame_size = frame_size

    def preprocess(self, x: Tensor) -> Tensor:
        """As stock's, padded to H x W."""
        (height, width), (bottom, right) = x.shape[-2:], self.frame_size
        return F.pad((x - self.pixel_mean) / self.pixel_std, (0, right - width, 0, bottom - height))

    def postprocess_masks(
        self, masks: Tensor, input_size: tuple[int, ...], original_size: tuple[int, ...]
    ) -> Tensor:
        """As stock's, from low-resolution masks of H/4 x W/4."""
        resize = partial(F.interpolate, mode="bilinear", align_corners=False)
        inside = resize(masks, self.frame_size)[..., : input_size[0], : input_size[1]]
        return resize(inside, original_size)


class _RectanglePrompts(PromptEncoder):
    # Places are those of the square, as of `input_image_size`; the image's part of them is dense.
    def get_dense_pe(self) -> Tensor:
        height, width = self.image_embedding_size
        side = max(height, width)
        return self.pe_layer((side, side))[None, :, :height, :width]


def build_sam(model_type: str, image_size: int | str = 1024, *, attention: str = "stock") -> Sam:
    """Builds a SAM with freshly initialised weights, in eval mode.

    Args:
        model_type: A key of `MODEL_SHAPES`.
        image_size: Side of the square model input in pixels, a multiple of 16; or `WIDTHxHEIGHT`.
        attention: Of the image encoder: `fast` for the one of `samft.models.image_encoder`, with
            the same keys and numbers, or `stock`.

    Returns:
        A `segment_anything` Sam with position embeddings for the size; if that is no square, a
        `RectangleSam`.

    Raises:
        ValueError: `attention` is neither of these, or `stock`, which knows squares only, for none.
    """
    if attention not in ("fast", "stock"):
        raise ValueError(f"attention must be 'fast' or 'stock', not {attention!r}.")
    shape = MODEL_SHAPES[model_type]
    frame_size = parse_image_size(image_size)
    grid = (frame_size[0] // PATCH_SIZE, frame_size[1] // PATCH_SIZE)
    side, is_square = max(frame_size), frame_size[0] == frame_size[1]
    sam = (Sam if is_square else partial(RectangleSam, frame_size))(
        image_encoder=(ImageEncoderViT if is_square else RectangleEncoder)(
            depth=shape.encoder_depth,
            embed_dim=shape.encoder_width,
            img_size=side,
            mlp_ratio=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_heads=shape.encoder_heads,
            patch_size=PATCH_SIZE,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=shape.global_attention_blocks,
            window_size=shape.window_size,
            out_chans=shape.decoder_width,
        ),
        prompt_encoder=(PromptEncoder if is_square else _RectanglePrompts)(
            embed_dim=shape.decoder_width,
            image_embedding_size=grid,
            input_image_size=(side, side),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                2, shape.decoder_width, mlp_dim=shape.decoder_mlp_width, num_heads=8
            ),
            transformer_dim=shape.decoder_width,
            iou_head_depth=3,
            iou_head_hidden_dim=shape.decoder_width,
        ),
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
    )
    if attention == "fast":
        use_fast_attention(sam.image_encoder)
    if isinstance(sam.image_encoder, RectangleEncoder):
        sam.image_encoder.see_part(grid)
    return sam.eval()


def read_state(path: Path, *, quiet: bool = False) -> dict[str, Tensor]:
    """Reads the weights of a SAM, whichever program saved them in whichever format.

    Args:
        path: Meta's `.pth`, a `.ckpt` of samft, a training state of another program, safetensors,
            or a folder of `transformers`. Only tensors and plain Python values are ever loaded.
        quiet: Whether to log nothing of wrappers, prefixes and dtypes, because the weights are
            read once more.

    Returns:
        Exactly SAM's own keys to float32 tensors of its shapes (of positions: of any image size),
        on the CPU.

    Raises:
        CheckpointError: The file is absent, unreadable, or holds no SAM weights.
    """
    file = find_weights_file(path)
    sidecar = file.with_suffix(".json")
    if file.suffix == ".ckpt" and sidecar.is_file() and not matches_sidecar(file, sidecar):
        raise CheckpointError(
            f"{file} is damaged: its SHA-256 is not the one in {sidecar.name}. "
            "Copy it again, or take another checkpoint."
        )
    read = read_checkpoint_file(file)
    if "base_sha256" in read.metadata:
        raise CheckpointError(
            f"{file} holds adapters alone, which are no model without their base: merge them into "
            "it with `samft export --checkpoint BASE --adapter FILE`, or give the .ckpt beside it."
        )
    extracted = find_state(read.content, source=file)
    state, notes = to_float32(extracted.state, file_bytes=read.num_bytes, source=file)
    if extracted.is_huggingface:
        positions = {POSITIONS: state[HUGGINGFACE_POSITIONS]}
        names = _shapes_of_model(*identify_model(positions, source=file))
        state = from_huggingface_names(state, names)
        notes.insert(0, "names of transformers translated")
    # Before any model is built: a file of a few bytes may pose as the largest one.
    misfit = describe_misfit(state, _shapes_of_model(*identify_model(state, source=file)))
    if misfit is not None:
        raise CheckpointError(f"{file} does not fit the model: {misfit}.")
    is_last = isinstance(read.content, dict) and "format" in read.content  # of samft itself
    notes = [*extracted.notes * (not is_last), *notes]
    if notes and not quiet and distributed.is_main():
        LOGGER.warning("%s", escape_paragraph(f"{file}: {'; '.join(notes)}"))
    return state


@lru_cache(maxsize=4)
def _shapes_of_model(model_type: str, image_size: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        state = build_sam(model_type, image_size).state_dict()
    return {name: tensor.shape for name, tensor in state.items()}


def identify_model(
    state: dict[str, Tensor], *, source: object = "the checkpoint"
) -> tuple[str, int]:
    """Identifies the model that a state dict belongs to, by the shapes of its tensors.

    Args:
        state: SAM's own keys to tensors.
        source: Names the state dict in the error.

    Returns:
        The model type and the image size in pixels.

    Raises:
        CheckpointError: It is not a SAM of a known type.
    """
    positions = state.get(POSITIONS)
    if positions is None or positions.ndim != 4:
        raise CheckpointError(
            f"{source} holds no SAM image encoder ('{POSITIONS}' is missing, or not of four "
            "dimensions): samft reads SAM 1 checkpoints (vit_h, vit_l, vit_b) and its own."
        )
    one, height, grid, width = positions.shape
    if one != 1 or height != grid or not grid:
        raise CheckpointError(
            f"{source} has position embeddings of the shape {tuple(positions.shape)}, which are "
            "those of no square image."
        )
    for model_type, shape in MODEL_SHAPES.items():
        if shape.encoder_width == width:
            return model_type, grid * PATCH_SIZE
    raise CheckpointError(f"{source} has an encoder {width} wide, which no known model type has.")


def fit_positions(state: dict[str, Tensor], sam: Sam) -> dict[str, Tensor]:
    """Resizes position embeddings to another image size; everything else passes through.

    Absolute positions are resampled bicubically with antialiasing; relative positions linearly,
    which is what SAM's attention itself does at run time: with these nothing changes.

    Args:
        state: SAM's own keys to tensors.
        sam: The model that they are for.

    Returns:
        A new dict with every position tensor in the shape that `sam` has.
    """
    target = sam.state_dict()
    fitted = dict(state)
    for name, tensor in state.items():
        if name not in target or tensor.shape == target[name].shape:
            continue
        shape = target[name].shape
        if not _is_resizable(name, tensor, shape):
            continue
        if name.endswith("pos_embed"):
            fitted[name] = F.interpolate(
                tensor.float().permute(0, 3, 1, 2),
                size=shape[1:3],
                mode="bicubic",
                antialias=True,
                align_corners=False,
            ).permute(0, 2, 3, 1)
        else:
            fitted[name] = F.interpolate(
                tensor.float().T[None], size=shape[0], mode="linear", align_corners=False
            )[0].T.contiguous()
    return fitted


def describe_misfit(state: Mapping[str, Tensor], target: Mapping[str, torch.Size]) -> str | None:
    """How weights differ from those of a model: names that are missing or unknown, other shapes.

    Args:
        state: Keys to tensors.
        target: Keys of the model to the shapes that it has; positions may be of any length.

    Returns:
        The first few of each kind; None if all fit.
    """
    missing = [name for name in target if name not in state]
    extra = [name for name in state if name not in target]
    misshapen = [
        n
        for n, shape in target.items()
        if n in state and state[n].shape != shape and not _is_resizable(n, state[n], shape)
    ]
    kinds = (("missing", missing), ("unknown", extra), ("of another shape", misshapen))
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds
        if names
    ]
    return "; ".join(problems) or None


def _is_resizable(name: str, tensor: Tensor, shape: torch.Size) -> bool:
    if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1] or not tensor.numel():
        return False
    return name.endswith("pos_embed") or ".rel_pos_" in name


def load_state(sam: Sam, state: dict[str, Tensor], *, source: object = "the checkpoint") -> None:
    """Loads weights into a SAM in place, resizing positions where the image size differs.

    Args:
        sam: The model.
        state: SAM's own keys to tensors, of the same model type.
        source: Names the weights in the error.

    Raises:
        CheckpointError: Keys or shapes do not fit; the first few are named.
    """
    target = {name: tensor.shape for name, tensor in sam.state_dict().items()}
    misfit = describe_misfit(state, target)
    if misfit is not None:
        raise CheckpointError(f"{source} does not fit the model: {misfit}.")
    fitted = fit_positions(state, sam)
    infinite = [n for n, tensor in fitted.items() if not bool(torch.isfinite(tensor).all())]
    if infinite:
        raise CheckpointError(
            f"{source} holds values that are not finite, in {len(infinite)} tensors "
            f"({infinite[0]}, ...): take an earlier checkpoint."
        )
    sam.load_state_dict(fitted)


def read_image(path: str | Path, *, like: str | Path) -> NDArray[np.uint8]:
    """Reads an image for `SamPredictor` as the training of a checkpoint read its images.

    Args:
        path: An image file of any type; see `images.pixels`.
        like: A checkpoint of samft, or an export. With one that does not record it, 8-bit images
            are read as they are, and others by their own percentiles 1 and 99.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        ImageError: The file cannot be used.
        CheckpointError: There is no such checkpoint.
    """
    if not Path(like).exists():
        raise CheckpointError(f"there is no checkpoint {like}: check the path.")
    return decoder.read_image(Path(path), pixels=saved_pixels(like) or PLAIN)


class OpenedSam(NamedTuple):
    """A checkpoint's model, in eval mode, and the settings that it was tuned with.

    Attributes:
        sam: At the image size that it was tuned for.
        model_type: A key of `MODEL_SHAPES`.
        image_size: S; or `WIDTHxHEIGHT`, see `build_sam`.
        resize_mode: `pad` or `squash`; `pad`, SAM's own, if it is not recorded.
    """

    sam: Sam
    model_type: str
    image_size: int | str
    resize_mode: str


def open_checkpoint(path: Path, *, attention: str = "stock", as_trained: bool = False) -> OpenedSam:
    """Builds the model of a checkpoint, at its image size, and loads its weights.

    Args:
        path: See `load_sam`.
        attention: See `build_sam`; `fast` is for a rectangle, too.
        as_trained: Whether to build what was trained where the sidecar says that this was no
            square, instead of the square.

    Raises:
        CheckpointError: The file cannot be read or is not a SAM.
    """
    state = read_state(path)
    model_type, side = identify_model(state, source=path)
    image_size = (as_trained and saved_rectangle(path)) or side
    if max(parse_image_size(image_size)) != side:
        raise CheckpointError(
            f"{path} has positions for {side} px, but its sidecar says {image_size}: copy both "
            "from the same run."
        )
    sam = build_sam(model_type, image_size, attention=attention)
    load_state(sam, state, source=path)
    return OpenedSam(sam, model_type, image_size, saved_resize_mode(path))


def load_sam(path: str | Path, *, device: str | torch.device = "cpu") -> Sam:
    """Loads a SAM checkpoint of any type and image size, ready for `SamPredictor`.

    Model type and image size follow from the shapes of the tensors. The sidecar of a checkpoint of
    samft is read only to warn about a resize mode or a shape that `SamPredictor` does not have.

    Args:
        path: Meta's `.pth`, a `.ckpt` of samft, or `last.ckpt`.
        device: The device to put it on.

    Returns:
        A `segment_anything` Sam in eval mode, at the image size that it was tuned for.

    Raises:
        CheckpointError: The file cannot be read or is not a SAM.

    Example:
        >>> from importlib.resources import files
        >>> sam = load_sam(files("samft") / "pretrained" / "vit_tiny.pth")
        >>> sam.image_encoder.img_size
        256
    """
    opened = open_checkpoint(Path(path))
    if rectangle := saved_rectangle(path):
        warnings.warn(
            f"{path} was tuned at image_size {rectangle}; SamPredictor pads to a square, so its "
            "masks will differ from the validated ones: samft.load_predictor sees the rectangle.",
            stacklevel=2,
        )
    warn_of_squash(path, opened)
    return opened.sam.to(device).eval()


def warn_of_squash(path: str | Path, opened: OpenedSam) -> None:
    """Warns where a checkpoint saw other images in training than `SamPredictor` shows it."""
    if opened.resize_mode == "squash":
        warnings.warn(
            f"{path} was tuned with resize_mode 'squash'; SamPredictor pads, so its masks will "
            "differ from the validated ones.",
            stacklevel=3,
        )
