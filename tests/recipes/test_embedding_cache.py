"""Runs with a cache learn and score what runs without one do, and encode nothing twice."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import samft
from helpers.cached_runs import cached_arguments, counted_encodings, encodings_of
from helpers.equal_metrics import check_equal_metrics
from helpers.gloo_pool import GlooPool
from helpers.short_runs import (
    command_here,
    largest_difference,
    read_metrics,
    read_weights,
    train_here,
    write_data,
)
from samft.config import parse_config
from samft.data.loaders import train_loader
from samft.errors import ConfigError
from samft.recipes.build import build_model, load_weights
from samft.recipes.datasets import load_splits
from samft.recipes.embedding_cache import EmbeddingCache, prepare_cache
from samft.runtime import files
from samft.training.engine import Progress

pytestmark = pytest.mark.run

NUM_TRAIN, NUM_VAL = 13, 5
ALL = 2 * NUM_TRAIN + NUM_VAL  # training images as they are and flipped
STEPS = 20
# One image at a time is encoded as the pass encodes it: then a float32 cache changes no bit.
SINGLY: dict[str, Any] = {"batch_size": 1, "accumulate_steps": 2}
FLOAT32: dict[str, Any] = {**SINGLY, "cache_dtype": "float32", "save_top_k": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=NUM_TRAIN, num_val=NUM_VAL)


@pytest.fixture(scope="module")
def uncached(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncached")
    train_here(cached_arguments(data, folder, cache_embeddings="off", **SINGLY))
    return folder


@pytest.fixture(scope="module")
def cached(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    argv = cached_arguments(data, folder, **FLOAT32)
    assert encodings_of(argv) == (0, ALL)
    return folder


# The same run


def test_a_float32_cache_changes_nothing(uncached: Path, cached: Path) -> None:
    check_equal_metrics(cached, uncached, rel=0)
    assert largest_difference(cached, uncached) == 0.0


def test_a_float16_cache_scores_within_half_a_percent(
    data: Path, uncached: Path, tmp_path: Path
) -> None:
    train_here(cached_arguments(data, tmp_path, **SINGLY))
    lines = zip(read_metrics(tmp_path, "val"), read_metrics(uncached, "val"), strict=True)
    assert max(abs(ours["per_mask_iou"] - theirs["per_mask_iou"]) for ours, theirs in lines) < 5e-3
    assert largest_difference(tmp_path, uncached) > 0


def test_the_encoders_weights_do_not_change(cached: Path) -> None:
    start = samft.load_sam(Path(samft.__file__).parent / "pretrained" / "vit_tiny.pth")
    resized = read_weights(cached)
    for name, tensor in start.image_encoder.state_dict().items():
        if "pos" not in name:
            assert torch.equal(resized[f"image_encoder.{name}"], tensor)


def test_pictures_are_of_the_images(uncached: Path, cached: Path) -> None:
    for name in ("before.png", "after.png"):
        ours, theirs = (cv2.imread(str(folder / name)) for folder in (cached, uncached))
        assert ours.std() > 10 and np.array_equal(ours, theirs)


def prepared(data: Path, folder: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """A configuration with its splits and model, after caching."""
    config = parse_config(cached_arguments(data, folder, **changes))
    splits = load_splits(config)
    model = build_model(config, load_weights(config), torch.device("cpu"))
    assert prepare_cache(config, model, splits, progress=Progress(), should_stop=lambda: False)
    return config, splits, model


def test_batches_differ_in_pixels_only(data: Path, tmp_path: Path) -> None:
    without = load_splits(parse_config(cached_arguments(data, tmp_path)))
    _, splits, _ = prepared(data, tmp_path, cache_dtype="float32", max_masks_per_image=3)
    _, uncached, _ = prepared(data, tmp_path / "off", cache_embeddings="off", max_masks_per_image=3)
    assert without.train.embeddings is None and uncached.train.embeddings is None
    loaders = [
        iter(train_loader(each.train, batch_size=4, num_workers=workers))
        for each, workers in ((splits, 2), (uncached, 0))
    ]
    for _ in range(8):  # more than two epochs
        ours, theirs = (next(loader) for loader in loaders)
        assert ours.images.numel() == 0 and ours.embeddings.shape == (4, 128, 4, 4)
        assert theirs.embeddings is None
        for name in ("boxes", "targets", "image_index", "input_sizes", "original_sizes"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert ours.image_ids == theirs.image_ids


def test_training_needs_neither_images_nor_the_encoder(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    _, splits, model = prepared(copy, tmp_path / "run")
    for path in copy.rglob("*.png"):
        path.unlink()
    model.sam.image_encoder.to("meta")  # anything computed with it would be empty
    batch = next(iter(train_loader(splits.train, batch_size=4)))
    logits, _ = model(batch.images, batch.boxes, batch.image_index, embeddings=batch.embeddings)
    assert logits.device.type == "cpu" and bool(torch.isfinite(logits).all())


# Nothing twice


def test_a_finished_run_encodes_nothing(data: Path, cached: Path) -> None:
    argv = cached_arguments(data, cached, **FLOAT32)
    assert encodings_of(argv) == (0, 0)


def test_a_resumed_run_finds_the_cache(data: Path, cached: Path, tmp_path: Path) -> None:
    argv = cached_arguments(data, tmp_path, **FLOAT32)
    assert encodings_of([*argv, "--stop_after", "7"]) == (75, ALL)
    assert encodings_of(argv) == (0, 0)
    assert largest_difference(cached, tmp_path) == 0.0


def encoded_anew(data: Path, folder: Path, **changes: Any) -> int:
    """Prepares a run with a shared cache; how many images were encoded."""
    with counted_encodings() as counts:
        prepared(data, folder / "run", cache_dir=folder / "cache", **changes)
    return sum(counts)


def test_only_what_changed_is_encoded_anew(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    assert encoded_anew(copy, tmp_path) == ALL
    assert encoded_anew(copy, tmp_path, learning_rate=3e-4, seed=3) == 0
    path = copy / "train" / "image_5.png"
    stat = path.stat()
    image = cv2.imread(str(path))
    image[0, 0] += 1
    cv2.imwrite(str(path), image)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # by content, not by date
    assert encoded_anew(copy, tmp_path) == 2
    cv2.imwrite(str(copy / "val" / "image_2.png"), image)
    assert encoded_anew(copy, tmp_path) == 1
    (copy / "val" / "image_2.png").write_bytes((data / "val" / "image_2.png").read_bytes())
    assert encoded_anew(copy, tmp_path) == 0
    # As it is at one size in pixels: another image size, resize mode, precision, type.
    assert encoded_anew(copy, tmp_path, image_size=80) == ALL
    assert encoded_anew(copy, tmp_path, resize_mode="squash") == ALL
    assert encoded_anew(copy, tmp_path, cache_dtype="float32") == ALL
    assert encoded_anew(copy, tmp_path, amp="bf16") == 2 * NUM_TRAIN  # validation is in float32
    assert encoded_anew(copy, tmp_path, augment="none") == 0


def test_other_weights_are_noticed(data: Path, tmp_path: Path) -> None:
    sam = samft.load_sam(Path(samft.__file__).parent / "pretrained" / "vit_tiny.pth")
    weights = tmp_path / "other.pth"

    def save() -> dict[str, Any]:
        torch.save(sam.state_dict(), weights)
        return {"checkpoint_path": weights}

    assert encoded_anew(data, tmp_path, **save()) == ALL
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight += 1e-3
    assert encoded_anew(data, tmp_path, **save()) == 0
    with torch.no_grad():
        sam.image_encoder.blocks[2].norm1.bias[3] += 1e-3
    assert encoded_anew(data, tmp_path, **save()) == ALL


# Interrupted


def stop_at(number: int) -> Any:
    def at(done: int) -> None:
        if done == number:
            os.kill(os.getpid(), signal.SIGTERM)

    return at


def test_a_signal_stops_encoding_and_the_same_command_resumes(
    data: Path, cached: Path, tmp_path: Path, capsys: Any
) -> None:
    argv = cached_arguments(data, tmp_path, **FLOAT32)
    with counted_encodings(at=stop_at(6)) as counts:
        assert command_here(argv) == 75
    assert sum(counts) == 8
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("preempted", 0, 75)
    reason = "SIGTERM: the embeddings encoded so far are kept"
    assert status["reason"].startswith(reason) and reason in capsys.readouterr().err
    assert encodings_of(argv) == (0, ALL - 8)
    assert largest_difference(cached, tmp_path) == 0.0
    assert not list(tmp_path.glob("previous-*"))  # a pass alone is no earlier run


def test_a_run_waits_for_another_that_fills_the_cache(
    data: Path, tmp_path: Path, caplog: Any
) -> None:
    config = parse_config(cached_arguments(data, tmp_path))
    splits = load_splits(config)
    model = build_model(config, load_weights(config), torch.device("cpu"))
    (tmp_path / "embeddings").mkdir()
    other = files.try_lock(tmp_path / "embeddings" / "lock")
    waits = [False, False]  # before it looks at the lock once more, it waits a second
    options: dict[str, Any] = {
        "progress": Progress(),
        "should_stop": lambda: "waiting" in caplog.text and (not waits or waits.pop()),
    }
    assert other is not None
    with caplog.at_level("INFO", logger="samft"), counted_encodings() as counts:
        assert not prepare_cache(config, model, splits, **options)
    assert caplog.text.count("waiting for another run, which is filling") == 1
    assert counts == [] and splits.train.embeddings is None
    other.close()
    options["should_stop"] = lambda: False
    assert prepare_cache(config, model, splits, **options)


# Several processes


def test_two_processes_write_one_cache_and_learn_the_same(
    gloo2: GlooPool, data: Path, uncached: Path, tmp_path: Path
) -> None:
    argv = cached_arguments(data, tmp_path, batch_size=1, cache_dtype="float32")
    results = gloo2.run(encodings_of, argv)
    assert [code for code, _ in results] == [0, 0]
    assert sum(number for _, number in results) == ALL
    assert all(number > ALL / 3 for _, number in results)
    check_equal_metrics(tmp_path, uncached, rel=1e-3)
    one = cached_arguments(data, tmp_path / "one", cache_dir=tmp_path / "embeddings", steps=1)
    assert encodings_of([*one, "--cache_dtype", "float32"]) == (0, 0)


def train_without_encoder(data: Path, folder: Path) -> list[int]:
    """A run in which the encoder has no weights any more once the cache is filled."""

    fill = EmbeddingCache.fill

    def fill_and_empty(cache: EmbeddingCache) -> bool:
        done, model = fill(cache), cache.model
        weights = {k: v.clone() for k, v in model.sam.image_encoder.state_dict().items()}
        model.sam.image_encoder.to("meta")
        whole = model.sam.state_dict
        prefix = "image_encoder."
        model.sam.state_dict = lambda: {  # type: ignore[method-assign,assignment,misc]
            k: weights[k.removeprefix(prefix)] if k.startswith(prefix) else v
            for k, v in whole().items()
        }
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingCache, "fill", fill_and_empty)
        argv = cached_arguments(data, folder, batch_size=1, steps=3, metrics_interval=2)
        return [command_here(argv)]


def test_an_encoder_on_another_device_is_left_alone_by_ddp(
    gloo2: GlooPool, data: Path, tmp_path: Path
) -> None:
    assert gloo2.run(train_without_encoder, data, tmp_path) == [[0], [0]]


# Whether to cache


def log_of(folder: Path) -> str:
    return (folder / "train.log").read_text()


def test_what_the_cache_held_changes_no_weight(data: Path, tmp_path: Path) -> None:
    short = {"steps": 4, "metrics_interval": 4, "augment": "flip"}
    argv = [cached_arguments(data, tmp_path / name, **short) for name in "ab"]
    assert encodings_of(argv[0]) == (0, ALL)
    stores = [path.parent for path in (tmp_path / "a" / "embeddings").glob("*/meta.json")]
    shutil.copytree(tmp_path / "a" / "embeddings", tmp_path / "b" / "embeddings")
    (flipped,) = (s for s in stores if json.loads((s / "meta.json").read_text())["flipped"])
    shutil.rmtree(tmp_path / "b" / "embeddings" / flipped.name)
    assert encodings_of(argv[1]) == (0, NUM_TRAIN)
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0.0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_is_damaged_during_training_ends_it_with_a_sentence(
    data: Path, cached: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, num_workers: int
) -> None:
    argv = cached_arguments(data, tmp_path, **FLOAT32, num_workers=num_workers)

    fill = EmbeddingCache.fill

    def fill_and_damage(cache: EmbeddingCache) -> bool:
        done = fill(cache)
        for path in (tmp_path / "embeddings").glob("*/embeddings.bin"):
            with path.open("r+b") as file:
                file.seek(8192)
                file.write(b"damaged")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingCache, "fill", fill_and_damage)
        assert command_here(argv) == 2
    error = capsys.readouterr().err
    assert "has changed on the disk" in error and "Traceback" not in error
    assert command_here(argv) == 0
    assert largest_difference(cached, tmp_path) == 0.0


def test_a_lock_that_is_a_folder_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "embeddings" / "lock").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cache_dir: .* cannot be written"):
        train_here(cached_arguments(data, tmp_path))


def test_auto_decides_alike_whatever_the_cache_holds(data: Path, tmp_path: Path) -> None:
    shared = {"cache_dir": tmp_path / "cache", "metrics_interval": 100, "steps": 10}
    assert encodings_of(cached_arguments(data, tmp_path / "on", **shared)) == (0, ALL)
    auto = cached_arguments(data, tmp_path / "auto", **shared, cache_embeddings="auto")
    assert encodings_of(auto) == (0, 10 * 2 + (2 + 1) * NUM_VAL)  # as without a cache, see below


def test_auto_caches_for_a_frozen_encoder_only(data: Path, tmp_path: Path) -> None:
    auto = {"cache_embeddings": "auto", "steps": 4, "metrics_interval": 1}
    argv = cached_arguments(data, tmp_path / "frozen", **auto, augment="none")
    assert encodings_of(argv) == (0, NUM_TRAIN + NUM_VAL)
    assert "embeddings of 0 of 18 images are in" in log_of(tmp_path / "frozen")
    argv = cached_arguments(data, tmp_path / "free", **auto, freeze_image_encoder=False)
    code, encodings = encodings_of(argv)
    # Four steps of 2, five validations, the first and the best weights once more for report.html,
    # and no word about it.
    assert (code, encodings) == (0, 4 * 2 + (5 + 2) * NUM_VAL)
    assert "embeddings of" not in log_of(tmp_path / "free")
    assert not (tmp_path / "free" / "embeddings").exists()


def test_auto_is_off_where_pixels_change_and_logs_it(data: Path, tmp_path: Path) -> None:
    argv = cached_arguments(data, tmp_path, cache_embeddings="auto", steps=1, augment="scale")
    code, encodings = encodings_of(argv)
    # Two validations, and once more the images that report.html shows, which depends on the masks.
    assert code == 0 and 2 + 2 * NUM_VAL < encodings <= 2 + 3 * NUM_VAL
    assert "cache_embeddings auto: off, because augment scale changes the pixels" in log_of(
        tmp_path
    )


def test_auto_is_off_where_it_would_cost_more_than_it_saves(data: Path, tmp_path: Path) -> None:
    short = {"cache_embeddings": "auto", "metrics_interval": 100}
    argv = cached_arguments(data, tmp_path / "a", **short, steps=10)
    # 30, and ahead it would be 31; and those of report.html.
    assert encodings_of(argv) == (0, 10 * 2 + (2 + 1) * NUM_VAL)
    reason = (
        f"{ALL} images (a flipped image counts again) would be encoded before the first step, and "
        "this run without a cache encodes 30"
    )
    assert reason in log_of(tmp_path / "a")
    argv = cached_arguments(data, tmp_path / "b", **short, steps=11)
    assert encodings_of(argv) == (0, ALL)


def test_too_little_room_turns_auto_off_and_refuses_on(
    data: Path, tmp_path: Path, capsys: Any
) -> None:
    tight = {"cache_max_gib": 1e-5, "steps": 20}
    auto = cached_arguments(data, tmp_path / "auto", **tight, cache_embeddings="auto")
    assert command_here(auto) == 0
    assert re.search(r"auto: off, because .* has no room: it would hold", log_of(tmp_path / "auto"))
    capsys.readouterr()
    assert encodings_of(cached_arguments(data, tmp_path / "on", **tight)) == (2, 0)
    error = capsys.readouterr().err
    assert "cache_dir: " in error and "raise cache_max_gib" in error


def test_a_cache_folder_that_cannot_be_made_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    argv = cached_arguments(data, tmp_path / "run", cache_dir=tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match=r"cache_dir: .* cannot be written"):
        train_here(argv)


# Broken images


def test_a_set_with_broken_images_trains_as_without_a_cache(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    for split, number in (("train", 2), ("train", 7), ("val", 1)):
        path = copy / split / f"image_{number}.png"
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    folders = tmp_path / "off", tmp_path / "on"
    for folder in folders:
        argv = cached_arguments(
            copy,
            folder,
            on_bad_image="skip",
            cache_embeddings=folder.name,
            cache_dtype="float32",
            **SINGLY,
        )
        assert command_here(argv) == 0
    check_equal_metrics(folders[1], folders[0], rel=0)
    ours, theirs = (json.loads((f / "summary.json").read_text())["data"] for f in folders)
    assert ours == theirs
    assert ours["train"]["bad_images"].keys() == {"image_2.png", "image_7.png"}
    argv = cached_arguments(copy, tmp_path / "error")
    assert command_here(argv) == 2
