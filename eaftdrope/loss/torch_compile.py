"""The operator inside torch.compile: registered with torch, opaque to the compiler, no graph break.

How many rows are trained differs from batch to batch and is nothing a graph can know, so everything that goes out has
the size of the rows that went in: what was seen of ignored rows is 0. The gate travels as text.

Legend: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import math
import uuid
from dataclasses import fields

import torch
from torch import Tensor

from .call import Call, default_tile_bytes, run
from .gates import GATES, Gate, GateLike, resolve_gate
from .gradients import sum_dtype
from .statistics import TokenStats
from .tail import ROWS_A_SUM

# Gates that text can not carry: functions, and classes of other people. The name is of this process alone, so a graph
# that a cache brings from another one finds nothing instead of another gate.
_PROCESS = uuid.uuid4().hex
_foreign_gates: dict[str, Gate] = {}


@torch.compiler.assume_constant_result
def gate_name(gate: GateLike) -> str:
    """A gate as text; see `named_gate`."""
    gate = resolve_gate(gate)
    if type(gate) is GATES.get(gate.name):
        return json.dumps([gate.name, {option.name: getattr(gate, option.name) for option in fields(gate)}])
    name = next((name for name, known in _foreign_gates.items() if known is gate), f"{_PROCESS}:{len(_foreign_gates)}")
    _foreign_gates[name] = gate
    return name


@functools.lru_cache(maxsize=256)
def named_gate(name: str) -> Gate:
    """The gate that `gate_name` wrote."""
    if not name.startswith("["):
        return _foreign_gates[name]
    name, options = json.loads(name)
    return resolve_gate(name, **options)


def compiled_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    sequence_N: Tensor | None,
    gate: GateLike,
    settings: dict,
) -> tuple[Tensor, TokenStats, Tensor, Tensor]:
    """(loss sum, statistics `[N]`, gate `[N]`, closed `[N]`), 0 where a row is not trained. `settings` are a [`Call`]'s."""
    grad = torch.is_grad_enabled()
    needed = [grad and t is not None and t.requires_grad for t in (hidden_NH, weight_VH, bias_V)]
    inputs = (hidden_NH, weight_VH, bias_V, labels_N, sequence_N)
    loss, _, _, _, *seen = _operator(*inputs, needed, gate_name(gate), **settings)
    nll, entropy, topk_entropy, correct, weight, closed = (value.detach() for value in seen)
    stats = TokenStats(
        nll, entropy, topk_entropy if topk_entropy.numel() else None, correct, weight_VH.shape[0], sequence_N
    )
    return loss, stats, weight, closed


@torch.library.custom_op("eaftdrope::fused_linear_eaft", mutates_args=())
def _operator(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    sequence_N: Tensor | None,
    needed: list[bool],
    gate: str,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    tile_bytes: int | None,
    tail_threshold: float | None,
    gate_threshold: float,
    recompute: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = Call(
        named_gate(gate),
        logit_scale,
        softcap,
        backend,
        tile_bytes,
        tail_threshold,
        gate_threshold,
        recompute,
        ignore_index,
    )
    result, rows = run(hidden_NH, weight_VH, bias_V, labels_N, sequence_N, call, tuple(needed))
    dtypes = _gradient_dtypes(hidden_NH, weight_VH, tile_bytes, tail_threshold)
    gradients = [
        hidden_NH.new_empty(0, dtype=dtype) if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(result.gradients, dtypes, strict=True)
    ]
    stats = result.stats
    seen = (stats.nll, stats.entropy, stats.topk_entropy, stats.correct, result.weight, result.closed)

    def of_all_rows(value_T: Tensor | None) -> Tensor:
        if value_T is None:
            return result.weight.new_empty(0)
        value_N = value_T.new_zeros(len(labels_N))
        # not an assignment by mask, which would wait for the device
        value_N[rows.places(slice(0, rows.count))] = value_T
        return value_N

    return result.loss, *gradients, *(of_all_rows(value) for value in seen)


@_operator.register_fake
def _(hidden_NH, weight_VH, bias_V, labels_N, sequence_N, needed, gate, logit_scale, softcap, backend, tile_bytes,
      tail_threshold, gate_threshold, recompute, ignore_index):  # fmt: skip
    inputs = (hidden_NH, weight_VH, hidden_NH if bias_V is None else bias_V)
    gradients = [
        value.new_empty(value.shape if need else (0,), dtype=dtype)
        for value, need, dtype in zip(
            inputs, needed, _gradient_dtypes(hidden_NH, weight_VH, tile_bytes, tail_threshold), strict=True
        )
    ]
    single = torch.promote_types(hidden_NH.dtype, torch.float32)
    rows = labels_N.shape[0]
    number, flag = hidden_NH.new_empty(rows, dtype=single), hidden_NH.new_empty(rows, dtype=torch.bool)
    topk = number if named_gate(gate).topk is not None else number.new_empty(0)
    loss = hidden_NH.new_empty((), dtype=single)
    outputs = (number, number, topk, flag, number, flag)
    return loss, *gradients, *(torch.empty_like(output) for output in outputs)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:4])
    hidden_NH, weight_VH, bias_V, _, _, ctx.needed, *ctx.settings = inputs
    ctx.dtypes = (hidden_NH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype)


def _backward(ctx, grad_loss, *_):
    gradients = [
        (gradient * grad_loss).to(dtype) if need and grad_loss is not None else None
        for gradient, need, dtype in zip(ctx.saved_tensors, ctx.needed, ctx.dtypes, strict=True)
    ]
    return *gradients, None, None, None, *(None for _ in ctx.settings)


_operator.register_autograd(_backward, setup_context=_setup_context)


def _gradient_dtypes(
    hidden_NH: Tensor, weight_VH: Tensor, tile_bytes: int | None, tail_threshold: float | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of the gradients by hidden, weight and bias before they are scaled: known from the sizes alone."""
    dtype = hidden_NH.dtype
    single = torch.promote_types(dtype, torch.float32)
    rows, vocab = hidden_NH.shape[0], weight_VH.shape[0]
    most = max(1, default_tile_bytes(tile_bytes, hidden_NH.device, vocab) // (vocab * dtype.itemsize))
    pieces = math.ceil(rows / (most if tail_threshold is None else ROWS_A_SUM))
    return dtype, sum_dtype(dtype, pieces) if weight_VH.dtype == dtype else single, single
