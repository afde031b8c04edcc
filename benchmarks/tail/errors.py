"""Errors of gradients from the kept columns only, relative to all columns in float64.

There are two kinds of figures. `grid` computes the sparse gradients here, in float32, for settings that the operator does
not have (other group heights, rows in another order, a rank-1 term for the weight gradient); `operator` is
`fused_linear_eaft` itself, exact and sparse, by dtype. Hidden states and head are bfloat16 values throughout, so that every
figure has the same reference.

Legend: N rows (tokens), R rows of a group, D hidden size, V vocabulary, C kept columns, G groups.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from eaftdrope.loss import fused_linear_eaft
from eaftdrope.loss.definition import evaluate_gate, token_statistics
from eaftdrope.loss.gates import resolve_gate

from .kept import watch_kept_columns

THRESHOLDS = (2.0**-10, 2.0**-11, 2.0**-12, 2.0**-13)
HEIGHTS = (64, 128, 256, 512)
ORDERS = ("as they come", "sorted")
GATES = ("eaft", "none")
# rows within which a sorted order may move a row, as in a tile of the operator
TILE_ROWS = 1024
# rows of float64 logits at a time
_TRUTH_ROWS = 128


@dataclass(frozen=True)
class Truth:
    """Gradients with respect to the logits (float32, rounded from float64), and to hidden states and head (float64)."""

    logits_NV: Tensor
    hidden_ND: Tensor
    weight_VD: Tensor
    gate_mean: float


@dataclass(frozen=True)
class Sparse:
    """Gradients from the kept columns, with and without the rank-1 terms of the dropped ones."""

    share: float
    hidden_ND: Tensor
    hidden_no_tail_ND: Tensor
    weight_VD: Tensor
    weight_rank1_VD: Tensor


def flops(share: float) -> float:
    """FLOPs relative to three dense GEMMs: the projection is complete, the two gradient GEMMs are partial."""
    return (2 + 4 * share) / 6


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference relative to that of the expected value."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def truth_by_gate(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, gates=GATES) -> dict[str, Truth]:
    """Return the gradients of the sum of w nll in float64; the logits are formed once for all gates."""
    head64_VD = head_VD.double()
    parts: dict = {gate: [[], [], torch.zeros_like(head64_VD), []] for gate in gates}
    for rows in torch.arange(len(labels_N)).split(_TRUTH_ROWS):
        hidden_RD, labels_R = hidden_ND[rows].double(), labels_N[rows]
        logits_RV = hidden_RD @ head64_VD.T
        stats = token_statistics(logits_RV, labels_R, k=20)
        plain_RV = logits_RV.softmax(-1)
        plain_RV[torch.arange(len(rows)), labels_R] = torch.expm1(-stats.nll)
        for gate, (by_logits, by_hidden, by_weight_VD, weights) in parts.items():
            weight_R = evaluate_gate(resolve_gate(gate), stats)
            grad_RV = weight_R[:, None] * plain_RV
            by_logits.append(grad_RV.float())
            by_hidden.append(grad_RV @ head64_VD)
            by_weight_VD += grad_RV.T @ hidden_RD
            weights.append(weight_R)
    return {
        gate: Truth(torch.cat(by_logits), torch.cat(by_hidden), by_weight_VD, torch.cat(weights).mean().item())
        for gate, (by_logits, by_hidden, by_weight_VD, weights) in parts.items()
    }


def order_rows(keep_NV: Tensor, order: str, tile_rows: int = TILE_ROWS) -> Tensor:
    """Return the rows in order, or sorted within each tile by the number of columns that each keeps."""
    every_N = torch.arange(len(keep_NV))
    if order == "as they come":
        return every_N
    return torch.cat([tile[keep_NV[tile].sum(1).argsort(stable=True)] for tile in every_N.split(tile_rows)])


def sparse_gradients(
    grad_NV: Tensor, hidden_ND: Tensor, head_VD: Tensor, order_N: Tensor, keep_NV: Tensor, height: int
) -> Sparse:
    """Compute `TailSparseGradients` in float32 for any order and height.

    A group keeps the columns that any of its rows keeps. The rank-1 term of its rows is `tail_r * mean of the dropped
    head rows by their mass`; that of the head is `mass_v * mean of the hidden states by the rows' tails`.
    """
    hidden_no_tail_ND, hidden_tail_ND = torch.zeros_like(hidden_ND), torch.zeros_like(hidden_ND)
    weight_VD = torch.zeros_like(head_VD)
    groups = order_N.split(height)
    masses, means, kept = [], [], 0
    for rows in groups:
        grad_RV = grad_NV[rows]
        columns_C = keep_NV[rows].any(0).nonzero().squeeze(1)
        kept += len(rows) * len(columns_C)
        grad_RC = grad_RV[:, columns_C]
        hidden_no_tail_ND[rows] = grad_RC @ head_VD[columns_C]
        weight_VD.index_add_(0, columns_C, grad_RC.T @ hidden_ND[rows])
        # a row of the gradient sums to 0, so the dropped mass is minus the sum of the kept part
        tail_R = -grad_RC.sum(1)
        mass_V = grad_RV.sum(0).index_fill_(0, columns_C, 0)
        total = mass_V.sum()
        hidden_tail_ND[rows] = tail_R[:, None] * (mass_V @ head_VD / total if total else torch.zeros_like(head_VD[0]))
        masses.append(mass_V)
        means.append(tail_R @ hidden_ND[rows] / tail_R.sum() if tail_R.sum() else torch.zeros_like(hidden_ND[0]))
    return Sparse(
        share=kept / grad_NV.numel(),
        hidden_ND=hidden_no_tail_ND + hidden_tail_ND,
        hidden_no_tail_ND=hidden_no_tail_ND,
        weight_VD=weight_VD,
        weight_rank1_VD=weight_VD + torch.stack(masses, 1) @ torch.stack(means),
    )


def grid(truth: Truth, hidden_ND: Tensor, head_VD: Tensor, thresholds=THRESHOLDS, heights=HEIGHTS) -> list[dict]:
    """Return share, FLOPs and errors for every threshold, order and height; hidden states and head in float32."""
    rows = []
    size_NV = truth.logits_NV.abs()
    for threshold in thresholds:
        keep_NV = size_NV >= threshold
        for order in ORDERS:
            order_N = order_rows(keep_NV, order)
            for height in heights:
                found = sparse_gradients(truth.logits_NV, hidden_ND, head_VD, order_N, keep_NV, height)
                rows.append(
                    {
                        "threshold": threshold,
                        "rows": height,
                        "order": order,
                        "share": found.share,
                        "flops": flops(found.share),
                        "hidden_error": relative(found.hidden_ND, truth.hidden_ND),
                        "hidden_error_no_tail": relative(found.hidden_no_tail_ND, truth.hidden_ND),
                        "weight_error": relative(found.weight_VD, truth.weight_VD),
                        "weight_error_rank1": relative(found.weight_rank1_VD, truth.weight_VD),
                    }
                )
    return rows


def operator(
    truth: Truth, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, gate: str, thresholds=THRESHOLDS
) -> list[dict]:
    """Return the errors of `fused_linear_eaft` by dtype: exact, and sparse by threshold."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for threshold in (None, *thresholds):
            hidden = hidden_ND.detach().to(dtype).requires_grad_()
            head = head_VD.detach().to(dtype).requires_grad_()
            tail = {} if threshold is None else {"tail": "sparse", "tail_threshold": threshold}
            with watch_kept_columns() as kept:
                fused_linear_eaft(hidden, head, labels_N, gate=gate, num_items=1, **tail).backward()
            share = 1.0 if threshold is None else kept.share
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "tail": "exact" if threshold is None else "sparse",
                    "threshold": threshold,
                    "share": share,
                    "flops": flops(share),
                    "hidden_error": relative(hidden.grad, truth.hidden_ND),
                    "weight_error": relative(head.grad, truth.weight_VD),
                }
            )
    return rows


def run(model: str, sources: list[str], tokens: int) -> dict:
    """Return the results for every source and gate."""
    from .inputs import load, source_name, trained_rows

    started = time.process_time()
    loaded, tokenizer = load(model)
    head_VD = loaded.get_output_embeddings().weight.detach()
    results = []
    for source in sources:
        hidden_ND, labels_N = trained_rows(loaded, tokenizer, source, tokens)
        single_ND, single_VD = hidden_ND.float(), head_VD.float()
        for gate, truth in truth_by_gate(hidden_ND, head_VD, labels_N).items():
            results.append(
                {
                    "data": source_name(source),
                    "gate": gate,
                    "gate_mean": truth.gate_mean,
                    "operator": operator(truth, hidden_ND, head_VD, labels_N, gate),
                    "grid": grid(truth, single_ND, single_VD),
                }
            )
            print(
                f"{source_name(source)}, gate {gate}: {time.process_time() - started:.0f} s of CPU time",
                flush=True,
            )
    return {
        "settings": {"tokens": tokens, "tile_rows": TILE_ROWS, "flops": "(2 + 4 share) / 6"},
        "cpu_seconds": round(time.process_time() - started),
        "results": _shortened(results),
    }


def _shortened(value):
    """Round floats to four digits; thresholds stay unchanged."""
    if isinstance(value, dict):
        return {key: part if key == "threshold" else _shortened(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shortened(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(result: dict) -> str:
    """Return the main rows: the operator at its default threshold, and the grid at the operator's group height."""
    from eaftdrope.loss.settings import LossSettings
    from eaftdrope.loss.tail import GROUP_ROWS

    lines = [
        f"{'data':28} {'gate':5} {'':28} {'columns':>8} {'FLOPs':>6} {'dX':>8} {'no tail':>8} {'dW':>8} {'rank 1':>8}"
    ]
    for part in result["results"]:
        for row in part["grid"]:
            if row["rows"] == GROUP_ROWS:
                name = f"2^{torch.tensor(row['threshold']).log2():.0f} {row['order']}"
                lines.append(_line(part, name, row, row["hidden_error_no_tail"], row["weight_error_rank1"]))
        for row in part["operator"]:
            if row["threshold"] in (None, LossSettings.tail_threshold):
                lines.append(_line(part, f"operator {row['dtype']} {row['tail']}", row, None, None))
    return "\n".join(lines)


def _line(part: dict, name: str, row: dict, no_tail: float | None, rank1: float | None) -> str:
    errors = (row["hidden_error"], no_tail, row["weight_error"], rank1)
    words = " ".join(f"{'' if error is None else f'{error:.1e}':>8}" for error in errors)
    return f"{part['data']:28} {part['gate']:5} {name:28} {row['share']:8.2%} {row['flops']:6.3f} {words}"
