"""Two views of the stock base model, its first blocks and those with fast MLPs, which share all parameters.

transformers builds masks, rotary embeddings and caches itself: no forward is copied. The first blocks run over a row once;
the last, with their fast MLPs, chunk by chunk.

Legend: B rows, n tokens of a piece, D hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from eaftdrope.trainer.head import backbone
from eaftdrope.versions import cache_argument

from .fast_mlps import fast_mlps
from .window import set_turns, window_mask


def run_first(model: PreTrainedModel, ids_Bn: Tensor, layers: list[Any] | None, start: int) -> Tensor:
    """The blocks without fast MLPs over a piece that starts at position `start`: `[B, n, D]`.

    Args:
        layers: their cache layers, which take up the piece; None for a whole row from position 0 in one call.
    """
    fast, count = fast_mlps(model), ids_Bn.shape[1]
    if fast.first == 0:
        return model.get_input_embeddings()(ids_Bn)
    view = _view(model, slice(0, fast.first))
    view._modules["norm"] = nn.Identity()
    if layers is None:
        mask = window_mask(model, fast.config, None, 0, count)
        return view(input_ids=ids_Bn, attention_mask=mask, use_cache=False).last_hidden_state
    return _run(model, view, {"input_ids": ids_Bn}, layers, layers, start, count)


def run_last(model: PreTrainedModel, hidden_BnD: Tensor, layers: list[Any], start: int) -> Tensor:
    """The blocks with fast MLPs, and the final norm, over the output of the others: `[B, n, D]`.

    Call it inside `model.ttt.using(...)`. `layers` are their cache layers, which take up the piece.
    """
    first = fast_mlps(model).first
    view = _view(model, slice(first, None))
    # attention indexes the cache by the number of its block, masks read its first layer: one stands in for the first blocks
    every = [layers[0]] * first + layers
    with _without_checkpointing(view):
        return _run(model, view, {"inputs_embeds": hidden_BnD}, layers, every, start, hidden_BnD.shape[1])


@contextmanager
def _without_checkpointing(view: Any) -> Generator[None]:
    """A checkpointed block drops its cache without a word; `TTTConfig.checkpoint` recomputes whole chunks instead."""
    view.gradient_checkpointing = False
    checkpointed = [block for block in view.layers if getattr(block, "gradient_checkpointing", False)]
    for block in checkpointed:
        block.gradient_checkpointing = False
    try:
        yield
    finally:
        for block in checkpointed:
            block.gradient_checkpointing = True


def _run(
    model: PreTrainedModel,
    view: Any,
    inputs: dict[str, Tensor],
    layers: list[Any],
    every: list[Any],
    start: int,
    count: int,
) -> Tensor:
    config = fast_mlps(model).config
    positions = torch.arange(start, start + count, device=model.device)[None]
    mask = window_mask(model, config, layers[0] if layers else None, start, count)
    set_turns(model, config, view.layers, layers, start)
    output = view(
        **inputs, **cache_argument(Cache(layers=every)), attention_mask=mask, position_ids=positions, use_cache=True
    )
    return output.last_hidden_state


def _view(model: PreTrainedModel, blocks: slice) -> Any:
    """The stock base model with some of its blocks; all parameters, buffers and the configuration are shared.

    Made at every call, which costs a copy of two dictionaries, so that it is never stale.
    """
    base: Any = backbone(model)
    view = object.__new__(type(base))
    view.__dict__ = {name: value for name, value in vars(base).items() if name != "forward"}
    # whoever watches the base model sees the calls of the base model only
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(view, hooks, OrderedDict())
    view._modules = dict(base._modules)
    view._modules["layers"] = base.layers[blocks]
    return view
