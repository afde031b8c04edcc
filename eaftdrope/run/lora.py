"""The recipe's `lora` section as a peft configuration; the plan counts with it, the run trains with it.

Models that also see or hear (Gemma 3): text trains their language model, and the rest stays as it is.

Left trainable, those parts would get no gradient, which several processes take for a mistake.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from eaftdrope.recipe.schema import Lora
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


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


def beside_the_text(model: PreTrainedModel) -> list[str]:
    """Names of the modules with parameters of their own that no text passes through."""
    language = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    read = {id(parameter) for part in language if part is not None for parameter in part.parameters()}
    return [
        name
        for name, module in model.named_modules()
        if any(id(parameter) not in read for parameter in module.parameters(recurse=False))
    ]


def freeze_beside_the_text(model: PreTrainedModel) -> None:
    for name in beside_the_text(model):
        module: nn.Module = model.get_submodule(name)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
