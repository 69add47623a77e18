"""Measures what `benchmarks.scale_model` needs, holds it against real runs, and prints its tables.

    python -m benchmarks.scale [--model_type vit_b] [--mode frozen] [--json FILE]

First constants are measured here, on one core: what the loader, a checkpoint, an all-reduce over
gloo and steps of `vit_tiny` take. From these the steps of one and of two processes with one global
batch are predicted, and run: their losses have to agree. Last come the tables for GPUs. What these
need of a GPU, its hosts and its network cannot be measured without them: it is assumed, as the
flags say, and printed as such.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.measure import REST, machine, table
from benchmarks.scale_model import (
    MODES,
    REMEDIES,
    Cluster,
    Costs,
    Run,
    all_reduce_seconds,
    forecast_table,
)
from benchmarks.scale_runs import (
    CPU,
    Job,
    Report,
    checkpoint_rate,
    loader_seconds,
    on_ranks,
    reduce_rate,
    run_job,
    step_seconds,
    validation_seconds,
)
from samft.demo import write_demo

LOSS_TOLERANCE = 1e-5
_UNITS = {
    "loader_s": "ms of a core for a training image",
    "image_mb": "MB of an image file",
    "validation_s": "ms of a core for a validation image",
    "checkpoint_mb_s": "MB/s of checkpoints",
    "reduce_mb_s": "MB/s of gradients summed over gloo, two processes of one host",
}


@dataclass(frozen=True)
class Check:
    """Predicted and measured seconds of a core for a step, by the number of processes.

    Not of the clock on the wall, on which other work of the machine shows.
    """

    predicted: dict[int, float]
    measured: dict[int, float]
    loss_difference: float
    reports: dict[int, list[Report]]


def check(job: Job, costs: Costs, *, rounds: int) -> Check:
    """Predicts the steps of 1 and 2 processes from parts measured apart; then runs them."""
    few, many = 1, job.global_batch
    seconds = {count: step_seconds(job, count, rounds=rounds) for count in (few, many)}
    slope = (seconds[many] - seconds[few]) / (many - few)
    trained = Run(job.model_type, job.image_size, "full", 1, 1, 1, 0).parameters[0]
    reports = {ranks: on_ranks(ranks, run_job, job) for ranks in (1, 2)}
    predicted, measured = {}, {}
    for ranks, found in reports.items():
        own = job.global_batch // ranks
        network = all_reduce_seconds(4 * trained / 1e6, ranks=ranks, rate_mb_s=costs.reduce_mb_s)
        predicted[ranks] = own * costs.loader_s + seconds[few] + (own - few) * slope + network[1]
        measured[ranks] = max(report.core_s for report in found)
    pairs = zip(reports[1][0].losses, reports[2][0].losses, strict=True)
    return Check(predicted, measured, max(abs(a - b) / abs(a) for a, b in pairs), reports)


def check_table(found: Check) -> str:
    """Markdown: the prediction beside the run, and where the ranks' time went."""
    head = (
        "| processes | predicted, core-ms a step | measured | measured / predicted "
        "| on the wall, ms | data "
        "| forward | backward | of it summing | of it waiting for the other | optimizer "
        "| waiting for flags | own loop |"
    )
    rows = []
    for ranks, reports in found.reports.items():
        sync = sync_seconds(reports)
        for rank, report in enumerate(reports):
            predicted, measured, wall = found.predicted[ranks], report.core_s, report.wall_s
            own = report.phases
            forward = own["encoder"] + own["decoder + loss"]
            times = [wall, own["data"], forward, own["backward"], *sync[rank], own["optimizer"]]
            times.append(own["waiting"])
            cells = [f"{ranks}, rank {rank}", f"{1e3 * predicted:.0f}", f"{1e3 * measured:.0f}"]
            cells += [f"{measured / predicted:.2f}", *(f"{1e3 * time:.1f}" for time in times)]
            cells.append(f"{100 * own[REST] / wall:.2f} %")
            rows.append(f"| {' | '.join(cells)} |")
    return table(head, rows)


def sync_seconds(reports: Sequence[Report]) -> list[tuple[float, float]]:
    """Of each rank: seconds a step after the last gradients were there, summing and waiting.

    Processes of one host share the monotonic clock, so what passes until the last rank has come is
    waiting, and what comes after that is the all-reduce itself.
    """
    steps = len(reports[0].launches)
    if not steps:
        return [(0.0, 0.0)] * len(reports)
    complete = [max(report.launches[step] for report in reports) for step in range(steps)]
    found = []
    for report in reports:
        waiting = sum(c - own for c, own in zip(complete, report.launches, strict=True))
        summing = sum(own - c for c, own in zip(complete, report.arrivals, strict=True))
        found.append((summing / steps, waiting / steps))
    return found


def measure_costs(job: Job, small: Job, *, checkpoint_of: str, rounds: int) -> tuple[Costs, Costs]:
    """All constants that this machine can give: of a job, and of the small one for the check."""
    loader_s, image_mb = loader_seconds(small, rounds=rounds)
    own = Costs(
        loader_s=loader_s,
        image_mb=image_mb,
        validation_s=validation_seconds(small, rounds=rounds),
        checkpoint_mb_s=checkpoint_rate(checkpoint_of, rounds=rounds),
        reduce_mb_s=min(on_ranks(2, reduce_rate, 16, rounds)),
    )
    loader_s, image_mb = loader_seconds(job, rounds=rounds)
    validation_s = validation_seconds(job, rounds=rounds)
    costs = replace(own, loader_s=loader_s, image_mb=image_mb, validation_s=validation_s)
    return costs, own


def costs_table(costs: Costs) -> str:
    """Markdown."""
    rows = []
    for name, value in asdict(costs).items():
        shown = 1e3 * value if name.endswith("_s") and not name.endswith("mb_s") else value
        rows.append(f"| {_UNITS[name]} | {shown:.3g} |")
    return table("| measured here | |", rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; what is assumed of GPUs has to be replaced by what was measured on them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model_type", default="vit_b")
    add("--image_size", type=int, default=1024)
    add("--mode", nargs="+", default=list(MODES), choices=MODES)
    add("--batch_size", type=int, default=4, help="of a GPU")
    add("--boxes", type=int, default=8, help="of an image")
    add("--metrics_interval", type=int, default=50, help="steps")
    add("--val_share", type=float, default=0.05, help="validation images for a training image")
    add("--tflops", type=float, default=250, help="assumed of a GPU: a quarter of an H100's peak")
    add("--gpus_per_host", type=int, default=8)
    add("--workers", type=int, default=4, help="num_workers of a GPU's process, a core each")
    add("--network_gb_s", type=float, default=50, help="assumed of a host: 400 Gb/s")
    add("--link_gb_s", type=float, default=200, help="assumed between the GPUs of a host")
    add("--disk_gb_s", type=float, default=2, help="assumed of a host: reading")
    add("--data_root", type=Path, help="whose loading is measured; the demo dataset by default")
    add("--steps", type=int, default=8, help="of the runs of the check")
    add("--rounds", type=int, default=3)
    add("--costs", type=Path, help="a file of an earlier run: measures nothing, tables only")
    add("--json", type=Path, help="writes what was measured into this file")
    return parser.parse_args(argv)


def _jobs(args: argparse.Namespace, scratch: Path) -> tuple[Job, Job]:
    # What is forecast, and the small one of the check.
    cache = str(scratch / "cache")
    small = Job(str(scratch / "small"), cache, "vit_tiny", 256, global_batch=4, steps=args.steps)
    write_demo(scratch / "small", num_train=16, num_val=4, size=256)
    root = args.data_root or write_demo(
        scratch / "demo", num_train=12, num_val=4, size=args.image_size
    )
    return replace(small, data_root=str(root), image_size=args.image_size), small


def _measure_and_check(args: argparse.Namespace) -> Costs:
    where = machine(CPU)
    print(f"{where}\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        job, small = _jobs(args, Path(scratch))
        costs, own = measure_costs(job, small, checkpoint_of=args.model_type, rounds=args.rounds)
        print(costs_table(costs) + "\n", flush=True)
        found = check(small, own, rounds=args.rounds)
    print(
        f"One global batch of {small.global_batch} images on 1 and on 2 processes, vit_tiny, "
        f"{small.image_size} px, {small.steps} steps: losses agree to {found.loss_difference:.1e}."
        f"\n\n{check_table(found)}",
        flush=True,
    )
    assert found.loss_difference <= LOSS_TOLERANCE, "one process and two learn differently"
    if args.json:
        figures = {"machine": where, "costs": asdict(costs), "check": asdict(found)}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return costs


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, checks, and prints the tables."""
    args = parse(argv)
    torch.set_num_threads(1)
    if args.costs:
        costs = Costs(**json.loads(args.costs.read_text())["costs"])
        print(costs_table(costs))
    else:
        costs = _measure_and_check(args)
    cluster = Cluster(
        args.tflops,
        args.gpus_per_host,
        args.workers,
        args.network_gb_s,
        args.link_gb_s,
        args.disk_gb_s,
    )
    print(f"\nAssumed, not measured: {cluster}.")
    for mode in args.mode:
        run = Run(
            args.model_type,
            args.image_size,
            mode,
            args.batch_size,
            args.boxes,
            args.metrics_interval,
            args.val_share,
        )
        print(f"\n{run}: {run.state_gb:.2f} GB of a GPU for weights, gradients and optimizer.\n")
        print(forecast_table(run, costs, cluster), flush=True)
    remedies = [f"| {name} | {remedy} |" for name, remedy in REMEDIES.items()]
    print("\n" + table("| bottleneck | remedy |", remedies))


if __name__ == "__main__":
    main()
