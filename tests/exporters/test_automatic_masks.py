"""Automatic masks of models that were made to find some, or none."""

import pytest
import torch
from segment_anything.modeling import Sam

from helpers.tiny_checkpoint import tiny_sam
from samft.exporters import verification
from samft.exporters.verification import compare_automatic_masks, painted_sample


@pytest.fixture(autouse=True)
def _few_points(monkeypatch) -> None:
    monkeypatch.setattr(verification, "POINTS_PER_SIDE", 4)


def finder(*, iou_predicted: float = 1.0, steepness: float = 50.0) -> Sam:
    """All masks of a point are the one that boxes get, with steep edges, and a set score."""
    sam = tiny_sam()
    decoder = sam.mask_decoder
    state = decoder.output_hypernetworks_mlps[0].state_dict()
    with torch.no_grad():
        decoder.mask_tokens.weight[1:] = decoder.mask_tokens.weight[0]
        for network in decoder.output_hypernetworks_mlps:
            network.load_state_dict(state)
            network.layers[-1].weight *= steepness
            network.layers[-1].bias *= steepness
        decoder.iou_prediction_head.layers[-1].weight.zero_()
        decoder.iou_prediction_head.layers[-1].bias.fill_(iou_predicted)
    return sam


def test_both_are_counted_and_nothing_is_said_where_both_find_some() -> None:
    found = compare_automatic_masks(finder(), finder(), painted_sample())
    assert found.tuned == found.base > 0
    assert found.complaint is None


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"iou_predicted": 0.5}, "highest predicted IoU is 0.50 (pred_iou_thresh is 0.88)"),
        ({"steepness": 0.1}, "(stability_score_thresh is 0.95)"),
    ],
)
def test_a_tuned_model_that_finds_nothing_is_complained_about(broken, said: str) -> None:
    found = compare_automatic_masks(finder(**broken), finder(), painted_sample())
    assert found.tuned == 0 < found.base
    assert f"finds NOTHING in the built-in picture with the tuned model, and {found.base}" in (
        found.complaint
    )
    assert said in found.complaint


def test_it_is_no_loss_where_the_base_found_nothing_either_or_is_not_known() -> None:
    nothing = finder(iou_predicted=0.5)
    found = compare_automatic_masks(nothing, nothing, painted_sample())
    assert (found.tuned, found.base, found.complaint) == (0, 0, None)
    found = compare_automatic_masks(nothing, None, painted_sample())
    assert (found.tuned, found.base, found.complaint) == (0, None, None)
