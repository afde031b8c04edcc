"""Models that also see or hear (Gemma 3): text trains their language model, and the rest stays as it is.

Left trainable, those parts would get no gradient, which several processes take for a mistake.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


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
