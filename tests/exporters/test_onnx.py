"""The two ONNX files in onnxruntime, beside the stock predictor."""

from pathlib import Path

import numpy as np
import pytest
from segment_anything import SamPredictor

from helpers.tiny_checkpoint import SIZE, tiny_sam
from samft.exporters.verification import compare, painted_sample, predict_boxes, sample_of

pytest.importorskip("onnx", reason="no onnx: pip install 'samft[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime: as above")

from samft.exporters.onnx import DECODER, ENCODER, open_onnx, write_onnx  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("onnx") / "tuned"
    write_onnx(tiny_sam(), target, {"model_type": "vit_tiny", "image_size": str(SIZE)})
    return target


def test_masks_and_logits_are_the_stock_predictors_whatever_the_pictures_shape(folder) -> None:
    # A crop or a size that is baked in by tracing would show in one of these.
    answer, image = open_onnx(folder), painted_sample().image
    samples = [
        painted_sample(),
        sample_of("high", np.ascontiguousarray(image.transpose(1, 0, 2)[:, :101])),
        sample_of("small", np.ascontiguousarray(image[100:130, 80:133])),
        sample_of("square", np.ascontiguousarray(image[:256, :256])),
    ]
    sam = tiny_sam()
    for sample in samples:
        found = compare([predict_boxes(sam, sample)], [answer(sample)])
        assert found.logits < 1e-3, sample.name
        assert found.iou_predicted < 1e-5, sample.name
        assert found.equal_pixels == 1.0, sample.name


def test_points_and_an_earlier_mask_are_taken_as_by_the_stock_predictor(folder) -> None:
    sample = painted_sample()
    predictor = SamPredictor(tiny_sam())
    predictor.set_image(sample.image)
    points, labels = np.array([[100.0, 80.0], [200.0, 30.0]]), np.array([1, 0])
    _, _, earlier = predictor.predict(point_coords=points, point_labels=labels)
    expected, scores, low = predictor.predict(
        points, labels, mask_input=earlier[:1], multimask_output=True, return_logits=True
    )
    decoder = onnxruntime.InferenceSession(str(folder / DECODER))
    coords = predictor.transform.apply_coords(points, sample.image.shape[:2])
    found = decoder.run(
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
    for ours, stocks in zip(found, (expected, scores, low), strict=True):
        np.testing.assert_allclose(ours[0, 1:], stocks, atol=1e-3)


def test_both_files_say_what_they_are(folder) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([ENCODER, DECODER])
    for name in (ENCODER, DECODER):
        session = onnxruntime.InferenceSession(str(folder / name))
        said = session.get_modelmeta().custom_metadata_map
        assert said == {"model_type": "vit_tiny", "image_size": str(SIZE)}
