"""Parameter groups, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Callable
from typing import Any, cast

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


def learning_rate_factor(
    step: int, *, steps: int, schedule: str, warmup_steps: int, decay_fraction: float = 0.2
) -> float:
    """The learning rate at a step, as a share of the peak.

    Args:
        step: The optimizer step about to be taken, from 0.
        steps: Optimizer steps of the whole run.
        schedule: `multistep`, `cosine`, `wsd` (warm-up, stable, decay) or `constant`; all begin
            with a linear warm-up.
        warmup_steps: Steps until the peak.
        decay_fraction: Of `wsd`, the share of the steps, at the end, in which the rate falls
            linearly to zero.

    Returns:
        A factor in 0..1.

    Source: `wsd` from Hu et al., MiniCPM, arXiv:2404.06395, section 4; that a fifth of the steps is
    enough for its decay, and linear, from Hägele et al., Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations, arXiv:2405.18392, section 4.

    Example:
        >>> of_run = {"steps": 100, "schedule": "cosine", "warmup_steps": 10}
        >>> [learning_rate_factor(step, **of_run) for step in (0, 10, 55, 100)]
        [0.1, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "multistep":
        return MULTISTEP_FACTOR ** sum(step >= share * steps for share in MULTISTEP_SHARES)
    if schedule == "wsd":
        return min(1.0, (steps - step) / (decay_fraction * steps))
    return 1.0


def cut_warmup(warmup_steps: int, *, steps: int) -> int:
    """The steps of the warm-up: as many as are asked for, but at most a tenth of the run."""
    return min(warmup_steps, steps // 10)


def schedule_learning_rate(
    *,
    peak: float,
    steps: int,
    schedule: str,
    warmup_steps: int,
    decay_fraction: float = 0.2,
) -> Callable[[int], float]:
    """The learning rate as a function of the step; the warm-up is at most a tenth of the run.

    Args:
        peak: The highest rate.
        steps: Optimizer steps of the whole run.
        schedule: See `learning_rate_factor`.
        warmup_steps: Steps until the peak; cut to a tenth of `steps`, with a line in the log.
        decay_fraction: See `learning_rate_factor`.

    Returns:
        A function from a step, from 0, to its learning rate.
    """
    warmup = cut_warmup(warmup_steps, steps=steps)
    if warmup < warmup_steps:
        LOGGER.info("warm-up: %d steps, a tenth of the run, not %d", warmup, warmup_steps)

    def learning_rate_at(step: int) -> float:
        factor = learning_rate_factor(
            step,
            steps=steps,
            schedule=schedule,
            warmup_steps=warmup,
            decay_fraction=decay_fraction,
        )
        return peak * factor

    return learning_rate_at


def encoder_rate_factor(name: str, *, num_blocks: int, layer_decay: float) -> float:
    """The learning rate of a parameter of the image encoder, as a share of the encoder's.

    The neck has the whole rate, the last block d of it, the one before d^2, and what comes before
    the n blocks d^(n + 1).

    Args:
        name: Within the encoder, such as `blocks.3.norm1.weight`.
        num_blocks: n.
        layer_decay: d.

    Source: Clark et al., ELECTRA, 2020, section 3.1; SAM 2 is fine-tuned with d = 0.9
    (`sam2.1_hiera_b+_MOSE_finetune.yaml` of its repository).
    """
    part, number, *_ = [*name.split("."), ""]
    if part == "neck":
        return 1.0
    depth = int(number) if part == "blocks" else -1
    return float(layer_decay ** (num_blocks - depth))


def _rate_factors(
    model: nn.Module, *, encoder_factor: float, layer_decay: float
) -> dict[int, float]:
    # By the id of a parameter; those whose factor is 1 may be missing.
    factors: dict[int, float] = {}
    for name, module in model.named_modules():
        if name.endswith("image_encoder") and (encoder_factor, layer_decay) != (1, 1):
            num_blocks = len(cast(Any, module).blocks)
            for own_name, parameter in module.named_parameters():
                factor = encoder_rate_factor(
                    own_name, num_blocks=num_blocks, layer_decay=layer_decay
                )
                factors[id(parameter)] = encoder_factor * factor
    return factors


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    encoder_factor: float = 1.0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Trainable parameters in groups of one rate: each with and without weight decay.

    Without: biases, norms, embeddings (positions, tokens, prompts), and the last layer of the IoU
    head, of which one mask reaches one row in four: decay alone would shrink the others.

    Args:
        model: A module that contains a SAM.
        weight_decay: The decay of the parameters that have one.
        encoder_factor: The image encoder's learning rate, as a share of the others'.
        layer_decay: See `encoder_rate_factor`.

    Returns:
        Groups for `torch.optim.AdamW`, in the order of the module's parameters; where rates differ,
        those of the highest first, with their share of the rate as `lr_factor`.
    """
    factors = _rate_factors(model, encoder_factor=encoder_factor, layer_decay=layer_decay)
    undecayed_ids: set[int] = set()
    for name, module in model.named_modules():
        one_row_trains = name.endswith("iou_prediction_head.layers.2")
        if isinstance(module, (nn.LayerNorm, LayerNorm2d, nn.Embedding)) or one_row_trains:
            undecayed_ids |= {id(parameter) for parameter in module.parameters()}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        position = name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w"))
        bias_or_norm = parameter.ndim <= 1
        exempt = bias_or_norm or position or id(parameter) in undecayed_ids
        key = factors.get(id(parameter), 1.0), not exempt
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        | ({"lr_factor": factor} if factors else {})
        for (factor, decays), parameters in sorted(groups.items(), key=_highest_rate_first)
    ]


def _highest_rate_first(group: tuple[tuple[float, bool], Any]) -> tuple[float, bool]:
    (factor, decays), _ = group
    return -factor, not decays


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group to its share of a rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def get_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate that the groups of an optimizer have shares of."""
    first = optimizer.param_groups[0]
    return float(first["lr"] / first.get("lr_factor", 1.0))


class _AdamW(torch.optim.AdamW):
    def _accelerator_graph_capture_health_check(self) -> None:
        # PyTorch asks at each step whether the GPU's stream is captured, also where nothing trained
        # is on a GPU: that would make a CUDA context on a host with GPUs, for a run on its CPU.
        if self.param_groups[0]["params"][0].device.type != "cpu":
            super()._accelerator_graph_capture_health_check()


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    encoder_factor: float = 1.0,
    layer_decay: float = 1.0,
    sharded: bool = False,
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
        encoder_factor: See `parameter_groups`.
        layer_decay: See `parameter_groups`.
        sharded: Whether to divide the state among processes, if there are several.

    Returns:
        The optimizer. The state that `gather_state` returns can be loaded sharded or not.
    """
    groups = parameter_groups(
        model,
        weight_decay=weight_decay,
        encoder_factor=encoder_factor,
        layer_decay=layer_decay,
    )
    for group in groups:
        group["lr"] = learning_rate * group.get("lr_factor", 1.0)
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
