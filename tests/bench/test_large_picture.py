"""The benchmark of a large picture: the same masks as in windows of their own, in little memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import large_picture
from benchmarks.large_picture import TIFF_TILE, draw_discs, main, write_picture
from benchmarks.measure import run_in_fresh_process
from samft.views.regions import open_source
from samft.views.windows import View, held_shares, tile_windows

VIEW = View("tiles", tile_size=256)


def test_discs_lie_on_seams_and_do_not_touch(tmp_path: Path) -> None:
    boxes = draw_discs(1500, 300, VIEW)
    write_picture(tmp_path, 1500, boxes)
    inner = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    outer = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    overlapping = (outer > inner).all(axis=2) & ~np.eye(len(boxes), dtype=bool)
    assert not overlapping.any() and boxes.min() >= 0 and boxes.max() <= 1500
    shares = held_shares(boxes, tile_windows((1500, 1500), VIEW))
    assert ((shares > 0.1) & (shares < 0.9)).any(axis=1).sum() > 10
    image = open_source(tmp_path / "picture.tif").read(np.array([0, 0, 1500, 1500]))
    middles = ((boxes[:, :2] + boxes[:, 2:]) / 2).astype(int)
    assert (image[middles[:, 1], middles[:, 0]].min(axis=1) >= 120).all()
    assert 1500 % TIFF_TILE  # the last tiles are not full


@pytest.mark.run
def test_a_picture_of_36_million_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    peaks: list[float] = []

    def run(*arguments: str) -> Any:
        result = run_in_fresh_process(*arguments)
        assert result is not None
        peaks.append(result["gib"])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_picture, "run_in_fresh_process", run)
        main(["--side", "6000", "--objects", "150"])
    output = capsys.readouterr().out
    assert "6000 x 6000 px" in output and "150 objects" in output
    assert "equal masks, each object once" in output
    assert len(peaks) == 2 and max(peaks) < 2
