"""Tensors on a pretended GPU, and what happens when PyTorch calls an operator with one of them.

`PretendCudaTensor` is a wrapper subclass (https://docs.pytorch.org/docs/stable/notes/extending.html)
whose device is CUDA for C++ as well. Autograd, autocast and DistributedDataParallel work above it
and call operators; each such call comes to `call_operator`, is checked as on a GPU, and is computed
on the values on the CPU.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Work
from torch._C._distributed_c10d import _create_work_from_future as create_work_from_future
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from helpers.pretend_cuda.determinism import describe_refusal
from helpers.pretend_cuda.device_rules import (
    Operation,
    describe_mix,
    kind_of_wait,
    mixes_devices,
)
from helpers.pretend_cuda.graphs import CudaGraph, refuse_to_capture
from helpers.pretend_cuda.launches import count_launches
from helpers.pretend_cuda.ledger import LEDGER
from helpers.pretend_cuda.numerics import bind_kernel
from helpers.pretend_cuda.stream_order import ORDER
from helpers.pretend_cuda.streams import PENDING, wait_for_device


class PretendCudaTensor(Tensor):
    """A tensor on a pretended GPU.

    Attributes:
        values: The same tensor on the CPU.
    """

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> "PretendCudaTensor":
        """A tensor on a device with these values, which are not copied."""
        tensor = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=device,
            requires_grad=False,
        )
        tensor.values = values
        return tensor

    @property
    def data(self) -> Tensor:
        """The tensor without its history; assigned, it replaces what the tensor holds."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        Tensor.data.__set__(self, other)
        assert isinstance(other, PretendCudaTensor)
        self.values = other.values

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operator with such a tensor."""
        return call_operator(func, args, kwargs or {})

    def __repr__(self, **options: Any) -> str:
        return f"PretendCudaTensor({self.values!r}, device='{self.device}')"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]
        duplicate: Tensor = PretendCudaTensor(self.values.detach().clone(), self.device)
        if isinstance(self, torch.nn.Parameter):
            duplicate = torch.nn.Parameter(duplicate, self.requires_grad)
        memo[id(self)] = duplicate.requires_grad_(self.requires_grad)
        return duplicate

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A real one is saved with its device, and all that samft writes is for any machine. What
        # is sent to another process, as ZeroRedundancyOptimizer does, is read back onto a device.
        if not LEDGER.is_called_by("torch.distributed"):
            LEDGER.fault("a tensor on a GPU is pickled")
        wait_for_device("pickle", only_current_stream=True)
        return copy.deepcopy(self.values.detach()).__reduce_ex__(protocol)

    def numpy(self, *args: Any, **options: Any) -> Any:
        """Refused, as on a GPU."""
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")

    __array__ = numpy

    def tolist(self) -> Any:
        """The values, once the device has them."""
        wait_for_device("tolist", only_current_stream=True)
        return self.values.tolist()

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        """A copy on the host."""
        return self.to("cpu", memory_format=memory_format)

    def data_ptr(self) -> int:
        """Of the values."""
        return self.values.data_ptr()

    def record_stream(self, stream: Any) -> None:
        """Says that a stream uses it, which is not the one that it was made on."""
        ORDER.record(self, stream)

    def is_pinned(self, *args: Any, **options: Any) -> bool:
        """Only memory of the host can be page-locked."""
        return False

    def pin_memory(self, *args: Any, **options: Any) -> Tensor:
        """Refused, as on a GPU."""
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")


class PretendCudaMode(TorchDispatchMode):
    """Sees operators without such a tensor too: those that make one, by their argument `device`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operator in a thread."""
        return call_operator(func, args, kwargs or {})


def call_operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls an operator as PyTorch would with a GPU.

    Raises:
        RuntimeError: Its tensors lie on different devices; or it is not deterministic and should.
    """
    operation = Operation(func, args, kwargs)
    if not operation.uses_cuda:
        return func(*args, **kwargs)
    if func.namespace == "c10d":
        return call_collective(operation)
    if func.namespace == "prim":
        return NotImplemented
    if mixes_devices(operation):
        LEDGER.fault(describe_mix(operation))
        raise RuntimeError(describe_mix(operation))
    if reason := describe_refusal(operation):
        LEDGER.fault(reason)
        raise RuntimeError(reason)
    if kind := kind_of_wait(operation):
        wait_for_device(kind, only_current_stream=True)
    LEDGER.launch(operation.name, count_launches(operation))
    ORDER.check(operation)
    is_transfer = _is_transfer(operation)
    result = _copy_between_devices(operation) if is_transfer else _compute(operation)
    ORDER.note(operation, result, is_transfer=is_transfer)
    return result


def _compute(operation: Operation) -> Any:
    device = with_index(operation.device)
    args, kwargs = to_values(operation.args), to_values(operation.kwargs)
    graph = CudaGraph.current if LEDGER.is_capturing else None
    values = graph.add(operation, args, kwargs) if graph else bind_kernel(operation)(args, kwargs)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(values)):
        return values
    known = {id(t.values): t for t in operation.tensors if isinstance(t, PretendCudaTensor)}

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, PretendCudaTensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else PretendCudaTensor(leaf, device)

    if device.type == "cpu":  # as `torch.empty_like(on_gpu, device="cpu")`
        return values
    result = tree_map(wrap, values)
    if not known:  # made from nothing
        return result
    return return_and_correct_aliasing(operation.func, operation.args, operation.kwargs, result)


def _is_transfer(operation: Operation) -> bool:
    if operation.name == "_to_copy":
        return operation.args[0].device != with_index(operation.device)
    return operation.name == "copy_" and operation.args[0].is_cuda != operation.args[1].is_cuda


def _copy_between_devices(operation: Operation) -> Tensor:
    """`_to_copy` and `copy_` from the host to a GPU, back, or between GPUs."""
    if operation.name == "copy_":
        target, source = operation.args[:2]
        positional = operation.args[2] if len(operation.args) > 2 else False
        non_blocking = operation.kwargs.get("non_blocking", positional)
        page_locked = (source if target.is_cuda else target).is_pinned()
    else:
        source, target = operation.args[0], None
        non_blocking = operation.kwargs.get("non_blocking", False)
        # PyTorch itself takes page-locked memory for the result of such a copy to the host
        page_locked = source.is_cuda or source.is_pinned()
    if LEDGER.is_capturing:
        refuse_to_capture("a copy between host and device")
    to_host = operation.device is not None and operation.device.type == "cpu"
    to_host = to_host or (target is not None and not target.is_cuda)
    direction = "to" if to_host else "from"
    late = non_blocking and page_locked
    if not late:
        memory = f"{direction} memory that is not page-locked" if non_blocking else ""
        wait_for_device(f"copy {memory or f'{direction} the host'}", only_current_stream=True)
    return _transfer(operation, target, late=late and to_host)


def _transfer(operation: Operation, target: Tensor | None, *, late: bool) -> Tensor:
    args, kwargs = to_values(operation.args), to_values(operation.kwargs)
    if target is not None:
        if late:
            PENDING.begin(target, args[1].to(target.dtype).expand_as(target))
        else:
            operation.func(*args, **kwargs)
        return target
    device = with_index(operation.device)
    values = bind_kernel(operation)(args, kwargs)
    if values.data_ptr() == args[0].data_ptr():  # for the CPU, nothing was to be copied
        values = values.clone()
    if device.type == "cuda":
        return PretendCudaTensor(values, device)
    if late:
        PENDING.begin(values, values)
    return values


def call_collective(operation: Operation) -> Any:
    """A collective operation: on the values, by gloo.

    Raises:
        Whatever the backend raises.
    """
    devices = {tensor.device.type for tensor in operation.tensors}
    LEDGER.collective(operation.name, devices)
    if len(devices) > 1:
        LEDGER.fault(f"{operation.func} with tensors on {sorted(devices)}")
    result = operation.func(*to_values(operation.args), **to_values(operation.kwargs))
    wrapped = {
        t.values.data_ptr(): t for t in operation.tensors if isinstance(t, PretendCudaTensor)
    }
    device = with_index(torch.device("cuda"))

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, PretendCudaTensor):
            return leaf
        place = leaf.data_ptr()
        return wrapped[place] if place in wrapped else PretendCudaTensor(leaf, device)

    if operation.name == "allreduce_":  # DistributedDataParallel takes the sums from its future
        tensors, work = result
        future = Work.unbox(work).get_future().then(lambda done: tree_map(wrap, done.value()))
        result = (tensors, create_work_from_future(future).boxed())
    return tree_map(wrap, result)


def to_values(tree: Any) -> Any:
    """The same arguments with tensors on the CPU in place of those on a GPU."""
    return tree_map(lambda t: t.values if isinstance(t, PretendCudaTensor) else t, tree)


def with_index(device: torch.device | None) -> torch.device:
    """`cuda` as `cuda:0`: the current device, where none is named."""
    assert device is not None
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
