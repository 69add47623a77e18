"""Training with CUDA graphs computes what training without them does, on pretended GPUs."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.pretend_cuda.runs import needs_harness, run_with_pretended_gpus
from helpers.trainers import SIZE, make_sample
from samft.data.dataset import collate
from samft.models import cuda_graphs
from samft.models.chunked_loss import AddChunk, BoxDecoder, LossInputs
from samft.models.cuda_graphs import ChunkGraphs, CudaGraphs
from samft.models.mask_decoder import FAST
from samft.models.prompted_sam import PromptedSam
from samft.models.prompts import Prompts
from samft.models.sam import build_sam
from samft.models.trainable import freeze
from samft.training.losses import mask_losses


@pytest.mark.processes
@needs_harness
@pytest.mark.parametrize(
    ("checks", "processes"),
    [
        (["compare_gradients", "freeze_parts", "count_launches", "move_weights"], 1),
        (["resume", "resume:bfloat16", "compare_steps:float16", "fall_back"], 1),
        (["compare_steps"], 2),
    ],
    ids=["gradients", "steps", "two ranks"],
)
def test_graphs_compute_what_is_computed_without(
    checks: Sequence[str], processes: int, tmp_path: Path
) -> None:
    run = run_with_pretended_gpus(
        "helpers.graphed_training", checks, folder=tmp_path, processes=processes, timeout=600
    )
    assert run.code == 0, run.output
    assert run.output.count("checked:") == processes * len(checks), run.output
    assert not any(report.faults for report in run.reports)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_nothing_is_recorded_while_autograd_looks_on() -> None:
    graphs = CudaGraphs()
    tensor = torch.ones(2, requires_grad=True)
    assert graphs.run(lambda x: (x * 2,), (tensor,), key="double") is None
    with torch.no_grad(), torch.autograd.detect_anomaly(check_nan=False):
        assert graphs.run(lambda x: (x * 2,), (tensor,), key="double") is None
    assert graphs.num_recordings == 0 and not graphs.failed


class CalledFunctions(CudaGraphs):
    """Calls what a GPU would record; notes how many boxes it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def run(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        *,
        key: Hashable,
    ) -> tuple[Tensor, ...]:
        self.sizes.append(len(inputs[-1]))  # the gradient of each box's loss
        return function(*inputs)


@pytest.fixture(scope="module")
def model() -> PromptedSam:
    torch.manual_seed(0)
    model = PromptedSam(build_sam("vit_tiny", SIZE))
    freeze(model.sam, ["image_encoder"])
    return model


def losses_and_gradients(
    model: PromptedSam, *, num_images: int, mask_chunk: int, add_chunk: AddChunk | None
) -> list[Tensor]:
    """Of embeddings and parameters, for boxes of a few images."""
    batch = collate([make_sample(number) for number in range(num_images)])
    shape = (num_images, *model.embedding_shape)
    embeddings = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    decoder = BoxDecoder(model.sam.mask_decoder, FAST, batch.image_index, mask_chunk)
    total, values = decoder.sum_losses(
        model._decoder_inputs(embeddings, Prompts(boxes=batch.boxes)),
        loss=mask_losses,
        loss_inputs=LossInputs(batch.targets, batch.windows, batch.image_index, batch.input_sizes),
        gradient=torch.tensor(0.5),
        add_chunk=add_chunk,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(0.5 * total, [embeddings, *parameters])
    return [*values, *gradients]


@pytest.mark.parametrize(
    ("num_images", "mask_chunk", "least", "sizes"),
    [
        (1, 64, 8, [8]),  # one box
        (2, 64, 8, [8]),  # five
        (2, 64, 16, [16]),
        (5, 64, 8, [16]),  # fifteen
        (5, 7, 8, [7, 7, 7]),  # no chunk is larger than asked for
        (5, 12, 8, [12, 8]),
    ],
)
def test_boxes_that_pad_a_chunk_add_nothing(
    model: PromptedSam,
    monkeypatch: pytest.MonkeyPatch,
    num_images: int,
    mask_chunk: int,
    least: int,
    sizes: list[int],
) -> None:
    monkeypatch.setattr(cuda_graphs, "MIN_PADDED_BOXES", least)
    graphs = ChunkGraphs()
    graphs.graphs = called = CalledFunctions()
    options = {"num_images": num_images, "mask_chunk": mask_chunk}
    padded = losses_and_gradients(model, **options, add_chunk=graphs.add_chunk)
    expected = losses_and_gradients(model, **options, add_chunk=None)
    assert called.sizes == sizes
    for one, other in zip(padded, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
