"""Exports a checkpoint to the format of another program, and verifies the result.

    samft export --checkpoint best.ckpt --format onnx --output tuned

Formats:

    pth           a file like Meta's, always at 1024 px
    safetensors   a file with the same keys, at the checkpoint's image_size
    onnx          a folder with encoder.onnx and decoder.onnx
    xanylabeling  a folder with two ONNX files and the YAML that X-AnyLabeling
                  and AnyLabeling load, always at 1024 px
    huggingface   a folder for SamModel of transformers

What was written is loaded again, and is kept only if its masks for boxes equal the checkpoint's.
Automatic masks are compared as well, because training on boxes alone can lose them.
"""

import argparse
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samft.cli import EXTRAS, CommandParser, require_extra, run_command, user_path
from samft.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    escape_paragraph,
    fold_for_terminal,
)
from samft.images.pixels import PLAIN, PixelFormat
from samft.runtime.checkpoint_paths import find_weights_file
from samft.runtime.files import write_json

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

    from samft.exporters.exporter import TunedCheckpoint
    from samft.exporters.verification import Difference, Prediction, VerificationSample

FORMATS = ("pth", "safetensors", "onnx", "xanylabeling", "huggingface")
FOLDERS = {  # names of the files, with wildcards
    "xanylabeling": ("*.encoder.onnx", "*.decoder.onnx", "*.yaml"),
    "onnx": ("encoder.onnx", "decoder.onnx"),
    "huggingface": ("config.json", "model.safetensors", "preprocessor_config.json"),
}
OPSETS, OPSET = range(12, 21), 17  # from the first with einsum to the last that torch.onnx traces


def main(argv: list[str]) -> dict[str, Any]:
    """Parses the command line, exports, verifies, and prints the differences.

    Args:
        argv: The arguments after the program's name; `--help` lists them.

    Returns:
        The printed numbers: differences of the predictions, and counts of automatic masks.

    Raises:
        ConfigError: A flag is wrong, or a package is missing.
        CheckpointError: A checkpoint cannot be read.
        DataError: The image cannot be read.
        ExportError: What was written does not predict the masks of the checkpoint.
    """
    options = _parse_options(argv)
    _check_inputs(options)
    _check_output(options)
    # Imported here because torch takes seconds, and --help and wrong flags must answer at once.
    from samft.exporters.exporter import (
        export_model,
        load_base,
        model_to_write,
        open_tuned_checkpoint,
    )
    from samft.exporters.verification import predict_boxes

    tuned = open_tuned_checkpoint(options.checkpoint, adapter=options.adapter)
    _print_checkpoint(tuned)
    sidecar = _sidecar_to_write(tuned, options)
    samples = _verification_samples(options, tuned.pixels)
    sam = model_to_write(tuned, options.format)
    base_path = options.base or tuned.find_base()
    base = load_base(base_path, sam) if base_path else None
    expected = [(sample, predict_boxes(sam, sample)) for sample in samples]
    if sam is not tuned.sam:
        _warn_of_new_size(tuned, expected)
    start = time.perf_counter()
    try:
        difference = export_model(
            sam,
            options.output,
            format=options.format,
            metadata=tuned.metadata(image_size=sam.image_encoder.img_size),
            expected=expected,
            opset=options.opset,
        )
        if sidecar is not None:
            seen = {"pixels": tuned.pixels.to_json(), "view": tuned.view.to_json()}
            write_json(sidecar, seen)
            _print_line(f"wrote {sidecar}: how images are read and seen; keep it beside the file")
    except OSError as error:
        raise ConfigError(f"--output: {options.output} cannot be written ({error}).") from error
    report = _print_output(options.output, difference, seconds=time.perf_counter() - start)
    counts = _count_automatic_masks(sam, base, samples)
    _print_history(tuned.record)
    return report | {"automatic_masks": counts}


def _parse_options(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("export", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=user_path,
        required=True,
        metavar="FILE",
        help="SAM weights, .ckpt or .pth",
    )
    add(
        "--adapter",
        type=user_path,
        metavar="FILE",
        help="merge this .adapter.safetensors of a run into --checkpoint, its base, first",
    )
    add("--format", choices=FORMATS, required=True, help="format to write")
    add(
        "--output",
        type=user_path,
        required=True,
        metavar="PATH",
        help="file or folder to write",
    )
    add("--force", action="store_true", help="replace an earlier export at --output")
    add(
        "--image",
        type=user_path,
        metavar="FILE",
        help="an image to compare masks on, in addition to the built-in one",
    )
    add(
        "--base",
        type=user_path,
        metavar="FILE",
        help="the checkpoint that training started from, to compare automatic "
        "masks with; default: the one that the sidecar names",
    )
    opsets = f"ONNX operator set version, {OPSETS[0]} to {OPSETS[-1]}; default {OPSET}"
    add("--opset", type=int, default=OPSET, choices=OPSETS, metavar="N", help=opsets)
    add("--debug", action="store_true", help="show tracebacks of user errors too")
    return parser.parse_args(argv)


def _check_inputs(options: argparse.Namespace) -> None:
    for flag in ("checkpoint", "base"):
        path = getattr(options, flag)
        if path:
            find_weights_file(path, field=f"--{flag}")
    if options.image and not options.image.is_file():
        raise DataError(f"--image: there is no file {options.image}.")
    if options.adapter and not options.adapter.is_file():
        raise CheckpointError(f"--adapter: there is no file {options.adapter}.")
    extra = "onnx" if options.format == "xanylabeling" else options.format
    if extra in EXTRAS:
        require_extra(extra, what=f"--format {options.format}")


def _check_output(options: argparse.Namespace) -> None:
    output, parent = options.output, options.output.resolve().parent
    if not parent.is_dir():
        raise ConfigError(f"--output: there is no folder {parent} to write to: make it first.")
    for flag in ("checkpoint", "adapter", "base", "image"):
        source = getattr(options, flag)
        if source and output.resolve() in (source.resolve(), *source.resolve().parents):
            raise ConfigError(f"--output: {output} holds --{flag}: choose another path.")
    if not output.exists() and not output.is_symlink():
        return
    files = FOLDERS.get(options.format)
    if output.is_dir() != (files is not None):
        is_what, wanted = ("a folder", "file") if output.is_dir() else ("a file", "folder")
        raise ConfigError(
            f"--output: {output} is {is_what}, and --format {options.format} writes a {wanted}: "
            "choose another path."
        )
    if files is not None:
        names = sorted(path.name for path in output.iterdir())
        foreign = [name for name in names if not any(fnmatch(name, file) for file in files)]
        if foreign:
            raise ConfigError(
                f"--output: the folder {output} holds {foreign[0]}, which no export wrote: name a "
                "new folder."
            )
    if not options.force:
        raise ConfigError(
            f"--output: {output} exists: choose another path, or replace it with --force."
        )


def _sidecar_to_write(tuned: "TunedCheckpoint", options: argparse.Namespace) -> Path | None:
    # A .pth holds weights and nothing else; how its images are read then lies beside it.
    sidecar: Path = options.output.with_suffix(".json")
    if options.format != "pth" or (tuned.pixels == PLAIN and not tuned.view.has_windows):
        return None
    if sidecar.exists() and not options.force:
        raise ConfigError(
            f"--output: {sidecar}, which would say how images are read and seen, exists: choose "
            "another path, or replace it with --force."
        )
    return sidecar


def _verification_samples(
    options: argparse.Namespace, pixels: PixelFormat
) -> "list[VerificationSample]":
    from samft.exporters.verification import image_sample, synthetic_sample
    from samft.images.decoder import read_image

    samples = [synthetic_sample()]
    if options.image:
        samples.append(image_sample(str(options.image), read_image(options.image, pixels=pixels)))
    return samples


def _print_checkpoint(tuned: "TunedCheckpoint") -> None:
    sidecar = tuned.sidecar
    facts = [f"{tuned.path}: {tuned.model_type} at image_size {tuned.image_size}"]
    if "step" in sidecar:
        facts.append(f"step {sidecar['step']}")
    metrics = sidecar.get("metrics")
    score = metrics.get("val_per_mask_iou") if isinstance(metrics, dict) else None
    if isinstance(score, float):
        facts.append(f"val_per_mask_iou {score:.4f}")
    _print_line(", ".join(facts))
    if sidecar.get("resize_mode") == "squash":
        _print_warning(
            "the checkpoint was trained with resize_mode squash, but every program that reads SAM "
            "pads: its masks will differ from the validated ones."
        )
    if tuned.view.has_windows:
        _print_warning(
            f"the checkpoint was trained on {tuned.view.describe()}, but other programs show it "
            "whole images, and small objects of large ones are lost: give them windows of that "
            "size. samft predict, evaluate and load_predictor take the windows by themselves."
        )
    _warn_of_rectangle(tuned)


def _warn_of_rectangle(tuned: "TunedCheckpoint") -> None:
    from samft.weights.saved_settings import saved_rectangle

    if rectangle := saved_rectangle(tuned.record):
        _print_warning(
            f"the checkpoint was trained at image_size {rectangle}, but every program that reads "
            f"SAM pads to a square, here {tuned.image_size} px: its masks will differ from the "
            "validated ones. Evaluate the written file (samft evaluate), which scores it padded."
        )


def _warn_of_new_size(
    tuned: "TunedCheckpoint", expected: "list[tuple[VerificationSample, Prediction]]"
) -> None:
    from samft.exporters.verification import compare_predictions, predict_boxes

    before = [predict_boxes(tuned.sam, sample) for sample, _ in expected]
    after = [prediction for _, prediction in expected]
    percent = 100 * compare_predictions(before, after).equal_pixels
    size = tuned.image_size
    _print_warning(
        "This format is for 1024 px, so position embeddings were resized from those for "
        f"{size} px. On the images compared here, {percent:.2f} % of the mask pixels are equal. "
        f"Scores at {size} px do not hold at 1024 px: evaluate the file (samft evaluate), or use "
        "the checkpoint itself (samft.load_sam)."
    )


def _print_output(path: Path, difference: "Difference", *, seconds: float) -> dict[str, Any]:
    files = path.rglob("*") if path.is_dir() else [path]
    num_bytes = sum(file.stat().st_size for file in files)
    _print_line(f"loaded again and compared with the checkpoint: {difference}")
    _print_line(f"wrote {path} ({num_bytes / 1e6:,.1f} MB, {seconds:.1f} s including verification)")
    return {
        "output": str(path),
        "num_bytes": num_bytes,
        "seconds": seconds,
        "logit_difference": difference.logits,
        "iou_predicted_difference": difference.iou_predicted,
        "equal_pixels": difference.equal_pixels,
    }


def _count_automatic_masks(
    sam: "Sam", base: "Sam | None", samples: "list[VerificationSample]"
) -> list[dict[str, Any]]:
    from samft.exporters.automatic_masks import compare_automatic_masks

    report = []
    for sample in samples:
        counts = compare_automatic_masks(sam, base, sample)
        other = "no base to compare with, see --base" if base is None else f"base {counts.base}"
        line = f"automatic masks in {sample.name}: tuned {counts.tuned}, {other}"
        if counts.objects:
            before = "" if base is None else f", base {counts.base_found}"
            line += f"; of its {counts.objects} objects found: tuned {counts.tuned_found}{before}"
        _print_line(line)
        if counts.warning:
            _print_warning(counts.warning)
        report.append(vars(counts))
    return report


def _print_history(checkpoint: Path) -> None:
    from samft.exporters.automatic_masks import evaluation_warnings
    from samft.weights.saved_settings import describe_point_prompts

    for line in describe_point_prompts(checkpoint, automatic=False):
        _print_line(line)
    for warning in evaluation_warnings(checkpoint):
        _print_warning(warning)


def _print_line(line: str) -> None:
    print(fold_for_terminal(escape_paragraph(line), sys.stdout), flush=True)


def _print_warning(text: str) -> None:
    text = fold_for_terminal(f"WARNING: {escape_paragraph(text)}", sys.stderr)
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
