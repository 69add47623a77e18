"""What embeddings depend on, and what of a split is there and what is missing."""

import dataclasses
import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.coco_files import write_coco
from helpers.gloo_pool import GlooPool
from samft import distributed
from samft.coco.subset import read_coco
from samft.data.dataset import Coco2MaskDataset
from samft.embeddings import split_cache as split_cache_module
from samft.embeddings.split_cache import (
    CacheKey,
    ImageDigests,
    SplitCache,
    hash_encoder,
    hash_images,
    name_precision,
)
from samft.embeddings.store import EmbeddingRecord, EmbeddingStore
from samft.errors import DataError, UserError
from samft.models.sam import build_sam

KEY = CacheKey("abc", 64, "pad", True, False, "float32", "float16")
OTHER: dict[str, Any] = {
    "encoder": "abd",
    "image_size": 80,
    "resize_mode": "squash",
    "exact": False,
    "flipped": True,
    "precision": "bfloat16",
    "dtype": "float32",
}


def test_every_field_of_a_key_changes_the_store_name() -> None:
    assert OTHER.keys() == {field.name for field in dataclasses.fields(CacheKey)}
    keys = {dataclasses.replace(KEY, **{name: value}).store_name for name, value in OTHER.items()}
    assert len(keys | {KEY.store_name}) == len(OTHER) + 1
    assert dataclasses.replace(KEY).store_name == KEY.store_name


def test_the_digest_is_of_the_encoder_only() -> None:
    sam = build_sam("vit_tiny", 64)
    before = hash_encoder(sam)
    with torch.no_grad():
        sam.mask_decoder.mask_tokens.weight.add_(1)
    assert hash_encoder(sam) == before
    for parameter in sam.image_encoder.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        after = hash_encoder(sam)
        assert after != before
        before = after
    sam.pixel_mean += 1
    assert hash_encoder(sam) != before


def test_precision_names_what_was_computed_in() -> None:
    assert name_precision(torch.bfloat16) == "bfloat16"
    assert name_precision(None) == "float32"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A split of 7 images, of which the last is a copy of the first, and one is broken."""
    annotations = write_coco(tmp_path, 7)
    folder = annotations.parent
    (folder / "image_6.png").write_bytes((folder / "image_0.png").read_bytes())
    index_of(annotations)  # before it breaks, so that its index does not know
    (folder / "image_3.png").write_bytes(b"")
    return annotations


def index_of(annotations: Path) -> Any:
    return read_coco(annotations, annotations.parent)


def digests_of(annotations: Path, *, on_bad_image: str = "skip") -> ImageDigests | None:
    subset = read_coco(annotations, annotations.parent, on_bad_image="skip")
    return hash_images(subset, on_bad_image=on_bad_image, should_stop=lambda: False)


def test_digests_are_of_contents_whatever_the_number_of_ranks(gloo2: GlooPool, split: Path) -> None:
    alone = digests_of(split)
    assert alone is not None
    for shared in gloo2.run(digests_of, split):
        assert np.array_equal(shared.digests, alone.digests)
        assert np.array_equal(shared.sizes, alone.sizes)
        assert shared.bad_images == alone.bad_images
    assert alone.digest_of(0) == alone.digest_of(6) != alone.digest_of(1)
    assert alone.sizes[1].tolist() == [64, 48]
    assert list(alone.bad_images) == [3] and "image_3.png" in alone.bad_images[3]


def refused(annotations: Path) -> str:
    with pytest.raises(UserError) as caught:
        digests_of(annotations, on_bad_image="error")
    return str(caught.value)


def test_an_unusable_image_ends_all_ranks(gloo2: GlooPool, split: Path) -> None:
    assert "image_3.png" in refused(split)
    assert gloo2.run(refused, split) == [refused(split)] * 2


def stopped_on_rank_1(annotations: Path) -> Any:
    subset = read_coco(annotations, annotations.parent, on_bad_image="skip")
    rank = distributed.get_rank()
    return hash_images(subset, on_bad_image="error", should_stop=lambda: rank == 1)


def test_all_ranks_stop_if_one_is_asked_to(gloo2: GlooPool, split: Path) -> None:
    (split.parent / "image_3.png").write_bytes((split.parent / "image_2.png").read_bytes())
    assert gloo2.run(stopped_on_rank_1, split) == [None, None]


def split_cache(annotations: Path) -> SplitCache:
    subset = read_coco(annotations, annotations.parent, on_bad_image="skip")
    dataset = Coco2MaskDataset(annotations.parent, subset=subset, image_size=64, training=True)
    stores = tuple(
        EmbeddingStore(annotations.parent.parent / name, shape=(8, 4, 4), dtype="float16")
        for name in ("plain", "flipped")
    )
    for store in stores:
        store.create({})
    files = hash_images(subset, on_bad_image="skip", should_stop=lambda: False)
    assert files is not None
    return SplitCache(dataset, None, stores, files)


def write_entries(cache: SplitCache, state: int, rows_to_slots: dict[int, int]) -> None:
    for row, slot in rows_to_slots.items():
        values = np.full((8, 4, 4), row, np.float16)
        cache.stores[state].write(slot, values)
        cache.stores[state].sync()
        checksum = zlib.crc32(values.tobytes())
        digest = cache.files.digest_of(row)
        cache.stores[state].commit([EmbeddingRecord(slot, digest, (1, 1), checksum)])


def test_missing_images_get_free_slots_and_copies_share_one(split: Path) -> None:
    cache = split_cache(split)
    write_entries(cache, 0, {1: 0, 4: 3})
    write_entries(cache, 1, {4: 0})
    cache.find_missing()
    assert cache.missing == [(0, (0, 1)), (1, (1,)), (2, (0, 1)), (5, (0, 1))]
    where = [
        {row: slots[cache.files.digest_of(row)] for row in (0, 1, 2, 4, 5, 6)}
        for slots in cache.slots
    ]
    assert where[0] == {0: 1, 1: 0, 2: 2, 4: 3, 5: 4, 6: 1}
    assert where[1] == {0: 1, 1: 2, 2: 3, 4: 0, 5: 4, 6: 1}
    assert cache.missing_bytes == 7 * 4096


def test_a_split_with_embeddings_gives_them_by_position(split: Path) -> None:
    cache = split_cache(split)
    for state in (0, 1):
        write_entries(cache, state, {row: 10 - row for row in (0, 1, 2, 4, 5)})
    cache.find_missing()
    assert cache.missing == []
    cache.mark_bad_images({5: "five is broken"})
    cache.attach_to_dataset()
    embeddings = cache.dataset.embeddings
    assert embeddings is not None
    for row, value in {0: 0, 1: 1, 2: 2, 4: 4, 6: 0}.items():
        assert (embeddings.read(row, flipped=True) == value).all()
    assert embeddings.bad_images.keys() == {3, 5}


def with_damage(annotations: Path) -> SplitCache:
    """Five images stored twice, of which 2 is damaged in the first store, 1 and 4 in the second."""
    cache = split_cache(annotations)
    for state, damaged in ((0, (2,)), (1, (1, 4))):
        write_entries(cache, state, {row: row for row in (0, 1, 2, 4, 5)})
        for row in damaged:
            with (cache.stores[state].folder / "embeddings.bin").open("r+b") as file:
                file.seek(row * 4096 + 8)
                file.write(b"!")
    return cache


def test_damaged_embeddings_are_missing_and_said(
    split: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = with_damage(split)
    caplog.set_level(logging.WARNING, logger="samft")
    cache.find_missing()
    assert cache.missing == [(1, (1,)), (2, (0,)), (4, (1,))]
    warnings = [message for message in caplog.messages if "are damaged" in message]
    assert ["1 embeddings" in warnings[0], "2 embeddings" in warnings[1]] == [True, True]
    # Also if the run is killed now.
    again = split_cache(split)
    again.find_missing()
    assert again.missing == cache.missing


def missing_on_this_rank(annotations: Path) -> tuple[list[Any], list[str]]:
    cache = split_cache(annotations)
    cache.find_missing()
    return cache.missing, [sorted(record) for record in cache.records]


def test_ranks_verify_their_shares_and_agree(gloo2: GlooPool, split: Path) -> None:
    with_damage(split)
    ours, theirs = gloo2.run(missing_on_this_rank, split)
    assert ours == theirs and ours[0] == [(1, (1,)), (2, (0,)), (4, (1,))]


def test_a_large_cache_is_verified_when_it_is_read(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_cache_module, "VERIFIED_BYTES", 4096)
    cache = with_damage(split)
    cache.find_missing()
    assert cache.missing == []
    cache.attach_to_dataset()
    embeddings = cache.dataset.embeddings
    assert embeddings is not None and (embeddings.read(2, flipped=True) == 2).all()
    with pytest.raises(DataError, match="same command again"):
        embeddings.read(2, flipped=False)
    again = split_cache(split)
    again.find_missing()
    assert again.missing == [(2, (0,))]


def test_copies_of_a_broken_image_are_broken(split: Path) -> None:
    cache = split_cache(split)
    cache.find_missing()
    cache.mark_bad_images({0: "zero is broken"})
    assert cache.files.bad_images[0] == cache.files.bad_images[6] == "zero is broken"
    assert cache.files.bad_images.keys() == {0, 3, 6}


def test_two_splits_in_one_store_take_no_slot_of_each_other(split: Path) -> None:
    first, second = split_cache(split), split_cache(split)
    images = second.files.digests
    images[[1, 2, 4]] = images[[1, 2, 4]][:, ::-1]  # other images; 0, 5 and 6 are in both
    second.earlier = [first]
    write_entries(first, 0, {1: 0, 4: 3})
    for cache in (first, second):
        cache.find_missing()
    assert first.missing == [(0, (0, 1)), (1, (1,)), (2, (0, 1)), (4, (1,)), (5, (0, 1))]
    assert second.missing == [(row, (0, 1)) for row in (1, 2, 4)]
    for k in (0, 1):
        slots = list(second.slots[k].values())
        assert second.slots[k] is first.slots[k] and len(set(slots)) == len(slots) == 8
    first.mark_bad_images({5: "five is broken"})
    for cache in (first, second):
        for image in cache.missing:
            for k in image.stores if image.row != 5 else ():
                digest = cache.files.digest_of(image.row)
                record = EmbeddingRecord(cache.slots[k][digest], digest, (1, 1), 0)
                cache.records[k][digest] = record  # as the pass does
    second.attach_to_dataset()
    assert second.dataset.embeddings is not None
    assert second.dataset.embeddings.bad_images.keys() == {3, 5}


def test_what_is_damaged_in_a_shared_store_is_missing_once(split: Path) -> None:
    first, second = split_cache(split), split_cache(split)
    second.files.digests[1] = second.files.digests[1][::-1]
    second.earlier = [first]
    write_entries(first, 0, {row: row for row in (0, 1, 2, 4, 5)})
    write_entries(second, 0, {1: 6})
    for slot in (2, 6):  # an image of both, and one of the second
        first.stores[0].write(slot, np.full((8, 4, 4), 9, np.float16))
    for cache in (first, second):
        cache.find_missing()
    assert [image.row for image in first.missing if 0 in image.stores] == [2]
    assert [image.row for image in second.missing if 0 in image.stores] == [1]
    assert sorted(first.slots[0].values()) == [0, 1, 2, 3, 4, 5]
