"""Forecast of the seconds of a step, and of the bottleneck, for any number of GPUs and images.

Plain arithmetic: seconds of computing, loading, reading, summing gradients, validating and writing
checkpoints, from measured constants (`Costs`) and assumed ones (`Cluster`).
"""

from dataclasses import dataclass

import torch

from benchmarks.measure import model_flops
from benchmarks.tables import markdown_table
from samft.models.sam import MODEL_SHAPES, PATCH_SIZE, build_sam
from samft.models.trainable import freeze

NUM_GPUS = (1, 8, 64, 512)
NUM_IMAGES = (10**4, 10**5, 10**6, 10**7)
MODES = ("frozen", "full", "cached")
_BACKWARD_SHARE = 2 / 3  # of a step that trains all weights; an all-reduce can overlap with it
# Kernels that the host launches in a step with one chunk of boxes: without the encoder, and for
# each of its blocks. Counted for vit_b on pretended GPUs (`benchmarks.gpu_checks steps`).
_DECODER_LAUNCHES = 1009
_BLOCK_LAUNCHES = {"cached": 0, "frozen": 31, "full": 118}
REMEDIES = {
    "compute": "more GPUs; freeze_image_encoder with cache_embeddings",
    "loader": "more num_workers, or more cores; images stored at image_size",
    "network": "accumulate_steps; bf16_compress of the gradients; freeze the encoder",
    "validation": "a longer metrics_interval; a smaller validation split",
    "checkpoints": "a longer metrics_interval; a faster disk for output_dir",
    "disk": "a larger or faster disk for cache_dir, cache_max_gib; no cache",
}


@dataclass(frozen=True)
class Costs:
    """Constants measured on one core of this machine."""

    loader_s: float  # per training image
    image_mb: float  # per image file
    validation_s: float  # per validation image, with its ground truth at the original resolution
    checkpoint_mb_s: float
    reduce_mb_s: float  # gloo, two processes on one host


@dataclass(frozen=True)
class Cluster:
    """Assumed constants of a cluster; replace them by measured ones."""

    tflops: float  # of a GPU in training
    launch_us: float  # of the host, for each kernel
    gpus_per_host: int
    workers: int  # loader workers per GPU, each on its own core
    network_gb_s: float  # per host, each way
    link_gb_s: float  # between the GPUs of a host
    disk_gb_s: float  # reading, per host


@dataclass(frozen=True)
class TrainingPlan:
    """The training to forecast."""

    model_type: str
    image_size: int
    mode: str
    batch_size: int  # per GPU
    boxes: int  # per image
    metrics_interval: int  # steps
    val_share: float  # validation images per training image

    @property
    def parameters(self) -> tuple[int, int]:
        """Number of trained parameters, and of all."""
        with torch.device("meta"):
            sam = build_sam(self.model_type, self.image_size)
        freeze(sam, [] if self.mode == "full" else ["image_encoder"])
        trained = sum(p.numel() for p in sam.parameters() if p.requires_grad)
        return trained, sum(p.numel() for p in sam.parameters())

    @property
    def state_gb(self) -> float:
        """Memory per GPU of weights, gradients and AdamW's moments, no activations.

        In float32; a frozen encoder that runs has a copy of its weights in bf16.
        """
        trained, total = self.parameters
        copied = total - trained if self.mode == "frozen" else 0
        return (4 * (total + 3 * trained) + 2 * copied) / 1e9

    @property
    def embedding_mb(self) -> float:
        """Size of an image's embedding in float16."""
        grid = self.image_size // PATCH_SIZE
        return 2 * MODEL_SHAPES[self.model_type].decoder_width * grid**2 / 1e6

    @property
    def image_tflop(self) -> float:
        """Training, per image with its boxes."""
        encoder, decoder = model_flops(self.model_type, self.image_size)
        # A frozen encoder has no backward pass; a backward pass counts as two forward passes.
        passes = {"frozen": 1, "full": 3, "cached": 0}[self.mode]
        return (passes * encoder + 3 * self.boxes * decoder) / 1e12

    @property
    def launches(self) -> int:
        """Kernels that the host launches in a step, however many images it has, about."""
        depth = MODEL_SHAPES[self.model_type].encoder_depth
        return _DECODER_LAUNCHES + depth * _BLOCK_LAUNCHES[self.mode]

    @property
    def forward_tflop(self) -> float:
        """Validation, per image with its boxes."""
        encoder, decoder = model_flops(self.model_type, self.image_size)
        return (encoder * (self.mode != "cached") + self.boxes * decoder) / 1e12


@dataclass(frozen=True)
class Forecast:
    """The forecast of one training."""

    step_s: float  # includes the share of validations and checkpoints
    parts: dict[str, float]  # seconds of a step by part
    steps_per_epoch: float
    loader_cores: float  # cores per GPU that keep up with it
    reduced_mb: float  # sent by each GPU in a step
    cache_gb: float
    checkpoint_gb: float
    bottleneck: str  # the part to speed up first

    @property
    def epoch_s(self) -> float:
        """Seconds of an epoch, with its share of validations and checkpoints."""
        return self.step_s * self.steps_per_epoch


def all_reduce_seconds(megabytes: float, *, ranks: int, rate_mb_s: float) -> tuple[float, float]:
    """MB that each rank sends in a ring all-reduce of `megabytes`, and the seconds it takes."""
    sent = 2 * (ranks - 1) / ranks * megabytes
    return sent, sent / rate_mb_s


def forecast_training(
    plan: TrainingPlan, costs: Costs, cluster: Cluster, *, gpus: int, images: int
) -> Forecast:
    """Seconds of each part of a step; the largest part beside computing is the bottleneck."""
    trained, total = plan.parameters
    # The GPU works while the host launches what comes next; a step takes what takes longer.
    host = 1e-6 * cluster.launch_us * plan.launches
    compute = max(host, plan.batch_size * plan.image_tflop / cluster.tflops)
    hosts = -(-gpus // cluster.gpus_per_host)
    local = min(gpus, cluster.gpus_per_host)
    # All GPUs of a host share its network, so a ring through all of them runs at the host's rate.
    rate = cluster.network_gb_s if hosts > 1 else cluster.link_gb_s
    sent, network = all_reduce_seconds(4 * trained / 1e6, ranks=gpus, rate_mb_s=1e3 * rate)
    # Loading overlaps with computing; the GPU waits for what takes longer.
    loader = plan.batch_size * costs.loader_s / cluster.workers
    read_mb = plan.batch_size * (plan.embedding_mb if plan.mode == "cached" else costs.image_mb)
    disk = local * read_mb / (1e3 * cluster.disk_gb_s)
    busy = max(compute, loader, disk)
    hidden = _BACKWARD_SHARE * compute if plan.mode == "full" else 0.0
    exposed = max(0.0, network - hidden)
    checkpoint_gb = 4 * (total + 2 * trained + total) / 1e9  # last.ckpt and a new best one
    intervals = {
        "validation": plan.val_share
        * images
        / gpus
        * max(costs.validation_s / cluster.workers, plan.forward_tflop / cluster.tflops),
        "checkpoints": 1e3 * checkpoint_gb / costs.checkpoint_mb_s,
    }
    spread = {name: spent / plan.metrics_interval for name, spent in intervals.items()}
    parts = {"compute": compute, "loader": loader, "disk": disk, "network": network, **spread}
    charged = {"compute": compute, "network": exposed, **spread}
    charged |= {name: parts[name] - compute for name in ("loader", "disk") if parts[name] > compute}
    others = {name: cost for name, cost in charged.items() if name != "compute"}
    worst = max(others, key=lambda name: others[name])
    return Forecast(
        step_s=busy + exposed + sum(spread.values()),
        parts=parts,
        steps_per_epoch=images / (gpus * plan.batch_size),
        loader_cores=plan.batch_size * costs.loader_s / max(compute, 1e-9),
        reduced_mb=sent,
        cache_gb=images * plan.embedding_mb / 1e3,
        checkpoint_gb=checkpoint_gb,
        bottleneck=worst if others[worst] > compute / 10 else "compute",
    )


def forecast_table(plan: TrainingPlan, costs: Costs, cluster: Cluster) -> str:
    """A Markdown table with a row for each number of GPUs and of images."""
    head = (
        "| GPUs | images | step, ms | of it compute | loader | all-reduce | validation "
        "| checkpoints | epoch, h | loader cores per GPU | cache, GB | bottleneck |"
    )
    rows = []
    for gpus in NUM_GPUS:
        for images in NUM_IMAGES:
            result = forecast_training(plan, costs, cluster, gpus=gpus, images=images)
            names = ("compute", "loader", "network", "validation", "checkpoints")
            cells = [f"{gpus}", f"{images:,}", f"{1e3 * result.step_s:.3g}"]
            cells += [f"{1e3 * result.parts[name]:.3g}" for name in names]
            cells += [f"{result.epoch_s / 3600:.3g}", f"{result.loader_cores:.2g}"]
            cells += [f"{result.cache_gb:,.0f}", result.bottleneck]
            rows.append(f"| {' | '.join(cells)} |")
    return markdown_table(head, rows)
