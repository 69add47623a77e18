"""Masks equal `SamPredictor`'s; each image is encoded once; reading ahead is bounded."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from helpers.coco_files import write_coco
from samft.annotations.segmentation import CroppedMask
from samft.errors import TrainingError
from samft.images.decoder import read_image
from samft.images.files import ImageError
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam, load_sam, load_state, open_checkpoint, read_state
from samft.prediction.inputs import PredictionTask, build_task
from samft.prediction.predictors import (
    AutomaticPredictor,
    BoxPredictor,
    PredictedMask,
    PreparedImage,
    map_in_threads,
    predict_images,
)
from samft.weights.download import PACKAGED_TINY

slow = pytest.mark.skipif(not os.environ.get("SAMFT_SLOW"), reason="slow: set SAMFT_SLOW=1")


def on_canvas(crop: CroppedMask, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, bool)
    height, width = crop.mask.shape
    mask[crop.top : crop.top + height, crop.left : crop.left + width] = crop.mask
    return mask


def checkpoint(folder: Path, image_size: int) -> Path:
    """The packaged weights as a checkpoint of another image size."""
    sam = build_sam("vit_tiny", image_size)
    load_state(sam, read_state(PACKAGED_TINY))
    path = folder / f"{image_size}.pth"
    torch.save(sam.state_dict(), path)
    return path


def predictor_of(path: Path) -> BoxPredictor:
    sam, *_, resize_mode = open_checkpoint(path, attention="fast")
    return BoxPredictor(PromptedSam(sam), resize_mode=resize_mode)


def compare_with_stock(
    path: Path, task: PredictionTask, rows: list[int]
) -> tuple[float, int, float]:
    """Share of equal pixels, of the worst image; masks compared; largest difference of scores."""
    stock = SamPredictor(load_sam(path))
    inputs = inputs_of(task, rows)
    shares, count, gap = [], 0, 0.0
    for (image, boxes), masks_of_image in zip(
        inputs, predict(predictor_of(path), inputs), strict=True
    ):
        stock.set_image(read_image(image))
        equal = []
        for box, predicted in zip(boxes, masks_of_image, strict=True):
            masks, scores, _ = stock.predict(box=box, multimask_output=False)
            equal.append((on_canvas(predicted.mask, masks[0].shape) == masks[0]).mean())
            gap = max(gap, abs(predicted.iou_predicted - float(scores[0])))
        shares.append(float(np.mean(equal)))
        count += len(equal)
    return min(shares), count, gap


def inputs_of(task: PredictionTask, rows: list[int]) -> list[tuple[Path, np.ndarray]]:
    return [(task.images.paths[row], task.boxes_of(row)) for row in rows]


def predict(
    predictor: BoxPredictor, inputs: list[tuple[Path, np.ndarray]], *, num_workers: int = 1
) -> Iterator[list[PredictedMask]]:
    """The masks of each image; no image may be broken."""
    for masks in predict_images(predictor, inputs, take_all, num_workers=num_workers):
        assert not isinstance(masks, ImageError)
        yield masks


def take_all(
    k: int, prepared: PreparedImage, masks: Iterator[PredictedMask]
) -> list[PredictedMask]:
    return list(masks)


COCO = ("coco_open104/val2017", "coco_open104/annotations/instances_val2017.json")
FLAKES = ("hbn_flakes/valid", "hbn_flakes/valid/_annotations.coco.json")


@pytest.mark.parametrize(
    ("data", "image_size", "num_images"),
    [
        (COCO, 256, 1),
        (FLAKES, 256, 1),
        (COCO, 1024, 1),
        pytest.param(COCO, 256, 20, marks=slow),
        pytest.param(FLAKES, 256, 20, marks=slow),
        pytest.param(COCO, 1024, 20, marks=slow),
        pytest.param(FLAKES, 1024, 20, marks=slow),
    ],
)
def test_masks_of_real_images_equal_sam_predictors(
    data_root: Path, tmp_path: Path, data: tuple[str, str], image_size: int, num_images: int
) -> None:
    folder, annotations = data
    task = build_task([data_root / folder], annotations=data_root / annotations)
    # In a quick test the image of fewest objects; a slow one takes images from all over.
    few = sorted(task.rows, key=lambda row: len(task.boxes_of(row)))
    spread = np.linspace(0, len(task.rows) - 1, num_images).astype(int)
    rows = few[:1] if num_images == 1 else [task.rows[k] for k in spread]
    share, count, gap = compare_with_stock(checkpoint(tmp_path, image_size), task, rows)
    print(f"\n{folder} {image_size} px: {num_images} images, {count} masks: {share:.7f}, {gap:.2g}")
    assert share >= 0.999
    assert gap < 1e-3


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> PredictionTask:
    """Five small images with 1, 4, 2, 7, 3 boxes."""
    annotations = write_coco(tmp_path_factory.mktemp("data"), 5)
    return build_task([annotations.parent], annotations=annotations)


@pytest.fixture(scope="module")
def tiny() -> BoxPredictor:
    return predictor_of(PACKAGED_TINY)


def test_masks_equal_sam_predictors_for_any_chunk_size(drawn: PredictionTask) -> None:
    with mock.patch("samft.prediction.predictors.MASK_CHUNK", 3):
        share, count, gap = compare_with_stock(PACKAGED_TINY, drawn, drawn.rows)
    assert (count, share >= 0.999, gap < 1e-4) == (17, True, True)


def test_a_predictor_leaves_its_model_as_it_was(tiny: BoxPredictor) -> None:
    assert tiny.model.mask_chunk is None and tiny.mask_chunk == 2**20 // (16 * 16 * 128)
    model = PromptedSam(tiny.model.sam, mask_chunk=3)
    assert BoxPredictor(model).mask_chunk is None and model.boxes_at_once() == 3
    assert BoxPredictor(model, mask_chunk=5).mask_chunk == 5


def test_each_image_is_encoded_once(drawn: PredictionTask, tiny: BoxPredictor) -> None:
    encoder = tiny.model.sam.image_encoder
    with mock.patch.object(encoder, "forward", wraps=encoder.forward) as encode:
        counts = [
            len(masks) for masks in predict(tiny, inputs_of(drawn, drawn.rows), num_workers=0)
        ]
    assert counts == [1, 4, 2, 7, 3]
    assert encode.call_count == 5


def test_images_predicted_in_parallel_have_the_same_masks(
    drawn: PredictionTask, tiny: BoxPredictor
) -> None:
    inputs = inputs_of(drawn, drawn.rows)
    alone = list(predict(tiny, inputs, num_workers=0))
    names, counts = set(), set()

    def finish(k: int, prepared: PreparedImage, masks: Iterator[PredictedMask]) -> object:
        names.add(threading.current_thread().name)
        counts.add(torch.get_num_threads())
        return [(one.mask.mask.tobytes(), one.iou_predicted) for one in masks]

    torch.set_num_threads(4)
    try:
        parallel = list(predict_images(tiny, inputs, finish, num_workers=4))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)
    assert threading.current_thread().name not in names and len(names) <= 2
    assert counts == {2}
    for one, masks in zip(parallel, alone, strict=True):
        assert [mask for mask, _ in one] == [mask.mask.mask.tobytes() for mask in masks]
        scores = [mask.iou_predicted for mask in masks]
        assert [score for _, score in one] == pytest.approx(scores, abs=1e-5)


def test_squash_resizes_as_in_training(drawn: PredictionTask, tiny: BoxPredictor) -> None:
    squashing = BoxPredictor(tiny.model, resize_mode="squash")
    image = read_image(drawn.images.paths[0])
    assert image.shape[:2] == (48, 64)
    frame = squashing.prepare(image).frame
    assert frame is not None and frame.input_size == (256, 256)


def test_bf16_gives_nearly_the_same_masks(drawn: PredictionTask, tiny: BoxPredictor) -> None:
    half = BoxPredictor(tiny.model, amp_dtype=torch.bfloat16)
    prepared = tiny.prepare(read_image(drawn.images.paths[3]))
    boxes = drawn.boxes_of(3)
    pairs = zip(tiny.predict(prepared, boxes), half.predict(prepared, boxes), strict=True)
    scores = []
    for exact, rough in pairs:
        ours, theirs = (on_canvas(one.mask, prepared.size) for one in (exact, rough))
        assert (ours == theirs).mean() > 0.95
        scores.append((exact.iou_predicted, rough.iou_predicted))
    assert any(one != other for one, other in scores)  # or it was not bfloat16


def test_a_truncated_image_yields_its_error(
    drawn: PredictionTask, tiny: BoxPredictor, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(drawn.images.paths[0].read_bytes()[:200])
    good = inputs_of(drawn, drawn.rows)
    inputs = [good[0], (broken, np.zeros((0, 4))), good[1]]
    results = list(predict_images(tiny, inputs, take_all, num_workers=2))
    assert [isinstance(one, ImageError) for one in results] == [False, True, False]


def test_out_of_memory_names_the_image(drawn: PredictionTask, tiny: BoxPredictor) -> None:
    with mock.patch.object(tiny.model, "decode", side_effect=torch.OutOfMemoryError):
        with pytest.raises(TrainingError, match=r"not enough memory for .*image_0.png"):
            list(predict(tiny, inputs_of(drawn, [0])))


def test_reading_ahead_is_bounded_by_the_number_of_threads() -> None:
    loading = threading.Semaphore(0)
    started: list[int] = []

    def load(item: int) -> int:
        started.append(item)
        loading.release()
        return item * item

    results: Iterator[int] = map_in_threads(load, range(50), num_workers=3)
    for k in range(50):
        assert next(results) == k * k
        for _ in range(4 if k == 0 else int(k < 47)):
            assert loading.acquire(timeout=30)
        assert len(started) == min(k + 4, 50)


def test_an_exception_in_a_thread_is_raised() -> None:
    def load(item: int) -> int:
        return 1 // item

    results = map_in_threads(load, [1, 0], num_workers=1)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_automatic_masks_equal_the_generators(drawn: PredictionTask, tiny: BoxPredictor) -> None:
    # The tiny model's heads for points are not trained: with stock's thresholds nothing is left.
    options = {"points_per_side": 3, "pred_iou_thresh": -10.0, "stability_score_thresh": 0.0}
    automatic = AutomaticPredictor(tiny.model, **options)
    image = read_image(drawn.images.paths[3])
    expected = automatic.generator.generate(image)
    masks = list(automatic.predict(automatic.prepare(image), np.zeros((0, 4))))
    assert len(masks) == len(expected) > 0
    for one, stock in zip(masks, expected, strict=True):
        assert int(one.mask.mask.sum()) == stock["area"]
        assert one.iou_predicted == stock["predicted_iou"]
        assert one.extra_fields == {"stability_score": stock["stability_score"]}
        x0, y0, x1, y1 = one.box_original
        assert [x0, y0, x1 - x0, y1 - y0] == stock["bbox"]
