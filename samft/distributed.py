"""Process-group helpers: start and shutdown, collectives, errors on all ranks, DDP.

All of them also work in a single process without a group. Flags and counts are exchanged over gloo,
so they are on the CPU; gradients over NCCL where there are GPUs.
"""

import contextlib
import inspect
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from samft.errors import SharedError, UserError

T = TypeVar("T")

# At the start, and while rank 0 reads a large dataset or saves a large model.
LONG_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class _StartedGroup:
    # What `start` has set up beside torch's default group. `start_id` is the same on all ranks, and
    # different after every restart; `step_group` has the shorter timeout of training steps.
    start_id: str
    step_group: dist.ProcessGroup | None


# Set by `start` and cleared by `shutdown`; torch keeps the default group in the same way.
_started_group: _StartedGroup | None = None


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


def start(device: torch.device, *, step_seconds: float | None = None) -> None:
    """Joins the process group if `torchrun` started this process.

    Collective: every rank must call.

    Args:
        device: This process's, from `pick_device`; of the same type on all ranks.
        step_seconds: The timeout of collectives in training steps and validation; None: the same
            half hour as elsewhere.
    """
    if "RANK" in os.environ and not is_initialized():
        _join_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", step_seconds)


def _join_group(backend: str, step_seconds: float | None) -> None:
    global _started_group
    store, rank, world_size = next(rendezvous("env://", timeout=LONG_TIMEOUT))
    start_id = _agree_on_start_id(store, rank, world_size)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(start_id, store),
        rank=rank,
        world_size=world_size,
        timeout=LONG_TIMEOUT,
    )
    step_group = None
    if step_seconds is not None and world_size > 1:
        step_group = dist.new_group(timeout=timedelta(seconds=step_seconds))
    _started_group = _StartedGroup(start_id, step_group)


def _agree_on_start_id(store: dist.Store, rank: int, world_size: int) -> str:
    # torchrun keeps its store when it restarts the processes, with the addresses of the previous
    # ones in it, and hosts may count restarts differently. So rank 0 makes an id up and publishes
    # it as the epoch. The other ranks answer under that id with a token of their own, and take it
    # once rank 0 has published their token: an epoch that a previous rank 0 has left in the store
    # never has it.
    token = uuid.uuid4().hex
    if rank == 0:
        store.set("epoch", token)
        answers = [store.get(f"{token}/{other}").decode() for other in range(1, world_size)]
        store.set(f"{token}/all", " ".join(answers))
        return token
    while True:
        epoch = store.get("epoch").decode()
        store.set(f"{epoch}/{rank}", token)
        if store.check([f"{epoch}/all"]) and token in store.get(f"{epoch}/all").decode():
            return epoch
        time.sleep(0.05)


def start_id() -> str:
    """An id shared by all processes of this start, and by no other start; empty without `start`."""
    return _started_group.start_id if _started_group else ""


def shutdown() -> None:
    """Destroys the process group, if there is one."""
    global _started_group
    if is_initialized():
        dist.destroy_process_group()
        _started_group = None


@contextlib.contextmanager
def process_group(device: torch.device, *, step_seconds: float | None = None) -> Iterator[None]:
    """Starts the process group, and destroys it however the block ends. Collective.

    A group that exists already, such as the caller's own, is used and left alone.

    Args:
        device: See `start`.
        step_seconds: See `start`.
    """
    existed = is_initialized()
    start(device, step_seconds=step_seconds)
    try:
        yield
    finally:
        if not existed:
            shutdown()


def _step_group() -> dist.ProcessGroup | None:
    return _started_group.step_group if _started_group else None


def all_gather(value: Any) -> list[Any]:
    """Gathers a picklable object from every rank. Collective: every rank must call.

    Args:
        value: This rank's object; sizes may differ between ranks.

    Returns:
        One object per rank, in the order of the ranks; `[value]` without a group.
    """
    if get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_reduce_sum(tensor: Tensor, *, in_step: bool = False) -> Tensor:
    """Sums a tensor over all ranks, in place. Collective: every rank must call.

    Args:
        tensor: Any numeric tensor, of equal shape and dtype on all ranks.
        in_step: Whether to use the shorter timeout of training steps; the same on all ranks.

    Returns:
        The same tensor, holding the sum.
    """
    if get_world_size() > 1:
        group = _step_group() if in_step else None
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
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
    objects = [value]
    dist.broadcast_object_list(objects, src=0, device=torch.device("cpu"))
    return objects[0]


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
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=_step_group(),
        **options,
    )
    if bf16_compress:
        # In a lambda: DDP knows the hook by its name and asks for NCCL, but gloo can do it too.
        wrapped.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    warm_up(wrapped)
    warm_up(wrapped)
    return wrapped


def _use_plain_strides(gradient: Tensor) -> Tensor:
    # The weight of a 1 x 1 convolution, as in the encoder's neck, gets the strides of channels last
    # for its gradient. They lie in memory alike, but DDP compares all strides and warns.
    return gradient.flatten(1).view(gradient.shape)
