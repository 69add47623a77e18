"""The recipes of the quality lab: each trains the packaged `vit_tiny` on one dataset.

A new question is a line of `VARIANTS`: the fields of `TrainConfig` in which a run differs from
samft's defaults; or of `OTHER_LOSSES`: how its loss differs.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.baseline import plain_losses
from benchmarks.original_recipe import OriginalSamples, train_original
from benchmarks.quality_datasets import DATASETS
from samft.config import TrainConfig
from samft.errors import ConfigError
from samft.models.prompted_sam import PromptedSam
from samft.recipes.build import build_loaders, build_model, build_trainer, load_weights
from samft.recipes.datasets import Splits, load_splits
from samft.recipes.embedding_cache import prepare_cache
from samft.recipes.resume import FREE_ON_RESUME
from samft.training.engine import Progress, train
from samft.training.losses import LossFunction

UNTOUCHED, ORIGINAL, DEFAULT = "untouched", "original", "default"
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "input": {"loss_resolution": "input"},
    "input_focal_20": {"loss_resolution": "input", "loss_focal_weight": 20.0},
    "no_focal": {"loss_focal_weight": 0.0},
    "focal_5": {"loss_focal_weight": 5.0},
    "focal_20": {"loss_focal_weight": 20.0},
    "focal_40": {"loss_focal_weight": 40.0},
    "no_dice": {"loss_dice_weight": 0.0},
    "no_iou_loss": {"loss_iou_weight": 0.0},
    "iou_loss_5": {"loss_iou_weight": 5.0},
    "squash": {"resize_mode": "squash"},
    "size_304": {"image_size": 304},  # a 4:3 image is as large as squashed to 256 px
    "scale": {"augment": "scale"},
    "no_flip": {"augment": "none"},
    "no_jitter": {"box_jitter": 0.0},
    "jitter_5": {"box_jitter": 0.05},
    "jitter_20": {"box_jitter": 0.2},
    "no_clip": {"clip_grad_norm": 0.0},
    "clip_0.1": {"clip_grad_norm": 0.1},
    "no_warmup": {"warmup_steps": 0},
    "cosine": {"lr_schedule": "cosine"},
    "constant": {"lr_schedule": "constant"},
    "lr_3e-5": {"learning_rate": 3e-5},
    "lr_3e-4": {"learning_rate": 3e-4},
    "lr_1e-3": {"learning_rate": 1e-3},
    "ema_0.99": {"ema_decay": 0.99},
    "anchor_30": {"anchor_weight": 30.0},
    "points": {"prompts": "point"},
    "mixed": {"prompts": "mixed"},
    "mixed_best": {"prompts": "mixed", "multimask": "best"},
    "mixed_best_3": {"prompts": "mixed", "multimask": "best", "correction_rounds": 3},
    "mixed_no_rounds": {"prompts": "mixed", "correction_rounds": 0},
    "mixed_mask_prompt_1": {"prompts": "mixed", "mask_prompt": 1.0},
    "mixed_mask_prompt_0": {"prompts": "mixed", "mask_prompt": 0.0},
    "box_rounds_7": {"correction_rounds": 7},
}
OTHER_LOSSES: dict[str, dict[str, Any]] = {  # arguments of `plain_losses`
    "focal_alpha_0.5": {"focal_weight": 10.0, "alpha": 0.5},
    "focal_gamma_1": {"focal_weight": 5.0, "gamma": 1.0},
    "cross_entropy": {"focal_weight": 2.0, "alpha": 0.5, "gamma": 0.0},
    "soft_iou": {"focal_weight": 10.0, "overlap_loss": "iou"},
}
RECIPES = (UNTOUCHED, ORIGINAL, *VARIANTS, *OTHER_LOSSES)
# What may differ between runs that learn the same, for this and for resuming alike; but the
# number of images a step is a question of its own.
_IRRELEVANT = FREE_ON_RESUME - {"batch_size", "accumulate_steps"} | {"checkpoint_path", "seed"}


@dataclass(frozen=True)
class RunRequest:
    """One run of the lab: what to train on what, and how long.

    Attributes:
        dataset: A key of `DATASETS`.
        recipe: One of `RECIPES`.
        seed: Of the order of images and of augmentation.
        steps: Optimizer steps.
        batch_size: Images a step; a variant may have a number of its own.
        frozen: Whether the image encoder is frozen.
    """

    dataset: str
    recipe: str
    seed: int
    steps: int
    batch_size: int
    frozen: bool

    def config(self, lab_dir: Path) -> TrainConfig:
        """samft's configuration of the run; of `untouched` and `original`, that of their data.

        Raises:
            UserError: The data is missing, or a variant has a setting that is not valid.
        """
        settings: dict[str, Any] = {
            "model_type": "vit_tiny",
            "checkpoint_path": "auto",
            "freeze_image_encoder": self.frozen,
            "batch_size": self.batch_size,
            "steps": max(1, self.steps),  # untouched: none
            "seed": self.seed,
            "metrics_interval": max(1, self.steps),
            "num_workers": 0,
            "output_dir": str(lab_dir),
            "cache_dir": str(lab_dir / "embeddings"),
            "device": "cpu",
            **DATASETS[self.dataset].settings(lab_dir),
            **VARIANTS.get(self.recipe, {}),
        }
        config = TrainConfig(**settings)
        if problems := config.check():
            raise ConfigError(f"recipe {self.recipe}: {' '.join(problems)}")
        return config

    def learnt_settings(self, lab_dir: Path) -> dict[str, Any]:
        """The settings that decide what is learnt; those of `original` cannot be set."""
        if self.recipe in (UNTOUCHED, ORIGINAL):
            return {}
        values = asdict(self.config(lab_dir)) | OTHER_LOSSES.get(self.recipe, {})
        return {name: value for name, value in values.items() if name not in _IRRELEVANT}


@dataclass
class Laboratory:
    """What runs share: the folder, and the data, which is read once.

    Attributes:
        folder: Of rows, scores, drawn data and embeddings.
        splits: By dataset and image size.
        original_samples: The same, of frozen encoders.
    """

    folder: Path
    splits: dict[tuple[str, int], Splits] = field(default_factory=dict)
    original_samples: dict[tuple[str, int], OriginalSamples] = field(default_factory=dict)

    def read_splits(self, request: RunRequest, config: TrainConfig) -> Splits:
        """The datasets of a run, for scoring and for the original's loader."""
        key = request.dataset, int(config.image_size)
        if key not in self.splits:
            self.splits[key] = load_splits(config)
        return self.splits[key]

    def train_recipe(self, request: RunRequest) -> PromptedSam:
        """Trains as requested; the model has the weights of the last step."""
        config = request.config(self.folder)
        if request.recipe == UNTOUCHED:
            return build_model(config, load_weights(config, quiet=True), torch.device("cpu"))
        if request.recipe == ORIGINAL:
            return self._train_original(request, config)
        other = OTHER_LOSSES.get(request.recipe)
        return train_with_samft(config, loss=partial(plain_losses, **other) if other else None)

    def _train_original(self, request: RunRequest, config: TrainConfig) -> PromptedSam:
        model = build_model(config, load_weights(config, quiet=True), torch.device("cpu"))
        train_subset = self.read_splits(request, config).train.subset
        samples = OriginalSamples(train_subset, image_size=int(config.image_size))
        if request.frozen:  # all frozen runs have the same encoder, so embeddings stay valid
            key = request.dataset, int(config.image_size)
            samples = self.original_samples.setdefault(key, samples)
        train_original(
            model,
            samples,
            steps=request.steps,
            batch_size=request.batch_size,
            seed=request.seed,
        )
        return model


def train_with_samft(config: TrainConfig, *, loss: LossFunction | None = None) -> PromptedSam:
    """Trains exactly as `samft.train` does, without its validations, files and log.

    Args:
        config: A checked configuration of one process.
        loss: Instead of the one that it configures.

    Returns:
        The model with the weights of the last step.
    """
    splits = load_splits(config)
    model = build_model(config, load_weights(config, quiet=True), torch.device("cpu"))
    progress = Progress()
    prepare_cache(config, model, splits, progress=progress, should_stop=lambda: False)
    trainer = build_trainer(config, model, progress=progress)
    trainer.loss = loss or trainer.loss
    batches, *_ = build_loaders(config, splits, start_step=0, device=model.sam.device)
    train(
        trainer,
        batches,
        steps=config.steps,
        accumulate_steps=config.accumulate_steps,
        interval=config.metrics_interval,
        max_bad_steps=config.max_bad_steps,
        should_stop=lambda: False,
        on_step=lambda taken, image_ids: None,
        on_interval=lambda metrics: None,
    )
    return model
