"""Training with CUDA graphs, beside training without; run with pretended GPUs, on one or two ranks.

`test_cuda_graphs.py` names the checks to run.
"""

import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helpers.pretend_cuda.ledger import LEDGER
from helpers.trainers import SIZE, make_sample, unreadable, val_batches
from samft import distributed
from samft.data.dataset import Batch, collate
from samft.evaluation.validation import validate
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.models.trainable import freeze
from samft.training.engine import Trainer
from samft.training.losses import MaskLosses, mask_losses
from samft.training.optim import build_optimizer

TYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
RATE = 1e-3


def make_trainer(
    device: torch.device,
    *,
    cuda_graphs: bool,
    frozen: Sequence[str] = ("image_encoder",),
    **options: Any,
) -> Trainer:
    """A trainer of four boxes at once, so that the batches below have chunks of 1 to 4."""
    torch.manual_seed(0)
    sam = build_sam("vit_tiny", SIZE, attention="fast")
    freeze(sam, list(frozen))
    model = PromptedSam(sam.to(device), mask_chunk=4, cuda_graphs=cuda_graphs)
    optimizer = build_optimizer(model, learning_rate=RATE, weight_decay=0.1)
    options = {"loss": partial(mask_losses, focal_weight=5.0), **options}
    return Trainer(model, optimizer, learning_rate_at=lambda step: RATE, **options)


def make_batches(num_steps: int, *, first: int = 0) -> list[Batch]:
    """One image or two, each with 1 to 5 boxes; the third batch has no box."""
    batches = []
    for step in range(first, first + num_steps):
        samples = [make_sample(2 * step + number) for number in range(1 + step % 2)]
        batches.append(unreadable(step) if step == 2 else collate(samples))
    return batches


def recordings_of(trainer: Trainer) -> tuple[int, int]:
    """How many chunks and encoders are recorded; fails if a recording failed."""
    graphs, of_encoder = trainer.model.chunk_graphs, trainer.model.encoder_graphs
    assert graphs is not None and not graphs.graphs.failed
    assert of_encoder is not None and not of_encoder.failed
    return graphs.graphs.num_recordings, of_encoder.num_recordings


def copy_weights(source: Trainer, target: Trainer) -> None:
    """In place, as an optimizer changes them."""
    with torch.no_grad():
        for old, new in zip(target.parameters, source.parameters, strict=True):
            old.copy_(new)


def take_gradients(
    trainer: Trainer, batch: Batch, weight: Tensor
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of a batch, and the gradients of parameters by name."""
    total, losses = trainer._forward(batch.to(trainer.device), weight, position=None)
    trainer.scaler.scale(total * weight).backward()
    named = trainer.model.named_parameters()
    gradients = {name: p.grad.cpu() for name, p in named if p.grad is not None}
    trainer.optimizer.zero_grad()
    return losses, gradients


def assert_equal_gradients(
    gradients: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float
) -> None:
    """Relative to the largest; those of the image encoder, which come last, are less exact."""
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in gradients.items():
        factor = 100 if "image_encoder" in name else 1
        difference = (gradient - expected[name]).abs().max().item()
        assert difference <= factor * tolerance * largest, (name, difference / largest)


def compare_gradients(device: torch.device, amp: str) -> None:
    """Losses and gradients of ten steps whose weights differ are those without graphs."""
    plain, graphed = (
        make_trainer(device, cuda_graphs=on, amp_dtype=TYPES[amp]) for on in (False, True)
    )
    tolerance = 1e-6 if amp == "float32" else 1e-3
    for number, batch in enumerate(make_batches(10)):
        weight = torch.tensor(1.0 / (number + 1)).to(device)
        expected, expected_gradients = take_gradients(plain, batch, weight)
        losses, gradients = take_gradients(graphed, batch, weight)
        for one, other in zip(losses, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other.cpu(), rtol=tolerance, atol=tolerance)
        assert_equal_gradients(gradients, expected_gradients, tolerance=tolerance)
        plain.train_step([batch])
        copy_weights(plain, graphed)
    assert recordings_of(graphed) == (2, 2)  # of one image and of two


def compare_steps(device: torch.device, amp: str) -> None:
    """Steps of two micro-batches with validation between end where those without graphs do."""
    ends = []
    for cuda_graphs in (False, True):
        trainer = make_trainer(device, cuda_graphs=cuda_graphs, amp_dtype=TYPES[amp])
        if amp == "float16":  # such that the first step overflows
            scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, backoff_factor=2.0**-30)
            trainer.scaler = scaler
        scores = []
        batches = make_batches(6, first=10 * distributed.get_rank())
        for number in (0, 2, 4):
            trainer.train_step(batches[number : number + 2])
            validation = validate(trainer.model, val_batches(1), loss=trainer.loss)
            scores.append(validation.metrics["per_mask_iou"])
        ends.append((trainer, scores, trainer.pop_metrics()))
    (plain, plain_scores, plain_metrics), (graphed, scores, metrics) = ends
    assert all(recordings_of(graphed))
    assert graphed.progress.skipped_steps == plain.progress.skipped_steps
    assert (amp == "float16") == (plain.progress.skipped_steps > 0)
    assert plain.progress.step > 0
    for name in ("loss", "loss_focal", "loss_dice", "loss_iou"):
        assert abs(metrics[name] - plain_metrics[name]) < 1e-3, (name, metrics, plain_metrics)
    for one, other in zip(scores, plain_scores, strict=True):
        assert abs(one - other) < 0.02
    sums = [sum(p.double().sum().item() for p in graphed.parameters)]
    assert len(set(distributed.all_gather(sums[0]))) == 1  # of all ranks


def resume(device: torch.device, amp: str) -> None:
    """Stopped after three of six steps and started again, the weights are the same to the bit."""
    whole = make_trainer(device, cuda_graphs=True, amp_dtype=TYPES[amp])
    first = make_trainer(device, cuda_graphs=True, amp_dtype=TYPES[amp])
    batches = make_batches(6)
    for batch in batches:
        whole.train_step([batch])
    for batch in batches[:3]:
        first.train_step([batch])
    second = make_trainer(device, cuda_graphs=True, amp_dtype=TYPES[amp])
    second.model.sam.load_state_dict(first.model.sam.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.scaler.load_state_dict(first.scaler.state_dict())
    for batch in batches[3:]:
        second.train_step([batch])
    for one, other in zip(second.parameters, whole.parameters, strict=True):
        assert torch.equal(one, other)


def freeze_parts(device: torch.device, amp: str) -> None:
    """With a part frozen, what is left learns the same."""
    for part in ("image_encoder", "prompt_encoder", "mask_decoder"):
        options: dict[str, Any] = {"frozen": [part], "amp_dtype": TYPES[amp]}
        plain, graphed = (make_trainer(device, cuda_graphs=on, **options) for on in (False, True))
        batch, weight = make_batches(1, first=1)[0], torch.ones(()).to(device)
        _, expected = take_gradients(plain, batch, weight)
        for _ in range(2):
            _, gradients = take_gradients(graphed, batch, weight)
            assert_equal_gradients(gradients, expected, tolerance=1e-6)


def count_launches(device: torch.device, amp: str) -> None:
    """With cached embeddings, a step launches less than a third of what it did, one by one."""
    trainers = [make_trainer(device, cuda_graphs=on, amp_dtype=TYPES[amp]) for on in (False, True)]
    batch = make_batches(1)[0]
    batch.embeddings = torch.randn(1, *trainers[0].model.embedding_shape)
    for trainer in trainers:
        for _ in range(2):
            trainer.train_step([batch])
    plain, graphed = (LEDGER.report.steps[number] for number in (-3, -1))
    assert 3 * graphed.num_launches < plain.num_launches, (graphed, plain)
    assert graphed.num_launches <= 1110 / 3  # a third of what was once counted for vit_b
    assert graphed.launches["graph replay"] == -(-batch.num_masks // 4)
    assert graphed.captured.total() > 500
    assert graphed.waits == plain.waits


def fall_back(device: torch.device, amp: str) -> None:
    """A loss that cannot be recorded is computed without graphs, and that is said once."""

    def waiting_loss(*args: Any, **options: Any) -> MaskLosses:
        losses = mask_losses(*args, **options)
        assert losses.total.sum().item() >= 0
        return losses

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("samft").addHandler(handler)
    plain, graphed = (
        make_trainer(device, cuda_graphs=on, amp_dtype=TYPES[amp], loss=waiting_loss)
        for on in (False, True)
    )
    stream = torch.cuda.current_stream()
    for batch in make_batches(2):
        plain.train_step([batch])
        graphed.train_step([batch])
    for one, other in zip(graphed.parameters, plain.parameters, strict=True):
        assert torch.equal(one, other)
    assert torch.cuda.current_stream() is stream
    warnings = [message for message in messages if "cuda_graphs" in message]
    assert len(warnings) == 1 and "previous error in capture" in warnings[0], warnings
    LEDGER.report.faults.clear()


def move_weights(device: torch.device, amp: str) -> None:
    """Weights that lie elsewhere than in the recording are recorded anew."""
    plain, graphed = (
        make_trainer(device, cuda_graphs=on, amp_dtype=TYPES[amp]) for on in (False, True)
    )
    batch, weight = make_batches(1)[0], torch.ones(()).to(device)
    take_gradients(graphed, batch, weight)
    for trainer in (plain, graphed):
        for name, parameter in trainer.model.sam.mask_decoder.named_parameters():
            trainer.model.sam.mask_decoder.get_submodule(name.rpartition(".")[0])._parameters[
                name.rpartition(".")[2]
            ] = torch.nn.Parameter(parameter.detach() * 1.5, parameter.requires_grad)
    losses, expected = (take_gradients(t, batch, weight)[0][0] for t in (graphed, plain))
    torch.testing.assert_close(losses.cpu(), expected.cpu(), rtol=1e-6, atol=1e-6)


def main() -> None:
    """Runs the checks that the arguments name, as CHECK or CHECK:TYPE."""
    device = torch.device("cuda", 0)
    if "RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        distributed.start(device)
    for argument in sys.argv[1:]:
        name, _, amp = argument.partition(":")
        globals()[name](device, amp or "float32")
        print(f"checked: {argument}", flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
