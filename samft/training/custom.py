"""What a caller of `samft.finetune` brings along: own data, loss, metrics and callbacks."""

import ast
import hashlib
import inspect
import re
import textwrap
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property, partial
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samft import distributed
from samft.data.map_style import MapStyleDataset
from samft.errors import ConfigError
from samft.runtime.metrics_file import GENERAL_PREFIX
from samft.training.losses import LossFunction, MaskLosses

# (mask, truth), bool [H, W] each, in the pixels of the original image, to a number.
MaskMetric = Callable[[NDArray[np.bool_], NDArray[np.bool_]], float]
# (step, the numbers of its lines in metrics.jsonl, named `train/loss`, `val/per_mask_iou`, ...) to
# True, which ends the run, or anything else.
Callback = Callable[[int, dict[str, float]], Any]
# What samft's own lines have, which another metric must not hide.
_TAKEN_NAMES = frozenset(
    """step split loss loss_focal loss_dice loss_iou per_mask_iou iou_predicted box_fill_iou lr
    images_per_second masks_per_second peak_memory_gib skipped_steps""".split()
)
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class CustomParts:
    """The parts of a run that its caller brings along; without any, it is samft's own.

    Attributes:
        train_data: Instead of the configuration's training split.
        val_data: Instead of its validation split.
        loss: Instead of `losses.mask_losses`; returns a `MaskLosses`.
        metrics: By name: a number for each mask, whose mean is logged at each validation.
        callbacks: Called on rank 0 after each validation.
    """

    train_data: MapStyleDataset | None = None
    val_data: MapStyleDataset | None = None
    loss: LossFunction | None = None
    metrics: Mapping[str, MaskMetric] = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()

    @property
    def datasets(self) -> dict[str, MapStyleDataset]:
        """The datasets that are given, by split."""
        given = {"train": self.train_data, "val": self.val_data}
        return {split: dataset for split, dataset in given.items() if dataset is not None}

    @cached_property
    def loss_name(self) -> str | None:
        """See `describe_function`; None for samft's own loss."""
        return None if self.loss is None else describe_function(self.loss)

    @property
    def has_any(self) -> bool:
        """Whether anything is brought along, so that no command can repeat the run."""
        return any((self.datasets, self.loss, self.metrics, self.callbacks))

    def check_agreement(self) -> None:
        """Checks that all ranks have brought the same along. Collective: every rank must call.

        Raises:
            ConfigError: They have not.
        """
        names = list(self.datasets), list(self.metrics)
        brought = (*names, self.loss_name, len(self.callbacks))
        if any(other != brought for other in distributed.all_gather(brought)):
            raise ConfigError(
                "the processes call finetune with different data, losses, metrics or callbacks: "
                "let all of them run the same program."
            )

    def check(self) -> list[str]:
        """All problems, one sentence each."""
        problems: list[str] = []
        if self.loss is not None and not callable(self.loss):
            problems.append(f"loss: {type(self.loss).__name__} is not callable.")
        if not isinstance(self.metrics, Mapping):
            return [*problems, "metrics: give a dictionary of functions by name."]
        if not isinstance(self.callbacks, (list, tuple)):
            return [*problems, "callbacks: give a list of functions."]
        for name, metric in self.metrics.items():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name):
                problems.append(f"metrics: {name!r} is no name such as 'dice_2'.")
            elif name.removeprefix(GENERAL_PREFIX) in {
                *_TAKEN_NAMES,
                *(set(self.metrics) - {name}),
            }:
                problems.append(f"metrics: '{name}' is a number of samft's own: choose another.")
            if not callable(metric):
                problems.append(f"metrics: {name!r} is not callable.")
        for callback in self.callbacks:
            if not callable(callback):
                problems.append(f"callbacks: {type(callback).__name__} is not callable.")
        return problems


@dataclass(frozen=True)
class CheckedLoss:
    """A caller's loss: computed in float32 whatever autocast does, and checked at each call.

    Attributes:
        function: Takes what `losses.mask_losses` takes, without the weights.
    """

    function: LossFunction

    def __call__(self, mask_logits: Tensor, iou_predicted: Tensor, **truth: Tensor) -> MaskLosses:
        """See `losses.mask_losses`.

        Raises:
            ConfigError: The function returns anything but one number of each loss for each mask.
        """
        with torch.autocast(mask_logits.device.type, enabled=False):
            losses = self.function(mask_logits.float(), iou_predicted.float(), **truth)
        if not isinstance(losses, MaskLosses):
            kind = type(losses).__name__
            raise ConfigError(f"loss: returned {kind}, not samft.training.losses.MaskLosses.")
        for name, values in losses._asdict().items():
            shape = getattr(values, "shape", None)
            if shape != mask_logits.shape[:1]:
                given = type(values).__name__ if shape is None else list(shape)
                raise ConfigError(
                    f"loss: {name} is {given}, not a tensor [{len(mask_logits)}]: one number for "
                    "each mask, which samft sums and divides by the masks of the whole step."
                )
        if torch.is_grad_enabled() and mask_logits.requires_grad > losses.total.requires_grad:
            raise ConfigError("loss: total has no gradient, so nothing would be learnt.")
        total, *others = (values.float() for values in losses)
        return MaskLosses(total, *(values.detach() for values in others))


def describe_function(function: Callable[..., Any]) -> str:
    """A name for what a function computes, which changes when its code or its settings do.

    Its qualified name, and a hash of its source without comments, of the functions of the same
    module that it calls, and of the values that both use: defaults, constants, variables around
    them, arguments of a `partial`, attributes of an object. What comes from other modules is not
    looked at.

    Args:
        function: A function, method, `partial`, or an object that is callable.

    Example:
        >>> half, third = (partial(pow, 2, exponent) for exponent in (1 / 2, 1 / 3))
        >>> describe_function(half).split()[0], describe_function(half) == describe_function(third)
        ('pow', False)
    """
    named = function
    while isinstance(named, partial):
        named = named.func
    name = getattr(named, "__qualname__", type(named).__qualname__)
    digest = hashlib.sha256(_describe_value(function, known=set()).encode())
    return f"{name} {digest.hexdigest()[:12]}"


def _describe_value(value: Any, *, known: set[int]) -> str:
    # As text, the same in each process; `known` ends circles.
    if isinstance(value, _PLAIN):
        return repr(value)
    if id(value) in known:
        return "again"
    known = known | {id(value)}
    describe = partial(_describe_value, known=known)
    if isinstance(value, (list, tuple)):
        return str([describe(one) for one in value])
    if isinstance(value, Mapping):
        return str(sorted((str(key), describe(one)) for key, one in value.items()))
    if isinstance(value, (Tensor, np.ndarray)):
        values = np.asarray(torch.as_tensor(value).detach().cpu())
        return f"{values.dtype}{values.shape}{hashlib.sha256(values.tobytes()).hexdigest()}"
    if inspect.isclass(value) or inspect.isbuiltin(value) or inspect.ismodule(value):
        return str(getattr(value, "__qualname__", value.__name__))
    return describe(_parts_of(value))


def _parts_of(value: Any) -> list[Any]:
    # What decides on the results of something that is callable, or of any other object.
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if inspect.isfunction(value):
        return [_source_of(value), _values_used_by(value)]
    # Of other objects only those that are settings: a logger, say, changes while a program runs.
    is_setting = is_dataclass(value) or isinstance(value, (SimpleNamespace, Namespace))
    attributes = getattr(value, "__dict__", {}) if callable(value) or is_setting else {}
    return [_source_of(type(value)), attributes]


def _source_of(value: Any) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):  # written at a prompt, or in C
        code = getattr(value, "__code__", None)
        if code is None:
            return str(value.__qualname__)
        constants = [one for one in code.co_consts if isinstance(one, _PLAIN)]
        return f"{code.co_code.hex()} {constants}"
    try:
        return ast.unparse(ast.parse(source))  # without comments
    except SyntaxError:  # a lambda, cut out of its statement
        return source


def _values_used_by(function: Any) -> list[Any]:
    try:
        used = inspect.getclosurevars(function)
    except ValueError:  # a variable around it has no value yet
        return [function.__defaults__, function.__kwdefaults__]
    own = {
        name: value
        for name, value in used.globals.items()
        if not inspect.isroutine(value) or value.__module__ == function.__module__
    }
    return [function.__defaults__, function.__kwdefaults__, used.nonlocals, own]
