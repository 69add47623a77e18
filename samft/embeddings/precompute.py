"""The pass that encodes what a cache lacks: each image once, each rank its share, resumable."""

import logging
import sys
import time
from collections.abc import Iterator
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
from samft.coco.images import ImageError, open_image
from samft.data.loaders import iterate_loader, start_worker
from samft.data.transforms import Frame
from samft.embeddings.split_cache import ShouldStop, SplitCache, sha256
from samft.embeddings.store import Entry
from samft.errors import ConfigError, DataError, UserError
from samft.models.prompted_sam import PromptedSam

SYNC_SECONDS = 2.0  # of encoding that a crash may cost
_LINE_SECONDS = 60.0  # between two lines of the log

logger = logging.getLogger(__name__)


@dataclass
class _Item:
    # An image to encode: its position, for which stores, its pixels for each of them, uint8
    # [F, 3, S, S], and h, w of the image inside of the frame; or why there are none.
    row: int
    states: tuple[int, ...]
    images: Tensor = field(default_factory=lambda: torch.zeros(0))
    input_size: tuple[int, int] = (0, 0)
    error: DataError | None = None


class _Pixels(Dataset[_Item]):
    def __init__(self, split: SplitCache, rows: list[tuple[int, tuple[int, ...]]]) -> None:
        self.dataset, self.files, self.rows = split.dataset, split.files, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> _Item:
        row, states = self.rows[number]
        try:
            encoded = open_image(self.dataset.subset.path(row))
            if sha256(encoded.content) != self.files.of(row):
                raise DataError(f"{encoded.path} was changed while it was read: start again.")
            frame = self.dataset.frame(encoded.size)
            pixels = self.dataset.pixels(encoded, frame)
        except DataError as error:
            return _Item(row, states, error=error)
        images = np.stack([_mirrored(pixels, frame) if state else pixels for state in states])
        return _Item(row, states, torch.from_numpy(images).permute(0, 3, 1, 2), frame.input_size)


def _mirrored(image: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    # To decode it again, in a flipped frame, would give the same at twice the cost.
    height, width = frame.input_size
    mirrored = image.copy()
    mirrored[:height, :width] = image[:height, :width][:, ::-1]
    return mirrored


def _as_it_is(item: Any) -> Any:
    return item


@dataclass
class _Round:
    # What one rank has to tell after a round.
    entries: list[tuple[int, Entry]] = field(default_factory=list)  # state, entry
    bad_images: dict[int, str] = field(default_factory=dict)
    num_images: int = 0
    finished: bool = False
    stopped: bool = False


class Precompute:
    """Encodes what a split lacks. All ranks go in rounds: encode, sync, tell, record.

    An embedding is recorded after it has reached the disk, so whatever ends the pass, all that was
    recorded is whole, and the next pass begins with what is missing then.
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
            split: After `look_up`.
            model: With the image encoder on the device.
            on_bad_image: `error` ends at an image that is broken, `skip` notes why.
            num_workers: Loader workers of this process.
            should_stop: Asked after each image; all ranks stop if any says yes.
            sync_seconds: Length of a round, which has at least one image.
        """
        self.split, self.model, self.should_stop = split, model, should_stop
        self.on_bad_image, self.sync_seconds = on_bad_image, sync_seconds
        self.folder = split.stores[0].folder.parent
        share = split.missing[distributed.get_rank() :: distributed.get_world_size()]
        self.loader = DataLoader(
            _Pixels(split, share),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers if share else 0,
            worker_init_fn=start_worker,
            generator=torch.Generator().manual_seed(0),  # or it draws from the model's generator
        )

    def run(self) -> bool:
        """Encodes, writes and records all that is missing. Collective.

        Returns:
            Whether all is there; False if stopped.

        Raises:
            UserError: An image is broken, the disk is full, or float16 cannot hold an embedding.
        """
        try:
            return self._run()
        finally:
            for store in self.split.stores:
                store.close()

    def _run(self) -> bool:
        items = iterate_loader(self.loader)
        bad_images: dict[int, str] = {}
        with _progress(len(self.split.missing)) as advance:
            while True:
                made, error = self._round(items)
                rounds = distributed.all_gather(made)
                failure = self._record(rounds)  # also where the round ended in an error
                error = error or failure
                advance(sum(each.num_images for each in rounds))
                distributed.raise_on_all_ranks(error)
                for each in rounds:
                    bad_images.update(each.bad_images)
                if any(each.stopped for each in rounds) or all(each.finished for each in rounds):
                    break
        self.split.note_bad_images(bad_images)
        return all(each.finished for each in rounds)

    def _round(self, items: Iterator[_Item]) -> tuple[_Round, UserError | None]:
        made = _Round()
        error: UserError | None = None
        until = time.monotonic() + self.sync_seconds
        try:
            for item in items:
                made.num_images += 1
                if item.error is None:
                    self._encode(item, made)
                elif self.on_bad_image == "skip" and isinstance(item.error, ImageError):
                    made.bad_images[item.row] = str(item.error)
                else:
                    error = item.error
                if error or self.should_stop() or time.monotonic() >= until:
                    break
            else:
                made.finished = True
        except OSError as caught:  # what was written before it may be whole
            error = unwritable(self.folder, caught)
        except ConfigError as caught:
            error = caught
        try:
            for store in self.split.stores:
                store.sync()
        except OSError as caught:
            made.entries, error = [], error or unwritable(self.folder, caught)
        made.stopped = self.should_stop()  # also of a rank that only waits for the others
        return made, error

    def _encode(self, item: _Item, made: _Round) -> None:
        split, device, amp_dtype = self.split, self.model.sam.device, self.split.amp_dtype
        sizes = torch.tensor([item.input_size] * len(item.states), device=device)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            embeddings = self.model.embed(item.images.to(device), sizes)
        dtype = getattr(torch, split.stores[0].dtype.name)
        kept = embeddings.to(dtype).cpu()
        if not bool(torch.isfinite(kept).all()):
            name = split.dataset.subset.file_name(item.row)
            raise ConfigError(
                f"cache_dtype: the embedding of {name} is not finite as {split.stores[0].dtype}: "
                "take float32, or cache_embeddings off."
            )
        digest, size = split.files.of(item.row), tuple(split.files.sizes[item.row].tolist())
        for state, embedding in zip(item.states, kept.numpy(), strict=True):
            slot = split.slots[state][digest]
            split.stores[state].write(slot, embedding)
            made.entries.append((state, Entry(slot, digest, size)))

    def _record(self, rounds: list[_Round]) -> UserError | None:
        if not distributed.is_main():
            return None
        try:
            for state, store in enumerate(self.split.stores):
                store.commit(e for each in rounds for at, e in each.entries if at == state)
        except OSError as error:
            return unwritable(self.folder, error)
        return None


def unwritable(folder: Path, error: OSError) -> ConfigError:
    """What to tell a user of a cache folder that is full or broken."""
    return ConfigError(
        f"cache_dir: {folder} cannot be written ({error.strerror or error}). What is there is "
        "kept: make room and start again, name another folder, or take `--cache_embeddings off`."
    )


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    # A bar for a person, a line a minute for a file; of rank 0.
    started = last_line = time.monotonic()
    done = 0
    hidden = not (distributed.is_main() and sys.stderr.isatty())
    with tqdm(total=total, unit="image", desc="encoding", disable=hidden) as bar:

        def advance(number: int) -> None:
            nonlocal done, last_line
            done += number
            bar.update(number)
            if time.monotonic() > last_line + _LINE_SECONDS:
                last_line = time.monotonic()
                logger.info("encoded %d of %d images", done, total)

        yield advance
    seconds = time.monotonic() - started
    logger.info("encoded %d images in %.1f s (%.1f a second)", done, seconds, done / seconds)
