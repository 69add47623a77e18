"""Values of `TrainConfig` that do not go together, and values that no type forbids.

Imports no torch, as `config.py`, whose `TrainConfig.check` calls this.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

from samft.cli import (
    image_size_problem,
    name_image_size,
    parse_channels,
    parse_image_size,
    parse_pixel_range,
)

ADAPTER_TARGETS = ("q", "k", "v", "proj", "mlp")  # as in models/lora.py
MAX_OVERLAP = 0.9  # of tiles; with more there would be hundreds of them for each object
MAX_DECAY_FRACTION = 0.9  # the warm-up has up to a tenth of the steps
GROUPINGS = ("auto", "folder", "none")  # the values of `group_by` that are no pattern


# Settings that have no effect beside some values of others: when they have one.
_HAS_EFFECT: dict[str, Callable[[Any], bool]] = {
    "tile_size": lambda config: config.view != "image",
    "tile_overlap": lambda config: config.view == "tiles",
    "view_context": lambda config: config.view == "objects",
    "lora_alpha": lambda config: config.lora_rank is not None,
    "lora_targets": lambda config: config.lora_rank is not None,
    "mask_prompt": lambda config: config.num_corrections > 0,
    "decay_fraction": lambda config: config.lr_schedule == "wsd",
    "layer_decay": lambda config: not config.freeze_image_encoder or bool(_trained_apart(config)),
    # With augment scale, the colours are drawn after the boxes.
    "box_jitter": lambda config: config.prompts != "point" or config.augment == "scale",
    "val_fraction": lambda config: config.val_annotations is None,
    "group_by": lambda config: config.val_fraction is not None and config.val_annotations is None,
}
# Settings whose default depends on others: what they are where they are not given.
_DEFAULTS: dict[str, Callable[[Any], Any]] = {
    "tile_size": lambda config: max(parse_image_size(config.image_size)),
    "lora_alpha": lambda config: config.lora_rank,
    "correction_rounds": lambda config: config.num_corrections,
    "encoder_learning_rate": lambda config: config.learning_rate,
}


def has_effect(name: str, config: Any) -> bool:
    """Whether a setting changes what is learnt or seen, beside the other settings of a `config`."""
    return name not in _HAS_EFFECT or _HAS_EFFECT[name](config)


def effective_value(name: str, config: Any) -> Any:
    """The value by which a setting acts: None without effect, else as given, or its default."""
    if not has_effect(name, config):
        return None
    value = getattr(config, name)
    return _DEFAULTS[name](config) if value is None and name in _DEFAULTS else value


def pattern_problem(group_by: str) -> str | None:
    """What is wrong with a value of `group_by`; None if it is one of `GROUPINGS`, or a pattern."""
    try:
        if group_by in GROUPINGS or re.compile(group_by).groups:
            return None
    except re.error as error:
        return f"'{group_by}' is no regular expression ({error})."
    return (
        f"'{group_by}' is none of {', '.join(GROUPINGS)}, and as a regular expression it has no "
        "group in brackets, such as (.*)_frame."
    )


def find_conflicts(
    config: Any, *, model_types: tuple[str, ...], own: Collection[str] = ()
) -> list[str]:
    """All that is wrong with a configuration beyond the types and ranges of its fields.

    Args:
        config: A `TrainConfig`.
        model_types: The names that `model_type` can have.
        own: The splits that are datasets of a caller's in Python.

    Returns:
        Sentences, each beginning with the name of a field.
    """
    problems = _check_required(config, model_types, own)
    problems += _check_combinations(config)
    return problems + _check_pixels(config) + _check_view(config)


def _check_required(config: Any, model_types: tuple[str, ...], own: Collection[str]) -> list[str]:
    problems = []
    if config.model_type is None:
        problems.append(f"model_type is missing: give one of {', '.join(model_types)}.")
    if config.checkpoint_path is None:
        problems.append(
            "checkpoint_path is missing: give a SAM .pth or .ckpt file, 'auto' (the packaged "
            "file for vit_tiny, else a download) or 'random' (random weights)."
        )
    if config.data_root is None and config.train_annotations is None and "train" not in own:
        problems.append(
            "data_root is missing: give the dataset's folder, or train_annotations and "
            "train_images."
        )
    for split in ("train", "val", "test"):
        given = [getattr(config, f"{split}_{part}") for part in ("annotations", "images")]
        if any(given) and not all(given):
            problems.append(f"{split}_annotations and {split}_images go together.")
    return problems


def _check_combinations(config: Any) -> list[str]:
    problems = []
    are_frozen = (
        config.freeze_image_encoder and config.freeze_prompt_encoder and config.freeze_mask_decoder
    )
    if are_frozen and not _trained_apart(config):
        problems.append("freeze_*: all three parts are frozen, so nothing would be trained.")
    problems += _check_image_size(config)
    if not (config.loss_focal_weight or config.loss_dice_weight or config.loss_iou_weight):
        problems.append("loss_*_weight: all three weights are 0, so nothing would be learnt.")
    if config.val_fraction is not None and not 0 < config.val_fraction < 1:
        problems.append(f"val_fraction: {config.val_fraction} must lie between 0 and 1.")
    if problem := pattern_problem(config.group_by):
        problems.append(f"group_by: {problem}")
    if config.box_jitter > 0.5:
        problems.append(f"box_jitter: {config.box_jitter} must be at most 0.5.")
    if config.repeat_threshold is not None and not 0 < config.repeat_threshold <= 1:
        problems.append(f"repeat_threshold: {config.repeat_threshold} must lie between 0 and 1.")
    problems += _check_rates(config) + _check_prompts(config) + _check_adapters(config)
    return problems + _check_cache(config)


def _check_image_size(config: Any) -> list[str]:
    if problem := image_size_problem(config.image_size):
        return [f"image_size: {problem}."]
    problems, size = [], parse_image_size(config.image_size)
    named = name_image_size(size)
    if isinstance(named, str) and config.view != "image":
        problems.append(
            f"image_size: {named} is for whole images, and view '{config.view}' shows square "
            f"windows: take image_size {max(size)}, or view 'image'."
        )
    if isinstance(named, str) and config.attention == "stock":
        problems.append(
            f"image_size: {named} does not go with attention 'stock', which knows square images "
            f"only: take attention 'fast', or image_size {max(size)}."
        )
    return problems


def _trained_apart(config: Any) -> list[str]:
    return [name for name in ("train_norms", "train_biases") if getattr(config, name)]


def _check_adapters(config: Any) -> list[str]:
    problems = []
    names = config.lora_targets.split(",")
    if not set(names) <= set(ADAPTER_TARGETS) or len(set(names)) < len(names):
        problems.append(
            f"lora_targets: '{config.lora_targets}' is not a list of {', '.join(ADAPTER_TARGETS)}, "
            "separated by commas, each once at most."
        )
    if config.lora_alpha is not None and not 0 < config.lora_alpha < float("inf"):
        problems.append(f"lora_alpha: {config.lora_alpha} must be above 0.")
    if config.lora_rank is None:
        given = [name for name in ("lora_alpha", "lora_decoder") if getattr(config, name)]
        problems += [f"{name}: without lora_rank there are no adapters." for name in given]
    elif config.freeze_image_encoder and not config.lora_decoder:
        problems.append(
            "lora_rank: freeze_image_encoder leaves no layer to adapt: give one of the two, or "
            "lora_decoder."
        )
    elif config.lora_decoder and config.freeze_mask_decoder:
        problems.append("lora_decoder: freeze_mask_decoder leaves no layer to adapt.")
    return problems


def _check_rates(config: Any) -> list[str]:
    problems = []
    for name in ("learning_rate", "encoder_learning_rate"):
        rate = getattr(config, name)
        if rate is not None and not 0 < rate < float("inf"):
            problems.append(f"{name}: {rate} must be above 0.")
    if not 0 < config.layer_decay <= 1:
        problems.append(f"layer_decay: {config.layer_decay} must be above 0, and at most 1.")
    highest = max(config.learning_rate, config.encoder_learning_rate or 0)
    if config.anchor_weight * highest > 1:
        problems.append(
            f"anchor_weight: {config.anchor_weight} times the learning rate, {highest}, is above "
            f"1, the whole way back to the start: take at most {1 / highest:g}."
        )
    if not 0 < config.decay_fraction <= MAX_DECAY_FRACTION:
        problems.append(
            f"decay_fraction: {config.decay_fraction} must be above 0, and at most "
            f"{MAX_DECAY_FRACTION}."
        )
    if config.ema_decay >= 1:
        problems.append(f"ema_decay: {config.ema_decay} must be below 1.")
    if config.freeze_image_encoder:
        problems += [
            f"{name}: freeze_image_encoder leaves no block to train: give one of the two."
            for name in ("train_blocks", "encoder_learning_rate")
            if getattr(config, name) is not None
            and not (name == "encoder_learning_rate" and _trained_apart(config))
        ]
    elif config.train_blocks is None and config.lora_rank is None:
        problems += [
            f"{name}: the whole image encoder is trained, so these are, too: leave it out, or give "
            "freeze_image_encoder, train_blocks or lora_rank."
            for name in _trained_apart(config)
        ]
    return problems


def _check_prompts(config: Any) -> list[str]:
    problems = []
    if config.mask_prompt > 1:
        problems.append(f"mask_prompt: {config.mask_prompt} must be at most 1.")
    if config.multimask == "best" and config.prompts == "box":
        problems.append(
            "multimask: 'best' is for steps that begin with a point, and prompts is 'box': take "
            "prompts 'mixed' or 'point'."
        )
    return problems


def _check_pixels(config: Any) -> list[str]:
    problems = []
    for name, parse in (("pixel_range", parse_pixel_range), ("channels", parse_channels)):
        text = getattr(config, name)
        try:
            parse(text) if text is not None else None
        except ValueError as error:
            problems.append(f"{name}: {error}.")
    return problems


def _check_view(config: Any) -> list[str]:
    problems = []
    if config.tile_overlap > MAX_OVERLAP:
        problems.append(f"tile_overlap: {config.tile_overlap} must be at most {MAX_OVERLAP}.")
    if config.view == "image" and config.tile_size is not None:
        problems.append(
            "tile_size: with view 'image' there are no windows: take view 'tiles' or 'objects'."
        )
    return problems


def trains_whole_encoder(config: Any) -> bool:
    """Whether the image encoder is trained from its first block on, so that no cache fits it."""
    return not config.freeze_image_encoder and config.train_blocks is None


def _check_cache(config: Any) -> list[str]:
    problems = []
    if config.cache_embeddings == "on" and trains_whole_encoder(config):
        problems.append(
            "cache_embeddings: 'on' needs freeze_image_encoder or train_blocks: an encoder that is "
            "trained from its first block on gives other embeddings after every step."
        )
    if config.cache_embeddings == "on":
        problems += [
            f"cache_embeddings: 'on' does not go with {name}, which trains the image encoder from "
            "its first block on: embeddings are others after every step."
            for name in _trained_apart(config)
        ]
    if config.cache_embeddings == "on" and config.augment == "scale":
        problems.append(
            "cache_embeddings: 'on' does not go with augment 'scale', which changes the "
            "pixels, and with them the embedding, every time: take augment 'flip' or 'none'."
        )
    return problems
