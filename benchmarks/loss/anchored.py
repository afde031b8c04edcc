"""The anchor beside the gated loss without one, and beside its peers: `python -m benchmarks.loss.anchored`.

Every method computes value and gradients of the gated cross-entropy plus a KL divergence from a base model whose hidden
states are given: the base model's own forward is not measured, as it is the same for all. In a round the methods take turns
in one process, on one thread, and are compared with the gated loss of the same round; medians of CPU seconds. Errors are
against float64 on the first rows.

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.command import as_typed, run_typer
from eaftdrope.files import write_atomically
from eaftdrope.loss import Anchor, BaseLogits, eaft_loss, fused_linear_eaft
from eaftdrope.loss.backends import select_backend
from eaftdrope.loss.buffers import release_buffers
from eaftdrope.peak_memory import peak_of

from .cases import SHAPES, Case, choose
from .inputs import make_inputs
from .peers import full_logits_eaft, trl_fused_head
from .results import environment

GATED = "gated, no anchor"
KL = 0.1
# the first rows, whose gradients are compared with float64
_CHECKED = 32
_SEED = 20261128

Loss = Callable[[Tensor, Tensor, Tensor, BaseLogits], Tensor]


def _ours(anchor: Anchor) -> Loss:
    return lambda hidden, weight, labels, base: fused_linear_eaft(hidden, weight, labels, anchor=anchor, base=base)


def _gated(hidden: Tensor, weight: Tensor, labels: Tensor, base: BaseLogits) -> Tensor:
    return fused_linear_eaft(hidden, weight, labels)


def _divergence_of_trl(hidden: Tensor, weight: Tensor, base: BaseLogits, beta: float) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, base.hidden, base.weight, None, beta)
    return divergence.mean()


def _trl(hidden: Tensor, weight: Tensor, labels: Tensor, base: BaseLogits) -> Tensor:
    return trl_fused_head(hidden, weight, labels) + KL * _divergence_of_trl(hidden, weight, base, 0.0)


def _trl_divergence_only(hidden: Tensor, weight: Tensor, labels: Tensor, base: BaseLogits) -> Tensor:
    return KL * _divergence_of_trl(hidden, weight, base, 0.0)


def _full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, base: BaseLogits) -> Tensor:
    """As LLaMA-Factory's losses: float32 logits of both models, `F.kl_div` of their softmax."""
    log_p = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    with torch.no_grad():
        q = F.softmax(F.linear(base.hidden, base.weight).float(), dim=-1)
    divergence = F.kl_div(log_p, q, reduction="none").sum(-1).mean()
    return full_logits_eaft(hidden, weight, labels) + KL * divergence


_FORWARD = Anchor(KL)
METHODS: dict[str, tuple[Loss, Anchor | None]] = {
    GATED: (_gated, None),
    "anchored, forward": (_ours(_FORWARD), _FORWARD),
    "anchored, reverse": (_ours(Anchor(KL, "reverse")), Anchor(KL, "reverse")),
    "anchored, forward, target masked": (_ours(Anchor(KL, mask_target=True)), Anchor(KL, mask_target=True)),
    "TRL's fused head and chunked divergence": (_trl, None),
    "TRL's chunked divergence, no cross-entropy": (_trl_divergence_only, None),
    "full float32 logits": (_full_logits, _FORWARD),
}
"""Each with the anchor whose definition it must equal; None where the loss is another (no anchor, another gate)."""


def make_base(case: Case, hidden_ND: Tensor, weight_VD: Tensor, frozen: bool) -> BaseLogits:
    """A base model a little apart: with a frozen head other hidden states on the same head, as with adapters."""
    generator = torch.Generator().manual_seed(_SEED)
    moved = hidden_ND + 0.1 * torch.randn(hidden_ND.shape, generator=generator).to(hidden_ND)
    if frozen:
        return BaseLogits(moved, weight_VD)
    noise = 0.1 * torch.randn(weight_VD.shape, generator=generator) / math.sqrt(case.hidden_size)
    return BaseLogits(moved, weight_VD + noise.to(weight_VD))


def gradients(
    loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor, base: BaseLogits, frozen: bool
) -> list[Tensor]:
    """Value and gradients of one call."""
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)]
    value = loss(*leaves, labels, base)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def largest_error(found: list[Tensor], inputs: tuple, base: BaseLogits, anchor: Anchor, frozen: bool) -> float:
    """Largest relative error of value and gradients against the definition in float64."""
    wide = BaseLogits(base.hidden.double(), base.weight.double())

    def exact(hidden: Tensor, weight: Tensor, labels: Tensor, base: BaseLogits) -> Tensor:
        of_base = base.hidden @ base.weight.T
        return eaft_loss(hidden @ weight.T, labels, anchor=anchor, base_logits=of_base)

    hidden, weight, labels = inputs
    truth = gradients(exact, hidden.double(), weight.double(), labels, wide, frozen)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))


def measure(case: Case, names: list[str], repeat: int) -> list[dict]:
    """Measure the methods on one case, in turn; the gated loss is always among them."""
    frozen = case.trains == "frozen-head"
    hidden, weight, labels = make_inputs(case)
    base = make_base(case, hidden, weight, frozen)
    rows = []
    for name in names:
        loss, anchor = METHODS[name]
        few = (hidden[:_CHECKED], weight, labels[:_CHECKED])
        few_base = BaseLogits(base.hidden[:_CHECKED], base.weight)
        found = gradients(loss, *few, few_base, frozen)
        error = largest_error(found, few, few_base, anchor, frozen) if anchor else None
        kept: list[int] = []

        def call(loss: Loss = loss, kept: list[int] = kept) -> None:
            kept.append(sum(each.nbytes for each in gradients(loss, hidden, weight, labels, base, frozen)))

        call()
        # the tiles that were kept for the next call are part of its memory
        release_buffers()
        peak = peak_of(call, "cpu")
        extra = None if peak is None else max(0, peak - kept[-1])
        rows.append({"method": name, "extra_bytes": extra, "largest_error": error})
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeat):
        # each is first in some rounds
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.process_time()
            gradients(METHODS[name][0], hidden, weight, labels, base, frozen)
            seconds[name].append(time.process_time() - started)
    for row in rows:
        own, gated = seconds[row["method"]], seconds[GATED]
        ratios = [a / b for a, b in zip(own, gated, strict=True)]
        row |= {"cpu_seconds": statistics.median(own), "ratio": statistics.median(ratios)}
        row |= {"ratio_low": min(ratios), "ratio_high": max(ratios), "rounds": repeat}
    return [{key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()} for row in rows]


def anchored(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "smollm2",
    rows: Annotated[int, typer.Option(min=_CHECKED, help="Tokens.")] = 512,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    trains: Annotated[str, typer.Option(help="all, frozen-head, or both.")] = "all,frozen-head",
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Also measure TRL and full logits.")] = True,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds.")] = 7,
    output: Annotated[Path | None, typer.Option(help="File of results, JSON.", show_default=False)] = None,
) -> None:
    """Measure the anchored loss beside the gated one, TRL and full logits, on one thread of a CPU."""
    torch.set_num_threads(1)
    sizes = SHAPES[choose(shape, list(SHAPES), "--shape")[0]]
    names = [name for name in METHODS if peers or ("TRL" not in name and "full" not in name)]
    about = {
        "what": "value and gradients of the gated loss with an anchor, against the gated loss without one",
        "command": as_typed("benchmarks.loss.anchored", sys.argv[1:]),
        "not_counted": "the base model's own forward, which gives its hidden states",
        "backend": select_backend("auto", torch.device("cpu"), getattr(torch, dtype), anchored=True).name,
        "threads": 1,
        "environment": environment(None),
    }
    results = []
    for way in choose(trains, ["all", "frozen-head"], "--trains"):
        case = Case(sizes.name, sizes.title, rows, sizes.hidden_size, sizes.vocabulary, dtype, "random", way)
        print(case)
        for row in measure(case, names, repeat):
            print(json.dumps(row), flush=True)
            results.append({"shape": shape, "rows": rows, "dtype": dtype, "trains": way, **row})
        if output is not None:
            write_atomically(output, json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    run_typer(anchored)
