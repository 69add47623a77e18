"""The end of a run: both models compared, the summary, and report.html."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import samft
from samft import distributed
from samft.checkpoints.top_k import BestCheckpoint, git_commit
from samft.coco.repair import class_names
from samft.config import TrainConfig
from samft.evaluation.comparison import Comparison, Group, compare, group_by, group_by_size
from samft.models.prompted_sam import PromptedSam
from samft.recipes import build as assemble
from samft.recipes.before_after import draw_pairs
from samft.recipes.datasets import Splits, find_val
from samft.reports.gallery import Gallery, find_objects
from samft.reports.report_page import Page, render
from samft.reports.summary import next_commands, report, summarise
from samft.runtime.files import write_text
from samft.runtime.logs import LOGGER, format_duration
from samft.training.progress import Progress

PAGE = "report.html"
_CHOICES = ("category_names", "min_mask_area", "on_bad_image")
_PACKAGES = ("torch", "torchvision", "segment-anything", "numpy", "opencv-python", "torchmetrics")


@dataclass
class Ending:
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
    gallery: Gallery
    best: BestCheckpoint | None

    def __post_init__(self) -> None:
        rows = self.gallery.objects
        before, after = rows.read(0), rows.read(self.best.step if self.best else None)
        self.comparison: Comparison | None = None
        if before is not None and after is not None:
            self.comparison = compare(before, after)

    def summarise(self, progress: Progress) -> dict[str, Any]:
        """What `summary.json` holds."""
        return summarise(
            progress,
            self.best,
            folder=self.folder,
            counts=self.splits.counts,
            config=asdict(self.config),
            comparison=self.comparison,
        )

    def tell(
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
        if self.gallery.has_new or not path.exists():  # a finished run that is started again
            try:
                write_text(path, render(self._page(summary, model, commands, should_stop)))
            except Exception:
                LOGGER.exception("%s could not be written; all else is whole", path)
        report(summary, self.folder, commands=commands)

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
    ) -> Page:
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
        return Page(
            title=f"{config.model_type} on {_data_name(config)}",
            meta=f"{config.image_size} px, {summary['steps']:,} steps, best at step "
            f"{summary['best_step']}, {format_duration(summary['wall_seconds'])}, "
            f"{time.strftime('%Y-%m-%d %H:%M')}, {self.folder}",
            summary=summary,
            metrics=self.gallery.log.read_metrics(),
            comparison=self.comparison,
            sizes=group_by_size(self.comparison) if self.comparison else [],
            classes=self._classes(),
            pairs=pairs.groups,
            no_pairs=pairs.why_none,
            settings=changed,
            defaults=same,
            environment=environment(config, model.sam.device),
            commands=commands,
        )

    def _classes(self) -> list[Group]:
        if self.comparison is None:
            return []
        file = self.gallery.file
        objects = find_objects(file, self.comparison.before.keys())
        names = class_names(file)
        used = sorted({names[one] for one in np.unique(file.categories[objects]).tolist()})
        place = {one: used.index(name) for one, name in names.items() if name in used}
        labels = np.array([place[one] for one in file.categories[objects].tolist()], dtype=np.int64)
        return sorted(group_by(self.comparison, labels, used), key=lambda one: -one.num_objects)


def settings(config: TrainConfig) -> tuple[list[tuple[str, Any, Any]], list[tuple[str, Any]]]:
    """The settings that differ from the default, with it, and those that do not."""
    changed, same = [], []
    for field in fields(config):
        value, default = getattr(config, field.name), field.default
        if value == default:
            same.append((field.name, value))
        else:
            changed.append((field.name, value, "" if default in (None, MISSING) else default))
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
        ("amp", str(assemble.pick_amp_dtype(config.amp, device) or "off")),
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
