"""How small an object may be: masks by the shorter side of the object's box, in decoder's cells.

    python -m benchmarks.object_sizes draw --data_root DIR --split val --image_size 128 256 512
    python -m benchmarks.object_sizes runs RUN [RUN ...]

`draw` asks what logits of a quarter of the image size can draw at all: it fits them to each true
mask by gradient descent, beside the mask averaged over cells. `runs` asks what models draw: the
objects of finished runs, from their `objects.json`, against filling each box. Both print a table;
those of docs/experiments.md set `MIN_CELLS` of samft/annotations/boxes.py.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.tables import markdown_table
from samft.annotations.boxes import CELL, shorter_sides
from samft.annotations.segmentation import CroppedMask, decode_cropped, uncompressed_rle
from samft.coco.layout import find_split
from samft.coco.subset import CocoSubset, read_coco
from samft.config import parse_config
from samft.data.targets import TargetGrids, draw_targets
from samft.data.transforms import Frame, make_frame
from samft.evaluation.metrics import cropped_iou
from samft.evaluation.object_scores import ObjectScores
from samft.models.prompted_sam import original_masks, upsampling_matrix
from samft.recipes.datasets import load_splits
from samft.reports.validation_images import find_objects

EDGES = (0, 0.5, 1, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16)  # cells
_LARGEST_DRAWN = 12  # cells; larger objects can be drawn, and take long to fit
_MARGIN = 2  # cells around the object that are fitted
_LEARNING_RATE, _SHARPEST = 0.3, 5.0


def fit_mask(mask: CroppedMask, frame: Frame, *, steps: int = 60) -> float:
    """The best IoU with a mask of logits that are fitted to it; a lower bound of what is possible.

    Args:
        mask: The true mask, original frame.
        frame: Of its image.
        steps: Of Adam, on the soft IoU at the original resolution, which is made sharper on the
            way.

    Returns:
        The best IoU on the way of the masks that the logits give in `SamPredictor`.
    """
    share = covered_share(mask, frame)
    spans = [_span(share.any(axis)) for axis in (1, 0)]
    rows, columns = (_upsampling(frame, axis, spans[axis]) for axis in (0, 1))
    truth = torch.zeros(frame.original_size)
    height, width = mask.mask.shape
    truth[mask.top : mask.top + height, mask.left : mask.left + width] = torch.from_numpy(
        mask.mask.astype(np.float32)
    )
    rows_drawn, columns_drawn = (_span(matrix.any(1), margin=0) for matrix in (rows, columns))
    truth = truth[rows_drawn, columns_drawn]
    rows, columns = rows[rows_drawn], columns[columns_drawn]
    inner = share[spans[0], spans[1]]
    logits = (8 * (inner - inner.max().clamp(max=1) / 2)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=_LEARNING_RATE)
    best = 0.0
    for step in range(steps + 1):
        drawn = rows @ logits @ columns.T
        best = max(best, float(_soft_iou((drawn > 0).float(), truth)))
        sharpness = 1 + (_SHARPEST - 1) * step / max(steps, 1)
        loss = 1 - _soft_iou((sharpness * drawn).sigmoid(), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


def _span(used: Tensor, *, margin: int = _MARGIN) -> slice:
    places = used.nonzero()[:, 0]
    return slice(max(0, int(places[0]) - margin), int(places[-1]) + 1 + margin)


def _upsampling(frame: Frame, axis: int, cells: slice) -> Tensor:
    matrix = upsampling_matrix(
        max(frame.size) // CELL,
        max(frame.size),
        frame.input_size[axis],
        frame.original_size[axis],
    )
    return matrix[:, cells]


def _soft_iou(masks: Tensor, truth: Tensor) -> Tensor:
    overlap = (masks * truth).sum()
    return overlap / (masks.sum() + truth.sum() - overlap)


def covered_share(mask: CroppedMask, frame: Frame) -> Tensor:
    """The share of each of the decoder's cells that a mask covers, float32 [S/4, S/4]."""
    size = max(frame.size)
    grids = TargetGrids(
        np.array([[0.0, 0.0, size, size]]), size // CELL, is_binary=False, min_cell_pixels=math.inf
    )
    rle = uncompressed_rle(mask, frame.original_size)
    _, (target,) = draw_targets([rle], frame, grids)
    return torch.from_numpy(target).float() / 255


def averaged_iou(mask: CroppedMask, frame: Frame) -> float:
    """The IoU with a mask of logits that are the covered share of each cell, less one half."""
    logits = covered_share(mask, frame)[None] - 0.5
    (drawn,) = original_masks(
        logits,
        input_size=frame.input_size,
        original_size=frame.original_size,
    )
    return cropped_iou(drawn, mask)


def draw_objects(
    subset: CocoSubset, image_sizes: list[int], *, num_objects: int
) -> NDArray[np.float64]:
    """Draws a random sample of a split's objects at some image sizes.

    Returns:
        float64 [n, 4]: cells of the shorter side, IoU of the filled box of the mask, of the
        averaged mask, and of the fitted one.
    """
    rows = []
    image_of = np.repeat(np.arange(subset.num_images), np.diff(subset.first_object))
    order = np.random.default_rng(0).permutation(subset.num_objects)
    for place in order[:num_objects].tolist():
        original_size = subset.size(int(image_of[place]))
        k = int(subset.objects[place])
        mask = decode_cropped(subset.index.segmentations[k], original_size)
        side = shorter_sides(
            subset.index.boxes[k][None], np.array([original_size]), resize_mode="pad"
        )[0]
        for image_size in image_sizes:
            cells = side * image_size / CELL
            if mask.mask.size and cells < _LARGEST_DRAWN:
                frame = make_frame(original_size, image_size, resize_mode="pad")
                ious = (mask.mask.mean(), averaged_iou(mask, frame), fit_mask(mask, frame))
                rows.append((cells, *ious))
    return np.array(rows).reshape(-1, 4)


def read_run(folder: Path) -> NDArray[np.float64]:
    """The objects of a finished run.

    Returns:
        float64 [n, 4]: cells of the shorter side, IoU of the filled box, at step 0, and at the
        last step that `objects.json` has: the best, or the second best if it was earlier.
    """
    steps = json.loads((folder / "objects.json").read_text())
    first, last = (ObjectScores.from_json(steps[str(step(map(int, steps)))]) for step in (min, max))
    config = parse_config(["--config", str(folder / "config.yaml")])
    index = load_splits(config).val.subset.index
    objects = find_objects(index, first.keys())
    sizes = index.sizes[np.searchsorted(index.first_object, objects, side="right") - 1]
    sides = shorter_sides(index.boxes[objects], sizes, resize_mode=config.resize_mode)
    cells = sides * int(config.image_size) / CELL
    return np.stack([cells, first.iou_box_fill, first.iou_actual, last.iou_actual], axis=1)


def format_groups(rows: NDArray[np.float64], names: tuple[str, str]) -> str:
    """A Markdown table of mean IoUs and of the share better than the filled box, by cells."""
    head = f"| shorter side, cells | objects | filled box | {names[0]} | {names[1]} | better |"
    group = np.searchsorted(EDGES, rows[:, 0], side="right") - 1
    lines = []
    for number in np.unique(group).tolist():
        low, high = EDGES[number], [*EDGES, None][number + 1]
        some = rows[group == number]
        means = " | ".join(f"{mean:.2f}" for mean in some[:, 1:].mean(0))
        better = " / ".join(f"{(some[:, k] > some[:, 1]).mean():.0%}" for k in (2, 3))
        label = f"{low:g} to {high:g}" if high else f"{low:g} and more"
        lines.append(f"| {label} | {len(some)} | {means} | {better} |")
    return markdown_table(head, lines)


def main() -> None:
    """Parses the command line and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("draw")
    draw.add_argument("--data_root", type=Path, nargs="+", required=True)
    draw.add_argument("--split", default="val")
    draw.add_argument("--image_size", type=int, nargs="+", default=[128, 256, 512])
    draw.add_argument("--num_objects", type=int, default=60, help="of each dataset")
    runs = commands.add_parser("runs")
    runs.add_argument("folder", type=Path, nargs="+")
    args: Any = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "draw":
        parts = [
            draw_objects(
                read_coco(*find_split(root, args.split)),
                args.image_size,
                num_objects=args.num_objects,
            )
            for root in args.data_root
        ]
        names = ("averaged mask", "fitted mask")
    else:
        parts, names = [read_run(folder) for folder in args.folder], ("step 0", "tuned")
    print(format_groups(np.concatenate(parts), names))


if __name__ == "__main__":
    main()
