"""The state of optimizers on pretended GPUs: `test_optim.py` runs this there, on two processes."""

from typing import Any

import torch
from torch import Tensor, nn

from samft import distributed
from samft.runtime.device import pick_device
from samft.training.optim import build_optimizer, gather_state, load_state

Values = list[Tensor]


def make_model(device: torch.device) -> nn.Module:
    """Linear layers with the weights of a seed."""
    torch.manual_seed(7)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).to(device)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step with gradients that differ from weight to weight."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach().sin() + 0.1
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model: nn.Module, *, sharded: bool) -> torch.optim.Optimizer:
    """As a run builds it."""
    return build_optimizer(model, learning_rate=0.01, weight_decay=0.1, sharded=sharded)


def train_in_two_parts(devices: list[torch.device], sharded: list[bool]) -> Values:
    """Two steps, one step, and another after its state went to another optimizer and device."""
    state: dict[str, Any] | None = None
    model = make_model(devices[0])
    for device, is_sharded in zip(devices, sharded, strict=True):
        model = model.to(device)
        optimizer = optimizer_of(model, sharded=is_sharded)
        if state is not None:
            load_state(optimizer, state)
            assert not (is_sharded and optimizer.state), "the shard is there twice"
        take_step(model, optimizer)
        state = distributed.broadcast(_to_host(gather_state(optimizer)))
        moments = [own[k] for own in state["state"].values() for k in ("exp_avg", "exp_avg_sq")]
        assert len(moments) == 16 and all(moment.isfinite().all() for moment in moments)
    return [parameter.detach().cpu() for parameter in model.parameters()]


def _to_host(state: dict[str, Any]) -> dict[str, Any]:
    # As a checkpoint does: what is on the host already is taken as it is.
    by_parameter = {
        number: {name: value.cpu() for name, value in own.items()}
        for number, own in state.get("state", {}).items()
    }
    return {**state, "state": by_parameter}


def check_states() -> None:
    """However the state is divided and wherever it was, two steps lead to the same weights."""
    gpu, cpu = pick_device("cuda"), torch.device("cpu")
    distributed.start(gpu)
    expected = train_in_two_parts([cpu, cpu], [False, False])
    for devices in ([gpu, gpu], [cpu, gpu], [gpu, cpu]):
        for sharded in ([True, True], [False, True], [True, False], [False, False]):
            weights = train_in_two_parts(devices, sharded)
            for actual, wanted in zip(weights, expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-7)
            print("equal:", [str(device) for device in devices], sharded, flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    check_states()
