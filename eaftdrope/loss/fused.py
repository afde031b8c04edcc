"""`fused_linear_eaft`: head projection, statistics, gate, loss and gradient in one operator, without the logits.

This file has the operator's arguments, its checks and its autograd function. `compute` does the work; `torch_compile` is
the same operator inside torch.compile.

Notable:
- Rows whose label is ignored never reach a GEMM; rows whose gate is closed never reach one of the gradient.
- A frozen head forms no weight gradient; under no_grad only the statistics are computed.
- The weight gradient is summed in float32 beyond four tiles; up to four, a bfloat16 sum adds nothing measurable.
- 1/num_items, and any factor that the training loop applies to the loss, are applied in float32 at the very end.

Legend: N rows (tokens), T trained rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .anchor import Anchor
from .backends.tile import PLAIN, LogitsTransform
from .base_logits import BaseLogits
from .checks import check_anchor, check_label_smoothing, check_shapes
from .compute import compute_loss
from .gates import GateLike, resolve_gate
from .gradients import NeedsGrad, ThreeGradients
from .settings import LossSettings
from .statistics import TokenStats
from .torch_compile import compiled_loss
from .vocabulary import VocabularyShard


@dataclass(frozen=True)
class LossDetails:
    """Statistics and gate of the T trained rows of a call, detached.

    Args:
        stats ([`TokenStats`]): their statistics.
        weight (`Tensor` `[T]`): their weight in the loss: the gate, times the token's own weight where it has one.
        closed (`Tensor` `[T]`, bool): rows whose cross-entropy took no part in the gradient: the weight is 0 or below
            `gate_threshold`.
        rows (`Tensor` `[T]`, int64): their indices among the flattened rows of the call.
        trained (`Tensor` `[T]`, bool, or `None`): inside a compiled model or a CUDA graph T is all rows of the call, and
            this is the mask of those that are trained; the others have a weight of 0.
        token_weight (`Tensor` `[T]` or `None`): the tokens' own weights, as they were passed.
        divergence (`Tensor` `[T]` or `None`): the anchor's divergence from the base model, in nats; None without one.
    """

    stats: TokenStats
    weight: Tensor
    closed: Tensor
    rows: Tensor
    trained: Tensor | None = None
    token_weight: Tensor | None = None
    divergence: Tensor | None = None


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
    token_weights: Tensor | None = None,
    backend: str = "auto",
    tile_bytes: int | None = None,
    tail: str = "exact",
    tail_threshold: float = LossSettings.tail_threshold,
    gate_threshold: float = 0.0,
    recompute: bool = False,
    label_smoothing: float = 0.0,
    anchor: Anchor | None = None,
    base: BaseLogits | None = None,
    shard: VocabularyShard | None = None,
    return_details: bool = False,
) -> Tensor | tuple[Tensor, LossDetails]:
    """Entropy-gated cross-entropy of `softcap(logit_scale * (hidden @ weight.T + bias))` without the logits.

    Rows and labels are aligned; nothing is shifted. Equal to [`eaft_loss`] on the logits, in value and gradient. Under
    autocast it computes in the autocast dtype, as `nn.Linear` would.

    Args:
        hidden (`Tensor` `[..., D]`):
            Last hidden states.
        weight (`Tensor` `[V, D]`):
            Head (output embedding), the same dtype as `hidden` unless autocast is on. Tied embeddings are fine.
        labels (`Tensor` `[...]`, int64):
            One label per row; rows with `ignore_index` cost nothing.
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
            Sequence of each row, used only by the `talr` gate.
        token_weights (`Tensor` `[...]`, *optional*):
            Factor on the gate of each row; a negative one replaces the gate by its absolute value, so that the gate does not
            apply where it is -1. `num_items` counts rows whatever their weight.
        backend (`str`, *optional*, defaults to `"auto"`):
            Implementation of the work on a tile: `"cpu"` (C++), `"triton"`, `"cuda"` (C++), `"torch"`, or the fastest
            that works on the device. The environment variable `EAFTDROPE_LOSS_BACKEND` replaces `"auto"`.
        tile_bytes (`int`, *optional*):
            Memory of one tile of logits; defaults to 160 MiB on a CPU, 512 MiB elsewhere, and at least 1 KiB per token
            of the vocabulary (512 rows in bfloat16).
        tail (`str`, *optional*, defaults to `"exact"`):
            `"sparse"` forms the gradients from the columns of the vocabulary that matter; see `eaftdrope/loss/tail.py`.
        tail_threshold (`float`, *optional*, defaults to 2^-12):
            Gradients with respect to a logit, gate included, that `tail="sparse"` drops.
        gate_threshold (`float`, *optional*, defaults to 0.0):
            Rows whose gate (times the token's weight) is smaller take no part in the gradient (`LossDetails.closed` is
            their mask); the loss keeps their term.
        recompute (`bool`, *optional*, defaults to `False`):
            Form the gradient in a second pass, by slices of the vocabulary: a third more FLOPs, but no float32 sum of
            weight gradients, for any number of rows.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Must be 0.
        anchor ([`Anchor`], *optional*):
            Adds the divergence from the base model to every trained token, whatever its gate and its weight.
        base ([`BaseLogits`], *optional*):
            The base model's hidden states of the same rows and its head, with an anchor. One more product with a head
            and one more tile.
        shard ([`VocabularyShard`], *optional*):
            `weight`, `bias` and the base's head are one rank's part of a head sharded by vocabulary; hidden states and labels
            are the same on every rank of its group, and every rank gets the whole loss, all statistics and the whole
            gradient of the hidden states. The gradient of `weight` is that of the part. Not compiled by torch.compile.
        return_details (`bool`, *optional*, defaults to `False`):
            Also return [`LossDetails`].

    Returns:
        Scalar loss, float32 (float64 for float64 inputs), or `(loss, LossDetails)`. Its backward may run once. A call
        without a trained row gives a zero with a graph.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, labels outside `[0, V)`, label smoothing, an unknown
            gate, backend or tail, a threshold out of range, a backend that cannot work on these tensors, an anchor without
            a base or a base without an anchor, an anchor with a sparse tail, ranks of a shard with different rows.
    """
    check_label_smoothing(label_smoothing)
    settings = LossSettings(
        gate=resolve_gate(gate),
        backend=backend,
        tile_bytes=tile_bytes,
        tail=tail,
        tail_threshold=tail_threshold,
        gate_threshold=float(gate_threshold),
        recompute=recompute,
        anchor=anchor,
    )
    loss, details = linear_loss(
        hidden,
        weight,
        labels,
        settings,
        bias=bias,
        num_items=num_items,
        transform=LogitsTransform(float(logit_scale), None if softcap is None else float(softcap)),
        ignore_index=ignore_index,
        sequence_ids=sequence_ids,
        token_weights=token_weights,
        base=base,
        shard=shard,
    )
    return (loss, details) if return_details else loss


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    settings: LossSettings,
    *,
    bias: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    transform: LogitsTransform = PLAIN,
    ignore_index: int = -100,
    sequence_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    base: BaseLogits | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, LossDetails]:
    """[`fused_linear_eaft`] with its settings in one value; returns the loss and its details."""
    check_shapes(hidden, labels, sequence_ids, token_weights)
    check_anchor(settings.anchor, base)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    _check_operands(hidden, weight, bias)
    if shard is not None:
        shard.check_part(weight)
    hidden_ND, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).to(hidden.device)
    per_row = (labels_N, _flat(sequence_ids, hidden), _flat(token_weights, hidden))
    base = None if base is None else base.like(hidden_ND, weight, labels)
    inputs = (hidden_ND, weight, bias, *per_row, settings, transform, ignore_index, base)
    if shard is not None:
        loss_sum, details = _sharded(*inputs, shard)
    else:
        compute = _compiled if torch.compiler.is_compiling() else _eager
        loss_sum, details = compute(*inputs)
    if num_items is None:
        trained = details.trained
        num_items = max(details.rows.numel(), 1) if trained is None else trained.sum().clamp_min(1)
    loss = loss_sum / (num_items.to(loss_sum.device) if isinstance(num_items, Tensor) else num_items)
    return loss, details


def _flat(values: Tensor | None, hidden: Tensor) -> Tensor | None:
    return None if values is None else values.detach().reshape(-1).to(hidden.device)


def _eager(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    sequence_N: Tensor | None,
    token_weight_N: Tensor | None,
    settings: LossSettings,
    transform: LogitsTransform,
    ignore_index: int,
    base: BaseLogits | None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, LossDetails]:
    grad_enabled = torch.is_grad_enabled()  # read here: inside an autograd function gradients are always off
    details: list[LossDetails] = []
    options = (settings, transform, ignore_index, base, shard, grad_enabled, details)
    loss = _FusedLinearEAFT.apply(hidden_ND, weight_VD, bias_V, labels_N, sequence_N, token_weight_N, *options)
    return loss, details[0]


# a graph break under torch.compile: a process group is no argument of a registered operator
_sharded = torch.compiler.disable(_eager)


def _compiled(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    sequence_N: Tensor | None,
    token_weight_N: Tensor | None,
    settings: LossSettings,
    transform: LogitsTransform,
    ignore_index: int,
    base: BaseLogits | None,
) -> tuple[Tensor, LossDetails]:
    inputs = (hidden_ND, weight_VD, bias_V, labels_N, sequence_N, token_weight_N)
    loss, stats, weight_N, closed_N, divergence_N = compiled_loss(*inputs, settings, transform, ignore_index, base)
    every_N = torch.arange(labels_N.shape[0], device=labels_N.device)
    return loss, LossDetails(stats, weight_N, closed_N, every_N, labels_N != ignore_index, token_weight_N, divergence_N)


def _check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} does not project hidden states of size {hidden.shape[-1]}: "
            f"expected [vocabulary, {hidden.shape[-1]}]. A weight of size 0 is sharded (ZeRO-3): gather it first."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias of shape {tuple(bias.shape)}: expected [{weight.shape[0]}], one value per token.")
    # autocast rounds the operands; without it they must agree, as for nn.Linear
    autocast = torch.is_autocast_enabled(hidden.device.type)
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and ((other.dtype != hidden.dtype and not autocast) or other.device != hidden.device):
            raise ValueError(
                f"hidden is {hidden.dtype} on {hidden.device} but {name} is {other.dtype} on {other.device}. Cast one "
                "of them, or run under torch.autocast as the model itself would."
            )


class _FusedLinearEAFT(torch.autograd.Function):
    """Sum of w_t nll_t, and of the anchor. The gradients are formed in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        sequence_N: Tensor | None,
        token_weight_N: Tensor | None,
        settings: LossSettings,
        transform: LogitsTransform,
        ignore_index: int,
        base: BaseLogits | None,
        shard: VocabularyShard | None,
        grad_enabled: bool,
        details: list[LossDetails],
    ) -> Tensor:
        hidden, weight, bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        needs_grad: NeedsGrad = (hidden, weight, bias)
        inputs = (hidden_ND, weight_VD, bias_V, labels_N, sequence_N, token_weight_N)
        result = compute_loss(*inputs, settings, transform, ignore_index, needs_grad, base, shard)
        ctx.gradients, ctx.backend = result.gradients, result.backend
        ctx.dtypes = [None if value is None else value.dtype for value in (hidden_ND, weight_VD, bias_V)]
        rows = result.rows
        every_T = torch.arange(rows.count, device=labels_N.device) if rows.index is None else rows.index
        per_row = (result.stats, result.weight, result.closed, every_T, rows.trained, rows.token_weight)
        details.append(LossDetails(*per_row, result.divergence))
        return result.loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_linear_eaft keeps its gradients instead of its inputs, so its backward can run only once. Call "
                "the loss again instead of calling backward a second time."
            )
        gradients: ThreeGradients = ctx.gradients
        ctx.gradients = None
        # in place: nothing else uses these buffers, and a second V x D one is what this operator exists to avoid
        scaled = ctx.backend.scaled
        results = (
            None if gradient is None else scaled(gradient, grad_outputs[0], dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *results, *(None,) * 10
