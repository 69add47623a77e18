"""CUDA graphs: work that is captured is not done, and is done again, as it was, at each replay.

A captured operation keeps its very tensors. A replay computes it from what these hold by then, and
writes into those that it returned when it was captured. So whatever captured code took from
elsewhere, a tensor of one batch or a number in Python, shows as a wrong result. As on a GPU:

- a capture computes nothing: what it made holds NaN until the first replay, and what was there
  before is left as it was;
- nothing may wait for the device meanwhile, or copy between host and device;
- a number on the host is for good what it was in the capture;
- graphs of one pool share memory: a replay of one overwrites what the others have made.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from helpers.pretend_cuda.device_rules import Operation
from helpers.pretend_cuda.ledger import LEDGER
from helpers.pretend_cuda.numerics import bind_kernel
from helpers.pretend_cuda.streams import Stream, use_stream

_pools = itertools.count(1)
_graphs_of_pools: dict[int, "weakref.WeakSet[CudaGraph]"] = {}


class CudaGraph:
    """A graph, as `torch.cuda.CUDAGraph`."""

    # The one that is captured now. There is one at a time, as in PyTorch.
    current: "CudaGraph | None" = None

    def __init__(self, keep_graph: bool = False) -> None:
        self._replays: list[Callable[[], None]] = []
        self._made: dict[int, Tensor] = {}  # a tensor of each storage, by the storage's address
        self._changed: dict[int, tuple[Tensor, Tensor]] = {}  # the same, and what it held before
        self._kernels: Counter[str] = Counter()
        self._capture = contextlib.ExitStack()
        self._pool = 0

    def capture_begin(self, pool: int | None = None, capture_error_mode: str = "global") -> None:
        """What is called from here on belongs to this graph."""
        assert CudaGraph.current is None, "one graph is captured at a time"
        self._pool, CudaGraph.current = pool or new_pool(), self
        self._kernels = self._capture.enter_context(LEDGER.capture())

    def capture_end(self) -> None:
        """Nothing more does; and nothing of it has been done."""
        CudaGraph.current = None
        self._capture.close()
        with torch.no_grad():
            for tensor, before in self._changed.values():
                tensor.copy_(before)
        self._changed.clear()
        self._overwrite()
        _graphs_of_pools.setdefault(self._pool, weakref.WeakSet()).add(self)

    def replay(self) -> None:
        """Does it again."""
        for other in _graphs_of_pools[self._pool]:
            if other is not self:
                other._overwrite()
        with torch.no_grad():
            for replay in self._replays:
                replay()
        LEDGER.replay(self._kernels)

    def pool(self) -> int:
        """Where its memory is, which another graph may share."""
        return self._pool

    def add(self, operation: Operation, args: Any, kwargs: Any) -> Any:
        """Captures an operation.

        Args:
            operation: As it was called.
            args: Its positional arguments with CPU tensors in their place.
            kwargs: Its keyword arguments, likewise.

        Returns:
            Its result, which holds values until the end of the capture only.
        """
        if kwargs.get("generator") is not None:
            refuse_to_capture("random numbers of a generator that the graph does not know")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if operation.func._schema.is_mutable:
            for tensor in tensors:
                self._keep(tensor)
        on_device = {id(t.values) for t in operation.tensors if t.is_cuda}

        def fix(leaf: Any) -> Any:
            is_on_host = isinstance(leaf, Tensor) and id(leaf) not in on_device
            return leaf.clone() if is_on_host else leaf

        args, kwargs = tree_map(fix, args), tree_map(fix, kwargs)
        kernel = bind_kernel(operation)
        result = kernel(args, kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = {_address(tensor) for tensor in tensors}
        for output in outputs:
            if _address(output) not in given:
                self._made.setdefault(_address(output), output)
        if not operation.func.is_view:
            self._replays.append(lambda: _copy_into(outputs, kernel(args, kwargs)))
        return result

    def _keep(self, tensor: Tensor) -> None:
        if _address(tensor) not in self._made and _address(tensor) not in self._changed:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self._changed[_address(tensor)] = (whole, whole.clone())

    def _overwrite(self) -> None:
        with torch.no_grad():
            for tensor in self._made.values():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))


class CaptureGraph:
    """Captures what is called within, as `torch.cuda.graph`."""

    def __init__(
        self,
        cuda_graph: CudaGraph,
        pool: int | None = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        self._graph, self._options = cuda_graph, (pool, capture_error_mode)
        self._stream = use_stream(stream or Stream())

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        self._stream.__enter__()
        self._graph.capture_begin(*self._options)

    def __exit__(self, *error: Any) -> None:
        # PyTorch leaves the stream as it is if this fails, which it does after an error within
        self._graph.capture_end()
        if error[0] is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error in capture")
        self._stream.__exit__(*error)


def new_pool() -> int:
    """Memory for graphs, as `torch.cuda.graph_pool_handle`."""
    return next(_pools)


def refuse_to_capture(what: str) -> None:
    """What a GPU refuses while it captures.

    Raises:
        RuntimeError: Always.
    """
    LEDGER.fault(f"{what} during the capture of a CUDA graph")
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _copy_into(outputs: list[Tensor], result: Any) -> None:
    again = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    for output, new in zip(outputs, again, strict=True):
        if output.data_ptr() != new.data_ptr():
            output.copy_(new)
