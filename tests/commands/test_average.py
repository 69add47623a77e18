"""`samft average`: what it refuses before and after reading the weights, as sentences."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.tiny_checkpoint import tiny_sam, write_tiny
from samft import average
from samft.errors import CheckpointError, ConfigError, UserError


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path]:
    folders = tmp_path / "a", tmp_path / "b"
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_tiny(folder, sam=tiny_sam(seed=seed))
    return folders[0] / "30-0.67.ckpt", folders[1] / "30-0.67.ckpt"


def average_here(first: Path, second: Path, *flags: str) -> dict[str, object]:
    where = ("--data_root", str(first.parent), "--device", "cpu", "--num_workers", "0")
    output = () if "--output" in flags else ("--output", str(first.parent.parent / "out.pth"))
    return average.main([str(first), str(second), *where, *output, *flags])


@pytest.mark.parametrize(
    ("points", "complaint"),
    [
        ("0.5,1.1", "'0.5,1.1' is no list of numbers from 0 to 1"),
        ("nan", "'nan' is no list of numbers"),
        ("half", "'half' is no list of numbers"),
        ("", "'' is no list of numbers"),
        (",".join(str(k / 500) for k in range(500)), "500 points: give 101 at most"),
    ],
)
def test_points_are_checked(ends, points: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        average_here(*ends, "--points", points)


def test_both_ends_are_always_points() -> None:
    assert average._parse_points("0.5,.25,0.5") == (0.0, 0.25, 0.5, 1.0)


def test_the_same_file_by_two_names(ends) -> None:
    link = ends[0].with_name("link.ckpt")
    link.symlink_to(ends[0])
    with pytest.raises(ConfigError, match="are the same file"):
        average_here(ends[0], link)


def test_the_same_weights_in_two_files(ends) -> None:
    copy = ends[0].with_name("copy.pth")
    copy.write_bytes(ends[0].read_bytes())
    with pytest.raises(CheckpointError, match="hold the same weights"):
        average_here(ends[0], copy)


def test_another_image_size(ends, tmp_path: Path) -> None:
    write_tiny(tmp_path, sam=tiny_sam(image_size=128))
    with pytest.raises(CheckpointError, match="vit_tiny at 64 px, and .* vit_tiny at 128 px"):
        average_here(ends[0], tmp_path / "30-0.67.ckpt")


def test_another_model(ends, monkeypatch) -> None:
    def read_positions(path: Path) -> dict[str, torch.Tensor]:
        width = 128 if path == ends[0] else 768
        return {"image_encoder.pos_embed": torch.zeros(1, 4, 4, width)}

    monkeypatch.setattr("samft.models.sam.read_state", read_positions)
    with pytest.raises(CheckpointError, match="a vit_tiny at 64 px, and .* a vit_b at 64 px"):
        average_here(*ends)


def test_an_adapter_is_no_checkpoint(ends) -> None:
    adapter = ends[1].with_suffix(".adapter.safetensors")
    save_file({"image_encoder.x.down": torch.ones(1)}, adapter, metadata={"base_sha256": "unknown"})
    with pytest.raises(CheckpointError, match="holds adapters alone.*export"):
        average_here(ends[0], adapter)


@pytest.mark.parametrize(
    ("sidecar", "complaint"),
    [
        (
            {"view": {"kind": "tiles", "tile_size": 64}},
            r"sees images in another way than .*\(kind image; kind tiles, tile_size 64, .*\)",
        ),
        ({"resize_mode": "squash"}, r"resizes images in another way than .*\(pad; squash\)"),
        (
            {"pixels": {"pixel_range": "full", "ranges": {}, "channels": None, "page": None}},
            r"reads images in another way than .*\(pixel_range auto; pixel_range full\)",
        ),
    ],
)
def test_models_that_see_different_images(ends, sidecar, complaint: str) -> None:
    plain = {"pixel_range": "auto", "ranges": {}, "channels": None, "page": None}
    same = {"pixels": plain, "view": {"kind": "image"}}
    write_tiny(ends[0].parent, sam=tiny_sam(seed=0), **same)
    write_tiny(ends[1].parent, sam=tiny_sam(seed=1), **{**same, **sidecar})
    with pytest.raises(CheckpointError, match=complaint):
        average_here(*ends)


@pytest.mark.parametrize("tiled", [0, 1])
def test_a_checkpoint_that_does_not_say_sees_images_as_the_other(ends, tiled: int) -> None:
    view = {"kind": "tiles", "tile_size": 64}
    pixels = {"pixel_range": "full", "ranges": {}, "channels": None, "page": None}
    saying = ends[tiled]
    write_tiny(saying.parent, sam=tiny_sam(seed=tiled), view=view, pixels=pixels)
    options = average._parse_options([*map(str, ends), "--data_root", ".", "--output", "a.pth"])
    seen, read = average._read_formats(options, {"image_size": 64})
    assert (seen.kind, seen.tile_size) == ("tiles", 64)
    assert read.in_windows and read.pixel_range == "full"


@pytest.mark.parametrize(
    ("kind", "name"), [("tiles", "context"), ("objects", "tile_overlap"), ("image", "tile_size")]
)
def test_views_that_differ_where_it_has_no_effect_are_alike(ends, kind: str, name: str) -> None:
    values = {"context": (2.0, 3.5), "tile_overlap": (0.0, 0.5), "tile_size": (64, 128)}
    for end, seed, value in zip(ends, (0, 1), values[name], strict=True):
        view = {"kind": kind, "tile_size": 64, name: value}
        write_tiny(end.parent, sam=tiny_sam(seed=seed), view=view)
    options = average._parse_options([*map(str, ends), "--data_root", ".", "--output", "a.pth"])
    seen, _ = average._read_formats(options, {"image_size": 64})
    assert seen.kind == kind
    if kind != "image":  # as that of the tuned one, for automatic masks of its tiles, say
        assert getattr(seen, name) == values[name][1]


def over_a_sidecar(ends: tuple[Path, Path]) -> Path:
    return ends[1].with_suffix(".pth")


def without_a_suffix(ends: tuple[Path, Path]) -> Path:
    return ends[1].with_name("averaged")


def over_a_file(ends: tuple[Path, Path]) -> Path:
    path = ends[1].with_name("earlier.pth")
    path.write_text("mine")
    return path


def over_a_foreign_json(ends: tuple[Path, Path]) -> Path:
    path = ends[1].with_name("notes.json")
    path.write_text("mine")
    return path.with_suffix(".pth")


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        (over_a_sidecar, "is one of the checkpoints or its sidecar"),
        (without_a_suffix, "does not end in .pth"),
        (over_a_file, "earlier.pth exists: choose another name, or replace it with --force"),
        (over_a_foreign_json, "notes.json exists"),
    ],
)
def test_no_other_file_is_replaced(
    ends, place: Callable[[tuple[Path, Path]], Path], complaint: str
) -> None:
    output = place(ends)
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    with pytest.raises(UserError, match=complaint):
        average_here(*ends, "--output", str(output))
    assert before == {path: path.read_bytes() for path in output.parent.iterdir()}
