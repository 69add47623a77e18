"""What a checkpoint records of its training: how images were resized and read, and the prompts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from samft.cli import image_size_problem, parse_image_size
from samft.errors import CheckpointError, ConfigError
from samft.images.pixels import PixelFormat
from samft.runtime.checkpoint_paths import find_weights_file
from samft.views.windows import View
from samft.weights.checkpoint_files import read_metadata

_STRUCTURED = ("pixels", "view")  # entries that are no plain values
# Settings that decide which images a training holds out, and what they were before there were such.
_HELD_OUT_BY = {"group_by": "none", "category_names": None, "min_mask_area": 0.0, "crowds": "auto"}


def saved_resize_mode(path: Path) -> str:
    """The resize mode that a checkpoint was trained with; `pad`, SAM's own, if it is not recorded.

    Args:
        path: A checkpoint. Its sidecar records the mode, or the file itself if it is a `last.ckpt`
            or was exported to safetensors.
    """
    return recorded_resize_mode(path) or "pad"


def recorded_resize_mode(path: Path) -> str | None:
    """`pad` or `squash`, as `saved_resize_mode`; None if it is not recorded."""
    mode = _saved_metadata(path, "resize_mode").get("resize_mode")
    return mode if mode in ("pad", "squash") else None


def saved_pixels(path: str | Path) -> PixelFormat | None:
    """How values of images became 8 bits in training; None if it is not recorded.

    Args:
        path: A checkpoint or an export. Its sidecar records it, or the file itself.
    """
    return PixelFormat.from_json(_saved_metadata(Path(path), "pixels").get("pixels"))


def saved_rectangle(path: str | Path) -> str | None:
    """The `image_size` that a checkpoint was trained at, where that is not square: 1024x768, say.

    Args:
        path: A checkpoint. Its sidecar records it, or the file itself if it is a `last.ckpt`. An
            export is the model of a square, as all who read it take it.
    """
    saved = _saved_metadata(Path(path), "rectangle")
    size = str(saved.get("rectangle") or saved.get("image_size"))
    if image_size_problem(size):  # not recorded, or damaged
        return None
    height, width = parse_image_size(size)
    return None if height == width else size


def record_image_size(image_size: int | str) -> dict[str, Any]:
    """The entries of a sidecar for an image size: what older readers know, and its shape."""
    size = parse_image_size(image_size)
    return {"image_size": max(size), "rectangle": image_size if size[0] != size[1] else None}


def saved_view(path: str | Path) -> View | None:
    """How images were seen in training; None if it is not recorded.

    Args:
        path: A checkpoint or an export. Its sidecar records it, or the file itself.
    """
    return View.from_json(_saved_metadata(Path(path), "view").get("view"))


def view_of(path: str | Path, flags: Mapping[str, Any], *, image_size: int = 1024) -> View:
    """How images are seen: as flags say, else as in training.

    Args:
        path: A checkpoint or an export.
        flags: See `view_flags`.
        image_size: Side of the model's input: of a window, too, where nothing says another.

    Raises:
        ConfigError: Windows are wanted of a checkpoint for whole images that are not square.
    """
    saved = saved_view(path)
    view = saved if saved and saved.has_windows else View(tile_size=image_size)
    view = view.completed(flags)
    check_view(view, path, name="--view")
    return view


def check_view(view: View, path: str | Path, *, name: str) -> None:
    """Refuses windows of a checkpoint for whole images that are not square.

    Args:
        view: How images are to be seen.
        path: The checkpoint.
        name: What asked for it, for the error.

    Raises:
        ConfigError: It has windows, and the checkpoint was tuned on rectangles.
    """
    if view.has_windows and (rectangle := saved_rectangle(path)):
        raise ConfigError(
            f"{name}: {path} was tuned at image_size {rectangle}, for whole images of this shape, "
            f"and windows are square: leave {name} out, or take a checkpoint of a square "
            "image_size."
        )


def same_setting(what: str, paths: Sequence[Path], values: Sequence[Any]) -> Any:
    """The value of a setting that both of two checkpoints were trained with.

    Args:
        what: What a checkpoint does by it: "resizes images".
        paths: The checkpoints.
        values: Of each.

    Raises:
        CheckpointError: They differ.
    """
    if values[0] != values[1]:
        both = "; ".join(_describe_setting(value) for value in values)
        raise CheckpointError(
            f"{paths[0]} {what} in another way than {paths[1]} ({both}): an average would be of "
            "models that see different images. Tune both alike."
        )
    return values[0]


def _describe_setting(value: Any) -> str:
    # Of a view or a pixel format what a sidecar has, anything else as it is.
    if not hasattr(value, "to_json"):
        return str(value)
    entries = value.to_json().items()
    return ", ".join(f"{name} {entry}" for name, entry in entries if entry not in (None, {}))


class SavedPrompts(NamedTuple):
    """The prompts that a checkpoint was trained with.

    Attributes:
        boxes_only: No point was among them.
        three_masks: A single point trained the best of three masks, `multimask best`.
    """

    boxes_only: bool
    three_masks: bool


def saved_prompts(path: Path) -> SavedPrompts | None:
    """The prompts of a checkpoint's training; None if it was not trained by samft, as Meta's.

    Args:
        path: A checkpoint or an export. Its sidecar records them, or the file itself; where it is
            older than the settings, there were boxes only.
    """
    config = saved_config(path)
    if config is None:
        return None
    clicks = str(config.get("correction_rounds") or 0) != "0"
    boxes_only = config.get("prompts", "box") == "box" and not clicks
    return SavedPrompts(boxes_only, config.get("multimask") == "best")


def saved_config(path: Path) -> dict[str, Any] | None:
    """The settings of a checkpoint's training; None if it was not trained by samft.

    Args:
        path: A checkpoint or an export, of which only some are known.
    """
    saved = _saved_metadata(path, "config")
    config = saved.get("config", saved)
    # Of a run, or of an export of its checkpoint; an export of Meta's has none of these.
    if not isinstance(config, dict) or not config.keys() & {"checkpoint_path", "step", "prompts"}:
        return None
    return config


def held_out_by(paths: Sequence[Path], flags: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which images are held out, of those with chosen objects, as in training.

    Args:
        paths: Checkpoints; those that were trained with `val_fraction` say it.
        flags: Decide where none of these does, by the names of `TrainConfig`; `group_by` always,
            unless it is None.

    Returns:
        `group_by`, the settings that choose objects, and `val_fraction` of the training, the
        smallest one of several; None without any.

    Raises:
        ConfigError: The trainings have held out different images.
    """
    given = {"group_by": flags["group_by"]} if flags["group_by"] else {}
    saved = [saved_config(path) or {} for path in paths]
    configs = [config for config in saved if config.get("val_fraction") is not None]
    of_runs = [
        {name: config.get(name, before) for name, before in _HELD_OUT_BY.items()} | given
        for config in configs
    ]
    if any(one != of_runs[0] for one in of_runs):
        texts = [", ".join(f"{name} {value}" for name, value in one.items()) for one in of_runs]
        raise ConfigError(
            f"--val_fraction: the checkpoints' trainings held out different images "
            f"({'; '.join(dict.fromkeys(texts))}), so that some have seen what others were "
            "validated on: evaluate each by itself."
        )
    without = {name: flags[name] for name in _HELD_OUT_BY} | {"group_by": "auto"} | given
    by = of_runs[0] if of_runs else without
    return by | {"val_fraction": min((one["val_fraction"] for one in configs), default=None)}


def saved_training(path: Path) -> dict[str, Any]:
    """What is known of a checkpoint's training: `config`, and perhaps `step` and `metrics`.

    Args:
        path: A checkpoint, an average of checkpoints, an export or an adapter.

    Returns:
        Empty if it was not trained by samft.
    """
    config = saved_config(path)
    if config is None:
        return {}
    saved = _saved_metadata(path, "config")
    training: dict[str, Any] = {name: saved[name] for name in ("step", "metrics") if name in saved}
    training["config"] = config
    if isinstance(training.get("metrics"), str):  # of safetensors
        try:
            training["metrics"] = json.loads(training["metrics"])
        except ValueError:
            del training["metrics"]
    return training


def describe_point_prompts(path: Path, *, automatic: bool) -> list[str]:
    """What to know before a checkpoint gets points, as sentences; empty where nothing is amiss.

    Args:
        path: A checkpoint or an export.
        automatic: Whether the points are those of the automatic mask generator.
    """
    lines, trained = [], saved_prompts(path)
    if trained is not None and trained.boxes_only:
        lines.append(
            f"{path.name} was tuned on boxes only: masks from points, and automatic ones, which "
            "are prompted with points, may be worse than before tuning, or missing. Give boxes, or "
            "the checkpoint that it was tuned from, or tune with --prompts mixed --multimask best."
        )
    if automatic and saved_resize_mode(path) == "squash":
        lines.append(
            f"{path.name} was tuned with resize_mode squash, but the automatic mask generator "
            "always pads: expect worse masks than validation measured."
        )
    return lines


def _saved_metadata(path: Path, key: str) -> dict[str, Any]:
    # Of the header of safetensors, else the sidecar or `last.ckpt`; empty if none can be read.
    try:
        path = find_weights_file(path)
        metadata: dict[str, Any] = dict(read_metadata(path))
        sidecar = path.with_suffix(".json")
        # A JSON file beside an export may be the sidecar of the checkpoint that was exported.
        if not metadata.keys() - {"format"} and sidecar.is_file():
            metadata = json.loads(sidecar.read_text())
        if key not in metadata and path.suffix == ".ckpt":
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            own = {name: state.get(name) for name in _STRUCTURED}
            return {**state.get("config", {}), **own}
        texts = {name: metadata.get(name) for name in _STRUCTURED}
        # Metadata of safetensors is text.
        parsed = {name: json.loads(text) for name, text in texts.items() if isinstance(text, str)}
        return {**metadata, **parsed}
    except Exception:  # not ours: a JSON file of something else, a format that cannot be mapped
        pass
    return {}
