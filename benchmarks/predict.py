"""Measures `samft.predict` beside a loop over stock `SamPredictor` with one `predict` a box.

    python -m benchmarks.predict [--image_size 256] [--images 500] [--boxes 20]

The command, from the index of the annotation file to results.json in place, and the loop (read the
image, `set_image`, `predict` for each box; it writes nothing) take turns on parts of the images.
Their masks are held equal. Beside the wall clock stand core seconds, for which the process had a
core: where other work comes and goes they are steadier, but they know nothing of work side by side.
The memory of the command is measured in fresh processes, with a fifth of the images and with all.
"""

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

from benchmarks.measure import in_fresh_process, machine, peak_memory, ratios, table
from samft import predict
from samft.models.sam import build_sam, load_sam, load_state, read_state
from samft.models.weights import PACKAGED_TINY

SIZE = (480, 640)  # H, W of the images
_DIFFERENT = 10  # images; the others are links to them
_LEAST_EQUAL = 0.999  # of an image's pixels, over its masks
_ANNOTATIONS = "_annotations.coco.json"


def write_images(folder: Path, *, num_images: int, num_boxes: int, first: int, seed: int) -> None:
    """Writes JPEGs of ellipses on noise, and a COCO file with their boxes and no masks.

    Args:
        folder: Is made.
        num_images: How many.
        num_boxes: Of each.
        first: The id of the first image.
        seed: Of everything random.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    pictures = [_draw(generator, num_boxes) for _ in range(min(_DIFFERENT, num_images))]
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


def _draw(
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


def run_command(checkpoint: Path, folder: Path, output: Path) -> None:
    """`samft.predict` in this process, without what it says."""
    words = ["--checkpoint", checkpoint, "--images", folder, "--annotations"]
    words += [folder / _ANNOTATIONS, "--output_dir", output]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        predict.main([str(word) for word in words])


def clocks() -> NDArray[np.float64]:
    """Seconds of the wall clock, and core seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def run_loop(
    predictor: SamPredictor, folder: Path
) -> tuple[NDArray[np.float64], dict[int, list[Any]]]:
    """The loop over stock.

    Returns:
        What it took of each of the `clocks`; and the masks of each image as RLE, which is not a
        part of that.
    """
    document = json.loads((folder / _ANNOTATIONS).read_text())
    boxes: dict[int, list[list[float]]] = {}
    for entry in document["annotations"]:
        x, y, width, height = entry["bbox"]
        boxes.setdefault(entry["image_id"], []).append([x, y, x + width, y + height])
    seconds, found = np.zeros(2), {}
    for image in document["images"]:
        start = clocks()
        read: Any = cv2.imread(str(folder / image["file_name"]))
        predictor.set_image(cv2.cvtColor(read, cv2.COLOR_BGR2RGB))
        masks = [
            predictor.predict(box=np.array(box), multimask_output=False)[0][0]
            for box in boxes[image["id"]]
        ]
        seconds += clocks() - start
        found[image["id"]] = [mask_utils.encode(np.asfortranarray(mask)) for mask in masks]
    return seconds, found


def least_equal(results: Path, found: dict[int, list[Any]]) -> float:
    """The share of pixels on which both agree, of the image where it is lowest.

    Raises:
        ValueError: It is too low, or they have not the same masks.
    """
    ours: dict[int, list[Any]] = {}
    for row in json.loads(results.read_text()):
        ours.setdefault(row["image_id"], []).append(row["segmentation"])
    if {key: len(own) for key, own in ours.items()} != {key: len(o) for key, o in found.items()}:
        raise ValueError("not the same masks")
    shares = [
        float((mask_utils.decode(ours[key]) == mask_utils.decode(found[key])).mean())
        for key in found
    ]
    if min(shares) < _LEAST_EQUAL:
        raise ValueError(f"the masks of an image agree on {min(shares):.5f} of its pixels only")
    return min(shares)


def measure_speed(folder: Path, args: argparse.Namespace) -> str:
    """A table of both, part after part."""
    checkpoint = write_checkpoint(folder / "tiny.pth", args.image_size)
    stock = SamPredictor(load_sam(checkpoint))
    seconds: dict[str, list[NDArray[np.float64]]] = {"stock": [], "samft": []}
    shares = []
    size = args.images // args.parts
    # The first part is a short one to warm up, and does not count.
    for part, num_images in enumerate([2] + [size] * args.parts):
        images, output = folder / f"part{part}", folder / f"out{part}"
        options = {"num_boxes": args.boxes, "first": part * size + 1, "seed": part}
        write_images(images, num_images=num_images, **options)
        start = clocks()
        run_command(checkpoint, images, output)
        own = clocks() - start
        other, found = run_loop(stock, images)
        if part:
            seconds["samft"].append(own)
            seconds["stock"].append(other)
            shares.append(least_equal(output / predict.RESULTS, found))
    total = size * args.parts
    rows, whole = [], []
    for number, clock in enumerate(("wall clock", "core seconds")):
        stock_own, samft_own = ([one[number] for one in seconds[name]] for name in seconds)
        whole.append(f"{sum(stock_own) / sum(samft_own):.2f} ({clock})")
        rows += [
            f"| {clock} | {name} | {sum(own):.1f} | {total / sum(own):.2f} "
            f"| {total * args.boxes / sum(own):.0f} | {ratios(stock_own, own)} |"
            for name, own in (("stock", stock_own), ("samft", samft_own))
        ]
    head = "| clock | | s | images/s | masks/s | faster by, parts |"
    return (
        f"{total} images x {args.boxes} boxes at {args.image_size} px, in {args.parts} parts: "
        f"{' and '.join(whole)} times as fast. Pixels on which masks agree, worst image: "
        f"{min(shares):.6f}.\n\n{table(head, rows)}"
    )


def measure_memory(args: argparse.Namespace) -> str:
    """A table of peak memory by number of images."""
    rows = []
    for count in (args.images // 5, args.images):
        words = ["--peak_of", count, "--boxes", args.boxes, "--image_size", args.image_size]
        if args.threads:
            words += ["--threads", args.threads]
        found = in_fresh_process("benchmarks.predict", *map(str, words))
        if found is None:
            raise MemoryError(f"{count} images")
        rows.append(f"| {count} | {found['gib'] * 1024:.0f} |")
    return table("| images | peak RSS, MiB |", rows)


def _print_peak(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "tiny.pth", args.image_size)
        images, count = folder / "images", args.peak_of
        write_images(images, num_images=count, num_boxes=args.boxes, first=1, seed=0)
        run_command(checkpoint, images, folder / "out")
        print(json.dumps({"gib": peak_memory(torch.device("cpu"))}))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--image_size", type=int, default=256)
    add("--images", type=int, default=500)
    add("--boxes", type=int, default=20)
    add("--parts", type=int, default=5, help="in which the two take turns")
    add("--threads", type=int, default=None, help="of the CPU; torch's own choice by default")
    add("--no_memory", action="store_true", help="speed only")
    add("--no_speed", action="store_true", help="memory only")
    add("--peak_of", type=int, help=argparse.SUPPRESS)  # how a fresh process is asked
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        _print_peak(args)
        return
    print(machine(torch.device("cpu")), flush=True)
    if not args.no_speed:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n{measure_speed(Path(folder), args)}", flush=True)
    if not args.no_memory:
        print(f"\n{measure_memory(args)}", flush=True)


if __name__ == "__main__":
    main()
