"""Differences between the supported versions of transformers: every comparison of versions is in this file, with its reason.

The oldest supported version is the floor in pyproject.toml; `make test-floors` and `make test-newest` test both ends.
Nothing heavy is imported.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Cache, PretrainedConfig
    from transformers.utils import ModelOutput


def release(name: str) -> tuple[int, int]:
    """The first two numbers of the installed version of package `name`."""
    major, minor = version(name).split(".")[:2]
    return int(major), int(minor)


TRANSFORMERS = release("transformers")

# 5.24 renamed the argument and the field `past_key_values` of every class to `cache`; the old name goes in 5.40.
_CACHE = "cache" if TRANSFORMERS >= (5, 24) else "past_key_values"


def cache_argument(cache: Cache | None) -> dict[str, Cache | None]:
    """The keyword argument that passes `cache` to a model's forward."""
    return {_CACHE: cache}


def cache_of(output: ModelOutput) -> Cache:
    """The cache that a forward returned."""
    return getattr(output, _CACHE)


def nested_rope_keys(config: PretrainedConfig, parameters: dict[str, Any]) -> list[str]:
    """The keys under which the rope parameters of a text configuration are nested; none where they are flat."""
    if TRANSFORMERS >= (5, 18):
        return config.nested_rope_parameter_keys(parameters)
    # Before 5.18 configurations had no such method; `_rope_type_labels` (DeepSeek-V4) came with 5.15.
    labels = getattr(config, "_rope_type_labels", None) or getattr(config, "layer_types", None) or ()
    return [key for key in parameters if key in labels]
