"""Models on the line between the base model and a trained one.

    theta(a) = theta_base + a (theta - theta_base)      a in [0, 1], the share

This is the line of WiSE-FT (Wortsman et al. 2021, arXiv 2109.01903). For a LoRA adapter, a scales its update, and modules
that were trained in full are interpolated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .mergeable import check_linear

if TYPE_CHECKING:
    from torch import Tensor, nn


def full_line(model: nn.Module, base: dict[str, Tensor]) -> Callable[[float], nn.Module]:
    """Return the line from `base`, weights by name, to the present weights of `model`; its ends are exact.

    Needs memory for three copies of the model, two of them in CPU memory.
    """
    trained = {name: weight.detach().to("cpu", copy=True) for name, weight in model.named_parameters()}

    def move(share: float) -> nn.Module:
        for name, weight in model.named_parameters():
            weight.data.copy_(torch.lerp(base[name], trained[name], share))
        return model

    return move


def adapter_line(model: nn.Module) -> Callable[[float], nn.Module]:
    """Return the line from a peft model without its adapter to the model as it is now.

    Raises:
        UserError: the adapter is not a sum of LoRA updates and whole modules, so no scale leads back to the base.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    check_linear(model.peft_config["default"].to_dict())
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    whole: list[tuple[Tensor, Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            base = dict(module.original_module.named_parameters())
            for name, weight in module.modules_to_save["default"].named_parameters():
                whole.append((weight, base[name].detach().to(weight), weight.detach().clone()))

    def move(share: float) -> nn.Module:
        for layer in layers:
            layer.set_scale("default", share)
        for weight, start, end in whole:
            weight.data.copy_(torch.lerp(start, end, share))
        return model

    return move
