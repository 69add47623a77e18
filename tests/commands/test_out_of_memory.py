"""Too little memory, in each library's own words, wherever it is needed: a sentence, code 1."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import pytest
import torch
from torch.distributed import DistBackendError

from helpers.short_runs import arguments, write_data
from helpers.trainers import LOSS, make_sample, make_trainer, val_batches
from samft import train
from samft.checkpoints.training_state import load_latest, save_last
from samft.cli import run_command
from samft.data.dataset import Batch, collate
from samft.errors import (
    CheckpointError,
    TrainingError,
    explain_out_of_memory,
    is_out_of_memory,
)
from samft.evaluation.evaluator import evaluate_split
from samft.evaluation.validation import validate
from samft.images.formats import read_values
from samft.images.limits import UnusableImage
from samft.models.prompted_sam import PromptedSam
from samft.runtime import heartbeat
from samft.runtime.heartbeat import explain_distributed_errors
from samft.training.engine import Trainer
from samft.training.engine import train as train_loop

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.02 GiB is free."
)
NCCL = (
    "[1] NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, unhandled "
    "cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.7\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
WORKER = "Caught {} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 281474976710656 bytes. Error code 12 (Cannot allocate memory)"
)
# Source of the messages: the libraries' own code, and what their users report.
SHORT_OF_MEMORY: list[BaseException] = [
    torch.OutOfMemoryError(CUDA),
    torch.OutOfMemoryError(),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    DistBackendError(NCCL + "Cuda failure 2 'out of memory'"),
    DistBackendError(NCCL),
    RuntimeError(CPU_ALLOCATOR),
    RuntimeError(WORKER.format("RuntimeError") + f"RuntimeError: {CPU_ALLOCATOR}"),
    RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Success (0)"),
    RuntimeError("std::bad_alloc"),
    RuntimeError(
        "Caught RuntimeError in pin memory thread for device 0.\nOriginal Traceback\n"
        "RuntimeError: CUDA error: out of memory"
    ),
    MemoryError(),
    cv2.error("(-4:Insufficient memory) Failed to allocate 25769803776 bytes"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHERWISE: list[BaseException] = [
    DistBackendError(NCCL + "Cuda failure 217 'peer access is not supported between these GPUs'"),
    DistBackendError("NCCL communicator was aborted on rank 1"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    OSError(errno.ENOSPC, "No space left on device"),
    CheckpointError("out of memory.ckpt is no checkpoint."),
    TrainingError("process 1 failed at step 3: CUDA out of memory."),
]


@pytest.mark.parametrize("error", SHORT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_every_librarys_words_are_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)
    with (
        pytest.raises(TrainingError) as caught,
        explain_out_of_memory(lambda: "for it", advice="."),
    ):
        raise error
    assert str(caught.value).startswith("not enough memory for it")


@pytest.mark.parametrize("error", OTHERWISE, ids=lambda error: str(error)[:40])
def test_other_failures_are_left_as_they_are(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, explain_out_of_memory(lambda: "for it", advice="."):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (torch.OutOfMemoryError(CUDA), ": CUDA out of memory. Advice"),
        (
            DistBackendError(NCCL + "Cuda failure 2 'out of memory'"),
            ": Cuda failure 2 'out of memory'.",
        ),
        (MemoryError(), "for it. Advice"),
        (
            RuntimeError(WORKER.format("RuntimeError") + "RuntimeError: CUDA error: out of memory"),
            ": RuntimeError: CUDA error: out of memory. Advice",
        ),
    ],
)
def test_the_sentence_quotes_the_line_that_names_the_cause(
    error: BaseException, cause: str
) -> None:
    with pytest.raises(TrainingError) as caught:
        with explain_out_of_memory(lambda: "for it", advice="Advice."):
            raise error
    assert cause in str(caught.value)


@pytest.mark.parametrize("error", SHORT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_anywhere_else_a_command_says_it_without_a_traceback(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> None:
        with explain_distributed_errors():
            raise error

    assert run_command(main, []) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: not enough memory on this GPU or host")
    assert "Traceback" not in stderr.replace("Original Traceback", "") and stderr.count("\n") == 1


def giving_out(owner: Any, name: str) -> Any:
    return mock.patch.object(owner, name, side_effect=torch.OutOfMemoryError(CUDA))


def test_in_a_step_the_sentence_names_the_batch() -> None:
    trainer = make_trainer()
    batch = collate([make_sample(3), make_sample(4)])
    with giving_out(trainer, "_forward"), pytest.raises(TrainingError) as caught:
        trainer.train_step([batch])
    assert str(caught.value).startswith(
        f"not enough memory for a batch of 2 images with {batch.num_masks} objects (image ids 3, 4)"
        ": CUDA out of memory. Lower batch_size"
    )


def test_in_the_optimizers_step_it_names_what_the_optimizer_keeps() -> None:
    trainer = make_trainer()
    with giving_out(trainer.optimizer, "step"), pytest.raises(TrainingError) as caught:
        trainer.train_step([collate([make_sample(1)])])
    assert str(caught.value).startswith("not enough memory for the optimizer's step: CUDA out of")
    assert "--optimizer_sharding" in str(caught.value)


def test_at_the_start_where_nccl_allocates() -> None:
    failure = DistBackendError(NCCL + "Cuda failure 2 'out of memory'")
    with mock.patch("samft.training.engine.wrap_ddp", side_effect=failure):
        with pytest.raises(
            TrainingError, match="not enough memory to begin training: Cuda failure"
        ):
            make_trainer()


def test_while_batches_are_loaded_it_names_their_images() -> None:
    trainer = make_trainer()
    heartbeat.set_loading(lambda: ["image_7.png"])

    def load() -> Iterator[Batch]:
        raise RuntimeError(WORKER.format("RuntimeError") + f"RuntimeError: {CPU_ALLOCATOR}")
        yield

    with pytest.raises(TrainingError) as caught:
        train_loop(
            trainer,
            load(),
            steps=1,
            accumulate_steps=1,
            interval=1,
            should_stop=lambda: False,
            on_step=lambda taken, image_ids: None,
            on_interval=lambda metrics: None,
        )
    assert "to load images image_7.png: RuntimeError: [enforce fail" in str(caught.value)
    assert "Lower num_workers" in str(caught.value)


def test_a_loader_worker_that_the_system_killed_may_have_had_too_little() -> None:
    with pytest.raises(
        TrainingError, match="where memory runs out: lower num_workers if it did, at"
    ):
        with explain_distributed_errors():
            raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")


def validate_split(trainer: Trainer) -> None:
    validate(trainer.model, val_batches(1), loss=LOSS)


def evaluate(trainer: Trainer) -> None:
    evaluate_split(trainer.model, val_batches(1))


@pytest.mark.parametrize("score", [validate_split, evaluate])
@pytest.mark.parametrize("part", ["embed", "decode"])
def test_in_validation_and_evaluation_it_names_the_image(
    score: Callable[[Trainer], None], part: str
) -> None:
    trainer = make_trainer()
    (batch,) = val_batches(1)
    with giving_out(trainer.model, part), pytest.raises(TrainingError) as caught:
        score(trainer)
    objects = f"{batch.num_masks} objects"
    assert f"for image {batch.image_ids[0]} with {objects}: CUDA out" in str(caught.value)


@pytest.mark.run
def test_while_embeddings_are_computed_it_names_the_image(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", num_train=2, num_val=1)
    settings = {"freeze_image_encoder": True, "cache_embeddings": "on", "steps": 2}
    with giving_out(PromptedSam, "encode_frozen"), pytest.raises(TrainingError) as caught:
        train.main(arguments(data, tmp_path / "run", **settings))
    assert str(caught.value).startswith("not enough memory to encode ")
    assert ".png: CUDA out of memory. Lower image_size" in str(caught.value)


def test_a_whole_state_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    # It would be renamed, and the run would go on from an older one.
    save_last(tmp_path, {"progress": {"step": 1}})
    save_last(tmp_path, {"progress": {"step": 2}})
    with mock.patch("torch.load", side_effect=RuntimeError(CPU_ALLOCATOR)):
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
            load_latest(tmp_path)


def test_an_image_that_is_too_large_for_the_memory_is_not_damaged() -> None:
    failure = RuntimeError("(-4:Insufficient memory) Failed to allocate 25769803776 bytes")
    with mock.patch("PIL.Image.open", side_effect=failure), pytest.raises(UnusableImage) as caught:
        read_values(b"anything")
    assert caught.value.code == "image-too-large"
