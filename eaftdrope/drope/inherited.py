"""What a stretched rotary embedding does besides rotating, and what becomes of it when the rotation is dropped.

YaRN and LongRoPE lengthen queries and keys by an attention factor a, which is a temperature of a^2 on the scores; the
DeepSeek classes scale their scores by YaRN's `mscale_all_dim`. Dropping the rotary embedding would drop these too, and the
model was trained with them. So they are measured on a slice of the architecture and, where they are one factor on all
scores, folded into the query weights as a temperature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .identity import attention_modules, identity_rotation
from .rope import layer_ropes
from .slices import logits, random_model, tokens
from .temperature import scaled_queries

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TYPES = ("yarn", "longrope")
_CLOSE = 1e-2


def has_factor(config: PretrainedConfig) -> bool:
    """Whether the rotary embedding is of a type that can come with a factor on the scores."""
    return any(parameters.get("rope_type") in _TYPES for parameters in layer_ropes(config).values())


def inherited_temperature(new: PretrainedConfig, old: PretrainedConfig) -> tuple[float, bool]:
    """(largest factor on the scores that comes with the old rotary embedding and not with the new one, whether it is the
    same for all scores). Configurations of a slice."""
    model, reference = random_model(new), random_model(old)
    scalings = attention_modules(model)
    ratios = [module.scaling / scalings[name].scaling for name, module in attention_modules(reference).items()]
    ids, lengths = tokens(new), []
    with identity_rotation(reference, lengths=lengths):
        wanted = logits(reference, ids)
    factor = max(ratios, default=1.0) * max(lengths) ** 2
    if abs(factor - 1.0) < 1e-6:
        return 1.0, True
    plain = logits(model, ids)
    with scaled_queries(model, factor):
        got = logits(model, ids)
    # of part of a head's dimensions only, it is no factor on the scores
    return factor, ((got - wanted).abs().max() <= _CLOSE * (plain - wanted).abs().max()).item()
