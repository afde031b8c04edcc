"""DroPE (arXiv 2512.12167): drop the rotary embedding of a pretrained checkpoint, by its configuration only.

    from eaftdrope.drope import convert, undo
    convert("SmolLM2-135M", "SmolLM2-135M-nope", max_length=32768)

Reading order, from the ground up:

    identity, rope, layers        the identity rotation: of a live model, in a configuration, in some layers
    checkpoint, config            a checkpoint as files; its config.json with the record of a conversion
    slices, check                 a small model of the architecture, and the checks made on it
    temperature, query_weights    a factor on the scores: of a live model, and folded into weight files
    llama_shaped                  Llama-shaped models saved as Qwen 3 or Ministral-3
    engines, card                 which engines serve the result, and its model card
    conversion_plan, conversion   `convert` and `undo`

Names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .check import check_folder
    from .config import restore_v4_keys as complete
    from .conversion import Conversion, convert, resolve_checkpoint, undo
    from .engines import engines_markdown
    from .rope import with_rope

_LAZY = {
    "Conversion": "conversion",
    "check_folder": "check",
    "complete": "config",
    "convert": "conversion",
    "engines_markdown": "engines",
    "resolve_checkpoint": "conversion",
    "undo": "conversion",
    "with_rope": "rope",
}

__all__ = [
    "Conversion",
    "check_folder",
    "complete",
    "convert",
    "engines_markdown",
    "resolve_checkpoint",
    "undo",
    "with_rope",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # `complete` is the public name of `restore_v4_keys`
    return getattr(import_module(f".{_LAZY[name]}", __name__), "restore_v4_keys" if name == "complete" else name)
