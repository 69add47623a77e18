"""The benchmark of `samft.predict` runs, and refuses masks that differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from benchmarks.predict import lowest_agreement, main

pytestmark = pytest.mark.run


def test_the_benchmark_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--images", "4", "--boxes", "3", "--parts", "2", "--image_size", "64"]
    main([*flags, "--no_memory"])
    output = capsys.readouterr().out
    assert "4 images x 3 boxes at 64 px, in 2 parts" in output
    lines = [line for line in output.splitlines() if line.startswith(("| wall", "| CPU"))]
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
    assert lowest_agreement(path, {1: [rle(mask)]}) == 1
    assert lowest_agreement(path, {1: [rle(other)]}) == 1 - 1 / 2000
    with pytest.raises(ValueError, match="agree on only 0.85000"):
        lowest_agreement(path, {1: [rle(np.zeros_like(mask))]})
    with pytest.raises(ValueError, match="the numbers of masks differ"):
        lowest_agreement(path, {1: [rle(mask)] * 2})
