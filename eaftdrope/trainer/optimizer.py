"""Every trainable parameter is in the optimiser, and every process steps by the same gradients: nothing else would show that
a part is never trained, or that each process trains a model of its own."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import get_total_norm

from eaftdrope.errors import UserError

from .finite import is_sharded, listed, over_processes

# Relative difference of norms that averaging leaves: none, but for the order of sums.
_SAME = 1e-4
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


def check_gradients(model: nn.Module) -> None:
    """After a backward: the gradients of replicas were averaged. All processes must call.

    Raises:
        UserError: they differ from process to process.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if is_sharded(model) or not trained:
        return
    # of all of them, so that every process has as many numbers
    gradients = [parameter.grad if parameter.grad is not None else parameter.new_zeros(()) for parameter in trained]
    # one by one: clipping has brought the norm of all of them to the same value already
    norms = torch.stack([get_total_norm([gradient]).float().to(gradients[0].device) for gradient in gradients])
    least, most = over_processes(norms.clone(), "MIN"), over_processes(norms.clone(), "MAX")
    # NaN is another check's
    if (most - least > _SAME * most.max()).any():
        raise UserError(
            "the gradients differ between the processes, so each would train a model of its own: the model is not wrapped "
            "for data parallelism. trainer.evaluate() before trainer.train() does that: set eval_on_start=True instead, or "
            "make the trainer again."
        )


def reshard(model: nn.Module) -> None:
    """Puts the shards of FSDP2 back in the place of gathered parameters: an optimiser made now must find the shards. A
    forward outside of training (an evaluation, a check) leaves them gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
