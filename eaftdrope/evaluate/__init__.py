"""Measuring models: probes before and after training, evaluation suites, long context.

    probes = build_probes([("held_out_loss", "target", {"limit": None}), ...], held_out_dataset=rows)
    before = run_probes(model, tokenizer, probes)
    ...
    after = run_probes(model, tokenizer, probes)
    print(comparison_markdown(before, after))

Every likelihood is plain cross-entropy, whatever gate the training used.

Reading order:

    scores.py        a number with its standard error, and the standard error of a change
    table.py         the before/after table
    texts.py         the texts that probes read, and the choice of rows
    likelihood.py    logits -> nats, the one place
    generation.py    greedy answers to many prompts
    probes/          the probes of a recipe, one file each
    score_cache.py   scores by content: nothing is measured twice
    lm_eval.py       lm-eval's tasks on a loaded model (one_bos.py: its model, with the BOS token exactly once)
    rlm/             recursive language models and their baselines: `eaftdrope rlm bench`
    long_context/    how far a context reaches: `eaftdrope context`
    suites/          models side by side: `eaftdrope eval`
    ttt/             what learning while reading adds: `eaftdrope ttt eval`
"""

from typing import TYPE_CHECKING

from eaftdrope.lazy import lazy_names

if TYPE_CHECKING:
    from .probes.base import Probe
    from .probes.build import build_probes, run_probes
    from .scores import Score, scores_from_json, scores_to_json
    from .table import comparison, comparison_markdown

# Reading a table of scores needs no torch.
_LAZY = {
    "Probe": "probes.base",
    "Score": "scores",
    "build_probes": "probes.build",
    "comparison": "table",
    "comparison_markdown": "table",
    "run_probes": "probes.build",
    "scores_from_json": "scores",
    "scores_to_json": "scores",
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
__getattr__, __dir__ = lazy_names(__name__, _LAZY)
