"""DroPE (arXiv 2512.12167): drop the rotary embedding of a pretrained checkpoint, by its configuration only.

    from eaftdrope.drope import convert, undo
    convert("SmolLM2-135M", "SmolLM2-135M-nope", max_length=32768)

identity (of a live model), reading -> rope (what a configuration can express), temperature -> config (config.json, with its
record) -> slices -> check, folding, inherited (measured on a slice) -> conversion, undoing (files); engines, card

Names are loaded on first use; nothing heavy is imported by checking a recipe.
"""

from __future__ import annotations

_HOMES = {
    "Conversion": "conversion",
    "check_folder": "check",
    "complete": "config",
    "convert": "conversion",
    "engines_markdown": "engines",
    "resolve_checkpoint": "conversion",
    "undo": "undoing",
    "with_rope": "rope",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
