"""Small models, batches and trainers for tests of the loop and of validation."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from samft.annotations.segmentation import CroppedMask
from samft.data.dataset import Batch, Sample, collate
from samft.data.targets import draw_targets, make_grids
from samft.data.transforms import make_frame
from samft.distributed import get_rank, get_world_size
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.models.trainable import freeze, unreached_by
from samft.training.engine import Trainer
from samft.training.losses import mask_losses
from samft.training.optim import build_optimizer
from samft.training.prompt_schedule import PromptSchedule

SIZE = 64
NUM_CLICKS = 4  # that the objects have draws for
BOXES = PromptSchedule()


LOSS = mask_losses


def make_sample(number: int) -> Sample:
    """Image `number` with 1 to 5 rectangles; wide images are padded below."""
    generator = np.random.default_rng(number)
    height = SIZE if number % 2 else SIZE // 2
    count = 1 + number * 3 % 5
    image = np.zeros((3, SIZE, SIZE), np.uint8)
    image[:, :height] = generator.integers(0, 256, (3, height, SIZE))
    boxes, truths = [], []
    for _ in range(count):
        x0, y0 = generator.integers(0, SIZE // 8, 2) * 4
        x1, y1 = x0 + 4 * generator.integers(2, 8), min(height, y0 + 4 * generator.integers(2, 8))
        boxes.append([x0, y0, x1, y1])
        truths.append(CroppedMask(int(y0), int(x0), np.ones((y1 - y0, x1 - x0), bool)))
    outlines = [[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in boxes]
    segmentations = [[np.array(outline, dtype=float)] for outline in outlines]
    frame = make_frame((height, SIZE), SIZE, resize_mode="pad")
    grids = make_grids(np.array(boxes), frame, resolution="window")
    _, targets = draw_targets(segmentations, frame, grids)
    return Sample(
        image=torch.from_numpy(image),
        boxes=torch.tensor(boxes, dtype=torch.float32),
        windows=torch.from_numpy(grids.windows).float(),
        targets=torch.from_numpy(targets),
        input_size=(height, SIZE),
        original_size=(height, SIZE),
        image_id=number,
        object_ids=torch.arange(count),
        truths=truths,
        click_draws=torch.from_numpy(generator.random((count, NUM_CLICKS, 2), np.float32)),
    )


def make_trainer(
    *, prompts: PromptSchedule = BOXES, mask_chunk: int | None = None, **options: Any
) -> Trainer:
    torch.manual_seed(0)
    sam = build_sam("vit_tiny", SIZE)
    settings = {
        name: getattr(prompts, name) for name in ("corrections", "mask_prompt", "multimask")
    }
    freeze(sam, [], unreached=unreached_by(prompts.prompts, **settings))
    model = PromptedSam(sam, mask_chunk=mask_chunk)
    optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.01)
    return Trainer(
        model, optimizer, learning_rate_at=lambda step: 1e-4, loss=LOSS, prompts=prompts, **options
    )


def val_batches(num_images: int) -> list[Batch]:
    rows = range(get_rank(), num_images, get_world_size())
    return [collate([make_sample(i)]) for i in rows]


def unreadable(number: int) -> Batch:
    """What a loader gives for an image that it skipped in validation."""
    whole = make_sample(number)
    return collate(
        [
            replace(
                whole,
                image=torch.zeros_like(whole.image),
                boxes=whole.boxes[:0],
                windows=whole.windows[:0],
                targets=whole.targets[:0],
                object_ids=whole.object_ids[:0],
                truths=[],
                bad_images={f"{number}.jpg": "cut short"},
            )
        ]
    )
