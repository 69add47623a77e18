"""100 hostile checkpoints: a model or a sentence, in little time and memory, and no traceback."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.hostile_checkpoints import MAKERS, make_hostile, open_in_child
from helpers.short_runs import COMMAND_SECONDS
from samft.models.sam import build_sam

pytestmark = pytest.mark.chaos
MAX_GROWTH = 500 << 20


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(4)
    return dict(build_sam("vit_tiny", 64).state_dict())


@pytest.mark.filterwarnings("ignore")  # of torch, that sparse and quantised tensors are prototypes
@pytest.mark.parametrize("number", range(sum(count for _, count in MAKERS)))
def test_a_hostile_checkpoint_is_a_model_or_a_sentence(
    number: int, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = make_hostile(number, state, tmp_path)
    code, output, grown = open_in_child(path, tmp_path, COMMAND_SECONDS)
    assert code in (0, 2), (code, output)
    assert "Traceback" not in output
    assert output.count("error: ") == (code == 2), output
    assert all(c.isprintable() or c == "\n" for c in output), ascii(output)
    assert grown < MAX_GROWTH, f"{grown:,} bytes more"
