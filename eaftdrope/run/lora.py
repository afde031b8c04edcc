"""Adapters: the recipe's section `lora` as a peft configuration, for the plan and for the training.

Multimodal models (Gemma 3): text trains their language model only. Their other modules are frozen and get no adapters:
they would receive no gradient, which several processes report as an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from eaftdrope.recipe.training_sections import Lora
from eaftdrope.ttt.fast_mlps import ATTRIBUTE

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(lora: Lora, model: PreTrainedModel) -> LoraConfig:
    """Adapters for `model`, except on modules that no text passes through."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        # pyrefly: ignore[bad-argument-type]  # peft divides by r: a fraction works, whatever its annotation
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=non_text_modules(model) or None,
        modules_to_save=lora.modules_to_save or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def non_text_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules with parameters of their own that no text passes through. Text passes through fast MLPs."""
    language = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    read = {id(parameter) for part in language if part is not None for parameter in part.parameters()}
    return [
        name
        for name, module in model.named_modules()
        if name.split(".")[0] != ATTRIBUTE
        and any(id(parameter) not in read for parameter in module.parameters(recurse=False))
    ]


def freeze_non_text_modules(model: PreTrainedModel) -> None:
    for name in non_text_modules(model):
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.requires_grad = False
