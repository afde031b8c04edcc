"""Four methods against forgetting and against the limits of context, on the Hugging Face stack: EAFT, DroPE, TTT-E2E, RLM.

    from eaftdrope import EAFTTrainer as SFTTrainer        # TRL script: only the import changes
    model = eaftdrope.apply_eaft(model)                    # plain transformers.Trainer, accelerate or a loop of your own

Names are imported on first use: importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_names

__version__ = "0.2.0"

_LAZY = {
    "EAFTCallback": "trainer.callbacks.plain_trainer",
    "EAFTConfig": "trainer.config",
    "EAFTTrainer": "trainer.trainer",
    "TokenStats": "loss",
    "UserError": "errors",
    "apply_eaft": "trainer.patch",
    "apply_ttt": "ttt.model",
    "eaft_loss": "loss",
    "fused_linear_eaft": "loss",
    "gates": "loss",
    "load_recipe": "recipe.load",
    "open_chat_model": "evaluate.rlm.chat_models",
    "pop_metrics": "trainer.patch",
    "remove_eaft": "trainer.patch",
    "remove_ttt": "ttt.model",
}

__all__ = sorted(_LAZY)

if TYPE_CHECKING:
    from .errors import UserError
    from .evaluate.rlm.chat_models import open_chat_model
    from .loss import TokenStats, eaft_loss, fused_linear_eaft, gates
    from .recipe.load import load_recipe
    from .trainer.callbacks.plain_trainer import EAFTCallback
    from .trainer.config import EAFTConfig
    from .trainer.patch import apply_eaft, pop_metrics, remove_eaft
    from .trainer.trainer import EAFTTrainer
    from .ttt.model import apply_ttt, remove_ttt

__getattr__, __dir__ = lazy_names(__name__, _LAZY)
