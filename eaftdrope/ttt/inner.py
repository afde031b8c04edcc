"""The inner loss, its gradient with respect to the fast weights of each row, and the step.

    loss of a row  = sum_t w_t nll_t / sum_t w_t        over the tokens of one chunk; w = 1 without an inner gate
    step           = -lr * g * min(1, clip / |g|)       |g| over all fast weights of the row

(arXiv 2512.23675, section 2.) Where the gradient of the training loss runs through the step (second order), the loss must
be differentiable twice, and `_NLL` is, without the logits of more than a tile in memory. Elsewhere the fused operator
serves, which forms its gradient in the forward pass.

Legend: B rows, n tokens of a chunk, N = B n, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eaftdrope.loss.fused import linear_loss
from eaftdrope.loss.gates import NoGate, resolve_gate
from eaftdrope.loss.settings import LossSettings
from eaftdrope.trainer.head import Head, gathered_head

from .config import TTTConfig

_TILE_BYTES = 64 << 20
_IGNORED = -100
TWICE_REFUSED = "a head with a bias or a softcap has no loss here that is differentiable twice. Use horizon=1."


def stepped(
    delta: list[Tensor] | None, gradients: list[Tensor], rate: float, config: TTTConfig, *, second_order: bool
) -> list[Tensor]:
    """delta - rate * gradient, each row's gradient over all tensors `[B, ...]` scaled to a norm of at most `config.clip`.

    Fast weights are large, so each is read and written once.
    """
    if second_order:
        squares_B = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
        # the square root has no finite gradient at 0, which a row without a learned token has
        norm_B = (squares_B + torch.finfo(squares_B.dtype).tiny).sqrt()
    else:
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        norms = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=wide) for g in gradients]
        norm_B = torch.linalg.vector_norm(torch.stack(norms), dim=0) + torch.finfo(wide).tiny
    step_B = -rate * (config.clip / norm_B).clamp(max=1.0)
    steps = [step_B.view(-1, *[1] * (g.ndim - 1)) for g in gradients]
    if delta is None:
        return [g * step for g, step in zip(gradients, steps, strict=True)]
    return [torch.addcmul(d, g, step) for d, g, step in zip(delta, gradients, steps, strict=True)]


@contextmanager
def inner_head(model: PreTrainedModel) -> Generator[Head]:
    """The head of first-order inner losses, which no gradient passes: gathered, and cast for autocast, once."""
    with gathered_head(model) as head:
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        yield Head(weight, bias, head.transform)


def inner_gradients(
    model: PreTrainedModel,
    config: TTTConfig,
    hidden_BnD: Tensor,
    targets_Bn: Tensor,
    weights: list[Tensor],
    *,
    head: Head | None = None,
    second_order: bool,
    retain_graph: bool,
) -> list[Tensor]:
    """The gradients `[B, ...]` of each row's inner loss with respect to its fast weights.

    Args:
        hidden_BnD: final hidden states, computed with `weights`.
        targets_Bn: the next tokens; -100 in rows that do not learn, whose gradient is 0.
        head: of `inner_head`, for first order; None: the model's own.
        second_order: keep the graph of the gradients.
    """
    with nullcontext(head) if head is not None and not second_order else gathered_head(model) as head:
        loss_of = _twice_differentiable if second_order else _fused
        # rows are independent, so the gradient of a sum over rows is each row's own
        loss, total_B = loss_of(config, head, hidden_BnD, targets_Bn)
        create_graph = second_order and retain_graph
        gradients = torch.autograd.grad(loss, weights, create_graph=create_graph, retain_graph=retain_graph)
    if total_B is None:
        return list(gradients)
    mean_B = total_B.clamp(min=torch.finfo(total_B.dtype).tiny).reciprocal()
    return [g * mean_B.to(g.dtype).view(-1, *[1] * (g.ndim - 1)) for g in gradients]


def _fused(config: TTTConfig, head: Head, hidden_BnD: Tensor, targets_Bn: Tensor) -> tuple[Tensor, Tensor | None]:
    """The sum over rows of their weighted losses, and the sum of the weights per row `[B]`.

    Without a gate the sum of their mean losses, and None: a row that learns has a target at every token of its chunk.
    """
    gate = resolve_gate(config.inner_gate)
    bias = None if head.bias is None else head.bias.detach()
    is_mean = isinstance(gate, NoGate)
    loss, details = linear_loss(
        hidden_BnD,
        head.weight.detach(),
        targets_Bn,
        LossSettings(gate),
        bias=bias,
        num_items=targets_Bn.shape[1] if is_mean else 1,
        transform=head.transform,
        ignore_index=_IGNORED,
    )
    if is_mean:
        return loss, None
    weight_N = torch.zeros(targets_Bn.numel(), dtype=details.weight.dtype, device=targets_Bn.device)
    return loss, weight_N.index_copy(0, details.rows, details.weight).view(targets_Bn.shape).sum(1)


def _twice_differentiable(
    config: TTTConfig, head: Head, hidden_BnD: Tensor, targets_Bn: Tensor
) -> tuple[Tensor, Tensor]:
    """`_fused`, differentiable twice, also with respect to the head."""
    if head.bias is not None or head.transform.softcap is not None:
        raise ValueError(TWICE_REFUSED)
    learned_Bn = targets_Bn != _IGNORED
    weight_Bn = learned_Bn.to(torch.promote_types(hidden_BnD.dtype, torch.float32))
    if config.inner_gate != "none":
        with torch.no_grad():
            settings = LossSettings(resolve_gate(config.inner_gate))
            _, details = linear_loss(
                hidden_BnD, head.weight, targets_Bn, settings, transform=head.transform, ignore_index=_IGNORED
            )
            weight_Bn = (
                torch.zeros_like(weight_Bn).flatten().index_copy(0, details.rows, details.weight.to(weight_Bn.dtype))
            )
            weight_Bn = weight_Bn.view(targets_Bn.shape)
    nll_N = nll_twice(hidden_BnD.flatten(0, 1) * head.transform.scale, head.weight, targets_Bn.clamp(min=0).flatten())
    return (nll_N * weight_Bn.flatten()).sum(), weight_Bn.sum(1)


def nll_twice(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, rows: int | None = None) -> Tensor:
    """Negative log-likelihoods `[N]`, float32 at least, that can be differentiated twice.

    Logits exist for one tile of rows at a time, also in both backward passes.

    Args:
        hidden_ND: final hidden states.
        weight_VD: head, without a bias.
        targets_N: int64, in `[0, V)`.
        rows: rows of a tile; None: as many as 64 MB hold.
    """
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    if rows is None:
        rows = max(1, _TILE_BYTES // (4 * weight_VD.shape[0]))
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _NLL.apply(hidden_ND, weight_VD, targets_N, rows)


def _residual(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities p and p - onehot(y) of a tile `[N, V]`, in float32 at least."""
    z_NV = hidden_ND @ weight_VD.mT
    p_NV = z_NV.to(torch.promote_types(z_NV.dtype, torch.float32)).softmax(-1)
    r_NV = p_NV.clone()
    r_NV[torch.arange(len(targets_N), device=targets_N.device), targets_N] -= 1
    return p_NV, r_NV


class _NLL(torch.autograd.Function):
    """nll [N]. Its gradient is an autograd function too, so it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        ctx.rows = rows
        parts = []
        for h, y in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
            z = h @ weight_VD.mT
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            parts.append(torch.nn.functional.cross_entropy(z, y, reduction="none"))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        return (
            *_NLLGradient.apply(hidden_ND, weight_VD, targets_N, gradients[0], ctx.rows, ctx.needs_input_grad[1]),
            None,
            None,
        )


class _NLLGradient(torch.autograd.Function):
    """The first backward: with r = c (p - onehot(y)), the gradients r W of hidden and r' H of the weight.

    Its own backward, for cotangents u of the first and q of the second, with v = u W' + H q' and dz = c p (v - <p, v>):
    to hidden dz W + r q, to the weight dz' H + r' u, to c <p, v> - v_y.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, c_N: Tensor, rows: int, with_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, c_N)
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        to_hidden = torch.empty_like(hidden_ND)
        to_weight = torch.zeros_like(weight_VD, dtype=c_N.dtype) if with_weight else None
        for start in range(0, len(targets_N), rows):
            tile = slice(start, start + rows)
            _, r = _residual(hidden_ND[tile], weight_VD, targets_N[tile])
            r = (r * c_N[tile, None]).to(hidden_ND.dtype)
            to_hidden[tile] = r @ weight_VD
            if to_weight is not None:
                to_weight += r.mT @ hidden_ND[tile]
        return to_hidden, None if to_weight is None else to_weight.to(weight_VD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        u_ND, q_VD = gradients
        if u_ND is None and q_VD is None:
            return (None,) * 6
        hidden_ND, weight_VD, targets_N, c_N = ctx.saved_tensors
        to_hidden, to_c = torch.zeros_like(hidden_ND), torch.zeros_like(c_N)
        to_weight = torch.zeros_like(weight_VD, dtype=c_N.dtype)
        for start in range(0, len(targets_N), ctx.rows):
            tile = slice(start, start + ctx.rows)
            h, y, c = hidden_ND[tile], targets_N[tile], c_N[tile, None]
            p, r = _residual(h, weight_VD, y)
            v = torch.zeros_like(p)
            if u_ND is not None:
                v += u_ND[tile] @ weight_VD.mT
            if q_VD is not None:
                v += h @ q_VD.mT
            pv = (p * v).sum(-1)
            to_c[tile] = pv - v.gather(1, y[:, None]).squeeze(1)
            dz = (c * p * (v - pv[:, None])).to(h.dtype)
            r = (r * c).to(h.dtype)
            to_hidden[tile] = dz @ weight_VD
            to_weight += dz.mT @ h
            if q_VD is not None:
                to_hidden[tile] += r @ q_VD
            if u_ND is not None:
                to_weight += r.mT @ u_ND[tile]
        return to_hidden, to_weight.to(weight_VD.dtype), None, to_c, None, None
