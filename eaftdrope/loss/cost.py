"""The cost of the loss on one device: time, memory and gradient error beside full logits, for `eaftdrope bench loss`.

The floor is the three matrix products that every method needs: logits, gradient of the hidden states, gradient of the head.
Methods take turns within a round, and the ratio to the floor of the same round is reported, as a median over rounds.

Legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .definition import eaft_loss
from .fused import linear_loss
from .gates import resolve_gate
from .settings import LossSettings

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
FLOOR = "three matrix products"
# rows whose gradients are compared with float64
_CHECKED_ROWS = 64
_SEED = 0


@dataclass(frozen=True)
class Measurement:
    """One method: median seconds of a call with its gradients, the ratio to the floor, and what it needs beyond."""

    method: str
    seconds: float = math.nan
    ratio: float = math.nan
    extra_bytes: int | None = None
    gradient_error: float | None = None
    unavailable: str | None = None


def measure(
    hidden_size: int, vocabulary: int, rows: int, dtype: str, gate: str, device: str, repeat: int
) -> list[Measurement]:
    """Measure every method that runs on `device`; the floor comes first.

    Raises:
        ValueError: an unknown gate.
    """
    inputs = _inputs(hidden_size, vocabulary, rows, getattr(torch, dtype), device)
    methods = _methods(gate)
    missing = {name: reason for name in methods if (reason := _unavailable(name, device))}
    running = {name: loss for name, loss in methods.items() if name not in missing}
    _products(*inputs)
    memory = {name: _extra_bytes(loss, inputs) for name, loss in running.items()}

    seconds: dict[str, list[float]] = {name: [] for name in (FLOOR, *running)}
    for _ in range(repeat):
        seconds[FLOOR].append(_seconds(lambda: _products(*inputs), device))
        for name, loss in running.items():
            seconds[name].append(_seconds(lambda loss=loss: _gradients(loss, *inputs), device))

    found = [Measurement(FLOOR, statistics.median(seconds[FLOOR]), 1.0)]
    for name in methods:
        if name in missing:
            found.append(Measurement(name, unavailable=missing[name]))
            continue
        ratios = [own / floor for own, floor in zip(seconds[name], seconds[FLOOR], strict=True)]
        error = _gradient_error(running[name], inputs, "none" if name in _PLAIN else gate)
        median = statistics.median
        found.append(Measurement(name, median(seconds[name]), median(ratios), memory[name], error))
    return found


_LIGER = "Liger, plain cross-entropy"
_FULL = "full logits, plain cross-entropy"
_PLAIN = (_LIGER, _FULL)


def _methods(gate: str) -> dict[str, Loss]:
    settings = LossSettings(resolve_gate(gate))
    return {
        f"eaftdrope, gate {gate}": lambda hidden, weight, labels: linear_loss(hidden, weight, labels, settings)[0],
        f"full logits, gate {gate}": lambda hidden, weight, labels: eaft_loss(
            F.linear(hidden, weight).float(), labels, gate=gate
        ),
        _FULL: lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels),
        _LIGER: _liger,
    }


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def _unavailable(method: str, device: str) -> str | None:
    if method != _LIGER:
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed"
    return "needs a GPU" if device == "cpu" else None


def _inputs(
    hidden_size: int, vocabulary: int, rows: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states and head with logits of unit variance, and labels; the same on every device."""
    generator = torch.Generator().manual_seed(_SEED)
    hidden_ND = torch.randn(rows, hidden_size, generator=generator)
    weight_VD = torch.randn(vocabulary, hidden_size, generator=generator) / math.sqrt(hidden_size)
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden_ND.to(device, dtype), weight_VD.to(device, dtype), labels_N.to(device)


def _products(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> None:
    logits_NV = hidden_ND @ weight_VD.T
    logits_NV @ weight_VD
    logits_NV.T @ hidden_ND


def _gradients(loss: Loss, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    hidden, weight = hidden_ND.detach().requires_grad_(), weight_VD.detach().requires_grad_()
    grad_hidden, grad_weight = torch.autograd.grad(loss(hidden, weight, labels_N), (hidden, weight))
    return grad_hidden, grad_weight


def _seconds(call: Callable[[], object], device: str) -> float:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def _extra_bytes(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> int | None:
    """Peak memory of a call beyond its inputs and gradients; None on the CPU, where torch does not count it.

    The call also serves as the warm-up.
    """
    if not inputs[0].is_cuda:
        _gradients(loss, *inputs)
        return None
    _gradients(loss, *inputs)
    torch.cuda.reset_peak_memory_stats(inputs[0].device)
    before = torch.cuda.memory_allocated(inputs[0].device)
    gradients = _gradients(loss, *inputs)
    return torch.cuda.max_memory_allocated(inputs[0].device) - before - sum(g.nbytes for g in gradients)


def _gradient_error(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], gate: str) -> float:
    """Largest relative error of the two gradients over some rows, against the definition in float64."""
    hidden_ND, weight_VD, labels_N = inputs[0][:_CHECKED_ROWS], inputs[1], inputs[2][:_CHECKED_ROWS]
    found = _gradients(loss, hidden_ND, weight_VD, labels_N)
    exact = _gradients(
        lambda hidden, weight, labels: eaft_loss(F.linear(hidden, weight), labels, gate=gate),
        hidden_ND.cpu().double(),
        weight_VD.cpu().double(),
        labels_N.cpu(),
    )
    return max(float((own.cpu().double() - true).norm() / true.norm()) for own, true in zip(found, exact, strict=True))
