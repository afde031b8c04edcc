"""Sums over all tokens: the landscape, the quadrants with their share of the gradient, positions and sources."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eaftdrope.loss import CONFLICT_ENTROPY, CONFLICT_PROBABILITY
from eaftdrope.loss.landscape import Landscape

from .tokens import Tokens

# by (entropy >= 0.5) * 2 + (probability >= 0.1)
QUADRANTS = ("confident conflict", "confident agreement", "uncertain, unlikely label", "uncertain, likely label")
# The rank of a token among its row's trained tokens, by powers of two: 1, 2-3, 4-7, ...; the last is open.
_POSITIONS = 24
_MEANS = ("nll", "entropy", "gate", "conflict_share", "accuracy")


class Tally:
    """Sums over tokens, in float64 on the CPU.

    Args:
        sources: names of the sources of the rows.
    """

    def __init__(self, sources: list[str]) -> None:
        self.names = sources
        self._landscape: Landscape | None = None
        self._quadrants = torch.zeros(len(QUADRANTS), 3, dtype=torch.float64)
        self._positions = torch.zeros(_POSITIONS, 1 + len(_MEANS), dtype=torch.float64)
        self._sources = torch.zeros(len(sources), 1 + len(_MEANS), dtype=torch.float64)
        self._rows = [0] * len(sources)

    def add(self, tokens: Tokens, sources: list[int]) -> None:
        """Add a batch; `sources` has the index of each row's source."""
        stats = tokens.stats
        landscape = Landscape.of(stats, tokens.weight)
        self._landscape = landscape if self._landscape is None else self._landscape + landscape
        one = torch.ones_like(stats.nll)
        quadrant = (stats.entropy >= CONFLICT_ENTROPY).long() * 2 + (stats.probability >= CONFLICT_PROBABILITY)
        _add(self._quadrants, quadrant, (one, tokens.gradient, tokens.weight.abs() * tokens.gradient))
        values = (one, stats.nll, stats.entropy, tokens.weight, stats.conflict, stats.correct)
        power = tokens.rank.double().log2().floor().long().clamp_max(_POSITIONS - 1)
        _add(self._positions, power, values)
        _add(self._sources, torch.tensor(sources, device=tokens.row.device)[tokens.row], values)
        for source in sources:
            self._rows[source] += 1

    def landscape(self) -> dict[str, Any]:
        """Return the joint histogram of entropy and probability."""
        assert self._landscape is not None, "no batch was added"
        return self._landscape.to_dict()

    @property
    def tokens(self) -> int:
        """Number of trained tokens."""
        return int(self._sources[:, 0].sum())

    def summary(self) -> dict[str, float]:
        """Return means over the tokens."""
        return _means(self._sources.sum(0))

    def quadrants(self) -> list[dict[str, Any]]:
        """Return each quadrant's share of the tokens and of the sum of their gradient norms, plain and times the gate."""
        shares = self._quadrants / self._quadrants.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
        keys = ("name", "tokens", "gradient", "gated_gradient")
        return [dict(zip(keys, (name, *row))) for name, row in zip(QUADRANTS, shares.tolist(), strict=True)]

    def positions(self) -> list[dict[str, Any]]:
        """Return the means by rank of the token in its row."""
        found = []
        for power, sums in enumerate(self._positions):
            if sums[0]:
                last = None if power == _POSITIONS - 1 else 2 ** (power + 1) - 1
                found.append({"from": 2**power, "to": last, **_part(sums)})
        return found

    def sources(self) -> list[dict[str, Any]]:
        """Return the means by source."""
        entries = zip(self.names, self._rows, self._sources, strict=True)
        return [{"source": name, "rows": rows, **_part(sums)} for name, rows, sums in entries if rows]


def _add(sums: Tensor, index_N: Tensor, values: tuple[Tensor, ...]) -> None:
    stacked = torch.stack([value.double() for value in values], 1).cpu()
    sums.index_add_(0, index_N.cpu(), stacked)


def _means(sums: Tensor) -> dict[str, float]:
    tokens, *totals = sums.tolist()
    return {name: total / tokens for name, total in zip(_MEANS, totals, strict=True)}


def _part(sums: Tensor) -> dict[str, Any]:
    means = _means(sums)
    return {"tokens": int(sums[0]), **{name: means[name] for name in ("gate", "conflict_share", "nll")}}
