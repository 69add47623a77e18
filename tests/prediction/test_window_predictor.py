"""`samft.load_predictor`: stock `SamPredictor` on the whole image, or on the window of a prompt."""

import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from segment_anything import SamPredictor

import samft
from samft.errors import ConfigError
from samft.models.sam import load_sam
from samft.prediction.window_predictor import load_predictor
from samft.views.windows import View
from samft.weights.download import PACKAGED_TINY

SIZE = (300, 420)
IMAGE = cv2.resize(np.random.default_rng(0).integers(0, 256, (15, 21, 3), np.uint8), SIZE[::-1])
TILES = View("tiles", tile_size=128, tile_overlap=0.25)
PROMPTS: list[dict[str, Any]] = [
    {"box": np.array([150.0, 110, 190, 160])},
    {"point_coords": np.array([[200.0, 150]]), "point_labels": np.array([1])},
    {
        "point_coords": np.array([[200.0, 150], [212, 160]]),
        "point_labels": np.array([1, 0]),
        "box": np.array([165.0, 130, 215, 180]),
    },
]


@pytest.mark.parametrize("options", [{}, {"multimask_output": False}, {"return_logits": True}])
@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_whole_images_are_those_of_stock(number: int, options: dict[str, Any]) -> None:
    predictor, stock = samft.load_predictor(PACKAGED_TINY), SamPredictor(load_sam(PACKAGED_TINY))
    for one in (predictor, stock):
        one.set_image(IMAGE)
    for ours, theirs in zip(
        predictor.predict(**PROMPTS[number], **options),
        stock.predict(**PROMPTS[number], **options),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_box_that_exceeds_a_whole_image_is_that_of_stock() -> None:
    predictor, stock = load_predictor(PACKAGED_TINY), SamPredictor(load_sam(PACKAGED_TINY))
    for one in (predictor, stock):
        one.set_image(IMAGE[..., ::-1], "BGR")
    box = np.array([-9.0, 5, 50, 330])
    np.testing.assert_array_equal(predictor.predict(box=box)[0], stock.predict(box=box)[0])


@pytest.mark.parametrize("view", [TILES, View("objects", tile_size=100, context=2.0)])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_windows_are_those_of_stock(view: View, prompt: dict[str, Any]) -> None:
    predictor = load_predictor(PACKAGED_TINY, view=view)
    predictor.set_image(IMAGE)
    masks, scores, logits = predictor.predict(**prompt)
    assert masks.shape == (3, *SIZE) and predictor.window is not None
    x0, y0, x1, y1 = predictor.window.tolist()
    assert (x1 - x0, y1 - y0) == (view.tile_size, view.tile_size)
    stock = SamPredictor(load_sam(PACKAGED_TINY))
    stock.set_image(IMAGE[y0:y1, x0:x1])
    moved = {
        name: value if name == "point_labels" else value - np.resize([x0, y0], value.shape)
        for name, value in prompt.items()
    }
    expected = stock.predict(**moved)
    np.testing.assert_array_equal(masks[:, y0:y1, x0:x1], expected[0])
    np.testing.assert_array_equal(scores, expected[1])
    np.testing.assert_array_equal(logits, expected[2])
    masks[:, y0:y1, x0:x1] = False
    assert not masks.any()


def test_a_mask_input_is_seen_through_its_own_window() -> None:
    predictor = load_predictor(PACKAGED_TINY, view=TILES)
    predictor.set_image(IMAGE)
    box = PROMPTS[0]["box"]
    with pytest.raises(ValueError, match="no earlier prediction"):
        predictor.predict(box=box, mask_input=np.zeros((1, 64, 64), np.float32))
    _, scores, logits = predictor.predict(box=box, multimask_output=False)
    window = predictor.window
    assert window is not None
    near = np.array([window[:2] + 2.0])  # another tile would hold it better
    masks, _, _ = predictor.predict(
        near, np.array([1]), mask_input=logits, multimask_output=False, return_logits=True
    )
    np.testing.assert_array_equal(predictor.window, window)
    outside = np.ones(SIZE, bool)
    outside[window[1] : window[3], window[0] : window[2]] = False
    assert (masks[0][outside] == -np.inf).all() and np.isfinite(masks[0][~outside]).all()


@pytest.mark.parametrize("view", ["tiles", {"kind": "tiles"}, View])
def test_what_is_no_view_is_one_sentence(view: Any) -> None:
    with pytest.raises(ConfigError, match=r"^view: give a samft\.views\.windows\.View"):
        load_predictor(PACKAGED_TINY, view=view)


def test_clicks_that_the_window_does_not_show_are_warned_of() -> None:
    predictor = load_predictor(PACKAGED_TINY, view=TILES)
    predictor.set_image(IMAGE)
    inside, beyond = np.array([150.0, 110]), np.array([290.0, 250])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What is not the object may be anywhere.
        expected = predictor.predict(np.stack([inside, beyond]), np.array([1, 0]))[0]
    with pytest.warns(UserWarning, match="beyond its window, .* points beyond it are not") as seen:
        masks, _, logits = predictor.predict(np.stack([inside, beyond]), np.array([1, 1]))
    assert seen[0].filename == __file__
    np.testing.assert_array_equal(masks, expected)
    with pytest.warns(UserWarning, match="points beyond it are not used"):  # a click that corrects
        points, labels = np.stack([inside, beyond]), np.array([1, 1])
        predictor.predict(points, labels, mask_input=logits[:1])
    with pytest.warns(UserWarning, match="masks end at its edge"):
        predictor.predict(box=np.array([20.0, 20, 250, 60]))


def test_the_sidecars_view_and_a_file_are_used(tmp_path: Path) -> None:
    tuned, file = tmp_path / "tuned.ckpt", tmp_path / "image.tif"
    shutil.copy(PACKAGED_TINY, tuned)
    digest = hashlib.sha256(tuned.read_bytes()).hexdigest()
    sidecar = {"view": TILES.to_json(), "sha256": digest}
    tuned.with_suffix(".json").write_text(json.dumps(sidecar))
    tifffile.imwrite(file, IMAGE, photometric="rgb", tile=(64, 64), compression="zlib")
    given, saved = load_predictor(PACKAGED_TINY, view=TILES), load_predictor(tuned)
    assert saved.view == TILES
    given.set_image(IMAGE)
    saved.set_image(file)
    for prompt in PROMPTS:
        np.testing.assert_array_equal(given.predict(**prompt)[0], saved.predict(**prompt)[0])


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_what_is_drawn_on_the_image_later_is_not_seen(image_format: str) -> None:
    predictor, image = load_predictor(PACKAGED_TINY, view=TILES), IMAGE.copy()
    predictor.set_image(image, image_format)
    expected = predictor.predict(**PROMPTS[0], return_logits=True)[0]
    predictor.set_image(image, image_format)
    image[:] = 255
    np.testing.assert_array_equal(predictor.predict(**PROMPTS[0], return_logits=True)[0], expected)


def test_a_window_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load_predictor(PACKAGED_TINY, view=TILES)
    predictor.set_image(IMAGE)
    first = [mask.copy() for mask in predictor.predict(**PROMPTS[0])]
    predictor.predict(box=np.array([10.0, 10, 40, 40]))
    monkeypatch.setattr(SamPredictor, "set_image", lambda *_: pytest.fail("encoded again"))
    for again, before in zip(predictor.predict(**PROMPTS[0]), first, strict=True):
        np.testing.assert_array_equal(again, before)


@pytest.mark.processes
def test_it_may_be_the_first_thing_that_a_program_asks_for() -> None:
    # Whatever is imported first has to bring a torchvision that can be imported.
    code = "import samft; print(samft.load_predictor.__name__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "load_predictor\n"


@pytest.mark.parametrize("view", [View(), TILES])
@pytest.mark.parametrize(
    ("image", "what"),
    [
        (IMAGE.astype(np.float32), "float32"),
        (IMAGE.astype(np.uint16) * 200, "uint16"),
        (IMAGE > 100, "bool"),
        (IMAGE[..., 0], r"\(300, 420\)"),
        (np.dstack([IMAGE, IMAGE[..., :1]]), r"\(300, 420, 4\)"),
        (IMAGE.transpose(2, 0, 1), r"\(3, 300, 420\)"),
        (IMAGE[:0], r"\(0, 420, 3\)"),
        (Image.fromarray(IMAGE), "Image"),
    ],
)
def test_what_is_no_8_bit_image_is_one_sentence(view: View, image: Any, what: str) -> None:
    predictor = load_predictor(PACKAGED_TINY, view=view)
    with pytest.raises(ValueError, match=f"image: it must be .* not .*{what}"):
        predictor.set_image(image)
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(box=PROMPTS[0]["box"])


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ({}, "give a box or points"),
        ({"box": np.array([500.0, 10, 540, 40])}, "box: it lies outside"),
        ({"box": np.zeros((2, 4))}, "box: it is x0, y0, x1, y1 of one object"),
        ({"box": np.array([np.nan, 10, 40, 40])}, "box: it is x0, y0, x1, y1, finite"),
        ({"box": np.array([0, 10, np.inf, 40])}, "box: it is x0, y0, x1, y1, finite"),
        ({"box": np.array([40.0, 40, 10, 10])}, "box: .* with x1 > x0"),
        ({"point_coords": np.array([[1.0, 2]])}, "point_labels: give one for each"),
        ({"box": PROMPTS[0]["box"], "point_labels": np.array([1])}, "point_labels: give one"),
        (
            {"point_coords": np.array([[1.0, 2], [3, 4]]), "point_labels": np.array([1])},
            "point_labels: give one for each",
        ),
        (
            {"point_coords": np.array([[np.nan, 2]]), "point_labels": np.array([1])},
            "point_coords: they must be finite",
        ),
        (
            {"point_coords": np.array([[1.0, 900]]), "point_labels": np.array([1])},
            "point_coords: all lie outside",
        ),
    ],
)
def test_what_shows_no_object_is_one_sentence(prompt: dict[str, Any], sentence: str) -> None:
    predictor = load_predictor(PACKAGED_TINY, view=TILES)
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(**prompt)
    predictor.set_image(IMAGE)
    with pytest.raises(ValueError, match=sentence):
        predictor.predict(**prompt)
    predictor.reset_image()
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(**prompt)
