"""What an evaluation writes: all scores as JSON, those of objects as CSV, and a page to look at.

Each replaces only a file of its name that an earlier evaluation wrote.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samft.coco.subset import CocoSubset
from samft.errors import ConfigError
from samft.evaluation.automatic import AutomaticScores, automatic_columns
from samft.evaluation.click_curves import STARTS, has_clicks
from samft.evaluation.coco_ap import category_ids_of
from samft.evaluation.evaluator import OTHER_PROMPTS, EvaluatedObjects
from samft.images.names import encode_name
from samft.reports.click_pictures import ExampleMasks, draw_click_rows
from samft.reports.evaluation_page import (
    EvaluationPage,
    evaluation_figures,
    is_evaluation_page,
    render_evaluation,
)
from samft.runtime.files import write_atomically, write_json, write_text
from samft.runtime.output_dir import create_writable_dir
from samft.runtime.own_files import has_keys

_ID_COLUMNS = ("checkpoint", "file_name", "category", "image_id", "object_id", "area")


@dataclass(frozen=True)
class ScoredCheckpoints:
    """Checkpoints that were scored on the same objects.

    Attributes:
        paths: Of the checkpoints.
        tables: Their rows.
        examples: Their masks after a few clicks on some objects; empty without clicks.
        subset: The images and objects.
        automatic: Scores of automatic masks of each; empty without.
    """

    paths: Sequence[Path]
    tables: Sequence[EvaluatedObjects]
    examples: Sequence[ExampleMasks]
    subset: CocoSubset
    automatic: Sequence[AutomaticScores] = ()


def objects_path(output: Path) -> Path:
    """The CSV file of the scores of single objects, beside the JSON file of `--output`."""
    return output.with_name(f"{output.stem}.objects.csv")


def page_path(output: Path) -> Path:
    """The page with tables, charts and pictures, beside the JSON file of `--output`."""
    return output.with_name(f"{output.stem}.html")


def check_output(output: Path, sources: Sequence[Path]) -> None:
    """Refuses an output that would replace what no evaluation wrote; makes its folder.

    Args:
        output: The JSON file; the others are beside it.
        sources: The annotation file and the checkpoints, which have sidecars.

    Raises:
        ConfigError: The output cannot be written, or is a file of another kind.
    """
    inputs = {path.resolve() for path in sources}
    inputs |= {path.with_suffix(".json").resolve() for path in sources}
    if output.is_dir():
        raise ConfigError(f"--output: {output} is a folder: name a file in it.")
    targets = {
        output: _is_own_report,
        objects_path(output): _is_own_table,
        page_path(output): is_evaluation_page,
    }
    for target in targets:
        if target.resolve() in inputs:
            raise ConfigError(
                f"--output: {target} is an annotation file, a checkpoint or its sidecar: choose "
                "another name."
            )
    for target, is_own in targets.items():
        if target.exists() and not is_own(target):
            raise ConfigError(
                f"--output: {target} exists, and no evaluation of samft has written it: choose "
                "another name."
            )
    create_writable_dir(output.parent, field="--output")


_is_own_report = has_keys("per_mask_iou", "checkpoint", "samft_version")


def _is_own_table(path: Path) -> bool:
    with path.open("rb") as file:
        return file.readline(1000).decode(errors="replace").startswith(",".join(_ID_COLUMNS))


def write_evaluation(
    output: Path,
    report: dict[str, Any],
    scored: ScoredCheckpoints,
    lines: Sequence[str],
    *,
    data: str,
) -> dict[str, str]:
    """Writes the three files.

    Args:
        output: The JSON file.
        report: What it holds: the scores of the first checkpoint, and those of others in `others`.
        scored: What the scores were computed from.
        lines: The tables of the terminal.
        data: Name of the dataset.

    Returns:
        `objects_file` and `page_file`, the names of the other two, which the JSON file holds, too.

    Raises:
        ConfigError: They cannot be written.
    """
    files = {"objects_file": objects_path(output).name, "page_file": page_path(output).name}
    page = EvaluationPage(
        title=f"Evaluation on {data}",
        models=[str(path) for path in scored.paths],
        lines=lines,
        figures=evaluation_figures([report, *report["others"]], scored.tables),
        click_rows=draw_click_rows(scored.subset.index, scored.examples),
    )
    content = encode_name(_format_objects(scored))
    try:
        write_atomically(objects_path(output), lambda file: file.write(content))
        write_text(page_path(output), render_evaluation(page))
        write_json(output, {**report, **files})
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written ({error.strerror}).") from error
    return files


def file_names(subset: CocoSubset) -> dict[int, str]:
    """The file name of each image, by its id."""
    return {subset.image_id(row): subset.file_name(row) for row in range(subset.num_images)}


def ids_as_written(subset: CocoSubset) -> dict[int, int | str]:
    """The id of each image as it stands in the annotation file, by its id in the index."""
    index = subset.index
    return dict(zip(index.image_ids.tolist(), index.image_ids_as_written(), strict=True))


def _format_objects(scored: ScoredCheckpoints) -> str:
    # The CSV file of the scores of single objects.
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    others = [f"iou_{name}" for name in OTHER_PROMPTS]
    scores = ("iou_actual", "iou_predicted", "dice", "iou_boundary", "iou_box_fill", *others)
    tables, subset = scored.tables, scored.subset
    starts = STARTS if has_clicks(tables[0]) else ()
    names, image_ids = file_names(subset), ids_as_written(subset)
    automatic: Sequence[AutomaticScores | None] = scored.automatic or [None] * len(tables)
    for checkpoint, table, masks in zip(scored.paths, tables, automatic, strict=True):
        categories = category_ids_of(subset, table.object_ids).tolist()
        columns = {name: getattr(table, name).tolist() for name in scores}
        for start in starts:
            columns |= start.columns(table)
        columns |= automatic_columns(masks, table) if masks else {}
        if table is tables[0]:
            writer.writerow([*_ID_COLUMNS, *columns])
        ids = [column.tolist() for column in (table.image_ids, table.object_ids, table.areas)]
        for category, *row in zip(categories, *ids, *columns.values(), strict=True):
            category_name = subset.index.category_names[category]
            image_id = image_ids[row[0]]
            writer.writerow([checkpoint, names[row[0]], category_name, image_id, *row[1:]])
    return text.getvalue()
