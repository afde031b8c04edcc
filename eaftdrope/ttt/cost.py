"""The cost of test-time training on one device, for `eaftdrope bench ttt`: steps of training, and reading by position.

Arms take turns within a round, and the ratio to the plain window of the same round is reported, as a median over rounds.
On the CPU a second is one of CPU time, of all threads; elsewhere one of wall time.

Legend: T tokens of a row, D hidden size, F width of an MLP, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from eaftdrope.peak_memory import peak_of
from eaftdrope.versions import cache_argument

from .config import TTTConfig
from .model import apply_ttt
from .state import TTTState
from .window import sliding

_HEAD = 64
"""Size of an attention head."""
_CHUNKS = 4
"""Chunks that are read in one call with TTT: `eaftdrope ttt read` reads several, too."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is."""


def _silent(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class CostShape:
    """A model of Qwen 3's class with random weights, and what it reads.

    Attributes:
        blocks, hidden, width, vocabulary: of the model; half as many heads of keys as of queries.
        tokens: T, of the one row of a training step.
        window, chunk, fast_blocks: as in `TTTConfig`.
    """

    blocks: int = 8
    hidden: int = 256
    width: int = 768
    vocabulary: int = 8192
    tokens: int = 1024
    window: int = 256
    chunk: int = 128
    fast_blocks: int = 2

    def model(self, device: str) -> Qwen3ForCausalLM:
        """The model with full attention; always the same weights."""
        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.hidden // _HEAD,
            num_key_value_heads=max(1, self.hidden // _HEAD // 2),
            head_dim=_HEAD,
            # no position below is beyond what the model was trained on
            max_position_embeddings=1 << 20,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        model: Any = Qwen3ForCausalLM(config)
        return model.to(device)

    def settings(self, **changes: Any) -> TTTConfig:
        """The settings of test-time training, with the sink of the defaults."""
        config = TTTConfig(window=self.window, chunk=self.chunk, fast_blocks=self.fast_blocks)
        return replace(config, **changes)


TRAINING = CostShape()
READING = CostShape(vocabulary=4096, window=512, chunk=256)
POSITIONS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
PLAIN, FIRST_ORDER = "plain window", "first order"
FULL, WINDOW, TTT = "full attention", "window", "window + TTT"
_TRAINED = {
    FIRST_ORDER: {},
    "horizon 2": {"horizon": 2},
    "second order": {"horizon": None},
    "second order, checkpointed": {"horizon": None, "checkpoint": True},
    "first order, checkpointed": {"checkpoint": True},
}


@dataclass(frozen=True)
class StepCost:
    """Forward and backward of a row: median seconds, their ratio to the plain window, and peak memory above the start."""

    arm: str
    seconds: float
    ratio: float
    extra_bytes: int | None


@dataclass(frozen=True)
class ReadingCost:
    """Reading after `position` tokens.

    Attributes:
        position: tokens read before.
        chunk_seconds: median seconds of a chunk, by arm; with TTT it is learned too.
        ratio: those with TTT to those of the window, as the median over rounds.
        token_seconds: median seconds of a single token that ends no chunk, by arm.
        learning_seconds: median seconds of the token with which a chunk of single tokens is learned.
        state_bytes: memory of the state of TTT.
    """

    position: int
    chunk_seconds: dict[str, float]
    ratio: float
    token_seconds: dict[str, float]
    learning_seconds: float
    state_bytes: int


# Training


def training_costs(shape: CostShape, device: str, repeat: int, done: Progress = _silent) -> list[StepCost]:
    """Measure a training step of every arm; the plain window, the stock class with a sliding window, comes first."""
    models: dict[str, Any] = {PLAIN: sliding(shape.model(device), shape.window)}
    for arm, changes in _TRAINED.items():
        models[arm] = apply_ttt(shape.model(device), shape.settings(**changes))
    ids = _random_ids(shape, shape.tokens, device)
    steps = {arm: partial(_step, model.train(), ids) for arm, model in models.items()}
    for step in steps.values():
        step()
    extra = {arm: peak_of(step, torch.device(device).type) for arm, step in steps.items()}
    seconds = _in_turn(steps, device, repeat, done)
    return [
        StepCost(arm, statistics.median(own), _median_ratio(own, seconds[PLAIN]), extra[arm])
        for arm, own in seconds.items()
    ]


def _step(model: Any, ids: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


# Reading


def reading_costs(
    shape: CostShape,
    positions: tuple[int, ...],
    device: str,
    repeat: int,
    done: Progress = _silent,
) -> list[ReadingCost]:
    """Measure reading a chunk, and decoding a token, after each number of tokens.

    Full attention and the plain window have caches of noise, of that length; the model with TTT has read that many tokens.
    """
    models: dict[str, Any] = {
        FULL: shape.model(device).eval(),
        WINDOW: sliding(shape.model(device), shape.window).eval(),
        TTT: apply_ttt(shape.model(device), shape.settings()).eval(),
    }
    state, found = TTTState(models[TTT]), []
    for position in sorted(positions):
        # and the token after it, with which the last chunk is learned
        _read(models[TTT], state, _random_ids(shape, position + 1 - state.position, device))
        caches = {arm: _noise(models[arm], shape, position, device) for arm in (FULL, WINDOW)} | {TTT: state}
        counted = [
            _in_turn({arm: _call(models[arm], caches[arm], shape, count, device) for arm in models}, device, repeat)
            for count in (_CHUNKS * shape.chunk, 1)
        ]
        ratio = _median_ratio(counted[0][TTT], counted[0][WINDOW])
        piece, token = ({arm: statistics.median(own) for arm, own in seconds.items()} for seconds in counted)
        chunk = {arm: seconds / _CHUNKS for arm, seconds in piece.items()}
        complete = state.fork()
        _read(models[TTT], complete, _random_ids(shape, shape.chunk - 1, device))
        learning = _in_turn({TTT: _call(models[TTT], complete, shape, 1, device)}, device, repeat)
        found.append(ReadingCost(position, chunk, ratio, token, statistics.median(learning[TTT]), state.nbytes))
        done(len(found), len(positions))
    return found


def crossover(found: list[ReadingCost]) -> float | None:
    """The position from which a chunk is read faster with TTT than with full attention, by a line between the two measured
    positions around it; None if it lies beyond them, 0 if before."""
    gaps = [(cost.position, cost.chunk_seconds[FULL] - cost.chunk_seconds[TTT]) for cost in found]
    if gaps[0][1] >= 0:
        return 0.0
    for (before, lower), (after, upper) in itertools.pairwise(gaps):
        if lower < 0 <= upper:
            return before + (after - before) * -lower / (upper - lower)
    return None


@torch.no_grad()
def _read(model: Any, cache: Any, ids: Tensor) -> None:
    model(ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)


def _call(model: Any, cache: Any, shape: CostShape, count: int, device: str) -> Callable[[], None]:
    """A call that reads `count` tokens after what a cache holds, and leaves the cache as it is.

    A model with TTT divides them into chunks itself; the others get them chunk by chunk, which is no slower.
    """
    ids = _random_ids(shape, count, device)
    pieces = (ids,) if isinstance(cache, TTTState) else ids.split(shape.chunk, 1)

    def call() -> None:
        fork = _forked(cache)
        for piece in pieces:
            _read(model, fork, piece)

    return call


def _forked(cache: Any) -> Any:
    """A cache that shares its tensors, of which none is written in place."""
    if isinstance(cache, TTTState):
        return cache.fork()
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def _noise(model: Any, shape: CostShape, position: int, device: str) -> DynamicCache:
    """A cache as it is after `position` tokens, with random keys and values."""
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        is_window = isinstance(layer, DynamicSlidingWindowLayer)
        kept = min(position, shape.window - 1) if is_window else position
        keys = torch.randn(1, model.config.num_key_value_heads, kept, _HEAD, device=device)
        layer.lazy_initialization(keys, keys)
        layer.keys, layer.values = keys, keys.clone()
        if is_window:
            layer.cumulative_length = position
    return cache


# Time


def _in_turn(
    calls: dict[str, Callable[[], None]], device: str, repeat: int, done: Progress = _silent
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one that is not counted."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {arm: [] for arm in calls}
    for number in range(repeat):
        for arm, call in calls.items():
            seconds[arm].append(_seconds(call, device))
        done(number + 1, repeat)
    return seconds


def _seconds(call: Callable[[], None], device: str) -> float:
    if device == "cpu":
        started = time.process_time()
        call()
        return time.process_time() - started
    torch.accelerator.synchronize()
    started = time.perf_counter()
    call()
    torch.accelerator.synchronize()
    return time.perf_counter() - started


def _median_ratio(own: list[float], plain: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, plain, strict=True))


def _random_ids(shape: CostShape, count: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, shape.vocabulary, (1, count), generator=generator).to(device)
