"""Sums of what the loss saw since the last log: on the device, without a host sync, reduced over processes once a log."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..loss import LOW_GATE, LossDetails

_SUMS = ("tokens", "weighted", "nll", "entropy", "gate", "low_gate", "closed", "conflict", "correct")


class Meter:
    """Accumulates [`LossDetails`]; `pop` returns the means over trained tokens and starts afresh."""

    def __init__(self):
        self._sums: Tensor | None = None

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
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)

    def pop(self, reduce=None) -> dict[str, float]:
        """Metrics since the last call, `{}` if nothing was seen. `reduce` sums a tensor over processes.

        Keys: `tokens` (trained tokens), `weighted` (mean w * nll), `nll`, `entropy` (nats), `gate`, `low_gate` (share of
        tokens with a gate below 0.05), `closed` (share that took no part in the gradient), `conflict` (share of
        confident conflicts), `correct` (token accuracy).
        """
        if self._sums is None:
            return {}
        sums = self._sums if reduce is None else reduce(self._sums)
        self._sums = None
        values = dict(zip(_SUMS, sums.tolist(), strict=True))
        tokens = values.pop("tokens")
        return {"tokens": tokens, **{name: value / max(tokens, 1) for name, value in values.items()}}


def log_names(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of a training interval under the names they are logged by; `entropy` and `mean_token_accuracy` are TRL's."""
    if not metrics:
        return {}
    return {
        "eaft/weighted_loss": metrics["weighted"],
        "eaft/cross_entropy": metrics["nll"],
        "entropy": metrics["entropy"],
        "eaft/gate_mean": metrics["gate"],
        "eaft/gate_low_share": metrics["low_gate"],
        "eaft/closed_share": metrics["closed"],
        "eaft/conflict_share": metrics["conflict"],
        "mean_token_accuracy": metrics["correct"],
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

    def pop(self, reduce) -> tuple[float, float]:
        """(tokens over all processes, seconds)"""
        tokens, self._tokens = reduce(self._tokens).item(), None
        return tokens, time.perf_counter() - self._started
