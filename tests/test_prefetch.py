from collections.abc import Iterator

import pytest
import torch

from samft.batch import Batch
from samft.errors import DataError
from samft.prefetch import on_device
from test_engine import val_batches

CPU = torch.device("cpu")


def test_all_batches_come_in_their_order() -> None:
    batches = val_batches(4)
    found = list(on_device(batches, CPU))
    assert [batch.image_ids for batch in found] == [batch.image_ids for batch in batches]
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, batches, strict=True))
    assert list(on_device([], CPU)) == []


def test_the_next_is_fetched_before_this_one_is_used() -> None:
    fetched = []

    def source() -> Iterator[Batch]:
        for batch in val_batches(3):
            fetched.append(batch.image_ids)
            yield batch

    stream = on_device(source(), CPU)
    next(stream)
    assert len(fetched) == 2
    next(stream)
    assert len(fetched) == 3


def test_an_error_comes_after_the_batches_before_it() -> None:
    def source() -> Iterator[Batch]:
        yield from val_batches(2)
        raise DataError("a broken image")

    stream = on_device(source(), CPU)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(DataError, match="a broken image"):
        next(stream)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_nothing_is_used_before_it_is_there() -> None:
    device = torch.device("cuda")
    batches = [batch.pin_memory() for batch in val_batches(8)]
    work = torch.randn(4096, 4096, device=device)
    for batch, expected in zip(on_device(batches, device), batches, strict=True):
        for _ in range(10):
            work = (work @ work).tanh()
        assert batch.images.is_cuda and torch.equal(batch.images.cpu(), expected.images)
