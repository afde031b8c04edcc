"""Entropy-adaptive fine-tuning for the Hugging Face stack.

    from eaftdrope import EAFTTrainer as SFTTrainer        # TRL script: change the import, nothing else
    model = eaftdrope.apply_eaft(model)                    # plain transformers.Trainer, accelerate or your own loop

Names are loaded on first use: importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.2.0"

_HOMES = {
    "EAFTCallback": "eaftdrope.trainer.callbacks.plain_trainer",
    "EAFTConfig": "eaftdrope.trainer.config",
    "EAFTTrainer": "eaftdrope.trainer.trainer",
    "TokenStats": "eaftdrope.loss",
    "UserError": "eaftdrope.errors",
    "apply_eaft": "eaftdrope.trainer.patch",
    "eaft_loss": "eaftdrope.loss",
    "fused_linear_eaft": "eaftdrope.loss",
    "gates": "eaftdrope.loss",
    "load_recipe": "eaftdrope.recipe.load",
    "pop_metrics": "eaftdrope.trainer.patch",
    "remove_eaft": "eaftdrope.trainer.patch",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from .errors import UserError
    from .loss import TokenStats, eaft_loss, fused_linear_eaft, gates
    from .recipe.load import load_recipe
    from .trainer.callbacks.plain_trainer import EAFTCallback
    from .trainer.config import EAFTConfig
    from .trainer.patch import apply_eaft, pop_metrics, remove_eaft
    from .trainer.trainer import EAFTTrainer


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from .errors import missing_package

    try:
        module = import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        raise missing from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
