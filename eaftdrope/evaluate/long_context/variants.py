"""Arms: what one checkpoint is measured as. As it is, or with another rotary embedding in stock terms on its weights.

    as is    the model as it was loaded
    rope     its original rotary embedding (of a converted checkpoint; otherwise that is what it is)
    pi, ntk, yarn   the original one, stretched to each length (factor = length / trained length)
    crop     the original one, and the model sees only the last tokens, as many as it was trained on

Baselines of a recalibrated checkpoint have its weights, which are no longer those that its rotary embedding was trained
with. For a fair baseline name the original model as another model of the probe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from eaftdrope.drope.config import RECORD, before
from eaftdrope.drope.rope import layer_ropes, swapped_rope, with_rope
from eaftdrope.drope.temperature import scaled_queries
from eaftdrope.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BASELINES = ("rope", "pi", "ntk", "yarn", "crop")
AS_IS = "as is"
_STRETCHED = ("pi", "ntk", "yarn")
# A rotary embedding stretched beyond this is none: conversions write 1e30.
_NO_ROTATION = 1e12


def original_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with the rotary embedding that the weights were trained with: `config` itself, or what a
    conversion recorded.

    Raises:
        UserError: the checkpoint has no rotation, and no record of the one it had.
    """
    if getattr(config, RECORD, None) is None:
        if _has_no_rotation(config):
            raise UserError(
                "it has no rotary embedding, and its config.json does not record the one it had (`drope`), so "
                "baselines cannot be made of it. Name the original model as another MODEL."
            )
        return config
    original = type(config).from_dict(before(config.to_dict()))
    if getattr(original, "no_rope_layers", None) != getattr(config, "no_rope_layers", None):
        raise UserError(
            "its rotary embedding was dropped in some layers only, by the layers' own switch, which cannot be turned in a "
            "live model. Name the original model as another MODEL."
        )
    if any(rope.get("mscale_all_dim") for rope in layer_ropes(original).values()):
        raise UserError(
            "its original rotary embedding came with a factor on the scores that the class sets once, when it is made "
            "(mscale_all_dim). Pass the original model as another MODEL."
        )
    return original


def variants_of(config: PretrainedConfig, baselines: tuple[str, ...]) -> list[str]:
    """The arms of a model: as it is, and the baselines that differ from that.

    Raises:
        UserError: a baseline cannot be made of this checkpoint; what to do is said.
    """
    if not baselines:
        return [AS_IS]
    original = original_config(config)
    for method in _STRETCHED:
        if method in baselines:
            with_rope(original, method, 2.0)
    return [AS_IS, *(name for name in baselines if name != "rope" or original is not config)]


@contextlib.contextmanager
def as_variant(model, name: str, length: int, trained: int) -> Iterator[int | None]:
    """The live model as an arm, for inputs of `length` tokens; gives how many tokens it may see (None: all).

    Raises:
        UserError: the arm cannot be made of this model.
    """
    assert name in (AS_IS, *BASELINES)
    if name == AS_IS:
        yield None
        return
    method = name if name in _STRETCHED else "rope"
    factor = max(1.0, length / trained) if name in _STRETCHED else 1.0
    changed = with_rope(original_config(model.config), method, factor, trained)
    # a temperature that was folded in is no part of the original: YaRN's comes back with its rotary embedding
    folded = (getattr(model.config, RECORD, None) or {}).get("temperature", 1.0)
    scores = scaled_queries(model, 1.0 / folded) if folded != 1.0 else contextlib.nullcontext()
    with swapped_rope(model, changed), scores:
        yield trained if name == "crop" else None


def _has_no_rotation(config: PretrainedConfig) -> bool:
    def stretch(rope: dict) -> float:
        return max([rope.get("factor") or 1.0, *(rope.get("long_factor") or [])])

    return all(stretch(rope) > _NO_ROTATION for rope in layer_ropes(config).values())
