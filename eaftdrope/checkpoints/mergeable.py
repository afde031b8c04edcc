"""Checks that an adapter can be merged or scaled, from its configuration and before anything is loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from eaftdrope.errors import UserError

# Initialisations that leave the base weights unchanged. Any other moves a part of them into the adapter, and scaling the
# adapter then leads back to the rest of the base model, not to the base model.
_BASE_UNTOUCHED = (True, False, "gaussian", "eva", "orthogonal", "mica")
_TASKS = (None, "", "CAUSAL_LM")
# Options of peft under which it cannot merge, and why.
_NOT_MERGED = {
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "arrow_config": "a router chooses its adapters token by token",
    "use_qalora": "QA-LoRA exists on quantised layers only",
    "layer_replication": "it repeats layers of the base model",
}
# Kinds of adapter that peft lists among those with layers, but cannot merge.
_NO_WEIGHTS = ("XLORA", "POLY", "SHADOW", "CARTRIDGE")


def check_mergeable(folder: Path, settings: dict[str, Any], *, repaired: bool = False) -> None:
    """Refuse adapters that peft cannot merge, or that cannot be repaired.

    Args:
        folder: folder of the adapter, for messages.
        settings: its adapter_config.json.
        repaired: the adapter is repaired before it is merged.

    Raises:
        UserError: names the option that prevents it.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    kind = settings["peft_type"]
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if tuner is None:
        raise UserError(f"{folder} is a {kind} adapter, which the installed peft does not have. Install a newer one.")
    if not issubclass(tuner, BaseTuner) or kind in _NO_WEIGHTS:
        raise UserError(
            f"{folder} is a {kind} adapter: it adds tokens or a path of its own, and has no weights to merge. "
            "Use it as it is, with peft."
        )
    if settings.get("task_type") not in _TASKS:
        raise UserError(
            f"{folder} was trained for {settings['task_type']}, not as a causal language model: merged, its own head would "
            "be lost. Use it as it is, with peft."
        )
    for option, why in _NOT_MERGED.items():
        if settings.get(option):
            raise UserError(f"{folder} cannot be merged: {option} is set, and {why}. Use it as it is, with peft.")
    if repaired:
        check_linear(settings)


def check_linear(settings: dict[str, Any]) -> None:
    """Refuse an adapter that is not a sum of LoRA updates on the unchanged base model and of whole modules.

    Raises:
        UserError: no scale leads back to the base model.
    """
    kind, start = settings["peft_type"], settings.get("init_lora_weights", True)
    variants = ("use_dora", "use_bdlora", "kasa_config", "monteclora_config", "velora_config", *_NOT_MERGED)
    odd = [
        name
        for name, given in (
            (f"{kind} layers", kind != "LORA"),
            *((name, bool(settings.get(name))) for name in variants),
            (f"init_lora_weights={start!r}", start not in _BASE_UNTOUCHED),
            ("trained biases", settings.get("bias", "none") != "none"),
            ("trainable_token_indices", bool(settings.get("trainable_token_indices"))),
        )
        if given
    ]
    if odd:
        raise UserError(
            f"an adapter with {', '.join(odd)} cannot be scaled towards its base model, or repaired: merge it as it is, or "
            "train plain LoRA."
        )


def check_biases(folder: Path, settings: dict[str, Any], config: PretrainedConfig) -> None:
    """Refuse lora_bias on layers without a bias, which have no place for it once merged.

    Args:
        config: the base model's configuration.

    Raises:
        UserError: names the first such layer.
    """
    if not settings.get("lora_bias"):
        return
    from peft import PeftConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    with torch.device("meta"), warnings.catch_warnings():
        # peft warns about what is refused below
        warnings.simplefilter("ignore")
        adapters = PeftConfig.from_pretrained(str(folder))
        adapters.init_lora_weights = False
        model = get_peft_model(AutoModelForCausalLM.from_config(config), adapters)
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and getattr(layer.get_base_layer(), "bias", None) is None:
            raise UserError(
                f"{folder} cannot be merged: it was trained with lora_bias, and {name} of the base model has no bias to add "
                "it to. Use it as it is, with peft."
            )
