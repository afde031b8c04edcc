"""`fused_linear_eaft`: head projection, statistics, gate, loss and gradient, one tile of logits at a time.

Because the gate is detached and (for most gates) local to its row, one tile of logits yields the statistics of its
rows, their gate, their loss and their gradient. So the gradient is formed in the forward with three GEMMs, and the
N x V logits never exist.

Notable:
- Rows whose label is ignored never reach a GEMM.
- A frozen head forms no weight gradient; under no_grad only the statistics are computed.
- The weight gradient is summed in float32 beyond four tiles; up to four, a bfloat16 sum adds nothing measurable.
- 1/num_items and whatever the optimiser stack multiplies the loss with are applied in float32 at the very end.
- A gate that compares tokens with each other sees all of them first; rows it closes are not projected again.

Legend: N rows (tokens), T trained rows, R rows of a tile, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .backends import select_backend
from .backends.tile import LogitsTransform, TileStats
from .checks import check_label_smoothing, check_labels, check_shapes
from .gates import Gate, GateLike, evaluate_gate, resolve_gate
from .gradients import Gradients, scale_
from .statistics import TokenStats

# Bytes of one tile of logits. 160 MiB holds 552 bfloat16 rows of a 151,936-token vocabulary: enough rows for a GEMM to
# run at full speed on a CPU. A device wants more rows to fill it.
TILE_BYTES = {"cpu": 160 << 20}
TILE_BYTES_DEVICE = 512 << 20


@dataclass(frozen=True)
class LossDetails:
    """What the loss saw, for the T trained rows, detached.

    Args:
        stats ([`TokenStats`]): their statistics.
        weight (`Tensor` `[T]`): their gate.
        rows (`Tensor` `[T]`, int64): their positions among the flattened rows of the call.
    """

    stats: TokenStats
    weight: Tensor
    rows: Tensor


@dataclass
class _Job:
    """One call, ready to be computed. `details` is filled by the computation."""

    gate: Gate
    transform: LogitsTransform
    backend: ModuleType
    rows_T: Tensor
    labels_T: Tensor
    sequence_T: Tensor | None
    tile_rows: int
    grad_enabled: bool
    details: LossDetails | None = None


# A compiled model runs the operator as it is: how many rows are trained differs from batch to batch, and each number
# would be compiled anew.
@torch.compiler.disable
def fused_linear_eaft(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    gate: GateLike = "eaft",
    bias: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    sequence_ids: Tensor | None = None,
    backend: str = "auto",
    tile_bytes: int | None = None,
    label_smoothing: float = 0.0,
    return_details: bool = False,
) -> Tensor | tuple[Tensor, LossDetails]:
    """Entropy-gated cross-entropy of `softcap(logit_scale * (hidden @ weight.T + bias))` without the logits.

    Rows and labels are aligned; nothing is shifted. Equal to [`eaft_loss`] on the logits, in value and gradient. Under
    autocast it computes in the autocast dtype, as `nn.Linear` would.

    Args:
        hidden (`Tensor` `[..., H]`):
            Last hidden states.
        weight (`Tensor` `[V, H]`):
            Head (output embedding), the same dtype as `hidden` unless autocast is on. Tied embeddings are fine.
        labels (`Tensor` `[...]`, int64):
            One label a row; rows with `ignore_index` cost nothing.
        gate (`str`, [`~eaftdrope.loss.gates.Gate`] or callable, *optional*, defaults to `"eaft"`):
            Weight of a token from its [`TokenStats`].
        bias (`Tensor` `[V]`, *optional*):
            Bias of the head.
        num_items (`int`, `float` or scalar `Tensor`, *optional*):
            Divisor of the sum: the trained tokens of the whole accumulated batch. Defaults to those of the call.
        logit_scale (`float`, *optional*, defaults to 1.0):
            Factor on the projections (Cohere's `logit_scale`; Granite's 1 / `logits_scaling`).
        softcap (`float`, *optional*):
            Final-logit softcapping, `c * tanh(z / c)` (Gemma).
        ignore_index (`int`, *optional*, defaults to -100):
            Label of rows that are not trained.
        sequence_ids (`Tensor` `[...]`, *optional*):
            Sequence of each row, read by the `talr` gate alone.
        backend (`str`, *optional*, defaults to `"auto"`):
            Who works on the tiles: `"auto"` or `"torch"`.
        tile_bytes (`int`, *optional*):
            Memory of one tile of logits; defaults to 160 MiB on a CPU, 512 MiB elsewhere.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Refused unless 0.
        return_details (`bool`, *optional*, defaults to `False`):
            Also return [`LossDetails`].

    Returns:
        Scalar loss, float32 (float64 for float64 inputs). Its backward may run once. A call without a trained row gives
        a zero with a graph.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, labels outside `[0, V)`, label smoothing, an unknown
            gate or backend.
    """
    check_label_smoothing(label_smoothing)
    check_shapes(hidden, labels, sequence_ids)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check_operands(hidden, weight, bias)

    labels_N = labels.reshape(-1).to(hidden.device)
    rows_T = (labels_N != ignore_index).nonzero().squeeze(1)
    labels_T = labels_N[rows_T]
    check_labels(labels_T, weight.shape[0], ignore_index)
    job = _Job(
        gate=resolve_gate(gate),
        transform=LogitsTransform(scale=float(logit_scale), softcap=None if softcap is None else float(softcap)),
        backend=select_backend(backend),
        rows_T=rows_T,
        labels_T=labels_T,
        sequence_T=None if sequence_ids is None else sequence_ids.reshape(-1).to(hidden.device)[rows_T],
        tile_rows=_tile_rows(rows_T.numel(), weight, tile_bytes),
        # asked here: inside an autograd function gradients are always off
        grad_enabled=torch.is_grad_enabled(),
    )
    loss_sum = _FusedLinearEAFT.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, job)
    if num_items is None:
        num_items = max(rows_T.numel(), 1)
    loss = loss_sum / (num_items.to(loss_sum.device) if isinstance(num_items, Tensor) else num_items)
    return (loss, job.details) if return_details else loss


def _tile_rows(rows: int, weight_VH: Tensor, tile_bytes: int | None) -> int:
    """Rows of a tile within the budget, the same for every tile but the last few rows."""
    if tile_bytes is None:
        tile_bytes = TILE_BYTES.get(weight_VH.device.type, TILE_BYTES_DEVICE)
    most = max(1, tile_bytes // (weight_VH.shape[0] * weight_VH.element_size()))
    tiles = max(1, math.ceil(rows / most))
    return max(1, math.ceil(rows / tiles))


def _check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} does not project hidden states of size {hidden.shape[-1]}: "
            f"expected [vocabulary, {hidden.shape[-1]}]. A weight of size 0 is sharded (ZeRO-3): gather it first."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias of shape {tuple(bias.shape)}: expected [{weight.shape[0]}], one value a token.")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype != hidden.dtype or other.device != hidden.device):
            raise ValueError(
                f"hidden is {hidden.dtype} on {hidden.device} but {name} is {other.dtype} on {other.device}. Cast one "
                "of them, or run under torch.autocast as the model itself would."
            )


class _FusedLinearEAFT(torch.autograd.Function):
    """Sum of w_t nll_t. The gradients are formed in the forward and only scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, job: _Job) -> Tensor:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            needed = tuple(job.grad_enabled and need for need in ctx.needs_input_grad[:3])
            loss, ctx.gradients = _compute(hidden_NH, weight_VH, bias_V, job, needed)
        ctx.dtype = hidden_NH.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_linear_eaft keeps its gradients instead of its inputs, so its backward can run only once. Call "
                "the loss again instead of calling backward a second time."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # in place: these buffers are ours alone, and a second V x H one is what this operator exists to avoid
        return *(None if g is None else scale_(g, grad_output).to(ctx.dtype) for g in gradients), None


def _compute(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, job: _Job, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Loss sum, and its gradients by hidden, weight and bias (None where not needed). Fills `job.details`."""
    gate, backend, transform = job.gate, job.backend, job.transform
    tiles = _tiles(job.rows_T.numel(), job.tile_rows)
    gradients = Gradients(hidden_NH, weight_VH, needed, tiles=len(tiles))
    logits_RV = weight_VH.new_empty(min(job.tile_rows, job.rows_T.numel()), weight_VH.shape[0])

    def project(rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        hidden_RH = hidden_NH[rows]
        tile_RV = logits_RV[: hidden_RH.shape[0]]
        if bias_V is None:
            torch.mm(hidden_RH, weight_VH.t(), out=tile_RV)
        else:
            torch.addmm(bias_V, hidden_RH, weight_VH.t(), out=tile_RV)
        return hidden_RH, tile_RV

    # Does one look at a tile settle its gate? Else all rows are seen before any gradient is formed.
    one_look = gate.row_local or len(tiles) == 1
    every_row = job.rows_T.numel() == hidden_NH.shape[0]
    seen: list[TileStats] = []
    weights: list[Tensor] = []
    for tile in tiles:
        # where every row is trained a tile is a slice, and nothing is gathered or scattered
        rows = tile if every_row else job.rows_T[tile]
        hidden_RH, tile_RV = project(rows)
        seen.append(backend.tile_statistics(tile_RV, job.labels_T[tile], transform, gate.topk))
        if one_look:
            weights.append(evaluate_gate(gate, _token_stats(seen[-1:], weight_VH.shape[0], job.sequence_T, tile)))
            if gradients.needed:
                backend.tile_gradient_(tile_RV, job.labels_T[tile], seen[-1], weights[-1], transform)
                gradients.add(rows, hidden_RH, tile_RV)

    stats = _token_stats(seen, weight_VH.shape[0], job.sequence_T, slice(None))
    weight_T = torch.cat(weights) if one_look else evaluate_gate(gate, stats)
    if not one_look and gradients.needed:
        whole = TileStats.concatenate(seen)
        open_T = weight_T.nonzero().squeeze(1)
        for tile in _tiles(open_T.numel(), job.tile_rows):
            at = open_T[tile]
            hidden_RH, tile_RV = project(job.rows_T[at])
            backend.tile_gradient_(tile_RV, job.labels_T[at], whole.rows(at), weight_T[at], transform)
            gradients.add(job.rows_T[at], hidden_RH, tile_RV)

    job.details = LossDetails(stats=stats, weight=weight_T, rows=job.rows_T)
    # a row the gate has closed stays out even if its label is impossible (0 * inf)
    loss = torch.where(weight_T == 0, 0, weight_T * stats.nll).sum()
    return loss, gradients.finish()


def _tiles(rows: int, tile_rows: int) -> list[slice]:
    """Slices of at most `tile_rows`; one empty slice for no rows."""
    return [slice(start, min(start + tile_rows, rows)) for start in range(0, max(rows, 1), tile_rows)]


def _token_stats(seen: list[TileStats], vocab_size: int, sequence_T: Tensor | None, rows: slice) -> TokenStats:
    whole = TileStats.concatenate(seen)
    return TokenStats(
        nll=whole.nll,
        entropy=whole.entropy,
        topk_entropy=whole.topk_entropy,
        correct=whole.correct,
        vocab_size=vocab_size,
        sequence=None if sequence_T is None else sequence_T[rows],
    )
