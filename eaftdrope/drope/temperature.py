"""The softmax temperature: scores times beta, because attention over more tokens is flatter.

    beta = 1 + slope * ln(s),  s = length / trained length       (arXiv 2512.12167, appendix C.2)

Some models have one already: YaRN and LongRoPE lengthen queries and keys by an attention factor a, which is a temperature
of a^2 on the scores; the DeepSeek classes scale their scores by YaRN's `mscale_all_dim`. Dropping the rotary embedding would
drop these too, and the model was trained with them. So they are measured on a slice of the architecture and, if they are one
factor on all scores, folded into the query weights as a temperature (`query_weights`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig

from eaftdrope.errors import UserError

from .identity import attention_modules, identity_rotation, scaling_of, set_scaling
from .rope import layer_ropes
from .slices import logits, random_model, tokens

PAPER_SLOPES = {"SmolLM-360M, recalibrated": 0.103, "a 494M model trained for it": 0.412}
_FACTOR_TYPES = ("yarn", "longrope")
_CLOSE = 1e-2


def beta_for(length: int, trained_length: int, slope: float) -> float:
    """Return 1 + slope * ln(length / trained_length); 1 if the length is not above the trained one."""
    return 1.0 + slope * math.log(max(1.0, length / trained_length))


@contextlib.contextmanager
def scaled_queries(model: nn.Module, beta: float) -> Iterator[None]:
    """Multiply every attention score of the live `model` by `beta` until the block ends.

    No weight is changed: transformers' attention modules keep the factor on their scores as `scaling`.

    Raises:
        UserError: the model has no such modules.
    """
    modules = list(attention_modules(model).values())
    if not modules:
        raise UserError(f"{type(model).__name__} keeps no `scaling` of its attention scores, so they cannot be scaled.")
    own = [scaling_of(module) for module in modules]
    try:
        for module, scaling in zip(modules, own):
            set_scaling(module, scaling * beta)
        yield
    finally:
        for module, scaling in zip(modules, own):
            set_scaling(module, scaling)


def has_factor(config: PretrainedConfig) -> bool:
    """Return whether the rotary embedding is of a type that may come with a factor on the scores."""
    return any(parameters.get("rope_type") in _FACTOR_TYPES for parameters in layer_ropes(config).values())


def inherited_temperature(new: PretrainedConfig, old: PretrainedConfig) -> tuple[float, bool]:
    """Measure the factor on the scores that comes with the old rotary embedding and not with the new one.

    Args:
        new, old (`PretrainedConfig`): of a slice, after and before the conversion.

    Returns:
        The largest factor, and whether it is the same for all scores.
    """
    model, reference = random_model(new), random_model(old)
    modules = attention_modules(model)
    ratios = [scaling_of(module) / scaling_of(modules[name]) for name, module in attention_modules(reference).items()]
    ids = tokens(new)
    lengths: list[float] = []
    with identity_rotation(reference, lengths=lengths):
        expected = logits(reference, ids)
    factor = max(ratios, default=1.0) * max(lengths) ** 2
    if abs(factor - 1.0) < 1e-6:
        return 1.0, True
    plain = logits(model, ids)
    with scaled_queries(model, factor):
        got = logits(model, ids)
    # on some of a head's dimensions only, it is not a factor on the scores
    return factor, bool((got - expected).abs().max() <= _CLOSE * (plain - expected).abs().max())
