"""Pre-trains `vit_tiny` from scratch on procedural images: the weights in the samft package.

    python -m benchmarks.pretrain_tiny --output_dir runs/tiny

Every step draws new scenes (`benchmarks/procedural.py`), so the model cannot overfit. Most steps
use a small image size, where they are cheap; the last ones use the final size. The learning rate is
constant and then falls linearly to zero over the last `--decay_steps`. After an interruption, the
same command resumes. `--start_from` trains weights on instead of random ones; `--first_step` keeps
it from drawing the scenes that they have seen. `docs/experiments.md` has the commands, time and
scores of the packaged file.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.procedural import make_scene
from samft.coco.segmentation import CroppedMask, uncompressed_rle
from samft.config import TrainConfig
from samft.data.targets import draw_targets, make_grids
from samft.data.transforms import make_frame
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam, load_state, read_state
from samft.models.trainable import freeze
from samft.training.losses import mask_losses

HELD_OUT_SEED = 1_000_000_000
BOX_JITTER = 0.1
DEFAULT_FOCAL_WEIGHT = TrainConfig().loss_focal_weight


@dataclass
class SceneBatch:
    """Scenes as the input of PromptedSam: all boxes of all images, with their image's index."""

    images: Tensor  # uint8 [N, 3, S, S]
    boxes: Tensor  # float32 [M, 4]
    image_index: Tensor  # int64 [M]
    windows: Tensor  # float32 [M, 4], see `samft.data.targets`
    targets: Tensor  # uint8 [M, G, G], covered share of each cell of the window, times 255
    masks: list[np.ndarray]  # uint8 [K, S, S] of each image


def make_batch(seeds: range, *, size: int, jitter: float) -> SceneBatch:
    """Draws one scene per seed; each side of a box moves by up to `jitter` of its length."""
    images, boxes, index, windows, targets, masks = [], [], [], [], [], []
    frame = make_frame((size, size), size, resize_mode="pad")
    for position, seed in enumerate(seeds):
        scene = make_scene(seed, size=size)
        moves = np.random.default_rng(seed).uniform(-jitter, jitter, (len(scene.boxes), 4))
        sides = np.tile(scene.boxes[:, 2:] - scene.boxes[:, :2], 2)
        images.append(scene.image.transpose(2, 0, 1))
        boxes.append(np.clip(scene.boxes + moves * sides, 0, size))
        index += [position] * len(scene.boxes)
        grids = make_grids(scene.boxes, frame, resolution="window")
        windows.append(grids.windows)
        outlines = [uncompressed_rle(CroppedMask(0, 0, mask), (size, size)) for mask in scene.masks]
        targets.append(draw_targets(outlines, frame, grids)[1])
        masks.append(scene.masks)
    return SceneBatch(
        images=torch.from_numpy(np.stack(images)),
        boxes=torch.from_numpy(np.concatenate(boxes).astype(np.float32)),
        image_index=torch.tensor(index),
        windows=torch.from_numpy(np.concatenate(windows).astype(np.float32)),
        targets=torch.from_numpy(np.concatenate(targets)),
        masks=masks,
    )


class SceneStream(IterableDataset):
    """Batches of new scenes for a range of steps; each batch depends only on its step."""

    def __init__(self, *, size: int, batch_size: int, start_step: int, end_step: int) -> None:
        """Takes the image size, the images per step, and the range of steps."""
        self.size, self.batch_size = size, batch_size
        self.steps = range(start_step, end_step)

    def __iter__(self) -> Iterator[SceneBatch]:
        """Yields this worker's steps; the loader takes from its workers in turn, so in order."""
        cv2.setNumThreads(0)
        info = torch.utils.data.get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        for step in self.steps[first::stride]:
            seeds = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield make_batch(seeds, size=self.size, jitter=BOX_JITTER)


@torch.no_grad()
def score_held_out(model: PromptedSam, *, size: int, num_scenes: int) -> dict[str, float]:
    """Mean IoU over the objects of held-out scenes, and that of filling each box."""
    ious, fills = [], []
    device = model.sam.device
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + num_scenes):
        batch = make_batch(range(seed, seed + 1), size=size, jitter=0.0)
        logits, _ = model(
            batch.images.to(device), batch.boxes.to(device), batch.image_index.to(device)
        )
        masks = F.interpolate(logits[:, None].float(), (size, size), mode="bilinear")[:, 0] > 0
        for mask, truth, box in zip(
            masks.cpu().numpy(), batch.masks[0], batch.boxes.numpy(), strict=True
        ):
            x0, y0, x1, y1 = box.round().astype(int)
            ious.append((mask & (truth > 0)).sum() / (mask | (truth > 0)).sum())
            fills.append(truth.sum() / max(1, (x1 - x0) * (y1 - y0)))
    return {"iou": float(np.mean(ious)), "box_fill_iou": float(np.mean(fills))}


def learning_rate_factor(step: int, *, warmup: int, decay: int, total: int) -> float:
    """Linear warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / warmup, (total - step) / decay)


def train_stage(
    model: PromptedSam, optimizer: torch.optim.Optimizer, args: argparse.Namespace, *, size: int
) -> None:
    """Trains from `args.step` to `args.stage_end` at one image size, saving every 1000 steps."""
    scenes = SceneStream(
        size=size,
        batch_size=args.batch_size,
        start_step=args.first_step + args.step,
        end_step=args.first_step + args.stage_end,
    )
    loader = DataLoader(scenes, batch_size=None, num_workers=args.num_workers, prefetch_factor=4)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device, started, ious = model.sam.device, time.monotonic(), []
    input_sizes = torch.full((args.batch_size, 2), size, device=device)
    for batch in loader:
        factor = learning_rate_factor(
            args.step, warmup=500, decay=args.decay_steps, total=args.total_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor
        image_index = batch.image_index.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits, iou_predicted = model(
                batch.images.to(device), batch.boxes.to(device), image_index
            )
        losses = mask_losses(
            logits,
            iou_predicted,
            targets=batch.targets.to(device),
            windows=batch.windows.to(device),
            image_index=image_index,
            input_sizes=input_sizes,
            focal_weight=args.focal_weight,
        )
        optimizer.zero_grad(set_to_none=True)
        losses.total.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        args.step += 1
        ious.append(losses.iou_actual.mean().item())
        if args.step % 1000 == 0 or args.step == args.stage_end:
            seconds = time.monotonic() - started
            save_state(
                model, optimizer, args, size=size, train_iou=float(np.mean(ious)), seconds=seconds
            )
            started, ious = time.monotonic(), []


def save_state(
    model: PromptedSam,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    *,
    size: int,
    train_iou: float,
    seconds: float,
) -> None:
    """Writes weights and optimizer state, and appends a line of scores to `log.jsonl`."""
    state = {
        "step": args.step,
        "image_size": size,
        "model": model.sam.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    part = args.output_dir / "state.part"
    torch.save(state, part)
    part.replace(args.output_dir / "state.pth")
    line = {"step": args.step, "image_size": size, "train_iou": round(train_iou, 4)}
    line |= {"seconds": round(seconds, 1)}
    last = args.step == args.total_steps
    if last or args.step % 2000 == 0:
        line |= score_held_out(model.eval(), size=size, num_scenes=1000 if last else 200)
        model.train()
    with (args.output_dir / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    print(line, flush=True)


def main() -> None:
    """Runs the remaining stages and writes `vit_tiny.pth`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--stages", default="128:6000,256:14000", help="SIZE:STEPS,...")
    parser.add_argument("--start_from", type=Path, help="weights to train on; default: random")
    parser.add_argument("--first_step", type=int, default=0, help="counts scenes from this step")
    parser.add_argument("--decay_steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--focal_weight", type=float, default=DEFAULT_FOCAL_WEIGHT)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    stages = [tuple(map(int, stage.split(":"))) for stage in args.stages.split(",")]
    args.total_steps, args.step, args.stage_end = sum(steps for _, steps in stages), 0, 0
    args.output_dir.mkdir(parents=True, exist_ok=True)
    saved = args.output_dir / "state.pth"
    torch.manual_seed(0)
    state = torch.load(saved, weights_only=True) if saved.exists() else None
    model: PromptedSam | None = None
    first = read_state(args.start_from) if args.start_from and state is None else None
    for size, steps in stages:
        args.stage_end += steps
        if state is not None and state["step"] >= args.stage_end:
            continue
        weights = model.sam.state_dict() if model else (state["model"] if state else first)
        sam = build_sam("vit_tiny", size)
        if weights is not None:
            load_state(sam, weights)
        freeze(sam, [])
        model = PromptedSam(sam.to(args.device)).train()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], fused=True, weight_decay=0.01
        )
        if state is not None:
            args.step = state["step"]
            if state["image_size"] == size:
                optimizer.load_state_dict(state["optimizer"])
            state = None
        train_stage(model, optimizer, args, size=size)
    if model is not None:
        torch.save(model.sam.state_dict(), args.output_dir / "vit_tiny.pth")


if __name__ == "__main__":
    main()
