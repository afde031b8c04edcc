"""Statistics of the loss since the last log: summed on the device without a host sync, reduced over processes once per
log."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from eaftdrope.loss.fused import LossDetails
from eaftdrope.loss.landscape import Landscape
from eaftdrope.loss.statistics import LOW_GATE

Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a tensor over processes."""

_SUMS = ("tokens", "weighted", "nll", "entropy", "gate", "gated", "low_gate", "closed", "conflict", "correct")
# with an anchor
_ANCHORED_SUMS = (*_SUMS, "divergence")
# No sensible gate has a mean near this; a mistyped constant or divisor has.
_EXTREME_GATE = 1e6
_POSITION = "nll_"
_LANDSCAPE_METRICS = ("high_entropy_", "low_entropy_", "gate_hist_")


class Latest(NamedTuple):
    """Figures of one micro-batch, on the device: `loss` (float32 [], sum of w * nll; with an anchor also of the divergence,
    without its factor: finite if the loss is) and `extreme_gate` (bool []): the mean gate is not finite or above 1e6,
    although the cross-entropy is finite."""

    loss: Tensor
    extreme_gate: Tensor


class Meter:
    """Accumulates [`LossDetails`]; `pop` returns the means over trained tokens and resets. `pop_landscape` does the same for
    the landscape, over an interval of its own.

    Args:
        edges (`tuple[int, ...]`, *optional*): positions in a row, rising from 0 to one that no row reaches, that bound the
            bins of the loss by position; without any it is not kept.
    """

    def __init__(self, edges: tuple[int, ...] = ()) -> None:
        self._edges = edges
        # tokens and sum of nll in each bin
        self._positions: Tensor | None = None
        self._sums: Tensor | None = None
        self._latest: Tensor | None = None
        # since the last pop, and since the last pop_landscape
        self._logged: Landscape | None = None
        self._window: Landscape | None = None

    def add(self, details: LossDetails, length: int) -> None:
        """Add one call of the loss, on rows of `length` tokens."""
        stats, weight_T = details.stats, details.weight
        gate_T, gate_sum_T, gated_T = _gates(details)
        parts = (
            torch.ones_like(weight_T),
            torch.where(weight_T == 0, 0, weight_T * stats.nll),
            stats.nll,
            stats.entropy,
            gate_sum_T,
            gated_T,
            gate_T < LOW_GATE,
            details.closed,
            stats.conflict,
            stats.correct,
            *(() if details.divergence is None else (details.divergence,)),
        )
        if details.trained is not None:
            parts = [torch.where(details.trained, part, 0) for part in parts]
        sums = torch.stack([part.sum(dtype=torch.float32) for part in parts])
        self._latest = sums
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)
        if self._edges:
            positions = _by_position(details, length, self._edges)
            self._positions = positions if self._positions is None else self._positions + positions
        landscape = Landscape.of(stats, weight_T, details.trained, gate_T)
        self._logged = landscape if self._logged is None else self._logged + landscape
        self._window = landscape if self._window is None else self._window + landscape

    @property
    def latest(self) -> Latest | None:
        """Figures of the last call of `add`; None before the first."""
        if self._latest is None:
            return None
        _, weighted, nll, _, gate, gated = self._latest[:6]
        # with an anchor the divergence follows the others
        loss = weighted + self._latest[len(_SUMS) :].sum()
        return Latest(loss, nll.isfinite() & ~(gate <= _EXTREME_GATE * gated))

    def pop(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Return the metrics since the last call, `{}` if there was none of `add`.

        Keys: `tokens` (trained tokens), `weighted` (mean w * nll), `nll`, `entropy` (nats), `gate` (mean over the tokens
        that have one, by their own weights; 1 without any), `low_gate` (share of tokens whose gate is below 0.05),
        `closed` (share whose cross-entropy took no part in the gradient), `conflict` (share of confident conflicts),
        `correct` (token accuracy), with an anchor `divergence` (nats), those of [`Landscape.log_values`], and with edges
        `nll_0_512`, ... (mean nll of the labels of the tokens at positions 0 to 511; left out if no token is there).
        """
        if self._sums is None or self._logged is None:
            return {}
        sums = self._sums if reduce is None else reduce(self._sums)
        landscape = self._logged if reduce is None else self._logged.reduced(reduce)
        self._sums = self._logged = None
        names = _SUMS if len(sums) == len(_SUMS) else _ANCHORED_SUMS
        values = dict(zip(names, sums.tolist(), strict=True))
        tokens, gate, gated = (values.pop(name) for name in ("tokens", "gate", "gated"))
        means = {name: value / max(tokens, 1) for name, value in values.items()}
        means["gate"] = gate / gated if gated else 1.0
        return {"tokens": tokens, **means, **landscape.log_values(), **self._pop_positions(reduce)}

    def _pop_positions(self, reduce: Reduce | None) -> dict[str, float]:
        if self._positions is None:
            return {}
        positions = self._positions if reduce is None else reduce(self._positions)
        self._positions = None
        bins = zip(pairwise(self._edges), positions.T.tolist(), strict=True)
        return {f"{_POSITION}{start}_{end}": nll / tokens for (start, end), (tokens, nll) in bins if tokens}

    def pop_landscape(self, reduce: Reduce | None = None) -> Landscape | None:
        """Return the landscape since the last call, None if there was none of `add`."""
        landscape, self._window = self._window, None
        return landscape if landscape is None or reduce is None else landscape.reduced(reduce)


def _gates(details: LossDetails) -> tuple[Tensor, Tensor, Tensor]:
    """(gate, gate times the token's own weight, that weight) of each token, `[T]` each; a token that is exempt from the gate
    has (1, 0, 0), and so the mean gate is the `constant` gate of the same scale."""
    weight_T, own_T = details.weight, details.token_weight
    if own_T is None:
        return weight_T, weight_T, torch.ones_like(weight_T)
    own_T = own_T.to(weight_T.dtype)
    gated_T = own_T > 0
    return torch.where(gated_T, weight_T / own_T, 1), torch.where(gated_T, weight_T, 0), own_T.clamp_min(0)


def _by_position(details: LossDetails, length: int, edges: tuple[int, ...]) -> Tensor:
    """Tokens and sum of nll by position in the row, `[2, bins]`."""
    nll_T, position_T = details.stats.nll, details.rows % length
    # a comparison with the few edges and not bucketize, which would need them on the device first
    bin_T = sum((position_T >= edge).long() for edge in edges[1:-1]) + torch.zeros_like(position_T)
    counted_T = torch.ones_like(nll_T)
    if details.trained is not None:
        nll_T, counted_T = (torch.where(details.trained, part, 0) for part in (nll_T, counted_T))
    values = torch.stack([counted_T, nll_T]).float()
    return torch.zeros(2, len(edges) - 1, device=nll_T.device).index_add(1, bin_T, values)


def log_names(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics under their names in the logs; `entropy` and `mean_token_accuracy` are TRL's."""
    if not metrics:
        return {}
    landscape = {f"eaft/{name}": value for name, value in metrics.items() if name.startswith(_LANDSCAPE_METRICS)}
    positions = {f"position/{name}": value for name, value in metrics.items() if name.startswith(_POSITION)}
    anchor = {"eaft/anchor_kl": metrics["divergence"]} if "divergence" in metrics else {}
    return {
        "eaft/weighted_loss": metrics["weighted"],
        "eaft/cross_entropy": metrics["nll"],
        "entropy": metrics["entropy"],
        "eaft/gate_mean": metrics["gate"],
        "eaft/gate_low_share": metrics["low_gate"],
        "eaft/closed_share": metrics["closed"],
        "eaft/conflict_share": metrics["conflict"],
        "mean_token_accuracy": metrics["correct"],
        **anchor,
        **landscape,
        **positions,
    }


class TokenClock:
    """Tokens without padding, and the seconds since the first batch after the last log: evaluation and saving in between do
    not count."""

    def __init__(self) -> None:
        self._tokens: Tensor | None = None
        self._started = 0.0

    def add(self, inputs: dict[str, Any]) -> None:
        if self._tokens is None:
            self._started = time.perf_counter()
            self._tokens = torch.zeros((), device=inputs["input_ids"].device)
        mask = inputs.get("attention_mask")
        self._tokens += inputs["input_ids"].numel() if mask is None else mask.sum()

    def tokens(self, reduce: Reduce) -> float:
        """Return the tokens since the last `pop`, over all processes."""
        return 0 if self._tokens is None else reduce(self._tokens).item()

    def pop(self, reduce: Reduce) -> tuple[float, float]:
        """Return (tokens over all processes, seconds) and reset."""
        assert self._tokens is not None, "no batch since the last log"
        tokens, self._tokens = reduce(self._tokens).item(), None
        return tokens, time.perf_counter() - self._started
