"""Training with the gated loss: `EAFTTrainer` for TRL scripts, `apply_eaft` for everything else.

Names are loaded on first use, because trl takes seconds to import.
"""

from __future__ import annotations

_HOMES = {
    "EAFTCallback": "callbacks.plain_trainer",
    "EAFTConfig": "config",
    "EAFTTrainer": "trainer",
    "apply_eaft": "patch",
    "remove_eaft": "patch",
    "pop_metrics": "patch",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
