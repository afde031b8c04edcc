"""The configuration that is saved with trained weights: the model's own, without what training sets for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import AutoConfig, PretrainedConfig

# transformers' Trainer switches the cache off, TRL's has the routers' logits returned
_SET_BY_TRAINERS = ("use_cache", "output_router_logits")
_HUB_OPTIONS = ("revision", "trust_remote_code", "cache_dir", "token")


def own_settings(model: nn.Module | str, init_options: dict | None) -> dict[tuple[bool, str], object]:
    """What a model's configuration has before a trainer changes it: (whether in the text part, name) -> value.

    Args:
        model: or what it will be loaded from.
        init_options: `model_init_kwargs` of its loading.
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
def saved_with(config: PretrainedConfig, own: dict[tuple[bool, str], object]) -> Iterator[None]:
    """The settings as they were, for the duration of the block."""
    set_now = []
    for in_text in (False, True):
        part = config.get_text_config() if in_text else config
        if in_text and part is config:
            continue
        for name in _SET_BY_TRAINERS:
            if name in vars(part):
                set_now.append((part, name, vars(part).pop(name)))
            if (in_text, name) in own:
                vars(part)[name] = own[in_text, name]
    try:
        yield
    finally:
        for part, name, value in set_now:
            vars(part)[name] = value
