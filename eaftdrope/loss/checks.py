"""Refusals shared by the definition and the fused operator: what, why, and what to do instead."""

from __future__ import annotations

from torch import Tensor

from .backends import check_backend_name

TAILS = ("exact", "sparse")

# Gradients by a logit below this are dropped by tail="sparse".
TAIL_THRESHOLD = 2.0**-12


def check_label_smoothing(label_smoothing: float) -> None:
    if label_smoothing:
        raise ValueError(
            f"label_smoothing={label_smoothing} can not be combined with a gate: smoothing adds a pull towards every "
            "token, which is the pull the gate exists to switch off on confident tokens. Set label_smoothing=0; to "
            "soften the gate itself use alpha < 1, e.g. gates.EAFT(alpha=0.5)."
        )


def check_shapes(rows: Tensor, labels: Tensor, sequence_ids: Tensor | None = None) -> None:
    """`rows` is `[..., V]` or `[..., H]`, `labels` the same without the last dimension."""
    if tuple(rows.shape[:-1]) != tuple(labels.shape):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not belong to rows of shape {tuple(rows.shape)}: expected one "
            f"label a row, shape {tuple(rows.shape[:-1])}. Rows and labels are taken as aligned and nothing "
            "is shifted: for next-token labels pass hidden[:, :-1] and labels[:, 1:]."
        )
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers (token ids), got {labels.dtype}.")
    if sequence_ids is not None and sequence_ids.shape != labels.shape:
        raise ValueError(
            f"sequence_ids of shape {tuple(sequence_ids.shape)} must have the shape of labels, {tuple(labels.shape)}."
        )


def check_labels(labels_N: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Labels that survived the ignore mask must be token ids."""
    if labels_N.numel() == 0:
        return
    low, high = (int(value) for value in labels_N.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"labels range from {low} to {high}, outside the vocabulary of {vocab_size} tokens. Positions that are not "
            f"trained must carry ignore_index={ignore_index}; if the tokenizer is larger than the model's head, resize "
            "the embeddings first."
        )


def check_settings(
    *,
    backend: str = "auto",
    tail: str = "exact",
    tail_threshold: float = TAIL_THRESHOLD,
    gate_threshold: float = 0.0,
    tile_bytes: int | None = None,
    recompute: bool = False,
) -> None:
    """Settings of the fused operator, before there is anything to compute."""
    check_backend_name(backend)
    if tail not in TAILS:
        raise ValueError(f"unknown tail {tail!r}. Tails: {', '.join(TAILS)}.")
    if not 0 < tail_threshold < 1:
        raise ValueError(f"tail_threshold={tail_threshold}: must be between 0 and 1 (2^-12 by default).")
    if not 0 <= gate_threshold < 1:
        raise ValueError(
            f"gate_threshold={gate_threshold}: must be at least 0 (leave out closed rows alone) and below 1."
        )
    if tile_bytes is not None and tile_bytes < 1:
        raise ValueError(f"tile_bytes={tile_bytes}: must be a number of bytes.")
    if recompute and tail != "exact":
        raise ValueError("recompute forms whole slices of the gradient: it goes with tail='exact' alone.")
