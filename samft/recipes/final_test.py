"""Scores the test split, once, at the end of a run: the untouched weights and the best checkpoint.

The images of that split take no part in a choice, neither of weights nor of the best checkpoint, so
what they score is what new images of the kind will. It is no reason to fail a run: what goes wrong
on any rank is logged, and starting the finished run again tries it again.

So is the general set, where its validations do not have both scores, because a resumed run was
given another one.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samft import distributed
from samft.checkpoints.top_k import Checkpoint
from samft.data.dataset import Batch, Coco2MaskDataset
from samft.data.loaders import Waiting, lockstep, val_loader
from samft.distributed import run_on_all_ranks
from samft.errors import CheckpointError, DataError, UserError
from samft.evaluation.object_scores import (
    Comparison,
    ObjectScores,
    compare_objects,
    gather_scores,
    mean_change,
)
from samft.evaluation.validation import score_image
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam, load_state, read_state
from samft.models.trainable import freeze
from samft.recipes.build import PARTS, load_initial_state, trained_apart
from samft.recipes.datasets import hash_data
from samft.recipes.fit import TrainingRun
from samft.recipes.qualitative_examples import predict_objects, score_as_before
from samft.reports.validation_images import find_objects
from samft.runtime import heartbeat
from samft.runtime.device import exact_float32
from samft.runtime.files import read_json
from samft.runtime.logs import LOGGER, progress_bar
from samft.runtime.signals import StopInterrupt
from samft.training.losses import LossFunction

SUMMARY_NAME = "summary.json"


def score_test_split(run: TrainingRun) -> tuple[dict[str, Any] | None, bool]:
    """Scores the test split, unless an earlier start of the same run has. Collective.

    Args:
        run: With its last step taken and everything saved.

    Returns:
        `images` and `masks` scored; mean IoU `before` and `after`, and of filling each box,
        `box_fill`; the 95 % `interval` of the mean change; how many objects `gained` and `lost`,
        see `Comparison`; `bad_images`, those that could not be read; and `fingerprint` of the
        split. None if there is no test split, no checkpoint, or no number. And whether they are
        new.
    """
    best, test = _best_checkpoint(run), run.splits.test
    if test is None or best is None:
        return None, False
    return _score_once(run, best, test, what="test split")


def score_general_set(run: TrainingRun) -> tuple[dict[str, Any] | None, bool]:
    """The scores of the general set, from its validations if these have both. Collective.

    Args:
        run: With its last step taken and everything saved.

    Returns:
        As `score_test_split`, and `since_step`, the first whose validation was on these images.
    """
    best, general = _best_checkpoint(run), run.splits.general
    if general is None or best is None:
        return None, False
    since = run.progress.general_since
    validated: dict[str, Any] | None = distributed.broadcast(_compare_validations(run, best))
    if validated is not None:
        return {**validated, "since_step": since}, False
    scores, is_new = _score_once(run, best, general, what="general set")
    return scores and {**scores, "since_step": since}, is_new


def _best_checkpoint(run: TrainingRun) -> Checkpoint | None:
    ranked = run.checkpointer.top_k.best
    best: Checkpoint | None = distributed.broadcast(ranked[0] if ranked else None)
    return best


def _compare_validations(run: TrainingRun, best: Checkpoint) -> dict[str, Any] | None:
    # None unless both were on these images, and the scores of both are known.
    scores = run.images.per_object_log
    before, after = scores.read_general(0), scores.read_general(best.step)
    if run.progress.general_since or before is None or after is None:
        return None
    comparison = compare_objects(before, after)
    if not len(comparison.before):
        return None
    fingerprint = run.splits.general_fingerprint
    return {**_summarise(comparison), "bad_images": {}, "fingerprint": fingerprint}


def _score_once(
    run: TrainingRun, best: Checkpoint, dataset: Coco2MaskDataset, *, what: str
) -> tuple[dict[str, Any] | None, bool]:
    # Unless an earlier start of the run has. And whether that is new.
    key = what.split()[0]
    earlier = distributed.broadcast(_read_earlier(run, best, dataset, key=key))
    if earlier is not None:
        return earlier, False
    LOGGER.info(
        "scoring the %s with the untouched weights and with %s: %d images, %d masks%s",
        what,
        best.name,
        dataset.subset.num_images,
        dataset.subset.num_objects,
        " (`--test_split none` leaves it out)" if key == "test" else "",
    )
    try:
        return _score(run, best, dataset, key=key), True
    except StopInterrupt:
        reason = "the run was asked to stop"
    except UserError as error:
        reason = str(error)
    LOGGER.warning(
        "the %s was not scored: %s. All else of the run is complete; the same command scores it",
        what,
        reason.rstrip("."),
    )
    return None, False


def _read_earlier(
    run: TrainingRun, best: Checkpoint, dataset: Coco2MaskDataset, *, key: str
) -> dict[str, Any] | None:
    # Of the same checkpoint, on the same images.
    try:
        summary = read_json(run.output_dir / SUMMARY_NAME)
        earlier: dict[str, Any] | None = summary[key]
        scored = Checkpoint(best.name, summary["best_step"], summary["best_val_per_mask_iou"])
        if earlier and scored == best and earlier["fingerprint"] == hash_data(dataset.subset):
            return earlier
    except (OSError, ValueError, LookupError, TypeError):  # none, or not ours
        pass
    return None


def _score(
    run: TrainingRun, best: Checkpoint, dataset: Coco2MaskDataset, *, key: str
) -> dict[str, Any]:
    config = run.config
    models = run_on_all_ranks(lambda: _build_models(run, best))
    loader = val_loader(
        dataset,
        num_workers=config.num_workers,
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        timeout=config.hang_timeout,
        pin_memory=run.device.type == "cuda",
    )
    hidden = not distributed.is_main()
    with progress_bar(total=len(loader), unit="image", hidden=hidden, leave=False) as bar:
        tables, bad_images = score_models(
            models,
            loader,
            loss=run.trainer.loss,
            on_image=bar.update,
            should_stop=lambda: bool(run.stop) or time.time() >= run.deadline,
            waiting=run.stop.waiting,
        )
    for reason in bad_images.values():
        LOGGER.info("%s, left out: %s", key, reason)
    if not len(tables[0]):
        raise DataError("none of its images can be read")
    scores = _summarise(compare_objects(*tables))
    return {**scores, "bad_images": bad_images, "fingerprint": hash_data(dataset.subset)}


def _summarise(comparison: Comparison[ObjectScores]) -> dict[str, Any]:
    before, after = comparison.before, comparison.after
    return {
        "images": len(np.unique(before.image_ids)),
        "masks": len(before),
        "before": float(before.iou_actual.mean()),
        "after": float(after.iou_actual.mean()),
        "box_fill": float(before.iou_box_fill.mean()),
        "interval": mean_change(comparison.change, before.image_ids, seed=0)["interval"],
        "gained": comparison.num_gained,
        "lost": comparison.num_lost,
    }


@contextmanager
def _as_user_errors(what: str) -> Iterator[None]:
    # So that all ranks can agree on any error, and go on without what has failed.
    try:
        yield
    except (UserError, StopInterrupt):
        raise
    except Exception as error:
        LOGGER.debug("%s", what, exc_info=True)
        raise DataError(f"{what}: {error}") from error


def _build_models(run: TrainingRun, best: Checkpoint) -> tuple[PromptedSam, PromptedSam]:
    with _as_user_errors("the initial or the best weights cannot be loaded"):
        before = _build_model(run, load_initial_state(run.config))
        if distributed.is_main():
            _check_untouched(run, before)
        after = _build_model(run, read_state(run.output_dir / best.name, quiet=True))
    if before.encoder_is_frozen:
        after.sam.image_encoder = before.sam.image_encoder  # equal; one is enough in memory
    return before, after


def _build_model(run: TrainingRun, weights: dict[str, Tensor]) -> PromptedSam:
    # Of its own: that of the run may be compiled, without its encoder, or wrapped.
    config = run.config
    assert config.model_type is not None
    sam = build_sam(config.model_type, config.image_size, attention=config.attention)
    load_state(sam, weights, source="the weights of this run")
    # What is frozen runs once for both models, and takes what is cached of validation images.
    frozen = [part for part in PARTS if getattr(config, f"freeze_{part}")]
    freeze(sam, frozen, train_blocks=config.train_blocks, **trained_apart(config))
    chunk = run.model.boxes_at_once()
    return PromptedSam(sam.to(run.device), decoder=config.decoder, mask_chunk=chunk)


def _check_untouched(run: TrainingRun, model: PromptedSam) -> None:
    # By the objects of one validation image, whose scores at step 0 are known.
    table = run.images.per_object_log.read(0)
    if table is None or not len(table):
        return
    rows = np.flatnonzero(table.image_ids == table.image_ids[0])
    objects = find_objects(run.images.index, table.keys()[rows]).tolist()
    predicted = predict_objects(model, run.splits.val, objects, embeddings={})
    scored = dict(zip(objects, table.iou_actual[rows].tolist(), strict=True))
    if not score_as_before(run.splits.val, predicted, scored):
        raise CheckpointError(
            f"{run.config.checkpoint_path} does not score as at step 0: it has changed since"
        )


@torch.no_grad()
@exact_float32()
def score_models(
    models: Sequence[PromptedSam],
    batches: Iterable[Batch],
    *,
    loss: LossFunction,
    on_image: Callable[[], object] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
    waiting: Waiting = nullcontext,
) -> tuple[list[ObjectScores], dict[str, str]]:
    """Scores several models on every mask of a split, as `validate` does. Collective.

    Each image is loaded once for all models, and what is frozen of the encoder runs once.

    Args:
        models: On their device; frozen parts of their encoders are equal.
        batches: See `validate`.
        loss: See `validate`.
        on_image: Called after each image of this rank.
        should_stop: See `validate`.
        waiting: See `validate`.

    Returns:
        A table for each model, and the images that could not be read: name, reason. The same on
        every rank.

    Raises:
        StopInterrupt: Any rank was asked to stop.
        UserError: Anything failed on any rank.
    """
    rows: list[list[ObjectScores]] = [[] for _ in models]
    bad_images: dict[str, str] = {}
    failures: list[UserError] = []
    try:
        for batch in lockstep(
            _load_batches(batches),
            should_stop=lambda: bool(failures) or should_stop(),
            waiting=waiting,
        ):
            heartbeat.set_activity("scoring image", partial(list, batch.image_ids))
            bad_images.update(batch.bad_images)
            try:
                with _as_user_errors(f"image {batch.image_ids[0]} cannot be scored"):
                    _score_batch(models, batch, rows, loss=loss)
            except UserError as error:  # raised once the other ranks know, who would wait for it
                failures.append(error)
            on_image()
    except StopInterrupt:
        distributed.raise_on_all_ranks(failures[0] if failures else None)
        raise
    bad_by_rank = distributed.all_gather(bad_images)
    tables = [gather_scores(ObjectScores.concatenate(parts)) for parts in rows]
    return tables, {name: why for bad in bad_by_rank for name, why in bad.items()}


def _load_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    with _as_user_errors("an image cannot be loaded"):
        yield from batches


def _score_batch(
    models: Sequence[PromptedSam],
    batch: Batch,
    rows: list[list[ObjectScores]],
    *,
    loss: LossFunction,
) -> None:
    if not batch.num_masks:  # the image cannot be read
        return
    if models[0].frozen_shape is not None and batch.embeddings is None:
        on_device = batch.to(models[0].sam.device, non_blocking=True)
        frozen = models[0].encode_frozen(on_device.images, on_device.input_sizes)
        batch = replace(batch, embeddings=frozen)
    for model, parts in zip(models, rows, strict=True):
        parts += [objects for _, objects in score_image(model, batch, loss=loss)]
