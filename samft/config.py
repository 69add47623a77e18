"""The settings of a training: one flat frozen dataclass, filled from defaults < YAML < flags.

Imports no torch, so that `--help`, and the error for a wrong flag, come in less than a second.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from samft.cli import ALL_LINKS, LINKS_HELP, simplest_image_size
from samft.config_checks import find_conflicts
from samft.settings import check_fields, parse_settings, setting

# One for each section of `--help`.
_data = partial(setting, group="data")
_model = partial(setting, group="model")
_prompts = partial(setting, group="prompts and augmentation")
_optimisation = partial(setting, group="optimisation")
_speed = partial(setting, group="speed and memory")
_output = partial(setting, group="output")
_reliability = partial(setting, group="reliability")

MIXED_CORRECTIONS = 7  # rounds of corrections with mixed prompts, as SAM 2 was trained
MODEL_TYPES = ("vit_h", "vit_l", "vit_b", "vit_tiny")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run; attribute, YAML key and flag have the same name.

    Example:
        >>> config = TrainConfig(data_root="DATASET", model_type="vit_b", checkpoint_path="auto")
        >>> config.image_size, config.check()
        (1024, [])
        >>> from dataclasses import replace
        >>> replace(config, image_size=1000).check()
        ['image_size: 1000 is no multiple of 16; the nearest is 992.']
    """

    data_root: str | None = _data(
        None,
        "dataset folder: SPLIT/_annotations.coco.json beside its images, or COCO's own layout, "
        "annotations/instances_SPLIT.json and SPLIT/",
        most_used=True,
        metavar="DIR",
    )
    val_fraction: float | None = _data(
        None,
        "without a validation split, hold out this share of the training images, chosen by a hash "
        "of their file names",
        most_used=True,
    )
    group_by: str = _data(
        "auto",
        "images that val_fraction keeps together, and that are warned of where two splits share "
        "them; auto: Roboflow's copies of a picture (NAME.rf.HASH.jpg); folder; none; or a regular "
        "expression whose first group in brackets names them",
        metavar="auto|folder|none|REGEX",
    )
    train_split: str = _data("train", "name of the training split", metavar="NAME")
    val_split: str = _data(
        "val",
        "name of the validation split; if there is no val, valid and validation are tried",
        metavar="NAME",
    )
    test_split: str = _data(
        "auto",
        "split to score once, at the end of the run, with the untouched and the best weights; "
        "auto: test, if there is one; none: no split",
        metavar="auto|none|NAME",
    )
    train_annotations: str | None = _data(
        None, "COCO file to train on, instead of data_root", metavar="FILE"
    )
    train_images: str | None = _data(
        None, "folder of the images of train_annotations", metavar="DIR"
    )
    val_annotations: str | None = _data(
        None, "COCO file to validate on, instead of data_root", metavar="FILE"
    )
    val_images: str | None = _data(None, "folder of the images of val_annotations", metavar="DIR")
    test_annotations: str | None = _data(
        None, "COCO file to score at the end, instead of data_root", metavar="FILE"
    )
    test_images: str | None = _data(None, "folder of the images of test_annotations", metavar="DIR")
    general_data_root: str | None = _data(
        None,
        "dataset folder of other data, everyday photographs say, that the model should not get "
        "worse on: its val split, or all of it where there is one COCO file only, at most 500 "
        "images; scored at each validation, it chooses nothing",
        metavar="DIR",
    )
    category_names: str | None = _data(
        None, "train and validate on these classes only, separated by commas", metavar="A,B"
    )
    min_mask_area: float = _data(
        0.0,
        "leave out objects whose mask has fewer pixels than this in the original image",
        at_least=0,
        metavar="PX",
    )
    crowds: str = _data(
        "auto",
        "objects with iscrowd 1: auto: leave out those that look like crowds; leave_out: leave out "
        "all; use: use all",
        choices=("auto", "leave_out", "use"),
    )
    max_masks_per_image: int = _data(
        64,
        "largest number of objects per image in training, a random subset in each epoch; "
        "validation uses all",
        at_least=1,
    )
    repeat_threshold: float | None = _data(
        None,
        "repeat images of rare classes: those in a smaller share of the images than this, as LVIS "
        "does with 0.001",
    )
    on_bad_image: str = _data(
        "error",
        "missing and broken images: error: refuse to train; skip: leave them out and name them",
        choices=("error", "skip"),
    )
    allow_links: str | None = _data(None, LINKS_HELP, metavar="DIR,DIR", value_alone=ALL_LINKS)
    pixel_range: str = _data(
        "auto",
        "pixel values that become 0 to 255: auto: 8-bit images as they are, others as percentile; "
        "percentile: those between percentiles 1 and 99 of a sample of the training images; full: "
        "the whole range of the type; or MIN,MAX",
        metavar="RANGE",
    )
    channels: str | None = _data(
        None,
        "of images of more than three bands, those to use as red, green and blue, or the one to "
        "use as grey; counted from 1",
        metavar="R,G,B",
    )
    page: int | None = _data(
        None, "of stacks and animations, the page to use, counted from 1", at_least=1, metavar="N"
    )
    view: str = _data(
        "image",
        "see images as a whole (image), through a grid of windows (tiles), or through windows "
        "around groups of objects (objects), each scaled to image_size; for small objects in large "
        "images",
        choices=("image", "tiles", "objects"),
    )
    tile_size: int | None = _data(
        None, "side of a window, px of the image (default: image_size)", at_least=16, metavar="PX"
    )
    tile_overlap: float = _data(0.25, "overlap of tiles, as a share of tile_size", at_least=0)
    view_context: float = _data(
        2.0, "with view objects, how many times as large as its object a window is", at_least=1
    )
    model_type: str | None = _model(
        None,
        "SAM model; vit_tiny is small, comes with samft, and suits tests and CPUs",
        most_used=True,
        choices=MODEL_TYPES,
    )
    checkpoint_path: str | None = _model(
        None,
        "SAM weights to start from: a .pth, .ckpt or .safetensors file, or a folder of "
        "transformers; auto: the weights of model_type, downloaded unless it is vit_tiny; random: "
        "random weights",
        most_used=True,
        metavar="FILE",
    )
    freeze_image_encoder: bool = _model(
        False,
        "do not train the image encoder: much faster, as each image need be encoded only once",
        most_used=True,
    )
    train_blocks: int | None = _model(
        None,
        "of the image encoder, train the last N blocks and the neck only: less memory, and what "
        "comes before need be computed only once for each image (default: all blocks, or none with "
        "freeze_image_encoder)",
        at_least=1,
        metavar="N",
    )
    train_norms: bool = _model(
        False,
        "train the norm layers of what is frozen of the image encoder (by freeze_image_encoder, "
        "train_blocks or lora_rank); nothing is cached then",
    )
    train_biases: bool = _model(
        False, "train the biases of what is frozen of the image encoder; nothing is cached then"
    )
    lora_rank: int | None = _model(
        None,
        "train low-rank adapters of this rank in the image encoder, whose own weights are frozen; "
        "with train_blocks, in the last N blocks only. Checkpoints hold the merged weights",
        at_least=1,
        metavar="RANK",
    )
    lora_alpha: float | None = _model(
        None, "adapters are scaled by this divided by their rank (default: lora_rank)"
    )
    lora_targets: str = _model(
        "q,v",
        "what is adapted in each block, separated by commas: q, k, v, proj (the output of the "
        "attention), mlp",
        metavar="A,B",
    )
    lora_decoder: bool = _model(
        False, "adapters in the mask decoder's attentions, too, whose own weights are frozen"
    )
    image_size: int | str = _model(
        1024,
        "side of the model's input in pixels, a multiple of 16; smaller is faster, but loses small "
        "objects. For images of one shape also WIDTHxHEIGHT, 1024x768 say, which saves the padding",
        most_used=True,
        metavar="PX",
        convert=simplest_image_size,
    )
    freeze_prompt_encoder: bool = _model(False, "do not train the prompt encoder")
    freeze_mask_decoder: bool = _model(False, "do not train the mask decoder")
    augment: str = _prompts(
        "flip",
        "training augmentation: flip: mirror half of the images; scale: also resize by 0.5 to 2 "
        "with a random crop, and vary the colours",
        most_used=True,
        choices=("none", "flip", "scale"),
    )
    prompts: str = _prompts(
        "box",
        "what a training step begins with: box: the boxes; point: one point in each object; mixed: "
        "a draw for each step, and boxes beside points. Validation is with boxes in any case",
        choices=("box", "point", "mixed"),
    )
    correction_rounds: int | None = _prompts(
        None,
        "rounds of a step after the first, each with one more click where the last mask is wrong; "
        "half of the loss is theirs, and each takes about as long as the first (default: 7 with "
        "prompts mixed, else 0)",
        at_least=0,
        metavar="N",
    )
    mask_prompt: float = _prompts(
        0.5, "probability that a correction round is given the last mask as a prompt", at_least=0
    )
    multimask: str = _prompts(
        "off",
        "masks of a single point: off: one; best: three, of which the best one is trained, as the "
        "automatic masks of SAM need it",
        choices=("off", "best"),
    )
    box_jitter: float = _prompts(
        0.1,
        "move each side of a training box by up to this share of its length, at most 20 px at "
        "1024; 0: off",
        at_least=0,
    )
    resize_mode: str = _prompts(
        "pad",
        "fit images to image_size: pad: longest side, then zeros, as SAM does; squash: fill it",
        choices=("pad", "squash"),
    )
    steps: int = _optimisation(1500, "number of optimizer steps", most_used=True, at_least=1)
    batch_size: int = _optimisation(
        1, "images per process and micro-batch", most_used=True, at_least=1
    )
    learning_rate: float = _optimisation(1e-4, "peak learning rate", most_used=True)
    encoder_learning_rate: float | None = _optimisation(
        None, "peak learning rate of the image encoder (default: learning_rate)", metavar="RATE"
    )
    layer_decay: float = _optimisation(
        1.0,
        "train each block of the image encoder at this share of the rate of the block after it; "
        "0.9 as in SAM 2; 1: all alike",
    )
    accumulate_steps: int = _optimisation(
        1, "micro-batches per optimizer step; larger steps at the memory of batch_size", at_least=1
    )
    lr_schedule: str = _optimisation(
        "multistep",
        "learning rate after a linear warm-up: multistep: times 0.1 at 66.667 % and 86.666 % of "
        "the steps, as SAM was trained; cosine: falling to 0; wsd: constant, then falling linearly "
        "to 0; constant",
        choices=("multistep", "cosine", "wsd", "constant"),
    )
    decay_fraction: float = _optimisation(
        0.2, "share of the steps, at the end, in which the rate of lr_schedule wsd falls"
    )
    warmup_steps: int = _optimisation(
        250, "steps of the warm-up, at most a tenth of steps", at_least=0
    )
    weight_decay: float = _optimisation(
        1e-2, "AdamW's weight decay, not on biases, norms and embeddings", at_least=0
    )
    clip_grad_norm: float = _optimisation(1.0, "largest norm of the gradient; 0: off", at_least=0)
    ema_decay: float = _optimisation(
        0.0,
        "validate and save a moving average of the trained weights, with this decay in each step, "
        "0.99 say; 0: off",
        at_least=0,
    )
    anchor_weight: float = _optimisation(
        0.0, "forget less: pull weights to their start by this times the rate; 0: off", at_least=0
    )
    loss_focal_weight: float = _optimisation(10.0, "weight of the focal loss", at_least=0)
    loss_dice_weight: float = _optimisation(1.0, "weight of the dice loss", at_least=0)
    loss_iou_weight: float = _optimisation(
        1.0, "weight of the loss of the predicted IoU", at_least=0
    )
    loss_resolution: str = _optimisation(
        "window",
        "compare masks on: window: a fine grid over each object and its surroundings, whatever its "
        "size, and coarsely elsewhere; input: the pixels of the model's input, as the original SAM",
        choices=("window", "input"),
    )
    patience: int | None = _optimisation(
        None,
        "end the run after so many validations in a row that are no better than the best one; a "
        "larger number, or 0 for never, continues a run that has ended so (default: never)",
        at_least=0,
        metavar="N",
    )
    seed: int = _optimisation(
        0, "seed of the order of images, augmentation and box jitter", at_least=0
    )
    device: str = _speed(
        "auto",
        "where to train; auto: on GPUs, or on the CPU of a host without",
        most_used=True,
        choices=("auto", "cuda", "cpu"),
    )
    num_workers: int = _speed(4, "data loader workers per process", most_used=True, at_least=0)
    amp: str = _speed(
        "auto",
        "mixed precision; auto: bf16 on GPUs that have it, else off; off: float32, and no TF32",
        choices=("auto", "off", "bf16", "fp16"),
    )
    deterministic: bool = _speed(
        False,
        "GPUs compute the same bits at each run, also after a resume; slower, by how much was not "
        "measured. CPUs always do",
    )
    attention: str = _speed(
        "fast",
        "image encoder's attention: fast: optimised, same outputs; stock: segment_anything's own",
        choices=("fast", "stock"),
    )
    decoder: str = _speed(
        "fast",
        "mask decoder: fast: optimised, same outputs; stock: segment_anything's own",
        choices=("fast", "stock"),
    )
    compile: str = _speed(
        "off",
        "compile the image encoder's blocks with torch.compile, which takes a while; auto: on "
        "devices where steps were measured to be faster, which are none so far",
        choices=("off", "on", "auto"),
        value_alone="on",
    )
    cuda_graphs: bool = _speed(
        False,
        "on a GPU, launch a training step's decoder and losses as one CUDA graph, and a frozen "
        "encoder as another; off because no GPU was at hand to measure what it gains",
    )
    activation_checkpointing: str = _speed(
        "none",
        "recompute the image encoder's activations in backward to save memory: blocks: within each "
        "block, +1/3 time; full: within groups of blocks too, +2/3 time",
        choices=("none", "blocks", "full"),
    )
    optimizer_sharding: bool = _speed(
        False, "divide the optimizer's state among the processes, to save memory"
    )
    bf16_compress: bool = _speed(
        False, "send gradients between processes in bfloat16: half the traffic, less precision"
    )
    mask_chunk: int | None = _speed(
        None,
        "boxes to decode at once, which limits memory; not given: as many as fit into free memory",
        at_least=1,
    )
    cache_embeddings: str = _speed(
        "auto",
        "encode each image only once and store the result; auto: if the image encoder or its first "
        "blocks are frozen, augment is not scale, and it saves time",
        choices=("auto", "on", "off"),
    )
    cache_dir: str | None = _speed(
        None,
        "folder for these embeddings; runs may share it (default: OUTPUT_DIR/embeddings)",
        metavar="DIR",
    )
    cache_dtype: str = _speed(
        "float16", "type to store embeddings in", choices=("float16", "float32")
    )
    cache_max_gib: float = _speed(
        100.0,
        "largest size of cache_dir; the embeddings that were used least recently are deleted",
        at_least=0,
        metavar="GIB",
    )
    probe_memory: bool = _speed(
        False,
        "run the largest batch once before the first step, so that out-of-memory shows at once",
    )
    output_dir: str = _output(
        ".", "folder for everything that the run writes", most_used=True, metavar="DIR"
    )
    metrics_interval: int = _output(
        50, "steps between validations; metrics and checkpoints are written then, too", at_least=1
    )
    save_top_k: int = _output(
        1, "checkpoints to keep: those with the best val_per_mask_iou", at_least=1
    )
    trackers: str = _output(
        "tensorboard",
        "what shows the curves of metrics.jsonl and pictures, one or several, separated by commas",
        choices=("tensorboard", "mlflow", "wandb", "trackio", "none"),
        many=True,
    )
    resume: str = _reliability(
        "auto",
        "auto: resume the run in output_dir if its configuration is the same; never: start a new "
        "run; or the path of a last.ckpt to resume from",
        most_used=True,
        metavar="auto|never|FILE",
    )
    dry_run: bool = _reliability(
        False,
        "train nothing: take two steps on the largest batch, and report the memory, time and disk "
        "space that the run needs",
        most_used=True,
    )
    stop_after: int | None = _reliability(
        None,
        "save and stop with exit code 75 after this step; the same command resumes",
        at_least=1,
    )
    save_before_limit: float | None = _reliability(
        None,
        "save and stop with exit code 75 this many seconds before the time limit of the SLURM job",
        at_least=0,
        metavar="SECONDS",
    )
    hang_timeout: float = _reliability(
        600.0,
        "fail if a process or a data loader worker does not respond for this long, and name it",
        at_least=1,
        metavar="SECONDS",
    )
    max_bad_steps: int = _reliability(
        5,
        "fail if more steps in a row than this are skipped because the gradient is not finite",
        at_least=0,
    )
    detect_anomaly: bool = _reliability(
        False, "have PyTorch name the operation whose gradient is not finite; slow"
    )
    debug: bool = _reliability(
        False, "show tracebacks of errors in usage, data and checkpoints too"
    )

    def check(self, own: Collection[str] = ()) -> list[str]:
        """Checks every value.

        Args:
            own: The splits, `train` or `val`, that are datasets of a caller's in Python.

        Returns:
            All problems, one sentence each, beginning with the name of the field.
        """
        return check_fields(self) + find_conflicts(self, model_types=MODEL_TYPES, own=own)

    @property
    def num_corrections(self) -> int:
        """`correction_rounds`, or its default, which depends on `prompts`."""
        if self.correction_rounds is None:
            return MIXED_CORRECTIONS if self.prompts == "mixed" else 0
        return self.correction_rounds

    @property
    def num_clicks(self) -> int:
        """Clicks that a step may need for each object; the first is where it begins with one."""
        return 0 if self.prompts == "box" and not self.num_corrections else self.num_corrections + 1


def parse_config(argv: list[str]) -> TrainConfig:
    """Reads flags, and the YAML file named by `--config`; `--help` prints the flags and exits.

    Args:
        argv: The arguments after the program's name.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: Listing every unknown key, wrong type and wrong value at once.
    """
    description = (
        "Fine-tune Segment Anything on a COCO dataset. A flag wins over its key in the --config "
        "file, and that over the default."
    )
    return parse_settings(TrainConfig, argv, command="train", description=description)
