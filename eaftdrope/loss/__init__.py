"""The entropy-gated cross-entropy: definition, statistics, gates, and the fused operator.

    eaft_loss(logits, labels)                     the definition, on full logits
    fused_linear_eaft(hidden, weight, labels)     the same loss without the logits

In reading order: `definition` (the loss in a few lines), `statistics` and `gates` (the weight of a token), `anchor` and
`base_logits` (the divergence from a base model, and that model as the operator reads it), `settings` (how it is
computed), `fused` (the operator: arguments, checks, autograd), `compute` (the loop over tiles of logits, with `rows` and
`buffers`), `gradients` and `tail` (the sums over tiles, with `products`), `backends` (the work on one tile).
Beside that path: `vocabulary` (a head sharded by vocabulary over processes), `torch_compile` (the operator inside
torch.compile), `landscape` (trained tokens by entropy and
probability), `checks`, `native` (the C++ of the cpu backend).

The package needs torch, and of this project only `files` and `lazy`. Names are imported on first use, so a recipe reads
the gates' options without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaftdrope.lazy import lazy_names

_LAZY = {
    "Anchor": "anchor",
    "BaseLogits": "base_logits",
    "CONFLICT_ENTROPY": "statistics",
    "CONFLICT_PROBABILITY": "statistics",
    "LOW_GATE": "statistics",
    "LossDetails": "fused",
    "LossSettings": "settings",
    "TokenStats": "statistics",
    "VocabularyShard": "vocabulary",
    "eaft_loss": "definition",
    "fused_linear_eaft": "fused",
    "anchor_divergence": "definition",
    "gates": "gates",
    "token_statistics": "definition",
}

__all__ = [
    "CONFLICT_ENTROPY",
    "CONFLICT_PROBABILITY",
    "LOW_GATE",
    "Anchor",
    "BaseLogits",
    "LossDetails",
    "LossSettings",
    "TokenStats",
    "VocabularyShard",
    "anchor_divergence",
    "eaft_loss",
    "fused_linear_eaft",
    "gates",
    "token_statistics",
]

if TYPE_CHECKING:
    from . import gates
    from .anchor import Anchor
    from .base_logits import BaseLogits
    from .definition import anchor_divergence, eaft_loss, token_statistics
    from .fused import LossDetails, fused_linear_eaft
    from .settings import LossSettings
    from .statistics import CONFLICT_ENTROPY, CONFLICT_PROBABILITY, LOW_GATE, TokenStats
    from .vocabulary import VocabularyShard

__getattr__, __dir__ = lazy_names(__name__, _LAZY)
