"""The files for X-AnyLabeling, fed as that program feeds them, compared with `SamPredictor`."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from helpers.tiny_checkpoint import tiny_sam, write_tiny
from samft.cli import run_command
from samft.export import main
from samft.exporters.verification import synthetic_sample

pytest.importorskip("onnx", reason="no onnx: pip install '.[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime: as above")

yaml = pytest.importorskip("yaml")

CANVAS = (684, 1024)  # H, W, px


class Annotator:
    """Loads and feeds as X-AnyLabeling does.

    Source: CVHub520/X-AnyLabeling at d2974c8c and 368799cf, services/auto_labeling/model.py
    (`get_model_abs_path`), segment_anything.py (`Meta.required_config_names`, which of the masks is
    taken) and sam_onnx.py (the canvas, the padding point, the way back); written anew.
    """

    def __init__(self, config_file: Path) -> None:
        settings = yaml.safe_load(config_file.read_text())
        assert settings["type"] == "segment_anything"
        for name in ("name", "display_name", "input_size", "max_width", "max_height"):
            assert settings[name]
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(str(config_file.parent / settings[f"{part}_model_path"]))
            for part in ("encoder", "decoder")
        )

    def encode(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        self.size, self.scale = (height, width), min(CANVAS[1] / width, CANVAS[0] / height)
        self.canvas = warped(image, self.scale, CANVAS)
        name = self.encoder.get_inputs()[0].name
        (embedding,) = self.encoder.run(None, {name: self.canvas.astype(np.float32)})
        return np.asarray(embedding)

    def predict(self, embedding: np.ndarray, marks: list[dict[str, Any]]) -> np.ndarray:
        points: list[list[float]] = []
        labels: list[int] = []
        for mark in marks:
            data = mark["data"]
            box = mark["type"] == "rectangle"
            points += [data[:2], data[2:]] if box else [data]
            labels += [2, 3] if box else [mark["label"]]
        coords = np.array([*points, [0.0, 0.0]])[None] * self.scale
        masks, _, _ = self.decoder.run(
            None,
            {
                "image_embeddings": embedding,
                "point_coords": coords.astype(np.float32),
                "point_labels": np.array([[*labels, -1]], np.float32),
                "mask_input": np.zeros((1, 1, 256, 256), np.float32),
                "has_mask_input": np.zeros(1, np.float32),
                "orig_im_size": np.array(CANVAS, np.float32),
            },
        )
        return warped(masks[0][0], 1 / self.scale, self.size)


def warped(picture: np.ndarray, scale: float, size: tuple[int, int]) -> np.ndarray:
    matrix = np.array([[scale, 0, 0], [0, scale, 0]])
    return np.asarray(cv2.warpAffine(picture, matrix, size[::-1], flags=cv2.INTER_LINEAR))


@pytest.fixture(scope="module")
def tuned() -> Sam:
    return tiny_sam(image_size=1024).eval()


@pytest.fixture(scope="module")
def folder(tuned: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("xanylabeling")
    checkpoint = write_tiny(root, sam=tuned)
    output = root / "tuned"
    flags = ("--checkpoint", checkpoint, "--format", "xanylabeling", "--output", output)
    report = main([str(flag) for flag in flags])
    assert report["equal_pixels"] == 1.0 and report["logit_difference"] < 1e-3
    return output


@pytest.mark.parametrize("upright", [False, True])
def test_boxes_give_the_masks_of_sam_predictor(tuned: Sam, folder: Path, upright: bool) -> None:
    sample = synthetic_sample()
    image, boxes = sample.image, sample.boxes
    if upright:
        image = np.ascontiguousarray(image.transpose(1, 0, 2))
        boxes = boxes[:, [1, 0, 3, 2]]
    annotator = Annotator(next(folder.glob("*.yaml")))
    embedding = annotator.encode(image)
    predictor = SamPredictor(tuned)
    predictor.set_image(annotator.canvas)  # whose longer side is the model's: not resized again
    for box in boxes:
        mask = annotator.predict(embedding, [{"type": "rectangle", "data": box.tolist()}])
        logits, _, _ = predictor.predict(
            box=box * annotator.scale, multimask_output=False, return_logits=True
        )
        expected = warped(logits[0], 1 / annotator.scale, annotator.size)
        assert (mask > 0).any()
        # The logits of ONNX and of PyTorch differ in the last digits, so their signs may near zero.
        assert ((mask > 0) == (expected > 0))[np.abs(expected) > 1e-3].all()


def test_points_give_the_masks_of_sam_predictor(tuned: Sam, folder: Path) -> None:
    sample = synthetic_sample()
    annotator = Annotator(next(folder.glob("*.yaml")))
    embedding = annotator.encode(sample.image)
    predictor = SamPredictor(tuned)
    predictor.set_image(annotator.canvas)
    box = sample.boxes[0]
    inside, outside = (box[:2] + box[2:]) / 2, box[:2] - 3
    points = [{"type": "point", "data": inside.tolist(), "label": 1}]
    points.append({"type": "point", "data": outside.tolist(), "label": 0})
    rectangle = {"type": "rectangle", "data": box.tolist()}
    coords = np.array([inside, outside]) * annotator.scale
    for marks, prompt, single in (
        (points[:1], {"point_coords": coords[:1], "point_labels": np.array([1])}, False),
        (points, {"point_coords": coords, "point_labels": np.array([1, 0])}, True),
        (
            [*points[:1], rectangle],
            {
                "point_coords": coords[:1],
                "point_labels": np.array([1]),
                "box": box * annotator.scale,
            },
            True,
        ),
    ):
        logits, scores, _ = predictor.predict(
            **prompt, multimask_output=not single, return_logits=True
        )
        expected = warped(logits[scores.argmax()], 1 / annotator.scale, annotator.size)
        assert ((annotator.predict(embedding, marks) > 0) == (expected > 0)).all()


def test_names_are_of_this_checkpoint_and_of_no_place(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    settings = yaml.safe_load(next(folder.glob("*.yaml")).read_text())
    assert names == [
        settings["decoder_model_path"],
        settings["encoder_model_path"],
        f"{settings['name']}.yaml",
    ]
    assert settings["name"].startswith("sam_vit_tiny_")
    # It replaces its own files when told to, and no others.
    checkpoint = folder.parent / "30-0.67.ckpt"
    flags = ["--checkpoint", checkpoint, "--format", "xanylabeling", "--output", folder.parent]
    assert run_command(main, [str(flag) for flag in flags]) == 2
