"""The objects of a run that are worth a look, as its first and its best weights see them.

The end of a run: both models compared, the summary, and report.html.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import samft
from samft import distributed
from samft.checkpoints.top_k import Checkpoint, git_commit
from samft.coco.images import ImageError, read_image
from samft.coco.index import class_names
from samft.coco.segmentation import CroppedMask, decode_cropped
from samft.config import TrainConfig
from samft.data.dataset import Coco2MaskDataset, collate
from samft.errors import UserError
from samft.evaluation.metrics import cropped_iou
from samft.evaluation.object_scores import (
    Comparison,
    GroupMeans,
    compare_objects,
    mean_by_group,
    mean_by_size,
)
from samft.models.prompted_sam import PromptedSam, original_masks
from samft.models.sam import build_sam, load_state, read_state
from samft.recipes import build
from samft.recipes.datasets import Splits, find_val
from samft.reports.drawing import annotate_crop, crop_around, image_row_of
from samft.reports.page import ObjectPair, ReportPage, render
from samft.reports.summary import log_summary, next_commands, summarise_run
from samft.reports.validation_images import ValidationImages, find_objects
from samft.runtime import heartbeat
from samft.runtime.files import write_text
from samft.runtime.logs import LOGGER, format_duration
from samft.training.engine import Progress

NUM_SHOWN = 6  # of each kind
_TILE = 288  # px: sharp where it is shown at half the size
_SAME_IOU = 0.02  # a model is scored like this again, in whatever precision


@dataclass
class Pairs:
    """The objects of each kind (`improved`, `worst`, `harmed`); or why there are none."""

    groups: dict[str, list[ObjectPair]] = field(default_factory=dict)
    why_none: str = ""


def draw_pairs(
    config: TrainConfig,
    model: PromptedSam,
    dataset: Coco2MaskDataset,
    *,
    comparison: Comparison | None,
    checkpoint: Path | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Pairs:
    """Runs both models on a few images, and draws what they make of a few objects.

    Only those images are encoded, or read from the cache of embeddings. Afterwards the model has
    the weights of the checkpoint.

    Args:
        config: The run's configuration.
        model: On its device; not wrapped.
        dataset: Of the validation split.
        comparison: Of all its objects; None if the rows of one of the two models are lost.
        checkpoint: The best one.
        should_stop: Asked before each image.
    """
    if comparison is None or checkpoint is None or not len(comparison.before):
        return Pairs(why_none="It is not known how each object was scored before and after.")
    rows = comparison.choose_examples(NUM_SHOWN)
    chosen = np.concatenate(list(rows.values()))
    found = find_objects(dataset.subset.index, comparison.before.keys()[chosen])
    objects = dict(zip(chosen.tolist(), found.tolist(), strict=True))
    masks: list[dict[int, CroppedMask]] = []
    embeddings: dict[int, Tensor] = {}
    try:
        for weights in (lambda: _first_weights(config), lambda: read_state(checkpoint)):
            load_state(model.sam, weights(), source="the weights of this run")
            masks.append(
                predict(
                    model,
                    dataset,
                    list(objects.values()),
                    embeddings=embeddings if model.encoder_is_frozen else {},
                    should_stop=should_stop,
                )
            )
    except UserError as error:
        return Pairs(why_none=f"The weights of before or after cannot be loaded any more: {error}")
    if should_stop():
        return Pairs(why_none="The run was asked to stop while they were drawn.")
    ious = comparison.before.iou_actual, comparison.after.iou_actual
    for predicted, wanted, when in zip(masks, ious, ("first", "best"), strict=True):
        for row, k in objects.items():
            if k in predicted and abs(_iou(dataset, k, predicted[k]) - wanted[row]) > _SAME_IOU:
                return Pairs(
                    why_none=f"The weights that are loaded as the {when} ones of this run score "
                    "otherwise than they did: the file has changed since."
                )
    drawn = _draw(dataset, comparison, objects, masks)
    return Pairs({kind: [drawn[r] for r in rows[kind].tolist() if r in drawn] for kind in rows})


def _first_weights(config: TrainConfig) -> dict[str, Tensor]:
    weights = build.load_weights(config, quiet=True)
    if weights is not None:
        return weights
    torch.manual_seed(config.seed)  # as `build_model` does
    assert config.model_type is not None
    return build_sam(config.model_type, config.image_size, attention=config.attention).state_dict()


@torch.no_grad()
def predict(
    model: PromptedSam,
    dataset: Coco2MaskDataset,
    objects: list[int],
    *,
    embeddings: dict[int, Tensor],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[int, CroppedMask]:
    """A model's masks of some objects of a validation split, at the original resolution.

    Args:
        model: On its device.
        dataset: The split; its cached embeddings are used if it has any.
        objects: As indices into the arrays of the dataset's file.
        embeddings: By image, those of this encoder that are known; the others are added.
        should_stop: Asked before each image.

    Returns:
        By object; without those whose image cannot be read any more.
    """
    found: dict[int, CroppedMask] = {}
    index, device = dataset.subset.index, model.sam.device
    by_owner: dict[int, list[int]] = {}
    for k in objects:
        by_owner.setdefault(image_row_of(index, k), []).append(k)
    for owner, own in by_owner.items():
        if should_stop():
            break
        (place,) = np.flatnonzero(dataset.subset.rows == owner).tolist()
        heartbeat.set_activity("drawing image", partial(list, [dataset.subset.file_name(place)]))
        try:
            batch = collate([dataset[place]]).to(device)
        except ImageError:
            continue
        ids = batch.object_ids.tolist()
        own = [k for k in own if int(index.object_ids[k]) in ids]
        part = torch.tensor([ids.index(int(index.object_ids[k])) for k in own], device=device)
        if not own:
            continue
        known = batch.embeddings if batch.embeddings is not None else embeddings.get(owner)
        embeddings[owner] = model.embed(batch.images, batch.input_sizes, cached=known)
        logits, _ = model.decode(embeddings[owner], batch.boxes[part], batch.image_index[part])
        size = model.sam.image_encoder.img_size
        masks = original_masks(logits, image_size=size, **batch.image_sizes)
        found.update(zip(own, masks, strict=True))
    return found


def _iou(dataset: Coco2MaskDataset, k: int, mask: CroppedMask) -> float:
    index = dataset.subset.index
    size = index.sizes[image_row_of(index, k)].tolist()
    return cropped_iou(mask, decode_cropped(index.segmentations[k], *size))


def _draw(
    dataset: Coco2MaskDataset,
    comparison: Comparison,
    objects: dict[int, int],
    masks: list[dict[int, CroppedMask]],
) -> dict[int, ObjectPair]:
    index = dataset.subset.index
    names = class_names(index)
    drawn = {}
    for row, k in objects.items():
        owner = image_row_of(index, k)
        try:
            view = crop_around(
                index.boxes[k], read_image(index.image_folder / index.file_name(owner)), tile=_TILE
            )
        except ImageError:
            continue
        if any(k not in found for found in masks):
            continue
        before, after = (annotate_crop(index, k, view, predicted=found[k]) for found in masks)
        scores = comparison.before.iou_actual[row], comparison.after.iou_actual[row]
        drawn[row] = ObjectPair(
            file_name=index.file_name(owner),
            class_name=names[int(index.categories[k])],
            object_id=int(index.object_ids[k]),
            area=float(comparison.before.areas[row]),
            ious=(float(scores[0]), float(scores[1])),
            tiles=(before, after),
        )
    return drawn


PAGE = "report.html"
_CHOICES = ("category_names", "min_mask_area", "on_bad_image")
_PACKAGES = ("torch", "torchvision", "segment-anything", "numpy", "opencv-python", "torchmetrics")


@dataclass
class RunReport:
    """What is left to do when the last step is done; all of it by rank 0.

    Attributes:
        config: Of the run.
        folder: The output folder.
        splits: Its data.
        gallery: What its validations left.
        best: The best checkpoint, if there is one.
    """

    config: TrainConfig
    folder: Path
    splits: Splits
    gallery: ValidationImages
    best: Checkpoint | None

    def __post_init__(self) -> None:
        rows = self.gallery.objects
        before, after = rows.read(0), rows.read(self.best.step if self.best else None)
        self.comparison: Comparison | None = None
        if before is not None and after is not None:
            self.comparison = compare_objects(before, after)

    def summarise(self, progress: Progress) -> dict[str, Any]:
        """What `summary.json` holds."""
        return summarise_run(
            progress,
            self.best,
            folder=self.folder,
            counts=self.splits.counts,
            config=asdict(self.config),
            comparison=self.comparison,
        )

    def write(
        self, summary: dict[str, Any], model: PromptedSam, *, should_stop: Callable[[], bool]
    ) -> None:
        """Writes report.html and says the last words; no failure of the page is one of the run.

        Args:
            summary: What `summary.json` holds.
            model: On its device; it gets other weights.
            should_stop: Asked before each image.
        """
        commands = self.commands()
        path = self.folder / PAGE
        if self.gallery.has_validation or not path.exists():  # a finished run that is started again
            try:
                write_text(path, render(self._page(summary, model, commands, should_stop)))
            except Exception:
                LOGGER.exception("%s could not be written; all else is whole", path)
        log_summary(summary, self.folder, commands=commands)

    def commands(self) -> list[str]:
        """See `report.next_commands`; none without a checkpoint."""
        if self.best is None:
            return []
        config = self.config
        role, (annotations, images) = find_val(config)
        data = ["--annotations", str(annotations), "--images", str(images)]
        if config.data_root is not None and getattr(config, f"{role}_annotations") is None:
            data = ["--data_root", config.data_root, "--split", getattr(config, f"{role}_split")]
        if role == "train":
            data += ["--val_fraction", str(config.val_fraction)]
        for name in _CHOICES:  # or the score would be of other objects
            if getattr(config, name) != getattr(TrainConfig(), name):
                data += [f"--{name}", str(getattr(config, name))]
        return next_commands(
            str(self.folder / self.best.name),
            data=data,
            images=images,
            annotations=annotations,
            folder=self.folder,
        )

    def _page(
        self,
        summary: dict[str, Any],
        model: PromptedSam,
        commands: list[str],
        should_stop: Callable[[], bool],
    ) -> ReportPage:
        pairs = draw_pairs(
            self.config,
            model,
            self.splits.val,
            comparison=self.comparison,
            checkpoint=self.folder / self.best.name if self.best else None,
            should_stop=should_stop,
        )
        changed, same = settings(self.config)
        config = self.config
        return ReportPage(
            title=f"{config.model_type} on {_data_name(config)}",
            meta=f"{config.image_size} px, {summary['steps']:,} steps, best at step "
            f"{summary['best_step']}, {format_duration(summary['wall_seconds'])}, "
            f"{time.strftime('%Y-%m-%d %H:%M')}, {self.folder}",
            summary=summary,
            metrics=self.gallery.log.read_metrics(),
            comparison=self.comparison,
            sizes=mean_by_size(self.comparison) if self.comparison else [],
            classes=self._classes(),
            pairs=pairs.groups,
            why_no_pairs=pairs.why_none,
            settings=changed,
            defaults=same,
            environment=environment(config, model.sam.device),
            commands=commands,
        )

    def _classes(self) -> list[GroupMeans]:
        if self.comparison is None:
            return []
        index = self.gallery.index
        objects = find_objects(index, self.comparison.before.keys())
        names = class_names(index)
        used = sorted({names[one] for one in np.unique(index.categories[objects]).tolist()})
        place = {one: used.index(name) for one, name in names.items() if name in used}
        labels = np.array(
            [place[one] for one in index.categories[objects].tolist()], dtype=np.int64
        )
        return sorted(
            mean_by_group(self.comparison, labels, used), key=lambda one: -one.num_objects
        )


def settings(config: TrainConfig) -> tuple[list[tuple[str, Any, Any]], list[tuple[str, Any]]]:
    """The settings that differ from the default, with it, and those that do not."""
    changed, same = [], []
    for setting in fields(config):
        value, default = getattr(config, setting.name), setting.default
        if value == default:
            same.append((setting.name, value))
        else:
            changed.append((setting.name, value, "" if default in (None, MISSING) else default))
    return changed, same


def environment(config: TrainConfig, device: torch.device) -> list[tuple[str, str]]:
    """Versions and devices, for the page.

    Args:
        config: Of the run.
        device: Of this process.
    """
    name = f"CPU, {platform.machine()}"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    rows = [
        ("samft", f"{samft.__version__}, commit {git_commit() or 'unknown'}"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("device", name),
        ("processes", str(distributed.get_world_size())),
        ("CPU cores, threads of PyTorch", f"{os.cpu_count()}, {torch.get_num_threads()}"),
        ("amp", str(build.pick_amp_dtype(config.amp, device) or "off")),
    ]
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return rows


def _data_name(config: TrainConfig) -> str:
    place = config.data_root or config.val_annotations or config.train_annotations or ""
    return Path(place).expanduser().resolve().name
