"""The flags of prompts and of automatic masks, as commands have them. Imports no torch."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from samft.errors import ConfigError


def parse_box(text: str) -> list[float]:
    """The argparse type of `--box`: x0 y0 x1 y1."""
    try:
        x0, y0, x1, y1 = (float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not x0,y0,x1,y1") from None
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 <= x0 or y1 <= y0:
        raise argparse.ArgumentTypeError(
            f"'{text}' has no width or no height: it is x0,y0,x1,y1 with x1 > x0 and y1 > y0"
        )
    return [x0, y0, x1, y1]


def parse_point(text: str) -> list[float]:
    """The argparse type of `--point`: x y and the label, 1 where it is left out."""
    try:
        x, y, *labels = (float(number) for number in text.split(","))
    except ValueError:
        x, y, labels = math.nan, math.nan, []
    if not (math.isfinite(x) and math.isfinite(y)) or labels not in ([], [0], [1]):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not x,y for a point of the object, or x,y,0 for one of something else"
        )
    return [x, y, *(labels or [1.0])]


def check_prompt_flags(options: argparse.Namespace) -> list[str]:
    """Checks what `samft.predict` is to prompt the model with.

    Returns:
        Settings of automatic masks that were given, though masks are not automatic.

    Raises:
        ConfigError: Prompts exclude each other, or settings contradict each other.
    """
    names = ("boxes", "box", "point", "points", "automatic")
    sources = [name for name in names if getattr(options, name)]
    if len(sources) > 1 and sources != ["box", "point"]:
        raise ConfigError(f"--{' and --'.join(sources)} exclude each other: give one of them.")
    if options.point and len(options.box or ()) > 1:
        raise ConfigError(
            "--point prompts one object, so one --box goes with it: give one, or several objects "
            "in a file with --points."
        )
    settings = generator_settings(options)
    is_automatic = options.automatic or not (sources or options.annotations)
    return [] if is_automatic else list(settings)


@dataclass(frozen=True)
class GeneratorSetting:
    """A setting of `SamAutomaticMaskGenerator`, with its name there.

    Attributes:
        name: Of the setting and of its flag.
        metavar: Of the flag; `N` for a whole number.
        default: The package's, as the help text gives it.
        least: The lowest value.
        most: The highest one.
        help: What it does, with its unit.
    """

    name: str
    metavar: str
    default: str
    help: str
    least: float = -math.inf
    most: float = math.inf

    def parse(self, text: str) -> float:
        """The argparse type of the flag."""
        kind = int if self.metavar in ("N", "PX") else float
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and self.least <= number <= self.most):
            limits = [f"at least {self.least:g}"] * math.isfinite(self.least)
            limits += [f"at most {self.most:g}"] * math.isfinite(self.most)
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"'{text}' is not {' and '.join([what, *limits])}")
        return number


# Source: segment_anything/automatic_mask_generator.py
GENERATOR_SETTINGS = (
    GeneratorSetting(
        "points_per_side", "N", "32", "points in each row and column of the grid of points", 1
    ),
    GeneratorSetting(
        "points_per_batch",
        "N",
        "64, fewer above 1024 x 1024 px",
        "points decoded at once: memory and speed, not masks",
        1,
    ),
    GeneratorSetting("pred_iou_thresh", "X", "0.88", "leave out masks of a lower predicted IoU"),
    GeneratorSetting(
        "stability_score_thresh",
        "X",
        "0.95",
        "leave out masks of a lower stability: the IoU of the mask cut off at logits of "
        "stability_score_offset and of minus that",
    ),
    GeneratorSetting("stability_score_offset", "X", "1", "see stability_score_thresh; logits", 0),
    GeneratorSetting(
        "box_nms_thresh",
        "X",
        "0.7",
        "of masks whose boxes have a higher IoU, keep only the best",
        0,
        1,
    ),
    GeneratorSetting(
        "crop_n_layers",
        "N",
        "0",
        "also look at crops, which show small objects larger: 1 adds 4 crops, 2 adds 16 to these; "
        "each is encoded",
        0,
        8,
    ),
    GeneratorSetting("crop_nms_thresh", "X", "0.7", "as box_nms_thresh, between crops", 0, 1),
    GeneratorSetting(
        "crop_overlap_ratio",
        "X",
        "0.341",
        "how much the first crops overlap, as a share of the image's shorter side",
        0,
        1,
    ),
    GeneratorSetting(
        "crop_n_points_downscale_factor",
        "N",
        "1",
        "points_per_side is divided by this for the first crops, and again for the next",
        1,
    ),
    GeneratorSetting(
        "min_mask_region_area",
        "PX",
        "0",
        "fill holes and drop specks of fewer pixels of the original image",
        0,
    ),
)


def add_generator_flags(add: Callable[..., Any]) -> None:
    """Adds the settings of automatic masks to the parser or group whose `add_argument` is given."""
    for setting in GENERATOR_SETTINGS:
        add(
            f"--{setting.name}",
            type=setting.parse,
            metavar=setting.metavar,
            help=f"{setting.help}; default {setting.default}",
        )


def generator_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of automatic masks that were given, by name.

    Raises:
        ConfigError: Crops would get no points.
    """
    given = {one.name: getattr(options, one.name) for one in GENERATOR_SETTINGS}
    settings = {name: value for name, value in given.items() if value is not None}
    side, layers = settings.get("points_per_side", 32), settings.get("crop_n_layers", 0)
    factor = settings.get("crop_n_points_downscale_factor", 1)
    if side < factor**layers:
        raise ConfigError(
            f"--crop_n_points_downscale_factor: {factor:g} leaves no point of --points_per_side "
            f"{side:g} for the crops of layer {layers:g}: give a smaller factor or more points."
        )
    return settings
