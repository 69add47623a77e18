"""Parameter groups, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import nn

from samft import distributed
from samft.runtime.logs import LOGGER

# Shares of the run after which the rate is divided by ten, as the documentation of `lr_schedule`
# says. SAM's own were 60,000 and 86,666 of 90,000 steps, the second a share of .963.
# Source: Kirillov et al., Segment Anything, 2023, appendix A.
MULTISTEP_SHARES = (0.66667, 0.86666)
MULTISTEP_FACTOR = 0.1


def learning_rate_factor(step: int, *, steps: int, schedule: str, warmup_steps: int) -> float:
    """The learning rate at a step, as a share of the peak.

    Args:
        step: The optimizer step about to be taken, from 0.
        steps: Optimizer steps of the whole run.
        schedule: `multistep`, `cosine` or `constant`; all begin with a linear warm-up.
        warmup_steps: Steps until the peak.

    Returns:
        A factor in 0..1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "multistep":
        return MULTISTEP_FACTOR ** sum(step >= share * steps for share in MULTISTEP_SHARES)
    return 1.0


def schedule_learning_rate(
    *, peak: float, steps: int, schedule: str, warmup_steps: int
) -> Callable[[int], float]:
    """The learning rate as a function of the step; the warm-up is at most a tenth of the run.

    Args:
        peak: The highest rate.
        steps: Optimizer steps of the whole run.
        schedule: See `learning_rate_factor`.
        warmup_steps: Steps until the peak; cut to a tenth of `steps`, with a line in the log.

    Returns:
        A function from a step, from 0, to its learning rate.
    """
    longest = steps // 10
    if warmup_steps > longest:
        LOGGER.info("warm-up: %d steps, a tenth of the run, not %d", longest, warmup_steps)
    warmup = min(warmup_steps, longest)

    def learning_rate_at(step: int) -> float:
        factor = learning_rate_factor(step, steps=steps, schedule=schedule, warmup_steps=warmup)
        return peak * factor

    return learning_rate_at


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with and without weight decay.

    Without: biases, norms, embeddings (positions, tokens, prompts), and the last layer of the IoU
    head, of which one mask reaches one row in four: decay alone would shrink the others.

    Args:
        model: A module that contains a SAM.
        weight_decay: The decay of the first group.

    Returns:
        Groups for `torch.optim.AdamW`, in the order of the module's parameters.
    """
    undecayed_ids: set[int] = set()
    for name, module in model.named_modules():
        one_row_trains = name.endswith("iou_prediction_head.layers.2")
        if isinstance(module, (nn.LayerNorm, LayerNorm2d, nn.Embedding)) or one_row_trains:
            undecayed_ids |= {id(parameter) for parameter in module.parameters()}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        position = name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w"))
        bias_or_norm = parameter.ndim <= 1
        exempt = bias_or_norm or position or id(parameter) in undecayed_ids
        (undecayed if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]


class _AdamW(torch.optim.AdamW):
    def _accelerator_graph_capture_health_check(self) -> None:
        # PyTorch asks at each step whether the GPU's stream is captured, also where nothing trained
        # is on a GPU: that would make a CUDA context on a host with GPUs, for a run on its CPU.
        if self.param_groups[0]["params"][0].device.type != "cpu":
            super()._accelerator_graph_capture_health_check()


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, sharded: bool = False
) -> torch.optim.Optimizer:
    """Fused AdamW over the trainable parameters.

    Sharded, each process keeps the two moments of its share of the parameters, updates these
    parameters and sends them to the others. The numbers are the same; the moments, 8 bytes a
    parameter, are divided by the number of processes; and as much is sent again as for gradients.
    Collective if sharded: every rank must call.

    Args:
        model: A module that contains a SAM, already on its device.
        learning_rate: Peak rate; the schedule scales it at each step.
        weight_decay: See `parameter_groups`.
        sharded: Whether to divide the state among processes, if there are several.

    Returns:
        The optimizer. The state that `gather_state` returns can be loaded sharded or not.
    """
    every_group = parameter_groups(model, weight_decay=weight_decay)
    groups = [group for group in every_group if group["params"]]
    if sharded and distributed.get_world_size() > 1:
        # Imported only here: the import is slow, and warns.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer: Any = ZeroRedundancyOptimizer(
            groups,
            optimizer_class=_AdamW,
            process_group=distributed.step_group(),
            lr=learning_rate,
            fused=True,
            parameters_as_bucket_view=True,  # each process sends one tensor, not each parameter
        )
        # The part of its step in which the parameters are exchanged.
        optimizer._sync_params = distributed.in_collective()(optimizer._sync_params)
        return optimizer
    return _AdamW(groups, lr=learning_rate, fused=True)


def gather_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer for all parameters, on rank 0. Collective: every rank must call.

    Args:
        optimizer: From `build_optimizer`.

    Returns:
        Its state dict; empty on other ranks if the state is sharded.
    """
    # Only `ZeroRedundancyOptimizer` has this method.
    consolidate = getattr(optimizer, "consolidate_state_dict", None)
    if consolidate is None:
        return optimizer.state_dict()
    with distributed.in_collective():
        consolidate(to=0)
    if not distributed.is_main():
        return {}
    device = optimizer.param_groups[0]["params"][0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # its copies to the host have only been begun
    return optimizer.state_dict()


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a state that `gather_state` returned, of any device and number of processes.

    Args:
        optimizer: From `build_optimizer`, with parameters of the same shapes in the same order.
        state: The state dict, for all parameters. A sharded optimizer takes its share and drops
            the rest from it.
    """
    optimizer.load_state_dict(state)
    shard = getattr(optimizer, "optim", None)  # only `ZeroRedundancyOptimizer` has one
    if shard is not None:
        # It has moved all counts of steps to the CPU, where fused AdamW does not look for them.
        # Optimizers know themselves where each tensor has to be.
        shard.load_state_dict(shard.state_dict())
        optimizer.state.clear()  # another copy of the shard, which nothing uses
