"""The recipe's `lora` section as a peft configuration; the plan counts with it, the run trains with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .modalities import beside_the_text

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from .schema import Lora


def lora_config(lora: Lora, model: PreTrainedModel) -> LoraConfig:
    """Adapters for `model`: none on what text does not reach, where they would never be trained."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=beside_the_text(model) or None,
        modules_to_save=lora.modules_to_save or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
