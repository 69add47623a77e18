"""`python -m samft.export`: its outputs, messages and errors; the documented snippets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import Sam

from helpers import REPOSITORY
from helpers.tiny_checkpoint import SIZE, tiny_sam, write_tiny
from samft import cli, export
from samft.cli import run_command
from samft.export import FOLDERS, FORMATS, main
from samft.exporters import automatic_masks, huggingface, onnx
from samft.exporters.verification import bitwise_equal, predict_boxes, synthetic_sample
from samft.models.sam import load_sam
from samft.views.windows import View
from samft.weights.saved_settings import saved_view

slow = pytest.mark.skipif(not os.environ.get("SAMFT_SLOW"), reason="slow: set SAMFT_SLOW=1")
# One of them is for a program with a window: tests/exporters/test_xanylabeling.py
DOCUMENTED = tuple(name for name in FORMATS if name != "xanylabeling")
PAGE = REPOSITORY / "docs" / "export.md"


@pytest.fixture(autouse=True)
def _few_points(monkeypatch) -> None:
    monkeypatch.setattr(automatic_masks, "POINTS_PER_SIDE", 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("run"))


@pytest.fixture
def at_64(monkeypatch) -> None:
    """Meta's size is the tiny checkpoint's: exporting at 1024 px takes half a minute."""
    monkeypatch.setattr("samft.exporters.exporter.META_SIZE", SIZE)


def flags(checkpoint: Path, format: str, output: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--format", format, "--output", str(output), *more]


def refused(argv: list[str], capsys: Any) -> str:
    """Runs the command, which must end with 2 and one paragraph on standard error."""
    assert run_command(main, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return str(error)


# What it writes


def test_a_folder_of_transformers_is_exported(tmp_path, checkpoint, capsys) -> None:
    sam = load_sam(checkpoint)
    huggingface.write_huggingface(sam, tmp_path / "tuned", {})
    main(flags(tmp_path / "tuned", "safetensors", tmp_path / "a.safetensors"))
    assert bitwise_equal(load_sam(tmp_path / "a.safetensors").state_dict(), sam.state_dict())
    message = refused(flags(tmp_path, "safetensors", tmp_path / "b"), capsys)
    assert f"--checkpoint: {tmp_path} is a folder: name a file in it" in message


@pytest.mark.parametrize("size", [256, pytest.param(1024, marks=slow)])
def test_a_checkpoint_of_another_size_is_resized_for_pth(
    size: int, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("samft.exporters.exporter.META_SIZE", size)
    output = tmp_path / "tuned.pth"
    report = main(flags(checkpoint, "pth", output))
    printed = capsys.readouterr()
    assert report["logit_difference"] == 0.0 and report["equal_pixels"] == 1.0
    assert f"vit_tiny at image_size {SIZE}, step 30, val_per_mask_iou 0.6740" in printed.out
    counts = r"automatic masks in the built-in picture: tuned \d+, base \d+; of its \d+ objects"
    assert re.search(counts, printed.out)
    assert f"resized from those for {SIZE} px" in printed.err and "evaluate the file" in printed.err
    sam = load_sam(output)
    assert sam.image_encoder.img_size == size
    predictor, sample = SamPredictor(sam), synthetic_sample()
    predictor.set_image(sample.image)
    masks, _, low = predictor.predict(box=sample.boxes[0], multimask_output=False)
    assert masks.shape == (1, *sample.image.shape[:2]) and low.shape == (1, size // 4, size // 4)


def test_windows_go_with_a_pth_and_are_warned_of(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("samft.exporters.exporter.META_SIZE", SIZE)
    view = View("tiles", tile_size=48, tile_overlap=0.5)
    output = tmp_path / "tuned.pth"
    main(flags(write_tiny(tmp_path, view=view.to_json()), "pth", output))
    assert saved_view(output) == view
    assert "trained on tiles of 48 px" in capsys.readouterr().err
    whole = tmp_path / "whole"
    whole.mkdir()
    main(flags(write_tiny(whole, view={"kind": "image"}), "pth", whole / "tuned.pth"))
    assert not (whole / "tuned.json").exists() and "trained on" not in capsys.readouterr().err


def documented_snippets() -> dict[str, str]:
    """The Python blocks of docs/export.md, by format; about vit_b at 1024 px there."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return {
        format: block.replace('"vit_b", 1024', f'"vit_tiny", {SIZE}').replace("1024 /", f"{SIZE} /")
        for format, block in zip(DOCUMENTED, blocks, strict=True)
    }


def registered_tiny(checkpoint: str) -> Sam:
    """Registered as vit_b, whose weights the README loads."""
    return load_sam(checkpoint)


@pytest.mark.parametrize("format", DOCUMENTED)
def test_each_format_equals_the_checkpoint_and_the_documented_snippet_loads_it(
    format: str, checkpoint, tmp_path, monkeypatch, at_64, capsys
):
    for name in cli.EXTRAS.get(format, ()):
        pytest.importorskip(name)
    snippet = documented_snippets()[format]
    name = re.findall(r'"(tuned[^"/]*)', snippet)[0]
    picture, output = tmp_path / "mine.png", tmp_path / name
    cv2.imwrite(str(picture), np.ascontiguousarray(synthetic_sample().image[:200, 50:150]))
    report = main(flags(checkpoint, format, output, "--image", str(picture)))
    printed = capsys.readouterr()
    assert not printed.err
    assert report["logit_difference"] < 1e-3
    assert report["equal_pixels"] == 1.0
    names = [counts["name"] for counts in report["automatic_masks"]]
    assert names == ["the built-in picture", str(picture)]
    assert (
        "loaded again and compared with the checkpoint: largest difference of logits" in printed.out
    )
    assert sorted(os.listdir(tmp_path)) == ["mine.png", name]
    if format in FOLDERS:
        assert sorted(os.listdir(output)) == sorted(FOLDERS[format])
    monkeypatch.setitem(sam_model_registry, "vit_b", registered_tiny)
    monkeypatch.chdir(tmp_path)
    sample = synthetic_sample()
    namespace: dict[str, Any] = {"image": sample.image, "box": sample.boxes[0]}
    exec(snippet, namespace)
    if format == "safetensors":  # which ends with the model
        namespace["masks"] = predict_boxes(namespace["sam"], sample).mask_logits[:1] > 0
    mask = np.asarray(namespace["masks"][0]).squeeze()
    expected = predict_boxes(tiny_sam(), sample).mask_logits[0] > 0
    assert mask.dtype == bool and mask.shape == expected.shape
    assert (mask == expected).mean() > 0.99


def test_lost_automatic_masks_are_warned_about(checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    counts = {"name": "the built-in picture", "tuned": 0, "base": 12}
    counts |= {"objects": 6, "tuned_found": 0, "base_found": 5}
    loss = automatic_masks.AutomaticMaskCounts(**counts, warning="it finds NO masks")
    monkeypatch.setattr(automatic_masks, "compare_automatic_masks", lambda *_: loss)
    main(flags(checkpoint, "safetensors", tmp_path / "a"))
    printed = capsys.readouterr()
    assert "WARNING: it finds NO masks" in printed.err
    assert "tuned 0, base 12; of its 6 objects found: tuned 0, base 5" in printed.out
    assert (tmp_path / "a").exists()


def test_what_was_trained_and_evaluated_is_said(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path = write_tiny(tmp_path)
    scores = {name: {"found_50": share, "images": 3} for name, share in (("a", 0.5), ("b", 0.25))}
    entry = {"checkpoint": path.name, "automatic": scores["b"]}
    report = {"per_mask_iou": 0.5, "checkpoint": "base.pth", "automatic": scores["a"]}
    report |= {"others": [entry], "samft_version": "1"}
    (tmp_path / "scores.json").write_text(json.dumps(report))
    main(flags(path, "safetensors", tmp_path / "a"))
    printed = capsys.readouterr()
    assert "30-0.67.ckpt was tuned on boxes only" in printed.out
    assert "WARNING: automatic masks find fewer objects than before tuning: 25.0%" in printed.err
    config = {"checkpoint_path": "auto", "model_type": "vit_tiny", "prompts": "mixed"}
    path = write_tiny(tmp_path, config=config)
    main(flags(path, "safetensors", tmp_path / "b"))
    assert "boxes only" not in capsys.readouterr().out


def test_a_checkpoint_without_a_sidecar_is_exported_without_a_base(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path = write_tiny(tmp_path)
    path.with_suffix(".json").unlink()
    main(flags(path, "safetensors", tmp_path / "a"))
    assert "no base to compare with, see --base" in capsys.readouterr().out


def test_a_squashed_checkpoint_is_warned_about(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path = write_tiny(tmp_path, resize_mode="squash")
    main(flags(path, "safetensors", tmp_path / "a"))
    assert "trained with resize_mode squash" in capsys.readouterr().err


def test_an_existing_output_is_replaced_only_with_force(checkpoint, tmp_path, capsys):
    pytest.importorskip("safetensors")
    output = tmp_path / "a"
    output.write_text("precious")
    assert "exists: choose another path, or replace it with --force" in refused(
        flags(checkpoint, "safetensors", output), capsys
    )
    assert output.read_text() == "precious"
    main(flags(checkpoint, "safetensors", output, "--force"))
    assert output.stat().st_size > 1e6


def test_a_file_that_does_not_match_ends_with_1_and_is_removed(
    checkpoint, tmp_path, monkeypatch, at_64, capsys
):
    monkeypatch.setattr("samft.exporters.exporter.read_pth", lambda _: tiny_sam(seed=7))
    assert run_command(main, flags(checkpoint, "pth", tmp_path / "a.pth")) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the weights read back differ") and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


# What it refuses


def test_a_missing_checkpoint_is_refused(checkpoint, tmp_path, capsys):
    message = refused(flags(tmp_path / "none.ckpt", "pth", tmp_path / "a"), capsys)
    assert f"--checkpoint: there is no file {tmp_path / 'none.ckpt'}" in message
    message = refused(flags(checkpoint.parent, "pth", tmp_path / "a"), capsys)
    assert f"is a folder: name a file in it, such as {checkpoint.name}." in message
    message = refused(flags(checkpoint, "pth", tmp_path / "a", "--base", "none.pth"), capsys)
    assert "--base: there is no file none.pth" in message


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_a_damaged_checkpoint_is_refused(damage: str, tmp_path, capsys):
    path = write_tiny(tmp_path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "text": b"<html>404</html>",
        }[damage]
    )
    assert "is damaged" in refused(flags(path, "pth", tmp_path / "a"), capsys)
    path.with_suffix(".json").unlink()
    if damage != "flip":  # which nothing but the hash can tell
        assert "not a readable" in refused(flags(path, "pth", tmp_path / "a"), capsys)
    assert not (tmp_path / "a").exists()


def test_an_unknown_format_and_missing_flags_are_refused(checkpoint, tmp_path, capsys):
    message = refused(flags(checkpoint, "onx", tmp_path / "a"), capsys)
    assert "invalid choice: 'onx'" in message and "safetensors" in message and "--help" in message
    message = refused(flags(checkpoint, "pth", tmp_path / "a", "--opset", "11"), capsys)
    assert "--opset: invalid choice: 11" in message
    assert "required: --checkpoint, --format, --output" in refused([], capsys)
    assert "--fast: no such flag." in refused(
        flags(checkpoint, "pth", tmp_path / "a", "--fast"), capsys
    )


def test_an_output_that_cannot_be_written_is_refused(checkpoint, tmp_path, capsys):
    message = refused(flags(checkpoint, "pth", tmp_path / "absent" / "a.pth"), capsys)
    assert f"there is no folder {tmp_path / 'absent'} to write to" in message
    message = refused(flags(checkpoint, "pth", tmp_path), capsys)
    assert "is a folder, and --format pth writes a file" in message
    message = refused(flags(checkpoint, "pth", checkpoint, "--force"), capsys)
    assert "holds --checkpoint" in message


@pytest.mark.parametrize("format", FOLDERS)
def test_a_folder_of_something_else_is_never_replaced(
    format: str, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(cli.EXTRAS, format, ())
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    message = refused(flags(checkpoint, format, folder, "--force"), capsys)
    assert "holds thesis.tex, which no export wrote" in message
    assert "holds --checkpoint" in refused(
        flags(checkpoint, format, checkpoint.parent, "--force"), capsys
    )
    file = tmp_path / "file"
    file.touch()
    assert f"is a file, and --format {format} writes a folder" in refused(
        flags(checkpoint, format, file, "--force"), capsys
    )
    assert (folder / "thesis.tex").read_text() == "years"


def test_a_missing_package_and_a_missing_image_are_refused(
    checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(cli.EXTRAS, "onnx", ("no_such_package",))
    message = refused(flags(checkpoint, "onnx", tmp_path / "a"), capsys)
    assert "--format onnx needs no_such_package" in message and "pip install no_such" in message
    message = refused(flags(checkpoint, "pth", tmp_path / "a", "--image", "none.png"), capsys)
    assert "--image: there is no file none.png" in message
    text = tmp_path / "a.png"
    text.write_text("no picture")
    message = refused(flags(checkpoint, "pth", tmp_path / "a", "--image", str(text)), capsys)
    assert "a.png is no image" in message


# The command line


def test_help_and_errors_do_not_import_torch(tmp_path):
    source = (
        "import runpy, sys\n"
        "try: runpy.run_module('samft.export', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    for argv, code in ((["--help"], 0), (flags(tmp_path / "none", "pth", tmp_path / "a"), 2)):
        ended = subprocess.run(
            [sys.executable, "-c", source, *argv], capture_output=True, text=True, timeout=60
        )
        assert ended.stdout.endswith(f"{code} False\n"), ended.stderr
        assert "Traceback" not in ended.stderr


def test_constants_repeated_without_torch_equal_the_modules():
    assert set(FORMATS) - cli.EXTRAS.keys() == {"pth", "safetensors", "xanylabeling"}
    assert FOLDERS["onnx"] == (onnx.ENCODER, onnx.DECODER)
    assert FOLDERS["huggingface"] == (
        huggingface.CONFIG,
        huggingface.WEIGHTS,
        huggingface.PROCESSOR,
    )
    assert export.OPSET == onnx.OPSET
