"""The parameter names of `transformers`' SamModel, from SAM's own and back."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# segment_anything's parameter names -> transformers', applied in this order. A test loads the names
# of every model type into SamModel: none may be missing or left over, and all shapes must be equal.
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
        (r"^image_encoder\.", "vision_encoder."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
        (r"\.neck\.0\.", ".neck.conv1."),
        (r"\.neck\.1\.", ".neck.layer_norm1."),
        (r"\.neck\.2\.", ".neck.conv2."),
        (r"\.neck\.3\.", ".neck.layer_norm2."),
        (
            r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
            "shared_image_embedding.positional_embedding",
        ),
        (r"\.point_embeddings\.", ".point_embed."),
        (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
        (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
        (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
        (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
        (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
        (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
        (r"\.norm([1-4])\.", r".layer_norm\1."),
        (r"\.output_upscaling\.0\.", ".upscale_conv1."),
        (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
        (r"\.output_upscaling\.3\.", ".upscale_conv2."),
        (r"(_mlps\.\d|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
        (r"(_mlps\.\d|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
        (r"(_mlps\.\d|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
    )
)
# transformers ties the second to the first, and older files hold both.
_SHARED, _TIED = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)


def huggingface_name(name: str) -> str:
    """The name in `transformers`' SamModel of a parameter with this name in SAM."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def to_huggingface_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SAM's state dict with the parameter names of `transformers`' SamModel.

    Args:
        state: SAM's own keys -> tensors.

    Returns:
        The same tensors. `prompt_encoder.shared_embedding` has no entry, because transformers ties
        it to `shared_image_embedding`.
    """
    return {huggingface_name(name): tensor.contiguous() for name, tensor in state.items()}


def from_huggingface_names(
    state: Mapping[str, Tensor], sam_names: Iterable[str]
) -> dict[str, Tensor]:
    """The state dict of a SamModel with SAM's own keys.

    Args:
        state: Names of `transformers` -> tensors.
        sam_names: All keys of SAM, of the same model type.

    Returns:
        The same tensors; names that SAM has no key for are kept.
    """
    own = {huggingface_name(name): name for name in sam_names}
    state = dict(state)
    if _TIED in state:
        state.setdefault(_SHARED, state.pop(_TIED))
    return {own.get(name, name): tensor for name, tensor in state.items()}
