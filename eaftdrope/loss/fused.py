"""`fused_linear_eaft`: head projection, statistics, gate, loss and gradient in one operator, without the logits.

This file is the operator's face: what it takes, what it refuses, and autograd. `compute` does the work; `compiled` is the
same operator for torch.compile.

Notable:
- Rows whose label is ignored never reach a GEMM; rows whose gate is closed never reach one of the gradient.
- A frozen head forms no weight gradient; under no_grad only the statistics are computed.
- The weight gradient is summed in float32 beyond four tiles; up to four, a bfloat16 sum adds nothing measurable.
- 1/num_items and whatever the optimiser stack multiplies the loss with are applied in float32 at the very end.

Legend: N rows (tokens), T trained rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .call import Call, run
from .checks import TAIL_THRESHOLD, check_label_smoothing, check_settings, check_shapes
from .gates import GateLike, resolve_gate
from .statistics import TokenStats
from .torch_compile import compiled_loss


@dataclass(frozen=True)
class LossDetails:
    """What the loss saw, for the T trained rows, detached.

    Args:
        stats ([`TokenStats`]): their statistics.
        weight (`Tensor` `[T]`): their gate.
        closed (`Tensor` `[T]`, bool): rows that took no part in the gradient: the gate is 0 or below `gate_threshold`.
        rows (`Tensor` `[T]`, int64): their positions among the flattened rows of the call.
        trained (`Tensor` `[T]`, bool, or `None`): inside a compiled model or a CUDA graph T is all rows of the call, and
            this says which count; the others have a weight of 0.
    """

    stats: TokenStats
    weight: Tensor
    closed: Tensor
    rows: Tensor
    trained: Tensor | None = None


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
    tail: str = "exact",
    tail_threshold: float = TAIL_THRESHOLD,
    gate_threshold: float = 0.0,
    recompute: bool = False,
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
            Who works on the tiles: `"cpu"` (C++), `"triton"`, `"cuda"` (C++), `"torch"`, or the fastest that works
            here. The environment variable `EAFTDROPE_LOSS_BACKEND` stands for `"auto"`.
        tile_bytes (`int`, *optional*):
            Memory of one tile of logits; defaults to 160 MiB on a CPU, 512 MiB elsewhere, and at least
            1 KiB a token of the vocabulary (512 rows in bfloat16).
        tail (`str`, *optional*, defaults to `"exact"`):
            `"sparse"` forms the gradients from the columns of the vocabulary that matter; see `eaftdrope/loss/tail.py`.
        tail_threshold (`float`, *optional*, defaults to 2^-12):
            Gradients by a logit, gate included, that `tail="sparse"` drops.
        gate_threshold (`float`, *optional*, defaults to 0.0):
            Rows whose gate is smaller take no part in the gradient (`LossDetails.closed` counts them); the loss keeps
            their term.
        recompute (`bool`, *optional*, defaults to `False`):
            Form the gradient in a second look, by slices of the vocabulary: a third more FLOPs, but no float32 sum of
            weight gradients, whatever the number of rows.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Refused unless 0.
        return_details (`bool`, *optional*, defaults to `False`):
            Also return [`LossDetails`].

    Returns:
        Scalar loss, float32 (float64 for float64 inputs). Its backward may run once. A call without a trained row gives
        a zero with a graph.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, labels outside `[0, V)`, label smoothing, an unknown
            gate, backend or tail, a threshold out of range, a backend that can not work here.
    """
    check_label_smoothing(label_smoothing)
    check_shapes(hidden, labels, sequence_ids)
    check_settings(
        backend=backend,
        tail=tail,
        tail_threshold=tail_threshold,
        gate_threshold=gate_threshold,
        tile_bytes=tile_bytes,
        recompute=recompute,
    )
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    _check_operands(hidden, weight, bias)
    settings = {
        "logit_scale": float(logit_scale),
        "softcap": None if softcap is None else float(softcap),
        "backend": backend,
        "tile_bytes": tile_bytes,
        "tail_threshold": tail_threshold if tail == "sparse" else None,
        "gate_threshold": float(gate_threshold),
        "recompute": recompute,
        "ignore_index": ignore_index,
    }
    hidden_NH, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).to(hidden.device)
    sequence_N = None if sequence_ids is None else sequence_ids.reshape(-1).to(hidden.device)
    compute = _compiled if torch.compiler.is_compiling() else _eager
    loss_sum, details = compute(hidden_NH, weight, bias, labels_N, sequence_N, gate, settings)
    if num_items is None:
        trained = details.trained
        num_items = max(details.rows.numel(), 1) if trained is None else trained.sum().clamp_min(1)
    loss = loss_sum / (num_items.to(loss_sum.device) if isinstance(num_items, Tensor) else num_items)
    return (loss, details) if return_details else loss


def _eager(hidden_NH, weight_VH, bias_V, labels_N, sequence_N, gate: GateLike, settings) -> tuple[Tensor, LossDetails]:
    call = Call(resolve_gate(gate), **settings)
    grad_enabled = torch.is_grad_enabled()  # asked here: inside an autograd function gradients are always off
    sink: list[LossDetails] = []
    loss = _FusedLinearEAFT.apply(hidden_NH, weight_VH, bias_V, labels_N, sequence_N, call, grad_enabled, sink)
    return loss, sink[0]


def _compiled(hidden_NH, weight_VH, bias_V, labels_N, sequence_N, gate: GateLike, settings):
    inputs = (hidden_NH, weight_VH, bias_V, labels_N, sequence_N)
    loss, stats, weight_N, closed_N = compiled_loss(*inputs, gate, settings)
    every_N = torch.arange(labels_N.shape[0], device=labels_N.device)
    return loss, LossDetails(stats, weight_N, closed_N, every_N, labels_N != settings["ignore_index"])


def _check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} does not project hidden states of size {hidden.shape[-1]}: "
            f"expected [vocabulary, {hidden.shape[-1]}]. A weight of size 0 is sharded (ZeRO-3): gather it first."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias of shape {tuple(bias.shape)}: expected [{weight.shape[0]}], one value a token.")
    # autocast rounds the operands; without it they must agree, as for nn.Linear
    autocast = torch.is_autocast_enabled(hidden.device.type)
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and ((other.dtype != hidden.dtype and not autocast) or other.device != hidden.device):
            raise ValueError(
                f"hidden is {hidden.dtype} on {hidden.device} but {name} is {other.dtype} on {other.device}. Cast one "
                "of them, or run under torch.autocast as the model itself would."
            )


class _FusedLinearEAFT(torch.autograd.Function):
    """Sum of w_t nll_t. The gradients are formed in the forward and only scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, labels_N, sequence_N, call: Call, grad_enabled: bool, sink: list):
        needed = tuple(grad_enabled and need for need in ctx.needs_input_grad[:3])
        result, rows = run(hidden_NH, weight_VH, bias_V, labels_N, sequence_N, call, needed)
        ctx.gradients, ctx.backend = result.gradients, result.backend
        ctx.dtypes = [None if value is None else value.dtype for value in (hidden_NH, weight_VH, bias_V)]
        every_T = torch.arange(rows.count, device=labels_N.device) if rows.index is None else rows.index
        sink.append(LossDetails(result.stats, result.weight, result.closed, every_T, rows.trained))
        return result.loss

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_linear_eaft keeps its gradients instead of its inputs, so its backward can run only once. Call "
                "the loss again instead of calling backward a second time."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # in place: these buffers are ours alone, and a second V x H one is what this operator exists to avoid
        scaled = ctx.backend.scaled
        results = (
            None if gradient is None else scaled(gradient, grad_output, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *results, None, None, None, None, None
