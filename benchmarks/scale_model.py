"""How long a step takes, and the bottleneck, for any number of GPUs and images.

Plain arithmetic: seconds of a step on a GPU, of loading, reading, summing gradients, validating and
writing checkpoints, from what was measured (`Costs`) and what is assumed (`Cluster`).
"""

from dataclasses import dataclass

import torch

from benchmarks.measure import model_flops, table
from samft.models.sam import MODEL_SHAPES, PATCH_SIZE, build_sam, freeze

NUM_GPUS = (1, 8, 64, 512)
NUM_IMAGES = (10**4, 10**5, 10**6, 10**7)
MODES = ("frozen", "full", "cached")
_BACKWARD_SHARE = 2 / 3  # of a step that trains all, in which an all-reduce can hide
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
    """Measured here, on one core of this machine."""

    loader_s: float  # an image
    image_mb: float  # a file
    validation_s: float  # a validation image, with its truth at the original resolution
    checkpoint_mb_s: float
    reduce_mb_s: float  # gloo, two processes of one host


@dataclass(frozen=True)
class Cluster:
    """Assumed, until it is measured where it is."""

    tflops: float  # that a GPU does in training
    gpus_per_host: int
    workers: int  # that load for a GPU, each on a core of its own
    network_gb_s: float  # of a host, each way
    link_gb_s: float  # between the GPUs of a host
    disk_gb_s: float  # that a host reads


@dataclass(frozen=True)
class Run:
    """What is trained, and how."""

    model_type: str
    image_size: int
    mode: str
    batch_size: int  # of a GPU
    boxes: int  # of an image
    metrics_interval: int  # steps
    val_share: float  # validation images, for each training image

    @property
    def parameters(self) -> tuple[int, int]:
        """Those that train, and all."""
        with torch.device("meta"):
            sam = build_sam(self.model_type, self.image_size)
        freeze(sam, [] if self.mode == "full" else ["image_encoder"])
        trained = sum(p.numel() for p in sam.parameters() if p.requires_grad)
        return trained, sum(p.numel() for p in sam.parameters())

    @property
    def state_gb(self) -> float:
        """Of a GPU: weights, gradients, AdamW's two moments, float32; activations come on top."""
        trained, total = self.parameters
        return 4 * (total + 3 * trained) / 1e9

    @property
    def embedding_mb(self) -> float:
        """Of an image, float16."""
        grid = self.image_size // PATCH_SIZE
        return 2 * MODEL_SHAPES[self.model_type].decoder_width * grid**2 / 1e6

    @property
    def image_tflop(self) -> float:
        """Of an image with its boxes in a training step."""
        encoder, decoder = model_flops(self.model_type, self.image_size)
        # A frozen encoder has no backward pass; that of the rest counts twice.
        passes = {"frozen": 1, "full": 3, "cached": 0}[self.mode]
        return (passes * encoder + 3 * self.boxes * decoder) / 1e12

    @property
    def forward_tflop(self) -> float:
        """Of an image with its boxes in validation."""
        encoder, decoder = model_flops(self.model_type, self.image_size)
        return (encoder * (self.mode != "cached") + self.boxes * decoder) / 1e12


@dataclass(frozen=True)
class Forecast:
    """Of one run; seconds of a step by what takes them, the rest of the whole."""

    step_s: float  # validation and checkpoints spread over the steps
    parts: dict[str, float]
    steps_per_epoch: float
    loader_cores: float  # of a GPU, to keep up with it
    reduced_mb: float  # that each GPU sends in a step
    cache_gb: float
    checkpoint_gb: float
    gives_way: str

    @property
    def epoch_s(self) -> float:
        """With its share of validations and checkpoints."""
        return self.step_s * self.steps_per_epoch


def all_reduce_seconds(megabytes: float, *, ranks: int, rate_mb_s: float) -> tuple[float, float]:
    """MB that each rank of a ring sends for the sum of so many, and how long that takes."""
    sent = 2 * (ranks - 1) / ranks * megabytes
    return sent, sent / rate_mb_s


def forecast(run: Run, costs: Costs, cluster: Cluster, *, gpus: int, images: int) -> Forecast:
    """What each part of a step takes; the largest is the bottleneck."""
    trained, total = run.parameters
    compute = run.batch_size * run.image_tflop / cluster.tflops
    hosts = -(-gpus // cluster.gpus_per_host)
    local = min(gpus, cluster.gpus_per_host)
    # All GPUs of a host share its network, so a ring through all of them runs at the host's rate.
    rate = cluster.network_gb_s if hosts > 1 else cluster.link_gb_s
    sent, network = all_reduce_seconds(4 * trained / 1e6, ranks=gpus, rate_mb_s=1e3 * rate)
    # The loader works beside the GPU; what it is late by, the GPU waits.
    loader = run.batch_size * costs.loader_s / cluster.workers
    read_mb = run.batch_size * (run.embedding_mb if run.mode == "cached" else costs.image_mb)
    disk = local * read_mb / (1e3 * cluster.disk_gb_s)
    busy = max(compute, loader, disk)
    hidden = _BACKWARD_SHARE * compute if run.mode == "full" else 0.0
    exposed = max(0.0, network - hidden)
    checkpoint_gb = 4 * (total + 2 * trained + total) / 1e9  # last.ckpt and a new best one
    intervals = {
        "validation": run.val_share
        * images
        / gpus
        * max(costs.validation_s / cluster.workers, run.forward_tflop / cluster.tflops),
        "checkpoints": 1e3 * checkpoint_gb / costs.checkpoint_mb_s,
    }
    spread = {name: spent / run.metrics_interval for name, spent in intervals.items()}
    parts = {"compute": compute, "loader": loader, "disk": disk, "network": network, **spread}
    charged = {"compute": compute, "network": exposed, **spread}
    charged |= {name: parts[name] - compute for name in ("loader", "disk") if parts[name] > compute}
    others = {name: cost for name, cost in charged.items() if name != "compute"}
    worst = max(others, key=lambda name: others[name])
    return Forecast(
        step_s=busy + exposed + sum(spread.values()),
        parts=parts,
        steps_per_epoch=images / (gpus * run.batch_size),
        loader_cores=run.batch_size * costs.loader_s / max(compute, 1e-9),
        reduced_mb=sent,
        cache_gb=images * run.embedding_mb / 1e3,
        checkpoint_gb=checkpoint_gb,
        gives_way=worst if others[worst] > compute / 10 else "compute",
    )


def forecast_table(run: Run, costs: Costs, cluster: Cluster) -> str:
    """Markdown: a row for each number of GPUs and of images."""
    head = (
        "| GPUs | images | step, ms | of it compute | loader | all-reduce | validation "
        "| checkpoints | epoch, h | cores for loading, a GPU | cache, GB | bottleneck |"
    )
    rows = []
    for gpus in NUM_GPUS:
        for images in NUM_IMAGES:
            found = forecast(run, costs, cluster, gpus=gpus, images=images)
            names = ("compute", "loader", "network", "validation", "checkpoints")
            cells = [f"{gpus}", f"{images:,}", f"{1e3 * found.step_s:.3g}"]
            cells += [f"{1e3 * found.parts[name]:.3g}" for name in names]
            cells += [f"{found.epoch_s / 3600:.3g}", f"{found.loader_cores:.2g}"]
            cells += [f"{found.cache_gb:,.0f}", found.gives_way]
            rows.append(f"| {' | '.join(cells)} |")
    return table(head, rows)
