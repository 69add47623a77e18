"""A view as plain values, in the files that carry it, and as flags."""

import argparse
import json

import numpy as np
import pytest

from samft.errors import ConfigError
from samft.views.flags import add_view_flags, view_flags
from samft.views.windows import View
from samft.weights.saved_settings import saved_view

VIEWS = [View(), View("tiles", 320, 0.1), View("objects", 64, context=3.0)]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_comes_back_from_json(view) -> None:
    assert View.from_json(json.loads(json.dumps(view.to_json()))) == view


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "tiles",
        ["tiles"],
        {"kind": "rows"},
        {"kind": ["tiles"]},
        {"kind": "tiles", "tile_size": "many"},
        {"kind": "tiles", "tile_size": 0},
        {"kind": "tiles", "tile_size": 64.5},
        {"kind": "tiles", "tile_overlap": 1.0},
        {"kind": "tiles", "tile_overlap": -0.1},
        {"kind": "objects", "context": None},
        {"kind": "objects", "context": 0.5},
        {"kind": "tiles", "side": 3},
    ],
)
def test_what_is_no_view_is_none(value) -> None:
    assert View.from_json(value) is None
    if isinstance(value, dict) and "side" not in value:
        with pytest.raises(ConfigError, match="^view: .* cannot be: kind is one of image, tiles"):
            View(**value)


def test_the_side_of_a_view_may_be_a_number_of_numpys() -> None:
    assert View("tiles", np.int64(64)) == View("tiles", 64)


def test_the_sidecar_says_how_images_were_seen(tmp_path) -> None:
    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_bytes(b"")
    assert saved_view(checkpoint) is None
    for view in VIEWS:
        checkpoint.with_suffix(".json").write_text(json.dumps({"view": view.to_json()}))
        assert saved_view(checkpoint) == view


def parse_flags(*argv: str) -> dict:
    parser = argparse.ArgumentParser()
    add_view_flags(parser.add_argument, default="default image")
    return view_flags(parser.parse_args(argv))


def test_flags_replace_what_they_name() -> None:
    flags = parse_flags("--view", "objects", "--tile_size", "96")
    assert View("tiles", 320, 0.1).completed(flags) == View("objects", 96, 0.1)
    flags = parse_flags("--view_context", "1.5", "--tile_overlap", "0")
    assert View("objects").completed(flags) == View("objects", tile_overlap=0.0, context=1.5)
    assert View("tiles", 320).completed(parse_flags()) == View("tiles", 320)


@pytest.mark.parametrize(
    "argv", [("--tile_size", "15"), ("--tile_overlap", "0.91"), ("--view_context", "nan")]
)
def test_flags_out_of_range_are_refused(argv) -> None:
    with pytest.raises(ConfigError, match=f"{argv[0]}: {argv[1]} must be"):
        parse_flags(*argv)
