"""Pre-trains `vit_tiny` from scratch on procedural images: the weights in the samft package.

    python -m benchmarks.pretrain_tiny --output_dir runs/tiny

Every step draws new scenes (`benchmarks/procedural.py`), so the model cannot overfit. Half of the
steps begin with boxes and half with one point, and all go on with clicks where the last mask is
wrong, as `samft.train --prompts mixed --multimask best` does. Most steps
use a small image size, where they are cheap; the last ones use the final size. The learning rate is
constant and then falls linearly to zero over the last `--decay_steps`. After an interruption, the
same command resumes. `--start_from` trains weights on instead of random ones; `--first_step` keeps
it from drawing the scenes that they have seen. `--score FILE` trains nothing, and prints the scores
of weights on held-out scenes. `docs/experiments.md` has the commands, time and
scores of the packaged file.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.procedural import make_scene
from samft.annotations.segmentation import CroppedMask, encode_cropped, uncompressed_rle
from samft.config import TrainConfig
from samft.data.targets import draw_targets, make_grids
from samft.data.transforms import make_frame
from samft.evaluation.clicks import Click, ClickSession, centre_point, click_prompts, score_clicks
from samft.evaluation.metrics import box_fill_ious, cropped_iou
from samft.models.mask_generator import MaskGenerator
from samft.models.prompted_sam import PromptedSam, original_masks
from samft.models.prompts import OBJECT, Prompts
from samft.models.sam import build_sam, load_state, read_state
from samft.models.trainable import freeze, unreached_by
from samft.training.losses import MaskLosses, mask_losses
from samft.training.prompt_schedule import PromptSchedule

HELD_OUT_SEED = 1_000_000_000
BOX_JITTER = 0.1
MASK_PROMPT = TrainConfig().mask_prompt
NUM_CLICKS = 7
DEFAULT_FOCAL_WEIGHT = TrainConfig().loss_focal_weight
# SAM's own thresholds leave out what `vit_tiny` is less sure of than Meta's models: all of it.
AUTOMATIC_SETTINGS: dict[str, Any] = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.7}


@dataclass
class SceneBatch:
    """Scenes as the input of PromptedSam: all boxes of all images, with their image's index."""

    images: Tensor  # uint8 [N, 3, S, S]
    boxes: Tensor  # float32 [M, 4]
    image_index: Tensor  # int64 [M]
    windows: Tensor  # float32 [M, 4], see `samft.data.targets`
    targets: Tensor  # uint8 [M, G, G], covered share of each cell of the window, times 255
    click_draws: Tensor  # float32 [M, corrections + 1, 2], see `PromptSchedule`
    masks: list[np.ndarray]  # uint8 [K, S, S] of each image


def make_batch(seeds: range, *, size: int, jitter: float, corrections: int = 0) -> SceneBatch:
    """Draws one scene per seed; each side of a box moves by up to `jitter` of its length."""
    images, boxes, index, windows, targets, masks, draws = [], [], [], [], [], [], []
    frame = make_frame((size, size), size, resize_mode="pad")
    for position, seed in enumerate(seeds):
        scene = make_scene(seed, size=size)
        generator = np.random.default_rng(seed)
        moves = generator.uniform(-jitter, jitter, (len(scene.boxes), 4))
        draws.append(generator.random((len(scene.boxes), corrections + 1, 2), dtype=np.float32))
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
        click_draws=torch.from_numpy(np.concatenate(draws)),
        masks=masks,
    )


class SceneStream(IterableDataset):
    """Batches of new scenes for a range of steps; each batch depends only on its step."""

    def __init__(
        self, *, size: int, batch_size: int, corrections: int, start_step: int, end_step: int
    ) -> None:
        """Takes the image size, the images per step, rounds of clicks, and the range of steps."""
        self.size, self.batch_size, self.corrections = size, batch_size, corrections
        self.steps = range(start_step, end_step)

    def __iter__(self) -> Iterator[SceneBatch]:
        """Yields this worker's steps; the loader takes from its workers in turn, so in order."""
        cv2.setNumThreads(0)
        info = torch.utils.data.get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        for step in self.steps[first::stride]:
            seeds = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield make_batch(seeds, size=self.size, jitter=BOX_JITTER, corrections=self.corrections)


@torch.no_grad()
def score_held_out(model: PromptedSam, *, size: int, num_scenes: int) -> dict[str, float]:
    """Mean scores over the objects of held-out scenes.

    Returns:
        IoU of masks prompted with boxes (`iou`), with one point (`point_iou`, the best of three
        masks by predicted IoU) and with that point and six corrections (`clicks_iou`); and that of
        filling each box.
    """
    rows = []
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + num_scenes):
        batch = make_batch(range(seed, seed + 1), size=size, jitter=0.0)
        rows.append(score_scene(model, batch, size=size))
    names = ("iou", "box_fill_iou", "point_iou", "clicks_iou")
    return dict(zip(names, np.concatenate(rows).mean(0).tolist(), strict=True))


def score_scene(model: PromptedSam, batch: SceneBatch, *, size: int) -> NDArray[np.float64]:
    """The scores of `score_held_out` for each object of a scene: [K, 4]."""
    device, sizes = model.sam.device, (size, size)
    embedding = model.embed(batch.images.to(device))
    index = batch.image_index.to(device)
    truths = [CroppedMask(0, 0, mask > 0) for mask in batch.masks[0]]

    def decode(prompts: Prompts, *, multimask: bool = False) -> tuple[Tensor, Tensor]:
        rows = index[: len(prompts)]  # all of one image
        return model.decode(embedding, prompts, rows, multimask=multimask)

    def ious_of(logits: Tensor) -> list[float]:
        masks = original_masks(logits, input_size=sizes, original_size=sizes)
        return [cropped_iou(mask, truth) for mask, truth in zip(masks, truths, strict=True)]

    boxes = batch.boxes.to(device)
    by_box = ious_of(decode(Prompts(boxes=boxes))[0])
    fills = box_fill_ious(batch.boxes, truths, input_size=sizes, original_size=sizes)
    clicks = [[Click(*centre_point(truth), OBJECT)] for truth in truths]
    frame = make_frame(sizes, size, resize_mode="pad")
    three, iou_predicted = decode(click_prompts(clicks, frame, device), multimask=True)
    best = three[torch.arange(len(three)), iou_predicted.argmax(1)]
    session = ClickSession(lambda prompts: decode(prompts)[0], None, truths, frame)
    corrected = session.correct(best, clicks=clicks, most=NUM_CLICKS)
    scores = score_clicks(corrected, truths, num_rounds=NUM_CLICKS, original_size=sizes)
    return np.stack([by_box, fills.numpy(), scores.iou[:, 0], scores.iou[:, -1]], axis=1)


@torch.no_grad()
def score_automatic(model: PromptedSam, *, size: int, num_scenes: int) -> dict[str, float]:
    """Automatic masks of held-out scenes.

    Returns:
        The share of objects with which a mask has an IoU of .5 or more (`found_50`), and the number
        of masks of a scene (`masks`).
    """
    generator = MaskGenerator(model.sam, show_progress=False, **AUTOMATIC_SETTINGS)
    best: list[float] = []
    num_masks = 0
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + num_scenes):
        scene = make_scene(seed, size=size)
        entries = [entry["segmentation"] for entry in generator.generate(scene.image)]
        masks = [mask_utils.frPyObjects(rle, size, size) for rle in entries]
        truths = [encode_cropped(CroppedMask(0, 0, mask > 0), (size, size)) for mask in scene.masks]
        ious = np.reshape(mask_utils.iou(masks, truths, [0] * len(truths)), (-1, len(truths)))
        best += ious.max(axis=0, initial=0).tolist()
        num_masks += len(masks)
    share = float(np.mean(np.array(best) >= 0.5))
    return {"found_50": share, "masks": num_masks / num_scenes}


def learning_rate_factor(step: int, *, warmup: int, decay: int, total: int) -> float:
    """Linear warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / warmup, (total - step) / decay)


def train_stage(
    model: PromptedSam, optimizer: torch.optim.Optimizer, args: argparse.Namespace, *, size: int
) -> None:
    """Trains from `args.step` to `args.stage_end` at one image size, saving now and then."""
    scenes = SceneStream(
        size=size,
        batch_size=args.batch_size,
        corrections=args.correction_rounds,
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
        rounds = args.schedule.rounds_at(
            args.first_step + args.step, click_draws=batch.click_draws.to(device), loss=args.loss
        )
        with torch.autocast(device.type, torch.bfloat16):
            total, values = model(
                batch.images.to(device),
                batch.boxes.to(device),
                image_index,
                input_sizes=input_sizes,
                loss=args.loss,
                targets=batch.targets.to(device),
                windows=batch.windows.to(device),
                rounds=rounds,
            )
        last_round = MaskLosses(*values[-len(MaskLosses._fields) :])
        optimizer.zero_grad(set_to_none=True)
        (total / max(1, len(image_index))).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        args.step += 1
        ious.append(last_round.iou_actual.mean().item())
        if args.step % args.save_every == 0 or args.step == args.stage_end:
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
    if args.step == args.total_steps:
        line |= score_all(model.eval(), size=size)
    elif args.step % (2 * args.save_every) == 0:
        line |= score_held_out(model.eval(), size=size, num_scenes=200)
        model.train()
    with (args.output_dir / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    print(line, flush=True)


def score_all(model: PromptedSam, *, size: int) -> dict[str, float]:
    """`score_held_out` and `score_automatic`, of as many scenes as the documentation says."""
    scores = score_held_out(model, size=size, num_scenes=1000)
    return scores | score_automatic(model, size=size, num_scenes=50)


def score_weights(path: Path, *, size: int = 256) -> None:
    """Prints the scores of `vit_tiny` weights."""
    sam = build_sam("vit_tiny", size)
    load_state(sam, read_state(path))
    print(json.dumps(score_all(PromptedSam(sam.eval()), size=size)))


def main() -> None:
    """Runs the remaining stages and writes `vit_tiny.pth`, or scores weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output_dir", type=Path)
    what.add_argument("--score", type=Path, metavar="FILE", help="print the scores of weights")
    parser.add_argument("--stages", default="128:6000,256:14000", help="SIZE:STEPS,...")
    parser.add_argument("--start_from", type=Path, help="weights to train on; default: random")
    parser.add_argument("--first_step", type=int, default=0, help="counts scenes from this step")
    parser.add_argument("--decay_steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--focal_weight", type=float, default=DEFAULT_FOCAL_WEIGHT)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--correction_rounds", type=int, default=7)
    parser.add_argument("--save_every", type=int, default=1000)
    args = parser.parse_args()
    if args.score:
        score_weights(args.score)
        return
    prompting: dict[str, Any] = {"corrections": args.correction_rounds, "multimask": "best"}
    args.schedule = PromptSchedule(prompts="mixed", mask_prompt=MASK_PROMPT, **prompting)
    args.loss = partial(mask_losses, focal_weight=args.focal_weight)
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
        freeze(sam, [], unreached=unreached_by("mixed", mask_prompt=MASK_PROMPT, **prompting))
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
