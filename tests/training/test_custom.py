"""What a caller brings along is checked, and a loss is told from another one."""

import importlib.util
import logging
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from samft.errors import ConfigError
from samft.training.custom import CheckedLoss, CustomParts, describe_function
from samft.training.losses import MaskLosses

SOURCE = '''
import numpy as np

ALPHA = 0.7


def power(x):
    return x ** 2


def loss(x, beta=0.5):
    """Of x."""
    # A comment.
    return ALPHA * power(x) + beta * np.abs(x)


def make(gamma):
    def inner(x):
        return gamma * x

    return inner


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return self.weight * x

    def method(self, x):
        return x
'''


def module_of(source: str, folder: Path) -> ModuleType:
    path = folder / f"losses_{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("losses", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What is changed in the source, and whether that makes `loss` another one.
CHANGES = [
    ("# A comment.", "# Another comment,\n    # of two lines.", False),
    ("return ALPHA * power(x) +", "return (ALPHA * power(x)) +", False),
    ("gamma * x", "gamma + x", False),  # of another function
    ("return ALPHA *", "return 2 * ALPHA *", True),
    ("ALPHA = 0.7", "ALPHA = 0.6", True),
    ("beta=0.5", "beta=0.4", True),
    ("x ** 2", "x ** 3", True),
    ("def loss(", "def other(x):\n    return x\n\n\ndef loss(", False),
]


@pytest.mark.parametrize(("before", "after", "differs"), CHANGES)
def test_a_loss_is_known_by_its_code_and_constants(tmp_path, before, after, differs) -> None:
    assert before in SOURCE
    ours = describe_function(module_of(SOURCE, tmp_path).loss)
    theirs = describe_function(module_of(SOURCE.replace(before, after), tmp_path).loss)
    assert ours.startswith("loss ") and (ours != theirs) == differs


def test_a_loss_is_known_by_what_it_was_made_with(tmp_path) -> None:
    module = module_of(SOURCE, tmp_path)
    again = module_of(SOURCE, tmp_path)
    makers: list[Callable[[ModuleType, Any], Any]] = [
        lambda m, value: m.make(value),
        lambda m, value: partial(m.loss, beta=value),
        lambda m, value: m.Weighted(value),
        lambda m, value: m.Weighted(value).method,
        lambda m, value: m.Weighted(torch.tensor([value])),
        lambda m, value: m.Weighted({"a": [np.array(value)]}),
        lambda m, value: m.Weighted(Namespace(alpha=value)),
        lambda m, value: m.Weighted(torch.nn.Threshold(0.5, value)),
    ]
    for make in makers:
        assert describe_function(make(module, 1.5)) == describe_function(make(again, 1.5))
        assert describe_function(make(module, 1.5)) != describe_function(make(module, 2.5))
    assert describe_function(makers[0](module, 1)).startswith("make.<locals>.inner ")


def test_what_changes_while_a_program_runs_makes_no_other_loss(tmp_path) -> None:
    module, logger = module_of(SOURCE, tmp_path), logging.getLogger("losses")
    before = describe_function(module.Weighted(logger))
    logger.addHandler(logging.NullHandler())
    logger.setLevel(3)
    assert describe_function(module.Weighted(logger)) == before


def test_a_function_that_refers_to_itself_and_one_without_source_have_names() -> None:
    def outer(x):
        return outer(x - 1) if x else 0

    assert " " in describe_function(outer)
    names: dict[str, Any] = {}
    exec("one = lambda x: x + 1\ntwo = lambda x: x + 2\nthree = lambda x: x + 1", names)
    one, two, three = (describe_function(names[name]) for name in ("one", "two", "three"))
    assert one == three != two


PROBLEMS = [
    ({"loss": 3}, "loss: int is not callable."),
    ({"metrics": {"per_mask_iou": max}}, "metrics: 'per_mask_iou' is a number of samft's own"),
    ({"metrics": {"general_loss": max}}, "metrics: 'general_loss' is a number of samft's own"),
    ({"metrics": {"dice": max, "general_dice": max}}, "metrics: 'general_dice' is a number of"),
    ({"metrics": {"a b": max}}, "metrics: 'a b' is no name such as 'dice_2'."),
    ({"metrics": {"dice": None}}, "metrics: 'dice' is not callable."),
    ({"callbacks": [max, "x"]}, "callbacks: str is not callable."),
    ({"callbacks": max}, "callbacks: give a list of functions."),
    ({"metrics": [max]}, "metrics: give a dictionary of functions by name."),
]


@pytest.mark.parametrize(("parts", "problem"), PROBLEMS)
def test_what_cannot_be_called_is_named(parts: dict[str, Any], problem: str) -> None:
    assert [one[: len(problem)] for one in CustomParts(**parts).check()] == [problem]


def losses_of(logits: torch.Tensor, **changes: Any) -> MaskLosses:
    values = logits.mean((1, 2))
    return MaskLosses(values, values, values, values, values)._replace(**changes)


def test_a_loss_is_computed_in_float32_and_only_its_total_has_a_gradient() -> None:
    seen = []

    def loss(logits, iou, **truth):
        seen.extend([logits.dtype, iou.dtype, (logits @ logits).dtype])
        return losses_of(logits)

    logits = torch.ones(2, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = CheckedLoss(loss)(logits, torch.ones(2, dtype=torch.bfloat16))
    assert seen == [torch.float32] * 3
    assert [one.requires_grad for one in losses] == [True, False, False, False, False]
    losses.total.sum().backward()
    assert torch.equal(logits.grad, torch.full_like(logits, 1 / 16))


WRONG_LOSSES = [
    (lambda logits: logits.mean(), "loss: returned Tensor, not samft.training.losses.MaskLosses."),
    (
        lambda logits: losses_of(logits, total=logits.mean()),
        "loss: total is [], not a tensor [2]: one number for each mask",
    ),
    (lambda logits: losses_of(logits, dice=0.0), "loss: dice is float, not a tensor [2]"),
    (lambda logits: losses_of(logits.detach()), "loss: total has no gradient"),
]


@pytest.mark.parametrize(("loss", "message"), WRONG_LOSSES, ids=["mean", "scalar", "float", "no"])
def test_a_loss_of_another_shape_is_refused(loss, message: str) -> None:
    logits = torch.ones(2, 4, 4, requires_grad=True)
    with pytest.raises(ConfigError) as failure:
        CheckedLoss(lambda logits, iou, **truth: loss(logits))(logits, torch.ones(2))
    assert message in str(failure.value)
