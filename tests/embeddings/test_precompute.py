"""The pass that fills a cache: whatever ends it, what it recorded is whole and not done again."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

from helpers.cached_runs import counted_encodings
from helpers.coco_files import write_coco
from helpers.gloo_pool import GlooPool
from samft import distributed
from samft.coco.subset import read_coco
from samft.data.dataset import Coco2MaskDataset
from samft.embeddings.precompute import EncodingPass
from samft.embeddings.split_cache import SplitCache, hash_images
from samft.embeddings.store import EmbeddingStore
from samft.errors import UserError
from samft.images.decoder import open_image
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.models.trainable import freeze

NUM_IMAGES = 7


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_coco(tmp_path, NUM_IMAGES)
    return tmp_path


def make_model(scale: float = 1.0) -> PromptedSam:
    torch.manual_seed(0)
    sam = build_sam("vit_tiny", 64)
    freeze(sam, ["image_encoder"])
    with torch.no_grad():
        sam.image_encoder.neck[3].weight.mul_(scale)
    return PromptedSam(sam)


def open_cache(root: Path, *, dtype: str = "float32", amp_dtype: Any = None) -> SplitCache:
    annotations = root / "train" / "_annotations.coco.json"
    subset = read_coco(annotations, annotations.parent, on_bad_image="skip")
    dataset = Coco2MaskDataset(annotations.parent, subset=subset, image_size=64, training=True)
    stores = tuple(
        EmbeddingStore(root / "cache" / name, shape=(128, 4, 4), dtype=dtype)
        for name in ("plain", "flip")
    )
    if distributed.is_main():
        for store in stores:
            store.create({})
    distributed.barrier()
    files = hash_images(subset, on_bad_image="skip", should_stop=lambda: False)
    assert files is not None
    cache = SplitCache(dataset, amp_dtype, stores, files)
    cache.find_missing()
    return cache


def fill(cache: SplitCache, *, model: PromptedSam | None = None, **options: Any) -> bool:
    settings: dict[str, Any] = {
        "on_bad_image": "error",
        "num_workers": 0,
        "should_stop": lambda: False,
        "sync_seconds": 0,
        **options,
    }
    return EncodingPass(cache, model or make_model(), **settings).run()


def check_whole(root: Path, *, dtype: str = "float32", amp_dtype: Any = None) -> None:
    """All that is recorded is what the encoder gives for that image, and nothing is missing."""
    cache, model = open_cache(root, dtype=dtype, amp_dtype=amp_dtype), make_model()
    assert cache.missing == []
    cache.attach_to_dataset()
    cached = cache.dataset.embeddings
    assert cached is not None
    for row in range(NUM_IMAGES):
        encoded = open_image(cache.dataset.subset.path(row))
        frames = [
            cache.dataset.full_frame(encoded.size, flipped=flipped) for flipped in (False, True)
        ]
        pixels = np.stack([cache.dataset.decode_pixels(encoded, frame) for frame in frames])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        sizes = torch.tensor([frame.input_size for frame in frames])
        with torch.autocast("cpu", dtype=amp_dtype, enabled=amp_dtype is not None):
            expected = [
                model.embed(images[k : k + 1], sizes[k : k + 1])[0].to(getattr(torch, dtype))
                for k in (0, 1)
            ]
        for flipped in (False, True):
            read = torch.from_numpy(cached.read(row, flipped=flipped))
            assert torch.equal(read, expected[int(flipped)])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_are_those_of_images_and_of_flipped_images(
    root: Path, dtype: str, num_workers: int
) -> None:
    with counted_encodings() as counts:
        assert fill(open_cache(root, dtype=dtype), num_workers=num_workers)
    assert counts == [1] * 2 * NUM_IMAGES  # whatever else is missing
    check_whole(root, dtype=dtype)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_the_bytes_of_an_embedding_do_not_depend_on_what_else_was_missing(
    root: Path, amp_dtype: Any
) -> None:
    fill(open_cache(root, amp_dtype=amp_dtype))
    names = [root / "cache" / name / "embeddings.bin" for name in ("plain", "flip")]
    whole = [name.read_bytes() for name in names]
    for k, rows in ((0, (1, 4)), (1, (4, 5)), (0, range(NUM_IMAGES))):
        cache = open_cache(root, amp_dtype=amp_dtype)
        cache.stores[k].forget([cache.slots[k][cache.files.digest_of(row)] for row in rows])
        fill(open_cache(root, amp_dtype=amp_dtype))
        assert [name.read_bytes() for name in names] == whole


def test_embeddings_are_in_the_precision_of_training(root: Path) -> None:
    fill(open_cache(root, amp_dtype=torch.bfloat16))
    check_whole(root, amp_dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="equal"):
        check_whole(root)


def die_after(number: int, how: Any) -> Any:
    def at(done: int) -> None:
        if done == number:
            how()

    return at


def fail() -> None:
    raise RuntimeError("the device was lost")


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_filling(root: Path) -> None:
    with counted_encodings(at=die_after(6, kill_myself)):
        fill(open_cache(root))


def test_a_killed_pass_resumes_where_it_was(root: Path) -> None:
    process = torch.multiprocessing.get_context("spawn").Process(
        target=die_while_filling, args=(root,)
    )
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    cache = open_cache(root)
    assert len(cache.missing) == NUM_IMAGES - 3
    with counted_encodings() as counts:
        assert fill(cache)
    assert sum(counts) == 2 * (NUM_IMAGES - 3)
    check_whole(root)


def test_a_pass_that_fails_costs_at_most_a_round(root: Path) -> None:
    with counted_encodings(at=die_after(6, fail)), pytest.raises(RuntimeError, match="lost"):
        fill(open_cache(root), sync_seconds=100)
    assert len(open_cache(root).missing) == NUM_IMAGES
    with counted_encodings(at=die_after(6, fail)), pytest.raises(RuntimeError, match="lost"):
        fill(open_cache(root))
    assert len(open_cache(root).missing) == NUM_IMAGES - 3


def test_a_stop_in_the_middle_of_a_round_loses_nothing(root: Path) -> None:
    stop: list[str] = []
    with counted_encodings(at=die_after(6, lambda: stop.append("SIGTERM"))) as counts:
        assert not fill(open_cache(root), sync_seconds=100, should_stop=lambda: bool(stop))
    assert sum(counts) == 8  # the image under way is finished
    cache = open_cache(root)
    assert len(cache.missing) == NUM_IMAGES - 4
    assert fill(cache)
    check_whole(root)


def fill_on_this_rank(root: Path, dies_on: int | None = None) -> tuple[bool, int]:
    stop: list[str] = []
    mine = distributed.get_rank() == dies_on
    at = die_after(2, lambda: stop.append("SIGTERM")) if mine else None
    with counted_encodings(at=at) as counts:
        finished = fill(open_cache(root), should_stop=lambda: bool(stop))
    return finished, sum(counts)


def test_two_processes_share_the_work_and_the_result(gloo2: GlooPool, root: Path) -> None:
    assert gloo2.run(fill_on_this_rank, root) == [(True, 8), (True, 6)]
    check_whole(root)


def test_a_signal_to_one_process_stops_both(gloo2: GlooPool, root: Path) -> None:
    results = gloo2.run(fill_on_this_rank, root, 1)
    assert [finished for finished, _ in results] == [False, False]
    done = sum(number for _, number in results)
    assert 0 < done < 2 * NUM_IMAGES
    results = gloo2.run(fill_on_this_rank, root)
    assert [finished for finished, _ in results] == [True, True]
    assert sum(number for _, number in results) == 2 * NUM_IMAGES - done
    check_whole(root)


# What a user has to mend


def full_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    pwrite, calls = os.pwrite, []

    def write(file: int, content: bytes, at: int) -> int:
        if len(content) >= 4096:  # an embedding, not a record
            calls.append(at)
            if len(calls) <= number:
                return pwrite(file, content, at)
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, content, at)

    monkeypatch.setattr(os, "pwrite", write)


def test_a_full_disk_is_reported_and_what_was_written_counts(root: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        full_after(patch, 5)
        with pytest.raises(UserError) as caught:
            fill(open_cache(root), sync_seconds=100)
    text = str(caught.value)
    assert text.startswith(f"cache_dir: {root / 'cache'} cannot be written (No space left")
    assert "make room" in text and "`--cache_embeddings off`" in text
    cache = open_cache(root)
    assert len(cache.missing) == NUM_IMAGES - 2 and cache.missing[0][1] == (1,)
    assert fill(cache)
    check_whole(root)


def full_on_rank_1(root: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if distributed.get_rank() == 1:
            full_after(patch, 0)
        with pytest.raises(UserError) as caught:
            fill(open_cache(root))
    return str(caught.value)


def test_a_full_disk_on_one_rank_ends_all(gloo2: GlooPool, root: Path) -> None:
    first, second = gloo2.run(full_on_rank_1, root)
    assert first == second and "No space left on device" in first


def break_image(root: Path, number: int) -> None:
    """Whole at both ends, nonsense in between, and after the index was built: nothing knows."""
    open_cache(root)
    path = root / "train" / f"image_{number}.png"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])


def test_an_image_that_cannot_be_decoded(root: Path) -> None:
    break_image(root, 2)
    with pytest.raises(UserError, match=r"image_2\.png is (broken|damaged)"):
        fill(open_cache(root))
    cache = open_cache(root)
    assert fill(cache, on_bad_image="skip")
    assert list(cache.files.bad_images) == [2]
    assert [row for row, _ in open_cache(root).missing] == [2]  # it may have been mended


def test_an_image_that_changes_under_way(root: Path) -> None:
    cache = open_cache(root)
    for name in ("image_1.png", "image_3.png"):
        (root / "train" / name).write_bytes((root / "train" / "image_0.png").read_bytes())
    with pytest.raises(UserError, match=r"image_1\.png was changed while it was read"):
        fill(cache, on_bad_image="skip")


def test_what_float16_cannot_hold_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"cache_dtype: .*not finite as float16: take float32"):
        fill(open_cache(root, dtype="float16"), model=make_model(scale=1e5))
    assert fill(open_cache(root, dtype="float32"), model=make_model(scale=1e5))


def test_progress_is_logged(root: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", logger="samft"):
        fill(open_cache(root))
    assert f"encoded {NUM_IMAGES} images in" in caplog.text
    assert np.all([record.levelname == "INFO" for record in caplog.records])
