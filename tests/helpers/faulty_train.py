"""`samft.train` with a fault in it, for tests: `SAMFT_TEST_FAULT` says which, where and when.

The fault is JSON: `do` (a key of `FAULTS`), `where` (a key of `PLACES`), `rank`, `at` (number of
the call there, from 1), and `attempt` (of torchrun's restarts; 0). `SAMFT_TEST_IDS` names a file
for the images of each step. `SAMFT_TEST_COMMAND` may name another command. With
`SAMFT_TEST_NCCL`, no rank leaves the group before all others want to, as with NCCL; if it is
`abort`, not even by aborting it.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

import samft.evaluate
import samft.train
from helpers.processes import children_of, descendants_of
from samft.checkpoints import training_state
from samft.cli import run_command
from samft.data.dataset import Coco2MaskDataset
from samft.embeddings.precompute import EncodingPass
from samft.ending import end_process
from samft.evaluation import evaluator, validation
from samft.models.prompted_sam import PromptedSam
from samft.recipes import train as recipe
from samft.runtime.files import write_json
from samft.runtime.signals import stop_on_signal
from samft.training import engine
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


def _freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _term_and_freeze() -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    _freeze()


def _run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def _hang() -> None:
    time.sleep(600)


def _interrupt() -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # for the handler of the first one


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
    "run out of memory": _run_out_of_memory,
    "hang": _hang,
    "freeze": _freeze,
    "interrupt": _interrupt,
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "term the agent": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "term the agent and freeze": _term_and_freeze,
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
    "validation": (validation, "score_image"),
    "save": (training_state, "_write_sidecar"),
    "evaluation": (evaluator, "_evaluate_image"),
    "encoding": (EncodingPass, "_store_all"),
    "start": (recipe, "pick_device"),
    "wrapping": (engine, "wrap_ddp"),
}


def _arm(fault: dict[str, Any]) -> None:
    owner, name = PLACES[fault["where"]]
    stock, calls = getattr(owner, name), 0
    last = fault["at"] + fault.get("times", 1) - 1

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if fault["at"] <= calls <= last:
            print(f"faulty_train: {fault['do']}, {fault['where']}", file=sys.stderr, flush=True)
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


def _leave_as_with_nccl(*, blocks_abort: bool) -> None:
    stock = dist.destroy_process_group

    def wait_for_all(*args: Any, **kwargs: Any) -> None:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
        store.add("leaving", 1)
        while store.add("leaving", 0) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.1)
        stock(*args, **kwargs)

    dist.destroy_process_group = wait_for_all
    if blocks_abort:
        dist.distributed_c10d._abort_process_group = wait_for_all


if __name__ == "__main__":
    fault = json.loads(os.environ.get("SAMFT_TEST_FAULT", "null"))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if fault and fault.get("rank", 0) == RANK and fault.get("attempt", 0) == attempt:
        _arm(fault)
    if os.environ.get("SAMFT_TEST_IDS"):
        _record_ids(Path(os.environ["SAMFT_TEST_IDS"]))
    if nccl := os.environ.get("SAMFT_TEST_NCCL"):
        _leave_as_with_nccl(blocks_abort=nccl == "abort")
    if os.environ.get("SAMFT_TEST_COMMAND") == "evaluate":
        end_process(run_command(samft.evaluate.main))
    with stop_on_signal(samft.train.end_at_once) as stop:
        code = run_command(partial(samft.train.main, stop=stop))
    if codes_dir := os.environ.get("SAMFT_TEST_CODES"):
        write_json(Path(codes_dir, f"{attempt}-{RANK}.json"), code)
    end_process(samft.train.exit_code_for_launcher(code))
