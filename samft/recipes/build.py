"""Builds the parts of a run from its configuration: weights, model, loss, trainer, loaders."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from samft import distributed
from samft.cli import name_image_size
from samft.config import TrainConfig
from samft.data.loaders import BatchLoader, train_loader, val_loader
from samft.data.map_style import DatasetIndex, index_datasets
from samft.errors import CheckpointError, ConfigError
from samft.models.image_encoder import checkpoint_activations, compile_blocks
from samft.models.lora import AdapterSettings, add_adapters
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import RectangleSam, build_sam, identify_model, load_state, read_state
from samft.models.trainable import freeze, unreached_by
from samft.recipes.datasets import Splits, count_repeats
from samft.runtime.device import pick_amp_dtype
from samft.runtime.files import sha256_of
from samft.runtime.logs import LOGGER
from samft.training.custom import CheckedLoss, CustomParts
from samft.training.engine import Progress, Trainer
from samft.training.losses import LossFunction, mask_losses
from samft.training.optim import build_optimizer, schedule_learning_rate
from samft.training.prompt_schedule import PromptSchedule
from samft.weights.download import find_local_weights, find_weights

# The three parts of a SAM, each of which the configuration may freeze.
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
# How the names of devices begin on which `make gpu` measured that compiled blocks are faster: none
# yet, as no GPU was at hand.
FASTER_COMPILED: tuple[str, ...] = ()


def load_weights(
    config: TrainConfig, *, quiet: bool = False, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Tensor] | None:
    """Finds, reads and identifies the weights to start from.

    Args:
        config: The configuration.
        quiet: Whether to log nothing, because the weights are read once more.
        should_stop: Whether a signal has asked to stop, for a download.

    Returns:
        The state dict with SAM's own keys, on the CPU; None for random weights.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it is of another model type.
        RunStopped: `should_stop` said so during a download.
    """
    assert config.checkpoint_path is not None and config.model_type is not None
    path = find_weights(config.checkpoint_path, config.model_type, should_stop=should_stop)
    if path is None:
        if not quiet:
            LOGGER.warning(
                "checkpoint_path random: the weights of %s are RANDOM; without hundreds of "
                "thousands of images the result will be of no use but for tests",
                config.model_type,
            )
        return None
    try:
        state = read_state(path, quiet=quiet)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint_path: {error}") from error
    model_type, image_size = identify_model(state, source=path)
    if model_type != config.model_type:
        raise CheckpointError(
            f"checkpoint_path: {path} is a {model_type}, but model_type is {config.model_type}: "
            f"set model_type to {model_type} or give another file."
        )
    if not quiet:
        LOGGER.info("weights: %s (%s at %d px)", path, model_type, image_size)
    return state


def load_initial_state(config: TrainConfig) -> dict[str, Tensor]:
    """The weights that a run has started from, random ones too, once more; see `load_weights`."""
    weights = load_weights(config, quiet=True)
    if weights is not None:
        return weights
    torch.manual_seed(config.seed)  # as `build_model` does
    assert config.model_type is not None
    return build_sam(config.model_type, config.image_size, attention=config.attention).state_dict()


def build_model(
    config: TrainConfig,
    weights: dict[str, Tensor] | None,
    device: torch.device,
    *,
    own_loss: bool = False,
) -> PromptedSam:
    """Builds the model on its device, loads the weights, and freezes parts as configured.

    Args:
        config: The configuration.
        weights: With SAM's own keys; None: random weights, which depend on the seed only.
        device: Where to train.
        own_loss: Whether the loss is the caller's, which may reach more than the weights say.

    Returns:
        The model, not wrapped.

    Raises:
        CheckpointError: The weights do not fit the model.
        ConfigError: The model has fewer blocks than are to be trained, or is narrower than
            `lora_rank`.
    """
    assert config.model_type is not None
    torch.manual_seed(config.seed)
    sam = build_sam(config.model_type, config.image_size, attention=config.attention)
    if weights is not None:
        load_state(sam, weights, source=f"checkpoint_path: {config.checkpoint_path}")
    _log_shape(sam)
    iou_loss = own_loss or config.loss_iou_weight > 0
    frozen, unreachable = _freeze_as_configured(sam, config, iou_loss=iou_loss)
    sam.image_encoder = checkpoint_activations(sam.image_encoder, config.activation_checkpointing)
    if config.compile == "on" or (config.compile == "auto" and _compiling_pays(device)):
        compile_blocks(sam.image_encoder)
    if config.cuda_graphs and device.type != "cuda":
        LOGGER.info("cuda_graphs: no effect without a GPU")
    elif config.cuda_graphs and config.num_clicks:
        LOGGER.info("cuda_graphs: of the image encoder only, as there are clicks")
    model = PromptedSam(
        sam.to(device),
        decoder=config.decoder,
        mask_chunk=config.mask_chunk,
        cuda_graphs=config.cuda_graphs,
    )
    _log_trained(model, config, frozen, unreachable, iou_loss=iou_loss)
    return model


def _log_trained(
    model: PromptedSam,
    config: TrainConfig,
    frozen: list[str],
    unreachable: list[str],
    *,
    iou_loss: bool,
) -> None:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    LOGGER.info(
        "%s: %.2f of %.2f M parameters are trained", config.model_type, trainable / 1e6, total / 1e6
    )
    if frozen:
        LOGGER.info("frozen as configured: %s", ", ".join(frozen))
    if any(trained_apart(config).values()):
        kinds = ("norm layers", config.train_norms), ("biases", config.train_biases)
        LOGGER.info(
            "trained of what is frozen of image_encoder: its %s",
            " and ".join(kind for kind, is_trained in kinds if is_trained),
        )
    if unreachable:
        LOGGER.info(
            "frozen because %s prompts%s do not reach them: %d tensors%s",
            config.prompts,
            "" if iou_loss else " and the loss",
            len(unreachable),
            f": {', '.join(unreachable)}" if config.debug else " (--debug lists them)",
        )


def _log_shape(sam: Sam) -> None:
    if isinstance(sam, RectangleSam):
        LOGGER.info(
            "image_size %s: scores are of images of this shape; programs that read SAM pad them to "
            "%d px, which samft evaluate scores with an export",
            name_image_size(sam.frame_size),
            max(sam.frame_size),
        )


def _freeze_as_configured(
    sam: Sam, config: TrainConfig, *, iou_loss: bool
) -> tuple[list[str], list[str]]:
    # Freezes, and adds adapters. Returns what is frozen, in words, and which parameters are so only
    # because no prompt reaches them.
    frozen = [part for part in PARTS if getattr(config, f"freeze_{part}")]
    num_blocks, train_blocks = len(sam.image_encoder.blocks), config.train_blocks
    if train_blocks is not None and train_blocks > num_blocks:
        raise ConfigError(
            f"train_blocks: {train_blocks} is more than the {num_blocks} blocks of "
            f"{config.model_type}."
        )
    width = sam.image_encoder.patch_embed.proj.out_channels
    if config.lora_rank is not None and config.lora_rank > width:
        raise ConfigError(
            f"lora_rank: {config.lora_rank} is more than {width}, the width of "
            f"{config.model_type}, with which adapters can already change all of a weight."
        )
    wanted: dict[str, Any] = {
        "unreached": unreached_by(config.prompts, iou_loss=iou_loss, **_rounds_of(config)),
        **trained_apart(config),
    }
    adapters = adapter_settings(config)
    if adapters is None:
        unreachable = freeze(sam, frozen, train_blocks=train_blocks, **wanted)
        if train_blocks is not None:
            frozen.append(f"image_encoder before its last {train_blocks} of {num_blocks} blocks")
        return frozen, unreachable
    unreachable = freeze(sam, {*frozen, "image_encoder"}, **wanted)
    add_adapters(sam, adapters)
    if adapters.encoder:
        frozen.append("image_encoder but for its adapters")
    if adapters.decoder:
        frozen.append("the attentions of mask_decoder but for their adapters")
    return frozen, unreachable


def trained_apart(config: TrainConfig) -> dict[str, Any]:
    """What `freeze` leaves trained of the image encoder's frozen part."""
    return {"train_norms": config.train_norms, "train_biases": config.train_biases}


def _rounds_of(config: TrainConfig) -> dict[str, Any]:
    return {
        "corrections": config.num_corrections,
        "mask_prompt": config.mask_prompt,
        "multimask": config.multimask,
    }


def adapter_settings(config: TrainConfig) -> AdapterSettings | None:
    """The low-rank adapters that a configuration asks for; None for none."""
    if config.lora_rank is None:
        return None
    return AdapterSettings(
        rank=config.lora_rank,
        alpha=config.lora_alpha or float(config.lora_rank),
        targets=tuple(config.lora_targets.split(",")),
        last_blocks=config.train_blocks,
        encoder=not config.freeze_image_encoder,
        decoder=config.lora_decoder,
    )


@lru_cache(maxsize=1)  # the base is hashed once a run
def describe_adapter(config: TrainConfig) -> dict[str, Any] | None:
    """What an adapter file says about itself; None where a run trains no adapters."""
    settings = adapter_settings(config)
    if settings is None:
        return None
    assert config.checkpoint_path is not None and config.model_type is not None
    base = find_local_weights(config.checkpoint_path, config.model_type)
    return {
        "model_type": config.model_type,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "targets": ",".join(settings.targets),
        "base_sha256": sha256_of(base) if base else "unknown",
    }


def _compiling_pays(device: torch.device) -> bool:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    pays = name.startswith(FASTER_COMPILED)
    if not pays:
        LOGGER.info("compile auto: off, as no gain was measured on %s", name)
    return pays


def index_own_data(
    config: TrainConfig, custom: CustomParts, *, should_stop: Callable[[], bool]
) -> dict[str, DatasetIndex]:
    """Reads and checks the datasets that a caller brings along, by split. Collective.

    Raises:
        UserError: They cannot be used, or the ranks have brought different things along.
        RunStopped: `should_stop` said so, on any rank.
    """
    custom.check_agreement()
    return index_datasets(
        custom.datasets,
        num_workers=config.num_workers,
        on_bad_image=config.on_bad_image,
        crowds=config.crowds,
        timeout=config.hang_timeout,
        should_stop=should_stop,
    )


def build_loss(config: TrainConfig, own: LossFunction | None = None) -> LossFunction:
    """The caller's own loss, checked at each call; else samft's with the configured weights."""
    if own is not None:
        return CheckedLoss(own)
    return partial(
        mask_losses,
        focal_weight=config.loss_focal_weight,
        dice_weight=config.loss_dice_weight,
        iou_weight=config.loss_iou_weight,
    )


def build_trainer(
    config: TrainConfig,
    model: PromptedSam,
    *,
    progress: Progress,
    loss: LossFunction | None = None,
) -> Trainer:
    """Builds the optimizer, and the trainer that takes steps with it. Collective.

    Args:
        config: The configuration.
        model: On its device, with its frozen parts frozen.
        progress: How far the run has come.
        loss: The caller's own; None: samft's.
    """
    optimizer = build_optimizer(
        model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        encoder_factor=(config.encoder_learning_rate or config.learning_rate)
        / config.learning_rate,
        layer_decay=config.layer_decay,
        sharded=config.optimizer_sharding,
    )
    return Trainer(
        model,
        optimizer,
        learning_rate_at=schedule_learning_rate(
            peak=config.learning_rate,
            steps=config.steps,
            schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            decay_fraction=config.decay_fraction,
        ),
        loss=build_loss(config, loss),
        prompts=PromptSchedule(
            config.prompts,
            iou_weight=config.loss_iou_weight if loss is None else None,
            seed=config.seed,
            **_rounds_of(config),
        ),
        amp_dtype=pick_amp_dtype(config.amp, model.sam.device),
        clip_grad_norm=config.clip_grad_norm,
        ema_decay=config.ema_decay,
        anchor_weight=config.anchor_weight,
        bf16_compress=config.bf16_compress,
        progress=progress,
    )


def build_loaders(
    config: TrainConfig, splits: Splits, *, start_step: int, device: torch.device
) -> tuple[BatchLoader, BatchLoader, BatchLoader | None]:
    """Builds this rank's loaders.

    Args:
        config: The configuration.
        splits: The datasets.
        start_step: The global batch to begin with, see `Progress.position`.
        device: This process's device.

    Returns:
        Endless training batches; this rank's share of the validation images, one a batch; and of
        the general set, if there is one.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    shared: dict[str, Any] = {
        "num_workers": config.num_workers,
        "timeout": config.hang_timeout,
        "pin_memory": device.type == "cuda",
        "rank": rank,
        "world_size": world_size,
    }
    batches = train_loader(
        splits.train,
        batch_size=config.batch_size,
        accumulate_steps=config.accumulate_steps,
        start_step=start_step,
        seed=config.seed,
        repeats=count_repeats(splits.train.subset, config.repeat_threshold),
        **shared,
    )
    general = val_loader(splits.general, **shared) if splits.general else None
    return batches, val_loader(splits.val, **shared), general


def disk_bytes(model: PromptedSam, config: TrainConfig) -> int:
    """Bytes that a run's checkpoints take up on the disk, at most.

    Args:
        model: With its frozen parts frozen.
        config: Says how many best checkpoints are kept, and what is kept beside trained weights.
    """
    # `last.ckpt` and the one before it, the best checkpoints, and one more of each while it is
    # written. AdamW has two float32 moments for each trained parameter.
    weights = sum(tensor.nbytes for tensor in model.sam.state_dict().values())
    # Averaged weights are saved beside the trained ones, and those at the start if they pull.
    bytes_each = 8 + 4 * bool(config.ema_decay) + 4 * bool(config.anchor_weight)
    beside = sum(bytes_each * p.numel() for p in model.parameters() if p.requires_grad)
    return 3 * (weights + beside) + (config.save_top_k + 1) * weights


def images_per_step(config: TrainConfig) -> int:
    """Images per optimizer step, over all processes."""
    return config.batch_size * config.accumulate_steps * distributed.get_world_size()
