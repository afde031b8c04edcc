"""Checks that every trainable parameter is in the optimiser and that all processes have the same gradients.

Without them nothing would show that a part is never trained, or that each process trains a model of its own.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import get_total_norm

from eaftdrope.errors import UserError

from .finite import is_sharded, listed, over_processes

# Relative difference of norms after averaging: only the order of sums differs.
_SAME = 1e-4
# These optimisers step inside the backward pass, parameter by parameter; the Trainer's own optimiser is a dummy.
_LAYERWISE = ("lomo", "adalomo", "layerwise")


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Compare the model's trainable parameters with those of its optimiser, by identity.

    Args:
        name: name of the optimiser (`args.optim`).

    Raises:
        UserError: lists the parameters that the optimiser does not have.
    """
    if any(word in name for word in _LAYERWISE):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
    if missing:
        raise UserError(
            f"the optimiser does not have {listed(missing)}: trainable, but they would never be trained. To keep them "
            "unchanged, call requires_grad_(False) on them. If you did not pass an optimizer of your own, the model's "
            "parameters were replaced after it was created: please report how the model was loaded."
        )


def check_gradients(model: nn.Module) -> None:
    """Check after a backward that the gradients of replicas were averaged. All processes must call.

    Raises:
        UserError: the gradients differ between processes.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if is_sharded(model) or not trained:
        return
    # of every parameter, so that all processes have equally many numbers
    gradients = [parameter.grad if parameter.grad is not None else parameter.new_zeros(()) for parameter in trained]
    # one by one: clipping has already made the norm of all of them equal
    norms = torch.stack([get_total_norm([gradient]).float().to(gradients[0].device) for gradient in gradients])
    least, most = over_processes(norms.clone(), "MIN"), over_processes(norms.clone(), "MAX")
    # a NaN is found by another check
    if (most - least > _SAME * most.max()).any():
        raise UserError(
            "the gradients differ between the processes, so each would train a model of its own: the model is not wrapped "
            "for data parallelism. trainer.evaluate() before trainer.train() does that: set eval_on_start=True instead, or "
            "create the trainer again."
        )


def reshard(model: nn.Module) -> None:
    """Replace gathered parameters by the shards of FSDP2, which an optimiser created next must get. A forward outside of
    training (an evaluation, a check) leaves them gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
