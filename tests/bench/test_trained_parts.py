"""The benchmark of what is trained: which weights, and from where a step begins."""

import pytest
import torch

from benchmarks.trained_parts import CHOICES, DECODER, LORA, build_model, measure_choice
from benchmarks.variants import Workload

TINY = Workload("vit_tiny", 64, 1, 2, frozen=False, device=torch.device("cpu"))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_trains_its_part_of_the_encoder_and_begins_after_what_is_frozen(
    choice: str,
) -> None:
    model = build_model(TINY, choice)
    num_blocks = len(model.sam.image_encoder.blocks)
    trained = {
        int(name.split(".")[1])
        for name, weight in model.sam.image_encoder.named_parameters()
        if name.startswith("blocks.") and weight.requires_grad
    }
    last = {DECODER: 0, "last block": 1, "last 3": 3, "last 6": 6}.get(choice, num_blocks)
    assert trained == set(range(num_blocks - min(last, num_blocks), num_blocks))
    # LoRA freezes what comes before the first block, the patch embedding, which is cached too.
    assert (model.frozen_shape is None) == (choice == "everything")


def test_a_measurement_has_each_step_after_the_first() -> None:
    result = measure_choice(TINY, LORA, steps=2)

    assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0
    assert 0 < result["trained"] < 0.1
