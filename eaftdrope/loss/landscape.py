"""The landscape of trained tokens: their density on the plane of entropy and label probability.

    density[i, j]   tokens with entropy in [0.1 i, 0.1 (i + 1)) nats, the last row open, and label probability in
                    [0.025 j, 0.025 (j + 1)), the last column closed    (arXiv 2601.02151, Figure 1b)
    gate[k]         tokens with a gate in [0.05 k, 0.05 (k + 1)); below 0 counts in the first, above 1 in the last; tokens
                    that are exempt from the gate have 1
    groups          tokens, sum of nll and sum of w * nll, where entropy >= 2 (high) and where entropy <= 0.5 (low): Figure 4

Computed from the statistics of the loss on their device, without a host sync, so that it is cheap in training: one
scatter per batch. Landscapes add up over batches and processes. A token whose statistics are NaN is not counted.

Legend: T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .statistics import CONFLICT_ENTROPY, CONFLICT_PROBABILITY, TokenStats

# Bins, and bins per unit: a product with a whole number keeps decimal edges, a quotient loses them (0.3 / 0.1 < 3).
ENTROPY_BINS, ENTROPY_UNIT = 80, 10
PROBABILITY_BINS, PROBABILITY_UNIT = 40, 40
GATE_BINS, GATE_UNIT = 20, 20

HIGH_ENTROPY = 2.0
LOW_ENTROPY = 0.5
GROUPS = ("high", "low")
GROUP_SUMS = ("tokens", "nll", "weighted")


@dataclass(frozen=True)
class Landscape:
    """Counts and sums of some tokens.

    Args:
        density (`Tensor` `[80, 40]`, int64): tokens by entropy and label probability.
        gate (`Tensor` `[20]`, int64): tokens by gate.
        groups (`Tensor` `[2, 3]`, float64; float32 on a device without it): `GROUP_SUMS` of each of `GROUPS`.
    """

    density: Tensor
    gate: Tensor
    groups: Tensor

    @staticmethod
    def of(
        stats: TokenStats, weight_T: Tensor, trained_T: Tensor | None = None, gate_T: Tensor | None = None
    ) -> Landscape:
        """Return the landscape of T tokens and their weights in the loss.

        Args:
            trained_T: mask of the tokens that count (None: all).
            gate_T: their gates, where these are not their weights.
        """
        gate_T = weight_T if gate_T is None else gate_T
        entropy_T, nll_T = stats.entropy, stats.nll
        row_T = _bin(entropy_T, ENTROPY_UNIT, ENTROPY_BINS)
        cell_T = row_T * PROBABILITY_BINS + _bin(stats.probability, PROBABILITY_UNIT, PROBABILITY_BINS)
        lost_T = entropy_T.isnan() | nll_T.isnan() | weight_T.isnan()
        if trained_T is not None:
            lost_T = lost_T | ~trained_T
        density = _counts(cell_T, lost_T, ENTROPY_BINS * PROBABILITY_BINS).view(ENTROPY_BINS, PROBABILITY_BINS)

        # a token whose gate is closed adds nothing even if its label is impossible (0 * inf)
        weighted_T = torch.where(weight_T == 0, 0, weight_T * nll_T)
        values = torch.stack([torch.ones_like(nll_T), nll_T, weighted_T])
        inside = torch.stack([entropy_T >= HIGH_ENTROPY, entropy_T <= LOW_ENTROPY]) & ~lost_T
        dtype = torch.float32 if nll_T.device.type == "mps" else torch.float64
        groups = torch.where(inside[:, None], values, 0).sum(-1, dtype=dtype)
        return Landscape(density, _counts(_bin(gate_T, GATE_UNIT, GATE_BINS), lost_T, GATE_BINS), groups)

    def __add__(self, other: Landscape) -> Landscape:
        return Landscape(
            self.density + other.density.to(self.density.device),
            self.gate + other.gate.to(self.gate.device),
            self.groups + other.groups.to(self.groups.device),
        )

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> Landscape:
        """Return the landscape of all processes; `reduce` sums a tensor over them."""
        return Landscape(reduce(self.density), reduce(self.gate), reduce(self.groups))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; an infinite sum (an impossible label) is null. Waits for the device."""
        groups = [[value if math.isfinite(value) else None for value in row] for row in self.groups.tolist()]
        conflicts = self.density[
            : _edge(CONFLICT_ENTROPY, ENTROPY_UNIT), : _edge(CONFLICT_PROBABILITY, PROBABILITY_UNIT)
        ]
        return {
            "density": self.density.tolist(),
            "entropy_width": 1 / ENTROPY_UNIT,
            "probability_width": 1 / PROBABILITY_UNIT,
            "gate": self.gate.tolist(),
            "groups": {name: dict(zip(GROUP_SUMS, row, strict=True)) for name, row in zip(GROUPS, groups, strict=True)},
            "tokens": int(self.density.sum()),
            "conflicts": int(conflicts.sum()),
        }

    def log_values(self) -> dict[str, float]:
        """Return the values of a log: `high_entropy_loss` and `low_entropy_loss` (mean nll of the group; left out if it has
        no token), `high_entropy_share`, `low_entropy_share`, and `gate_hist_00` to `gate_hist_09` (shares of the tokens by
        tenths of the gate). Waits for the device."""
        tokens = max(int(self.density.sum()), 1)
        values = {}
        for name, (count, nll, _) in zip(GROUPS, self.groups.tolist(), strict=True):
            if count:
                values[f"{name}_entropy_loss"] = nll / count
            values[f"{name}_entropy_share"] = count / tokens
        tenths = self.gate.view(10, -1).sum(1).tolist()
        return values | {f"gate_hist_{k:02d}": count / tokens for k, count in enumerate(tenths)}


def _bin(values_T: Tensor, unit: int, bins: int) -> Tensor:
    """Return bins `[T]` int64, `unit` of them from 0 to 1; the first and the last are open."""
    # clamped first: the conversion of NaN and infinity to integers differs by device
    return (values_T * unit).nan_to_num(0).clamp(0, bins - 1).long()


def _counts(bin_T: Tensor, lost_T: Tensor, bins: int) -> Tensor:
    """Return the number of tokens in each bin, `[bins]` int64. Not bincount, which waits for the device."""
    bin_T = torch.where(lost_T, bins, bin_T)
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=bin_T.device)
    return counts.index_add(0, bin_T, torch.ones_like(bin_T))[:bins]


def _edge(value: float, unit: int) -> int:
    """Return the bin that begins at `value`."""
    return round(value * unit)
