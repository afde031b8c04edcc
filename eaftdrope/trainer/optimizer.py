"""Every trainable parameter is in the optimiser: one that is left out is never trained, and nothing else would show it."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..errors import UserError
from .finite import listed

# These step inside of the backward pass, each parameter by itself; what the Trainer holds is a dummy.
_LAYERWISE = ("lomo", "adalomo", "layerwise")


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Compares the model's trainable parameters with those of its optimiser, by identity.

    Args:
        name: of the optimiser (`args.optim`).

    Raises:
        UserError: names the parameters that the optimiser does not have.
    """
    if any(word in name for word in _LAYERWISE):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
    if missing:
        raise UserError(
            f"the optimiser does not have {listed(missing)}: trainable, but they would never be trained. If they are meant "
            "to stay as they are, call requires_grad_(False) on them. If you did not pass an optimizer of your own, the "
            "model's parameters were replaced after it was made: please report how the model was loaded."
        )


def reshard(model: nn.Module) -> None:
    """Puts the shards of FSDP2 back in the place of gathered parameters: an optimiser made now must find the shards. A
    forward outside of training (an evaluation, a check) leaves them gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
