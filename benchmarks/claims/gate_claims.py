"""EAFT's gate on constructed tokens.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eaftdrope.loss import eaft_loss, token_statistics
from eaftdrope.loss.gates import GATE_OPTIONS, resolve_gate

from .check import Check

# SmolLM2's
VOCABULARY = 49_152
_K = 20


def _logits(probabilities: list[float], vocabulary: int = VOCABULARY) -> Tensor:
    """Logits `[V]` of a distribution with these probabilities at tokens 0, 1, ..., and the rest spread evenly."""
    rest = (1 - sum(probabilities)) / (vocabulary - len(probabilities))
    assert rest > 0
    values_V = torch.full((vocabulary,), rest, dtype=torch.float64)
    values_V[: len(probabilities)] = torch.tensor(probabilities, dtype=torch.float64)
    return values_V.log()


def _weights(logits_NV: Tensor, labels_N: Tensor, gate: str, **options: float) -> list[float]:
    found = resolve_gate(gate, **options)
    return [round(weight, 4) for weight in found(token_statistics(logits_NV, labels_N, k=found.topk)).tolist()]


def bounds() -> Check:
    """E2: the range of the weight, and what is normalised by what."""
    tie_V = _logits([0.9999 / _K] * _K)
    flat_V = torch.zeros(VOCABULARY, dtype=torch.float64)
    sure_V = _logits([1 - 1e-9])
    random_NV = 8 * torch.randn(200, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels_N = torch.zeros(3, dtype=torch.int64)
    rows = torch.stack([sure_V, tie_V, flat_V])
    values = {
        "certain, 20-way tie, uniform: top-20 entropy / ln 20": _weights(rows, labels_N, "eaft"),
        "certain, 20-way tie, uniform: entropy / ln V": _weights(rows, labels_N, "eaft-vocab"),
        "certain, 20-way tie, uniform: top-20 entropy / 3 (LLaMA-Factory)": _weights(
            rows, labels_N, "eaft", divisor=3.0
        ),
        "certain, 20-way tie, uniform: top-20 entropy (Axolotl)": _weights(rows, labels_N, "eaft", divisor=1.0),
    }
    random = _weights(random_NV, torch.zeros(200, dtype=torch.int64), "eaft")
    values["200 random rows, top-20 entropy / ln 20: smallest, largest"] = [min(random), max(random)]
    inside = all(0 <= weight <= 1 for name, row in values.items() if "Axolotl" not in name for weight in row)
    vocabulary = values["certain, 20-way tie, uniform: entropy / ln V"]
    top = values["certain, 20-way tie, uniform: top-20 entropy / ln 20"]
    return Check(
        "E2",
        "the weight lies in [0, 1], and it is the top-20 entropy over ln 20, not the entropy over ln V",
        inside and abs(top[1] - vocabulary[1]) > 0.5 and max(values[next(n for n in values if "Axolotl" in n)]) > 1,
        values,
    )


def constants() -> Check:
    """E3: no hyper-parameter has to be set, but constants are there."""
    options = GATE_OPTIONS["eaft"]
    return Check(
        "E3",
        "the default gate needs no setting and contains the constants alpha = 1 and K = 20",
        options["alpha"] == 1.0 and options["k"] == _K and options["divisor"] is None,
        {"alpha": options["alpha"], "K": options["k"], "ln K": round(math.log(_K), 4)},
    )


def quadrants() -> Check:
    """E5: the gradient with respect to the logits, with the gate and without, in each quadrant of entropy and agreement."""
    sure_V, open_V = _logits([0.97, 0.001]), _logits([0.15, *[0.84 / 19] * 18, 0.01])
    cases = {
        "low entropy, label likely": (sure_V, 0),
        "low entropy, label unlikely": (sure_V, 1),
        "high entropy, label likely": (open_V, 0),
        "high entropy, label unlikely": (open_V, 19),
    }
    values, ratio = {}, {}
    for name, (logits_V, label) in cases.items():
        norms = []
        for gate in ("none", "eaft"):
            z_NV = logits_V[None].clone().requires_grad_()
            eaft_loss(z_NV, torch.tensor([label]), gate).backward()
            norms.append(z_NV.grad.norm().item())
        values[f"{name}: gradient norm plain, gated"] = [round(norm, 4) for norm in norms]
        ratio[name] = norms[1] / norms[0]
    holds = all(value > 0.9 if name.startswith("high") else value < 0.2 for name, value in ratio.items())
    return Check(
        "E5", "the gate leaves high-entropy gradients and shrinks low-entropy ones, agreeing ones too", holds, values
    )


def doubt_and_conflict() -> Check:
    """E16: the same label probability, in a tie and behind a rival."""
    rows = torch.stack([_logits([0.9999 / _K] * _K), _logits([0.90, 0.0499950])])
    labels_N = torch.tensor([1, 1])
    stats = token_statistics(rows, labels_N, k=_K)
    gates = {name: _weights(rows, labels_N, name) for name in ("eaft", "eaft-vocab", "dft", "focal")}
    values = {"label probability": [round(p, 4) for p in stats.probability.tolist()]}
    values |= {f"gate {name}: 20-way tie, behind a 90 % rival": weights for name, weights in gates.items()}
    apart, same = gates["eaft"][0] - gates["eaft"][1], gates["dft"][0] - gates["dft"][1]
    return Check(
        "E16",
        "at a label probability of 5 % EAFT weights a 20-way tie in full and a label behind a 90 % rival little; weights "
        "that read the probability only cannot tell the two apart",
        apart > 0.8 and abs(same) < 1e-3,
        values,
    )


CHECKS = (bounds, constants, quadrants, doubt_and_conflict)
