"""Statistics of the loss since the last log: summed on the device without a host sync, reduced over processes once per
log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from eaftdrope.loss.fused import LossDetails
from eaftdrope.loss.landscape import Landscape
from eaftdrope.loss.statistics import LOW_GATE

Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a tensor over processes."""

_SUMS = ("tokens", "weighted", "nll", "entropy", "gate", "low_gate", "closed", "conflict", "correct")
# No sensible gate has a mean near this; a mistyped constant or divisor has.
_EXTREME_GATE = 1e6
_LANDSCAPE_METRICS = ("high_entropy_", "low_entropy_", "gate_hist_")


class Latest(NamedTuple):
    """Figures of one micro-batch, on the device: `loss` (float32 [], sum of w * nll) and `extreme_gate` (bool []): the mean
    gate is not finite or above 1e6, although the cross-entropy is finite."""

    loss: Tensor
    extreme_gate: Tensor


class Meter:
    """Accumulates [`LossDetails`]; `pop` returns the means over trained tokens and resets. `pop_landscape` does the same for
    the landscape, over an interval of its own."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._latest: Tensor | None = None
        # since the last pop, and since the last pop_landscape
        self._logged: Landscape | None = None
        self._window: Landscape | None = None

    def add(self, details: LossDetails) -> None:
        """Add one call of the loss."""
        stats, weight_T = details.stats, details.weight
        parts = (
            torch.ones_like(weight_T),
            torch.where(weight_T == 0, 0, weight_T * stats.nll),
            stats.nll,
            stats.entropy,
            weight_T,
            weight_T < LOW_GATE,
            details.closed,
            stats.conflict,
            stats.correct,
        )
        if details.trained is not None:
            parts = [torch.where(details.trained, part, 0) for part in parts]
        sums = torch.stack([part.sum(dtype=torch.float32) for part in parts])
        self._latest = sums
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)
        landscape = Landscape.of(stats, weight_T, details.trained)
        self._logged = landscape if self._logged is None else self._logged + landscape
        self._window = landscape if self._window is None else self._window + landscape

    @property
    def latest(self) -> Latest | None:
        """Figures of the last call of `add`; None before the first."""
        if self._latest is None:
            return None
        tokens, weighted, nll, _, gate, *_ = self._latest
        return Latest(weighted, nll.isfinite() & ~(gate <= _EXTREME_GATE * tokens))

    def pop(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Return the metrics since the last call, `{}` if there was none of `add`.

        Keys: `tokens` (trained tokens), `weighted` (mean w * nll), `nll`, `entropy` (nats), `gate`, `low_gate` (share of
        tokens with a gate below 0.05), `closed` (share that took no part in the gradient), `conflict` (share of
        confident conflicts), `correct` (token accuracy), and those of [`Landscape.log_values`].
        """
        if self._sums is None or self._logged is None:
            return {}
        sums = self._sums if reduce is None else reduce(self._sums)
        landscape = self._logged if reduce is None else self._logged.reduced(reduce)
        self._sums = self._logged = None
        values = dict(zip(_SUMS, sums.tolist(), strict=True))
        tokens = values.pop("tokens")
        means = {name: value / max(tokens, 1) for name, value in values.items()}
        return {"tokens": tokens, **means, **landscape.log_values()}

    def pop_landscape(self, reduce: Reduce | None = None) -> Landscape | None:
        """Return the landscape since the last call, None if there was none of `add`."""
        landscape, self._window = self._window, None
        return landscape if landscape is None or reduce is None else landscape.reduced(reduce)


def log_names(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics under their names in the logs; `entropy` and `mean_token_accuracy` are TRL's."""
    if not metrics:
        return {}
    landscape = {f"eaft/{name}": value for name, value in metrics.items() if name.startswith(_LANDSCAPE_METRICS)}
    return {
        "eaft/weighted_loss": metrics["weighted"],
        "eaft/cross_entropy": metrics["nll"],
        "entropy": metrics["entropy"],
        "eaft/gate_mean": metrics["gate"],
        "eaft/gate_low_share": metrics["low_gate"],
        "eaft/closed_share": metrics["closed"],
        "eaft/conflict_share": metrics["conflict"],
        "mean_token_accuracy": metrics["correct"],
        **landscape,
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
