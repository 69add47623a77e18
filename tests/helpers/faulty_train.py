"""`samft.train` with a fault in it, for tests: `SAMFT_TEST_FAULT` says which, where and when.

The fault is JSON: `do` (a key of `FAULTS`), `where` (a key of `PLACES`), `rank`, `at` (number of
the call there, from 1), and `attempt` (of torchrun's restarts; 0). `SAMFT_TEST_IDS` names a file
for the images of each step.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

import samft.train
from helpers.processes import children_of, descendants_of
from samft.checkpoints import training_state
from samft.cli import run_command
from samft.data.dataset import Coco2MaskDataset
from samft.evaluation import validation
from samft.models.prompted_sam import PromptedSam
from samft.runtime.files import write_json
from samft.training.engine import Trainer

RANK = int(os.environ.get("RANK", "0"))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_everything() -> None:
    agent = os.getppid()
    others = [pid for pid in children_of(agent) if pid != os.getpid()]
    for pid in [agent, *others, os.getpid()]:
        os.kill(pid, signal.SIGKILL)


def _send_to_all(number: int) -> None:
    agent = os.getppid()
    for pid in [*descendants_of(agent), agent]:
        os.kill(pid, number)


def _raise() -> None:
    raise ZeroDivisionError("a planted bug")


def _hang() -> None:
    time.sleep(600)


def _send_later(pid: int, number: int) -> Callable[[], None]:
    # A signal while the place is still busy.
    def send() -> None:
        threading.Timer(0.5, os.kill, (pid, number)).start()
        time.sleep(1.5)

    return send


def _limit_files() -> None:
    for thread in threading.enumerate():
        if thread.name == "saving":  # what came before is to be whole
            thread.join()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def _plant_nan() -> None:
    raise _NotFinite


class _NotFinite(Exception):
    pass


FAULTS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "kill everything": _kill_everything,
    "kill agent": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "kill a worker": lambda: os.kill(children_of(os.getpid())[0], signal.SIGKILL),
    "raise": _raise,
    "hang": _hang,
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "term the agent": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "term the agent soon": _send_later(os.getppid(), signal.SIGTERM),
    "term everything": lambda: _send_to_all(signal.SIGTERM),
    "usr1 the agent": lambda: os.kill(os.getppid(), signal.SIGUSR1),
    "limit files": _limit_files,
    "nan": _plant_nan,
}
PLACES: dict[str, tuple[Any, str]] = {
    "step": (Trainer, "train_step"),
    "update": (Trainer, "_update"),
    "forward": (PromptedSam, "forward"),
    "dataset": (Coco2MaskDataset, "__getitem__"),
    "validation": (validation, "_score_image"),
    "save": (training_state, "_write_sidecar"),
}


def _arm(fault: dict[str, Any]) -> None:
    owner, name = PLACES[fault["where"]]
    stock, calls = getattr(owner, name), 0
    last = fault["at"] + fault.get("times", 1) - 1

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if fault["at"] <= calls <= last:
            try:
                FAULTS[fault["do"]]()
            except _NotFinite:
                parameter = next(p for p in args[0].parameters if p.grad is not None)
                parameter.grad[(0,) * parameter.ndim] = torch.nan
        return stock(*args, **kwargs)

    setattr(owner, name, faulty)


def _record_ids(path: Path) -> None:
    stock = Trainer.train_step

    def recording(trainer: Trainer, micro_batches: Any) -> bool:
        ids = [int(id) for batch in micro_batches for id in batch.image_ids]
        with path.with_name(f"{path.name}-{RANK}").open("a") as file:
            file.write(json.dumps({"step": trainer.progress.step, "ids": ids}) + "\n")
        return stock(trainer, micro_batches)

    Trainer.train_step = recording  # type: ignore[method-assign]


if __name__ == "__main__":
    fault = json.loads(os.environ.get("SAMFT_TEST_FAULT", "null"))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if fault and fault.get("rank", 0) == RANK and fault.get("attempt", 0) == attempt:
        _arm(fault)
    if os.environ.get("SAMFT_TEST_IDS"):
        _record_ids(Path(os.environ["SAMFT_TEST_IDS"]))
    code = run_command(samft.train.main)
    if codes_dir := os.environ.get("SAMFT_TEST_CODES"):
        write_json(Path(codes_dir, f"{attempt}-{RANK}.json"), code)
    sys.exit(samft.train.exit_code_for_launcher(code))
