"""Encodes the images that a cache lacks: each image once, each rank its share, resumable."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from samft import distributed
from samft.data.loaders import END, init_worker, iterate_loader, next_item
from samft.data.transfers import Transfers
from samft.data.transforms import Frame
from samft.embeddings.split_cache import MissingImage, ShouldStop, SplitCache
from samft.embeddings.store import EmbeddingRecord, checksum_embedding
from samft.errors import ConfigError, DataError, UserError, explain_out_of_memory
from samft.images.files import ImageError
from samft.models.prompted_sam import PromptedSam
from samft.runtime import heartbeat
from samft.runtime.device import exact_float32, usable_cores
from samft.runtime.logs import LOGGER
from samft.runtime.signals import StopInterrupt, interruptible

SYNC_SECONDS = 2.0  # of encoding that a crash may cost
_LOG_SECONDS = 60.0  # between two log lines
_GPU_BATCH_SIZE = 4
_GPU_BATCHES_AHEAD = 2  # one that is computed, and one to go on with


@dataclass
class _LoadedImage:
    # An image to encode, or why it cannot be.
    missing: MissingImage
    pixels: Tensor = field(default_factory=lambda: torch.zeros(0))  # uint8 [stores, 3, H, W]
    # int64 [stores, 2], h, w of the image area in the input frame
    input_sizes: Tensor = field(default_factory=lambda: torch.zeros(0))
    error: DataError | None = None

    def pin_memory(self) -> "_LoadedImage":
        # `DataLoader` calls this.
        pixels, sizes = self.pixels.pin_memory(), self.input_sizes.pin_memory()
        return replace(self, pixels=pixels, input_sizes=sizes)


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
            if encoded.digest() != self.files.digest_of(missing.row):
                raise DataError(f"{encoded.path} was changed while it was read: start again.")
            frame = self.dataset.full_frame(encoded.size)
            pixels = self.dataset.decode_pixels(encoded, frame)
        except DataError as error:
            return _LoadedImage(missing, error=error)
        images = np.stack([_mirror(pixels, frame) if k else pixels for k in missing.stores])
        sizes = torch.tensor([frame.input_size] * len(images))
        return _LoadedImage(missing, torch.from_numpy(images).permute(0, 3, 1, 2), sizes)


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


class _Encoded(NamedTuple):
    # The embedding of an image for one of its stores.
    missing: MissingImage
    k: int
    embedding: NDArray[np.floating]  # [C, h, w], of the store's type


class _Input(NamedTuple):
    # What is on its way to the device, for one embedding.
    missing: MissingImage
    k: int
    receive_pixels: Callable[[], Tensor]  # uint8 [1, 3, H, W]
    receive_size: Callable[[], Tensor]  # int64 [1, 2]


class _Encoder:
    """Encodes images; a GPU is some of them ahead, copying and computing while others are stored.

    In a batch, sums are added up in an order that depends on its size: weights would depend, in
    their last bits, on what else was missing from the cache. So images are encoded one at a time,
    except on a GPU for float16, which rounds off far more. There, all batches are of one size.
    """

    def __init__(self, model: PromptedSam, *, amp_dtype: torch.dtype | None, dtype: str) -> None:
        """Takes the model, and the types to compute in (None: float32) and to store."""
        self.model, self.amp_dtype, self.dtype = model, amp_dtype, getattr(torch, dtype)
        self.device = model.sam.device
        on_gpu = self.device.type == "cuda"
        self.batch_size = _GPU_BATCH_SIZE if on_gpu and self.dtype is torch.float16 else 1
        self._most_in_flight = _GPU_BATCHES_AHEAD if on_gpu else 0
        self._transfers = Transfers(self.device)
        self._inputs: list[_Input] = []
        self._in_flight: deque[tuple[list[_Input], Callable[[], Tensor]]] = deque()

    @property
    def rows(self) -> list[int]:
        """Of the images that were added, and whose embeddings were not given yet."""
        started = [each for inputs, _ in self._in_flight for each in inputs]
        return list(dict.fromkeys(each.missing.row for each in [*started, *self._inputs]))

    def add(self, image: _LoadedImage) -> Iterator[_Encoded]:
        """Begins to encode an image; gives the embeddings that are there by now, in order."""
        to_device = self._transfers.to_device
        parts = (image.missing.stores, image.pixels.split(1), image.input_sizes.split(1))
        for k, pixels, size in zip(*parts, strict=True):
            self._inputs.append(_Input(image.missing, k, to_device(pixels), to_device(size)))
            if len(self._inputs) == self.batch_size:
                self._start_batch()
        yield from self._collect_down_to(self._most_in_flight)

    def flush(self) -> Iterator[_Encoded]:
        """Gives the embeddings of all images that were added, and were not given yet."""
        if self._inputs:
            self._start_batch()
        yield from self._collect_down_to(0)

    @exact_float32()
    def _start_batch(self) -> None:
        inputs = self._inputs
        repeated = [inputs[-1]] * (self.batch_size - len(inputs))
        pixels = _concatenate([each.receive_pixels() for each in inputs + repeated])
        sizes = _concatenate([each.receive_size() for each in inputs + repeated])
        enabled = self.amp_dtype is not None
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=enabled):
            embeddings = self.model.encode_frozen(pixels, sizes)
        converted = embeddings[: len(inputs)].to(self.dtype).contiguous()
        self._in_flight.append((inputs, self._transfers.to_host(converted)))
        self._inputs = []

    def _collect_down_to(self, most_in_flight: int) -> Iterator[_Encoded]:
        while len(self._in_flight) > most_in_flight:
            inputs, receive = self._in_flight.popleft()
            for each, embedding in zip(inputs, receive().numpy(), strict=True):
                yield _Encoded(each.missing, each.k, embedding)


def _concatenate(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


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
        dtype = split.stores[0].dtype.name
        self.encoder = _Encoder(model, amp_dtype=split.amp_dtype, dtype=dtype)
        share = split.missing[distributed.get_rank() :: distributed.get_world_size()]
        self.loader = DataLoader(
            _MissingImages(split, share),
            batch_size=None,
            collate_fn=_identity,
            num_workers=min(num_workers, usable_cores()) if share else 0,
            worker_init_fn=init_worker,
            pin_memory=model.sam.device.type == "cuda",
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
        error = self._error_of(partial(self._encode_images, images, result))
        # What has been computed is still written, and what has been written is still committed.
        flush = partial(self._store_all, self.encoder.flush(), result)
        error = self._error_of(flush) or error
        try:
            for store in self.split.stores:
                store.sync()
        except OSError as caught:  # then nothing of this round may count
            result.records = [[] for _ in self.split.stores]
            error = error or cache_write_error(self.folder, caught)
        result.stopped = self.should_stop()  # also of a rank that has no images left
        return result, error

    def _error_of(self, work: Callable[[], UserError | None]) -> UserError | None:
        try:
            return work()
        except StopInterrupt:  # in a wait for an image
            return None
        except OSError as caught:
            return cache_write_error(self.folder, caught)
        except ConfigError as caught:
            return caught

    def _encode_images(
        self, images: Iterator[_LoadedImage], result: _RoundResult
    ) -> UserError | None:
        end = time.monotonic() + self.sync_seconds
        for image in self._until_stopped(images):
            result.num_images += 1
            self._note_image(image.missing.row)
            if image.error is None:
                self._store_all(self.encoder.add(image), result)
            elif self.on_bad_image == "skip" and isinstance(image.error, ImageError):
                result.bad_images[image.missing.row] = str(image.error)
            else:
                return image.error
            if self.should_stop() or time.monotonic() >= end:
                return None
        result.finished = True
        return None

    def _note_image(self, row: int) -> None:
        name = self.split.dataset.subset.file_name(row)
        heartbeat.set_activity("encoding", lambda: [name])

    def _store_all(self, encoded: Iterable[_Encoded], result: _RoundResult) -> None:
        split = self.split
        for (row, _), k, embedding in self._explain_memory(encoded):
            if not np.isfinite(embedding).all():
                name = split.dataset.subset.file_name(row)
                raise ConfigError(
                    f"cache_dtype: the embedding of {name} is not finite as {embedding.dtype}: "
                    "take float32, or cache_embeddings off."
                )
            digest, size = split.files.digest_of(row), tuple(split.files.sizes[row].tolist())
            slot = split.slots[k][digest]
            split.stores[k].write(slot, embedding)
            record = EmbeddingRecord(slot, digest, size, checksum_embedding(embedding))
            result.records[k].append(record)

    def _explain_memory(self, encoded: Iterable[_Encoded]) -> Iterator[_Encoded]:
        def describe() -> str:
            file_name = self.split.dataset.subset.file_name
            return f"to encode {', '.join(file_name(row) for row in self.encoder.rows)}"

        advice = "Lower image_size, or take a smaller model_type."
        with explain_out_of_memory(describe, advice=advice):
            yield from encoded

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
