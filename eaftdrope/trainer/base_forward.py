"""The base model of an anchor in training: its forward on the batch that the model is about to see.

A model with adapters is its own base with the adapters switched off: one more forward of the backbone and no second copy.
Otherwise the base is a frozen second model, whole on every process. Its forward runs in evaluation mode (no dropout, no
gradient checkpointing), without gradients, and before the model's: what FSDP2 prefetches for the backward pass is what was
gathered last.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from eaftdrope.errors import UserError
from eaftdrope.loaded_model import evaluating
from eaftdrope.loss.base_logits import BaseLogits

from .finite import listed
from .head import Head, backbone, check_head, head_module, loss_head


@dataclass(frozen=True)
class BaseRows:
    """The base model's hidden states `[B, T, D]` of a batch, and its head; None where it is the model's own."""

    hidden: Tensor
    head: Head | None

    def logits(self, own: Head) -> BaseLogits:
        """Return what the loss reads; `own` is the model's head."""
        head = own if self.head is None else self.head.part(own.shard)
        hidden = self.hidden.to(own.weight.device)
        return BaseLogits(hidden, head.weight, head.bias, head.transform.scale, head.transform.softcap)


def check_base(model: PreTrainedModel, base_model: PreTrainedModel | None) -> None:
    """Check that the base of an anchor can be computed, and freeze a second model.

    Raises:
        UserError: no adapters and no second model, weights trained beside the adapters, a second model with another
            vocabulary, DeepSpeed ZeRO-3.
    """
    name = type(model).__name__
    if is_deepspeed_zero3_enabled():
        raise UserError(
            "an anchor under DeepSpeed ZeRO-3 is not supported: it gathers weights in the order of one forward per step, and "
            "the base model's is a second one. Use FSDP or ZeRO-2."
        )
    if base_model is None:
        if not _adapters(model):
            raise UserError(
                f"an anchor needs the base model, and this {name} has no adapters that could be switched off. Pass a second "
                "copy of the model before training as base_model=..., or train LoRA adapters."
            )
        if outside := _trained_outside_adapters(model):
            raise UserError(
                "the base of the anchor is the model without its adapters, but training would change that base: "
                f"{listed(outside)} would be trained beside them. Freeze these, name their modules in modules_to_save, or "
                "pass a second copy of the model as base_model=..."
            )
        return
    if base_model is model:
        raise UserError("base_model is the model that is trained. Load the model a second time.")
    check_head(base_model)
    sizes = [head_module(each).weight.shape[0] for each in (model, base_model)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"base_model has {sizes[1]:,} tokens and the model has {sizes[0]:,}: their distributions cannot be compared. "
            "The base of an anchor is the model before training."
        )
    base_model.requires_grad_(False)
    base_model.eval()


# a graph break under torch.compile: adapters are switched off by attributes of modules
@torch.compiler.disable
@torch.no_grad()
def base_rows(model: PreTrainedModel, base_model: PreTrainedModel | None, inputs: dict[str, Any]) -> BaseRows:
    """Return the base model's rows for the inputs of `model`'s forward."""
    inputs = {**inputs, "use_cache": False}
    # a router's loss is the trained model's
    inputs.pop("output_router_logits", None)
    if base_model is not None:
        hidden = backbone(base_model)(**inputs).last_hidden_state
        with loss_head(base_model) as head:
            return BaseRows(hidden, head)
    own = head_module(model).weight
    with adapters_off(model), evaluating(model):
        hidden = backbone(model)(**inputs).last_hidden_state
        if head_module(model).weight is own:
            return BaseRows(hidden, None)
        # a head that is trained beside the adapters (modules_to_save)
        with loss_head(model) as head:
            return BaseRows(hidden, head)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapters of a model off for the duration of the block.

    Only the flag that their forward reads is set. PEFT's own switch also sets `requires_grad` of their weights, which FSDP2
    would keep: it reads it once, in the first forward.
    """
    layers = _adapters(model)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def _adapters(model: nn.Module) -> list[Any]:
    """The layers of a model whose forward adds an adapter or replaces a module."""
    # a layer of PEFT exists only if PEFT has been imported; it is optional
    tuners, other = (sys.modules.get(f"peft.{name}") for name in ("tuners.tuners_utils", "utils.other"))
    if tuners is None or other is None:
        return []
    return [
        module
        for module in model.modules()
        if isinstance(module, (tuners.BaseTunerLayer, other.AuxiliaryTrainingWrapper))
    ]


def _trained_outside_adapters(model: nn.Module) -> list[str]:
    """Names of the trained parameters that switching the adapters off would leave in place."""
    switched: set[int] = set()
    for layer in _adapters(model):
        wrapped = layer._modules.get("base_layer") or layer._modules.get("original_module")
        kept = {id(parameter) for parameter in wrapped.parameters()} if wrapped is not None else set()
        switched |= {id(parameter) for parameter in layer.parameters()} - kept
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in switched
    ]
