"""Process-group helpers: start and shutdown, collectives, errors on all ranks, DDP.

All of them also work in a single process without a group. Flags and counts are exchanged over gloo,
so they are on the CPU; gradients over NCCL where there are GPUs. While a process waits for others,
it looks for signals, and for what another process has reported: see `set_wait_check`.
"""

import contextlib
import inspect
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from samft.ending import end_in_background, wait_for_endings
from samft.errors import (
    CollectiveError,
    ConfigError,
    SharedError,
    TrainingError,
    UserError,
    is_out_of_memory,
)
from samft.rendezvous import LONG_TIMEOUT, agree_on_start_id

T = TypeVar("T")

POLL_SECONDS = 0.1  # between two looks for signals and failures in a wait for other ranks
_EVENT_SECONDS = 1e-4  # between two looks whether a GPU has come to an event
# NCCL ends the process without a word when its own timeout is over, so ours comes before.
_NCCL_SECONDS = 60.0


@dataclass(frozen=True)
class _StartedGroup:
    # What `start` has set up beside torch's default group. `start_id` is the same on all ranks, and
    # different after every restart; `step_group` has the shorter timeout of training steps, which
    # is `step_seconds`.
    start_id: str
    step_group: dist.ProcessGroup | None
    step_seconds: float | None


# Set by `start` and cleared by `shutdown`; torch keeps the default group in the same way.
_started_group: _StartedGroup | None = None


# Of this process, as the group is.
_check_wait: Callable[[float], None] | None = None


def set_wait_check(check: Callable[[float], None] | None) -> None:
    """Has a function called about ten times a second while this process waits for other ranks.

    Args:
        check: Takes the seconds that the wait has lasted; may raise. None: no check.
    """
    global _check_wait
    _check_wait = check


def is_initialized() -> bool:
    """Whether a process group has been started."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes; 1 without a group."""
    return dist.get_world_size() if is_initialized() else 1


def get_rank() -> int:
    """This process's rank, from 0; 0 without a group."""
    return dist.get_rank() if is_initialized() else 0


def is_main() -> bool:
    """Whether this is rank 0, the one that writes files."""
    return get_rank() == 0


def start(
    device: torch.device,
    *,
    step_seconds: float | None = None,
    problem: str = "",
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Joins the process group if `torchrun` started this process.

    Collective: every rank must call.

    Args:
        device: This process's, from `pick_device`; of the same type on all ranks.
        step_seconds: The timeout of collectives in training steps and validation; None: the same
            half hour as elsewhere.
        problem: Why this process cannot go on; the others would wait for it.
        should_stop: Asked several times a second while the other ranks are waited for.

    Raises:
        ConfigError: Some rank has a problem, or not all have devices of the same type.
        RunStopped: `should_stop` said so.
        TrainingError: The other ranks did not come.
    """
    if "RANK" in os.environ and not is_initialized():
        with in_collective():
            _join_group(device, step_seconds, problem=problem, should_stop=should_stop)


def _join_group(
    device: torch.device,
    step_seconds: float | None,
    *,
    problem: str,
    should_stop: Callable[[], bool],
) -> None:
    global _started_group
    store, rank, world_size = next(rendezvous("env://", timeout=LONG_TIMEOUT))
    start_id = agree_on_start_id(
        store, rank, world_size, problem=problem, device=device.type, should_stop=should_stop
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(start_id, store),
        rank=rank,
        world_size=world_size,
        timeout=LONG_TIMEOUT,
    )
    step_group = None
    if step_seconds is not None and world_size > 1:
        spare = _NCCL_SECONDS if device.type == "cuda" else 0.0
        step_group = dist.new_group(timeout=timedelta(seconds=step_seconds + spare))
    _started_group = _StartedGroup(start_id, step_group, step_seconds)


def start_id() -> str:
    """An id shared by all processes of this start, and by no other start; empty without `start`."""
    return _started_group.start_id if _started_group else ""


def shutdown(*, failed: bool = False) -> None:
    """Leaves the process group, if there is one.

    Args:
        failed: Whether this process could not go on. Then the group is aborted: to destroy it, NCCL
            would wait for what other ranks compute, and those may be waiting for this one. It is
            not waited for; `cli.end_process` gives it some seconds.
    """
    global _started_group
    if not is_initialized():
        return
    _started_group = None
    if failed:
        end_in_background(_abort_group)
    else:
        end_in_background(dist.destroy_process_group, wait=True)


def _abort_group() -> None:
    # Not public, and the only call that aborts several groups without waiting for one another.
    abort = getattr(distributed_c10d, "_abort_process_group", dist.destroy_process_group)
    with contextlib.suppress(Exception):  # the process ends for another reason
        abort()


@contextlib.contextmanager
def process_group(
    pick_device: Callable[[], torch.device],
    *,
    step_seconds: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[torch.device]:
    """Starts the process group, and leaves it however the block ends. Collective.

    A group that exists already, such as the caller's own, is used and left alone.

    Args:
        pick_device: Returns the device of this process.
        step_seconds: See `start`.
        should_stop: See `start`.

    Yields:
        This process's device.

    Raises:
        ConfigError: `pick_device` raised it, on any rank; see also `start`.
        RunStopped: See `start`.
    """
    wait_for_endings()  # of a group before, where a program calls a command again
    existed, device, problem = is_initialized(), torch.device("cpu"), ""
    try:
        device = pick_device()
    except ConfigError as error:
        if existed or "RANK" not in os.environ:
            raise
        problem = str(error)
    start(device, step_seconds=step_seconds, problem=problem, should_stop=should_stop)
    failed = True
    try:
        yield device
        failed = False
    finally:
        if not existed:
            shutdown(failed=failed)


def step_group() -> dist.ProcessGroup | None:
    """The group with the timeout of training steps; None: the default group."""
    return _started_group.step_group if _started_group else None


def step_seconds() -> float:
    """The timeout of collectives in training steps and validation; infinite if it has none."""
    seconds = _started_group.step_seconds if _started_group else None
    return math.inf if seconds is None else seconds


@contextlib.contextmanager
def in_collective() -> Iterator[None]:
    """Marks a block that does nothing but exchange data: what fails in it is a collective.

    Raises:
        CollectiveError: Instead of any other `RuntimeError`, whatever its words are.
    """
    try:
        yield
    except TrainingError:
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):  # NCCL's, say: it is this process that cannot go on
            raise
        raise CollectiveError(f"the exchange between processes failed: {error}") from error


def _wait_until(is_done: Callable[[float], bool], *, limit: float = math.inf) -> None:
    # `is_done` waits for at most the seconds that it is given. Between its calls Python calls the
    # handlers of signals, which it cannot do within a call to C++.
    start = time.monotonic()
    while not is_done(POLL_SECONDS):
        seconds = time.monotonic() - start
        if _check_wait is not None:
            _check_wait(seconds)
        if seconds > limit:
            raise CollectiveError(f"no answer within {limit:.0f} seconds")


def _finish(work: dist.Work | None) -> None:
    # Waits for an asynchronous collective.
    assert work is not None  # this rank is in the group
    with in_collective():
        _wait_until(partial(_is_completed, work))
        work.wait()


def _is_completed(work: dist.Work, seconds: float) -> bool:
    if not work.is_completed():
        # It raises when the time is over. A failure is raised again by `_finish`.
        with contextlib.suppress(RuntimeError):
            work.wait(timedelta(seconds=seconds))
    return work.is_completed()


def wait_for_device(device: torch.device) -> None:
    """Waits until a GPU has done what was asked of it, in which other ranks may have a part.

    To be called before values are read from the GPU while gradients may be on their way. Reading
    them would wait too, but deaf to signals and to the failures of other ranks.

    Args:
        device: Of this process; nothing is waited for on a CPU, or without a group.

    Raises:
        CollectiveError: A rank failed, or there was no end to it within the timeout of a step.
    """
    if device.type != "cuda" or get_world_size() == 1:
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    _wait_until(partial(_is_reached, event), limit=step_seconds())


def _is_reached(event: torch.cuda.Event, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (reached := event.query()) and time.monotonic() < deadline:
        time.sleep(_EVENT_SECONDS)
    return reached


def backward(loss: Tensor) -> None:
    """`loss.backward()`, through a module from `wrap_ddp` or any other.

    Args:
        loss: A scalar.

    Raises:
        CollectiveError: The gradients were computed, but not exchanged with the other ranks.
    """
    if get_world_size() == 1:
        loss.backward()
        return
    engine, computed = torch.autograd.Variable._execution_engine, []
    # Callbacks are called after the last gradient, in this order: ours, which is asked for by the
    # first function of the backward, then the one in which DDP waits for the other ranks.
    loss.register_hook(lambda _: engine.queue_callback(lambda: computed.append(True)))
    try:
        loss.backward()
    except RuntimeError as error:
        if computed and not is_out_of_memory(error):
            raise CollectiveError(f"the exchange of gradients failed: {error}") from error
        raise


def all_gather(value: Any) -> list[Any]:
    """Gathers a picklable object from every rank. Collective: every rank must call.

    Args:
        value: This rank's object; sizes may differ between ranks.

    Returns:
        One object per rank, in the order of the ranks; `[value]` without a group.
    """
    if get_world_size() == 1:
        return [value]
    content = _to_bytes(value)
    sizes = torch.zeros(get_world_size(), dtype=torch.int64)
    sizes[get_rank()] = len(content)
    all_reduce_sum(sizes)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(content)] = content
    gathered = [torch.empty_like(padded) for _ in sizes]
    _finish(dist.all_gather(gathered, padded, async_op=True))
    return [_from_bytes(each[:size]) for each, size in zip(gathered, sizes.tolist(), strict=True)]


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _from_bytes(content: Tensor) -> Any:
    return pickle.loads(content.numpy().data)


def all_reduce_sum(tensor: Tensor, *, in_step: bool = False) -> Tensor:
    """Sums a tensor over all ranks, in place. Collective: every rank must call.

    Args:
        tensor: Any numeric tensor, of equal shape and dtype on all ranks.
        in_step: Whether to use the shorter timeout of training steps; the same on all ranks.

    Returns:
        The same tensor, holding the sum.
    """
    if get_world_size() > 1:
        group = step_group() if in_step else None
        _finish(dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=True))
    return tensor


def any_rank(flag: bool, *, in_step: bool = False) -> bool:
    """Whether a flag is set on any rank. Collective: every rank must call.

    Args:
        flag: This rank's flag.
        in_step: See `all_reduce_sum`.

    Returns:
        The same answer on every rank.
    """
    return bool(all_reduce_sum(torch.tensor(int(flag)), in_step=in_step).item())


def raise_on_all_ranks(error: UserError | None) -> None:
    """Raises a UserError on all ranks if any rank has one. Collective: every rank must call.

    Args:
        error: This rank's error, or None.

    Raises:
        UserError: With a group, a `SharedError` with the message of the lowest rank that has an
            error; without one, `error` itself.
    """
    if get_world_size() == 1 and error is not None:
        raise error
    messages = [message for message in all_gather(error and str(error)) if message]
    if messages:
        raise SharedError(messages[0])


def run_on_all_ranks(build: Callable[[], T]) -> T:
    """Calls a function that may raise `UserError` on some ranks only. Collective.

    Args:
        build: Called on every rank.

    Returns:
        This rank's result.

    Raises:
        UserError: See `raise_on_all_ranks`.
    """
    result, error = None, None
    try:
        result = build()
    except UserError as caught:
        error = caught
    raise_on_all_ranks(error)
    return result  # type: ignore[return-value]  # it is None only where that was raised


def barrier() -> None:
    """Waits for all ranks. Collective: every rank must call."""
    any_rank(False)


def broadcast(value: Any) -> Any:
    """Sends rank 0's picklable object to every rank. Collective: every rank must call.

    Args:
        value: The object on rank 0; ignored on other ranks.

    Returns:
        Rank 0's object.
    """
    if get_world_size() == 1:
        return value
    content = _to_bytes(value) if is_main() else torch.empty(0, dtype=torch.uint8)
    size = all_reduce_sum(torch.tensor(len(content)))
    if not is_main():
        content = content.new_empty(int(size))
    _finish(dist.broadcast(content, src=0, async_op=True))
    return value if is_main() else _from_bytes(content)


def wrap_ddp(
    model: nn.Module, *, warm_up: Callable[[nn.Module], None], bf16_compress: bool = False
) -> nn.Module:
    """Wraps a module in DistributedDataParallel, if there is a group. Collective.

    After its first backward, DDP assigns gradients to buckets anew, which changes the order of
    summation. Two warm-up passes have that happen before the first step, so that a resumed run sums
    in the same order as one that was never interrupted.

    Args:
        model: Its trainable parameters on one device; frozen ones may be on another.
        warm_up: Runs one forward and backward of the module it is given, and drops the gradients.
        bf16_compress: Whether gradients are sent, and summed up, in bfloat16.

    Returns:
        The wrapped module; `model` itself without a group.
    """
    if get_world_size() == 1:
        return model
    device = next(p for p in model.parameters() if p.requires_grad).device
    # A frozen encoder whose outputs are cached stays on the CPU, and DDP wants all that it knows on
    # one type of device. It is equal on all ranks anyway, which have loaded the same file.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, p in model.named_parameters() if p.device != device]
    )
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.shape[2:] == (1, 1):
            parameter.register_hook(_use_plain_strides)
    # SAM's buffers are constants: not to be sent at every forward. Newer torch renamed the option.
    arguments = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
    options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    with in_collective():
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=step_group(),
            **options,
        )
    if bf16_compress:
        # In a lambda: DDP knows the hook by its name and asks for NCCL, but gloo can do it too.
        wrapped.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    warm_up(wrapped)
    warm_up(wrapped)
    wait_for_device(device)
    return wrapped


def _use_plain_strides(gradient: Tensor) -> Tensor:
    # The weight of a 1 x 1 convolution, as in the encoder's neck, gets the strides of channels last
    # for its gradient. They lie in memory alike, but DDP compares all strides and warns.
    return gradient.flatten(1).view(gradient.shape)
