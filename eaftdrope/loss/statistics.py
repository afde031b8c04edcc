"""Per-token statistics: the input of every gate.

Legend: N tokens (rows), V vocabulary, K largest logits kept for the top-K entropy. All entropies are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A token is a *confident conflict* if the model is certain and the label disagrees: entropy and probability of the label
# are both low. 0.5 nats is the low-entropy group of the paper's Figure 4; at that entropy the most likely token has more
# than 0.8, so a label below 0.1 contradicts it.
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
            Entropy of the next-token distribution over the whole vocabulary; never negative.
        topk_entropy (`Tensor` `[N]` or `None`):
            Entropy of the K most likely tokens, renormalised among themselves (EAFT paper, Eq. 2). `None` unless the
            gate reads it.
        correct (`Tensor` `[N]`, bool):
            True if no token is more likely than the label.
        vocab_size (`int`):
            V.
        sequence (`Tensor` `[N]`, int64, or `None`):
            The sequence of the batch that a token belongs to, for gates that average over sequences.
    """

    nll: Tensor
    entropy: Tensor
    topk_entropy: Tensor | None
    correct: Tensor
    vocab_size: int
    sequence: Tensor | None = None

    @property
    def probability(self) -> Tensor:
        """Probability of the label, `[N]`."""
        return torch.exp(-self.nll)

    @property
    def conflict(self) -> Tensor:
        """Confident conflicts, `[N]` bool, by `CONFLICT_ENTROPY` (nats) and `CONFLICT_PROBABILITY`."""
        return (self.entropy < CONFLICT_ENTROPY) & (self.probability < CONFLICT_PROBABILITY)
