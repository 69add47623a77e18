"""The process group: ranks, gathers, sums and agreement; all right without a group, too."""

import contextlib
import inspect
import os
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from samft.errors import ConfigError, SharedError, UserError

# At the start, and around what only rank 0 does: reading a large dataset, saving a large model.
T = TypeVar("T")

LONG_TIMEOUT = timedelta(minutes=30)
_START_NAMES: list[str] = []  # see `_rendezvous_name`
_STEP_GROUPS: list[Any] = []  # the group of training steps, with the shorter timeout


def is_initialized() -> bool:
    """Whether a process group has been started."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes; 1 without a group."""
    return dist.get_world_size() if is_initialized() else 1


def get_rank() -> int:
    """This process's number, from 0; 0 without a group."""
    return dist.get_rank() if is_initialized() else 0


def is_main() -> bool:
    """Whether this is rank 0, the one that writes files."""
    return get_rank() == 0


def start(device: str, *, step_seconds: float | None = None) -> torch.device:
    """Starts the process group if `torchrun` launched this process, and picks the device.

    Flags and counts travel over gloo on the CPU, so that agreeing on them never waits for a GPU;
    gradients travel over NCCL where there are GPUs. Collective: every rank must call.

    Args:
        device: `auto`, `cuda` or `cpu`.
        step_seconds: In training steps and validation, a process that does not answer for so long
            is given up; None: as elsewhere, half an hour.

    Returns:
        This process's device.

    Raises:
        ConfigError: `cuda` was asked for and there is none, or fewer GPUs than processes.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but PyTorch sees no GPU here.")
    if cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"device: process {local_rank} of this host has no GPU of its own (there are "
            f"{torch.cuda.device_count()}): lower --nproc_per_node."
        )
    place = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if "RANK" in os.environ and not is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        store, rank, world_size = next(rendezvous("env://", timeout=LONG_TIMEOUT))
        name = _rendezvous_name(store, rank, world_size)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(name, store),
            rank=rank,
            world_size=world_size,
            timeout=LONG_TIMEOUT,
        )
        _START_NAMES.append(name)
        if step_seconds is not None and get_world_size() > 1:
            _STEP_GROUPS.append(dist.new_group(timeout=timedelta(seconds=step_seconds)))
    return place


def _rendezvous_name(store: dist.Store, rank: int, world_size: int) -> str:
    # A name for this start of all processes. torchrun keeps its store when it starts them again,
    # with the addresses of those that are gone; not even the number of restarts is the same on all
    # hosts. So rank 0 makes a name up, and the others take it once it answers them by their token.
    token = uuid.uuid4().hex
    if rank == 0:
        store.set("invitation", token)
        answers = [store.get(f"{token}/{other}").decode() for other in range(1, world_size)]
        store.set(f"{token}/all", " ".join(answers))
        return token
    while True:
        name = store.get("invitation").decode()
        store.set(f"{name}/{rank}", token)
        if store.check([f"{name}/all"]) and token in store.get(f"{name}/all").decode():
            return name
        time.sleep(0.05)


def start_id() -> str:
    """A name that all processes of this start share, and no other start has; empty without one."""
    return _START_NAMES[0] if _START_NAMES else ""


def shutdown() -> None:
    """Ends the process group, if there is one."""
    if is_initialized():
        dist.destroy_process_group()
        _STEP_GROUPS.clear()
        _START_NAMES.clear()


def _step_group() -> Any:
    return _STEP_GROUPS[0] if _STEP_GROUPS else None


@contextlib.contextmanager
def process_group(device: str, *, step_seconds: float | None = None) -> Iterator[torch.device]:
    """Starts the process group, and ends it however the block ends. Collective.

    A group that exists already, the caller's own say, is used and left alone.

    Args:
        device: See `start`.
        step_seconds: See `start`.

    Yields:
        This process's device.

    Raises:
        ConfigError: See `start`.
    """
    is_callers_own = is_initialized()
    chosen = start(device, step_seconds=step_seconds)
    try:
        yield chosen
    finally:
        if not is_callers_own:
            shutdown()


def all_gather(value: Any) -> list[Any]:
    """Gathers any picklable object from all ranks. Collective: every rank must call.

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
        in_step: Whether to give up after the shorter time of training steps; all ranks alike.

    Returns:
        The same tensor, holding the sum.
    """
    if get_world_size() > 1:
        group = _step_group() if in_step else None
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def any_rank(flag: bool, *, in_step: bool = False) -> bool:
    """Whether the flag is set on any rank. Collective: every rank must call.

    Args:
        flag: This rank's view.
        in_step: See `all_reduce_sum`.

    Returns:
        The same answer on every rank.
    """
    return bool(all_reduce_sum(torch.tensor(int(flag)), in_step=in_step).item())


def raise_on_all_ranks(error: UserError | None) -> None:
    """Ends all ranks with the user's error that any of them had. Collective.

    Args:
        error: This rank's error, if it had one.

    Raises:
        UserError: As it is, without a group; with one, a `SharedError` of the first rank's words,
            on every rank.
    """
    if get_world_size() == 1 and error is not None:
        raise error
    found = [text for text in all_gather(error and str(error)) if text]
    if found:
        raise SharedError(found[0])


def barrier() -> None:
    """Waits until every rank is here. Collective: every rank must call."""
    any_rank(False)


def broadcast(value: Any) -> Any:
    """Rank 0's object, on every rank. Collective: every rank must call.

    Args:
        value: The object on rank 0; what other ranks pass is ignored.

    Returns:
        Rank 0's object.
    """
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def wrap_ddp(
    model: nn.Module, *, warm_up: Callable[[nn.Module], None], bf16_compress: bool = False
) -> nn.Module:
    """Wraps a module in DistributedDataParallel, if there is a group. Collective.

    After its first backward, DDP puts gradients into other buckets, which changes the order of
    summation. Two throw-away passes now, and a resumed run adds up like an undisturbed one.

    Args:
        model: What is trained of it on one device; what is frozen may be on another.
        warm_up: Runs one forward and backward of the module it is given, and drops the gradients.
        bf16_compress: Whether gradients travel, and are summed up, in bfloat16.

    Returns:
        The wrapped module; `model` itself without a group.
    """
    if get_world_size() == 1:
        return model
    device = next(p for p in model.parameters() if p.requires_grad).device
    # A frozen encoder whose outputs are cached stays on the CPU; all ranks have the same file's.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, p in model.named_parameters() if p.device != device]
    )
    # SAM's buffers are constants: no need to send them at every forward. Newer torch renamed this.
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
        # Under another name than its own, for which DDP asks for NCCL: gloo can do it, too.
        wrapped.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    warm_up(wrapped)
    warm_up(wrapped)
    return wrapped


def run_on_all_ranks(build: Callable[[], T]) -> T:
    """Runs a function on every rank; a user's error on any rank ends all. Collective.

    Args:
        build: May raise `UserError` on some ranks only.

    Returns:
        What it returned on this rank.

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
