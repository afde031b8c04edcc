"""The configuration saved with trained weights: the model's own, without the settings that trainers change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AutoConfig, PretrainedConfig

# transformers' Trainer disables the cache, TRL's requests the routers' logits
_SET_BY_TRAINERS = ("use_cache", "output_router_logits")
_HUB_OPTIONS = ("revision", "trust_remote_code", "cache_dir", "token")


def original_settings(model: nn.Module | str, init_options: dict[str, Any] | None) -> dict[tuple[bool, str], object]:
    """Return the settings before a trainer changes them: (is in the text part, name) -> value.

    Args:
        model: the model, or the reference it will be loaded from.
        init_options: `model_init_kwargs` for loading it.
    """
    if isinstance(model, str):
        options = {key: value for key, value in (init_options or {}).items() if key in _HUB_OPTIONS}
        config = AutoConfig.from_pretrained(model, **options)
    else:
        config = model.config
    return {
        (part is not config, name): vars(part)[name]
        for part in (config, config.get_text_config())
        for name in _SET_BY_TRAINERS
        if name in vars(part)
    }


@contextmanager
def with_settings(config: PretrainedConfig, original: dict[tuple[bool, str], object]) -> Iterator[None]:
    """Restore the original settings for the duration of the block."""
    current = []
    for in_text in (False, True):
        part = config.get_text_config() if in_text else config
        if in_text and part is config:
            continue
        for name in _SET_BY_TRAINERS:
            if name in vars(part):
                current.append((part, name, vars(part).pop(name)))
            if (in_text, name) in original:
                vars(part)[name] = original[in_text, name]
    try:
        yield
    finally:
        for part, name, value in current:
            vars(part)[name] = value
