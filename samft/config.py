"""The configuration: one flat frozen dataclass; defaults < YAML < flags; every value checked.

This module imports no torch, so that `--help` and a wrong flag answer at once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from samft.cli import check_fields, parse_settings, setting

# What may differ between a run and its resume, because it does not change what is learnt. Batch
# size and accumulation are held to their product with the number of processes elsewhere.
FREE_ON_RESUME = frozenset(
    """data_root train_split val_split train_annotations train_images val_annotations val_images
    batch_size accumulate_steps metrics_interval output_dir num_workers cache_embeddings cache_dir
    cache_dtype cache_max_gib save_top_k resume device stop_after debug on_bad_image
    attention decoder mask_chunk compile activation_checkpointing optimizer_sharding
    dry_run max_bad_steps detect_anomaly hang_timeout save_before_limit probe_memory""".split()
)

MODEL_TYPES = ("vit_h", "vit_l", "vit_b", "vit_tiny")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run is told; attribute, YAML key and flag are spelled alike."""

    data_root: str | None = setting(
        None,
        "dataset folder: SPLIT/_annotations.coco.json beside its images, or the official layout "
        "annotations/instances_SPLIT.json + SPLIT/",
    )
    model_type: str | None = setting(None, "which SAM", choices=MODEL_TYPES)
    checkpoint_path: str | None = setting(
        None,
        "SAM weights: Meta's .pth or any .ckpt/.pth of ours; auto: the packaged file for "
        "vit_tiny, else a download; random: random weights",
    )
    freeze_image_encoder: bool = setting(False, "keep the image encoder as it is")
    freeze_prompt_encoder: bool = setting(False, "keep the prompt encoder as it is")
    freeze_mask_decoder: bool = setting(False, "keep the mask decoder as it is")
    batch_size: int = setting(1, "images per process per micro-batch", at_least=1)
    image_size: int = setting(1024, "side of the model input in pixels, a multiple of 16")
    steps: int = setting(1500, "optimizer steps", at_least=1)
    learning_rate: float = setting(1e-4, "peak learning rate")
    weight_decay: float = setting(1e-2, "not on biases, norms, embeddings", at_least=0)
    metrics_interval: int = setting(
        50, "validate, save and write a train line every so many steps", at_least=1
    )
    output_dir: str = setting(".", "everything that a run writes")
    train_split: str = setting("train", "name of the training split")
    val_split: str = setting(
        "val", "name of the validation split; valid and validation are tried where val is absent"
    )
    train_annotations: str | None = setting(None, "COCO file for training, over data_root")
    train_images: str | None = setting(None, "folder of the training images, over data_root")
    val_annotations: str | None = setting(None, "COCO file for validation, over data_root")
    val_images: str | None = setting(None, "folder of the validation images, over data_root")
    val_fraction: float | None = setting(
        None, "without a validation split: hold out this share of the images, by file name"
    )
    max_masks_per_image: int = setting(
        64, "random subset per epoch in training; validation takes all, in chunks", at_least=1
    )
    box_jitter: float = setting(
        0.1,
        "training moves each side of a box by up to this share of the side, at most 20 px at "
        "1024; 0: off",
        at_least=0,
    )
    augment: str = setting(
        "flip",
        "training augmentation; scale: resize by 0.5 to 2 with crop, flip and colour",
        choices=("none", "flip", "scale"),
    )
    category_names: str | None = setting(
        None, "train and validate on these classes only, separated by commas"
    )
    min_mask_area: float = setting(
        0.0, "leave out masks of fewer pixels than this, in the original image", at_least=0
    )
    repeat_threshold: float | None = setting(
        None,
        "show images of rare classes more often: those in a smaller share of the images than this "
        "(LVIS takes 0.001)",
    )
    on_bad_image: str = setting(
        "error",
        "missing or broken images: refuse to train, or leave them out and name them",
        choices=("error", "skip"),
    )
    resize_mode: str = setting(
        "pad", "pad: longest side, as SAM does; squash: to a square", choices=("pad", "squash")
    )
    num_workers: int = setting(4, "loader workers per process", at_least=0)
    amp: str = setting(
        "auto",
        "mixed precision; auto: bf16 on GPUs that have it, else off",
        choices=("auto", "off", "bf16", "fp16"),
    )
    accumulate_steps: int = setting(1, "micro-batches per optimizer step", at_least=1)
    max_bad_steps: int = setting(
        5, "steps in a row that may be skipped because the gradient is not finite", at_least=0
    )
    detect_anomaly: bool = setting(
        False, "have PyTorch name the operation whose gradient is not finite; slow"
    )
    clip_grad_norm: float = setting(1.0, "largest gradient norm; 0: off", at_least=0)
    lr_schedule: str = setting(
        "multistep",
        "multistep: linear warm-up, x0.1 at 66.667 and 86.666 per cent, as SAM was trained",
        choices=("multistep", "cosine", "constant"),
    )
    warmup_steps: int = setting(250, "never more than a tenth of steps", at_least=0)
    loss_focal_weight: float = setting(20.0, "weight of the focal loss", at_least=0)
    loss_dice_weight: float = setting(1.0, "weight of the dice loss", at_least=0)
    loss_iou_weight: float = setting(1.0, "weight of the predicted IoU's loss", at_least=0)
    attention: str = setting(
        "fast",
        "the image encoder's attention, the same numbers: fast: without N x N tensors; stock: "
        "segment_anything's own",
        choices=("fast", "stock"),
    )
    decoder: str = setting(
        "fast",
        "the mask decoder, the same numbers: fast: image tokens not projected where prompts can "
        "be; stock: segment_anything's own modules",
        choices=("fast", "stock"),
    )
    compile: bool = setting(
        False, "compile the image encoder's blocks with torch.compile: slow to start, faster then"
    )
    activation_checkpointing: str = setting(
        "none",
        "image encoder's activations made again in backward, to save memory; blocks: inside of "
        "each block, for a third more time; full: inside of groups of blocks, too, for two thirds",
        choices=("none", "blocks", "full"),
    )
    optimizer_sharding: bool = setting(
        False, "each process keeps the optimizer's state of its share of the parameters only"
    )
    bf16_compress: bool = setting(
        False, "send gradients between processes in bfloat16: half the bytes, fewer digits"
    )
    mask_chunk: int | None = setting(
        None, "boxes decoded at once, which bounds memory; empty: as memory allows", at_least=1
    )
    loss_resolution: str = setting(
        "low",
        "low: at the decoder's own resolution; input: upsampled to image_size",
        choices=("low", "input"),
    )
    cache_embeddings: str = setting(
        "auto",
        "encode each image once and keep the result; auto: where the image encoder is frozen, "
        "augment is not scale, and it pays",
        choices=("auto", "on", "off"),
    )
    cache_dir: str | None = setting(
        None, "where to keep embeddings; runs may share it (default OUTPUT_DIR/embeddings)"
    )
    cache_dtype: str = setting(
        "float16", "type to keep embeddings in", choices=("float16", "float32")
    )
    cache_max_gib: float = setting(
        100.0, "what cache_dir may hold; what has not been used longest goes first", at_least=0
    )
    save_top_k: int = setting(1, "checkpoints kept, best by val_per_mask_iou", at_least=1)
    resume: str = setting(
        "auto",
        "auto: go on from output_dir if it holds a run of the same configuration; never; or a "
        "path to a last.ckpt",
    )
    seed: int = setting(0, "seed of all randomness", at_least=0)
    device: str = setting("auto", "where to train", choices=("auto", "cuda", "cpu"))
    hang_timeout: float = setting(
        600.0,
        "seconds after which a process or a loader worker that does not answer is named and given "
        "up",
        at_least=1,
    )
    save_before_limit: float | None = setting(
        None,
        "save and stop with exit code 75 this many seconds before the time limit of the SLURM job",
        at_least=0,
    )
    probe_memory: bool = setting(
        False, "before the first step, try the largest batch, so that memory gives out now or never"
    )
    stop_after: int | None = setting(
        None, "save and stop with exit code 75 after this step; run again to go on", at_least=1
    )
    dry_run: bool = setting(
        False,
        "train nothing: take two steps on the largest batch, and say what memory, time and disk "
        "the run takes",
    )
    debug: bool = setting(False, "show tracebacks of errors in usage, data and checkpoints")

    def check(self) -> list[str]:
        """Checks every value.

        Returns:
            All problems, one sentence each, beginning with the name of the field.
        """
        return check_fields(self) + self._check_required() + self._check_combinations()

    def _check_required(self) -> list[str]:
        problems = []
        if self.model_type is None:
            problems.append(f"model_type is missing: give one of {', '.join(MODEL_TYPES)}.")
        if self.checkpoint_path is None:
            problems.append(
                "checkpoint_path is missing: give a SAM .pth or .ckpt file, 'auto' (the packaged "
                "file for vit_tiny, else a download) or 'random' (random weights)."
            )
        if self.data_root is None and self.train_annotations is None:
            problems.append(
                "data_root is missing: give the dataset's folder, or train_annotations and "
                "train_images."
            )
        for split in ("train", "val"):
            given = [getattr(self, f"{split}_{part}") for part in ("annotations", "images")]
            if any(given) and not all(given):
                problems.append(f"{split}_annotations and {split}_images go together.")
        return problems

    def _check_combinations(self) -> list[str]:
        problems = []
        if self.freeze_image_encoder and self.freeze_prompt_encoder and self.freeze_mask_decoder:
            problems.append("freeze_*: all three parts are frozen, so nothing would be trained.")
        if self.image_size < 16 or self.image_size % 16:
            near = max(16, round(self.image_size / 16) * 16)
            problems.append(
                f"image_size: {self.image_size} is no multiple of 16; the nearest is {near}."
            )
        if not 0 < self.learning_rate < float("inf"):
            problems.append(f"learning_rate: {self.learning_rate} must be above 0.")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            problems.append(f"val_fraction: {self.val_fraction} must lie between 0 and 1.")
        if self.box_jitter > 0.5:
            problems.append(f"box_jitter: {self.box_jitter} must be at most 0.5.")
        if self.repeat_threshold is not None and not 0 < self.repeat_threshold <= 1:
            problems.append(f"repeat_threshold: {self.repeat_threshold} must lie between 0 and 1.")
        return problems + self._check_cache()

    def _check_cache(self) -> list[str]:
        problems = []
        if self.cache_embeddings == "on" and not self.freeze_image_encoder:
            problems.append(
                "cache_embeddings: 'on' needs freeze_image_encoder: an encoder that is trained "
                "gives other embeddings after every step."
            )
        if self.cache_embeddings == "on" and self.augment == "scale":
            problems.append(
                "cache_embeddings: 'on' does not go with augment 'scale', which changes the "
                "pixels, and with them the embedding, every time: take augment 'flip' or 'none'."
            )
        return problems


def to_yaml(config: TrainConfig) -> str:
    """The configuration as YAML; `--config` of it gives the same configuration back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def changed_settings(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """The fields in which a saved run differs from a configuration, where that matters.

    Args:
        saved: The run's configuration as plain values.
        config: What it is asked to go on with.

    Returns:
        Lines of a table: field, the run's value, the value asked for.
    """
    rows = []
    for name, value in dataclasses.asdict(config).items():
        free = FREE_ON_RESUME | ({"steps"} if config.lr_schedule == "constant" else set())
        if name not in free and name in saved and saved[name] != value:
            rows.append(f"{name:24} {saved[name]!s:24} {value}")
    return rows


def parse_config(argv: list[str]) -> TrainConfig:
    """Reads flags and the YAML file that they name; `--help` prints the flags and exits.

    Args:
        argv: The arguments after the program's name.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: Listing every unknown key, wrong type and wrong value at once.
    """
    description = "Fine-tune Segment Anything on a COCO dataset. Defaults < --config < flags."
    return parse_settings(TrainConfig, argv, prog="python -m samft.train", description=description)
