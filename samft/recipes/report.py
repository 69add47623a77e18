"""What a run leaves at its end: summary.json, report.html, and the commands to continue with."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import samft
from samft import distributed
from samft.checkpoints.top_k import Checkpoint, git_commit
from samft.config import TrainConfig
from samft.evaluation.click_curves import compare_clicks, summarise_clicks
from samft.evaluation.object_scores import (
    Comparison,
    GroupMeans,
    compare_objects,
    mean_by_group,
    mean_by_size,
)
from samft.models.prompted_sam import PromptedSam
from samft.recipes.datasets import Splits, find_val_files
from samft.recipes.qualitative_examples import ClickedObjects, draw_examples
from samft.reports.click_pictures import draw_click_rows
from samft.reports.evaluation_page import click_figures
from samft.reports.page import ReportPage, render
from samft.reports.summary import loading_line, log_summary, next_commands, summarise_run
from samft.reports.validation_images import (
    ValidationImages,
    draw_before_and_after,
    find_objects,
)
from samft.runtime.device import pick_amp_dtype
from samft.runtime.files import write_text
from samft.runtime.logs import LOGGER, format_duration
from samft.training.custom import CustomParts
from samft.training.engine import Progress

FILE_NAME = "report.html"
# Flags of `samft.evaluate` that decide which objects are scored.
_SELECTING_FLAGS = ("category_names", "min_mask_area", "crowds", "on_bad_image", "allow_links")
_PACKAGES = ("torch", "torchvision", "segment-anything", "numpy", "opencv-python", "torchmetrics")


@dataclass(frozen=True)
class RunReport:
    """The report of a run that has taken its last step.

    Attributes:
        config: Of the run.
        output_dir: The output folder.
        splits: Its data.
        images: The pictures and the scores of single objects of its validations.
        best: The best checkpoint; None if there is none.
        test: See `final_test.score_test_split`.
        general: See `final_test.score_general_set`.
        has_news: Whether this start of the run has validated or tested; False: an earlier one had
            finished it.
        custom: What the caller has brought along.
    """

    config: TrainConfig
    output_dir: Path
    splits: Splits
    images: ValidationImages
    best: Checkpoint | None
    custom: CustomParts
    test: dict[str, Any] | None = None
    general: dict[str, Any] | None = None
    has_news: bool = True

    @cached_property
    def comparison(self) -> Comparison | None:
        """The objects at step 0 and at the best step; None unless the scores of both are known."""
        scores = self.images.per_object_log
        before, after = scores.read(0), scores.read(self.best.step if self.best else None)
        if before is None or after is None:
            return None
        for table in (before, after):
            objects = find_objects(self.images.index, table.keys())
            if not np.array_equal(self.images.index.object_ids[objects], table.object_ids):
                LOGGER.warning("%s has objects that the data has not: not used", scores.path)
                return None
        return compare_objects(before, after)

    def summarise(self, progress: Progress) -> dict[str, Any]:
        """What `summary.json` holds."""
        return summarise_run(
            progress,
            self.best,
            folder=self.output_dir,
            counts=self.splits.counts,
            config=asdict(self.config),
            defaults=asdict(TrainConfig()),
            small_objects=self.splits.small_objects,
            comparison=self.comparison,
            test=self.test,
            general=self.general,
            has_files=self.splits.val.subset.index.has_files,
        )

    def write(
        self, summary: dict[str, Any], model: PromptedSam, *, should_stop: Callable[[], bool]
    ) -> None:
        """Writes report.html and logs the summary; a rendering error is logged, not raised.

        Args:
            summary: What `summary.json` holds.
            model: On its device; it gets other weights.
            should_stop: Asked before each image that is drawn.
        """
        commands = self.next_commands()
        path = self.output_dir / FILE_NAME
        if self.has_news or not path.exists():
            try:
                page = self._build_page(summary, model, commands, should_stop=should_stop)
                write_text(path, render(page))
            except OSError as error:  # a full disk, say
                LOGGER.error("%s cannot be written: %s", path, error.strerror or error)
            except Exception:
                LOGGER.exception("%s could not be written; all other files are complete", path)
        draw_before_and_after(
            self.output_dir,
            before=summary["baseline_val_per_mask_iou"],
            after=summary["best_val_per_mask_iou"],
        )
        log_summary(summary, self.output_dir, commands=commands)

    def next_commands(self) -> list[str]:
        """See `summary.next_commands`; none without a checkpoint."""
        if self.best is None:
            return []
        config, checkpoint = self.config, str(self.output_dir / self.best.name)
        if not self.splits.val.subset.index.has_files:  # no command can read these
            return [loading_line(checkpoint)]
        split, (annotations, images) = find_val_files(config)
        data = ["--annotations", str(annotations), "--images", str(images)]
        if config.data_root is not None and getattr(config, f"{split}_annotations") is None:
            data = ["--data_root", config.data_root, "--split", getattr(config, f"{split}_split")]
        if split == "train":
            data += ["--val_fraction", str(config.val_fraction)]
            if config.group_by != TrainConfig().group_by:
                data += ["--group_by", config.group_by]
        for name in _SELECTING_FLAGS:
            if getattr(config, name) != getattr(TrainConfig(), name):
                data += [f"--{name}", str(getattr(config, name))]
        return next_commands(
            checkpoint,
            data=data,
            images=images,
            annotations=annotations,
            links=self._links_of_predict(),
            folder=self.output_dir,
        )

    def _links_of_predict(self) -> list[str]:
        # `samft.predict` knows no data_root, below which images may be elsewhere, too.
        config, subset = self.config, self.splits.val.subset
        folders = [config.allow_links] if config.allow_links else []
        leave_folder = (
            subset.file_name(i).startswith("../") or subset.path(i).is_symlink()
            for i in range(subset.num_images)
        )
        if config.data_root and any(leave_folder):
            folders.append(config.data_root)
        return ["--allow_links", ",".join(folders)] if folders else []

    def _build_page(
        self,
        summary: dict[str, Any],
        model: PromptedSam,
        commands: list[str],
        *,
        should_stop: Callable[[], bool],
    ) -> ReportPage:
        config = self.config
        examples = draw_examples(
            config,
            model,
            self.splits.val,
            comparison=self.comparison,
            checkpoint=self.output_dir / self.best.name if self.best else None,
            should_stop=should_stop,
        )
        changed, unchanged = split_by_default(config)
        if self.custom.loss_name is not None:
            changed.append(("loss", self.custom.loss_name, "samft's own"))
        return ReportPage(
            title=f"{config.model_type} on {dataset_name(config, self.custom)}",
            meta=f"{config.image_size} px, {summary['steps']:,} steps, best at step "
            f"{summary['best_step']}, {format_duration(summary['wall_seconds'])}, "
            f"{time.strftime('%Y-%m-%d %H:%M')}, {self.output_dir}",
            summary=summary,
            metrics=self.images.log.read_metrics(),
            comparison=self.comparison,
            sizes=mean_by_size(self.comparison) if self.comparison else [],
            classes=self._group_by_class(),
            pairs=examples.pairs,
            why_no_pairs=examples.why_none,
            **self._click_fields(examples.clicked),
            settings=changed,
            defaults=unchanged,
            environment=describe_environment(config, model.sam.device),
            commands=commands,
        )

    def _click_fields(self, clicked: list[ClickedObjects]) -> dict[str, Any]:
        # What the page shows of objects that both models' masks were corrected of by clicks.
        if len(clicked) != 2:
            return {}
        comparison = compare_objects(*(one.scores for one in clicked))
        tables, seed = (comparison.before, comparison.after), self.config.seed
        if not len(tables[0]):
            return {}
        num_images = len(np.unique(tables[0].image_ids))
        return {
            "clicked": f"{len(tables[0])} objects of {num_images} images",
            "click_figures": click_figures(
                [summarise_clicks(table, seed=seed) for table in tables],
                changes=compare_clicks(*tables, seed=seed),
            ),
            "click_rows": draw_click_rows(self.images.index, [one.masks for one in clicked]),
        }

    def _group_by_class(self) -> list[GroupMeans]:
        if self.comparison is None:
            return []
        index = self.images.index
        objects = find_objects(index, self.comparison.before.keys())
        categories = index.categories[objects]
        names = index.category_names
        used = sorted({names[category] for category in np.unique(categories).tolist()})
        # By name: two categories of one name are one class.
        label_of = {name: label for label, name in enumerate(used)}
        labels = [label_of[names[category]] for category in categories.tolist()]
        groups = mean_by_group(self.comparison, np.array(labels, dtype=np.int64), used)
        return sorted(groups, key=lambda group: -group.num_objects)


def split_by_default(
    config: TrainConfig,
) -> tuple[list[tuple[str, Any, Any]], list[tuple[str, Any]]]:
    """Splits a configuration into settings that differ from their default, and the others.

    Returns:
        (name, value, default) of those that differ; (name, value) of the others.
    """
    changed, unchanged = [], []
    for field in fields(config):
        value, default = getattr(config, field.name), field.default
        if value == default:
            unchanged.append((field.name, value))
        else:
            changed.append((field.name, value, "" if default in (None, MISSING) else default))
    return changed, unchanged


def describe_environment(config: TrainConfig, device: torch.device) -> list[tuple[str, str]]:
    """Versions, devices and precision of a run, as names and values.

    Args:
        config: Of the run.
        device: Of this process.
    """
    device_name = f"CPU, {platform.machine()}"
    if device.type == "cuda":
        device_name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    rows = [
        ("samft", f"{samft.__version__}, commit {git_commit() or 'unknown'}"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("device", device_name),
        ("processes", str(distributed.get_world_size())),
        ("CPU cores, threads of PyTorch", f"{os.cpu_count()}, {torch.get_num_threads()}"),
        ("amp", str(pick_amp_dtype(config.amp, device) or "off")),
    ]
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return rows


def dataset_name(config: TrainConfig, custom: CustomParts) -> str:
    """The name of a run's data, for people: of a caller's class, a folder or an annotation file."""
    for dataset in (custom.val_data, custom.train_data):
        if dataset is not None:
            return type(dataset).__name__
    path = Path(config.data_root or config.train_annotations or "").expanduser().resolve()
    if config.data_root:
        return path.name
    # Exports of Roboflow have files of one name: DATASET/train/_annotations.coco.json.
    return path.parents[1].name if path.name.startswith("_") else path.stem
