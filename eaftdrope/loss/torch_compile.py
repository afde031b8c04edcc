"""The operator inside torch.compile: registered with torch, opaque to the compiler, no graph break.

The number of trained rows differs from batch to batch and cannot be part of a graph, so every output has as many rows as
the inputs; what belongs to ignored rows is 0. The gate is passed as text.

Legend: N rows, T trained rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import math
import uuid
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .anchor import Anchor
from .backends.tile import LogitsTransform
from .base_logits import BaseLogits
from .compute import LossResult, compute_loss, default_tile_bytes
from .gates import GATES, Gate, GateLike, resolve_gate
from .gradients import sum_dtype
from .settings import LossSettings
from .statistics import TokenStats
from .tail import ROWS_PER_SUM

# Gates that cannot be written as text: functions, and classes defined elsewhere. Their names are unique to this process, so
# a graph from a compile cache of another process finds no gate rather than a wrong one.
_PROCESS = uuid.uuid4().hex
_other_gates: dict[str, Gate] = {}


@torch.compiler.assume_constant_result
def gate_name(gate: GateLike) -> str:
    """Return a gate as text; see `named_gate`."""
    gate = resolve_gate(gate)
    if type(gate) is GATES.get(gate.name):
        return json.dumps([gate.name, {option.name: getattr(gate, option.name) for option in fields(gate)}])
    name = next((name for name, other in _other_gates.items() if other is gate), f"{_PROCESS}:{len(_other_gates)}")
    _other_gates[name] = gate
    return name


@functools.lru_cache(maxsize=256)
def named_gate(name: str) -> Gate:
    """Return the gate that `gate_name` wrote as text."""
    if not name.startswith("["):
        return _other_gates[name]
    name, options = json.loads(name)
    return resolve_gate(name, **options)


def compiled_loss(
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
) -> tuple[Tensor, TokenStats, Tensor, Tensor, Tensor | None]:
    """Return (loss sum, statistics `[N]`, gate `[N]`, closed `[N]`, divergence `[N]` or None), 0 where a row is not
    trained."""
    grad = torch.is_grad_enabled()
    needs_grad = [grad and t is not None and t.requires_grad for t in (hidden_ND, weight_VD, bias_V)]
    loss, _, _, _, *per_row = _operator(
        hidden_ND,
        weight_VD,
        bias_V,
        labels_N,
        sequence_N,
        token_weight_N,
        needs_grad,
        gate_name(settings.gate),
        transform.scale,
        transform.softcap,
        settings.backend,
        settings.tile_bytes,
        settings.tail,
        settings.tail_threshold,
        settings.gate_threshold,
        settings.recompute,
        ignore_index,
        *_anchor_arguments(settings.anchor, base),
    )
    nll, entropy, topk_entropy, correct, weight, closed, divergence = (value.detach() for value in per_row)
    topk_entropy = topk_entropy if topk_entropy.numel() else None
    stats = TokenStats(nll, entropy, topk_entropy, correct, weight_VD.shape[0], sequence_N)
    return loss, stats, weight, closed, None if settings.anchor is None else divergence


def _anchor_arguments(anchor: Anchor | None, base: BaseLogits | None) -> tuple[Any, ...]:
    """The operator's arguments about the anchor."""
    if anchor is None or base is None:
        return None, None, None, 0.0, "", False, 1.0, None
    head = (base.hidden, base.weight.detach(), None if base.bias is None else base.bias.detach())
    return *head, anchor.kl, anchor.direction, anchor.mask_target, base.logit_scale, base.softcap


# The version is raised when the arguments or results change: graphs cached by an older release would pass the old ones.
@torch.library.custom_op("eaftdrope::fused_linear_eaft_v4", mutates_args=())
def _operator(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    sequence_N: Tensor | None,
    token_weight_N: Tensor | None,
    needs_grad: list[bool],
    gate: str,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    tile_bytes: int | None,
    tail: str,
    tail_threshold: float,
    gate_threshold: float,
    recompute: bool,
    ignore_index: int,
    base_hidden_ND: Tensor | None = None,
    base_weight_VD: Tensor | None = None,
    base_bias_V: Tensor | None = None,
    kl: float = 0.0,
    direction: str = "",
    mask_target: bool = False,
    base_scale: float = 1.0,
    base_softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    base = _base(base_hidden_ND, base_weight_VD, base_bias_V, base_scale, base_softcap)
    anchor = None if base is None else Anchor(kl, direction, mask_target)
    how = (backend, tile_bytes, tail, tail_threshold, gate_threshold, recompute, anchor)
    settings = LossSettings(named_gate(gate), *how)
    transform = LogitsTransform(logit_scale, softcap)
    hidden, weight, bias = needs_grad
    inputs = (hidden_ND, weight_VD, bias_V, labels_N, sequence_N, token_weight_N)
    result = compute_loss(*inputs, settings, transform, ignore_index, (hidden, weight, bias), base)
    dtypes = _gradient_dtypes(hidden_ND, weight_VD, tile_bytes, tail)
    gradients = [
        hidden_ND.new_empty(0, dtype=dtype) if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(result.gradients, dtypes, strict=True)
    ]
    of_all_rows = functools.partial(_of_all_rows, result, len(labels_N))
    stats = result.stats
    return (
        result.loss,
        gradients[0],
        gradients[1],
        gradients[2],
        of_all_rows(stats.nll),
        of_all_rows(stats.entropy),
        of_all_rows(stats.topk_entropy),
        of_all_rows(stats.correct),
        of_all_rows(result.weight),
        of_all_rows(result.closed),
        of_all_rows(result.divergence),
    )


def _of_all_rows(result: LossResult, count: int, value_T: Tensor | None) -> Tensor:
    """Return the values of the trained rows at their indices among all `count` rows, and none for None."""
    if value_T is None:
        return result.weight.new_empty(0)
    value_N = value_T.new_zeros(count)
    # not an assignment by mask, which would wait for the device
    value_N[result.rows.indices(slice(0, result.rows.count))] = value_T
    return value_N


def _base(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: float, softcap: float | None
) -> BaseLogits | None:
    return None if hidden is None or weight is None else BaseLogits(hidden, weight, bias, scale, softcap)


@_operator.register_fake
def _(hidden_ND, weight_VD, bias_V, labels_N, sequence_N, token_weight_N, needs_grad, gate, logit_scale, softcap, backend,
      tile_bytes, tail, tail_threshold, gate_threshold, recompute, ignore_index, base_hidden_ND=None, base_weight_VD=None,
      base_bias_V=None, kl=0.0, direction="", mask_target=False, base_scale=1.0, base_softcap=None):  # fmt: skip
    inputs = (hidden_ND, weight_VD, hidden_ND if bias_V is None else bias_V)
    gradients = [
        value.new_empty(value.shape if needed else (0,), dtype=dtype)
        for value, needed, dtype in zip(
            inputs, needs_grad, _gradient_dtypes(hidden_ND, weight_VD, tile_bytes, tail), strict=True
        )
    ]
    single = torch.promote_types(hidden_ND.dtype, torch.float32)
    rows = labels_N.shape[0]
    number, flag = hidden_ND.new_empty(rows, dtype=single), hidden_ND.new_empty(rows, dtype=torch.bool)
    topk = number if named_gate(gate).topk is not None else number.new_empty(0)
    loss = hidden_ND.new_empty((), dtype=single)
    divergence = number.new_empty(0) if base_hidden_ND is None else number
    outputs = (number, number, topk, flag, number, flag, divergence)
    return loss, *gradients, *(torch.empty_like(output) for output in outputs)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:4])
    hidden_ND, weight_VD, bias_V, _, _, _, ctx.needs_grad, *ctx.settings = inputs
    ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = [
        (gradient * grad_loss).to(dtype) if needed and grad_loss is not None else None
        for gradient, needed, dtype in zip(ctx.saved_tensors, ctx.needs_grad, ctx.dtypes, strict=True)
    ]
    return *gradients, None, None, None, None, *(None for _ in ctx.settings)


_operator.register_autograd(_backward, setup_context=_setup_context)


def _gradient_dtypes(
    hidden_ND: Tensor, weight_VD: Tensor, tile_bytes: int | None, tail: str
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Dtypes of the gradients with respect to hidden, weight and bias before they are scaled, from the sizes only."""
    dtype = hidden_ND.dtype
    single = torch.promote_types(dtype, torch.float32)
    rows, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    most = max(1, default_tile_bytes(tile_bytes, hidden_ND.device, vocab) // (vocab * dtype.itemsize))
    pieces = math.ceil(rows / (most if tail == "exact" else ROWS_PER_SUM))
    return dtype, sum_dtype(dtype, pieces) if weight_VD.dtype == dtype else single, single
