"""What windows are worth: whole images, tiles and windows around objects, at equal steps.

    python -m benchmarks.views --output_dir DIR [--datasets hbn_flakes defects] [--seeds 0 1 2]
        [--image_steps 450]

Trains the decoder of `vit_tiny` at 256 px with each view, from the same weights and with as many
windows as images in a step, and compares the masks of the best checkpoints object by object, each
at the original resolution. With `--image_steps`, whole images are also trained on for so many
steps, since the windows of an image take longer to encode and to validate; the table has the time
of each run, from its start to its report. A run that is in the folder is not run again.
"""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)

# isort: split
import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import describe_machine
from benchmarks.procedural_textures import fractal_noise
from benchmarks.quality_datasets import DATASETS, drawn_dataset
from benchmarks.tables import markdown_table
from samft.evaluation.object_scores import ObjectScores, compare_objects, mean_change
from samft.runtime.files import write_text
from samft.train import main as train
from samft.views.windows import KINDS

IMAGE_SIZE = 256
SIDE, DEFECTS = 2000, 80  # px of a drawn picture, and its objects
_DIAMETERS = (8, 40)  # px
_NUM_IMAGES = {"train": 6, "val": 4}


def draw_defects(rng: np.random.Generator, side: int, number: int) -> tuple[Any, list[Any]]:
    """A textured surface with irregular spots of 8 to 40 px: uint8 [H, W, 3], and outlines."""
    ground = 90 + 80 * fractal_noise(rng, side, side, 40)
    image = np.repeat(ground[..., None], 3, axis=2).astype(np.uint8)
    cell = _DIAMETERS[1] + 10
    places = rng.permutation((side // cell) ** 2)[:number]
    outlines = []
    for place in places.tolist():
        centre = (np.array([place % (side // cell), place // (side // cell)]) + 0.5) * cell
        outline = _draw_outline(rng) + centre
        outlines.append(outline)
        # Darker or brighter than the ground, which shows through.
        shade = rng.choice([-1, 1]) * rng.integers(35, 70)
        cover = np.zeros((side, side), dtype=np.uint8)
        cv2.fillPoly(cover, [np.round(outline * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
        x, y, width, height = cv2.boundingRect(outline.astype(np.int32))
        part = np.s_[max(y - 2, 0) : y + height + 2, max(x - 2, 0) : x + width + 2]
        change = shade * (cover[part][..., None] / 255.0)
        image[part] = np.clip(image[part] + change, 0, 255).astype(np.uint8)
    return image, outlines


def _draw_outline(rng: np.random.Generator) -> NDArray[np.float64]:
    # [24, 2] around 0, 0: an ellipse with dents.
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radius = rng.uniform(*_DIAMETERS) / 2 * (1 - 0.35 * rng.random() * np.cos(3 * angle) ** 2)
    points = np.stack([np.cos(angle), np.sin(angle) * rng.uniform(0.4, 1)], axis=1)
    turn = rng.uniform(0, np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return np.asarray(points * radius[:, None] @ rotation)


def write_defects(folder: Path, *, side: int = SIDE, number: int = DEFECTS) -> None:
    """Writes `train` and `val`, each with `_annotations.coco.json` beside PNG images."""
    for stream, (split, count) in enumerate(_NUM_IMAGES.items()):
        (folder / split).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in range(1, count + 1):
            image, outlines = draw_defects(np.random.default_rng([stream, image_id]), side, number)
            name = f"{image_id}.png"
            cv2.imwrite(str(folder / split / name), image)
            images.append({"id": image_id, "file_name": name, "height": side, "width": side})
            for outline in outlines:
                (x0, y0), (x1, y1) = outline.min(axis=0), outline.max(axis=0)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": 1,
                        "iscrowd": 0,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": cv2.contourArea(outline.astype(np.float32)),
                        "segmentation": [outline.round(2).ravel().tolist()],
                    }
                )
        document = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "defect"}],
        }
        write_text(folder / split / "_annotations.coco.json", json.dumps(document))


def train_view(data: dict[str, Any], folder: Path, *, view: str, seed: int, steps: int) -> None:
    """One run, unless the folder holds it."""
    if (folder / "summary.json").exists():
        return
    settings = {
        **data,
        "model_type": "vit_tiny",
        "checkpoint_path": "auto",
        "image_size": IMAGE_SIZE,
        "steps": steps,
        "batch_size": 2,
        "metrics_interval": steps,
        "num_workers": 0,
        "trackers": "none",
        "test_split": "none",
        "seed": seed,
        "view": view,
        "output_dir": folder,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    train([*flags, "--freeze_image_encoder"])


def read_scores(folder: Path) -> ObjectScores:
    """The scores of all objects at the best step of a run."""
    step = json.loads((folder / "summary.json").read_text())["best_step"]
    return ObjectScores.from_json(json.loads((folder / "objects.json").read_text())[str(step)])


def name_run(dataset: str, view: str, seed: int, *, image_steps: int | None = None) -> str:
    """The folder of a run; of `image`, with the number of its steps if it has one of its own."""
    steps = f"_{image_steps}" if image_steps else ""
    return f"{dataset}-{view}{steps}-{seed}"


def compare_views(
    folder: Path, dataset: str, seeds: Sequence[int], *, image_steps: int | None = None
) -> list[str]:
    """A row for each view: means over objects and seeds, and the difference to whole images.

    Args:
        folder: Of the runs.
        dataset: That they were trained on.
        seeds: Of runs that are all there.
        image_steps: Of the runs that saw whole images for longer, for a row of their own.
    """
    names = {view: [name_run(dataset, view, seed) for seed in seeds] for view in KINDS}
    if image_steps:
        names[f"image, {image_steps} steps"] = [
            name_run(dataset, "image", seed, image_steps=image_steps) for seed in seeds
        ]
    runs = {
        view: [read_scores(folder / name) for name in of_view] for view, of_view in names.items()
    }
    rows = []
    for view, tables in runs.items():
        pairs = [compare_objects(a, b) for a, b in zip(runs["image"], tables, strict=True)]
        change = np.mean([pair.change for pair in pairs], axis=0)
        summaries = [
            json.loads((folder / name / "summary.json").read_text()) for name in names[view]
        ]
        result = mean_change(change, pairs[0].before.image_ids, seed=0)
        interval = " to ".join(f"{end:+.3f}" for end in result["interval"] or ())
        before, after, fill = (
            float(np.mean([one[name] for one in summaries]))
            for name in ("baseline_val_per_mask_iou", "best_val_per_mask_iou", "box_fill_iou")
        )
        windows = summaries[0]["data"]["val"].get("windows", summaries[0]["data"]["val"]["images"])
        difference = "" if view == "image" else f"{result['difference']:+.3f} ({interval})"
        numbers = [f"{number:.3f}" for number in (fill, before, after)]
        seconds = np.mean([one["wall_seconds"] for one in summaries])
        label = f"`{view}`" if view in KINDS else view
        cells = [f"`{dataset}`", label, str(windows), *numbers, difference, f"{seconds:.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", default=["hbn_flakes", "defects"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--image_steps", type=int, help="of more runs with whole images")
    args = parser.parse_args(argv)
    rows = []
    for dataset in args.datasets:
        locate = drawn_dataset("defects", write_defects)
        if dataset != "defects":
            locate = DATASETS[dataset].locate
        data, longer = locate(args.output_dir), args.image_steps
        for seed, view in itertools.product(args.seeds, KINDS):
            folder = args.output_dir / name_run(dataset, view, seed)
            train_view(data, folder, view=view, seed=seed, steps=args.steps)
        for seed in args.seeds if longer else ():
            folder = args.output_dir / name_run(dataset, "image", seed, image_steps=longer)
            train_view(data, folder, view="image", seed=seed, steps=longer)
        rows += compare_views(args.output_dir, dataset, args.seeds, image_steps=longer)
    head = (
        "| data | view | windows | box fill | untouched | tuned | tuned, less `image` | seconds |"
    )
    print(markdown_table(head, rows))
    print(describe_machine(torch.device("cpu")))


if __name__ == "__main__":
    main()
