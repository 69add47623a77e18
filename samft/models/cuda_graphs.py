"""Functions recorded as CUDA graphs: one launch instead of hundreds, for steps that wait for them.

A decoder of a few boxes keeps a GPU busy for less time than the host needs to launch its kernels
one by one. A CUDA graph launches them all with one call: the same kernels, on the same memory, with
the same numbers baked in. So a recorded function

- computes its outputs from its inputs, and from tensors that stay where they are, such as
  parameters, whose content may change (in place) between calls;
- depends on no other Python value that changes: what its answer depends on is in its key;
- never makes the host wait, and draws no random numbers.

Inputs are copied into tensors of the recording's own, outputs out of them. Recordings can share the
memory of what is computed on the way; they run one after the other, on the current stream.
"""

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from samft.models.chunked_loss import ChunkedStep, Groups, LossInputs
from samft.models.two_way_transformer import Tensors
from samft.runtime.logs import LOGGER

# Boxes of a replayed chunk: padded to a power of two, and at least so many.
MIN_PADDED_BOXES = 8
_WARM_UPS = 2  # runs before the recording, in which libraries allocate and choose kernels
_MOST_RECORDINGS = 32
# A recording repeats the kernels of the runs before it; another order of additions is allowed for.
_TOLERANCE = 1e-2


class RecordingPlace:
    """Where recordings are made that share memory: a stream, and a pool of memory.

    Not one for the whole process: PyTorch refuses a pool whose recordings have all been deleted
    while memory in it is still in use.
    """

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """Made when it is first used, on the GPU of that moment."""
        return torch.cuda.Stream()

    @cached_property
    def pool(self) -> Any:
        """As `torch.cuda.graph` takes it."""
        return torch.cuda.graph_pool_handle()


class CudaGraphs:
    """Records functions, and replays them; without success, each is simply to be called.

    Attributes:
        failed: Whether a recording failed, after which nothing is recorded or replayed any more.
    """

    def __init__(self, place: RecordingPlace | None = None) -> None:
        """Nothing is recorded yet; needs no GPU before the first `run`.

        Args:
            place: To share memory with other recordings; None: with none but its own.
        """
        self.failed = False
        self._place = place or RecordingPlace()
        self._recordings: dict[Hashable, _Recording] = {}

    @property
    def num_recordings(self) -> int:
        """How many functions are recorded, or one with inputs of how many shapes."""
        return len(self._recordings)

    def run(
        self, function: Callable[..., Tensors], inputs: Tensors, *, key: Hashable
    ) -> Tensors | None:
        """The outputs of a function, by a recording that is made at the first call.

        Args:
            function: Tensors to tensors, see the top; runs under the autocast of the call.
            inputs: On one GPU.
            key: All else that the function's answer depends on. Recordings differ by key, by
                autocast, and by the shapes and types of the inputs.

        Returns:
            New tensors, without a gradient; None if there is no recording: one failed, or autograd
            looks on.
        """
        if self.failed or torch.is_grad_enabled() or torch.is_anomaly_enabled():
            return None
        device = inputs[0].device
        signature = (key, _autocast_state(device), tuple((t.shape, t.dtype) for t in inputs))
        recording = self._recordings.get(signature)
        if recording is None:
            recording = self._try_to_record(function, inputs)
            if recording is None:
                return None
            self._recordings[signature] = recording
        return recording.replay(inputs)

    def _try_to_record(
        self, function: Callable[..., Tensors], inputs: Tensors
    ) -> "_Recording | None":
        try:
            if len(self._recordings) == _MOST_RECORDINGS:
                raise RuntimeError(f"there are {_MOST_RECORDINGS} of them, for as many shapes")
            return self._record(function, inputs)
        except RuntimeError as error:  # out of memory, and all that CUDA reports, are such
            LOGGER.warning("cuda_graphs: none are used from now on, as recording failed: %s", error)
            self.failed = True
            self._recordings.clear()
            return None

    def _record(self, function: Callable[..., Tensors], inputs: Tensors) -> "_Recording":
        device = inputs[0].device
        stream, pool = self._place.stream, self._place.pool
        own_inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
        _copy_all(own_inputs, inputs)
        # Without autocast's cache: weights cast before the recording would not be cast in it.
        enabled, dtype = _autocast_state(device)
        autocast = torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        stream.wait_stream(current)
        # A recording that fails leaves its stream the current one: the outer block puts that right.
        with autocast, torch.cuda.stream(current):
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    expected = function(*own_inputs)
            current.wait_stream(stream)
            # Other threads copy batches and write checkpoints meanwhile: only this one must not.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                outputs = function(*own_inputs)
        graph.replay()
        if not all(_agree(*pair) for pair in zip(outputs, expected, strict=True)):
            raise RuntimeError("a recording computes other numbers than what it recorded")
        return _Recording(graph, own_inputs, outputs)


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Tensors  # what the graph reads
    outputs: Tensors  # what it writes

    def replay(self, inputs: Tensors) -> Tensors:
        """Runs the graph on other inputs."""
        _copy_all(self.inputs, inputs)
        self.graph.replay()
        # Copied, because the next replay, of this or any other recording, overwrites them.
        outputs = tuple(torch.empty_like(output) for output in self.outputs)
        _copy_all(outputs, self.outputs)
        return outputs


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies tensors into others of their shape and type: one launch for each type."""
    for dtype in {target.dtype for target in targets}:
        pairs = [p for p in zip(targets, sources, strict=True) if p[0].dtype == dtype]
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def _autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _agree(output: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(output, expected)
    largest = expected.nan_to_num(0, 0, 0).abs().amax().item() if expected.numel() else 0.0
    atol = _TOLERANCE * largest
    return torch.allclose(output, expected, rtol=_TOLERANCE, atol=atol, equal_nan=True)


class ChunkGraphs:
    """Replays chunks of boxes as CUDA graphs: decoder, losses and their gradients, one launch each.

    A graph is of one number of boxes. So there is one for 8, 16, 32, ... up to `mask_chunk`, and a
    chunk is padded with its last box, whose losses get a gradient of zero: it adds exactly zero.

    Attributes:
        graphs: The recordings.
    """

    def __init__(self, place: RecordingPlace | None = None) -> None:
        """Nothing is recorded yet; needs no GPU before the first chunk.

        Args:
            place: See `CudaGraphs`.
        """
        self.graphs = CudaGraphs(place)
        self._twin: tuple[Hashable, MaskDecoder] | None = None
        # Of each key: which tensors have a gradient. It is known when the chunk is recorded.
        self._have_gradients: dict[Hashable, list[bool]] = {}

    def add_chunk(
        self,
        step: ChunkedStep,
        sums: Groups[Tensor | None],
        tensors: Groups[Tensor],
        chunk: slice,
    ) -> Tensors | None:
        """As `ChunkedStep.add_chunk`; None if there is no graph, and nothing was added."""
        num_boxes = len(step.decoder.image_index[chunk])
        if num_boxes == 0:
            return None
        key_of_weights, twin = self._twin_of(step.decoder.module)
        padded, whole = _pad_chunk(step, tensors, chunk, twin)
        needed = tuple(tensor.requires_grad for tensor in whole.flatten())
        key = (key_of_weights, step.loss, step.decoder.implementation, needed)

        def compute(*inputs: Tensor) -> Tensors:
            own_step, own = _replace_inputs(padded, whole, inputs)
            own_sums = own_step.empty_sums(own)
            values = own_step.add_chunk(own_sums, own, slice(None))
            gradients = own_sums.flatten()
            self._have_gradients[key] = [gradient is not None for gradient in gradients]
            return (*(g for g in gradients if g is not None), *values)

        outputs = self.graphs.run(compute, _inputs_of(padded, whole), key=key)
        if outputs is None:
            return None
        remaining = iter(outputs)
        have = self._have_gradients[key]
        gradients = step.layout.regroup([next(remaining) if has else None for has in have])
        gradients.per_box[:] = [g if g is None else g[:num_boxes] for g in gradients.per_box]
        step.accumulate(sums, gradients, chunk, summed_by_image=True)
        return tuple(values[:num_boxes] for values in remaining)

    def _twin_of(self, module: MaskDecoder) -> tuple[Hashable, MaskDecoder]:
        """The decoder with parameters of its own that share the memory of the module's."""
        # Autograd ties a parameter to the stream that it is first used on, and the module's have
        # been used on another one: work on two streams cannot be recorded.
        state = tuple((p.data_ptr(), p.requires_grad) for p in module.parameters())
        if self._twin is None or self._twin[0] != state:
            aliases = {
                id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
                for p in module.parameters()
            }
            self._twin = (state, copy.deepcopy(module, aliases))
        return self._twin


def _pad_chunk(
    step: ChunkedStep, tensors: Groups[Tensor], chunk: slice, module: MaskDecoder
) -> tuple[ChunkedStep, Groups[Tensor]]:
    """A step of one chunk, padded, with a module that has the parameters of the step's."""
    num_boxes, most = len(step.decoder.image_index[chunk]), step.decoder.mask_chunk
    size = min(max(MIN_PADDED_BOXES, 1 << (num_boxes - 1).bit_length()), most)

    def pad(rows: Tensor) -> Tensor:
        more = size - num_boxes
        return torch.cat([rows, rows[-1:].expand(more, *rows.shape[1:])]) if more else rows

    *of_boxes, input_sizes = step.loss_inputs.rows(chunk)
    targets, windows, image_index = (pad(rows) for rows in of_boxes)
    loss_inputs = LossInputs(targets, windows, image_index, input_sizes)
    decoder = replace(step.decoder, module=module, image_index=image_index)
    gradient = F.pad(step.gradient.expand(num_boxes), (0, size - num_boxes))
    trained = [p for p in module.parameters() if p.requires_grad]
    per_box = [pad(rows[chunk]) for rows in tensors.per_box]
    for rows, whole in zip(per_box, tensors.per_box, strict=True):
        rows.requires_grad_(whole.requires_grad)
    padded = replace(step, decoder=decoder, loss_inputs=loss_inputs, gradient=gradient)
    return padded, replace(tensors, per_box=per_box, parameters=trained)


def _inputs_of(step: ChunkedStep, tensors: Groups[Tensor]) -> Tensors:
    """All tensors that differ from step to step."""
    changing = replace(tensors, parameters=[]).flatten()
    return (*changing, *step.loss_inputs, step.gradient)


def _replace_inputs(
    step: ChunkedStep, tensors: Groups[Tensor], inputs: Tensors
) -> tuple[ChunkedStep, Groups[Tensor]]:
    """The same with other tensors, in the order of `_inputs_of`."""
    *changing, targets, windows, image_index, input_sizes, gradient = inputs
    loss_inputs = LossInputs(targets, windows, image_index, input_sizes)
    decoder = replace(step.decoder, image_index=image_index)
    own = replace(tensors, parameters=[]).regroup(tensor.detach() for tensor in changing)
    for tensor, original in zip(own.flatten(), tensors.flatten(), strict=False):
        tensor.requires_grad_(original.requires_grad)
    own = replace(own, parameters=tensors.parameters)
    return replace(step, decoder=decoder, loss_inputs=loss_inputs, gradient=gradient), own
