"""What is trained of SAM: time and memory of a step with the decoder, last blocks, LoRA, or all.

What is frozen at the start of the image encoder is cached, as in a run: a step begins with the
embeddings, or with the tokens that enter the first trained block. Each choice is measured in a
process of its own, in turn, and keeps freed memory as `samft.train` does.
"""

import argparse
import json
import statistics
from typing import Any

import torch

from benchmarks.measure import (
    count_core_seconds,
    describe_machine,
    now,
    process_peak_gib,
    run_in_fresh_process,
)
from benchmarks.tables import markdown_table
from benchmarks.variants import SyntheticBatch, Workload, random_sam, samft_trainer
from samft.cli import run_command
from samft.models.lora import AdapterSettings, add_adapters
from samft.models.prompted_sam import PromptedSam
from samft.models.trainable import freeze
from samft.runtime.device import freed_memory_kept

DECODER = "decoder"
# By name: the trained blocks; None: all.
LAST_BLOCKS = {DECODER: 0, "last block": 1, "last 3": 3, "last 6": 6, "everything": None}
LORA = "LoRA, rank 8, all blocks"
CHOICES = (*LAST_BLOCKS, LORA)


def build_model(workload: Workload, choice: str) -> PromptedSam:
    """A model with random weights, of which only the choice and the decoder are trained."""
    sam = random_sam(workload, attention="fast")
    num_blocks = LAST_BLOCKS.get(choice, 0)
    freeze(sam, ["image_encoder"] if num_blocks == 0 else [], train_blocks=num_blocks or None)
    if choice == LORA:
        add_adapters(sam, AdapterSettings(rank=8, alpha=8.0, targets=("q", "v")))
    return PromptedSam(sam)


def measure_choice(workload: Workload, choice: str, *, steps: int) -> dict[str, Any]:
    """CPU seconds of steps, peak memory in GiB, and the trained share of the encoder's weights."""
    with freed_memory_kept(workload.device):
        trainer = samft_trainer(build_model(workload, choice))
        shape, generator = trainer.model.frozen_shape, torch.Generator().manual_seed(3)
        cached = None
        if shape is not None:
            cached = torch.randn(workload.num_images, *shape, generator=generator)
            trainer.model.unload_encoder()
        batch = SyntheticBatch(workload).batch(exact=False, embeddings=cached)
        seconds = []
        for _ in range(steps + 1):
            start = now(workload.device)
            trainer.train_step([batch])
            seconds.append(now(workload.device) - start)
    encoder = trainer.model.sam.image_encoder.parameters()
    counts = [(p.numel(), p.requires_grad) for p in encoder]
    trained = sum(count for count, is_trained in counts if is_trained)
    return {
        "seconds": seconds[1:],
        "peak": process_peak_gib(workload.device),
        "trained": trained / sum(count for count, _ in counts),
    }


def _measure_in_turn(options: argparse.Namespace) -> list[str]:
    # The rows of the table: the choices one after the other, `--rounds` times.
    results: dict[tuple[int, str], list[dict[str, Any] | None]] = {}
    for _ in range(options.rounds):
        for boxes in options.boxes:
            for choice in options.choices:
                arguments = ["--only", choice, "--model_type", options.model_type]
                arguments += ["--image_size", str(options.image_size), "--boxes", str(boxes)]
                result = run_in_fresh_process("benchmarks.trained_parts", *arguments)
                results.setdefault((boxes, choice), []).append(result)
    rows = []
    for (boxes, choice), measured in results.items():
        whole = [one for one in measured if one is not None]
        if not whole:
            rows.append(f"| {boxes} | {choice} | out of memory | | | |")
            continue
        seconds = statistics.median(s for one in whole for s in one["seconds"])
        decoder = [one for one in results.get((boxes, DECODER), []) if one is not None]
        base = statistics.median(s for one in decoder for s in one["seconds"]) if decoder else None
        ratio = "" if base is None else f"{seconds / base:.2f}"
        peak, trained = max(one["peak"] for one in whole), whole[0]["trained"]
        rows.append(
            f"| {boxes} | {choice} | {100 * trained:.1f} % | {seconds:.2f} | {ratio} | {peak:.2f} |"
        )
    return rows


def main(argv: list[str]) -> None:
    """Prints the table; with `--only`, the figures of one choice as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_type", default="vit_b")
    parser.add_argument("--image_size", type=int, default=1024)
    parser.add_argument("--boxes", type=int, nargs="+", default=[8], help="of the image of a step")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=CHOICES, metavar="CHOICE")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each choice")
    parser.add_argument("--only", choices=CHOICES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    count_core_seconds()
    device = torch.device("cpu")
    if options.only:
        shape = (options.model_type, options.image_size, 1, options.boxes[0])
        workload = Workload(*shape, frozen=False, device=device)
        print(json.dumps(measure_choice(workload, options.only, steps=2)))
        return
    print(describe_machine(device), "\n")
    head = (
        f"| boxes | trained, {options.model_type}, {options.image_size} px "
        "| of the encoder's weights | CPU s a step | of the decoder's | peak GiB |"
    )
    print(markdown_table(head, _measure_in_turn(options)))


if __name__ == "__main__":
    run_command(main)
