"""The results of the quality lab: a line of `rows.jsonl` and a file of scores for each run.

A row is used again only by a run of the same request, packaged weights and settings. So a new
`vit_tiny` or a changed default never mixes with what was measured before it; changed code does, so
start a new folder for it.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality_recipes import RunRequest
from benchmarks.quality_scores import RunScores, read_scores
from samft.runtime.files import sha256_of
from samft.weights.download import PACKAGED_TINY

Row = dict[str, Any]
ROWS_NAME = "rows.jsonl"


class RowStore:
    """The rows of a folder; several processes may add some at the same time.

    Args:
        folder: Of the lab, created if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / ROWS_NAME
        self.weights = sha256_of(PACKAGED_TINY)

    def read_rows(self) -> list[Row]:
        """All rows, of whatever weights, in the order in which they were added."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:  # of a process that was killed, or a disk that was full: run again
                continue
        return rows

    def find_row(self, request: RunRequest) -> Row | None:
        """The newest row of a request with these weights and settings; None if it has not run."""
        key, settings = self._key(request), request.learnt_settings(self.folder)
        for row in reversed(self.read_rows()):
            is_same_run = all(row.get(name) == value for name, value in key.items())
            # A setting that is newer than the row had no part in it.
            old = row.get("settings", {})
            if is_same_run and all(settings.get(name, old[name]) == old[name] for name in old):
                return row
        return None

    def add_row(self, request: RunRequest, scores: RunScores, **facts: Any) -> Row:
        """Writes the scores of a run, then its row.

        Args:
            request: What was run.
            scores: Of its validation objects.
            facts: What else the row says.
        """
        settings = request.learnt_settings(self.folder)
        key = self._key(request)
        digest = hashlib.sha256(json.dumps([key, settings], sort_keys=True).encode()).hexdigest()
        name = f"{request.dataset}-{request.recipe}-{request.seed}-{digest[:12]}.npz"
        scores.write(self.folder / "scores" / name)
        row = {**key, **scores.summarise(), **facts, "scores": name, "settings": settings}
        line = json.dumps(row) + "\n"
        # In one write at the end of the file, wherever another process has moved it.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
        return row

    def read_scores(self, row: Row) -> RunScores:
        """The scores of the single objects of a row."""
        return read_scores(self.folder / "scores" / row["scores"])

    def _key(self, request: RunRequest) -> Row:
        return {**asdict(request), "weights": self.weights}
