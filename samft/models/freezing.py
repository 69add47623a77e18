"""Which of SAM's parameters train: parts frozen as asked, and what boxes cannot reach."""

from collections.abc import Iterable

from segment_anything.modeling import Sam

# Box prompts reach none of these: they would get no gradient (and stop DistributedDataParallel),
# or one of exactly zero (and weight decay would shrink them to nothing).
_UNREACHABLE_BY_BOXES = (
    "prompt_encoder.point_embeddings.0.",
    "prompt_encoder.point_embeddings.1.",
    "prompt_encoder.not_a_point_embed.",
    "prompt_encoder.mask_downscaling.",
    "mask_decoder.output_hypernetworks_mlps.1.",
    "mask_decoder.output_hypernetworks_mlps.2.",
    "mask_decoder.output_hypernetworks_mlps.3.",
)


def freeze(sam: Sam, parts: Iterable[str]) -> list[str]:
    """Freezes whole parts, and exactly the parameters that box prompts with one mask cannot reach.

    Args:
        sam: The model, changed in place.
        parts: Any of `image_encoder`, `prompt_encoder`, `mask_decoder`.

    Returns:
        The names of the parameters frozen because box prompts cannot reach them, outside of
        the parts that were asked for.
    """
    prefixes = tuple(f"{part}." for part in parts)
    unreachable = []
    for name, parameter in sam.named_parameters():
        out_of_reach = name.startswith(_UNREACHABLE_BY_BOXES)
        frozen = name.startswith(prefixes)
        parameter.requires_grad_(not (frozen or out_of_reach))
        if out_of_reach and not frozen:
            unreachable.append(name)
    return unreachable


def constant_names(sam: Sam) -> list[str]:
    """The keys of a SAM's state dict whose tensors training does not change; after `freeze`."""
    trained = {name for name, parameter in sam.named_parameters() if parameter.requires_grad}
    return [name for name in sam.state_dict() if name not in trained]
