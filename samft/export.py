"""Writes a checkpoint for other programs, reads it again, and compares what both answer.

    python -m samft.export --checkpoint runs/mine/1500-0.87.ckpt --format onnx --output tuned-onnx

Formats: `pth`, a file as Meta publishes them, at 1024 px; `safetensors`, a file with the same keys;
`onnx`, a folder with encoder.onnx and decoder.onnx; `huggingface`, a folder for transformers'
SamModel. A file that does not answer as the checkpoint does is not kept. Automatic mask generation
is tried as well, since tuning on boxes can spoil it.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samft.cli import EXTRAS, CommandParser, require_extra, run_command, user_path
from samft.errors import CheckpointError, ConfigError, DataError, escape_paragraph

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

    from samft.exporters.exporter import Tuned
    from samft.exporters.verification import Difference, Prediction, VerificationSample

FORMATS = ("pth", "safetensors", "onnx", "huggingface")
FOLDERS = {
    "onnx": ("encoder.onnx", "decoder.onnx"),
    "huggingface": ("config.json", "model.safetensors", "preprocessor_config.json"),
}
OPSETS, OPSET = range(12, 21), 17  # what einsum needs at least, what the exporter knows for sure


def main(argv: list[str]) -> dict[str, Any]:
    """Parses the command line, writes, compares, and reports.

    Args:
        argv: The arguments after the program's name; `--help` lists them.

    Returns:
        The numbers that were printed: differences, and how many automatic masks were found.

    Raises:
        ConfigError: A flag is wrong, or a package is missing.
        CheckpointError: A checkpoint cannot be read.
        DataError: The picture cannot be read.
        ExportError: What was written does not answer as the checkpoint does.
    """
    options = _parse(argv)
    _check_inputs(options)
    _check_output(options)
    # Only now: torch takes seconds to import, and --help and wrong flags must answer at once.
    from samft.exporters.exporter import export, model_to_write, open_base, open_tuned
    from samft.exporters.verification import predict_boxes

    tuned = open_tuned(options.checkpoint)
    _tell(tuned)
    samples = _samples(options)
    sam = model_to_write(tuned, options.format)
    base_path = options.base or tuned.find_base()
    base = open_base(base_path, sam) if base_path else None
    expected = [(sample, predict_boxes(sam, sample)) for sample in samples]
    if sam is not tuned.sam:
        _tell_of_new_size(tuned, expected)
    start = time.perf_counter()
    try:
        difference = export(
            sam,
            options.output,
            format=options.format,
            metadata=tuned.metadata(image_size=sam.image_encoder.img_size),
            expected=expected,
            opset=options.opset,
        )
    except OSError as error:
        raise ConfigError(f"--output: {options.output} cannot be written ({error}).") from error
    report = _tell_of_file(options.output, difference, seconds=time.perf_counter() - start)
    return report | {"automatic_masks": _try_automatic_masks(sam, base, samples)}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("python -m samft.export", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint", type=user_path, required=True, metavar="FILE", help="a .ckpt or .pth of SAM"
    )
    add("--format", choices=FORMATS, required=True, help="what to write")
    add(
        "--output",
        type=user_path,
        required=True,
        metavar="PATH",
        help="the file or folder to write",
    )
    add("--force", action="store_true", help="replace what an earlier export left there")
    add(
        "--image",
        type=user_path,
        metavar="FILE",
        help="a picture of yours to compare answers for too",
    )
    add(
        "--base",
        type=user_path,
        metavar="FILE",
        help="the checkpoint before tuning, for automatic masks; default: what the sidecar names",
    )
    opsets = f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[-1]}; default {OPSET}"
    add("--opset", type=int, default=OPSET, choices=OPSETS, metavar="N", help=opsets)
    add("--debug", action="store_true", help="show tracebacks of user errors too")
    return parser.parse_args(argv)


def _check_inputs(options: argparse.Namespace) -> None:
    if options.checkpoint.is_dir():
        found = sorted(path.name for path in options.checkpoint.glob("*.ckpt"))
        hint = f", such as {found[0]}" if found else ""
        raise CheckpointError(
            f"--checkpoint: {options.checkpoint} is a folder: name a file in it{hint}."
        )
    for flag in ("checkpoint", "base"):
        path = getattr(options, flag)
        if path and not path.is_file():
            raise CheckpointError(
                f"--{flag}: there is no file {path}. Give a .ckpt of samft, or a .pth of SAM."
            )
    if options.image and not options.image.is_file():
        raise DataError(f"--image: there is no file {options.image}.")
    if options.format in EXTRAS:
        require_extra(options.format, what=f"--format {options.format}")


def _check_output(options: argparse.Namespace) -> None:
    output, parent = options.output, options.output.resolve().parent
    if not parent.is_dir():
        raise ConfigError(f"--output: there is no folder {parent} to write to: make it first.")
    for flag in ("checkpoint", "base", "image"):
        source = getattr(options, flag)
        if source and output.resolve() in (source.resolve(), *source.resolve().parents):
            raise ConfigError(f"--output: {output} holds --{flag}: name another place.")
    if not output.exists() and not output.is_symlink():
        return
    files = FOLDERS.get(options.format)
    if output.is_dir() != (files is not None):
        is_what, wanted = ("a folder", "file") if output.is_dir() else ("a file", "folder")
        raise ConfigError(
            f"--output: {output} is {is_what}, and --format {options.format} writes a {wanted}: "
            "name another place."
        )
    if files is not None:
        foreign = sorted({path.name for path in output.iterdir()} - set(files))
        if foreign:
            raise ConfigError(
                f"--output: the folder {output} holds {foreign[0]}, which no export wrote: name a "
                "folder that is not there yet."
            )
    if not options.force:
        raise ConfigError(
            f"--output: {output} exists: name another place, or replace it with --force."
        )


def _samples(options: argparse.Namespace) -> "list[VerificationSample]":
    from samft.coco.images import read_image
    from samft.exporters.verification import painted_sample, sample_of

    samples = [painted_sample()]
    if options.image:
        samples.append(sample_of(str(options.image), read_image(options.image)))
    return samples


def _tell(tuned: "Tuned") -> None:
    sidecar = tuned.sidecar
    words = [f"{tuned.path}: {tuned.model_type} at image_size {tuned.image_size}"]
    if "step" in sidecar:
        words.append(f"step {sidecar['step']}")
    metrics = sidecar.get("metrics")
    score = metrics.get("val_per_mask_iou") if isinstance(metrics, dict) else None
    if isinstance(score, float):
        words.append(f"val_per_mask_iou {score:.4f}")
    _say(", ".join(words))
    if sidecar.get("resize_mode") == "squash":
        _warn(
            "it was tuned with resize_mode squash, and every program that reads SAM pads: its "
            "masks will differ from the validated ones."
        )


def _tell_of_new_size(
    tuned: "Tuned", expected: "list[tuple[VerificationSample, Prediction]]"
) -> None:
    from samft.exporters.verification import compare, predict_boxes

    before = [predict_boxes(tuned.sam, sample) for sample, _ in expected]
    share = 100 * compare(before, [answer for _, answer in expected]).equal_pixels
    size = tuned.image_size
    _warn(
        "Meta's format is for 1024 px, so position embeddings are resized from those for "
        f"{size}. On the pictures here, {share:.2f} % of the mask pixels stay as they were. Scores "
        f"at {size} say nothing of 1024: validate the file anew (python -m samft.evaluate), or use "
        "the checkpoint itself (samft.load_sam)."
    )


def _tell_of_file(path: Path, difference: "Difference", *, seconds: float) -> dict[str, Any]:
    files = path.rglob("*") if path.is_dir() else [path]
    num_bytes = sum(file.stat().st_size for file in files)
    _say(f"read again, beside PyTorch: {difference}")
    _say(f"wrote {path} ({num_bytes / 1e6:,.1f} MB, {seconds:.1f} s with the comparison)")
    return {
        "output": str(path),
        "num_bytes": num_bytes,
        "seconds": seconds,
        "logit_difference": difference.logits,
        "iou_predicted_difference": difference.iou_predicted,
        "equal_pixels": difference.equal_pixels,
    }


def _try_automatic_masks(
    sam: "Sam", base: "Sam | None", samples: "list[VerificationSample]"
) -> list[dict[str, Any]]:
    from samft.exporters.verification import compare_automatic_masks

    report = []
    for sample in samples:
        found = compare_automatic_masks(sam, base, sample)
        other = "no base to compare with, see --base" if base is None else f"base {found.base}"
        _say(f"automatic masks in {sample.name}: tuned {found.tuned}, {other}")
        if found.complaint:
            _warn(found.complaint)
        report.append(vars(found))
    return report


def _say(line: str) -> None:
    print(escape_paragraph(line), flush=True)


def _warn(text: str) -> None:
    print(f"WARNING: {escape_paragraph(text)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
