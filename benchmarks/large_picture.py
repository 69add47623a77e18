"""Predicts on one very large picture, and on its windows as pictures of their own.

    python -m benchmarks.large_picture [--side 20000] [--objects 5000] [--output_dir DIR]

The picture is a tiled TIFF of discs of 8 to 40 px on noise, every tenth disc on a
seam of the windows. `samft predict` gets the boxes. Measured in a fresh process
each: seconds and peak memory of the command on the picture, and on a folder of
the same windows, each a TIFF of its own. Both must give the same masks, each
object once.
"""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)

# isort: split
import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
import torch
from numpy.typing import NDArray

from benchmarks.measure import describe_machine, process_peak_gib, run_in_fresh_process
from benchmarks.predict import read_clocks
from benchmarks.tables import markdown_table
from samft import predict
from samft.annotations.segmentation import decode_encoded, encode_cropped
from samft.runtime.files import write_json
from samft.views.mapping import boxes_to_window
from samft.views.regions import open_source
from samft.views.windows import View, WindowObjects, view_objects
from samft.weights.download import PACKAGED_TINY

TIFF_TILE = 256  # px
_DIAMETERS = (8, 40)  # px
_ON_SEAM = 10  # every so many discs
_PICTURE, _ANNOTATIONS = "picture.tif", "picture.json"
_PART = "annotation_id"


def draw_discs(side: int, number: int, view: View, *, seed: int = 0) -> NDArray[np.float64]:
    """Boxes of discs that do not touch, float64 [K, 4], every tenth across the end of a window.

    Args:
        side: Of the picture, px.
        number: K.
        view: Its tiles.
        seed: Of places and sizes.
    """
    rng = np.random.default_rng(seed)
    cell = _DIAMETERS[1] + 10
    grid = np.arange((side // cell) ** 2)
    cells = rng.permutation(grid)[:number]
    if len(cells) < number:
        raise ValueError(f"{number} discs do not fit in {side} x {side} px")
    diameters = rng.integers(_DIAMETERS[0], _DIAMETERS[1] + 1, number)
    corners = np.stack([cells % (side // cell), cells // (side // cell)], axis=1) * cell + 2
    corners += rng.integers(0, 9, (number, 2))
    stride = view.tile_size - round(view.tile_overlap * view.tile_size)
    for k in range(0, number, _ON_SEAM):  # to the nearest end of a window within its cell
        seams = np.arange(view.tile_size, side, stride)
        nearest = seams[np.abs(seams - corners[k, 0]).argmin()] - diameters[k] // 2
        if corners[k, 0] - 2 <= nearest <= corners[k, 0] + 6:
            corners[k, 0] = nearest
    boxes = np.concatenate([corners, corners + diameters[:, None]], axis=1)
    return np.asarray(boxes, dtype=np.float64)


def write_picture(folder: Path, side: int, boxes: NDArray[np.float64], *, seed: int = 0) -> None:
    """Writes the picture, tile by tile, and a COCO file with the boxes and no masks."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    colours = rng.integers(120, 256, (len(boxes), 3))
    rough = rng.integers(0, 60, (TIFF_TILE, TIFF_TILE, 3), dtype=np.uint8)
    noise = np.asarray(cv2.GaussianBlur(rough, (0, 0), 2), dtype=np.uint8)

    def draw_tiles() -> Iterator[NDArray[np.uint8]]:
        for top in range(0, side, TIFF_TILE):
            row = np.flatnonzero((boxes[:, 1] < top + TIFF_TILE) & (boxes[:, 3] > top))
            for left in range(0, side, TIFF_TILE):
                near = (boxes[row, 0] < left + TIFF_TILE) & (boxes[row, 2] > left)
                yield _draw_tile(noise.copy(), left, top, row[near])

    def _draw_tile(
        tile: NDArray[np.uint8], left: int, top: int, discs: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        for k in discs.tolist():
            x0, y0, x1, _ = (boxes[k] - [left, top, left, top]).tolist()
            radius = (x1 - x0) / 2
            centre = (round((x0 + radius - 0.5) * 16), round((y0 + radius - 0.5) * 16))
            colour = colours[k].tolist()
            cv2.circle(tile, centre, round(radius * 16), colour, -1, cv2.LINE_AA, 4)
        return tile

    tifffile.imwrite(
        folder / _PICTURE,
        draw_tiles(),
        shape=(side, side, 3),
        dtype=np.uint8,
        photometric="rgb",
        tile=(TIFF_TILE, TIFF_TILE),
        compression="zlib",
    )
    _write_coco(folder / _ANNOTATIONS, {_PICTURE: (side, side)}, [boxes], list(range(len(boxes))))


def _write_coco(
    path: Path,
    sizes: dict[str, tuple[int, int]],
    boxes_of: list[NDArray[Any]],
    numbers: list[int],
) -> None:
    images = [
        {"id": k, "file_name": name, "height": height, "width": width}
        for k, (name, (height, width)) in enumerate(sizes.items(), start=1)
    ]
    entries: list[dict[str, Any]] = []
    for image, boxes in zip(images, boxes_of, strict=True):
        for x0, y0, x1, y1 in boxes.tolist():
            box = [x0, y0, x1 - x0, y1 - y0]
            entry = {"id": numbers[len(entries)] + 1, "image_id": image["id"], "category_id": 1}
            entries.append({**entry, "iscrowd": 0, "bbox": box})
    categories = [{"id": 1, "name": "disc"}]
    write_json(path, {"images": images, "annotations": entries, "categories": categories})


def write_windows(folder: Path, picture: Path, boxes: NDArray[np.float64], view: View) -> None:
    """Writes the windows that hold the boxes as TIFFs, and a COCO file of them."""
    source = open_source(picture)
    seen = view_objects(boxes, source.size, view)
    (folder / "windows").mkdir()
    sizes: dict[str, tuple[int, int]] = {}
    boxes_of = []
    for window, objects in _iterate_windows(seen):
        name = f"{len(sizes):05}.tif"
        pixels = source.read(window)
        tile = (TIFF_TILE, TIFF_TILE)
        path = folder / "windows" / name
        tifffile.imwrite(path, pixels, photometric="rgb", tile=tile, compression="zlib")
        sizes[name] = (pixels.shape[0], pixels.shape[1])
        boxes_of.append(boxes_to_window(boxes[objects], window))
    _write_coco(folder / "windows.json", sizes, boxes_of, seen.objects.tolist())


def _iterate_windows(
    seen: WindowObjects,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    ends = np.cumsum(seen.counts)
    for window, first, last in zip(seen.windows, ends - seen.counts, ends, strict=True):
        yield window, seen.objects[first:last]


def compare_masks(
    folder: Path, boxes: NDArray[np.float64], size: tuple[int, int], view: View
) -> int:
    """The number of masks, after checking that the picture and its windows give the same.

    Raises:
        ValueError: They differ, or an object has no mask or several.
    """
    whole, parts = (
        {row[_PART]: row["segmentation"] for row in rows}
        for rows in (
            _read_rows(folder / name / predict.RESULTS, len(boxes))
            for name in ("out_picture", "out_windows")
        )
    )
    seen = view_objects(boxes, size, view)
    for window, objects in _iterate_windows(seen):
        left, top = window[:2].tolist()
        for number in (objects + 1).tolist():
            crop = decode_encoded(parts[number])
            moved = type(crop)(crop.top + top, crop.left + left, crop.mask)
            if encode_cropped(moved, size) != whole[number]:
                raise ValueError(f"object {number} has another mask in its window alone")
    return len(whole)


def _read_rows(results: Path, num_objects: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(results.read_text())
    if sorted(row[_PART] for row in rows) != list(range(1, num_objects + 1)):
        raise ValueError(f"{results} does not have each object once")
    return rows


def run_predict(images: Path, annotations: Path, output: Path, *flags: str) -> dict[str, float]:
    """Runs the command in this process: wall and CPU seconds, and the process's peak in GiB."""
    required = ["--checkpoint", str(PACKAGED_TINY), "--images", str(images)]
    required += ["--annotations", str(annotations), "--output_dir", str(output)]
    start = read_clocks()
    with contextlib.redirect_stdout(io.StringIO()):
        predict.main([*required, "--device", "cpu", *flags])
    wall, cpu = (read_clocks() - start).tolist()
    return {"wall": wall, "cpu": cpu, "gib": process_peak_gib(torch.device("cpu"))}


def measure(folder: Path, args: argparse.Namespace) -> str:
    """Writes the picture and its windows, predicts on both, and compares."""
    view = View("tiles", args.tile_size)
    boxes = draw_discs(args.side, args.objects, view)
    write_picture(folder / "images", args.side, boxes)
    picture = folder / "images" / _PICTURE
    write_windows(folder, picture, boxes, view)
    seen = view_objects(boxes, (args.side, args.side), view)
    rows, seconds = [], {}
    for name, kind in (("picture", "tiles"), ("windows", "image")):
        flags = ["--run", name, "--output_dir", str(folder), "--tile_size", str(args.tile_size)]
        result = run_in_fresh_process("benchmarks.large_picture", *flags)
        assert result is not None
        seconds[name] = result
        rows.append(
            f"| {name} | {kind} | {result['wall']:.1f} | {result['cpu']:.1f} "
            f"| {result['gib'] * 1024:.0f} |"
        )
    count = compare_masks(folder, boxes, (args.side, args.side), view)
    ratio = {k: seconds["picture"][k] / seconds["windows"][k] for k in ("wall", "cpu")}
    head = "| predicted on | view | s | CPU, s | peak RSS, MiB |"
    return (
        f"{args.side} x {args.side} px ({picture.stat().st_size / 1e6:.0f} MB), {count} objects, "
        f"{len(seen.windows)} windows of {args.tile_size} px: {ratio['wall']:.2f} of the seconds "
        f"and {ratio['cpu']:.2f} of the CPU seconds of the windows alone; equal masks, each "
        f"object once.\n\n{markdown_table(head, rows)}"
    )


def _run_one(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    if args.run == "picture":
        flags = ["--view", "tiles", "--tile_size", str(args.tile_size)]
        images, annotations = folder / "images", folder / "images" / _ANNOTATIONS
    else:
        flags, images, annotations = [], folder / "windows", folder / "windows.json"
    print(json.dumps(run_predict(images, annotations, folder / f"out_{args.run}", *flags)))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--side", type=int, default=20000, help="of the picture, px")
    add("--objects", type=int, default=5000)
    add("--tile_size", type=int, default=256, help="side of a window, px")
    add("--output_dir", help="keep picture and results here; default: a temporary folder")
    add("--run", choices=("picture", "windows"), help=argparse.SUPPRESS)  # in a fresh process
    args = parser.parse_args(argv)
    if args.run:
        _run_one(args)
        return
    print(describe_machine(torch.device("cpu")), flush=True)
    with contextlib.ExitStack() as stack:
        folder = args.output_dir or stack.enter_context(tempfile.TemporaryDirectory())
        print(f"\n{measure(Path(folder), args)}", flush=True)


if __name__ == "__main__":
    main()
