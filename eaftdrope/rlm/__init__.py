"""Recursive language models (arXiv 2512.24601): the prompt is a variable of a REPL that the model never reads whole.

    rlm = RLM(model, limits=Limits(sub_calls=50))
    result = rlm.complete(Path("report.txt"), "Which quarter had the highest revenue?", journal="run.jsonl")
    result.answer

The model writes Python that inspects the context and asks a sub-model about parts of it. Limits hold inside that code, a
killed run resumes from its journal, a finished one replays without a model, and journals become training rows.

In reading order: `limits` (what a run may use), `protocol` (prompts, code blocks, finish), `journal` (what a run writes and
resumes from), `sandbox` and `cpython` (where code runs), `calls` (of models, many at once), `engine` (the run), `models` and
`served` (who answers), `rows` (training data), `baselines` (what to compare with), `tasks` (generators of tasks with their
scores).

Names are imported on first use: importing the package loads neither torch nor a sandbox.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaftdrope.lazy import lazy_names

_LAZY = {"RLM": "engine", "Limits": "limits", "Result": "engine"}

__all__ = ["RLM", "Limits", "Result"]

if TYPE_CHECKING:
    from .engine import RLM, Result
    from .limits import Limits

__getattr__, __dir__ = lazy_names(__name__, _LAZY)
