"""Models: from what a recipe may write for `model` to a configuration, a tokenizer and a model.

    model = load_model("package:smollm2-135m-instruct", dtype="bfloat16")

Reading order: references (free of torch) -> loading, which uses tokenizer_file (the tokens of tokenizer.json), weights
(every tensor of the checkpoint, or an error that names the file) and gguf/ (dequantised copies in the cache).

Functions that need transformers are imported on first use: checking a reference costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .references import (
    DTYPES,
    MODEL_PACKAGES,
    PACKAGE_PREFIX,
    ModelPackage,
    check_model_reference,
    hub_id_of,
    short_name,
)

if TYPE_CHECKING:
    from .loading import ModelSource, load_config, load_model, load_tokenizer, needs_dequantising, resolve_model

_LAZY = ("ModelSource", "load_config", "load_model", "load_tokenizer", "needs_dequantising", "resolve_model")

__all__ = [
    "DTYPES",
    "MODEL_PACKAGES",
    "PACKAGE_PREFIX",
    "ModelPackage",
    "ModelSource",
    "check_model_reference",
    "hub_id_of",
    "load_config",
    "load_model",
    "load_tokenizer",
    "needs_dequantising",
    "resolve_model",
    "short_name",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.loading"), name)
