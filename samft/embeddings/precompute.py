"""Encodes the images that a cache lacks: each image once, each rank its share, resumable."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from samft import distributed
from samft.data.loaders import END, init_worker, iterate_loader, next_item
from samft.data.transforms import Frame
from samft.embeddings.split_cache import MissingImage, ShouldStop, SplitCache, hash_image
from samft.embeddings.store import EmbeddingRecord, checksum_embedding
from samft.errors import ConfigError, DataError, UserError
from samft.images.files import ImageError
from samft.models.prompted_sam import PromptedSam
from samft.runtime.device import exact_float32
from samft.runtime.logs import LOGGER
from samft.runtime.signals import StopInterrupt, interruptible

SYNC_SECONDS = 2.0  # of encoding that a crash may cost
_LOG_SECONDS = 60.0  # between two log lines


@dataclass
class _LoadedImage:
    # An image to encode, or why it cannot be.
    missing: MissingImage
    pixels: Tensor = field(default_factory=lambda: torch.zeros(0))  # uint8 [stores, 3, S, S]
    input_size: tuple[int, int] = (0, 0)  # h, w of the image area in the input frame
    error: DataError | None = None


class _MissingImages(Dataset[_LoadedImage]):
    def __init__(self, split: SplitCache, missing: list[MissingImage]) -> None:
        self.dataset, self.files, self.missing = split.dataset, split.files, missing

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, number: int) -> _LoadedImage:
        missing = self.missing[number]
        try:
            encoded = self.dataset.subset.open_image(missing.row)
            # The slot belongs to the content that was hashed, and to no other.
            if hash_image(encoded) != self.files.digest_of(missing.row):
                raise DataError(f"{encoded.path} was changed while it was read: start again.")
            frame = self.dataset.full_frame(encoded.size)
            pixels = self.dataset.decode_pixels(encoded, frame)
        except DataError as error:
            return _LoadedImage(missing, error=error)
        images = np.stack([_mirror(pixels, frame) if k else pixels for k in missing.stores])
        return _LoadedImage(missing, torch.from_numpy(images).permute(0, 3, 1, 2), frame.input_size)


def _mirror(image: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    # The same pixels as decoding once more into a flipped frame, at half the cost.
    height, width = frame.input_size
    mirrored = image.copy()
    mirrored[:height, :width] = image[:height, :width][:, ::-1]
    return mirrored


def _identity(item: Any) -> Any:
    return item


@dataclass
class _RoundResult:
    # What one rank did in a round, for the other ranks.
    records: list[list[EmbeddingRecord]]  # for each store, of embeddings that have been synced
    bad_images: dict[int, str] = field(default_factory=dict)  # reasons by row
    num_images: int = 0
    finished: bool = False
    stopped: bool = False


class EncodingPass:
    """Encodes the missing images of a split. All ranks go in rounds: encode, sync, gather, commit.

    Rank 0 commits the record of an embedding only after the rank that wrote it has synced it. So
    however the pass ends, every committed embedding is whole, and the next pass encodes the rest.
    """

    def __init__(
        self,
        split: SplitCache,
        model: PromptedSam,
        *,
        on_bad_image: str,
        num_workers: int,
        should_stop: ShouldStop,
        sync_seconds: float = SYNC_SECONDS,
    ) -> None:
        """Prepares this rank's share.

        Args:
            split: After `find_missing`.
            model: With the image encoder on the device.
            on_bad_image: `error` raises for an image that is broken, `skip` records why.
            num_workers: Loader workers of this process.
            should_stop: Called after each image; all ranks stop if it is true on any.
            sync_seconds: Length of a round; it has at least one image.
        """
        self.split, self.model, self.should_stop = split, model, should_stop
        self.on_bad_image, self.sync_seconds = on_bad_image, sync_seconds
        self.folder = split.stores[0].folder.parent
        share = split.missing[distributed.get_rank() :: distributed.get_world_size()]
        self.loader = DataLoader(
            _MissingImages(split, share),
            batch_size=None,
            collate_fn=_identity,
            num_workers=num_workers if share else 0,
            worker_init_fn=init_worker,
            generator=torch.Generator().manual_seed(0),  # or it draws from the model's generator
        )

    def run(self) -> bool:
        """Encodes and stores all missing embeddings. Collective: every rank must call.

        Returns:
            Whether all are stored; False if stopped.

        Raises:
            UserError: An image is broken, the disk is full, or float16 cannot hold an embedding.
        """
        try:
            return self._run_rounds()
        finally:
            for store in self.split.stores:
                store.close()

    def _run_rounds(self) -> bool:
        images = iterate_loader(self.loader)
        bad_images: dict[int, str] = {}
        with _report_progress(len(self.split.missing)) as advance:
            while True:
                result, error = self._encode_round(images)
                results = distributed.all_gather(result)
                # Also where the round ended in an error: what was synced before it counts.
                commit_error = self._commit_records(results)
                for k, records in enumerate(self.split.records):
                    for record in (one for each in results for one in each.records[k]):
                        records[record.digest] = record
                advance(sum(each.num_images for each in results))
                distributed.raise_on_all_ranks(error or commit_error)
                for each in results:
                    bad_images.update(each.bad_images)
                if any(each.stopped for each in results) or all(each.finished for each in results):
                    break
        self.split.mark_bad_images(bad_images)
        return all(each.finished for each in results)

    def _until_stopped(self, images: Iterator[_LoadedImage]) -> Iterator[_LoadedImage]:
        while True:
            with interruptible(self.should_stop):
                image = next_item(images)
            if image is END:
                return
            yield image

    def _encode_round(
        self, images: Iterator[_LoadedImage]
    ) -> tuple[_RoundResult, UserError | None]:
        result = _RoundResult([[] for _ in self.split.stores])
        error: UserError | None = None
        end = time.monotonic() + self.sync_seconds
        try:
            for image in self._until_stopped(images):
                result.num_images += 1
                if image.error is None:
                    self._encode_image(image, result)
                elif self.on_bad_image == "skip" and isinstance(image.error, ImageError):
                    result.bad_images[image.missing.row] = str(image.error)
                else:
                    error = image.error
                if error or self.should_stop() or time.monotonic() >= end:
                    break
            else:
                result.finished = True
        except StopInterrupt:  # in a wait for an image
            pass
        except OSError as caught:  # the embeddings written before are still synced and committed
            error = cache_write_error(self.folder, caught)
        except ConfigError as caught:
            error = caught
        try:
            for store in self.split.stores:
                store.sync()
        except OSError as caught:  # then nothing of this round may count
            result.records = [[] for _ in self.split.stores]
            error = error or cache_write_error(self.folder, caught)
        result.stopped = self.should_stop()  # also of a rank that has no images left
        return result, error

    def _encode_image(self, image: _LoadedImage, result: _RoundResult) -> None:
        split, row = self.split, image.missing.row
        digest, size = split.files.digest_of(row), tuple(split.files.sizes[row].tolist())
        for k, pixels in zip(image.missing.stores, image.pixels.split(1), strict=True):
            embedding = self._encode_one(pixels, image.input_size)
            if not np.isfinite(embedding).all():
                name = split.dataset.subset.file_name(row)
                raise ConfigError(
                    f"cache_dtype: the embedding of {name} is not finite as {embedding.dtype}: "
                    "take float32, or cache_embeddings off."
                )
            slot = split.slots[k][digest]
            split.stores[k].write(slot, embedding)
            record = EmbeddingRecord(slot, digest, size, checksum_embedding(embedding))
            result.records[k].append(record)

    @exact_float32()
    def _encode_one(self, image: Tensor, input_size: tuple[int, int]) -> NDArray[np.floating]:
        # One image at a time. In a batch, sums are added up in an order that depends on its size:
        # weights would depend, in their last bits, on what else was missing from the cache.
        device, amp_dtype = self.model.sam.device, self.split.amp_dtype
        sizes = torch.tensor([input_size], device=device)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            embedding = self.model.embed(image.to(device), sizes)[0]
        converted = embedding.to(getattr(torch, self.split.stores[0].dtype.name))
        return np.asarray(converted.cpu().contiguous().numpy())

    def _commit_records(self, results: list[_RoundResult]) -> UserError | None:
        if not distributed.is_main():
            return None
        try:
            for k, store in enumerate(self.split.stores):
                store.commit(record for each in results for record in each.records[k])
        except OSError as error:
            return cache_write_error(self.folder, error)
        return None


def cache_write_error(folder: Path, error: OSError) -> ConfigError:
    """The error to raise where a cache folder is full or cannot be written."""
    return ConfigError(
        f"cache_dir: {folder} cannot be written ({error.strerror or error}). What is there is "
        "kept: make room and start again, name another folder, or take `--cache_embeddings off`."
    )


@contextmanager
def _report_progress(total: int) -> Iterator[Callable[[int], None]]:
    # On rank 0: a progress bar on a terminal, and a log line a minute.
    started = last_line = time.monotonic()
    done = 0
    hidden = not (distributed.is_main() and sys.stderr.isatty())
    with tqdm(total=total, unit="image", desc="encoding", disable=hidden) as bar:

        def advance(number: int) -> None:
            nonlocal done, last_line
            done += number
            bar.update(number)
            if time.monotonic() > last_line + _LOG_SECONDS:
                last_line = time.monotonic()
                LOGGER.info("encoded %d of %d images", done, total)

        yield advance
    seconds = time.monotonic() - started
    LOGGER.info("encoded %d images in %.1f s (%.1f a second)", done, seconds, done / seconds)
