"""Compares samft's training step with a baseline: how public tools train SAM.

    python -m benchmarks.train_step [--device cuda] [--model_type vit_b]
    python -m benchmarks.train_step --quick

Before anything is timed, weights, loss and gradients of samft with its exact
options in float32 are checked to equal the baseline's. Every round then takes a
step of each variant in turn, so that other load on the machine affects all
alike; a second row of the baseline shows how much of a speedup is noise.
`cached` is compared with the baseline, which encodes every image at every step.
Benchmarks:

    step        a training step, its batch on the device; peak memory
    end-to-end  epochs, loader included
    decoder     forward and backward of decoder and loss, 4 images
    encoder     the encoder's forward pass, also at 256 px
    boxes       memory of a step with 16 and with 256 boxes
    clicks      steps with rounds of corrections: time, memory, and a loop over stock's decoder
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.end_to_end import measure_epochs
from benchmarks.measure import (
    AGAIN,
    MeasureOptions,
    count_core_seconds,
    describe_machine,
    peak_flops,
)
from benchmarks.step_benchmarks import (
    BenchmarkResult,
    choose_variants,
    measure_boxes,
    measure_clicks,
    measure_decoder,
    measure_encoder,
    measure_peak,
    measure_steps,
)
from benchmarks.variants import Variants, Workload, assert_equal

MODES = ("frozen", "full", "cached")
BENCHMARKS = ("step", "end-to-end", "decoder", "encoder", "boxes", "clicks")
_QUICK = ["--model_type", "vit_tiny", "--image_size", "64", "--boxes", "2", "--rounds", "1"]
_QUICK += ["--epoch_images", "2", "--memory_gib", "4", "--threads", "1", "--warm_up", "0"]
_DECODER_IMAGES = 4
_SMALL_SIZE = 256  # px, where windows are mostly padding


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; `--quick` changes the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--model_type", default="vit_b")
    add("--image_size", type=int, default=1024)
    for name, choices in (("--modes", MODES), ("--benchmarks", BENCHMARKS)):
        text = f"{', '.join(choices)}; default all"
        add(name, nargs="+", default=list(choices), choices=choices, metavar="NAME", help=text)
    add("--images", type=int, default=1, help="per batch")
    add("--boxes", type=int, default=8, help="per image")
    add("--rounds", type=int, default=5)
    add(
        "--warm_up",
        type=int,
        default=None,
        help="rounds before the timed ones; default 3 on a GPU, else 1",
    )
    add("--threads", type=int, default=None, help="CPU threads; default: torch's choice")
    add(
        "--memory_gib",
        type=float,
        default=16,
        help="limit of a process whose CPU memory is measured; 0: do not measure memory",
    )
    add(
        "--core_seconds",
        action="store_true",
        help="count CPU seconds, for a busy machine; not for end-to-end",
    )
    add("--data_root", type=Path, help="dataset of end-to-end; default: the demo dataset")
    add("--split", default="train")
    add("--epochs", type=int, default=2)
    add("--epoch_images", type=int, default=8)
    add("--num_workers", type=int, default=1, help="of samft's loader; the baseline has none")
    add("--augment", default="none", help="of samft in end-to-end; the baseline has none")
    add("--no_again", action="store_true", help="end-to-end: leave out the second baseline row")
    add(
        "--quick", action="store_true", help="vit_tiny at 64 px, a few seconds: checks that it runs"
    )
    add("--json", type=Path, help="write all numbers to this file")
    add("--peak_of", help=argparse.SUPPRESS)  # run in a fresh process by `run_in_fresh_process`
    arguments = list(argv) if argv is not None else None
    args = parser.parse_args(arguments)
    if args.quick:
        args = parser.parse_args(arguments, parser.parse_args(_QUICK))
    if args.warm_up is None:
        args.warm_up = 3 if args.device == "cuda" else 1
    if args.core_seconds and (args.device == "cuda" or "end-to-end" in args.benchmarks):
        parser.error("--core_seconds: neither for a GPU nor for end-to-end.")
    return args


def run_benchmarks(args: argparse.Namespace) -> Iterator[tuple[str, BenchmarkResult]]:
    """Yields the name and the result of each benchmark that was asked for."""
    device = torch.device(args.device)
    options = MeasureOptions(args.rounds, args.warm_up, args.memory_gib)
    workload = _workload(args, frozen=True)
    workloads = [workload] if {"frozen", "cached"} & set(args.modes) else []
    workloads += [replace(workload, frozen=False)] if "full" in args.modes else []
    if "step" in args.benchmarks:
        peak = peak_flops(device)
        yield (
            "peak",
            BenchmarkResult(f"Peak: {peak[0] / 1e12:.3g} TFLOP/s ({peak[1]}).", {"flops": peak[0]}),
        )
        for each in workloads:
            names = choose_variants(each, args.modes)
            yield "step", measure_steps(each, names, options=options, peak=peak)
    if "end-to-end" in args.benchmarks:
        for each in workloads:
            yield "end-to-end", _measure_end_to_end(args, each, options=options)
    if "decoder" in args.benchmarks:
        several = replace(workload, num_images=_DECODER_IMAGES)
        yield "decoder", measure_decoder(several, options=options)
    if "encoder" in args.benchmarks:
        for size in sorted({min(_SMALL_SIZE, workload.image_size), workload.image_size}):
            sized = replace(workload, image_size=size)
            yield "encoder", measure_encoder(sized, options=options)
    if "boxes" in args.benchmarks:
        yield "boxes", measure_boxes(workload, options=options)
    if "clicks" in args.benchmarks:
        yield "clicks", measure_clicks(workload, options=options)


def _workload(args: argparse.Namespace, *, frozen: bool) -> Workload:
    device = torch.device(args.device)
    return Workload(args.model_type, args.image_size, args.images, args.boxes, frozen, device)


def _measure_end_to_end(
    args: argparse.Namespace, workload: Workload, *, options: MeasureOptions
) -> BenchmarkResult:
    variants = Variants(workload)
    names = [*choose_variants(workload, args.modes), *([] if args.no_again else [AGAIN])]
    assert_equal(variants, start="images")
    return measure_epochs(
        variants,
        data_root=args.data_root,
        split=args.split,
        num_images=args.epoch_images,
        epochs=args.epochs,
        num_workers=args.num_workers,
        augment=args.augment,
        names=names,
        options=options,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmarks, and prints each table when it is complete."""
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        workload = _workload(args, frozen="frozen" in args.modes)
        options = {"benchmark": args.benchmarks[0], "memory_gib": args.memory_gib}
        print(json.dumps(measure_peak(workload, args.peak_of, **options)))
        return
    if args.core_seconds:
        count_core_seconds()
    machine = describe_machine(torch.device(args.device))
    clock = "CPU seconds" if args.core_seconds else "wall clock"
    print(f"{machine}; {args.rounds} round(s), {clock}.", flush=True)
    figures: list[dict[str, object]] = []
    for name, result in run_benchmarks(args):
        print(f"\n{result.text}", flush=True)
        figures.append({"benchmark": name, **result.figures})
    if args.json:
        document = {"machine": machine, "arguments": vars(args), "results": figures}
        args.json.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
