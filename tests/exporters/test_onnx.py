"""The two ONNX files in onnxruntime, compared with `SamPredictor`."""

from pathlib import Path

import numpy as np
import pytest
from segment_anything import SamPredictor

from helpers.tiny_checkpoint import SIZE, tiny_sam
from samft.exporters.verification import (
    compare_predictions,
    image_sample,
    predict_boxes,
    synthetic_sample,
)

pytest.importorskip("onnx", reason="no onnx: pip install '.[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime: as above")

from samft.exporters.onnx import DECODER, ENCODER, open_onnx, write_onnx  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("onnx") / "tuned"
    write_onnx(tiny_sam(), target, {"model_type": "vit_tiny", "image_size": str(SIZE)})
    return target


def test_predictions_equal_sam_predictors_for_any_image_shape(folder) -> None:
    # A crop or a size that tracing made a constant would show in one of these.
    predict, image = open_onnx(folder), synthetic_sample().image
    samples = [
        synthetic_sample(),
        image_sample("high", np.ascontiguousarray(image.transpose(1, 0, 2)[:, :101])),
        image_sample("small", np.ascontiguousarray(image[100:130, 80:133])),
        image_sample("square", np.ascontiguousarray(image[:256, :256])),
    ]
    sam = tiny_sam()
    for sample in samples:
        difference = compare_predictions([predict_boxes(sam, sample)], [predict(sample)])
        assert difference.logits < 1e-3, sample.name
        assert difference.iou_predicted < 1e-5, sample.name
        assert difference.equal_pixels == 1.0, sample.name


def test_points_and_mask_inputs_equal_sam_predictors(folder) -> None:
    sample = synthetic_sample()
    predictor = SamPredictor(tiny_sam())
    predictor.set_image(sample.image)
    points, labels = np.array([[100.0, 80.0], [200.0, 30.0]]), np.array([1, 0])
    _, _, earlier = predictor.predict(point_coords=points, point_labels=labels)
    expected, scores, low = predictor.predict(
        points, labels, mask_input=earlier[:1], multimask_output=True, return_logits=True
    )
    decoder = onnxruntime.InferenceSession(str(folder / DECODER))
    coords = predictor.transform.apply_coords(points, sample.image.shape[:2])
    outputs = decoder.run(
        None,
        {
            "image_embeddings": predictor.features.numpy(),
            # Without a box, the stock predictor adds a point that is none.
            "point_coords": np.concatenate([coords, [[0, 0]]])[None].astype(np.float32),
            "point_labels": np.array([[1, 0, -1]], np.float32),
            "mask_input": earlier[None, :1],
            "has_mask_input": np.ones(1, np.float32),
            "orig_im_size": np.array(sample.image.shape[:2], np.float32),
        },
    )
    for ours, stocks in zip(outputs, (expected, scores, low), strict=True):
        np.testing.assert_allclose(ours[0, 1:], stocks, atol=1e-3)


def test_both_files_hold_the_metadata(folder) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([ENCODER, DECODER])
    for name in (ENCODER, DECODER):
        session = onnxruntime.InferenceSession(str(folder / name))
        metadata = session.get_modelmeta().custom_metadata_map
        assert metadata == {"model_type": "vit_tiny", "image_size": str(SIZE)}
