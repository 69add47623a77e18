"""What of a SAM is trained: what prompts and loss reach, but for the parts that are frozen."""

from collections.abc import Iterable

from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import nn

# What only some prompts, or some losses, reach. In a run without these it would get no gradient
# (and stop DistributedDataParallel), or one of exactly zero (and weight decay would shrink it to
# nothing).
_NEGATIVE_CLICK = "prompt_encoder.point_embeddings.0."
_POSITIVE_CLICK = "prompt_encoder.point_embeddings.1."
_BOX_CORNERS = ("prompt_encoder.point_embeddings.2.", "prompt_encoder.point_embeddings.3.")
_PADDING_POINT = "prompt_encoder.not_a_point_embed."  # where there are points and no box
_MASK_PROMPT = "prompt_encoder.mask_downscaling."
_IOU_HEAD = "mask_decoder.iou_prediction_head."
_ONE_MASK, *_THREE_MASKS = (f"mask_decoder.output_hypernetworks_mlps.{n}." for n in range(4))


def unreached_by(
    prompts: str,
    *,
    corrections: int = 0,
    mask_prompt: float = 0.0,
    multimask: str = "off",
    iou_loss: bool = True,
) -> tuple[str, ...]:
    """How the names of the parameters begin that no prompt, or no loss, of a run reaches.

    Args:
        prompts: What a step begins with: `box`, `point` (a positive one), or `mixed`.
        corrections: Rounds with one more click each, positive or negative, and one mask.
        mask_prompt: Probability that such a round has a mask prompt.
        multimask: Masks of a single point: `off` for one, `best` for three.
        iou_loss: Whether the predicted IoU has a part in the loss.
    """
    boxes, points = prompts in ("box", "mixed"), prompts in ("point", "mixed")
    only_three = multimask == "best" and not boxes and not corrections
    reached = {
        _NEGATIVE_CLICK: corrections > 0,
        _POSITIVE_CLICK: points or corrections > 0,
        **dict.fromkeys(_BOX_CORNERS, boxes),
        _PADDING_POINT: points,
        _MASK_PROMPT: corrections > 0 and mask_prompt > 0,
        _IOU_HEAD: iou_loss,
        _ONE_MASK: not only_three,
        **dict.fromkeys(_THREE_MASKS, points and multimask == "best"),
    }
    return tuple(prefix for prefix, is_reached in reached.items() if not is_reached)


def freeze(
    sam: Sam,
    parts: Iterable[str],
    *,
    unreached: tuple[str, ...] | None = None,
    train_blocks: int | None = None,
    train_norms: bool = False,
    train_biases: bool = False,
) -> list[str]:
    """Freezes whole parts, and exactly the parameters that the prompts of a run cannot reach.

    All other parameters are made trainable, whatever an earlier call froze.

    Args:
        sam: The model, changed in place.
        parts: Any of `image_encoder`, `prompt_encoder`, `mask_decoder`.
        unreached: From `unreached_by`; None: by boxes, with one mask each.
        train_blocks: Of the image encoder, train the last so many blocks and its neck only; None:
            all of it.
        train_norms: Whether the norm layers of what is frozen of the image encoder are trained.
        train_biases: Whether its biases are, those of norm layers included.

    Returns:
        The names of the parameters that are frozen only because the prompts cannot reach them, and
        not as part of `parts`.
    """
    prefixes = tuple(f"{part}." for part in parts)
    unreached = unreached_by("box") if unreached is None else unreached
    if train_blocks is not None:
        prefixes += _first_parts(len(sam.image_encoder.blocks) - train_blocks)
    apart = _names_in_encoder(sam, norms=train_norms, biases=train_biases)
    unreachable = []
    for name, parameter in sam.named_parameters():
        out_of_reach = name.startswith(unreached)
        frozen = name.startswith(prefixes) and name not in apart
        parameter.requires_grad_(not (frozen or out_of_reach))
        if out_of_reach and not frozen:
            unreachable.append(name)
    return unreachable


def _first_parts(num_blocks: int) -> tuple[str, ...]:
    # How the names of parameters begin that come before block `num_blocks` of the image encoder.
    names = ["pos_embed", "patch_embed.", *(f"blocks.{i}." for i in range(num_blocks))]
    return tuple(f"image_encoder.{name}" for name in names)


def _names_in_encoder(sam: Sam, *, norms: bool, biases: bool) -> set[str]:
    # Of the parameters of norm layers, and of biases.
    names: set[str] = set()
    for layer, module in sam.image_encoder.named_modules():
        is_norm = isinstance(module, nn.LayerNorm | LayerNorm2d)
        for name, _ in module.named_parameters(recurse=False):
            if (norms and is_norm) or (biases and name == "bias"):
                names.add(f"image_encoder.{layer}.{name}")
    return names


def constant_names(sam: Sam) -> list[str]:
    """The keys of a frozen SAM's state dict whose tensors training does not change."""
    trained = {name for name, parameter in sam.named_parameters() if parameter.requires_grad}
    return [name for name in sam.state_dict() if name not in trained]
