"""How far a model's context reaches: loss by length, needles found by depth and length, attention on the needle.

    text = shipped_text()
    needle_accuracy(model, tokenizer, [text], 4096, trials=100).interval()      # Wilson, 95 %
    perplexity_by_length(model, tokenizer, [text], [2048, 4096])[4096].score().value
    attention_on_needle(model, tokenizer, [text], 4096).mean.near              # mean over layers and heads

The model is measured as it is: wrap a call in `as_variant` for another rotary embedding, in `scaled_queries` for a
temperature. `eaftdrope context` does all of this for several models, with figures.

Reading order:

    needles.py       texts as tokens, windows of them, and trials with hidden needles
    perplexity.py    loss by length and by position
    retrieval.py     needles found
    attention.py     attention on the needle
    variants.py      a model with another rotary embedding
    lengths.py       lengths as users write them
    plan.py          `eaftdrope context`: models, variants and lengths, checked
    run.py           measuring the plan
    results.py       its folder
    table.py         its tables and CSV
    temperature.py   `eaftdrope drope temperature`: the softmax temperature that suits a length
"""

from typing import TYPE_CHECKING

from eaftdrope.lazy import lazy_names

if TYPE_CHECKING:
    from ..texts import shipped_text
    from .attention import attention_on_needle
    from .perplexity import perplexity_by_length, token_losses
    from .retrieval import needle_accuracy
    from .temperature import fit_slope, fit_temperature
    from .variants import as_arm, as_variant

_LAZY = {
    "as_arm": "variants",
    "as_variant": "variants",
    "attention_on_needle": "attention",
    "fit_slope": "temperature",
    "fit_temperature": "temperature",
    "needle_accuracy": "retrieval",
    "perplexity_by_length": "perplexity",
    "shipped_text": ".texts",
    "token_losses": "perplexity",
}
__all__ = [
    "as_arm",
    "as_variant",
    "attention_on_needle",
    "fit_slope",
    "fit_temperature",
    "needle_accuracy",
    "perplexity_by_length",
    "shipped_text",
    "token_losses",
]
__getattr__, __dir__ = lazy_names(__name__, _LAZY)
