"""`sam_model_registry` reads a .pth; safetensors keep every bit."""

from pathlib import Path

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.build_sam import _build_sam
from segment_anything.modeling import Sam

from helpers.tiny_checkpoint import tiny_sam
from samft.exporters.verification import bitwise_equal
from samft.exporters.weight_files import read_pth, write_pth, write_safetensors
from samft.models.sam import load_sam


def test_a_pth_holds_sams_own_keys_and_the_stock_builder_reads_it(tmp_path) -> None:
    # Stock's builder for one narrow block: what it reads at 1024 px is what Meta's types read.
    def stock(checkpoint: Path | None = None) -> Sam:
        return _build_sam(32, 1, 2, [0], checkpoint=checkpoint)

    torch.manual_seed(3)
    sam = stock()
    path = tmp_path / "a.pth"
    write_pth(sam, path)
    state = torch.load(path, weights_only=True)
    assert list(state) == list(sam.state_dict())
    assert bitwise_equal(stock(checkpoint=path).state_dict(), state)


def test_a_pth_is_read_again_by_the_registry(tmp_path, monkeypatch) -> None:
    calls = []

    def builder(checkpoint: Path) -> Sam:
        calls.append(checkpoint)
        return load_sam(checkpoint)

    path = tmp_path / "a.pth"
    write_pth(tiny_sam(), path)
    assert bitwise_equal(read_pth(path).state_dict(), tiny_sam().state_dict())
    assert not calls  # the registry does not know vit_tiny
    monkeypatch.setitem(sam_model_registry, "vit_tiny", builder)
    assert bitwise_equal(read_pth(path).state_dict(), tiny_sam().state_dict())
    assert calls == [path]


def test_safetensors_keep_every_bit_and_the_metadata(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors")
    path, sam = tmp_path / "a.safetensors", tiny_sam()
    with torch.no_grad():  # numbers that text or rounding would lose
        sam.mask_decoder.iou_token.weight[0, :3] = torch.tensor([1e-42, -0.0, 1 / 3])
    write_safetensors(sam, path, {"model_type": "vit_tiny", "step": "30"})
    assert bitwise_equal(load_sam(path).state_dict(), sam.state_dict())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "model_type": "vit_tiny", "step": "30"}


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(OSError, match="No such file"):
        write_safetensors(tiny_sam(), tmp_path / "absent" / "a.safetensors", {})
