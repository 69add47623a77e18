"""Compares an image size that is not square with the padded square around it.

    python -m benchmarks.rectangle [--model_type vit_b] [--image_size 1024x768] [--parts PART ...]

Parts: `encoder` is a forward pass without gradients, `step` a forward and backward pass of all with
losses, `decoder` the same with a frozen encoder whose embeddings are known. Both models have the
same weights, and see the same image, boxes and targets. Seconds are of the CPU cores that the
process used, square and rectangle in turn; peaks of memory are of fresh processes.
"""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)

# isort: split
import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.measure import (
    MeasureOptions,
    count_core_seconds,
    describe_machine,
    process_peak_gib,
    run_in_fresh_process,
    time_interleaved,
)
from benchmarks.tables import markdown_table
from samft.cli import parse_image_size
from samft.data.targets import WINDOW_CELLS, make_windows
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam, load_state
from samft.training.losses import mask_losses

PARTS = ("encoder", "decoder", "step")
CPU = torch.device("cpu")


def make_part(
    model_type: str, image_size: int | str, part: str, *, boxes: int
) -> Callable[[], None]:
    """A part of a training step on one image, with the weights and boxes of any other size.

    Args:
        model_type: See `build_sam`.
        image_size: See `build_sam`. The image is as large as this.
        part: One of `PARTS`.
        boxes: Objects of the image, within the upper left half of its shorter side.
    """
    torch.manual_seed(0)
    size = parse_image_size(image_size)
    sam = build_sam(model_type, image_size, attention="fast")
    square = build_sam(model_type, max(size))
    load_state(sam, square.state_dict())
    sam.image_encoder.requires_grad_(part == "step")
    model, generator = PromptedSam(sam), np.random.default_rng(0)
    corners = generator.uniform(0, min(size) / 4, (boxes, 2))
    corners = np.concatenate([corners, corners + min(size) / 8], 1)
    inputs = torch.zeros(1, 3, *size, dtype=torch.uint8), torch.from_numpy(corners).float()
    embeddings = torch.zeros(1, *model.embedding_shape) if part == "decoder" else None

    def encode() -> None:
        with torch.no_grad():
            model.embed(inputs[0], torch.tensor([size]))

    def take_step() -> None:
        total, _ = model(
            *inputs,
            torch.zeros(boxes, dtype=torch.int64),
            input_sizes=torch.tensor([size]),
            embeddings=embeddings,
            loss=mask_losses,
            targets=torch.full((boxes, WINDOW_CELLS, WINDOW_CELLS), 255, dtype=torch.uint8),
            windows=torch.from_numpy(make_windows(corners)).float(),
        )
        total.backward()
        model.zero_grad(set_to_none=True)

    return encode if part == "encoder" else take_step


def measure_peak(options: argparse.Namespace, image_size: int | str, part: str) -> float:
    """GiB that a fresh process holds at most for the part."""
    size = ("--model_type", options.model_type, "--image_size", str(image_size))
    flags = ("--boxes", str(options.boxes), "--parts", part, "--peak_alone")
    measured = run_in_fresh_process("benchmarks.rectangle", *size, *flags)
    assert measured is not None
    return float(measured["peak_gib"])


def compare_sizes(options: argparse.Namespace) -> str:
    """The table of all parts: the square, the rectangle, and how much less that is."""
    sizes = (max(parse_image_size(options.image_size)), options.image_size)
    rows = []
    for part in options.parts:
        make = partial(make_part, options.model_type, part=part, boxes=options.boxes)
        steps = {str(size): make(size) for size in sizes}
        measuring = MeasureOptions(options.rounds, warm_up=options.warm_up)
        taken = time_interleaved(steps, options=measuring, device=CPU)
        square, rectangle = (float(np.median(taken[str(size)])) for size in sizes)
        whole, saved = (measure_peak(options, size, part) for size in sizes)
        rows.append(
            f"| {part} | {square:.2f} s | {rectangle:.2f} s | {rectangle / square:.2f} "
            f"| {whole:.2f} GiB | {saved:.2f} GiB | {saved / whole:.2f} |"
        )
    head = "| part | {0} | {1} | ratio | {0} | {1} | ratio |".format(*sizes)
    return markdown_table(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_type", default="vit_b")
    parser.add_argument("--image_size", default="1024x768")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--boxes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm_up", type=int, default=1)
    parser.add_argument("--peak_alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peak_alone:
        make_part(options.model_type, options.image_size, options.parts[0], boxes=options.boxes)()
        print(json.dumps({"peak_gib": process_peak_gib(CPU)}))
        return
    count_core_seconds()
    print(f"{options.model_type}, {options.boxes} boxes; {describe_machine(CPU)}\n")
    print(compare_sizes(options))


if __name__ == "__main__":
    main()
