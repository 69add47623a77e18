"""Measures the constants of `benchmarks.scale_model`, checks its forecast, and prints its tables.

    python -m benchmarks.scale [--model_type vit_b] [--mode frozen] [--json FILE]

First, constants are measured on one core: loader, checkpoint, all-reduce over gloo, steps of
`vit_tiny`. From these, the steps of one and of two processes with the same global batch are
predicted and then run; their losses must agree. Last come the tables for GPUs. The speed of a GPU,
its hosts and its network cannot be measured without them: it is assumed, with flags to change it.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.measure import REST, describe_machine
from benchmarks.scale_model import (
    MODES,
    REMEDIES,
    Cluster,
    Costs,
    TrainingPlan,
    all_reduce_seconds,
    forecast_table,
)
from benchmarks.scale_runs import (
    CPU,
    RankReport,
    TrainingJob,
    checkpoint_rate,
    loader_seconds,
    reduce_rate,
    run_job,
    run_on_ranks,
    step_seconds,
    validation_seconds,
)
from benchmarks.tables import markdown_table
from samft.demo import write_demo

LOSS_TOLERANCE = 1e-5
_UNITS = {
    "loader_s": "CPU ms per training image",
    "image_mb": "MB per image file",
    "validation_s": "CPU ms per validation image",
    "checkpoint_mb_s": "MB/s of checkpoints",
    "reduce_mb_s": "MB/s of gradients in an all-reduce over gloo, two processes on one host",
}


@dataclass(frozen=True)
class StepCheck:
    """Predicted and measured CPU seconds of a step, by the number of processes.

    Not wall-clock seconds, which depend on other load on the machine.
    """

    predicted: dict[int, float]
    measured: dict[int, float]
    loss_difference: float
    reports: dict[int, list[RankReport]]


def check_prediction(job: TrainingJob, costs: Costs, *, rounds: int) -> StepCheck:
    """Predicts the steps of 1 and 2 processes from separately measured parts, and runs them."""
    few, many = 1, job.global_batch
    seconds = {count: step_seconds(job, count, rounds=rounds) for count in (few, many)}
    slope = (seconds[many] - seconds[few]) / (many - few)
    trained = TrainingPlan(job.model_type, job.image_size, "full", 1, 1, 1, 0).parameters[0]
    reports = {ranks: run_on_ranks(ranks, run_job, job) for ranks in (1, 2)}
    predicted, measured = {}, {}
    for ranks, of_ranks in reports.items():
        images = job.global_batch // ranks
        network = all_reduce_seconds(4 * trained / 1e6, ranks=ranks, rate_mb_s=costs.reduce_mb_s)
        step_s = seconds[few] + (images - few) * slope
        predicted[ranks] = images * costs.loader_s + step_s + network[1]
        measured[ranks] = max(report.core_s for report in of_ranks)
    pairs = zip(reports[1][0].losses, reports[2][0].losses, strict=True)
    return StepCheck(predicted, measured, max(abs(a - b) / abs(a) for a, b in pairs), reports)


def check_table(check: StepCheck) -> str:
    """A Markdown table: prediction, measurement, and the phases of each rank's step."""
    head = (
        "| processes | predicted, CPU ms per step | measured | measured / predicted "
        "| wall clock, ms | data "
        "| forward | backward | of it summing | of it waiting for the other rank | optimizer "
        "| waiting for flags | rest of the loop |"
    )
    rows = []
    for ranks, reports in check.reports.items():
        sync = sync_seconds(reports)
        for rank, report in enumerate(reports):
            predicted, measured, wall = check.predicted[ranks], report.core_s, report.wall_s
            phases = report.phases
            forward = phases["encoder"] + phases["decoder + loss"]
            times = [wall, phases["data"], forward, phases["backward"], *sync[rank]]
            times += [phases["optimizer"], phases["waiting"]]
            cells = [f"{ranks}, rank {rank}", f"{1e3 * predicted:.0f}", f"{1e3 * measured:.0f}"]
            cells += [f"{measured / predicted:.2f}", *(f"{1e3 * time:.1f}" for time in times)]
            cells.append(f"{100 * phases[REST] / wall:.2f} %")
            rows.append(f"| {' | '.join(cells)} |")
    return markdown_table(head, rows)


def sync_seconds(reports: Sequence[RankReport]) -> list[tuple[float, float]]:
    """Seconds per step and rank of the last all-reduce: summing, and waiting for the other ranks.

    Processes on one host share the monotonic clock: the time until the last rank starts the
    all-reduce is waiting, the time after that is summing.
    """
    steps = len(reports[0].launches)
    if not steps:
        return [(0.0, 0.0)] * len(reports)
    last_launch = [max(report.launches[step] for report in reports) for step in range(steps)]
    seconds = []
    for report in reports:
        waiting = sum(last - own for last, own in zip(last_launch, report.launches, strict=True))
        summing = sum(end - last for last, end in zip(last_launch, report.arrivals, strict=True))
        seconds.append((summing / steps, waiting / steps))
    return seconds


def measure_costs(
    job: TrainingJob, small: TrainingJob, *, checkpoint_of: str, rounds: int
) -> tuple[Costs, Costs]:
    """Measures the constants of the job to forecast, and of the small job to check."""
    loader_s, image_mb = loader_seconds(small, rounds=rounds)
    small_costs = Costs(
        loader_s=loader_s,
        image_mb=image_mb,
        validation_s=validation_seconds(small, rounds=rounds),
        checkpoint_mb_s=checkpoint_rate(checkpoint_of, rounds=rounds),
        reduce_mb_s=min(run_on_ranks(2, reduce_rate, 16, rounds)),
    )
    loader_s, image_mb = loader_seconds(job, rounds=rounds)
    validation_s = validation_seconds(job, rounds=rounds)
    costs = replace(small_costs, loader_s=loader_s, image_mb=image_mb, validation_s=validation_s)
    return costs, small_costs


def costs_table(costs: Costs) -> str:
    """A Markdown table of the measured constants."""
    rows = []
    for name, value in asdict(costs).items():
        shown = 1e3 * value if name.endswith("_s") and not name.endswith("mb_s") else value
        rows.append(f"| {_UNITS[name]} | {shown:.3g} |")
    return markdown_table("| measured here | |", rows)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; the assumed constants should be replaced by measured ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model_type", default="vit_b")
    add("--image_size", type=int, default=1024)
    add("--mode", nargs="+", default=list(MODES), choices=MODES)
    add("--batch_size", type=int, default=4, help="per GPU")
    add("--boxes", type=int, default=8, help="per image")
    add("--metrics_interval", type=int, default=50, help="steps")
    add("--val_share", type=float, default=0.05, help="validation images per training image")
    add("--tflops", type=float, default=250, help="assumed, per GPU: a quarter of an H100's peak")
    add("--launch_us", type=float, default=7, help="assumed: of the host, for each kernel")
    add("--gpus_per_host", type=int, default=8)
    add("--workers", type=int, default=4, help="num_workers per GPU, one core each")
    add("--network_gb_s", type=float, default=50, help="assumed, per host: 400 Gb/s")
    add("--link_gb_s", type=float, default=200, help="assumed, between the GPUs of a host")
    add("--disk_gb_s", type=float, default=2, help="assumed, per host: reading")
    add("--data_root", type=Path, help="dataset to load; default: the demo dataset")
    add("--steps", type=int, default=8, help="of the runs that check the prediction")
    add("--rounds", type=int, default=3)
    add(
        "--costs",
        type=Path,
        help="--json file of an earlier run: print its tables, measure nothing",
    )
    add("--json", type=Path, help="write the measurements to this file")
    return parser.parse_args(argv)


def _jobs(args: argparse.Namespace, scratch: Path) -> tuple[TrainingJob, TrainingJob]:
    # The job to forecast, and the small job to check the prediction on.
    cache = str(scratch / "cache")
    small = TrainingJob(
        str(scratch / "small"), cache, "vit_tiny", 256, global_batch=4, steps=args.steps
    )
    write_demo(scratch / "small", num_train=16, num_val=4, size=256)
    root = args.data_root or write_demo(
        scratch / "demo", num_train=12, num_val=4, size=args.image_size
    )
    return replace(small, data_root=str(root), image_size=args.image_size), small


def _measure_and_check(args: argparse.Namespace) -> Costs:
    machine = describe_machine(CPU)
    print(f"{machine}\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        job, small = _jobs(args, Path(scratch))
        costs, small_costs = measure_costs(
            job, small, checkpoint_of=args.model_type, rounds=args.rounds
        )
        print(costs_table(costs) + "\n", flush=True)
        check = check_prediction(small, small_costs, rounds=args.rounds)
    print(
        f"One global batch of {small.global_batch} images on 1 and on 2 processes, vit_tiny, "
        f"{small.image_size} px, {small.steps} steps: losses agree to {check.loss_difference:.1e}."
        f"\n\n{check_table(check)}",
        flush=True,
    )
    assert check.loss_difference <= LOSS_TOLERANCE, "the losses of one and of two processes differ"
    if args.json:
        figures = {"machine": machine, "costs": asdict(costs), "check": asdict(check)}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return costs


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, checks the prediction, and prints the tables."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    if args.costs:
        costs = Costs(**json.loads(args.costs.read_text())["costs"])
        print(costs_table(costs))
    else:
        costs = _measure_and_check(args)
    cluster = Cluster(
        args.tflops,
        args.launch_us,
        args.gpus_per_host,
        args.workers,
        args.network_gb_s,
        args.link_gb_s,
        args.disk_gb_s,
    )
    print(f"\nAssumed, not measured: {cluster}.")
    for mode in args.mode:
        plan = TrainingPlan(
            args.model_type,
            args.image_size,
            mode,
            args.batch_size,
            args.boxes,
            args.metrics_interval,
            args.val_share,
        )
        print(f"\n{plan}: {plan.state_gb:.2f} GB per GPU for weights, gradients, optimizer.\n")
        print(forecast_table(plan, costs, cluster), flush=True)
    remedies = [f"| {name} | {remedy} |" for name, remedy in REMEDIES.items()]
    print("\n" + markdown_table("| bottleneck | remedy |", remedies))


if __name__ == "__main__":
    main()
