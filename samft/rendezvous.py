"""How the processes of one start find each other, through the store of `torchrun`."""

import json
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from samft.errors import ConfigError, RunStopped, TrainingError

# At the start, and while rank 0 reads a large dataset or saves a large model.
LONG_TIMEOUT = timedelta(minutes=30)
_POLL_SECONDS = 0.05


def agree_on_start_id(
    store: dist.Store,
    rank: int,
    world_size: int,
    *,
    problem: str = "",
    device: str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Agrees on an id that no other start has. Collective: every rank must call.

    `torchrun` keeps its store when it restarts the processes, with the addresses of the previous
    ones in it, and hosts may count restarts differently. So rank 0 makes an id up and publishes it
    as the epoch. The other ranks answer under that id with a token of their own, and take it once
    rank 0 has published their answer: an epoch that a previous rank 0 has left in the store never
    has it.

    Args:
        store: Of all ranks.
        rank: Of this process.
        world_size: Number of processes.
        problem: Why this process cannot start; empty if it can.
        device: The type of its device.
        should_stop: Asked several times a second while the others are waited for.

    Returns:
        The id.

    Raises:
        ConfigError: The problem of the lowest rank that has one, or that devices differ; on every
            rank, as the others would wait in vain.
        RunStopped: `should_stop` said so.
        TrainingError: The others did not come within `LONG_TIMEOUT`.
    """
    wait = partial(_wait_for_key, store, should_stop=should_stop)
    token = uuid.uuid4().hex
    answer = json.dumps([token, problem, device])
    if rank == 0:
        store.set("epoch", token)
        answers = [answer, *(wait(f"{token}/{other}") for other in range(1, world_size))]
        store.set(f"{token}/all", json.dumps(answers))
        return _check_answers(token, answers)
    while True:
        epoch = wait("epoch")
        store.set(f"{epoch}/{rank}", answer)
        if store.check([f"{epoch}/all"]):
            answers = json.loads(wait(f"{epoch}/all"))
            if answer in answers:
                return _check_answers(epoch, answers)
        if should_stop():
            raise _stopped()
        time.sleep(_POLL_SECONDS)


def _check_answers(start_id: str, answers: list[str]) -> str:
    problems: list[str] = []
    devices: dict[str, int] = {}
    for rank, (_, problem, device) in enumerate(map(json.loads, answers)):
        problems += [problem] if problem else []
        devices.setdefault(device, rank)
    if problems:
        raise ConfigError(problems[0])
    if len(devices) > 1:
        places = " and ".join(f"process {rank} on {device}" for device, rank in devices.items())
        raise ConfigError(
            f"device: all processes need devices of one type, but {places}: look for the GPUs of "
            "the hosts (nvidia-smi), or compute without them: --device cpu."
        )
    return start_id


def _wait_for_key(store: dist.Store, key: str, *, should_stop: Callable[[], bool]) -> str:
    # `store.get` would wait in C++, where Python calls no signal handler.
    deadline = time.monotonic() + LONG_TIMEOUT.total_seconds()
    while not store.check([key]):
        if should_stop():
            raise _stopped()
        if time.monotonic() > deadline:
            raise TrainingError(
                "not all processes have started within half an hour: look for the first error of "
                "the others, on every host."
            )
        time.sleep(_POLL_SECONDS)
    return store.get(key).decode()


def _stopped() -> RunStopped:
    return RunStopped("stopped before the start: not all processes had begun.")
