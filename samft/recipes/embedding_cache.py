"""Decides from the configuration whether to cache embeddings, and fills the cache."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from samft import distributed
from samft.config import TrainConfig
from samft.data.dataset import Coco2MaskDataset
from samft.distributed import run_on_all_ranks
from samft.embeddings.precompute import EncodingPass, cache_write_error
from samft.embeddings.split_cache import (
    CacheKey,
    ShouldStop,
    SplitCache,
    hash_encoder,
    hash_images,
    name_precision,
)
from samft.embeddings.store import EmbeddingStore, evict_unused_stores
from samft.errors import ConfigError, UserError
from samft.models.prompted_sam import PromptedSam
from samft.recipes.build import images_per_step, trained_apart
from samft.recipes.datasets import Splits
from samft.runtime.device import pick_amp_dtype
from samft.runtime.files import try_lock
from samft.runtime.logs import GIB, LOGGER, format_gib
from samft.runtime.output_dir import create_writable_dir
from samft.training.engine import Progress

_LOCK_NAME = "lock"  # of the folder of all stores
_NUM_OWN = 2  # plans and caches of a run without a general set: training and validation


def cache_dir_of(config: TrainConfig) -> Path:
    """The folder in which a run caches embeddings."""
    if config.cache_dir is None:
        return Path(config.output_dir).expanduser() / "embeddings"
    return Path(config.cache_dir).expanduser()


def prepare_cache(
    config: TrainConfig,
    model: PromptedSam,
    splits: Splits,
    *,
    progress: Progress,
    should_stop: ShouldStop,
) -> bool:
    """Gives the datasets the embeddings of their images, encoding what is missing. Collective.

    See `open_cache` and `EmbeddingCache.fill`, between which a run can still be refused.
    """
    with open_cache(config, model, splits, progress=progress, should_stop=should_stop) as cache:
        return cache.fill()


class EmbeddingCache:
    """A cache that has been found usable, and is not filled yet; made by `open_cache`."""

    def __init__(
        self,
        config: TrainConfig,
        model: PromptedSam,
        *,
        should_stop: ShouldStop,
    ) -> None:
        """Starts without a cache; `open` finds it."""
        self.config, self.model, self.should_stop = config, model, should_stop
        self._is_stopped, self._has_all = False, False
        self._plans: list[_StorePlan] = []
        self._caches: list[SplitCache] = []
        self._lock = ExitStack()

    def open(self, splits: Splits, progress: Progress) -> None:
        """Hashes the images, and checks that there is room for what is missing. Collective."""
        config, cache_dir = self.config, cache_dir_of(self.config)
        if not _is_wanted(config, self.model, progress):
            return
        plans = _plan_stores(config, self.model, splits)
        if config.cache_embeddings == "auto" and not _is_worth_caching(config, plans):
            return
        run_on_all_ranks(lambda: _create_cache_dir(cache_dir))
        caches = _open_caches(plans, on_bad_image=config.on_bad_image, should_stop=self.should_stop)
        locked = _exclusive_lock(cache_dir, should_stop=self.should_stop)
        if caches is None or not self._lock.enter_context(locked):
            self._is_stopped = True
            return
        for cache in caches:
            cache.find_missing(should_stop=self.should_stop)
        num_kept = _choose_caches(caches, cache_dir, config)
        self._plans, self._caches = plans[:num_kept], caches[:num_kept]
        self._has_all = num_kept == len(caches)
        if not num_kept:
            self.close()

    def close(self) -> None:
        """Lets other runs write into the folder."""
        self._lock.close()

    def fill(self) -> bool:
        """Encodes what is missing, and gives all to the datasets. Collective.

        Afterwards other runs may use the folder, and the image encoder is on the CPU for good,
        unless there is no room for the embeddings of the general set.

        Returns:
            Whether training may begin; False if stopped, with what was encoded so far recorded.

        Raises:
            UserError: An image cannot be used, or the cache cannot be written.
        """
        if self._is_stopped or not self._caches:
            return not self._is_stopped
        run_on_all_ranks(lambda: _create_stores(self._plans))
        run_on_all_ranks(lambda: _check_shared_disk(self._plans))
        if not _encode_missing(self._caches, self.model, self.config, should_stop=self.should_stop):
            return False
        for cache in self._caches:
            cache.attach_to_dataset()
        distributed.barrier()  # rank 0 holds the lock until all ranks have mapped the files
        self.close()
        if self._has_all:
            self.model.unload_encoder()
        return True


@contextmanager
def open_cache(
    config: TrainConfig,
    model: PromptedSam,
    splits: Splits,
    *,
    progress: Progress,
    should_stop: ShouldStop,
) -> Iterator[EmbeddingCache]:
    """Checks all that can be refused, and holds the lock of the folder meanwhile. Collective.

    There is no cache where the configuration does not want one or, with `auto`, where it would not
    help or has no room, which is logged. A folder that is refused is as it was.

    Args:
        config: The configuration.
        model: On its device, with its frozen parts frozen.
        splits: Their datasets get the embeddings.
        progress: How far the run has come.
        should_stop: Asked between images; all ranks stop if any says yes.

    Yields:
        The cache, to be filled.

    Raises:
        UserError: An image cannot be used, or the cache cannot be written or, with `on`, has no
            room.
    """
    folder = cache_dir_of(config)
    is_new = distributed.is_main() and not folder.exists()
    cache = EmbeddingCache(config, model, should_stop=should_stop)
    try:
        try:
            cache.open(splits, progress)
        except UserError:
            cache.close()
            if is_new and folder.is_dir():
                (folder / _LOCK_NAME).unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()
            raise
        yield cache
    finally:
        cache.close()


class CacheEstimate(NamedTuple):
    """How much a run will add to its cache: encodings (a flipped image counts again), and bytes."""

    num_images: int
    num_bytes: int


def estimate_cache(
    config: TrainConfig, model: PromptedSam, splits: Splits, *, progress: Progress
) -> CacheEstimate | None:
    """Estimates what `prepare_cache` would add, without hashing images. Collective.

    Args:
        config: The configuration.
        model: On its device, with its frozen parts frozen.
        splits: The datasets.
        progress: How far the run has come.

    Returns:
        The estimate; None where the run does not cache embeddings.
    """
    if not _is_wanted(config, model, progress):
        return None
    plans = _plan_stores(config, model, splits)
    if config.cache_embeddings == "auto" and not _is_worth_caching(config, plans):
        return None
    return CacheEstimate(*distributed.broadcast(_estimate_missing(plans)))


class _StorePlan(NamedTuple):
    # The stores of a split: one for its images and, if training flips, one for the flipped ones.
    dataset: Coco2MaskDataset
    amp_dtype: torch.dtype | None
    keys: list[CacheKey]
    stores: tuple[EmbeddingStore, ...]


def _is_wanted(config: TrainConfig, model: PromptedSam, progress: Progress) -> bool:
    if config.cache_embeddings == "off" or progress.step >= config.steps:
        return False
    if any(trained_apart(config).values()):  # with `on`, the configuration was refused
        LOGGER.info(
            "cache_embeddings auto: off, because norm layers or biases are trained from the first "
            "block of the image encoder on, and with them the embeddings change"
        )
        return False
    if model.frozen_shape is None:  # with `on`, as above
        return False
    if not (model.encoder_is_frozen or model.num_frozen_blocks) and config.cache_embeddings != "on":
        return False  # nothing but pixels cut into patches, which is not worth the space
    if config.augment == "scale":
        LOGGER.info(
            "cache_embeddings auto: off, because augment scale changes the pixels, and with them "
            "the embeddings, every time"
        )
        return False
    return True


def _create_cache_dir(cache_dir: Path) -> None:
    try:
        create_writable_dir(cache_dir, field="cache_dir")
    except ConfigError as error:
        raise ConfigError(f"{error} `--cache_embeddings off` needs no cache.") from error


@contextmanager
def _exclusive_lock(cache_dir: Path, *, should_stop: ShouldStop) -> Iterator[bool]:
    # Collective. One run at a time makes room and encodes; False if asked to stop while waiting.
    has_logged = False
    while True:
        lock = run_on_all_ranks(lambda: _try_lock(cache_dir) if distributed.is_main() else None)
        if distributed.any_rank(lock is not None):
            break
        if distributed.any_rank(should_stop()):
            yield False
            return
        if not has_logged:
            LOGGER.info("waiting for another run, which is filling %s", cache_dir)
            has_logged = True
        time.sleep(1)
    try:
        yield True
    finally:
        if lock is not None:
            lock.close()


def _try_lock(cache_dir: Path) -> BinaryIO | None:
    try:
        return try_lock(cache_dir / _LOCK_NAME)
    except OSError as error:  # a folder, say
        raise cache_write_error(cache_dir, error) from error


def _plan_stores(config: TrainConfig, model: PromptedSam, splits: Splits) -> list[_StorePlan]:
    # Collective. The plan of the training split, that of the validation split, and that of the
    # general set if there is one.
    device = model.sam.device
    blocks = None if model.encoder_is_frozen else model.num_frozen_blocks
    own_digest = hash_encoder(model.sam, blocks=blocks) if distributed.is_main() else ""
    digest = distributed.broadcast(own_digest)
    cache_dir, shape = cache_dir_of(config), model.frozen_shape
    assert shape is not None

    def plan_split(
        dataset: Coco2MaskDataset, amp_dtype: torch.dtype | None, flips: tuple[bool, ...]
    ) -> _StorePlan:
        keys = [
            CacheKey(
                encoder=digest,
                image_size=config.image_size,
                resize_mode=config.resize_mode,
                exact=not dataset.training,
                flipped=flipped,
                precision=name_precision(amp_dtype),
                dtype=config.cache_dtype,
            )
            for flipped in flips
        ]
        stores = tuple(
            EmbeddingStore(cache_dir / key.store_name, shape=shape, dtype=key.dtype) for key in keys
        )
        return _StorePlan(dataset, amp_dtype, keys, stores)

    flips = (False,) if config.augment == "none" else (False, True)
    validated = [splits.val, *([splits.general] if splits.general else [])]
    return [
        plan_split(splits.train, pick_amp_dtype(config.amp, device), flips),
        *(plan_split(dataset, None, (False,)) for dataset in validated),  # in float32, as always
    ]


def _is_worth_caching(config: TrainConfig, plans: list[_StorePlan]) -> bool:
    # By the configuration and the sizes of the splits alone, before any image is read: whether the
    # same command caches, and so what it learns, must not depend on what a cache holds by now, nor
    # on the general set.
    own = plans[:_NUM_OWN]
    num_validations = -(-config.steps // config.metrics_interval) + 1
    without_cache = config.steps * images_per_step(config) + num_validations * len(own[-1].dataset)
    with_cache = sum(len(plan.dataset) * len(plan.stores) for plan in own)
    is_worth = with_cache <= without_cache
    if not is_worth:
        LOGGER.info(
            "cache_embeddings auto: off, because %d images (a flipped image counts again) would be "
            "encoded before the first step, and this run without a cache encodes %d",
            with_cache,
            without_cache,
        )
    return is_worth


def _estimate_missing(plans: list[_StorePlan]) -> CacheEstimate:
    images: Counter[Path] = Counter()
    stores = {store.folder: store for plan in plans for store in plan.stores}
    for plan in plans:  # two of them may have one store
        images.update({store.folder: len(plan.dataset) for store in plan.stores})
    missing = [
        (max(0, images[folder] - store.num_records), store.slot_bytes)
        for folder, store in stores.items()
    ]
    return CacheEstimate(sum(count for count, _ in missing), sum(n * size for n, size in missing))


def _open_caches(
    plans: list[_StorePlan], *, on_bad_image: str, should_stop: ShouldStop
) -> list[SplitCache] | None:
    # Collective. Hashes all images; None if asked to stop meanwhile.
    caches: list[SplitCache] = []
    for plan in plans:
        digests = hash_images(
            plan.dataset.subset, on_bad_image=on_bad_image, should_stop=should_stop
        )
        if digests is None:
            return None
        cache = SplitCache(plan.dataset, plan.amp_dtype, plan.stores, digests)
        cache.earlier = [other for other in caches if other.folders & cache.folders]
        caches.append(cache)
    return caches


def _create_stores(plans: list[_StorePlan]) -> None:
    for plan in plans:
        for key, store in zip(plan.keys, plan.stores, strict=True):
            try:
                if distributed.is_main():
                    store.create(key.metadata)
            except OSError as error:
                raise cache_write_error(store.folder.parent, error) from error


def _check_shared_disk(plans: list[_StorePlan]) -> None:
    # After rank 0 has created the stores: every rank must see them.
    for store in (store for plan in plans for store in plan.stores):
        if not store.folder.is_dir():
            raise ConfigError(
                f"cache_dir: {store.folder.parent} is not the same folder for all processes: name "
                "one on a disk that all hosts share, or take `--cache_embeddings off`."
            )


def _choose_caches(caches: list[SplitCache], cache_dir: Path, config: TrainConfig) -> int:
    # Collective. How many, from the first on, there is room for: all, all but the general set's, or
    # with `auto` none. The general set decides on no other, as training must not depend on it.
    why_not = _make_room(caches, cache_dir, config)
    if why_not is not None and len(caches) > _NUM_OWN:
        LOGGER.warning(
            "the embeddings of general_data_root are not cached, because %s has no room: %s",
            cache_dir,
            why_not,
        )
        caches = caches[:_NUM_OWN]
        why_not = _make_room(caches, cache_dir, config)
    if why_not is None:
        return len(caches)
    if config.cache_embeddings == "auto":
        LOGGER.warning("cache_embeddings auto: off, because %s has no room: %s", cache_dir, why_not)
        return 0
    raise ConfigError(
        f"cache_dir: {cache_dir} has no room for the embeddings: {why_not}. Make room, name "
        "another folder, raise cache_max_gib, or take `--cache_embeddings off`."
    )


def _make_room(caches: list[SplitCache], cache_dir: Path, config: TrainConfig) -> str | None:
    # Collective. Why there is no room, or None. Deletes the embeddings of other runs if that makes
    # enough of it.
    needed = sum(cache.missing_bytes for cache in caches)
    limit = int(config.cache_max_gib * GIB)

    def evict_others() -> str | None:
        own = {store.folder.name for cache in caches for store in cache.stores}
        try:
            return evict_unused_stores(cache_dir, own=own, needed=needed, limit=limit)
        except OSError as error:
            raise cache_write_error(cache_dir, error) from error

    why_not = run_on_all_ranks(lambda: evict_others() if distributed.is_main() else None)
    why_not = distributed.broadcast(why_not)
    if why_not is None:
        missing = sum(len(cache.missing) for cache in caches)
        images = sum(len(cache.files.digests) for cache in caches)
        LOGGER.info(
            "embeddings of %d of %d images are in %s%s",
            images - missing,
            images,
            cache_dir,
            f"; {format_gib(needed)} will be added" if missing else "",
        )
    return why_not


def _encode_missing(
    caches: list[SplitCache], model: PromptedSam, config: TrainConfig, *, should_stop: ShouldStop
) -> bool:
    # Collective. Whether all images are encoded; False if asked to stop.
    for cache in caches:
        if not cache.missing:
            continue
        is_complete = EncodingPass(
            cache,
            model,
            on_bad_image=config.on_bad_image,
            num_workers=config.num_workers,
            should_stop=should_stop,
        ).run()
        if not is_complete:
            return False
    return True
