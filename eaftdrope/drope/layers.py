"""The layers that lose their rotary embedding: all, a list, a share, or those of one attention type."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from .rope import layer_ropes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Layers:
    """A choice of layers: by `indices`, or by attention `types`; all layers if both are None."""

    indices: tuple[int, ...] | None = None
    types: tuple[str, ...] | None = None

    def __str__(self) -> str:
        chosen = self.types if self.indices is None else self.indices
        return "all" if chosen is None else ",".join(map(str, chosen))


def choose_layers(wanted: str | float | list[int], config: PretrainedConfig) -> Layers:
    """Parse `all`, `0,2,4-7` (or a list), `0.5` (evenly spaced, always with the last layer) or `full_attention`.

    Raises:
        UserError: it cannot be parsed, a layer does not exist, or this architecture cannot express the choice.
    """
    text = config.get_text_config()
    if wanted == "all":
        return Layers()
    if isinstance(wanted, list):
        wanted = ",".join(map(str, wanted))
    wanted = str(wanted)
    types = tuple(layer_ropes(config))
    names = tuple(name.strip() for name in wanted.split(","))
    if types != ("",) and set(names) <= set(types):
        absent = sorted(set(names) - set(text.layer_types))
        if absent:
            raise UserError(f"layers {wanted!r}: this model has no layer of type {absent[0]}.")
        return Layers(types=names)
    indices = _indices(wanted, text.num_hidden_layers, types)
    if not hasattr(text, "no_rope_layers"):
        per_type = f" Layers can be chosen by attention type: {', '.join(types)}." if types != ("",) else ""
        raise UserError(
            f"layers {wanted!r}: the configuration of {text.model_type} cannot express which layers have a rotary "
            f"embedding (SmolLM3's can).{per_type} Use layers all."
        )
    return Layers(indices=indices)


def _indices(wanted: str, count: int, types: tuple[str, ...]) -> tuple[int, ...]:
    if re.fullmatch(r"0?\.\d+|1\.0*|0\.0*", wanted):
        share = float(wanted)
        return tuple(i for i in range(count) if int((i + 1) * share + 1e-9) > int(i * share + 1e-9))
    chosen: set[int] = set()
    for part in wanted.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            named = f", or of {', '.join(types)}" if types != ("",) else ""
            raise UserError(
                f"layers {wanted!r} cannot be read. Write all, a list such as 0,2,4-7, or a share such as 0.5{named}."
            )
        first = int(match[1])
        chosen.update(range(first, int(match[2] or first) + 1))
    if not chosen or max(chosen) >= count:
        raise UserError(f"layers {wanted!r}: the model has layers 0 to {count - 1}.")
    return tuple(sorted(chosen))
