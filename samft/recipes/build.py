"""From the configuration to the parts of a run: model, precision, trainer, loaders."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from samft import distributed
from samft.config import TrainConfig
from samft.data.loaders import BatchLoader, train_loader, val_loader
from samft.errors import CheckpointError
from samft.models.image_encoder import checkpoint_activations
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam, freeze, identify, load_state, read_state
from samft.models.weights import find_weights
from samft.recipes.datasets import Splits, count_repeats
from samft.runtime.device import pick_amp_dtype
from samft.runtime.logs import LOGGER
from samft.training.engine import Progress, Trainer
from samft.training.losses import LossFunction, mask_losses
from samft.training.optim import build_optimizer, schedule_learning_rate

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")


def load_weights(config: TrainConfig, *, quiet: bool = False) -> dict[str, Tensor] | None:
    """Finds, reads and identifies the weights to start from; None for random ones.

    Args:
        config: The configuration.
        quiet: Not to say which they are, a second time.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it is of another model type.
    """
    assert config.checkpoint_path is not None and config.model_type is not None
    path = find_weights(config.checkpoint_path, config.model_type)
    if path is None:
        if not quiet:
            LOGGER.warning(
                "checkpoint_path random: the weights of %s are RANDOM; without hundreds of "
                "thousands of images the result will be worthless for anything but a test",
                config.model_type,
            )
        return None
    try:
        state = read_state(path)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint_path: {error}") from error
    model_type, image_size = identify(state, source=path)
    if model_type != config.model_type:
        raise CheckpointError(
            f"checkpoint_path: {path} is a {model_type}, but model_type is {config.model_type}: "
            f"set model_type to {model_type} or give another file."
        )
    if not quiet:
        LOGGER.info("weights: %s (%s at %d px)", path, model_type, image_size)
    return state


def build_model(
    config: TrainConfig, weights: dict[str, Tensor] | None, device: torch.device
) -> PromptedSam:
    """Builds the model on its device, loads the weights, and freezes what is to be frozen."""
    assert config.model_type is not None
    torch.manual_seed(config.seed)
    sam = build_sam(config.model_type, config.image_size, attention=config.attention)
    if weights is not None:
        load_state(sam, weights, source=f"checkpoint_path: {config.checkpoint_path}")
    asked = [part for part in PARTS if getattr(config, f"freeze_{part}")]
    unreachable = freeze(sam, asked)
    sam.image_encoder = checkpoint_activations(sam.image_encoder, config.activation_checkpointing)
    if config.compile:
        for block in sam.image_encoder.blocks:
            block.compile(dynamic=False)
    model = PromptedSam(sam.to(device), decoder=config.decoder, mask_chunk=config.mask_chunk)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    LOGGER.info(
        "%s: %.2f of %.2f M parameters train", config.model_type, trainable / 1e6, total / 1e6
    )
    if asked:
        LOGGER.info("frozen as asked: %s", ", ".join(asked))
    if unreachable:
        LOGGER.info(
            "frozen because box prompts cannot reach them, %d tensors: %s",
            len(unreachable),
            ", ".join(unreachable),
        )
    return model


def build_loss(config: TrainConfig) -> LossFunction:
    """The losses of masks, weighted as configured."""
    return partial(
        mask_losses,
        image_size=config.image_size,
        focal_weight=config.loss_focal_weight,
        dice_weight=config.loss_dice_weight,
        iou_weight=config.loss_iou_weight,
    )


def build_trainer(config: TrainConfig, model: PromptedSam, *, progress: Progress) -> Trainer:
    """Builds the optimizer, and the trainer that takes steps with it. Collective.

    Args:
        config: The configuration.
        model: On its device, with its frozen parts frozen.
        progress: How far the run has come.
    """
    optimizer = build_optimizer(
        model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
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
        ),
        loss=build_loss(config),
        amp_dtype=pick_amp_dtype(config.amp, model.sam.device),
        clip_grad_norm=config.clip_grad_norm,
        bf16_compress=config.bf16_compress,
        progress=progress,
    )


def build_loaders(
    config: TrainConfig, splits: Splits, *, start_step: int
) -> tuple[BatchLoader, BatchLoader]:
    """This rank's endless training batches from a step on, and its share of the validation's."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    shared: dict[str, Any] = {
        "num_workers": config.num_workers,
        "timeout": config.hang_timeout,
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
    return batches, val_loader(splits.val, **shared)


def disk_bytes(model: PromptedSam, *, save_top_k: int) -> int:
    """What a run's checkpoints take up: the states to resume from, and the best weights.

    Of each there is one more than is kept, while it is written.
    """
    weights = sum(tensor.nbytes for tensor in model.sam.state_dict().values())
    moments = sum(8 * p.numel() for p in model.parameters() if p.requires_grad)
    return 3 * (weights + moments) + (save_top_k + 1) * weights


def images_per_step(config: TrainConfig) -> int:
    """Images of an optimizer step, of all processes."""
    return config.batch_size * config.accumulate_steps * distributed.get_world_size()
