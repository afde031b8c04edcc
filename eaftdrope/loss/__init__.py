"""The entropy-gated cross-entropy: definition, statistics, gates, and the fused operator.

Imports torch and nothing else of this project but `eaftdrope.files`, so it can be lifted out and used alone.

- `eaft_loss(logits, labels)`                   the definition, readable, on full logits
- `fused_linear_eaft(hidden, weight, labels)`   the same loss without ever holding the N x V logits
- `gates`                                       entropy (and friends) -> weight of a token
- `TokenStats`, `token_statistics`              what a gate may look at
"""

from . import gates
from .definition import eaft_loss, token_statistics
from .fused import LossDetails, fused_linear_eaft
from .statistics import CONFLICT_ENTROPY, CONFLICT_PROBABILITY, LOW_GATE, TokenStats

__all__ = [
    "CONFLICT_ENTROPY",
    "CONFLICT_PROBABILITY",
    "LOW_GATE",
    "LossDetails",
    "TokenStats",
    "eaft_loss",
    "fused_linear_eaft",
    "gates",
    "token_statistics",
]
