"""An optimizer that steps during the backward pass."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.optim import Optimizer


def step_in_backward(optimizer: Optimizer) -> None:
    """Has `optimizer` update each of its weights once that one's gradient is complete, and drop the
    gradient. Its state is as ever; its own `step` finds nothing left to do."""
    for i, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_step, optimizer, i))


def _step(optimizer: Optimizer, group: int, parameter: Tensor) -> None:
    groups = optimizer.param_groups
    # By its place, since loading a state makes the groups anew.
    optimizer.param_groups = [{**groups[group], "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
    parameter.grad = None
