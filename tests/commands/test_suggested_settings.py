"""`samft check --suggest`: what is suggested for any dataset and machine, and the file of it."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from helpers import REPOSITORY
from helpers.coco_files import annotation, write_coco, write_json
from helpers.short_runs import train_here
from samft import check
from samft.annotations.boxes import find_small_objects
from samft.check import main
from samft.coco import statistics
from samft.coco.index import CocoIndex
from samft.config import MODEL_TYPES, TrainConfig, parse_config
from samft.errors import ConfigError
from samft.runtime import device
from samft.step_costs import ALL, DECODER, LAST_HALF, LORA, justified_steps, memory_gib
from samft.suggested_settings import SMALLEST_IMAGE_SIZE, Facts, Windows, suggest_settings

IMAGES = (2, 5, 18, 50, 177, 500, 5_000, 100_000)
OBJECTS = (1, 9, 1_000)  # in an image
SIDES = (2, 8, 30, 200, 2_000)  # px of an image of 2,000
MACHINES = {  # GPUs, GiB of each, GiB of the host, cores
    "laptop": (0, 0.0, 1.0, 1),
    "here": (0, 0.0, 24.0, 2),
    "server": (0, 0.0, 640.0, 64),
    "old GPU": (1, 2.0, 8.0, 4),
    "8 GB": (1, 7.8, 32.0, 8),
    "24 GB": (1, 23.6, 64.0, 16),
    "four": (4, 40.0, 256.0, 32),
    "eight": (8, 139.0, 640.0, 64),
}
PLAIN = Facts(500, 4_000, 50, 16, 1024, 1, 24.0, 64.0, 16, 500.0)


def kept_at(side: float) -> int:
    """The image size that `samft check` measures for objects of one size in images of 2,000 px."""
    boxes, sizes = np.array([[0, 0, side, side]]), np.array([[2000, 2000]])
    small = find_small_objects(boxes, sizes, image_size=SMALLEST_IMAGE_SIZE)
    return small.suggested_image_size


def all_facts() -> Iterator[Facts]:
    table = itertools.product(IMAGES, OBJECTS, SIDES, (0, 40), MACHINES.values(), (2.0, 2_000.0))
    for images, objects, side, val, (gpus, gpu_gib, memory, cores), disk in table:
        most = max(8, 1 << (objects - 1).bit_length())
        numbers = images, images * objects, val, most, kept_at(side)
        yield Facts(*numbers, gpus, gpu_gib, memory, cores, disk)


def settings_for(facts: Facts) -> dict[str, Any]:
    return {one.setting: one.value for one in suggest_settings(facts)}


def trained(settings: dict[str, Any]) -> int:
    if settings.get("freeze_image_encoder"):
        return DECODER
    return LORA if "lora_rank" in settings else LAST_HALF if "train_blocks" in settings else ALL


def images_per_step(facts: Facts, settings: dict[str, Any]) -> int:
    each = settings["batch_size"] * settings.get("accumulate_steps", 1)
    return each * max(facts.num_gpus, 1)


def test_every_suggestion_is_a_configuration_that_the_machine_holds() -> None:
    for facts in all_facts():
        suggestions = suggest_settings(facts)
        settings = settings_for(facts)
        assert len(settings) == len(suggestions), "a setting twice"
        assert all(one.reason for one in suggestions)
        assert TrainConfig(data_root="d", **settings).check() == [], facts
        memory = facts.gpu_gib if facts.num_gpus else facts.memory_gib
        need = memory_gib(
            settings["model_type"],
            trained(settings),
            image_size=settings["image_size"],
            batch_size=settings["batch_size"],
        )
        assert need <= memory, facts
        assert ("val_fraction" in settings) == (facts.num_val_images == 0)
        assert settings.get("cache_max_gib", 1) <= max(1, facts.disk_gib / 2)


def test_no_image_is_trained_on_more_often_than_the_data_justify() -> None:
    for facts in all_facts():
        settings = settings_for(facts)
        images = settings["steps"] * images_per_step(facts, settings)
        limit = max(
            min(1000 * (facts.num_train_images / 5) ** 0.5, 200 * facts.num_train_images), 1
        )
        rounding = images_per_step(facts, settings)
        assert images <= max(limit, facts.num_train_images) + rounding, facts
        assert settings["metrics_interval"] <= settings["steps"]
        held_out = settings.get("val_fraction", 0) * facts.num_images
        assert held_out <= 510, facts


@pytest.mark.parametrize("machine", MACHINES)
def test_more_images_are_trained_on_more_and_with_more_of_the_model(machine: str) -> None:
    gpus, gpu_gib, memory, cores = MACHINES[machine]
    before = (0, 0)
    for images in range(2, 3000, 7):
        facts = Facts(images, 9 * images, 40, 16, 1024, gpus, gpu_gib, memory, cores, 500.0)
        settings = settings_for(facts)
        kind = trained(settings) if gpus else DECODER  # a CPU's time decides as well
        seen = settings["steps"] * images_per_step(facts, settings) if gpus else 0
        # By half a step, which rounding takes.
        assert kind >= before[0] or settings["model_type"] != "vit_b", facts
        assert seen >= before[1] - 8 * max(gpus, 1), facts
        before = kind, seen


def test_more_memory_never_means_a_smaller_model_nor_fewer_images_at_once() -> None:
    ranks = [*reversed(MODEL_TYPES)]
    for images in IMAGES:
        before = (0, 0)
        for gib in (1, 2, 4, 8, 11, 16, 24, 32, 40, 48, 80, 140, 200, 640):
            facts = replace(PLAIN, num_images=images, num_objects=9 * images, gpu_gib=float(gib))
            settings = settings_for(facts)
            rank = ranks.index(settings["model_type"])
            assert rank >= before[0], facts
            if rank == before[0]:
                assert settings["batch_size"] >= before[1] or trained(settings) > DECODER, facts
            before = rank, settings["batch_size"]


def test_smaller_objects_never_get_a_smaller_image() -> None:
    for machine in ("24 GB", "eight"):
        gpus, gpu_gib, memory, cores = MACHINES[machine]
        machine_facts = {"num_gpus": gpus, "gpu_gib": gpu_gib, "memory_gib": memory, "cores": cores}
        sizes = [
            settings_for(replace(PLAIN, image_size=kept_at(side), **machine_facts))["image_size"]
            for side in sorted(SIDES, reverse=True)
        ]
        assert sizes == sorted(sizes) and sizes[0] == 1024 and sizes[-1] == 2000 // 64 * 64


@pytest.mark.parametrize("machine", ["here", "24 GB"])
def test_windows_as_large_as_the_models_input_are_suggested(machine: str) -> None:
    gpus, gpu_gib, memory, cores = MACHINES[machine]
    facts = Facts(50, 450, 9, 16, 1984, gpus, gpu_gib, memory, cores, 500.0)
    own, other = (1024, 256) if gpus else (256, 1024)
    views = {own: Windows("objects", 4.0)}
    settings = settings_for(replace(facts, views=views))
    assert (settings["view"], settings["image_size"]) == ("objects", own)
    # Steps are of windows, of which there are more than images.
    images = settings["batch_size"] * settings.get("accumulate_steps", 1) * max(gpus, 1)
    if gpus:
        assert settings["steps"] == justified_steps(200, images)
    for views in ({}, {other: Windows("objects", 4.0)}):
        settings = settings_for(replace(facts, views=views))
        assert "view" not in settings and settings["image_size"] > own


def test_the_view_of_the_file_is_that_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects of 20 px: large enough in images of 600 px and in windows, not in 8,000 px."""
    monkeypatch.setattr(device, "gpu_memories_gib", lambda: [])
    for name, side in (("small", 600), ("large", 8000)):
        folder = tmp_path / name / "train"
        folder.mkdir(parents=True)
        images, annotations = [], []
        for i in range(4):
            Image.new("L", (side, side)).save(folder / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": side, "width": side})
            annotations.append(annotation(i + 1, i, [40, 50, 60, 50, 60, 70, 40, 70]))
        write_json(folder / "_annotations.coco.json", images, annotations)
    views = [
        write_suggested(tmp_path / name, tmp_path / f"{name}.yaml").view
        for name in ("small", "large")
    ]
    assert views == ["image", "objects"]


@pytest.mark.parametrize(
    ("images", "kind"), [(5, DECODER), (50, LORA), (500, LAST_HALF), (5_000, ALL)]
)
def test_what_is_trained_depends_on_images_and_on_objects(images: int, kind: int) -> None:
    facts = replace(PLAIN, num_images=images, num_objects=9 * images)
    assert trained(settings_for(facts)) == kind
    # Images of one object count as fewer.
    fewer = settings_for(replace(facts, num_objects=images))
    assert trained(fewer) == max(DECODER, kind - 1)


@pytest.mark.parametrize(
    ("images", "kind"), [(5, DECODER), (50, LORA), (500, LAST_HALF), (5_000, ALL)]
)
def test_ready_made_recipes_are_what_is_suggested(images: int, kind: int) -> None:
    """`configs/images_N.yaml` is for any set of N images, with `vit_b` on a GPU of 16 GB."""
    path = REPOSITORY / f"configs/images_{images}.yaml"
    facts = Facts(images, 8 * images, max(1, images // 5), 64, 1024, 1, 15.7, 64.0, 8, 300.0)
    ready = OmegaConf.to_container(OmegaConf.load(path))
    suggested = settings_for(facts)
    assert trained(suggested) == kind
    own = {"cache_max_gib": None, "max_masks_per_image": None, "model_type": "vit_b"}
    assert {**ready, **own} == {**suggested, "cache_max_gib": None, **own}


def write_suggested(root: Path, path: Path, *flags: str) -> TrainConfig:
    main(["--data_root", str(root), *flags, "--suggest", str(path)])
    return parse_config(["--config", str(path)])


def test_the_file_is_for_this_dataset_and_never_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "gpu_memories_gib", lambda: [])
    write_coco(tmp_path / "data", 12)
    monkeypatch.chdir(tmp_path)
    config = write_suggested(Path("data"), Path("new/mine.yaml"), "--crowds", "use")
    assert config.data_root == str(tmp_path / "data")
    assert config.output_dir == str(tmp_path / "new/mine")
    assert config.val_fraction == 0.2 and config.group_by == "auto" and config.crowds == "use"
    assert config.model_type == "vit_tiny" and config.learning_rate == 1e-4
    text = (tmp_path / "new/mine.yaml").read_text()
    assert "samft check" in text and "no GPU" in text
    with pytest.raises(ConfigError, match=r"--suggest: new/mine.yaml exists"):
        write_suggested(Path("data"), Path("new/mine.yaml"))
    assert (tmp_path / "new/mine.yaml").read_text() == text
    again = write_suggested(Path("data"), Path("again.yaml"), "--crowds", "use")
    assert replace(again, output_dir=config.output_dir) == config


def test_the_file_of_single_annotations_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "gpu_memories_gib", lambda: [23.6, 15.0])
    file = write_coco(tmp_path / "data", 12)
    path = tmp_path / "mine"
    flags = ["--annotations", str(file), "--images", str(file.parent), "--suggest", str(path)]
    main([*flags, "--pixel_range", "full"])
    config = parse_config(["--config", str(path)])
    assert config.train_annotations == str(file) and config.train_images == str(file.parent)
    assert config.output_dir == str(tmp_path / "mine-run") and config.pixel_range == "full"
    assert "the smallest GPU has 15 GiB" in path.read_text()
    assert "--nproc_per_node=2" in path.read_text().replace("\n# ", " ")


@pytest.mark.parametrize("folder", ["extra", "val"])  # a file in val is trained on all the same
def test_single_annotations_are_validated_on_the_split_of_the_folder(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "gpu_memories_gib", lambda: [])
    root, file = tmp_path / "data", write_coco(tmp_path / "more", 3, split=folder)
    write_coco(root, 3, split="valid", seed=1)
    flags = ["--annotations", str(file), "--images", str(file.parent)]
    assert write_suggested(root, tmp_path / "both.yaml", *flags).val_fraction is None
    main([*flags, "--suggest", str(tmp_path / "alone.yaml")])
    assert parse_config(["--config", str(tmp_path / "alone.yaml")]).val_fraction == 0.2


@pytest.mark.parametrize("image_size", ["1024", "256", "64x48"])
def test_nothing_is_measured_twice(
    image_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, of_views, root = [], [], tmp_path / "data"
    for split in ("train", "val"):
        write_coco(root, 3, split=split, seed=len(split))

    def compute(index: CocoIndex, *, image_size: Any, **options: Any) -> statistics.Statistics:
        measured.append((index.image_folder.name, image_size))
        return compute_stock(index, image_size=image_size, **options)

    def measure(index: CocoIndex, *, image_size: Any) -> tuple[statistics.ViewFacts, ...]:
        of_views.append((index.image_folder.name, image_size))
        return measure_stock(index, image_size=image_size)

    compute_stock, measure_stock = statistics.compute_statistics, statistics.measure_views
    for module in (statistics, check):
        monkeypatch.setattr(module, "compute_statistics", compute)
        monkeypatch.setattr(module, "measure_views", measure, raising=False)
    write_suggested(root, tmp_path / "mine.yaml", "--image_size", image_size)
    given = int(image_size) if image_size.isdigit() else image_size
    views = {("train", given), ("val", given), ("train", 256), ("train", 1024)}
    assert sorted(of_views, key=str) == sorted(views, key=str)
    assert sorted(measured, key=str) == sorted(views | {("val", 256)}, key=str)


def test_one_image_alone_is_refused(tmp_path: Path) -> None:
    root, path = tmp_path / "data", tmp_path / "mine.yaml"
    write_coco(root, 1)
    with pytest.raises(ConfigError, match="one image"):
        main(["--data_root", str(root), "--suggest", str(path)])
    assert not path.exists()


def test_copies_of_one_picture_alone_are_refused_as_the_run_would(tmp_path: Path) -> None:
    root, path = tmp_path / "data", tmp_path / "mine.yaml"
    file = write_coco(root, 3)
    document = json.loads(file.read_text())
    for number, entry in enumerate(document["images"]):
        copy = f"cat_jpg.rf.{number}{'0' * 31}.jpg"
        (file.parent / entry["file_name"]).rename(file.parent / copy)
        entry["file_name"] = copy
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="--suggest: all images .* are of one group"):
        main(["--data_root", str(root), "--suggest", str(path)])
    assert not path.exists()


def test_a_name_that_yaml_or_a_line_could_break_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "a: b # c\n- d"
    write_coco(root, 4)
    config = write_suggested(root, tmp_path / "on.yaml")
    assert config.data_root == str(root)


@pytest.mark.run
def test_a_suggested_run_of_a_real_set_ends_above_its_step_0(
    data_root: Path, tmp_path: Path
) -> None:
    """Shortened: 60 of the steps."""
    path, data = tmp_path / "mine.yaml", data_root / "fruits_nuts/data"
    images = ["--annotations", str(data / "trainval.json"), "--images", str(data / "images")]
    main([*images, "--suggest", str(path)])
    shorter = ["--steps", "60", "--metrics_interval", "30", "--device", "cpu"]
    summary = train_here(["--config", str(path), *shorter])
    assert summary["best_val_per_mask_iou"] > summary["baseline_val_per_mask_iou"]
    assert summary["best_val_per_mask_iou"] > summary["box_fill_iou"]
    assert json.loads((tmp_path / "mine/status.json").read_text())["state"] == "done"
