"""What is known of a token once its row of logits has been seen: the input of every gate.

Legend: N tokens (rows), V vocabulary, K largest logits kept for the top-K entropy. All entropies are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A token is a *confident conflict* when the model is sure of itself and the label disagrees: entropy and probability
# of the label both low. 0.5 nats is the low-entropy group of the paper's Figure 4; at that entropy the favourite token
# holds more than 0.8, so a label under 0.1 contradicts it.
CONFLICT_ENTROPY = 0.5
CONFLICT_PROBABILITY = 0.1

# Tokens whose gate is below this are reported as suppressed.
LOW_GATE = 0.05


@dataclass(frozen=True)
class TokenStats:
    """Detached statistics of N trained tokens; ignored positions are not among them.

    Args:
        nll (`Tensor` `[N]`, float32 or float64):
            Cross-entropy of the label, `-log p(y)`; never negative.
        entropy (`Tensor` `[N]`, same dtype):
            Entropy of the whole next-token distribution; never negative.
        topk_entropy (`Tensor` `[N]` or `None`):
            Entropy of the K most likely tokens, renormalised among themselves (EAFT paper, Eq. 2). `None` unless the
            gate asks for it.
        correct (`Tensor` `[N]`, bool):
            Whether no token is more likely than the label.
        vocab_size (`int`):
            V.
        sequence (`Tensor` `[N]`, int64, or `None`):
            Which sequence of the batch a token belongs to, for gates that average over sequences.
    """

    nll: Tensor
    entropy: Tensor
    topk_entropy: Tensor | None
    correct: Tensor
    vocab_size: int
    sequence: Tensor | None = None

    @property
    def probability(self) -> Tensor:
        """`[N]` probability of the label."""
        return torch.exp(-self.nll)

    @property
    def conflict(self) -> Tensor:
        """`[N]` bool: confident conflicts, by `CONFLICT_ENTROPY` (nats) and `CONFLICT_PROBABILITY`."""
        return (self.entropy < CONFLICT_ENTROPY) & (self.probability < CONFLICT_PROBABILITY)
