"""Arguments and results of a backend, besides the tile itself.

Legend: R rows of a tile, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitsTransform:
    """From raw projections to logits: `softcap * tanh(scale * raw / softcap)`, or `scale * raw` without a softcap."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Return the logits, in the dtype of `raw`; differentiable."""
        logits = raw * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def apply_(self, raw: Tensor) -> None:
        """Turn raw projections into logits, in place, with one multiplication before the tanh."""
        if self.softcap is not None:
            raw.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        elif self.scale != 1.0:
            raw.mul_(self.scale)


PLAIN = LogitsTransform()
"""The transform of a model whose projections are its logits."""


@dataclass(frozen=True)
class BaseTile:
    """The base model's raw projections of the rows of a tile, and how the two are compared.

    Args:
        logits (`Tensor` `[R, V]`): of the layout and dtype of the tile; only read.
        transform ([`LogitsTransform`]): of the base model.
        forward (`bool`): the base is the first distribution of the divergence, KL(base || model).
        mask_target (`bool`): the label is left out of both distributions.
    """

    logits: Tensor
    transform: LogitsTransform
    forward: bool
    mask_target: bool


@dataclass(frozen=True)
class AnchorStats:
    """What an anchor needs from one pass over a tile and its base, `[R]` each, in the dtype of [`TileStats`].

    `divergence` is the anchor's, in nats and never negative. The normalisers are those of the distributions that it
    compares (without the label if that is masked): sum_v e^(z_v - maximum) = 1 + rest, likewise for the base.
    """

    divergence: Tensor
    maximum: Tensor
    rest: Tensor
    base_maximum: Tensor
    base_rest: Tensor


@dataclass(frozen=True)
class TileStats:
    """Statistics of one pass over a tile, `[R]` each, float32 (float64 for float64 logits).

    `maximum` and `rest` are the normaliser in two parts: sum_v e^(z_v - maximum) = 1 + rest. `anchor` is None without one.
    """

    nll: Tensor
    entropy: Tensor
    topk_entropy: Tensor | None
    correct: Tensor
    maximum: Tensor
    rest: Tensor
    anchor: AnchorStats | None = None

    def rows(self, index: Tensor | slice) -> TileStats:
        """Return the statistics of some rows."""
        return _mapped([self], lambda parts: parts[0][index])

    @staticmethod
    def concatenate(parts: Sequence[TileStats]) -> TileStats:
        """Return the statistics of several tiles as one, in order."""
        return parts[0] if len(parts) == 1 else _mapped(parts, torch.cat)


_Stats = TypeVar("_Stats", TileStats, AnchorStats)


def _mapped(parts: Sequence[_Stats], change: Callable[[list[Tensor]], Tensor]) -> _Stats:
    """Statistics whose every tensor is `change` of those of all parts; what is None stays None."""

    def value(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        return change(values) if isinstance(values[0], Tensor) else _mapped(values, change)

    kind = type(parts[0])
    return kind(**{field.name: value([getattr(part, field.name) for part in parts]) for field in fields(kind)})
