"""TTT-E2E (arXiv 2512.23675): stock Hugging Face causal language models that keep learning as they read.

    model = apply_ttt(model, TTTConfig(window=1024, chunk=512))
    model(ids, labels=labels).loss                      reads a row in chunks and learns from each; its gradient trains
    state = TTTState(model)
    model(ids, past_key_values=state)                   reads, learns and keeps what it learned
    model.generate(ids, past_key_values=state)          continues from there

In reading order: `config` (the settings), `window` (attention that sees a window of tokens and the first few), `fast_mlps`
(the MLPs that learn, and how they enter a stock model), `views` (parts of a stock model), `inner` (the inner loss, its
gradient, the step), `chunk` (reading in chunks, with `recompute`), `state` (reading and generating), `model` (`apply_ttt`,
with `checks`), `saved` and `loading` (the files of a model and of a state).

Names are imported on first use, so a recipe reads the settings without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaftdrope.lazy import lazy_names

_LAZY = {
    "TTTConfig": "config",
    "TTTState": "state",
    "TTTTrainer": "meta_training",
    "apply_ttt": "model",
    "is_ttt": "fast_mlps",
    "learned": "state",
    "load_ttt": "loading",
    "remove_ttt": "model",
    "save_ttt": "saved",
    "sequence_nll": "chunk",
    "sliding": "window",
}

__all__ = [
    "TTTConfig",
    "TTTState",
    "TTTTrainer",
    "apply_ttt",
    "is_ttt",
    "learned",
    "load_ttt",
    "remove_ttt",
    "save_ttt",
    "sequence_nll",
    "sliding",
]

if TYPE_CHECKING:
    from .chunk import sequence_nll
    from .config import TTTConfig
    from .fast_mlps import is_ttt
    from .loading import load_ttt
    from .meta_training import TTTTrainer
    from .model import apply_ttt, remove_ttt
    from .saved import save_ttt
    from .state import TTTState, learned
    from .window import sliding

__getattr__, __dir__ = lazy_names(__name__, _LAZY)
