"""Latency and memory by context position: full attention, the window, and the window with learning.

The arms are measured in turn on the same weights, in the same process; medians. A context of the given length is a cache
filled with noise for full attention. With a window the cache does not depend on the position, so a state that has filled
its window is moved there: its positions, and with them the rotation of a sink beyond the trained length, are those of the
given length.

A chunk is a quarter of a call that reads four, as `eaftdrope ttt read` does; the last of a call is computed twice, when it
is read and when the token after it allows to learn from it. A decoded token learns nothing: every `chunk` tokens one call
learns a chunk more, which costs less than reading one.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from eaftdrope.loaded_model import evaluating
from eaftdrope.ttt import TTTConfig, TTTState, apply_ttt, remove_ttt
from eaftdrope.versions import cache_argument, cache_of

from ..likelihood import Progress

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

READERS = ("full", "window", "ttt")
"""Full attention, the window without learning, and the window with learning."""
_CHUNKS = 4
_TOKENS = 8


@dataclass(frozen=True)
class PositionCost:
    """Median seconds of a chunk read and of a token decoded, and bytes of the cache, at one position."""

    chunk_seconds: float
    token_seconds: float
    nbytes: int


@torch.no_grad()
def step_costs(
    model: PreTrainedModel,
    config: TTTConfig,
    window: int,
    position: int,
    *,
    full: bool = True,
    repeats: int = 3,
    progress: Progress | None = None,
) -> dict[str, PositionCost]:
    """Return the cost of each of `READERS` at a context position.

    Args:
        model: without TTT; left as it was.
        config, window: of TTT, with a rate above 0, and the tokens that its attention sees.
        position: tokens before the ones that are measured, rounded down to whole chunks.
        full: measure full attention too.
        repeats: of each measurement.
    """
    assert config.lr > 0
    seconds: dict[tuple[str, int], list[float]] = {}
    sizes: dict[str, int] = {}

    def measure(name: str, start: Callable[[], Cache]) -> None:
        cache = start()
        sizes[name] = cache.nbytes if isinstance(cache, TTTState) else _cache_bytes(cache)
        count = _CHUNKS * config.chunk
        spent, _ = _timed(model, _any_tokens(model, count), cache)
        seconds.setdefault((name, count), []).append(spent / _CHUNKS)
        cache = start()
        # the first token after a chunk pays for learning it
        for number in range(_TOKENS + 1):
            spent, cache = _timed(model, _any_tokens(model, 1), cache)
            if number:
                seconds.setdefault((name, 1), []).append(spent)

    # learning in place adds nothing, and at rate 0 it is the model in the window
    plain = dataclasses.replace(config, layout="in_place", lr=0.0)
    # in whole chunks; the first round, at a short position, warms up
    position = max(1, position // config.chunk) * config.chunk
    with evaluating(model):
        for done, at in enumerate([config.chunk, *[position] * repeats]):
            if done == 1:
                seconds.clear()
            if full:
                measure("full", lambda at=at: _filled_cache(model, at))
            for name, settings in (("window", plain), ("ttt", config)):
                apply_ttt(model, settings).eval()
                try:
                    measure(name, _state_at(model, min(at, _filling(window, config.chunk)), at).fork)
                finally:
                    remove_ttt(model)
            if progress is not None:
                progress(done + 1, repeats + 1)
    medians = {key: statistics.median(spent) for key, spent in seconds.items()}
    return {
        name: PositionCost(medians[name, _CHUNKS * config.chunk], medians[name, 1], sizes[name])
        for name in READERS
        if (name, 1) in medians
    }


def crossover(costs: Mapping[int, Mapping[str, float]]) -> float | None:
    """Return the position from which TTT is faster than full attention, between the measured ones; None if it never is.

    Args:
        costs: seconds of "full" and "ttt" by position.
    """
    ratios = sorted((position, both["full"] / both["ttt"]) for position, both in costs.items() if len(both) == 2)
    if not ratios or ratios[-1][1] < 1:
        return None
    # the last position from which it stays faster
    for (low, before), (high, after) in reversed(list(pairwise(ratios))):
        if before < 1 <= after:
            share = -math.log(before) / (math.log(after) - math.log(before))
            return low * (high / low) ** share
    return float(ratios[0][0])


def _timed(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> tuple[float, Cache]:
    _finish(model)
    start = time.perf_counter()
    out = model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
    _finish(model)
    return time.perf_counter() - start, cache_of(out)


def _finish(model: PreTrainedModel) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


def _filled_cache(model: PreTrainedModel, position: int) -> Cache:
    """Return the model's own cache after `position` tokens, filled with noise of the right shapes."""
    cache = cache_of(model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=True))
    for layer in cache.layers:
        layer.keys, layer.values = (
            torch.randn(*kept.shape[:2], position, kept.shape[3], dtype=kept.dtype, device=kept.device)
            for kept in (layer.keys, layer.values)
        )
    return cache


def _filling(window: int, chunk: int) -> int:
    """Return a number of whole chunks after which a window is full and something was learned."""
    return (-(-window // chunk) + 1) * chunk


def _any_tokens(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Return `count` tokens of the vocabulary: what they are costs nothing."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, model.config.get_text_config().vocab_size, (1, count), generator=generator).to(model.device)


def _state_at(model: PreTrainedModel, count: int, position: int) -> TTTState:
    """Return a state that has read `count` tokens and stands at `position`."""
    state = TTTState(model)
    model(input_ids=_any_tokens(model, count), **cache_argument(state), use_cache=True, logits_to_keep=1)
    layer: Any
    for layer in state.layers:
        layer.cumulative_length = position
    return state


def _cache_bytes(cache: Any) -> int:
    return sum(kept.nbytes for layer in cache.layers for kept in (layer.keys, layer.values))
