"""`objects.json`: how good each validated object was at step 0 and at the best steps."""

import json
from pathlib import Path
from typing import Any

from samft.evaluation.scores import ObjectScores
from samft.runtime.files import write_text
from samft.runtime.logs import LOGGER

NAME = "objects.json"
_NUM_BEST = 2  # the best, and the one before it, which a resume from an older state may go back to


class ObjectLog:
    """The rows of step 0 and of the best validations, in a file that a resumed run goes on with."""

    def __init__(self, folder: Path, *, found: Path, start_step: int) -> None:
        """Reads what an earlier start left, and forgets what came after its checkpoint.

        Args:
            folder: The output folder.
            found: The folder of the run that is resumed; `folder` of a fresh one.
            start_step: The step that the run goes on from.
        """
        self.path = folder / NAME
        self._steps: dict[int, ObjectScores] = {}
        try:
            known = json.loads((found / NAME).read_text()).items()
            rows = {int(step): ObjectScores.from_json(columns) for step, columns in known}
            self._steps = {step: scores for step, scores in rows.items() if step <= start_step}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # as good as none: only pictures and comparisons hang on it

    def note(self, step: int, objects: ObjectScores) -> bool:
        """Writes the rows of a validation if it is the first, or the best of those that followed.

        Returns:
            Whether it is the best after step 0 so far; of equals the earlier.
        """
        self._steps.pop(step, None)  # a step may be repeated
        ranked = self._ranked({**self._steps, step: objects})
        is_best = bool(ranked) and ranked[0] == step
        if not is_best and step != 0:
            return False
        kept = {0, *ranked[:_NUM_BEST]}
        known = {**self._steps, step: objects}
        self._steps = {number: known[number] for number in sorted(known) if number in kept}
        document: dict[int, Any] = {n: scores.to_json() for n, scores in self._steps.items()}
        try:
            write_text(self.path, json.dumps(document) + "\n")
        except OSError as error:
            LOGGER.error("%s cannot be written: %s", self.path, error.strerror)
        return is_best

    def _ranked(self, steps: dict[int, ObjectScores]) -> list[int]:
        scores = {n: float(rows.iou_actual.mean()) for n, rows in steps.items() if n and len(rows)}
        return sorted(scores, key=lambda n: (-scores[n], n))

    def read(self, step: int | None) -> ObjectScores | None:
        """The rows of a step; None if they are not known."""
        return None if step is None else self._steps.get(step)
