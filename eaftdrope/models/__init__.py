"""Models: from what a recipe may write for `model` to a configuration, a tokenizer and a model.

    model = load_model("package:smollm2-135m-instruct", dtype="bfloat16")

Reading order: references (free of torch) -> loading, which uses tokenizer_file (the tokens of tokenizer.json), weights
(every tensor of the checkpoint, or an error that names the file) and gguf/ (dequantised copies in the cache).

Functions that need transformers are imported on first use: checking a reference costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaftdrope.lazy import lazy_names

from .references import (
    DTYPES,
    MODEL_PACKAGES,
    PACKAGE_PREFIX,
    TTT_CONFIG,
    ModelPackage,
    check_model_reference,
    hub_id_of,
    short_name,
)

if TYPE_CHECKING:
    from .loading import (
        ModelSource,
        load_config,
        load_model,
        load_tokenizer,
        needs_dequantising,
        refuse_ttt,
        resolve_model,
        ttt_config_file,
    )

_LAZY = dict.fromkeys(
    (
        *("ModelSource", "load_config", "load_model", "load_tokenizer", "needs_dequantising"),
        *("refuse_ttt", "resolve_model", "ttt_config_file"),
    ),
    "loading",
)

__all__ = [
    "DTYPES",
    "MODEL_PACKAGES",
    "PACKAGE_PREFIX",
    "TTT_CONFIG",
    "ModelPackage",
    "ModelSource",
    "check_model_reference",
    "hub_id_of",
    "load_config",
    "load_model",
    "load_tokenizer",
    "needs_dequantising",
    "refuse_ttt",
    "resolve_model",
    "short_name",
    "ttt_config_file",
]


__getattr__, __dir__ = lazy_names(__name__, _LAZY)
