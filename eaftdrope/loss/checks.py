"""Checks of arguments that the definition and the fused operator share: each error states what to do instead."""

from __future__ import annotations

from torch import Tensor

from .anchor import Anchor


def check_label_smoothing(label_smoothing: float) -> None:
    """Refuse label smoothing."""
    if label_smoothing:
        raise ValueError(
            f"label_smoothing={label_smoothing} cannot be combined with a gate: smoothing adds a pull towards every "
            "token, which is the pull the gate exists to switch off on confident tokens. Set label_smoothing=0; to "
            "soften the gate itself use alpha < 1, e.g. gates.EAFT(alpha=0.5)."
        )


def check_shapes(
    rows: Tensor, labels: Tensor, sequence_ids: Tensor | None = None, token_weights: Tensor | None = None
) -> None:
    """Check that labels `[...]` belong to rows `[..., V]` or `[..., D]`."""
    if tuple(rows.shape[:-1]) != tuple(labels.shape):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not belong to rows of shape {tuple(rows.shape)}: expected one "
            f"label per row, shape {tuple(rows.shape[:-1])}. Rows and labels must be aligned, nothing is shifted: for "
            "next-token labels pass hidden[:, :-1] and labels[:, 1:]."
        )
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers (token ids), got {labels.dtype}.")
    if sequence_ids is not None and sequence_ids.shape != labels.shape:
        raise ValueError(
            f"sequence_ids of shape {tuple(sequence_ids.shape)} must have the shape of labels, {tuple(labels.shape)}."
        )
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights of shape {tuple(token_weights.shape)} must have the shape of labels, {tuple(labels.shape)}."
        )
    if token_weights is not None and not token_weights.is_floating_point():
        raise ValueError(f"token_weights must be floating-point numbers, got {token_weights.dtype}.")


def check_anchor(anchor: Anchor | None, base: object) -> None:
    """Check that an anchor has a base model, and a base model an anchor."""
    if anchor is not None and base is None:
        raise ValueError(
            f"the anchor {anchor.formula} needs the base model: pass its logits to eaft_loss (base_logits), or its hidden "
            "states and head to fused_linear_eaft (base=BaseLogits(hidden, weight))."
        )
    if anchor is None and base is not None:
        raise ValueError("a base model was passed without an anchor, and nothing reads it. Pass anchor=Anchor(kl=0.1).")


def check_labels(labels_N: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Check that labels which are not ignored are token ids."""
    if labels_N.numel() == 0:
        return
    low, high = (int(value) for value in labels_N.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"labels range from {low} to {high}, outside the vocabulary of {vocab_size} tokens. Positions that are not "
            f"trained must have the label ignore_index={ignore_index}; if the tokenizer is larger than the model's head, "
            "resize the embeddings first."
        )
