"""The parts of `benchmarks.gpu`, in order of worth: what each runs, and for how long at most."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CHECK, TRAIN = "benchmarks.gpu_checks", "samft.train"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=1"]


@dataclass(frozen=True)
class Setup:
    """Where this runs.

    Attributes:
        folder: For data and runs, deleted at the end.
        pretended: Whether there is no GPU, and the harness of the tests pretends one.
        read_reports: Of pretended GPUs, those whose findings were taken.
    """

    folder: Path
    pretended: bool
    read_reports: set[Path] = field(default_factory=set)

    def train(self, name: str, **settings: Any) -> list[str]:
        """Arguments of a short run of `samft.train` on the drawn dataset."""
        size, steps = (128, 2) if self.pretended else (256, 20)
        values = {
            "data_root": self.folder / "demo",
            "output_dir": self.folder / name,
            "model_type": "vit_tiny",
            "checkpoint_path": "auto",
            "image_size": size,
            "steps": steps,
            "metrics_interval": settings.get("steps", steps),
            "num_workers": 1 if self.pretended else 4,
            **settings,
        }
        return [word for item in values.items() for word in _flag(*item)]


@dataclass(frozen=True)
class Part:
    """One thing to show.

    Attributes:
        name: In the table.
        shows: What it is for.
        limit: Seconds, on a GPU.
        commands: Modules with their arguments, one after another.
        needs_gpu: Why pretended GPUs cannot show it; empty: they can.
        fails: Whether the last command is to end with an error of its own, exit code 1.
    """

    name: str
    shows: str
    limit: float
    commands: Callable[[Setup], list[list[str]]]
    needs_gpu: str = ""
    fails: bool = False


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _data(setup: Setup) -> list[list[str]]:
    images = "12" if setup.pretended else "40"
    return [["samft.demo", "--output_dir", str(setup.folder / "demo"), "--images", images]]


def _equality(setup: Setup) -> list[list[str]]:
    size = "64" if setup.pretended else "256"
    return [[CHECK, "equality", "--model_type", "vit_tiny", "--image_size", size]]


def _fresh(setup: Setup) -> list[list[str]]:
    return [[TRAIN, *setup.train("fresh")]]


def _cached(setup: Setup) -> list[list[str]]:
    return [[TRAIN, *setup.train("cached", freeze_image_encoder=True, amp="fp16")]]


def _sharded(setup: Setup) -> list[list[str]]:
    # In a group of one, by torchrun, wrapped and sharded as one of several
    run = setup.train("nccl", steps=4, metrics_interval=2, optimizer_sharding=True)
    module = ["-m", "helpers.pretend_cuda"] if setup.pretended else ["-m"]
    command = [*TORCHRUN, *module, CHECK, "train", "--in_group", *run]
    return [[*command, "--stop_after", "2"], command]


def _deterministic(setup: Setup) -> list[list[str]]:
    def run(name: str) -> list[str]:
        return [TRAIN, *setup.train(name, steps=4, metrics_interval=2, deterministic=True)]

    states = [str(setup.folder / name / "last.ckpt") for name in ("straight", "resumed")]
    return [
        run("straight"),
        [*run("resumed"), "--stop_after", "2"],
        run("resumed"),
        [CHECK, "states", *states],
    ]


def _kernels(setup: Setup) -> list[list[str]]:
    return [["benchmarks.attention_kernels"]]


def _benchmark(setup: Setup, *, images: int, modes: Sequence[str], rounds: int) -> list[str]:
    command = ["benchmarks.train_step", "--device", "cuda", "--benchmarks", "step"]
    command += ["--memory_gib", "0", "--images", str(1 if setup.pretended else images)]
    command += ["--rounds", str(1 if setup.pretended else rounds), "--modes", *modes]
    if setup.pretended:
        return [*command, "--model_type", "vit_tiny", "--image_size", "128", "--boxes", "2"]
    return [*command, "--model_type", "vit_b"]


def _step_benchmark(setup: Setup) -> list[list[str]]:
    return [_benchmark(setup, images=4, modes=["frozen", "cached", "full"], rounds=10)]


def _one_image(setup: Setup) -> list[list[str]]:
    return [_benchmark(setup, images=1, modes=["frozen", "cached"], rounds=10)]


def _steps_of(model_type: str, *extra: str) -> Callable[[Setup], list[list[str]]]:
    def commands(setup: Setup) -> list[list[str]]:
        size = ["--image_size", "1024", "--images", "4"]
        if setup.pretended:
            size = ["--image_size", "128", "--images", "1", "--rounds", "1"]
        return [[CHECK, "steps", "--model_type", model_type, *size, *extra]]

    return commands


_graphs = _steps_of("vit_b", "--cuda_graphs")


def _evaluate(setup: Setup) -> list[list[str]]:
    checkpoint = str(REPOSITORY / "samft" / "pretrained" / "vit_tiny.pth")
    common = ["--checkpoint", checkpoint, "--data_root", str(setup.folder / "demo")]
    common += ["--split", "val", "--output"]
    tables = [setup.folder / f"{device}.json" for device in ("cuda", "cpu")]
    return [
        *(["samft.evaluate", *common, str(path), "--device", path.stem] for path in tables),
        [CHECK, "rows", *(str(path.with_suffix(".objects.csv")) for path in tables)],
    ]


def _dry_run(setup: Setup) -> list[list[str]]:
    if setup.pretended:
        return [[TRAIN, *setup.train("dry", dry_run=True)]]
    sizes = {"model_type": "vit_h", "checkpoint_path": "random", "image_size": 1024}
    return [[TRAIN, *setup.train("dry", dry_run=True, batch_size=2, **sizes)]]


def _compiled(setup: Setup) -> list[list[str]]:
    sizes = {
        "model_type": "vit_b",
        "checkpoint_path": "random",
        "image_size": 1024,
        "batch_size": 2,
    }
    return [
        [TRAIN, *setup.train(f"compile-{compile}", steps=20, compile=compile, **sizes)]
        for compile in (False, True)
    ]


def _out_of_memory(setup: Setup) -> list[list[str]]:
    sizes = {"model_type": "vit_b", "checkpoint_path": "random", "image_size": 1024}
    run = setup.train("memory", **sizes)
    return [[CHECK, "train", "--memory_share", "0.03", *run]]


NO_KERNELS = "pretended GPUs have no kernels"
LIKE_VIT_B = "launches of vit_b are counted; this model is too large for a machine without a GPU"
NO_COMPILER = "torch.compile does not see pretended GPUs"
NO_MEMORY = "the memory of pretended GPUs has no end"
PARTS = (
    Part("data", "drawn images for all parts", 30, _data),
    Part("versions", "what the figures belong to", 30, lambda setup: [[CHECK, "versions"]]),
    Part("GPU = CPU", "masks, loss and gradients of a step", 60, _equality),
    Part("fresh run", "a whole run of vit_tiny", 60, _fresh),
    Part("cached, float16", "embedding pass, cache, gradient scaler", 60, _cached),
    Part("NCCL, sharded, resumed", "DDP and ZeRO on the GPU, in a group of one", 90, _sharded),
    Part("step, vit_b, 4 images", "beside plain and plain with autocast", 120, _step_benchmark),
    Part("steps, vit_b", "time, memory, launches of samft alone", 60, _steps_of("vit_b")),
    Part("steps with CUDA graphs", "the same, beside the last", 60, _graphs),
    Part("steps, vit_h", "the same; full at batch 4", 120, _steps_of("vit_h"), LIKE_VIT_B),
    Part("deterministic resume", "a resumed run is equal to the bit", 120, _deterministic),
    Part("attention kernels", "which one, how fast", 75, _kernels, NO_KERNELS),
    Part("evaluate, GPU and CPU", "each object's IoU", 60, _evaluate),
    Part("step, vit_b, 1 image", "the same, where the host is slower", 60, _one_image),
    Part("steps, vit_l", "time, memory, launches", 90, _steps_of("vit_l"), LIKE_VIT_B),
    Part("dry run, vit_h", "the forecast of memory", 90, _dry_run),
    Part("compile off, on", "images a second of vit_b", 100, _compiled, NO_COMPILER),
    Part("out of memory", "one sentence", 45, _out_of_memory, NO_MEMORY, fails=True),
)
