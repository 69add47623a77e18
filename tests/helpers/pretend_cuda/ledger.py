"""What the harness observes in a process, and the report of it."""

import contextlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any


@dataclass(frozen=True, order=True)
class Place:
    """The innermost line of the packages under test that led to something."""

    file: str  # as in samft/training/engine.py; empty where no such line did, in autograd's threads
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}" if self.file else "elsewhere"


@dataclass(frozen=True, order=True)
class Wait:
    """The host waits for the device, or may have to."""

    kind: str
    place: Place

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}"


@dataclass(frozen=True, order=True)
class Collective:
    """A collective operation, and on tensors of which devices."""

    name: str
    devices: str
    place: Place


@dataclass
class StepReport:
    """One step of the trainer, by the threads that compute it: not prefetching, not saving.

    Attributes:
        launches: Kernels that the host launches, about, by operation; a replayed graph is one.
        captured: Those within replayed CUDA graphs, which cost the host nothing.
        waits: Times that the host waits for the device.
    """

    launches: Counter[str] = field(default_factory=Counter)
    captured: Counter[str] = field(default_factory=Counter)
    waits: Counter[Wait] = field(default_factory=Counter)

    @property
    def num_launches(self) -> int:
        """Kernels that the host launches."""
        return sum(self.launches.values())

    def functions_that_wait(self) -> list[str]:
        """Each wait as `samft/training/engine.py _update: item`, sorted, as often as it occurs."""
        return sorted(
            f"{wait.place.file or 'elsewhere'} {wait.place.function}: {wait.kind}"
            for wait in self.waits.elements()
        )


@dataclass
class CudaReport:
    """All that one process did with its device.

    Attributes:
        faults: What would fail, or be wrong, on a GPU.
        waits: Of the whole process, inside of steps and outside.
        collectives: With the devices of their tensors.
        attention: Shapes and types that scaled_dot_product_attention was given.
        steps: Steps of the trainer, in order.
        launches: Outside of steps.
    """

    faults: Counter[str] = field(default_factory=Counter)
    waits: Counter[Wait] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)
    steps: list[StepReport] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)

    def write(self, path: Path) -> None:
        """Writes the report as JSON."""
        document = {
            "faults": self.faults,
            "waits": _rows(self.waits),
            "collectives": _rows(self.collectives),
            "attention": self.attention,
            "steps": [
                {"launches": s.launches, "captured": s.captured, "waits": _rows(s.waits)}
                for s in self.steps
            ],
            "launches": self.launches,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "CudaReport":
        """Reads what `write` wrote."""
        document = json.loads(path.read_text())
        return cls(
            faults=Counter(document["faults"]),
            waits=_waits(document["waits"]),
            collectives=Counter(
                {
                    Collective(row["name"], row["devices"], Place(**row["place"])): row["times"]
                    for row in document["collectives"]
                }
            ),
            attention=Counter(document["attention"]),
            steps=[
                StepReport(
                    Counter(step["launches"]), Counter(step["captured"]), _waits(step["waits"])
                )
                for step in document["steps"]
            ],
            launches=Counter(document["launches"]),
        )

    def __str__(self) -> str:
        parts = [
            ("FAULTS", self.faults),
            ("HOST WAITS", self.waits),
            ("ATTENTION", self.attention),
            ("COLLECTIVES", self.collectives),
            ("LAUNCHES", Counter({f"step {i}": s.num_launches for i, s in enumerate(self.steps)})),
        ]
        lines = []
        for title, counter in parts:
            lines += [f"--- {title}", *(f"{n:6d}  {what}" for what, n in counter.most_common())]
        return "\n".join(lines)


class Ledger:
    """Writes down what happens in this process; `report` is read at its end.

    Attributes:
        report: What was observed up to now.
        watched: Packages whose lines are named.
    """

    def __init__(self, watched: tuple[str, ...] = ("samft", "benchmarks")) -> None:
        self.report = CudaReport()
        self.watched = watched
        self._step: StepReport | None = None
        self._captured: Counter[str] | None = None

    def fault(self, text: str) -> None:
        """Writes down what a GPU would not have done, or not so."""
        self.report.faults[f"{text} at {self.find_place()}"] += 1

    def wait(self, kind: str) -> None:
        """Writes down that the host waits for the device.

        Raises:
            RuntimeError: Work is being captured in a CUDA graph, where nothing may wait.
        """
        wait = Wait(kind, self.find_place())
        if self._captured is not None and self._in_step_thread():
            self.fault(f"{kind} during the capture of a CUDA graph")
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.report.waits[wait] += 1
        if self._step is not None and self._in_step_thread():
            self._step.waits[wait] += 1

    def launch(self, name: str, times: int = 1) -> None:
        """Writes down kernels; within `capture` they are recorded, not launched."""
        if not times:
            return
        counter = self.report.launches
        if self._in_step_thread():
            if self._captured is not None:
                counter = self._captured
            elif self._step is not None:
                counter = self._step.launches
        counter[name] += times

    def replay(self, captured: Counter[str]) -> None:
        """Writes down the launch of a captured CUDA graph, which holds these kernels."""
        self.launch("graph replay")
        if self._step is not None:
            self._step.captured += captured

    def collective(self, name: str, devices: set[str]) -> None:
        """Writes down a collective operation on tensors of these devices."""
        where = "+".join(sorted(devices)) or "none"
        self.report.collectives[Collective(name, where, self.find_place())] += 1

    def attention(self, text: str) -> None:
        """Writes down how attention was called."""
        self.report.attention[f"{text} at {self.find_place()}"] += 1

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """What happens within belongs to one step of the trainer."""
        self._step = StepReport()
        self.report.steps.append(self._step)
        try:
            yield
        finally:
            self._step = None

    @property
    def is_capturing(self) -> bool:
        """Whether work of this thread is captured in a CUDA graph."""
        return self._captured is not None and self._in_step_thread()

    @contextlib.contextmanager
    def capture(self) -> Iterator[Counter[str]]:
        """Work within is captured in a CUDA graph: not launched now, and nothing may wait.

        Yields:
            The kernels that are captured, for `replay`.
        """
        self._captured = Counter()
        try:
            yield self._captured
        finally:
            self._captured = None

    def find_place(self) -> Place:
        """The innermost line of a watched package on this thread's stack."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name = _module_of(frame.f_globals)
            if name.split(".")[0] in self.watched:
                file = f"{name.replace('.', '/')}.py"
                return Place(file, frame.f_lineno, frame.f_code.co_name)
            frame = frame.f_back
        return Place("", 0, "")

    @staticmethod
    def is_called_by(package: str) -> bool:
        """Whether a function of a package is on this thread's stack."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if f"{_module_of(frame.f_globals)}.".startswith(f"{package}."):
                return True
            frame = frame.f_back
        return False

    @staticmethod
    def _in_step_thread() -> bool:
        # Autograd's threads belong to the step; those that Python code started (prefetching,
        # saving) do work of their own beside it.
        thread = threading.current_thread()
        is_main = thread is threading.main_thread()
        return is_main or isinstance(thread, threading._DummyThread)


def _module_of(names: dict[str, Any]) -> str:
    name, spec = names.get("__name__") or "", names.get("__spec__")
    return spec.name if name == "__main__" and spec is not None else name


def _rows(counter: Counter[Any]) -> list[dict[str, Any]]:
    return [{**asdict(what), "times": times} for what, times in counter.items()]


def _waits(rows: list[dict[str, Any]]) -> Counter[Wait]:
    return Counter({Wait(row["kind"], Place(**row["place"])): row["times"] for row in rows})


LEDGER = Ledger()
