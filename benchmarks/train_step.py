"""Measures samft's training step beside the plain recipe of public SAM fine-tuners, in one run.

    python -m benchmarks.train_step [--device cuda] [--model_type vit_b] [--json FILE]
    python -m benchmarks.train_step --quick

Before anything is timed, weights, loss and gradients are held equal, with samft's exact options in
float32. Then all dresses take turns in every round, so that what else the machine does hits all of
them; a second row of the plain recipe shows how much of a ratio is noise. `cached` is compared with
the plain recipe that encodes every image at every step. Scopes:

    step        a training step, its batch on the device; frozen and full; peak memory
    end-to-end  epochs with the loader
    decoder     decoder and loss, forward and backward, 4 images
    encoder     the encoder's forward pass, also at 256 px
    boxes       memory of a step with 16 and with 256 boxes
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.end_to_end import measure_epochs
from benchmarks.measure import AGAIN, Effort, count_core_seconds, machine, peak_flops
from benchmarks.scopes import (
    Result,
    dresses_of,
    measure_boxes,
    measure_decoder,
    measure_encoder,
    measure_peak,
    measure_steps,
)
from benchmarks.variants import Setting, Variants, assert_equal

MODES = ("frozen", "full", "cached")
SCOPES = ("step", "end-to-end", "decoder", "encoder", "boxes")
_QUICK = ["--model_type", "vit_tiny", "--image_size", "64", "--boxes", "2", "--rounds", "1"]
_QUICK += ["--epoch_images", "2", "--memory_gib", "4", "--threads", "1", "--warm_up", "0"]
_DECODER_IMAGES = 4
_SMALL_SIZE = 256  # px, where windows are mostly padding


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `--quick` gives other defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--model_type", default="vit_b")
    add("--image_size", type=int, default=1024)
    add("--modes", nargs="+", default=list(MODES), choices=MODES)
    add("--scopes", nargs="+", default=list(SCOPES), choices=SCOPES)
    add("--images", type=int, default=1, help="in a batch")
    add("--boxes", type=int, default=8, help="of each image")
    add("--rounds", type=int, default=5)
    add("--warm_up", type=int, default=None, help="rounds that do not count; 3 on a GPU, else 1")
    add("--threads", type=int, default=None, help="of the CPU; torch's own choice by default")
    add(
        "--memory_gib",
        type=float,
        default=16,
        help="limit of a process measured on the CPU; 0: skip",
    )
    add("--core_seconds", action="store_true", help="of a busy CPU; not for end-to-end")
    add("--data_root", type=Path, help="of the end-to-end scope; the demo dataset by default")
    add("--split", default="train")
    add("--epochs", type=int, default=2)
    add("--epoch_images", type=int, default=8)
    add("--num_workers", type=int, default=1, help="of samft's loader; the plain one has none")
    add("--augment", default="none", help="of samft's end-to-end runs; the plain recipe has none")
    add("--no_again", action="store_true", help="end-to-end without the row that shows the noise")
    add("--quick", action="store_true", help="vit_tiny, 64 px, a few seconds: does it run?")
    add("--json", type=Path, help="writes all figures into this file")
    add("--peak_of", help=argparse.SUPPRESS)  # how a fresh process is asked for its memory
    words = list(argv) if argv is not None else None
    args = parser.parse_args(words)
    if args.quick:
        args = parser.parse_args(words, parser.parse_args(_QUICK))
    if args.warm_up is None:
        args.warm_up = 3 if args.device == "cuda" else 1
    if args.core_seconds and (args.device == "cuda" or "end-to-end" in args.scopes):
        parser.error("--core_seconds: neither for a GPU nor for the end-to-end scope.")
    return args


def measure(args: argparse.Namespace) -> Iterator[tuple[str, Result]]:
    """Every scope that was asked for, one result at a time."""
    device = torch.device(args.device)
    effort = Effort(args.rounds, args.warm_up, args.memory_gib)
    setting = _setting(args, frozen=True)
    settings = [replace(setting, frozen=True)] * bool({"frozen", "cached"} & set(args.modes))
    settings += [replace(setting, frozen=False)] * ("full" in args.modes)
    if "step" in args.scopes:
        peak = peak_flops(device)
        yield "peak", Result(f"Peak: {peak[0] / 1e12:.3g} TFLOP/s ({peak[1]}).", {"flops": peak[0]})
        for own in settings:
            names = dresses_of(own, args.modes)
            yield "step", measure_steps(own, names, effort=effort, peak=peak)
    if "end-to-end" in args.scopes:
        for own in settings:
            yield "end-to-end", _end_to_end(args, own, effort=effort)
    if "decoder" in args.scopes:
        several = replace(setting, num_images=_DECODER_IMAGES)
        yield "decoder", measure_decoder(several, effort=effort)
    if "encoder" in args.scopes:
        for size in sorted({min(_SMALL_SIZE, setting.image_size), setting.image_size}):
            own = replace(setting, image_size=size)
            yield "encoder", measure_encoder(own, effort=effort)
    if "boxes" in args.scopes:
        yield "boxes", measure_boxes(setting, effort=effort)


def _setting(args: argparse.Namespace, *, frozen: bool) -> Setting:
    device = torch.device(args.device)
    return Setting(args.model_type, args.image_size, args.images, args.boxes, frozen, device)


def _end_to_end(args: argparse.Namespace, setting: Setting, *, effort: Effort) -> Result:
    wardrobe = Variants(setting)
    names = [*dresses_of(setting, args.modes), *([] if args.no_again else [AGAIN])]
    assert_equal(wardrobe, start="images")
    return measure_epochs(
        wardrobe,
        data_root=args.data_root,
        split=args.split,
        num_images=args.epoch_images,
        epochs=args.epochs,
        num_workers=args.num_workers,
        augment=args.augment,
        names=names,
        effort=effort,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the tables as they come."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        setting = _setting(args, frozen="frozen" in args.modes)
        options = {"scope": args.scopes[0], "memory_gib": args.memory_gib}
        print(json.dumps(measure_peak(setting, args.peak_of, **options)))
        return
    if args.core_seconds:
        count_core_seconds()
    where = machine(torch.device(args.device))
    clock = "seconds of cores" if args.core_seconds else "wall clock"
    print(f"{where}; {args.rounds} round(s), {clock}.", flush=True)
    figures: list[dict[str, object]] = []
    for scope, result in measure(args):
        print(f"\n{result.text}", flush=True)
        figures.append({"scope": scope, **result.figures})
    if args.json:
        document = {"machine": where, "arguments": vars(args), "results": figures}
        args.json.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
