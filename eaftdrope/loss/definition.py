"""The definition of the loss, as in the paper. Every faster implementation is tested against this file.

    p_t     = softmax(z_t)
    nll_t   = -log p_t[y_t]
    H_t     = -sum_v p_t[v] log p_t[v]
    w_t     = gate(nll_t, H_t, ...)                 detached: no gradient flows through the gate
    loss    = sum_t w_t * nll_t / num_items

and with a weight u_t of the token itself, w_t = u_t * gate(...), or |u_t| where u_t < 0: a token without a gate.

Entropy-Adaptive Fine-Tuning, arXiv 2601.02151, Eq. 2-3. With an anchor, `kl D_t` is added to each term (`anchor.py` has
the formula of D); w_t does not weight it. It holds the full logits in float32 (float64 for float64 logits):
for training use `fused_linear_eaft`.

Legend: N tokens, V vocabulary, K largest logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .anchor import Anchor
from .checks import check_anchor, check_label_smoothing, check_labels, check_shapes
from .gates import Gate, GateLike, resolve_gate
from .statistics import TokenStats


def _entropy(log_probs_NV: Tensor) -> Tensor:
    """Entropy in nats; xlogy makes 0 * log 0 = 0, and rounding cannot push it below zero."""
    probs_NV = log_probs_NV.exp()
    return -torch.special.xlogy(probs_NV, probs_NV).sum(-1).clamp_max(0)


def token_statistics(
    logits: Tensor, labels: Tensor, *, k: int | None = 20, sequence: Tensor | None = None
) -> TokenStats:
    """Return the statistics of rows of logits and their labels; nothing is shifted, no label may be ignored.

    Args:
        logits (`Tensor` `[N, V]`): any floating dtype; computed in float64 if it is float64, else in float32.
        labels (`Tensor` `[N]`, int64): in `[0, V)`.
        k (`int` or `None`): size of the top-K entropy; `None` does not compute it.
    """
    z_NV = logits if logits.dtype == torch.float64 else logits.float()
    log_probs_NV = z_NV.log_softmax(-1)
    target_N = z_NV.gather(1, labels[:, None]).squeeze(1)
    topk_entropy_N = None
    if k is not None:
        topk_NK = z_NV.topk(min(k, z_NV.shape[1]), dim=-1).values
        topk_entropy_N = _entropy(topk_NK.log_softmax(-1))
    return TokenStats(
        nll=-log_probs_NV.gather(1, labels[:, None]).squeeze(1),
        entropy=_entropy(log_probs_NV),
        topk_entropy=topk_entropy_N,
        correct=target_N >= z_NV.amax(-1),
        vocab_size=z_NV.shape[1],
        sequence=sequence,
    )


def evaluate_gate(gate: Gate, stats: TokenStats) -> Tensor:
    """Return the weights `[N]` of a gate, detached, in the dtype of the statistics.

    Raises:
        ValueError: the gate returned anything but one number per token.
    """
    if stats.nll.numel() == 0:
        return stats.nll
    weight_N = gate(stats)
    if not isinstance(weight_N, Tensor) or weight_N.shape != stats.nll.shape:
        got = f"shape {tuple(weight_N.shape)}" if isinstance(weight_N, Tensor) else type(weight_N).__name__
        raise ValueError(
            f"the gate {gate.formula} must return one weight per token, a tensor of shape {tuple(stats.nll.shape)}; it "
            f"returned {got}."
        )
    return weight_N.detach().to(stats.nll.dtype)


def weigh(gate_N: Tensor, token_weight_N: Tensor | None) -> Tensor:
    """Return the weights `[N]` of tokens in the loss: the gate times the token's own weight; a negative one replaces the
    gate by its absolute value."""
    if token_weight_N is None:
        return gate_N
    token_weight_N = token_weight_N.to(gate_N.dtype)
    return torch.where(token_weight_N < 0, -token_weight_N, gate_N * token_weight_N)


def anchor_divergence(logits: Tensor, base_logits: Tensor, labels: Tensor, anchor: Anchor) -> Tensor:
    """Return the divergence D of `anchor.py` from the base model, per row: `[N]`, in nats, differentiable.

    A token that the first distribution excludes (a logit of -inf) adds nothing; one that only the second excludes makes it
    infinite.

    Args:
        logits, base_logits (`Tensor` `[N, V]`): of model and base; computed in float64 if they are float64, else in float32.
        labels (`Tensor` `[N]`, int64): in `[0, V)`, read by an anchor with `mask_target`.
    """
    z_NV, b_NV = (value if value.dtype == torch.float64 else value.float() for value in (logits, base_logits.detach()))
    if anchor.mask_target:
        z_NV, b_NV = (value.scatter(1, labels[:, None], float("-inf")) for value in (z_NV, b_NV))
    log_p_NV, log_q_NV = z_NV.log_softmax(-1), b_NV.log_softmax(-1)
    first_NV, second_NV = (log_q_NV, log_p_NV) if anchor.direction == "forward" else (log_p_NV, log_q_NV)
    excluded_NV = first_NV.isneginf()
    difference_NV = first_NV.masked_fill(excluded_NV, 0) - second_NV.masked_fill(excluded_NV, 0)
    return (first_NV.exp() * difference_NV).sum(-1)


def eaft_loss(
    logits: Tensor,
    labels: Tensor,
    gate: GateLike = "eaft",
    *,
    num_items: int | float | Tensor | None = None,
    ignore_index: int = -100,
    sequence_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    anchor: Anchor | None = None,
    base_logits: Tensor | None = None,
) -> Tensor:
    """Entropy-gated cross-entropy of logits and labels that are already aligned (nothing is shifted).

    Args:
        logits (`Tensor` `[..., V]`): any floating dtype.
        labels (`Tensor` `[...]`, int64): one label per row; rows with `ignore_index` do not count.
        gate (`str`, [`~eaftdrope.loss.gates.Gate`] or callable, *optional*, defaults to `"eaft"`):
            Maps [`TokenStats`] to one weight per token.
        num_items (*optional*): divisor of the sum; defaults to the number of labels that are not ignored.
        sequence_ids (`Tensor` `[...]`, *optional*): sequence of each row, used only by the `talr` gate.
        token_weights (`Tensor` `[...]`, *optional*): factor on the gate of each row; a negative one replaces the gate (see
            [`weigh`]). Rows of weight 0 count in `num_items`.
        anchor ([`Anchor`], *optional*): adds the divergence from the base model, which the gate does not weight.
        base_logits (`Tensor` `[..., V]`, *optional*): the base model's logits of the same rows, with an anchor.

    Returns:
        Scalar loss, float32 (float64 for float64 logits). A batch without a trained token gives a zero with a graph.

    Raises:
        ValueError: shapes that do not match, labels outside `[0, V)`, label smoothing, a gate of the wrong shape, an anchor
            without a base or a base without an anchor.
    """
    check_label_smoothing(label_smoothing)
    check_anchor(anchor, base_logits)
    check_shapes(logits, labels, sequence_ids, token_weights)
    gate = resolve_gate(gate)
    keep = labels.reshape(-1) != ignore_index
    labels_N = labels.reshape(-1)[keep]
    check_labels(labels_N, logits.shape[-1], ignore_index)
    logits_NV = logits.reshape(-1, logits.shape[-1])[keep]
    sequence_N = None if sequence_ids is None else sequence_ids.reshape(-1)[keep]
    token_weight_N = None if token_weights is None else token_weights.reshape(-1)[keep]

    stats = token_statistics(logits_NV, labels_N, k=gate.topk, sequence=sequence_N)
    with torch.no_grad():
        weight_N = weigh(evaluate_gate(gate, stats), token_weight_N)
    # not a plain product: a token whose gate is closed stays out even if its label is impossible (0 * inf)
    loss = torch.where(weight_N == 0, 0, weight_N * stats.nll).sum()
    if anchor is not None and base_logits is not None:
        base_NV = base_logits.reshape(-1, logits.shape[-1])[keep]
        loss = loss + anchor.kl * anchor_divergence(logits_NV, base_NV, labels_N, anchor).sum()
    if num_items is None:
        num_items = max(labels_N.numel(), 1)
    return loss / num_items
