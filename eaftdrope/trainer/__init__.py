"""Training with the gated loss: `EAFTTrainer` for TRL scripts, `apply_eaft` for everything else.

In reading order: `config` (the options), `patch` (the forward that returns the gated loss, and its `head`), `trainer`
(TRL's trainer around that forward). Checks before and during training: `head` (the logits are the model's own),
`packing` (packed sequences are separate), `optimizer` (every trainable parameter is trained), `finite` (no NaN is trained
on or saved). `meter` has the figures of each log, `step_rows` the rows of a step, `saving` the configuration that is
saved; `callbacks` is what a Trainer calls during training.

The package needs `loss`, and of the rest only `errors`, `files`, `lazy`, `loaded_model` and `processes`. Names are
imported on first use, because trl takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaftdrope.lazy import lazy_names

_LAZY = {
    "EAFTCallback": "callbacks.plain_trainer",
    "EAFTConfig": "config",
    "EAFTTrainer": "trainer",
    "SaveAndStop": "callbacks.stopping",
    "apply_eaft": "patch",
    "pop_metrics": "patch",
    "remove_eaft": "patch",
}

__all__ = ["EAFTCallback", "EAFTConfig", "EAFTTrainer", "SaveAndStop", "apply_eaft", "pop_metrics", "remove_eaft"]

if TYPE_CHECKING:
    from .callbacks.plain_trainer import EAFTCallback
    from .callbacks.stopping import SaveAndStop
    from .config import EAFTConfig
    from .patch import apply_eaft, pop_metrics, remove_eaft
    from .trainer import EAFTTrainer

__getattr__, __dir__ = lazy_names(__name__, _LAZY)
