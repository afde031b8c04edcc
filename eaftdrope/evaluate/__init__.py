"""Probes before and after training: what was gained on the target, what was forgotten in general.

    probes = build_probes([("held_out_loss", "target", {}), ("perplexity", "general", {})], tokenizer=..., ...)
    before = run_probes(model, tokenizer, probes)
    ...
    after = run_probes(model, tokenizer, probes)
    print(comparison(before, after))

Every likelihood is plain cross-entropy, whatever gate the training used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .probes.build import Probe, build_probes, run_probes
    from .scores import Score, scores_from_json, scores_to_json
    from .table import comparison, comparison_markdown

# Loaded on first use: reading a table of scores does not need torch.
_HOME = {
    "Probe": "probes.build",
    "build_probes": "probes.build",
    "run_probes": "probes.build",
    "Score": "scores",
    "scores_from_json": "scores",
    "scores_to_json": "scores",
    "comparison": "table",
    "comparison_markdown": "table",
}
__all__ = [
    "Probe",
    "Score",
    "build_probes",
    "comparison",
    "comparison_markdown",
    "run_probes",
    "scores_from_json",
    "scores_to_json",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
