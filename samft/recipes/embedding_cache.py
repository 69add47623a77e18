"""Whether a run takes its embeddings from a cache, and which: the configuration's side of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from samft import distributed
from samft.config import TrainConfig
from samft.data.dataset import Coco2MaskDataset
from samft.distributed import run_on_all_ranks
from samft.embeddings.precompute import Precompute, unwritable
from samft.embeddings.split_cache import (
    CacheKey,
    ShouldStop,
    SplitCache,
    describe,
    digest_of_encoder,
    precision_of,
    read_digests,
)
from samft.embeddings.store import Store, make_room
from samft.errors import ConfigError
from samft.models.prompted_sam import PromptedSam
from samft.recipes.datasets import Splits
from samft.runtime.device import pick_amp_dtype
from samft.runtime.files import try_lock
from samft.runtime.logs import GIB, LOGGER, format_gib
from samft.runtime.output_dir import create_writable_dir
from samft.training.engine import Progress


def cache_folder_of(config: TrainConfig) -> Path:
    """Where a run keeps embeddings."""
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
    """Gives both splits the embeddings of their images, encoded now if need be. Collective.

    Nothing is done where the configuration does not want it or, with `auto`, where it would not
    help or has no room, which is said. Afterwards the image encoder is on the CPU, for good.

    Args:
        config: The configuration.
        model: On its device, with what is to stay frozen frozen.
        splits: Get their embeddings.
        progress: How far the run has come.
        should_stop: Asked between images; all ranks stop if any says yes.

    Returns:
        Whether training may go on; False if stopped, with what was encoded recorded.

    Raises:
        UserError: An image cannot be used, or the cache cannot be written or, with `on`, has no
            room.
    """
    if not _is_wanted(config, model, progress):
        return True
    folder = cache_folder_of(config)
    plans = _plans(config, model, splits)
    if config.cache_embeddings == "auto" and not _is_worth_caching(config, plans, progress):
        return True
    run_on_all_ranks(lambda: _make(folder))
    caches = _read(plans, on_bad_image=config.on_bad_image, should_stop=should_stop)
    if caches is None:
        return False
    with _exclusive_lock(folder, should_stop=should_stop) as entered:
        if not entered:
            return False
        run_on_all_ranks(lambda: _create(plans))
        run_on_all_ranks(lambda: _check_seen(plans))
        for cache in caches:
            cache.look_up()
        if not _has_room(caches, folder, config):
            return True
        if not _fill(caches, model, config, should_stop=should_stop):
            return False
        for cache in caches:
            cache.attach()
        distributed.barrier()  # rank 0 has the lock until all have mapped what they read
    model.sam.image_encoder.cpu()
    if model.sam.device.type == "cuda":
        torch.cuda.empty_cache()
    return True


class CacheEstimate(NamedTuple):
    """What a run is going to add to its cache: images (each side of them), and bytes."""

    num_images: int
    num_bytes: int


def estimate_cache(
    config: TrainConfig, model: PromptedSam, splits: Splits, *, progress: Progress
) -> CacheEstimate | None:
    """What `prepare_cache` would do, as far as that is known without hashing images. Collective.

    Args:
        config: The configuration.
        model: On its device, with what is to stay frozen frozen.
        splits: The images.
        progress: How far the run has come.

    Returns:
        What is to come; None where the run does without a cache.
    """
    if not _is_wanted(config, model, progress):
        return None
    plans = _plans(config, model, splits)
    if config.cache_embeddings == "auto" and not _is_worth_caching(config, plans, progress):
        return None
    return CacheEstimate(*distributed.broadcast(_estimate_missing(plans)))


class _Plan(NamedTuple):
    dataset: Coco2MaskDataset
    amp_dtype: torch.dtype | None
    recipes: list[CacheKey]
    stores: tuple[Store, ...]


def _is_wanted(config: TrainConfig, model: PromptedSam, progress: Progress) -> bool:
    if config.cache_embeddings == "off" or progress.step >= config.steps:
        return False
    if not model.encoder_is_frozen:  # the configuration refuses `on`
        return False
    if config.augment == "scale":
        LOGGER.info(
            "cache_embeddings auto: off, because augment scale changes the pixels, and with them "
            "the embeddings, every time"
        )
        return False
    return True


def _make(folder: Path) -> None:
    try:
        create_writable_dir(folder, field="cache_dir")
    except ConfigError as error:
        raise ConfigError(f"{error} `--cache_embeddings off` does without.") from error


@contextmanager
def _exclusive_lock(folder: Path, *, should_stop: ShouldStop) -> Iterator[bool]:
    # One run at a time makes room and fills; False if asked to stop while waiting.
    said = False
    while True:
        lock = try_lock(folder / "lock") if distributed.is_main() else None
        if distributed.any_rank(lock is not None):
            break
        if distributed.any_rank(should_stop()):
            yield False
            return
        if not said:
            LOGGER.info("waiting for another run, which is filling %s", folder)
            said = True
        time.sleep(1)
    try:
        yield True
    finally:
        if lock is not None:
            lock.close()


def _plans(config: TrainConfig, model: PromptedSam, splits: Splits) -> list[_Plan]:
    device = model.sam.device
    digest = distributed.broadcast(digest_of_encoder(model.sam) if distributed.is_main() else "")
    folder, shape = cache_folder_of(config), model.embedding_shape

    def plan(
        dataset: Coco2MaskDataset, amp_dtype: torch.dtype | None, sides: tuple[bool, ...]
    ) -> _Plan:
        recipes = [
            CacheKey(
                encoder=digest,
                image_size=config.image_size,
                resize_mode=config.resize_mode,
                exact=not dataset.training,
                flipped=flipped,
                precision=precision_of(amp_dtype, device),
                dtype=config.cache_dtype,
            )
            for flipped in sides
        ]
        stores = tuple(Store(folder / r.key, shape=shape, dtype=r.dtype) for r in recipes)
        return _Plan(dataset, amp_dtype, recipes, stores)

    sides = (False,) if config.augment == "none" else (False, True)
    return [
        plan(splits.train, pick_amp_dtype(config.amp, device), sides),
        plan(splits.val, None, (False,)),  # in float32, as all validation
    ]


def _is_worth_caching(config: TrainConfig, plans: list[_Plan], progress: Progress) -> bool:
    # Decided before any image is read: hashing a million to learn that it is pointless is no help.
    batch = config.batch_size * config.accumulate_steps * distributed.get_world_size()
    steps = config.steps - progress.step
    validations = -(-steps // config.metrics_interval) + (not progress.baseline)
    without = steps * batch + validations * len(plans[-1].dataset)
    ahead = _estimate_missing(plans).num_images
    pays: bool = distributed.broadcast(ahead <= without)
    if not pays:
        LOGGER.info(
            "cache_embeddings auto: off, because %d images (each side of them) would be encoded "
            "ahead, and this run encodes %d as it goes",
            ahead,
            without,
        )
    return pays


def _estimate_missing(plans: list[_Plan]) -> CacheEstimate:
    stores = [(len(plan.dataset), store) for plan in plans for store in plan.stores]
    missing = [(max(0, images - store.num_records), store.slot_bytes) for images, store in stores]
    return CacheEstimate(sum(count for count, _ in missing), sum(n * size for n, size in missing))


def _read(
    plans: list[_Plan], *, on_bad_image: str, should_stop: ShouldStop
) -> list[SplitCache] | None:
    found = []
    for plan in plans:
        subset = plan.dataset.subset
        files = read_digests(subset, on_bad_image=on_bad_image, should_stop=should_stop)
        if files is None:
            return None
        found.append(SplitCache(plan.dataset, plan.amp_dtype, plan.stores, files))
    return found


def _create(plans: list[_Plan]) -> None:
    for plan in plans:
        for recipe, store in zip(plan.recipes, plan.stores, strict=True):
            try:
                if distributed.is_main():
                    store.create(describe(recipe))
            except OSError as error:
                raise unwritable(store.folder.parent, error) from error


def _check_seen(plans: list[_Plan]) -> None:
    for store in (store for plan in plans for store in plan.stores):
        if not store.folder.is_dir():
            raise ConfigError(
                f"cache_dir: {store.folder.parent} is not the same folder for all processes: name "
                "one on a disk that all hosts share, or take `--cache_embeddings off`."
            )


def _has_room(caches: list[SplitCache], folder: Path, config: TrainConfig) -> bool:
    needed = sum(cache.missing_bytes for cache in caches)
    why = None
    if distributed.is_main():
        own = {store.folder.name for cache in caches for store in cache.stores}
        why = make_room(folder, own=own, needed=needed, limit=int(config.cache_max_gib * GIB))
    why = distributed.broadcast(why)
    if why is None:
        missing = sum(len(cache.missing) for cache in caches)
        images = sum(len(cache.files.digests) for cache in caches)
        more = f"; {format_gib(needed)} to come" if missing else ""
        LOGGER.info(
            "embeddings of %d of %d images are in %s%s", images - missing, images, folder, more
        )
        return True
    if config.cache_embeddings == "auto":
        LOGGER.warning("cache_embeddings auto: off, because %s has no room: %s", folder, why)
        return False
    raise ConfigError(
        f"cache_dir: {folder} has no room for the embeddings: {why}. Make room, name another "
        "folder, raise cache_max_gib, or take `--cache_embeddings off`."
    )


def _fill(
    caches: list[SplitCache], model: PromptedSam, config: TrainConfig, *, should_stop: ShouldStop
) -> bool:
    for cache in caches:
        if not cache.missing:
            continue
        finished = Precompute(
            cache,
            model,
            on_bad_image=config.on_bad_image,
            num_workers=config.num_workers,
            should_stop=should_stop,
        ).run()
        if not finished:
            return False
    return True
