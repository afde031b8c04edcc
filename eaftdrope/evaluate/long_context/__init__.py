"""How far a model's context reaches: loss by length, needles found by depth and length, attention on the needle.

    text = shipped_text()
    needle_accuracy(model, tokenizer, [text], 4096, trials=100).interval()      # Wilson, 95 %
    perplexity_by_length(model, tokenizer, [text], [2048, 4096])[4096].score().value
    attention_on_needle(model, tokenizer, [text], 4096).mean.near              # mean over layers and heads

The model is measured as it is: wrap a call in `as_variant` for another rotary embedding, in `scaled_queries` for a
temperature. `eaftdrope probe` is all of this for several models, with figures; `plan` and `run` are behind it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..texts import shipped_text
    from .attention import attention_on_needle
    from .perplexity import perplexity_by_length, token_losses
    from .retrieval import needle_accuracy
    from .temperature import fit_slope, fit_temperature
    from .variants import as_variant

# Loaded on first use: the command line looks at names here before torch is worth its second.
_HOME = {
    "as_variant": "long_context.variants",
    "attention_on_needle": "long_context.attention",
    "fit_slope": "long_context.temperature",
    "fit_temperature": "long_context.temperature",
    "needle_accuracy": "long_context.retrieval",
    "perplexity_by_length": "long_context.perplexity",
    "shipped_text": "texts",
    "token_losses": "long_context.perplexity",
}
__all__ = [
    "as_variant",
    "attention_on_needle",
    "fit_slope",
    "fit_temperature",
    "needle_accuracy",
    "perplexity_by_length",
    "shipped_text",
    "token_losses",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"eaftdrope.evaluate.{_HOME[name]}"), name)
