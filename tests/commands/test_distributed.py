"""Gathers, sums, agreement and broadcasts on two gloo ranks, and without a group."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from helpers.gloo_pool import GlooPool
from samft import distributed, ending, rendezvous
from samft.distributed import in_collective, wait_for_device
from samft.errors import CollectiveError, ConfigError, RunStopped
from samft.rendezvous import agree_on_start_id

CPU = torch.device("cpu")
UNEVEN = [
    ["a" * 100_000, ""],
    [[1, 2, 3], []],
    [None, {"nested": [{"deeper": (1, {2}, b"3")}], "empty": {}}],
    [torch.arange(5), torch.zeros(0, 3, dtype=torch.bool)],
]


def gather(values: list[Any]) -> list[Any]:
    return distributed.all_gather(values[distributed.get_rank()])


def identity() -> tuple[bool, int, int, bool]:
    return (
        distributed.is_initialized(),
        distributed.get_world_size(),
        distributed.get_rank(),
        distributed.is_main(),
    )


def sum_in_place(value: Tensor) -> tuple[Tensor, bool]:
    tensor = value * (distributed.get_rank() + 1)
    total = distributed.all_reduce_sum(tensor)
    return total, total is tensor


def agree_on(flags: list[bool]) -> bool:
    return distributed.any_rank(flags[distributed.get_rank()])


def broadcast_rank() -> Any:
    rank = distributed.get_rank()
    return distributed.broadcast({"from": rank, "tail": ["x"] * (1000 * rank)})


def pass_barrier() -> int:
    distributed.barrier()
    return distributed.get_rank()


@pytest.mark.parametrize("values", UNEVEN, ids=["text", "lists", "nested", "tensors"])
def test_gather_takes_any_objects_of_any_size(gloo2: GlooPool, values: list[Any]) -> None:
    for gathered in gloo2.run(gather, values):
        assert len(gathered) == 2
        for got, sent in zip(gathered, values, strict=True):
            assert torch.equal(got, sent) if isinstance(sent, Tensor) else got == sent


def test_ranks_know_who_they_are(gloo2: GlooPool) -> None:
    assert gloo2.run(identity) == [(True, 2, 0, True), (True, 2, 1, False)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_sums_add_up_in_place(gloo2: GlooPool, dtype: torch.dtype) -> None:
    for total, in_place in gloo2.run(sum_in_place, torch.tensor([1, 5], dtype=dtype)):
        assert torch.equal(total, torch.tensor([3, 15], dtype=dtype))
        assert in_place


@pytest.mark.parametrize(
    "flags, answer",
    [([False, False], False), ([True, False], True), ([False, True], True), ([True, True], True)],
)
def test_any_rank_sets_the_flag_for_all(gloo2: GlooPool, flags: list[bool], answer: bool) -> None:
    assert gloo2.run(agree_on, flags) == [answer, answer]


def test_broadcast_gives_rank_zeros_object(gloo2: GlooPool) -> None:
    assert gloo2.run(broadcast_rank) == [{"from": 0, "tail": []}] * 2


def test_barrier_is_passed_by_all(gloo2: GlooPool) -> None:
    assert gloo2.run(pass_barrier) == [0, 1]


def test_everything_works_without_a_group() -> None:
    value = {"nested": [1, {}]}
    tensor = torch.tensor([1.0, 2.0])
    assert identity() == (False, 1, 0, True)
    assert distributed.all_gather(value) == [value]
    assert distributed.all_reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert distributed.any_rank(True) is True
    assert distributed.any_rank(False) is False
    assert distributed.broadcast(value) is value
    distributed.barrier()
    distributed.shutdown()


def test_start_without_torchrun_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    distributed.start(torch.device("cpu"))
    assert not distributed.is_initialized()


@pytest.fixture
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a single process of torchrun; no group is left afterwards."""
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield
    distributed.shutdown()


@pytest.mark.usefixtures("under_torchrun")
def test_start_under_torchrun_makes_a_group() -> None:
    try:
        distributed.start(torch.device("cpu"))
        assert identity() == (True, 1, 0, True)
        start_id = distributed.start_id()
        assert start_id
        distributed.start(torch.device("cpu"))  # a second run in one process
        assert distributed.start_id() == start_id
    finally:
        distributed.shutdown()
    assert not distributed.is_initialized()
    assert distributed.start_id() == ""


# Waits, and what fails in them


def wait_while_the_other_is_late(folder: Path) -> tuple[int, list[float]]:
    late, waits = folder / "looked", []

    def look(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            late.touch()

    if distributed.get_rank() == 1:
        while not late.exists():
            pass
    else:
        distributed.set_wait_check(look)
    try:
        total = distributed.all_reduce_sum(torch.tensor(distributed.get_rank() + 1))
    finally:
        distributed.set_wait_check(None)
    return int(total), waits


def test_a_process_looks_around_while_it_waits_for_others(gloo2: GlooPool, tmp_path: Path) -> None:
    (total, waits), (other_total, _) = gloo2.run(wait_while_the_other_is_late, tmp_path)
    assert total == other_total == 3
    assert len(waits) >= 3 and waits == sorted(waits)


def fail_while_waiting() -> str:
    """What rank 0 raises out of a sum that rank 1 does not come to."""

    def fail(seconds: float) -> None:
        raise CollectiveError("another process failed")

    if distributed.get_rank() == 1:
        return ""
    distributed.set_wait_check(fail)
    try:
        distributed.all_gather("never")
    except CollectiveError as error:
        return str(error)
    finally:
        distributed.set_wait_check(None)
    return "it did not wait"


def test_what_a_look_raises_ends_the_wait() -> None:
    pool = GlooPool(2)
    try:
        assert pool.run(fail_while_waiting) == ["another process failed", ""]
    finally:
        pool.stop(kill=True)


def test_what_fails_in_a_collective_is_one_whatever_its_words() -> None:
    for message in ("Application timeout caused pair closure", "no word of a network at all"):
        with pytest.raises(CollectiveError, match=message) as caught, in_collective():
            raise RuntimeError(message)
        assert isinstance(caught.value.__cause__, RuntimeError)
    for error in (
        torch.OutOfMemoryError("the GPU is full"),
        RunStopped("stopped"),
        KeyboardInterrupt(),
        ValueError("no collective raises this"),
    ):
        with pytest.raises(type(error)) as other, in_collective():
            raise error
        assert other.value is error


class Failing(torch.autograd.Function):
    """Fails in its backward."""

    @staticmethod
    def forward(context: Any, value: Tensor, error: Exception) -> Tensor:
        context.error = error
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        raise context.error


def fail_in_an_exchange(error: Exception, gradient: Tensor) -> None:
    # As DDP does it: after the last gradient, in a callback of autograd.
    def wait_for_others() -> None:
        raise error

    torch.autograd.Variable._execution_engine.queue_callback(wait_for_others)


def backward_error(error: Exception, *, in_exchange: bool) -> tuple[str, float]:
    weight = torch.tensor(3.0, requires_grad=True)
    value = weight * 2
    if in_exchange:
        value.register_hook(partial(fail_in_an_exchange, error))
    else:
        value = Failing.apply(value, error)
    try:
        distributed.backward(value * 5)
    except Exception as caught:
        gradient = 0.0 if weight.grad is None else weight.grad.item()
        return type(caught).__name__, gradient
    return "", 0.0


@pytest.mark.parametrize(
    ("error", "in_exchange", "name", "gradient"),
    [
        (RuntimeError("pair closure"), True, "CollectiveError", 10.0),
        (RuntimeError("pair closure"), False, "RuntimeError", 0.0),
        (torch.OutOfMemoryError("full"), True, "OutOfMemoryError", 10.0),
    ],
)
def test_a_backward_tells_a_bug_from_a_failed_exchange(
    gloo2: GlooPool, error: Exception, in_exchange: bool, name: str, gradient: float
) -> None:
    function = partial(backward_error, error, in_exchange=in_exchange)
    assert gloo2.run(call, function) == [(name, gradient)] * 2


def call(function: Callable[[], Any]) -> Any:
    return function()


class Event:
    """A GPU's, which it comes to at the third query, or never."""

    comes, queries = True, 0

    def record(self, stream: Any) -> None:
        type(self).queries = 0

    def query(self) -> bool:
        type(self).queries += 1
        return self.comes and self.queries >= 3


@pytest.fixture
def gpu_event(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(Event, "comes", True)
    return Event


def test_a_gpu_is_waited_for_to_its_event(gpu_event: type[Event]) -> None:
    wait_for_device(torch.device("cpu"))
    assert gpu_event.queries == 0
    wait_for_device(torch.device("cuda"))
    assert gpu_event.queries == 3


def test_a_wait_for_a_gpu_looks_around_and_has_an_end(
    gpu_event: type[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_event, "comes", False)
    monkeypatch.setattr(distributed, "step_seconds", lambda: 0.05)
    with pytest.raises(CollectiveError, match="no answer within 0 seconds"):
        wait_for_device(torch.device("cuda"))

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    distributed.set_wait_check(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            wait_for_device(torch.device("cuda"))
    finally:
        distributed.set_wait_check(None)


# The start


def meet(store: dist.Store, world_size: int, **options: Any) -> list[Any]:
    """What each rank gets, or raises; `options` by rank."""

    def meet_one(rank: int) -> Any:
        own = options.get(f"rank{rank}", {})
        try:
            return agree_on_start_id(store, rank, world_size, **own)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(meet_one, range(world_size)))


def test_all_ranks_of_a_start_agree_on_an_id_of_its_own() -> None:
    store = dist.HashStore()
    first, second = meet(store, 3), meet(store, 3)  # torchrun keeps its store
    assert len(set(first)) == len(set(second)) == 1
    assert first != second and all(isinstance(one, str) and one for one in first + second)


def test_why_one_rank_cannot_start_is_raised_on_all() -> None:
    errors = meet(dist.HashStore(), 3, rank2={"problem": "device: process 2 has no GPU."})
    assert [type(error) for error in errors] == [ConfigError] * 3
    assert {str(error) for error in errors} == {"device: process 2 has no GPU."}


def test_devices_of_other_types_are_refused_on_all() -> None:
    errors = meet(dist.HashStore(), 2, rank1={"device": "cuda"})
    assert [type(error) for error in errors] == [ConfigError] * 2
    assert all("process 0 on cpu and process 1 on cuda" in str(error) for error in errors)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_the_wait_for_processes_that_do_not_come(rank: int) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(1) as ranks:
        waiting = ranks.submit(
            agree_on_start_id, dist.HashStore(), rank, 2, should_stop=stop.is_set
        )
        assert not waiting.done()
        stop.set()
        assert isinstance(waiting.exception(timeout=60), RunStopped)


def test_processes_that_do_not_come_are_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "LONG_TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(Exception, match="not all processes have started"):
        agree_on_start_id(dist.HashStore(), 0, 2)


# The end


@pytest.mark.usefixtures("under_torchrun")
def test_an_error_comes_out_of_a_group_that_cannot_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left, goes_on = threading.Event(), threading.Event()
    abort = distributed_c10d._abort_process_group

    def abort_late() -> None:
        goes_on.wait(60)
        abort()
        left.set()

    def destroy() -> None:
        raise AssertionError("this waits for the other ranks")

    with monkeypatch.context() as blocked:
        blocked.setattr(distributed_c10d, "_abort_process_group", abort_late)
        blocked.setattr(dist, "destroy_process_group", destroy)
        with pytest.raises(ZeroDivisionError), distributed.process_group(lambda: CPU):
            assert distributed.is_initialized()
            raise ZeroDivisionError
    assert not left.is_set() and distributed.is_initialized()
    # A program may try again: the next group is not that one.
    threading.Timer(0.05, goes_on.set).start()
    with distributed.process_group(lambda: CPU):
        assert left.is_set() and distributed.start_id()
    assert not distributed.is_initialized()


def refuse_device() -> torch.device:
    raise ConfigError("device: there is none.")


@pytest.mark.usefixtures("under_torchrun")
def test_a_refused_device_is_the_users_error_and_leaves_no_group() -> None:
    with pytest.raises(ConfigError, match="there is none"):
        with distributed.process_group(refuse_device):
            raise AssertionError("it has begun")
    assert not distributed.is_initialized()


@pytest.mark.usefixtures("under_torchrun")
def test_a_run_ends_though_others_do_not_leave_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    destroy, asked, goes_on = dist.destroy_process_group, threading.Event(), threading.Event()

    def destroy_late() -> None:
        asked.set()
        goes_on.wait(60)
        destroy()

    monkeypatch.setattr(ending, "END_SECONDS", 0.05)
    monkeypatch.setattr(dist, "destroy_process_group", destroy_late)
    with distributed.process_group(lambda: CPU):
        pass
    assert asked.is_set() and distributed.is_initialized()
    goes_on.set()
    ending._ENDINGS[-1].join(60)
    assert not distributed.is_initialized()


@pytest.mark.usefixtures("under_torchrun")
def test_a_group_is_destroyed_after_a_run() -> None:
    with distributed.process_group(lambda: CPU):
        assert distributed.is_initialized() and distributed.start_id()
    assert not distributed.is_initialized() and not distributed.start_id()
