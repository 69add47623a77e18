"""Checks of copies beside computation, each in a function; `test_transfers.py` runs them on
pretended GPUs."""

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from helpers.pretend_cuda.ledger import LEDGER
from helpers.pretend_cuda.stream_order import ORDER
from helpers.pretended_operations import kinds_of_waits
from helpers.trainers import SIZE, val_batches
from samft.checkpoints.async_saver import HostCopy
from samft.data.loaders import prefetch_to_device
from samft.data.transfers import Transfers, send_to
from samft.embeddings.precompute import _Encoded, _Encoder, _LoadedImage
from samft.embeddings.split_cache import MissingImage
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam

GPU = torch.device("cuda", 0)


def computation_waits_for_this_batch_and_not_for_the_next() -> None:
    made: list[torch.cuda.Stream] = []

    class NotedStream(torch.cuda.Stream):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            made.append(self)

    batches = [batch.pin_memory() for batch in val_batches(3)]
    with mock.patch("torch.cuda.Stream", NotedStream), kinds_of_waits():
        stream = prefetch_to_device(batches, GPU)
        for k in range(3):
            moved = next(stream)
            copying, computing = made[0], torch.cuda.current_stream()
            begun, waited_for = (each.reached[copying.number] for each in (copying, computing))
            # The copies of the next batch have begun; there is none after the last.
            assert waited_for < begun if k < 2 else waited_for == begun
            moved.images.sum()  # or else this would be a fault


def a_batch_arrives_as_it_was() -> None:
    batches = val_batches(3)
    pinned = [batch.pin_memory() for batch in batches]
    for moved, expected in zip(prefetch_to_device(pinned, GPU), batches, strict=True):
        assert torch.equal(moved.images.cpu(), expected.images)
        assert torch.equal(moved.boxes.cpu(), expected.boxes)


def a_result_is_read_once_it_is_there() -> None:
    transfers = Transfers(GPU)
    tensor = torch.arange(3.0, device="cuda")
    with kinds_of_waits():
        receive = transfers.to_host(tensor * 2)
    with kinds_of_waits("event.synchronize"):
        assert receive().tolist() == [0, 2, 4]


def nothing_waits_for_what_is_sent() -> None:
    with kinds_of_waits():
        sent = send_to(GPU, torch.arange(3.0))
    assert sent.tolist() == [0, 1, 2]


def loaded(number: int, stores: tuple[int, ...]) -> _LoadedImage:
    """An image of noise for these stores, page-locked."""
    generator = torch.Generator().manual_seed(number)
    shape = (len(stores), 3, SIZE, SIZE)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[SIZE, SIZE // 2]] * len(stores))
    return _LoadedImage(MissingImage(number, stores), pixels, sizes)


def encode(model: PromptedSam, dtype: str, images: list[_LoadedImage]) -> list[_Encoded]:
    """Encodes them all."""
    encoder = _Encoder(model, amp_dtype=None, dtype=dtype)
    encoded = [each for image in images for each in encoder.add(image)]
    assert {each.missing.row for each in encoded} | set(encoder.rows) == {
        image.missing.row for image in images
    }
    return encoded + list(encoder.flush())


def a_gpu_encodes_while_earlier_images_are_stored() -> None:
    images = [loaded(k, (0, 1) if k % 2 else (0,)) for k in range(4)]
    sam = build_sam("vit_tiny", SIZE, attention="fast")
    model = PromptedSam(sam).requires_grad_(False)
    expected = encode(model, "float32", images)
    assert [(each.missing.row, each.k) for each in expected] == [
        (0, 0),
        *((1, 0), (1, 1)),
        (2, 0),
        *((3, 0), (3, 1)),
    ]
    model.to(GPU)
    pinned = [image.pin_memory() for image in images]
    for dtype, num_batches in (("float32", 6), ("float16", 2)):
        with kinds_of_waits(*["event.synchronize"] * num_batches):
            encoded = encode(model, dtype, pinned)
        for one, other in zip(encoded, expected, strict=True):
            assert (one.missing, one.k) == (other.missing, other.k)
            assert one.embedding.dtype == dtype
            if dtype == "float32":
                assert (one.embedding == other.embedding).all()  # to the bit
            else:
                difference = abs(one.embedding.astype("float32") - other.embedding).max()
                assert difference < 1e-3 * abs(other.embedding).max(), difference


def a_copied_state_takes_little_more_page_locked_memory_than_it_has_bytes() -> None:
    page_locked: list[int] = []
    stock = torch.empty

    def empty(*args: Any, **options: Any) -> torch.Tensor:
        made = stock(*args, **options)
        if options.get("pin_memory"):  # as PyTorch rounds it up
            page_locked.append(1 << (made.nbytes - 1).bit_length())
        return made

    sizes = [2_100_000, 1_100_000, 700_000, 140_000, 0, 1]
    state = {k: torch.arange(float(size), device="cuda") for k, size in enumerate(sizes)}
    state[6] = torch.ones(2, 3, device="cuda", dtype=torch.bfloat16).T
    with mock.patch("torch.empty", empty):
        copied = HostCopy().copy(state)
    assert sum(page_locked) == 2**24, page_locked  # for 16.2 of its 16.8 million bytes
    for key, tensor in state.items():
        assert copied[key].is_pinned() or not tensor.numel()
        assert torch.equal(copied[key], tensor.cpu()) and copied[key].stride() == tensor.stride()
        assert copied[key].untyped_storage().nbytes() == max(tensor.nbytes, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        torch.save(copied, path)
        assert path.stat().st_size < 1.01 * sum(tensor.nbytes for tensor in state.values())


if __name__ == "__main__":
    for check in (
        computation_waits_for_this_batch_and_not_for_the_next,
        a_batch_arrives_as_it_was,
        a_result_is_read_once_it_is_there,
        nothing_waits_for_what_is_sent,
        a_gpu_encodes_while_earlier_images_are_stored,
        a_copied_state_takes_little_more_page_locked_memory_than_it_has_bytes,
    ):
        check()
        ORDER.look_for_early_reuse()
        assert not LEDGER.report.faults, LEDGER.report.faults
        print("checked:", check.__name__.replace("_", " "))
