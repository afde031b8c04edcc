"""Sums of what the loss saw since the last log: on the device, without a host sync, reduced over processes once a log."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from eaftdrope.loss import LOW_GATE, LossDetails
from eaftdrope.loss.landscape import Landscape

_SUMS = ("tokens", "weighted", "nll", "entropy", "gate", "low_gate", "closed", "conflict", "correct")
# No gate has a mean near it; a constant or a divisor that is a slip of the pen has.
_EXTREME_GATE = 1e6
_OF_THE_LANDSCAPE = ("high_entropy_", "low_entropy_", "gate_hist_")


class Latest(NamedTuple):
    """Of one micro-batch, on the device: `loss` (float32 [], sum of w * nll) and `extreme_gate` (bool []): the gate's mean is
    not finite or above 1e6, although the cross-entropy is finite."""

    loss: Tensor
    extreme_gate: Tensor


class Meter:
    """Accumulates [`LossDetails`]; `pop` returns the means over trained tokens and starts afresh. `pop_landscape` does so
    with the landscape of a stretch of its own."""

    def __init__(self):
        self._sums: Tensor | None = None
        self._latest: Tensor | None = None
        # since the last pop, and since the last pop_landscape
        self._logged: Landscape | None = None
        self._window: Landscape | None = None

    def add(self, details: LossDetails) -> None:
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
        """Of the last call of `add`; None before the first."""
        if self._latest is None:
            return None
        tokens, weighted, nll, _, gate, *_ = self._latest
        return Latest(weighted, nll.isfinite() & ~(gate <= _EXTREME_GATE * tokens))

    def pop(self, reduce=None) -> dict[str, float]:
        """Metrics since the last call, `{}` if nothing was seen. `reduce` sums a tensor over processes.

        Keys: `tokens` (trained tokens), `weighted` (mean w * nll), `nll`, `entropy` (nats), `gate`, `low_gate` (share of
        tokens with a gate below 0.05), `closed` (share that took no part in the gradient), `conflict` (share of
        confident conflicts), `correct` (token accuracy), and those of [`Landscape.log_values`].
        """
        if self._sums is None:
            return {}
        sums = self._sums if reduce is None else reduce(self._sums)
        landscape = self._logged if reduce is None else self._logged.reduced(reduce)
        self._sums = self._logged = None
        values = dict(zip(_SUMS, sums.tolist(), strict=True))
        tokens = values.pop("tokens")
        means = {name: value / max(tokens, 1) for name, value in values.items()}
        return {"tokens": tokens, **means, **landscape.log_values()}

    def pop_landscape(self, reduce=None) -> Landscape | None:
        """The landscape since the last call, None if nothing was seen. `reduce` sums a tensor over processes."""
        landscape, self._window = self._window, None
        return landscape if landscape is None or reduce is None else landscape.reduced(reduce)


def log_names(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of a training interval under the names they are logged by; `entropy` and `mean_token_accuracy` are TRL's."""
    if not metrics:
        return {}
    landscape = {f"eaft/{name}": value for name, value in metrics.items() if name.startswith(_OF_THE_LANDSCAPE)}
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
    """Tokens seen, padding apart, and the seconds since the first batch after the last log: evaluation and saving in
    between do not count."""

    def __init__(self):
        self._tokens: Tensor | None = None
        self._started = 0.0

    def add(self, inputs: dict) -> None:
        if self._tokens is None:
            self._started = time.perf_counter()
            self._tokens = torch.zeros((), device=inputs["input_ids"].device)
        mask = inputs.get("attention_mask")
        self._tokens += inputs["input_ids"].numel() if mask is None else mask.sum()

    def seen(self, reduce) -> float:
        """Tokens since the last `pop`, over all processes."""
        return 0 if self._tokens is None else reduce(self._tokens).item()

    def pop(self, reduce) -> tuple[float, float]:
        """(tokens over all processes, seconds)"""
        tokens, self._tokens = reduce(self._tokens).item(), None
        return tokens, time.perf_counter() - self._started
