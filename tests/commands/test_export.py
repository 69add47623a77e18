"""The command, by its own command line: what it writes, says and refuses; the README's words."""

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
from samft.exporters import onnx, verification
from samft.exporters.huggingface import FILES
from samft.exporters.verification import painted_sample, predict_boxes
from samft.models.sam import load_sam

slow = pytest.mark.skipif(not os.environ.get("SAMFT_SLOW"), reason="slow: set SAMFT_SLOW=1")
README = REPOSITORY / "README.md"


@pytest.fixture(autouse=True)
def _few_points(monkeypatch) -> None:
    monkeypatch.setattr(verification, "POINTS_PER_SIDE", 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("run"))


@pytest.fixture
def at_64(monkeypatch) -> None:
    """Meta's size is the tiny checkpoint's: 1024 px take half a minute."""
    monkeypatch.setattr("samft.exporters.exporter.META_SIZE", SIZE)


def words(checkpoint: Path, format: str, output: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--format", format, "--output", str(output), *more]


def refused(argv: list[str], capsys: Any) -> str:
    """Runs the command, which must end with 2 and one paragraph on standard error."""
    assert run_command(main, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return str(error)


# What it writes


@pytest.mark.parametrize("size", [256, pytest.param(1024, marks=slow)])
def test_a_checkpoint_of_another_size_becomes_metas_pth(
    size: int, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("samft.exporters.exporter.META_SIZE", size)
    output = tmp_path / "tuned.pth"
    report = main(words(checkpoint, "pth", output))
    said = capsys.readouterr()
    assert report["logit_difference"] == 0.0 and report["equal_pixels"] == 1.0
    assert f"vit_tiny at image_size {SIZE}, step 30, val_per_mask_iou 0.6740" in said.out
    assert "automatic masks in the built-in picture: tuned 0, base 0" in said.out
    assert f"resized from those for {SIZE}" in said.err and "validate the file anew" in said.err
    sam = load_sam(output)
    assert sam.image_encoder.img_size == size
    predictor, sample = SamPredictor(sam), painted_sample()
    predictor.set_image(sample.image)
    masks, _, low = predictor.predict(box=sample.boxes[0], multimask_output=False)
    assert masks.shape == (1, *sample.image.shape[:2]) and low.shape == (1, size // 4, size // 4)


def readme_snippets() -> dict[str, str]:
    """The Python blocks of the README's section, by format; about vit_b at 1024 px there."""
    section = README.read_text().split("## Take it away")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return {
        format: block.replace('"vit_b", 1024', f'"vit_tiny", {SIZE}').replace("1024 /", f"{SIZE} /")
        for format, block in zip(FORMATS, blocks, strict=True)
    }


def registered_tiny(checkpoint: str) -> Sam:
    """In the place of vit_b in the stock registry."""
    return load_sam(checkpoint)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_equals_the_checkpoint_and_the_readmes_words_load_it(
    format: str, checkpoint, tmp_path, monkeypatch, at_64, capsys
):
    for name in cli.EXTRAS.get(format, ()):
        pytest.importorskip(name)
    snippet = readme_snippets()[format]
    name = re.findall(r'"(tuned[^"/]*)', snippet)[0]
    picture, output = tmp_path / "mine.png", tmp_path / name
    cv2.imwrite(str(picture), np.ascontiguousarray(painted_sample().image[:200, 50:150]))
    report = main(words(checkpoint, format, output, "--image", str(picture)))
    said = capsys.readouterr()
    assert not said.err
    assert report["logit_difference"] < 1e-3
    assert report["equal_pixels"] == 1.0
    names = [found["name"] for found in report["automatic_masks"]]
    assert names == ["the built-in picture", str(picture)]
    assert "read again, beside PyTorch: largest difference of logits" in said.out
    assert sorted(os.listdir(tmp_path)) == ["mine.png", name]
    if format in FOLDERS:
        assert sorted(os.listdir(output)) == sorted(FOLDERS[format])
    monkeypatch.setitem(sam_model_registry, "vit_b", registered_tiny)
    monkeypatch.chdir(tmp_path)
    sample = painted_sample()
    known: dict[str, Any] = {"image": sample.image, "box": sample.boxes[0]}
    exec(snippet, known)
    if format == "safetensors":  # which ends with the model
        known["masks"] = predict_boxes(known["sam"], sample).logits[:1] > 0
    found = np.asarray(known["masks"][0]).squeeze()
    expected = predict_boxes(tiny_sam(), sample).logits[0] > 0
    assert found.dtype == bool and found.shape == expected.shape
    assert (found == expected).mean() > 0.99


def test_what_automatic_generation_lost_is_said_loudly(checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    loss = verification.AutomaticMaskCounts("the built-in picture", 0, 12, "it finds NOTHING")
    monkeypatch.setattr(verification, "compare_automatic_masks", lambda *_: loss)
    main(words(checkpoint, "safetensors", tmp_path / "a"))
    assert "WARNING: it finds NOTHING" in capsys.readouterr().err
    assert (tmp_path / "a").exists()


def test_a_checkpoint_without_a_sidecar_is_exported_and_base_is_asked_for(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path = write_tiny(tmp_path)
    path.with_suffix(".json").unlink()
    main(words(path, "safetensors", tmp_path / "a"))
    assert "no base to compare with, see --base" in capsys.readouterr().out


def test_a_squashed_checkpoint_is_said_to_differ(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path = write_tiny(tmp_path, resize_mode="squash")
    main(words(path, "safetensors", tmp_path / "a"))
    assert "tuned with resize_mode squash" in capsys.readouterr().err


def test_what_exists_is_replaced_only_with_force(checkpoint, tmp_path, capsys):
    pytest.importorskip("safetensors")
    output = tmp_path / "a"
    output.write_text("precious")
    assert "exists: name another place, or replace it with --force" in refused(
        words(checkpoint, "safetensors", output), capsys
    )
    assert output.read_text() == "precious"
    main(words(checkpoint, "safetensors", output, "--force"))
    assert output.stat().st_size > 1e6


def test_a_file_that_does_not_match_ends_with_1_and_is_removed(
    checkpoint, tmp_path, monkeypatch, at_64, capsys
):
    monkeypatch.setattr("samft.exporters.exporter.read_pth", lambda _: tiny_sam(seed=7))
    assert run_command(main, words(checkpoint, "pth", tmp_path / "a.pth")) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the weights that were read again") and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


# What it refuses


def test_no_such_checkpoint(checkpoint, tmp_path, capsys):
    said = refused(words(tmp_path / "none.ckpt", "pth", tmp_path / "a"), capsys)
    assert f"--checkpoint: there is no file {tmp_path / 'none.ckpt'}" in said
    said = refused(words(checkpoint.parent, "pth", tmp_path / "a"), capsys)
    assert f"is a folder: name a file in it, such as {checkpoint.name}." in said
    said = refused(words(checkpoint, "pth", tmp_path / "a", "--base", "none.pth"), capsys)
    assert "--base: there is no file none.pth" in said


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_a_damaged_checkpoint(damage: str, tmp_path, capsys):
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
    assert "is damaged" in refused(words(path, "pth", tmp_path / "a"), capsys)
    path.with_suffix(".json").unlink()
    if damage != "flip":  # which nothing but the hash can tell
        assert "not a readable" in refused(words(path, "pth", tmp_path / "a"), capsys)
    assert not (tmp_path / "a").exists()


def test_an_unknown_format_and_missing_flags(checkpoint, tmp_path, capsys):
    said = refused(words(checkpoint, "onx", tmp_path / "a"), capsys)
    assert "invalid choice: 'onx'" in said and "safetensors" in said and "--help" in said
    said = refused(words(checkpoint, "pth", tmp_path / "a", "--opset", "11"), capsys)
    assert "--opset: invalid choice: 11" in said
    assert "required: --checkpoint, --format, --output" in refused([], capsys)
    assert "unrecognized arguments: --fast" in refused(
        words(checkpoint, "pth", tmp_path / "a", "--fast"), capsys
    )


def test_a_place_that_cannot_be_written_to(checkpoint, tmp_path, capsys):
    said = refused(words(checkpoint, "pth", tmp_path / "absent" / "a.pth"), capsys)
    assert f"there is no folder {tmp_path / 'absent'} to write to" in said
    said = refused(words(checkpoint, "pth", tmp_path), capsys)
    assert "is a folder, and --format pth writes a file" in said
    said = refused(words(checkpoint, "pth", checkpoint, "--force"), capsys)
    assert "holds --checkpoint" in said


@pytest.mark.parametrize("format", FOLDERS)
def test_a_folder_of_something_else_is_never_replaced(
    format: str, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(cli.EXTRAS, format, ())
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    said = refused(words(checkpoint, format, folder, "--force"), capsys)
    assert "holds thesis.tex, which no export wrote" in said
    assert "holds --checkpoint" in refused(
        words(checkpoint, format, checkpoint.parent, "--force"), capsys
    )
    file = tmp_path / "file"
    file.touch()
    assert f"is a file, and --format {format} writes a folder" in refused(
        words(checkpoint, format, file, "--force"), capsys
    )
    assert (folder / "thesis.tex").read_text() == "years"


def test_a_missing_package_and_a_missing_picture(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cli.EXTRAS, "onnx", ("no_such_package",))
    said = refused(words(checkpoint, "onnx", tmp_path / "a"), capsys)
    assert "--format onnx needs no_such_package" in said and "pip install 'samft[onnx]'" in said
    said = refused(words(checkpoint, "pth", tmp_path / "a", "--image", "none.png"), capsys)
    assert "--image: there is no file none.png" in said
    text = tmp_path / "a.png"
    text.write_text("no picture")
    said = refused(words(checkpoint, "pth", tmp_path / "a", "--image", str(text)), capsys)
    assert "cannot be read as an image" in said


# The command line


def test_the_command_itself_refuses_and_helps_without_torch(tmp_path):
    source = (
        "import runpy, sys\n"
        "try: runpy.run_module('samft.export', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    for argv, code in ((["--help"], 0), (words(tmp_path / "none", "pth", tmp_path / "a"), 2)):
        ended = subprocess.run(
            [sys.executable, "-c", source, *argv], capture_output=True, text=True, timeout=60
        )
        assert ended.stdout.endswith(f"{code} False\n"), ended.stderr
        assert "Traceback" not in ended.stderr


def test_what_is_known_without_torch_is_what_the_modules_say():
    assert set(FORMATS) == {"pth", *cli.EXTRAS}
    assert FOLDERS["onnx"] == (onnx.ENCODER, onnx.DECODER)
    assert FOLDERS["huggingface"] == FILES
    assert export.OPSET == onnx.OPSET
