"""Variants of one checkpoint: as it is, or with another rotary embedding in stock terms on its weights.

    as is           the model as it was loaded
    rope            its original rotary embedding (of a converted checkpoint; otherwise the same as "as is")
    pi, ntk, yarn   the original one, stretched to each length (factor = length / trained length)
    crop            the original one, and the model sees only the last tokens, as many as it was trained on

Baselines of a recalibrated checkpoint have its weights, which are no longer those that its rotary embedding was trained
with. For a fair baseline, measure the original model beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from eaftdrope.drope.config import RECORD
from eaftdrope.drope.config import original_config as original_json
from eaftdrope.drope.rope import layer_ropes, swapped_rope, with_rope
from eaftdrope.drope.temperature import scaled_queries
from eaftdrope.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BASELINES = ("rope", "pi", "ntk", "yarn", "crop")
AS_IS = "as is"
_STRETCHED = ("pi", "ntk", "yarn")
# A rotary embedding stretched beyond this does not rotate: conversions write 1e30.
_NO_ROTATION = 1e12


def original_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration with the rotary embedding that the weights were trained with: `config` itself, or the one
    recorded by a conversion.

    Raises:
        UserError: the checkpoint has no rotation and no record of its original one, or it cannot be restored in a live model.
    """
    if getattr(config, RECORD, None) is None:
        if _has_no_rotation(config):
            raise UserError(
                "it has no rotary embedding, and its config.json does not record the one it had (`drope`), so "
                "it has no baselines. Pass the original model as another MODEL."
            )
        return config
    original = type(config).from_dict(original_json(config.to_dict()))
    if getattr(original, "no_rope_layers", None) != getattr(config, "no_rope_layers", None):
        raise UserError(
            "its rotary embedding was dropped in some layers only, by the layers' own switch, which cannot be changed "
            "in a live model. Pass the original model as another MODEL."
        )
    if any(rope.get("mscale_all_dim") for rope in layer_ropes(original).values()):
        raise UserError(
            "its original rotary embedding had a factor on the scores that the class sets only when it is created "
            "(mscale_all_dim). Pass the original model as another MODEL."
        )
    return original


def variants_of(config: PretrainedConfig, baselines: tuple[str, ...]) -> list[str]:
    """Return the variants of a model: as it is, and the baselines that differ from that.

    Raises:
        UserError: this checkpoint cannot have a baseline; the message has the way out.
    """
    if not baselines:
        return [AS_IS]
    original = original_config(config)
    for method in _STRETCHED:
        if method in baselines:
            with_rope(original, method, 2.0)
    return [AS_IS, *(name for name in baselines if name != "rope" or original is not config)]


@contextlib.contextmanager
def as_variant(model: PreTrainedModel, name: str, length: int, trained: int) -> Iterator[int | None]:
    """Turn the live model into a variant for the duration of the block, and yield the number of tokens it may see.

    Args:
        model: the model as it was loaded.
        name: "as is" or one of `BASELINES`.
        length: tokens of the inputs.
        trained: the length that the model was trained on.

    Yields:
        The number of tokens that the model may see, None for all.

    Raises:
        UserError: this model cannot have the variant.
    """
    assert name in (AS_IS, *BASELINES)
    if name == AS_IS:
        yield None
        return
    method = name if name in _STRETCHED else "rope"
    factor = max(1.0, length / trained) if name in _STRETCHED else 1.0
    changed = with_rope(original_config(model.config), method, factor, trained)
    # a temperature that was folded in is not part of the original; YaRN's comes back with its rotary embedding
    folded = (getattr(model.config, RECORD, None) or {}).get("temperature", 1.0)
    scores = scaled_queries(model, 1.0 / folded) if folded != 1.0 else contextlib.nullcontext()
    with swapped_rope(model, changed), scores:
        yield trained if name == "crop" else None


as_arm = as_variant
"""The former name of [`as_variant`]."""


def _has_no_rotation(config: PretrainedConfig) -> bool:
    def stretch(rope: dict) -> float:
        return max([rope.get("factor") or 1.0, *(rope.get("long_factor") or [])])

    return all(stretch(rope) > _NO_ROTATION for rope in layer_ropes(config).values())
