"""The embedding cache of one split: keys of its stores, the slot of each image, missing images.

A `CacheKey` is all that an embedding depends on except the image; each key has a store. A cache
changes neither losses nor scores: training images are encoded as training would encode them, in its
precision and with its fast decoding, and flipped ones separately, because the embedding of a
flipped image is not the flipped embedding. Validation images are encoded as `SamPredictor` would
encode them, decoded exactly, in float32.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam

from samft import distributed
from samft.coco.subset import CocoSubset
from samft.data.dataset import Coco2MaskDataset
from samft.embeddings.store import (
    DIGEST_BYTES,
    CachedEmbeddings,
    EmbeddingRecord,
    EmbeddingStore,
)
from samft.errors import UserError
from samft.images.files import ImageError
from samft.runtime.logs import GIB, LOGGER

VERIFIED_BYTES = 8 * GIB  # of embeddings that are verified at the start, and not only when read
_FORMAT = 2  # to be increased when equal keys give other embeddings than before

ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class CacheKey:
    """All that an embedding depends on except the image."""

    encoder: str  # from `hash_encoder`, of all that is frozen
    image_size: int | str  # see `cli.parse_image_size`
    resize_mode: str
    exact: bool  # decoded and resized as SamPredictor does it; otherwise as training does
    flipped: bool
    precision: str  # that the encoder computed in, from `name_precision`
    dtype: str  # of the stored embedding: float16 or float32

    @property
    def store_name(self) -> str:
        """The folder name of the store; different keys have different names."""
        text = json.dumps([_FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the store's folder says about itself, for people to read."""
        return {"format": _FORMAT, **asdict(self)}


def hash_encoder(sam: Sam, *, blocks: int | None = None) -> str:
    """SHA-256 of the image encoder's tensors, names and shapes, and of the pixel mean and std.

    Args:
        sam: The model.
        blocks: Only of the first so many blocks, and what comes before them; None: of all.
    """
    digest = hashlib.sha256()
    tensors = {**sam.image_encoder.state_dict(), "mean": sam.pixel_mean, "std": sam.pixel_std}
    if blocks is not None:
        last = ("neck.", *(f"blocks.{i}." for i in range(blocks, len(sam.image_encoder.blocks))))
        tensors = {name: t for name, t in tensors.items() if not name.startswith(last)}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous()
        digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def name_precision(amp_dtype: torch.dtype | None) -> str:
    """The precision that an encoder computes in: under autocast to a type, or without (None)."""
    return str(amp_dtype or torch.float32).removeprefix("torch.")


@dataclass
class ImageDigests:
    """The N image files of a split, or windows of them.

    Attributes:
        digests: uint8 [N, 32], `EncodedImage.digest`; zeros where one cannot be used.
        sizes: int32 [N, 2], H, W of the images or windows, original px.
        bad_images: Why files cannot be used, by row.
    """

    digests: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    bad_images: dict[int, str]

    def digest_of(self, row: int) -> bytes:
        """The SHA-256 of one file."""
        return self.digests[row].tobytes()


def hash_images(
    subset: CocoSubset, *, on_bad_image: str, should_stop: ShouldStop
) -> ImageDigests | None:
    """Hashes all image files of a split, each rank its share. Collective: every rank must call.

    Args:
        subset: The split.
        on_bad_image: `error` raises for an image that cannot be used, `skip` records why.
        should_stop: Called before each image; all ranks stop if it is true on any.

    Returns:
        The same on every rank; None if stopped.

    Raises:
        UserError: With `error`, an image cannot be used, on any rank.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    files = ImageDigests(
        np.zeros((subset.num_images, DIGEST_BYTES), dtype=np.uint8),
        np.zeros((subset.num_images, 2), dtype=np.int32),
        {},
    )
    error: UserError | None = None
    for row in itertools.takewhile(
        lambda _: not should_stop(), range(rank, subset.num_images, world_size)
    ):
        try:
            encoded = subset.open_image(row)
            digest = encoded.digest()
        except ImageError as caught:
            files.bad_images[row] = str(caught)
            error = error or caught
        else:
            files.digests[row] = np.frombuffer(digest, np.uint8)
            files.sizes[row] = encoded.size
    distributed.raise_on_all_ranks(error if on_bad_image == "error" else None)
    if distributed.any_rank(should_stop()):
        return None
    share = (files.digests[rank::world_size], files.sizes[rank::world_size], files.bad_images)
    for other, (digests, sizes, bad_images) in enumerate(distributed.all_gather(share)):
        files.digests[other::world_size], files.sizes[other::world_size] = digests, sizes
        files.bad_images.update(bad_images)
    return files


class MissingImage(NamedTuple):
    """An image that has to be encoded.

    Attributes:
        row: In the split.
        stores: For which of the split's stores: 0 the image as it is in the file, 1 flipped.
    """

    row: int
    stores: tuple[int, ...]


@dataclass
class SplitCache:
    """A split with its stores: the slots of its images' embeddings, and the images that lack one.

    Attributes:
        dataset: The split; `attach_to_dataset` gives it the embeddings.
        amp_dtype: What to autocast to when encoding; None: float32.
        stores: Of the unflipped images and, if training flips, of the flipped ones.
        files: The image files.
        records: For each store, its records, by digest.
        slots: For each store, the slot of an image's embedding, stored or missing, by digest.
        missing: The images to encode.
        earlier: Caches of other splits in the same stores, which encode theirs before.
    """

    dataset: Coco2MaskDataset
    amp_dtype: torch.dtype | None
    stores: tuple[EmbeddingStore, ...]
    files: ImageDigests
    records: list[dict[bytes, EmbeddingRecord]] = field(default_factory=list)
    slots: list[dict[bytes, int]] = field(default_factory=list)
    missing: list[MissingImage] = field(default_factory=list)
    earlier: Sequence["SplitCache"] = ()

    @property
    def folders(self) -> set[Path]:
        """The folders of its stores."""
        return {store.folder for store in self.stores}

    @property
    def missing_bytes(self) -> int:
        """Disk space that the missing embeddings will take up."""
        return sum(self.stores[k].slot_bytes for image in self.missing for k in image.stores)

    def find_missing(self, *, should_stop: ShouldStop = lambda: False) -> None:
        """Finds the stored embeddings, and assigns free slots to the missing ones. Collective.

        Only rank 0 reads the records, so that all ranks assign the same slots. Damaged embeddings
        are missing; of large caches, that shows only when they are read. Of a store that an earlier
        cache has, both have the same records and slots: what one encodes the other only reads.

        Args:
            should_stop: Asked between embeddings; the rest of them is not verified then.
        """
        known = {
            store.folder: (records, slots)
            for cache in self.earlier
            for store, records, slots in zip(cache.stores, cache.records, cache.slots, strict=True)
        }
        new = [store for store in self.stores if store.folder not in known]
        read = [store.read_records() for store in new] if distributed.is_main() else None
        for store, records in zip(new, distributed.broadcast(read), strict=True):
            slots = {digest: record.slot for digest, record in records.items()}
            known[store.folder] = records, slots
        self.records = [known[store.folder][0] for store in self.stores]
        self.slots = [known[store.folder][1] for store in self.stores]
        self._forget_damaged(should_stop)
        free = [_free_slots(slots) for slots in self.slots]
        self.missing = []
        for row in range(len(self.files.digests)):
            if row in self.files.bad_images:
                continue
            digest = self.files.digest_of(row)
            stores = tuple(k for k, slots in enumerate(self.slots) if digest not in slots)
            for k in stores:  # a later image with the same content then shares the slot
                self.slots[k][digest] = next(free[k])
            if stores:
                self.missing.append(MissingImage(row, stores))

    def _forget_damaged(self, should_stop: ShouldStop) -> None:
        used = {
            self.files.digest_of(row)
            for row in range(len(self.files.digests))
            if row not in self.files.bad_images
        }
        stored = [
            (k, record)
            for k, records in enumerate(self.records)
            for digest, record in records.items()
            if digest in used
        ]
        if sum(self.stores[k].slot_bytes for k, _ in stored) > VERIFIED_BYTES:
            return
        share = stored[distributed.get_rank() :: distributed.get_world_size()]
        damaged = [
            (k, record)
            for k, record in itertools.takewhile(lambda _: not should_stop(), share)
            if self.stores[k].read(record.slot, checksum=record.checksum) is None
        ]
        damaged = [each for of_rank in distributed.all_gather(damaged) for each in of_rank]
        for k, record in damaged:
            del self.records[k][record.digest], self.slots[k][record.digest]
        for k, store in enumerate(self.stores) if distributed.is_main() else ():
            if slots := [record.slot for other, record in damaged if other == k]:
                LOGGER.warning(
                    "%d embeddings in %s are damaged: they are encoded again",
                    len(slots),
                    store.folder,
                )
                with contextlib.suppress(OSError):  # where that matters, encoding fails and says so
                    store.forget(slots)

    def mark_bad_images(self, reasons: dict[int, str]) -> None:
        """Marks images that could not be decoded, given by row, and their copies as unusable."""
        self._mark_digests({self.files.digest_of(row): why for row, why in reasons.items()})

    def _mark_digests(self, by_digest: dict[bytes, str]) -> None:
        for row in range(len(self.files.digests)) if by_digest else ():
            if (digest := self.files.digest_of(row)) in by_digest:
                self.files.bad_images.setdefault(row, by_digest[digest])

    def attach_to_dataset(self) -> None:
        """Gives the embeddings to the dataset, which from now on reads no pixels."""
        files = self.files
        for cache in self.earlier:  # which has tried to decode images of both
            bad = cache.files.bad_images
            self._mark_digests({cache.files.digest_of(row): why for row, why in bad.items()})
        slots = np.full((len(files.digests), len(self.stores)), -1, dtype=np.int64)
        checksums = np.zeros(slots.shape, dtype=np.uint32)
        for row in range(len(slots)):
            if row not in files.bad_images:
                records = [by_digest[files.digest_of(row)] for by_digest in self.records]
                slots[row] = [record.slot for record in records]
                checksums[row] = [record.checksum for record in records]
        for store in self.stores:
            store.open()
        self.dataset.embeddings = CachedEmbeddings(
            self.stores, slots, checksums, files.sizes, files.bad_images
        )


def _free_slots(slots: dict[bytes, int]) -> Iterator[int]:
    taken = set(slots.values())
    return (slot for slot in itertools.count() if slot not in taken)
