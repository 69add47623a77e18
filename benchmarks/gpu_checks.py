"""What `benchmarks.gpu` runs in processes of their own: each check prints its findings.

    python -m benchmarks.gpu_checks CHECK [ARGUMENTS ...]

A line that begins with `=> ` is for the table of results, one that begins with `json: ` for its
figures; the rest is for the log. Times and memory are printed on a real GPU only.
"""

import argparse
import csv
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measure import (
    MeasureOptions,
    model_flops,
    peak_flops,
    process_peak_gib,
    time_interleaved,
)
from benchmarks.variants import (
    CACHED,
    GRADIENT_TOLERANCE,
    SAMFT,
    Variants,
    Workload,
    gradient_difference,
    random_sam,
    samft_loss,
    samft_trainer,
    take_gradients,
)
from samft.models.prompted_sam import PromptedSam
from samft.runtime.device import exact_float32, pick_amp_dtype

GPU = torch.device("cuda")
# How far outputs and gradients in 8 or 11 bits of mantissa may be from float32, where nothing is
# wrong: rounding adds up over some hundred operations.
_HALF_TOLERANCE = 0.2
# Calls of the driver that put work into the queue of the GPU.
_LAUNCHES = (
    *("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    *("cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch"),
)


def is_pretended() -> bool:
    """Whether the GPU is one of `tests/helpers/pretend_cuda`, whose times mean nothing."""
    return torch.cuda.get_device_name(GPU).startswith("Pretended")


def check_versions(argv: Sequence[str]) -> None:
    """Versions of all that a figure depends on."""
    import torchvision

    names = [f"torch {torch.__version__}", f"torchvision {torchvision.__version__}"]
    names += [f"CUDA {torch.version.cuda}", f"Python {sys.version.split()[0]}"]
    if not is_pretended():
        names += [f"cuDNN {torch.backends.cudnn.version()}"]
        names += ["NCCL " + ".".join(map(str, torch.cuda.nccl.version()))]
    gib = torch.cuda.get_device_properties(GPU).total_memory / 2**30
    print(f"=> {torch.cuda.get_device_name(GPU)} ({gib:.0f} GiB); {', '.join(names)}")


# The same numbers as on the CPU.


def check_equality(argv: Sequence[str]) -> None:
    """Masks, loss and gradients of a step on the GPU against the CPU's, in each type."""
    args = _parse_workload(argv)
    expected = _outputs_and_gradients(args, torch.device("cpu"), amp="off")
    for amp, tolerance in (
        ("off", GRADIENT_TOLERANCE),
        ("bf16", _HALF_TOLERANCE),
        ("fp16", _HALF_TOLERANCE),
    ):
        outputs, gradients = _outputs_and_gradients(args, GPU, amp=amp)
        masks = ((outputs - expected[0]).norm() / expected[0].norm()).item()
        difference, name = gradient_difference(gradients, expected[1])
        print(f"=> {amp}: masks differ by {masks:.1e}, gradients by {difference:.1e} ({name})")
        assert max(masks, difference) <= tolerance, f"{amp}: over {tolerance}"


@exact_float32()
def _outputs_and_gradients(
    args: argparse.Namespace, device: torch.device, *, amp: str
) -> tuple[Tensor, dict[str, Tensor]]:
    workload = _workload(args, mode="full", device=device)
    variants = Variants(workload)
    trainer = samft_trainer(PromptedSam(random_sam(workload, attention="fast")), amp=amp)
    batch = variants.synthetic.batch(exact=False)
    dtype = pick_amp_dtype(amp, device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        with torch.no_grad():
            mask_logits, _ = trainer.model(
                batch.images, batch.boxes, batch.image_index, input_sizes=batch.input_sizes
            )
        loss = samft_loss(trainer, batch)
    gradients = take_gradients(trainer.model, loss)
    return mask_logits.float().cpu(), {name: g.cpu() for name, g in gradients.items()}


def check_rows(argv: Sequence[str]) -> None:
    """Two tables of `samft.evaluate`, object by object."""
    tables = []
    for path in argv:
        with open(path, newline="") as file:
            rows = csv.DictReader(file)
            tables.append({row["object_id"]: float(row["iou_actual"]) for row in rows})
    one, other = tables
    assert one.keys() == other.keys(), "the tables have different objects"
    gaps = [abs(one[object_id] - other[object_id]) for object_id in one]
    print(f"=> {len(gaps)} objects: IoU differs by {max(gaps):.1e} at most")
    assert max(gaps) <= 1e-3, "an object's IoU differs by more than 1e-3"


def check_states(argv: Sequence[str]) -> None:
    """Two `last.ckpt` hold the same weights and moments, to the bit."""
    states = [torch.load(path, map_location="cpu", weights_only=True) for path in argv]
    tensors = [
        {
            f"{i} {name}": t
            for i, own in state["optimizer"]["state"].items()
            for name, t in own.items()
        }
        | state["model"]
        for state in states
    ]
    assert tensors[0].keys() == tensors[1].keys(), "the states hold different tensors"
    unequal = [name for name, t in tensors[0].items() if not torch.equal(t, tensors[1][name])]
    finite = all(t.isfinite().all() for t in tensors[0].values())
    print(f"=> {len(unequal)} of {len(tensors[0])} tensors differ; all finite: {finite}")
    assert not unequal and finite, f"differ: {unequal[:5]}"


# A step of samft alone: time, memory, launches.


def check_steps(argv: Sequence[str]) -> None:
    """Time, utilisation, memory and launches of samft's step, in each mode."""
    args = _parse_workload(argv)
    peak = peak_flops(GPU)[0]
    for mode in args.modes:
        workload = _workload(args, mode=mode, device=GPU)
        try:
            figures = _measure_step(workload, args, mode=mode)
        except torch.OutOfMemoryError as error:
            print(f"=> {mode}: out of memory ({str(error).splitlines()[0]})")
            continue
        figures |= {"model_type": args.model_type, "mode": mode, "images": args.images}
        figures["cuda_graphs"] = args.cuda_graphs
        print(f"json: {json.dumps(figures)}")
        if is_pretended():
            print(f"=> {mode}: {figures['launches']} launches")
            continue
        flops = _step_flops(workload, mode) / figures["seconds"] / peak
        print(
            f"=> {mode}: {1e3 * figures['seconds']:.2f} ms a step of {args.images} images, "
            f"{1e3 * figures['seconds'] / args.images:.2f} ms an image, {100 * flops:.0f} % of the "
            f"peak, {figures['peak_gib']:.1f} GiB, {figures['launches']} launches"
        )


def _measure_step(workload: Workload, args: argparse.Namespace, *, mode: str) -> dict[str, Any]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    variants = Variants(workload, cuda_graphs=args.cuda_graphs)
    if mode == "cached":
        variants.use_random_embeddings()
    name = CACHED if mode == "cached" else SAMFT
    step = variants.step(name)
    options = MeasureOptions(args.rounds, warm_up=3)
    seconds = time_interleaved({name: step}, options=options, device=GPU)[name]
    return {
        "seconds": statistics.median(seconds),
        "peak_gib": process_peak_gib(GPU),
        "launches": count_launches(step),
    }


def count_launches(step: Callable[[], Any]) -> int:
    """How often a step calls the driver to queue work: kernels, copies, whole CUDA graphs."""
    if is_pretended():
        step()
        ledger = importlib.import_module("helpers.pretend_cuda.ledger").LEDGER
        return int(ledger.report.steps[-1].num_launches)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.key in _LAUNCHES)


def _step_flops(workload: Workload, mode: str) -> float:
    encoder, decoder = model_flops(workload.model_type, workload.image_size)
    passes = {"cached": 0, "frozen": 1, "full": 3}[mode]
    return workload.num_images * passes * encoder + workload.num_masks * 3 * decoder


# Training with a change that no flag makes.


def run_training(argv: Sequence[str]) -> int:
    """`samft.train` in a group of one process as in one of several, or with no memory."""
    from samft import train
    from samft.cli import run_command

    parser = argparse.ArgumentParser()
    parser.add_argument("--in_group", action="store_true")
    parser.add_argument("--memory_share", type=float)
    args, rest = parser.parse_known_args(argv)
    if args.in_group:
        _wrap_single_process()
    if args.memory_share:
        torch.cuda.set_per_process_memory_fraction(args.memory_share)
    code = run_command(train.main, rest)
    print(f"=> exit code {code}")
    return train.exit_code_for_launcher(code)


def _wrap_single_process() -> None:
    # samft leaves DistributedDataParallel out for one process. Here its constructor, its broadcasts
    # and sums by NCCL and ZeroRedundancyOptimizer run with one GPU.
    from samft import distributed
    from samft.recipes import build
    from samft.training import engine

    def as_one_of_two(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with mock.patch.object(distributed, "get_world_size", lambda: 2):
                return function(*args, **options)

        return call

    engine.wrap_ddp = as_one_of_two(distributed.wrap_ddp)
    build.build_optimizer = as_one_of_two(build.build_optimizer)


def _parse_workload(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_type", default="vit_tiny")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--boxes", type=int, default=8)
    parser.add_argument("--modes", nargs="+", default=["cached", "frozen", "full"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cuda_graphs", action="store_true")
    return parser.parse_args(argv)


def _workload(args: argparse.Namespace, *, mode: str, device: torch.device) -> Workload:
    frozen = mode != "full"
    return Workload(args.model_type, args.image_size, args.images, args.boxes, frozen, device)


CHECKS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "versions": check_versions,
    "equality": check_equality,
    "rows": check_rows,
    "states": check_states,
    "steps": check_steps,
    "train": run_training,
}

if __name__ == "__main__":
    sys.exit(CHECKS[sys.argv[1]](sys.argv[2:]))
