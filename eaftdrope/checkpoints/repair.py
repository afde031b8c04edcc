"""Repairs of a trained model after its training, from its weights and those of its base model; no data is needed.

    share      theta_base + a (theta - theta_base), a in [0, 1]      the line of WiSE-FT (arXiv 2109.01903)
    denoise    only the singular values of each change of a matrix that are more than noise (DG-Hard, arXiv 2605.20296)
    restore    the base model's weights in some modules, as q_proj and k_proj (QK-Restore, arXiv 2606.11052)

They can be combined, and their order does not matter: each acts on the change of one tensor at a time. Tensors that are no
matrix (norms, biases) have no spectrum and are left as trained by `denoise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eaftdrope.errors import UserError

from .mergeable import check_linear
from .repair_options import SMALLEST, Repair, check_restored
from .spectrum import Spectrum, keep_signal, keep_signal_of_factors

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Kept:
    """What a repair kept of the change of one tensor: `norm`, a share of the Frobenius norm, and of a denoised one
    `spectrum` (None: not denoised)."""

    tensor: str
    norm: float
    spectrum: Spectrum | None = None


def has_spectrum(tensor: Tensor) -> bool:
    """Return whether `denoise` applies: to matrices, and stacks of them (experts of a mixture), that are not too small."""
    return tensor.ndim in (2, 3) and min(tensor.shape[-2:]) >= SMALLEST


def repair_change(change: Tensor, repair: Repair, tensor: str) -> Kept:
    """Apply a repair to the change of one tensor, in place.

    Args:
        change: float32, trained minus base.
        tensor: its name in the model.
    """
    if repair.restores(tensor):
        change.zero_()
        return Kept(tensor, 0.0)
    spectrum = keep_signal(change) if repair.denoise and has_spectrum(change) else None
    change.mul_(repair.share)
    return Kept(tensor, repair.share * (spectrum.norm if spectrum else 1.0), spectrum)


@torch.no_grad()
def repair_model(model: nn.Module, base: nn.Module, repair: Repair) -> list[Kept]:
    """Repair the weights of a model in place; returns what was kept of every tensor that had changed.

    Args:
        base: the model it was trained from; tied tensors are repaired once.

    Raises:
        UserError: a module to restore does not exist.
    """
    weights = dict(model.named_parameters())
    check_restored(repair, weights, "the model")
    kept, origin = [], dict(base.named_parameters())
    for name, weight in weights.items():
        start = origin[name].detach().to(weight.device, torch.float32)
        change = weight.float() - start
        if change.any():
            kept.append(repair_change(change, repair, name))
            weight.copy_(start + change)
    return kept


@torch.no_grad()
def repair_adapter(model: PeftModel, repair: Repair) -> list[Kept]:
    """Repair a LoRA adapter in place; returns what was kept of the change of every layer.

    The changes are the products of the adapter's factors, which are never formed; modules that were trained in full are
    repaired like those of [`repair_model`].

    Raises:
        UserError: the adapter is not a sum of LoRA updates and whole modules, changes none of the modules to restore, or has
            too small a rank for `denoise`.
    """
    check_linear(model.peft_config["default"].to_dict())
    if repair.denoise and (parameters := model.peft_config["default"].target_parameters):
        raise UserError(
            f"denoise: the adapter has factors for {', '.join(parameters)} in target_parameters, which share one product "
            "among all experts. Leave denoise out."
        )
    layers, whole = _adapted(model)
    check_restored(repair, [*layers, *whole], "the adapter")
    kept = [_repair_factors(up, down, repair, name) for name, (up, down) in _without_ties(layers).items()]
    for name, (weight, start) in _without_ties(whole).items():
        change = weight.float() - start.float()
        kept.append(repair_change(change, repair, name))
        weight.copy_(start.float() + change)
    return kept


def changed_tensors(model: nn.Module) -> list[str]:
    """Return the names of the tensors that a training may change, as those of the model without adapters."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return [name for name, _ in model.named_parameters()]
    layers, whole = _adapted(model)
    return [*layers, *whole]


def _adapted(model: PeftModel) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    """Return name -> factors of the LoRA layers, and name -> (trained, base) of the tensors that were trained in full.

    The names are those of the weights in the model without adapters.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    layers, whole = {}, {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            layers[f"{name}.weight"] = _factors(module)
        elif isinstance(module, ModulesToSaveWrapper):
            base = dict(module.original_module.named_parameters())
            for part, weight in module.modules_to_save["default"].named_parameters():
                whole[f"{name}.{part}"] = (weight, base[part].detach())
    return layers, whole


def _without_ties(tensors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return only the first of the pairs that share their memory."""
    first = {}
    for name, pair in tensors.items():
        first.setdefault(frozenset(tensor.untyped_storage().data_ptr() for tensor in pair), name)
    return {name: tensors[name] for name in first.values()}


def _repair_factors(up: Tensor, down: Tensor, repair: Repair, tensor: str) -> Kept:
    """Repair the change `up @ down` of one LoRA layer."""
    spectrum = None
    if repair.restores(tensor):
        up.zero_()
        return Kept(tensor, 0.0)
    if repair.denoise:
        if min(*up.shape, down.shape[1]) < SMALLEST:
            raise UserError(
                f"denoise: the adapter of {tensor.removesuffix('.weight')} has rank {up.shape[1]}, and a threshold needs "
                f"at least {SMALLEST} singular values. Leave denoise out."
            )
        new_up, new_down, spectrum = keep_signal_of_factors(up, down)
        up.copy_(new_up)
        down.copy_(new_down)
    up.mul_(repair.share)
    return Kept(tensor, repair.share * (spectrum.norm if spectrum else 1.0), spectrum)


def _factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the factors `[M, R]` and `[R, N]` of a layer's change; an embedding's are stored transposed."""
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_B["default"].data, layer.lora_embedding_A["default"].data
    return layer.lora_B["default"].weight.data, layer.lora_A["default"].weight.data
