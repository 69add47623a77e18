"""The benchmark of `samft.predict` runs, and does not take other masks for equal ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from benchmarks.predict import least_equal, main

pytestmark = pytest.mark.run


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--images", "4", "--boxes", "3", "--parts", "2", "--image_size", "64"]
    main([*words, "--no_memory"])
    said = capsys.readouterr().out
    assert "4 images x 3 boxes at 64 px, in 2 parts" in said
    lines = [line for line in said.splitlines() if line.startswith(("| wall", "| core"))]
    assert [line.split("|")[2].strip() for line in lines] == ["stock", "samft"] * 2


def rle(mask: np.ndarray) -> Any:
    return mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))


def test_masks_that_differ_are_refused(tmp_path: Path) -> None:
    mask = np.zeros((20, 100), bool)
    mask[5:15, 20:50] = True
    other = mask.copy()
    other[0, 0] = True
    result = rle(mask)
    result["counts"] = result["counts"].decode()
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 1, "segmentation": result}]))
    assert least_equal(path, {1: [rle(mask)]}) == 1
    assert least_equal(path, {1: [rle(other)]}) == 1 - 1 / 2000
    with pytest.raises(ValueError, match="agree on 0.85000"):
        least_equal(path, {1: [rle(np.zeros_like(mask))]})
    with pytest.raises(ValueError, match="not the same masks"):
        least_equal(path, {1: [rle(mask)] * 2})
