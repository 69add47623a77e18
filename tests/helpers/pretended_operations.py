"""Checks of the pretended GPUs, each in a function; `test_pretend_cuda.py` runs them there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from helpers.pretend_cuda.ledger import LEDGER
from helpers.pretend_cuda.stream_order import ORDER
from helpers.pretend_cuda.tensors import PretendCudaTensor

GPU = torch.device("cuda", 0)


@contextmanager
def kinds_of_waits(*expected: str) -> Iterator[None]:
    """What is done within makes the host wait in these ways."""
    before = LEDGER.report.waits.copy()
    yield
    kinds = [wait.kind for wait in (LEDGER.report.waits - before).elements()]
    assert kinds == list(expected), kinds


@contextmanager
def kernels(**expected: int) -> Iterator[None]:
    """What is done within launches these kernels."""
    before = LEDGER.report.launches.copy()
    yield
    assert LEDGER.report.launches - before == expected, LEDGER.report.launches - before


@contextmanager
def faults(*expected: str) -> Iterator[None]:
    """What is done within is noted as these faults."""
    assert not LEDGER.report.faults
    yield
    ORDER.look_for_early_reuse()
    noted = [text.split(" at ")[0] for text in LEDGER.report.faults]
    assert noted == list(expected), noted
    LEDGER.report.faults.clear()


@contextmanager
def raises(text: str) -> Iterator[None]:
    """What is done within raises a RuntimeError or TypeError with this text, noted as a fault."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"nothing raised: {text}")


def values_and_types_are_those_of_a_gpu() -> None:
    tensor = torch.arange(6.0, device="cuda").view(2, 3)
    assert tensor.is_cuda and tensor.device == GPU and isinstance(tensor, PretendCudaTensor)
    assert (tensor @ tensor.T).tolist() == [[5, 14], [14, 50]]
    tensor[:, 0] = 9
    assert tensor.cpu().tolist() == [[9, 1, 2], [9, 4, 5]]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (tensor @ tensor.T).dtype == torch.bfloat16


def devices_do_not_mix() -> None:
    on_gpu, on_cpu = torch.ones(3, device="cuda"), torch.ones(3)
    with raises("Expected all tensors to be on the same device"):
        on_gpu + on_cpu
    with raises("Expected all tensors to be on the same device"):
        on_cpu[torch.tensor([1], device="cuda")]
    assert (on_gpu + torch.tensor(2.0)).tolist() == [3, 3, 3]
    with raises("convert cuda:0 device type tensor to numpy"):
        on_gpu.numpy()
    assert sum(LEDGER.report.faults.values()) == 2, LEDGER.report.faults
    LEDGER.report.faults.clear()


def the_host_waits_where_values_are_needed() -> None:
    tensor = torch.ones(3, device="cuda")
    with kinds_of_waits():
        _ = tensor * 2 + torch.zeros(3, device="cuda")
        torch.full((), 0.5, device="cuda")
    with kinds_of_waits("item"):
        bool(tensor.sum() > 0)
    with kinds_of_waits("index by a mask"):
        tensor[tensor > 0]
    with kinds_of_waits("copy from the host"):
        torch.tensor([1.0], device="cuda")
    with kinds_of_waits("copy from the host"):
        tensor.new_tensor([1.0])
    with kinds_of_waits("copy to the host"):
        tensor.cpu()
    with kinds_of_waits("copy from memory that is not page-locked"):
        torch.ones(3).to("cuda", non_blocking=True)
    with kinds_of_waits():
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)


def page_locked_memory_is_known() -> None:
    tensor = torch.ones(1000, pin_memory=True)
    assert tensor.is_pinned() and tensor[500:].is_pinned() and not torch.ones(3).is_pinned()
    on_gpu = torch.ones(3, device="cuda")
    assert torch.empty_like(on_gpu, device="cpu", pin_memory=True).is_pinned()


def late_copies_hold_garbage_until_something_waits() -> None:
    tensor = torch.ones(3, device="cuda")
    late = tensor.to("cpu", non_blocking=True)
    number = tensor.long().to("cpu", non_blocking=True)
    assert late.isnan().all() and number[0] == torch.iinfo(torch.int64).max
    torch.cuda.synchronize()
    assert late.tolist() == number.tolist() == [1, 1, 1]
    buffer = torch.zeros(3, pin_memory=True)
    buffer.copy_(tensor, non_blocking=True)
    assert buffer.isnan().all()
    tensor.sum().item()  # the same stream
    assert buffer.tolist() == [1, 1, 1]
    pageable = torch.zeros(3)
    pageable.copy_(tensor, non_blocking=True)  # which CUDA waits for
    assert pageable.tolist() == [1, 1, 1]


def only_what_was_waited_for_has_arrived() -> None:
    tensor, side = torch.ones(3, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    tensor.record_stream(side)
    with torch.cuda.stream(side):
        first = tensor.to("cpu", non_blocking=True)
        event = side.record_event()
        second = tensor.to("cpu", non_blocking=True)
    tensor.sum().item()  # another stream
    assert first.isnan().all()
    event.synchronize()
    assert not first.isnan().any() and second.isnan().all()
    torch.cuda.current_stream().wait_stream(side)
    assert second.isnan().all()
    tensor.sum().item()
    assert not second.isnan().any()


def streams_wait_for_each_other() -> None:
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    host = torch.ones(3, pin_memory=True)
    with torch.cuda.stream(side):
        early, late = (host.to("cuda", non_blocking=True) for _ in range(2))
    early.record_stream(current)
    late.record_stream(current)
    with faults("add does not wait for another stream's use of a tensor"):
        early + 1
    current.wait_stream(side)
    with faults():
        early + late
    with torch.cuda.stream(side), faults("add_ does not wait for another stream's use of a tensor"):
        early.add_(1)  # which the current stream may still read
    torch.cuda.synchronize()
    with torch.cuda.stream(side), faults():
        early.add_(1)


def memory_outlives_its_use_on_another_stream() -> None:
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()

    def use(*, recorded: bool) -> None:
        with torch.cuda.stream(side):
            moved = torch.ones(3, pin_memory=True).to("cuda", non_blocking=True)
        current.wait_event(side.record_event())
        if recorded:
            moved.record_stream(current)
        moved.sum()

    with faults():
        use(recorded=True)
    with faults("no record_stream before the end of a tensor: sum"):
        use(recorded=False)


def tf32_rounds_where_it_is_allowed() -> None:
    fine = torch.full((1, 1, 1, 1), 1 + 2**-12, device="cuda")
    one = torch.ones(1, 1, 1, 1, device="cuda")
    convolved = nn.functional.conv2d(fine, one).item()
    assert convolved == 1  # by default
    assert torch.mm(fine[0, 0], one[0, 0]).item() == 1 + 2**-12
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert nn.functional.conv2d(fine, one).item() == 1 + 2**-12
    torch.set_float32_matmul_precision("high")
    assert torch.mm(fine[0, 0], one[0, 0]).item() == 1
    torch.set_float32_matmul_precision("highest")


def lists_of_tensors_are_one_kernel() -> None:
    parameters = [nn.Parameter(torch.ones(3, device="cuda")) for _ in range(20)]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # A count of steps for each parameter, all in one; AdamW itself, five lists of 20 tensors
    with kernels(_foreach_add_=1, _fused_adamw_=1):
        optimizer.step()
    before = LEDGER.report.launches.copy()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    assert sum((LEDGER.report.launches - before).values()) < 10


def attention_is_one_kernel() -> None:
    query = torch.randn(1, 2, 5, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with kernels(_scaled_dot_product_flash_attention_for_cpu=1):
        nn.functional.scaled_dot_product_attention(query, query, query)


def views_launch_nothing() -> None:
    tensor = torch.ones(4, 4, device="cuda")
    with kernels():
        tensor.T.reshape(2, 2, 4)[0].detach()
        torch.empty(3, device="cuda")


def a_graph_computes_again_what_was_captured() -> None:
    given, steps = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph, factor = torch.cuda.CUDAGraph(), 2.0
    with kernels(), torch.cuda.graph(graph):
        doubled = (given * factor)[:2].sum()
        steps.add_(1)
    assert steps.tolist() == [0, 0, 0] and doubled.isnan()
    given.fill_(5)
    factor = 3.0
    with LEDGER.step():
        graph.replay()
        graph.replay()
    assert steps.tolist() == [2, 2, 2] and doubled.item() == 20
    step = LEDGER.report.steps.pop()
    assert step.launches == {"graph replay": 2}
    assert step.captured == {"mul": 2, "sum": 2, "add_": 2}


def graphs_of_a_pool_overwrite_each_other() -> None:
    given, pool = torch.ones(3, device="cuda"), torch.cuda.graph_pool_handle()
    graphs, outputs = [], []
    for factor in (2, 3):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool):
            outputs.append(given * factor)
    graphs[0].replay()
    assert outputs[0].tolist() == [2, 2, 2]
    graphs[1].replay()
    assert outputs[0].isnan().all() and outputs[1].tolist() == [3, 3, 3]


def a_capture_takes_no_waits_and_no_copies() -> None:
    tensor = torch.ones(3, device="cuda")
    generator = torch.Generator()
    for wait in (
        lambda: tensor.sum().item(),
        lambda: tensor[tensor > 0],
        lambda: tensor.cpu(),
        lambda: tensor + torch.ones(3).to("cuda"),
        lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        lambda: torch.cuda.synchronize(),
        lambda: tensor.normal_(generator=generator),
    ):
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        with torch.cuda.stream(before), raises("previous error in capture"):
            with torch.cuda.graph(graph):
                wait()
        assert torch.cuda.current_stream() is before
    assert LEDGER.report.faults.total() == 7
    LEDGER.report.faults.clear()


def operations_without_deterministic_kernels_are_refused() -> None:
    tensor = torch.ones(4, 4, device="cuda")
    assert tensor.cumsum(0)[3].tolist() == (tensor @ tensor)[3].tolist() == [4, 4, 4, 4]
    torch.use_deterministic_algorithms(True)
    with raises("cumsum does not have a deterministic implementation"):
        tensor.cumsum(0)
    assert tensor.long().cumsum(0)[3].tolist() == [4, 4, 4, 4]
    with raises("uses cuBLAS without CUBLAS_WORKSPACE_CONFIG"):
        tensor @ tensor
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    assert (tensor @ tensor)[3].tolist() == [4, 4, 4, 4]
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    torch.use_deterministic_algorithms(False)
    LEDGER.report.faults.clear()


def checkpoints_hold_no_gpu() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights")
        torch.save({"w": torch.ones(2)}, path)
        assert torch.load(path, map_location="cuda", weights_only=True)["w"].device == GPU
        torch.save(torch.ones(2, device="cuda"), path)
    assert [text.split(" at ")[0] for text in LEDGER.report.faults] == [
        "a tensor on a GPU is pickled"
    ]
    LEDGER.report.faults.clear()


if __name__ == "__main__":
    for check in (
        values_and_types_are_those_of_a_gpu,
        devices_do_not_mix,
        the_host_waits_where_values_are_needed,
        page_locked_memory_is_known,
        late_copies_hold_garbage_until_something_waits,
        only_what_was_waited_for_has_arrived,
        streams_wait_for_each_other,
        memory_outlives_its_use_on_another_stream,
        tf32_rounds_where_it_is_allowed,
        lists_of_tensors_are_one_kernel,
        attention_is_one_kernel,
        views_launch_nothing,
        a_graph_computes_again_what_was_captured,
        graphs_of_a_pool_overwrite_each_other,
        a_capture_takes_no_waits_and_no_copies,
        operations_without_deterministic_kernels_are_refused,
        checkpoints_hold_no_gpu,
    ):
        check()
        print("checked:", check.__name__.replace("_", " "))
