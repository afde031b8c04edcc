"""Arguments and results of a backend, besides the tile itself.

Legend: R rows of a tile, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

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
class TileStats:
    """Statistics of one pass over a tile, `[R]` each, float32 (float64 for float64 logits).

    `maximum` and `rest` are the normaliser in two parts: sum_v e^(z_v - maximum) = 1 + rest.
    """

    nll: Tensor
    entropy: Tensor
    topk_entropy: Tensor | None
    correct: Tensor
    maximum: Tensor
    rest: Tensor

    def rows(self, index: Tensor | slice) -> TileStats:
        """Return the statistics of some rows."""
        return TileStats(**{name: None if value is None else value[index] for name, value in self._items()})

    @staticmethod
    def concatenate(parts: Sequence[TileStats]) -> TileStats:
        """Return the statistics of several tiles as one, in order."""
        if len(parts) == 1:
            return parts[0]
        return TileStats(
            **{
                name: None if value is None else torch.cat([getattr(part, name) for part in parts])
                for name, value in parts[0]._items()
            }
        )

    def _items(self) -> list[tuple[str, Tensor | None]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]
