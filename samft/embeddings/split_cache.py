"""What a cache holds of a split: recipes of embeddings, where each image's is, and what is missing.

What an embedding depends on beside its image is a `CacheKey`; each has a store. Training images are
encoded as training would encode them: in its precision, decoded as fast, and flipped ones again,
because the embedding of a flipped image is not the flipped embedding. Validation images are encoded
as `SamPredictor` would: decoded exactly, in float32. So a cache changes neither losses nor scores.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam

from samft import distributed
from samft.coco.images import ImageError, open_image
from samft.coco.subset import CocoSubset
from samft.data.dataset import Coco2MaskDataset
from samft.embeddings.store import DIGEST_BYTES, CachedEmbeddings, Store
from samft.errors import UserError

_FORMAT = 1  # to be raised when the same recipe gives other embeddings

ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class CacheKey:
    """All that an embedding depends on, but the image."""

    encoder: str  # digest of its weights, see `digest_of_encoder`
    image_size: int
    resize_mode: str
    exact: bool  # decoded and resized as SamPredictor does it; else as training does
    flipped: bool
    precision: str  # in which it was computed, see `precision_of`
    dtype: str  # in which it is kept: float16 or float32

    @property
    def key(self) -> str:
        """The name of the store, equal for equal recipes only."""
        text = json.dumps([_FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest_of_encoder(sam: Sam) -> str:
    """SHA-256 of the image encoder's tensors, names and shapes, and of the pixels' mean and std."""
    digest = hashlib.sha256()
    tensors = {**sam.image_encoder.state_dict(), "mean": sam.pixel_mean, "std": sam.pixel_std}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def precision_of(amp_dtype: torch.dtype | None, device: torch.device) -> str:
    """In which precision an encoder computes under autocast to a type, or without."""
    if amp_dtype is not None:
        return str(amp_dtype).removeprefix("torch.")
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "float32"


@dataclass
class Digests:
    """The N image files of a split.

    Attributes:
        digests: uint8 [N, 32], SHA-256 of each; zeros where a file cannot be used.
        sizes: int32 [N, 2], H, W of each.
        bad_images: What is wrong with those that cannot be used, by position.
    """

    digests: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    bad_images: dict[int, str]

    def of(self, row: int) -> bytes:
        """The SHA-256 of one."""
        return self.digests[row].tobytes()


def sha256(content: bytes) -> bytes:
    """The SHA-256 of a file's content, as bytes."""
    return hashlib.sha256(content).digest()


def read_digests(
    subset: CocoSubset, *, on_bad_image: str, should_stop: ShouldStop
) -> Digests | None:
    """Hashes all image files, each rank its share. Collective.

    Args:
        subset: The images.
        on_bad_image: `error` ends at one that cannot be used, `skip` notes why.
        should_stop: Asked before each image; all ranks stop if any says yes.

    Returns:
        The same on every rank; None if stopped.

    Raises:
        UserError: With `error`, an image cannot be used, on any rank.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    found = Digests(
        np.zeros((subset.num_images, DIGEST_BYTES), dtype=np.uint8),
        np.zeros((subset.num_images, 2), dtype=np.int32),
        {},
    )
    error: UserError | None = None
    for row in itertools.takewhile(
        lambda _: not should_stop(), range(rank, subset.num_images, world_size)
    ):
        try:
            encoded = open_image(subset.path(row))
        except ImageError as caught:
            found.bad_images[row] = str(caught)
            error = error or caught
        else:
            found.digests[row] = np.frombuffer(sha256(encoded.content), np.uint8)
            found.sizes[row] = encoded.size
    distributed.raise_on_all_ranks(error if on_bad_image == "error" else None)
    if distributed.any_rank(should_stop()):
        return None
    share = (found.digests[rank::world_size], found.sizes[rank::world_size], found.bad_images)
    for other, (digests, sizes, bad_images) in enumerate(distributed.all_gather(share)):
        found.digests[other::world_size], found.sizes[other::world_size] = digests, sizes
        found.bad_images.update(bad_images)
    return found


@dataclass
class SplitCache:
    """A split with its stores: where the embeddings of its images are, and which are missing.

    Attributes:
        dataset: The split; gets its embeddings by `attach`.
        amp_dtype: What to autocast to when encoding; None: float32.
        stores: Of the images as they are and, if training flips, of the flipped ones.
        files: Of the images.
        slots: For each store, where an image's embedding is or is to be, by its digest.
        missing: Images to encode: position, and for which of the stores.
    """

    dataset: Coco2MaskDataset
    amp_dtype: torch.dtype | None
    stores: tuple[Store, ...]
    files: Digests
    slots: list[dict[bytes, int]] = field(default_factory=list)
    missing: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    @property
    def missing_bytes(self) -> int:
        """What the missing embeddings will take up on the disk."""
        return sum(self.stores[state].slot_bytes for _, states in self.missing for state in states)

    def look_up(self) -> None:
        """Finds what is there, and gives free slots to what is missing. Collective.

        Rank 0 looks, so that all ranks go by the same records.
        """
        found: list[dict[bytes, int]] | None = None
        if distributed.is_main():
            entries = [store.entries() for store in self.stores]
            found = [{digest: entry.slot for digest, entry in e.items()} for e in entries]
        self.slots = distributed.broadcast(found)
        free = [_free_slots(slots) for slots in self.slots]
        self.missing = []
        for row in range(len(self.files.digests)):
            if row in self.files.bad_images:
                continue
            digest = self.files.of(row)
            states = tuple(k for k, slots in enumerate(self.slots) if digest not in slots)
            for state in states:  # another image with the same content finds it then
                self.slots[state][digest] = next(free[state])
            if states:
                self.missing.append((row, states))

    def note_bad_images(self, found: dict[int, str]) -> None:
        """Leaves out images that turned out broken, and their copies."""
        digests = {self.files.of(row): why for row, why in found.items()}
        for row in range(len(self.files.digests)) if found else ():
            if self.files.of(row) in digests:
                self.files.bad_images.setdefault(row, digests[self.files.of(row)])

    def attach(self) -> None:
        """Hands the embeddings to the dataset, which from now on reads no pixels."""
        files = self.files
        slots = np.full((len(files.digests), len(self.stores)), -1, dtype=np.int64)
        for row in range(len(slots)):
            if row not in files.bad_images:
                slots[row] = [of_digest[files.of(row)] for of_digest in self.slots]
        for store in self.stores:
            store.open()
        self.dataset.embeddings = CachedEmbeddings(
            self.stores, slots, files.sizes, files.bad_images
        )


def _free_slots(slots: dict[bytes, int]) -> Iterator[int]:
    taken = set(slots.values())
    return (slot for slot in itertools.count() if slot not in taken)


def describe(recipe: CacheKey) -> dict[str, Any]:
    """What a person finds in a store's folder."""
    return {"format": _FORMAT, **asdict(recipe)}
