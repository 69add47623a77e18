"""Compares `samft.predict` with a loop over `SamPredictor`, one call per box.

    python -m benchmarks.predict [--image_size 256] [--images 500] [--boxes 20]

The command (from indexing the annotation file to writing results.json) and the
loop (read the image, `set_image`, `predict` for each box; it writes nothing)
take turns on parts of the images, and their masks are compared. CPU seconds of
the process are measured beside wall-clock seconds: they vary less on a machine
with other load, but do not show what parallel work saves. The memory of the
command is measured in fresh processes, with a fifth of the images and with all.
"""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)

# isort: split
import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from segment_anything import SamPredictor

from benchmarks.measure import describe_machine, process_peak_gib, run_in_fresh_process
from benchmarks.tables import format_speedups, markdown_table
from samft import predict
from samft.models.sam import build_sam, load_sam, load_state, read_state
from samft.weights.download import PACKAGED_TINY

SIZE = (480, 640)  # H, W of the images
_NUM_DISTINCT = 10  # images; the others are links to them
_MIN_AGREEMENT = 0.999  # share of equal pixels over the masks of an image
_ANNOTATIONS = "_annotations.coco.json"


def write_images(folder: Path, *, num_images: int, num_boxes: int, first: int, seed: int) -> None:
    """Writes JPEGs of ellipses on noise, and a COCO file with their boxes and no masks.

    Args:
        folder: Created here.
        num_images: Number of images.
        num_boxes: Boxes per image.
        first: Id of the first image.
        seed: Seed of images and boxes.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    pictures = [_draw_image(generator, num_boxes) for _ in range(min(_NUM_DISTINCT, num_images))]
    for k in range(num_images):
        picture, boxes = pictures[k % len(pictures)]
        name = f"{k:05}.jpg"
        if k < len(pictures):
            cv2.imwrite(str(folder / name), picture)
        else:
            os.link(folder / f"{k % len(pictures):05}.jpg", folder / name)
        image_id = first + k
        images.append({"id": image_id, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        for box in boxes:
            entry = {"image_id": image_id, "category_id": 1, "iscrowd": 0, "bbox": box}
            annotations.append({"id": len(annotations) + 1, **entry})
    document = {"images": images, "annotations": annotations}
    document["categories"] = [{"id": 1, "name": "ellipse"}]
    (folder / _ANNOTATIONS).write_text(json.dumps(document))


def _draw_image(
    generator: np.random.Generator, num_boxes: int
) -> tuple[NDArray[np.uint8], list[list[float]]]:
    height, width = SIZE
    noise = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) // 2
    boxes = []
    for _ in range(num_boxes):
        half = generator.integers(8, 60, 2)
        centre = generator.integers(half + 1, np.array([width, height]) - half - 1)
        colour = generator.integers(100, 256, 3).tolist()
        cv2.ellipse(picture, centre.tolist(), half.tolist(), 0, 0, 360, colour, cv2.FILLED)
        boxes.append([*map(float, centre - half), *map(float, 2 * half)])
    return np.asarray(picture, dtype=np.uint8), boxes


def write_checkpoint(path: Path, image_size: int) -> Path:
    """Writes the packaged weights as a checkpoint of an image size."""
    sam = build_sam("vit_tiny", image_size)
    load_state(sam, read_state(PACKAGED_TINY))
    torch.save(sam.state_dict(), path)
    return path


def run_samft(checkpoint: Path, folder: Path, output: Path) -> None:
    """Runs `samft.predict` in this process, without its output."""
    flags = ["--checkpoint", checkpoint, "--images", folder, "--annotations"]
    flags += [folder / _ANNOTATIONS, "--output_dir", output]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        predict.main([str(flag) for flag in flags])


def read_clocks() -> NDArray[np.float64]:
    """Wall-clock seconds, and CPU seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def run_sam_predictor(
    predictor: SamPredictor, folder: Path
) -> tuple[NDArray[np.float64], dict[int, list[Any]]]:
    """Runs the loop over `SamPredictor`.

    Returns:
        Seconds of both clocks, and the masks of each image as RLE; encoding them is not timed.
    """
    document = json.loads((folder / _ANNOTATIONS).read_text())
    boxes: dict[int, list[list[float]]] = {}
    for entry in document["annotations"]:
        x, y, width, height = entry["bbox"]
        boxes.setdefault(entry["image_id"], []).append([x, y, x + width, y + height])
    seconds, masks_of = np.zeros(2), {}
    for image in document["images"]:
        start = read_clocks()
        pixels: Any = cv2.imread(str(folder / image["file_name"]))
        predictor.set_image(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
        masks = [
            predictor.predict(box=np.array(box), multimask_output=False)[0][0]
            for box in boxes[image["id"]]
        ]
        seconds += read_clocks() - start
        masks_of[image["id"]] = [mask_utils.encode(np.asfortranarray(mask)) for mask in masks]
    return seconds, masks_of


def lowest_agreement(results: Path, expected: dict[int, list[Any]]) -> float:
    """The share of equal mask pixels in the image where it is lowest.

    Args:
        results: A results.json of `samft.predict`.
        expected: Masks of each image as RLE, by image id.

    Raises:
        ValueError: The share is too low, or the numbers of masks differ.
    """
    masks_of: dict[int, list[Any]] = {}
    for row in json.loads(results.read_text()):
        masks_of.setdefault(row["image_id"], []).append(row["segmentation"])
    counts, expected_counts = (
        {image_id: len(rles) for image_id, rles in masks.items()} for masks in (masks_of, expected)
    )
    if counts != expected_counts:
        raise ValueError("the numbers of masks differ")
    shares = [
        float((mask_utils.decode(masks_of[image_id]) == mask_utils.decode(rles)).mean())
        for image_id, rles in expected.items()
    ]
    if min(shares) < _MIN_AGREEMENT:
        raise ValueError(f"the masks of an image agree on only {min(shares):.5f} of its pixels")
    return min(shares)


def measure_speed(folder: Path, args: argparse.Namespace) -> str:
    """A table of the speed of both."""
    checkpoint = write_checkpoint(folder / "tiny.pth", args.image_size)
    stock = SamPredictor(load_sam(checkpoint))
    seconds: dict[str, list[NDArray[np.float64]]] = {"stock": [], "samft": []}
    shares = []
    size = args.images // args.parts
    # The first part is short, warms up, and is not counted.
    for part, num_images in enumerate([2] + [size] * args.parts):
        images, output = folder / f"part{part}", folder / f"out{part}"
        options = {"num_boxes": args.boxes, "first": part * size + 1, "seed": part}
        write_images(images, num_images=num_images, **options)
        start = read_clocks()
        run_samft(checkpoint, images, output)
        samft_seconds = read_clocks() - start
        stock_seconds, masks_of = run_sam_predictor(stock, images)
        if part:
            seconds["samft"].append(samft_seconds)
            seconds["stock"].append(stock_seconds)
            shares.append(lowest_agreement(output / predict.RESULTS, masks_of))
    total = size * args.parts
    rows, whole = [], []
    for number, clock in enumerate(("wall clock", "CPU seconds")):
        times_of = {name: [part[number] for part in parts] for name, parts in seconds.items()}
        whole.append(f"{sum(times_of['stock']) / sum(times_of['samft']):.2f} ({clock})")
        rows += [
            f"| {clock} | {name} | {sum(times):.1f} | {total / sum(times):.2f} "
            f"| {total * args.boxes / sum(times):.0f} "
            f"| {format_speedups(times_of['stock'], times)} |"
            for name, times in times_of.items()
        ]
    head = "| clock | | s | images/s | masks/s | faster by, parts |"
    return (
        f"{total} images x {args.boxes} boxes at {args.image_size} px, in {args.parts} parts: "
        f"{' and '.join(whole)} times as fast. Equal mask pixels, worst image: "
        f"{min(shares):.6f}.\n\n{markdown_table(head, rows)}"
    )


def measure_memory(args: argparse.Namespace) -> str:
    """A table of peak memory by number of images."""
    rows = []
    for count in (args.images // 5, args.images):
        arguments = ["--peak_of", count, "--boxes", args.boxes, "--image_size", args.image_size]
        if args.threads:
            arguments += ["--threads", args.threads]
        result = run_in_fresh_process("benchmarks.predict", *map(str, arguments))
        if result is None:
            raise MemoryError(f"out of memory with {count} images")
        rows.append(f"| {count} | {result['gib'] * 1024:.0f} |")
    return markdown_table("| images | peak RSS, MiB |", rows)


def _print_peak(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "tiny.pth", args.image_size)
        images, count = folder / "images", args.peak_of
        write_images(images, num_images=count, num_boxes=args.boxes, first=1, seed=0)
        run_samft(checkpoint, images, folder / "out")
        print(json.dumps({"gib": process_peak_gib(torch.device("cpu"))}))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures speed and memory, and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--image_size", type=int, default=256)
    add("--images", type=int, default=500)
    add("--boxes", type=int, default=20)
    add("--parts", type=int, default=5, help="number of parts in which both take turns")
    add("--threads", type=int, default=None, help="CPU threads; default: torch's choice")
    add("--no_memory", action="store_true", help="speed only")
    add("--no_speed", action="store_true", help="memory only")
    add(
        "--peak_of", type=int, help=argparse.SUPPRESS
    )  # run in a fresh process by `run_in_fresh_process`
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        _print_peak(args)
        return
    print(describe_machine(torch.device("cpu")), flush=True)
    if not args.no_speed:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n{measure_speed(Path(folder), args)}", flush=True)
    if not args.no_memory:
        print(f"\n{measure_memory(args)}", flush=True)


if __name__ == "__main__":
    main()
