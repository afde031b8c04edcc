"""Limits that a run may meet: the positions of its model, and the room on its disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from eaftdrope.recipe.schema import Recipe

# Tables of learned (or tabulated) positions, as the model classes name them; rotary and ALiBi models have none.
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
_SPARE = 64 << 20


def check_positions(model: nn.Module, config: PretrainedConfig, longest: int) -> None:
    """Refuses rows beyond a table of positions, where the training would end in an index error.

    Args:
        model: on any device, the meta device among them.
        longest: tokens of the longest row.

    Raises:
        UserError: it is longer than the model's context.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not limit or longest <= limit:
        return
    if any(name.rpartition(".")[2] in _POSITION_TABLES for name, _ in model.named_modules()):
        raise UserError(
            f"the longest row has {longest:,} tokens, and the model has a table of {limit:,} positions: set data.max_length "
            f"to at most {limit}."
        )


def context_notes(recipe: Recipe, config: PretrainedConfig, longest: int) -> Iterator[str]:
    """A maximum length beyond the model's context, and whether any row is as long."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = recipe.data.max_length
    if not limit or length <= limit:
        return
    rows = ""
    if longest:
        rows = f" The longest row has {longest}." if longest > limit else f" No row is: the longest has {longest}."
    if getattr(config, "drope", None):
        yield (
            f"data.max_length {length} is beyond the {limit} tokens that the converted model announces. It has no rotary "
            f"positions that end there, but engines that serve it do.{rows}"
        )
    else:
        yield f"data.max_length {length} is beyond the model's context of {limit} tokens.{rows}"


def room_notes(recipe: Recipe, config: PretrainedConfig, model: nn.Module) -> Iterator[str]:
    """Too little room for the merged model, which is written after the training."""
    import torch

    if not (recipe.output.merge and recipe.lora):
        return
    size = (config.dtype or torch.float32).itemsize
    whole = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n and "modules_to_save" not in n)
    place = Path(recipe.output.dir).expanduser().absolute()
    while not place.is_dir():
        place = place.parent
    needed, free = whole * size + _SPARE, shutil.disk_usage(place).free
    if free < needed:
        yield (
            f"output.merge will need {math.ceil(needed / 1e6):,} MB in {recipe.output.dir}, whose disk has "
            f"{free // 10**6:,} MB free: make room before the training ends, or leave it out and merge elsewhere."
        )
