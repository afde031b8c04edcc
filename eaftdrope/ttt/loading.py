"""From a folder, or a repository on the hub, to a model with TTT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

from .model import apply_ttt
from .saved import CONFIG_FILE, WEIGHTS_FILE, load_primes, read_config


def load_ttt(reference: str | Path, **kwargs: Any) -> Any:
    """Load a model that `save_pretrained` wrote with TTT applied.

    Args:
        reference (`str` or `Path`): a folder or a hub id, of a checkpoint or of a PEFT adapter.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: it has no ttt_config.json, or its files are damaged or do not fit each other.
    """
    hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
    config = find_file(reference, CONFIG_FILE, **hub)
    if config is None:
        raise ValueError(
            f"{reference} has no {CONFIG_FILE}: it was not saved with TTT. Load it as usual and call apply_ttt(model)."
        )
    adapter = find_file(reference, "adapter_config.json", **hub)
    if adapter is None:
        model = AutoModelForCausalLM.from_pretrained(reference, **kwargs)
        return apply_saved(model, reference, **hub)
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(str(reference), **hub).base_model_name_or_path
    model = apply_saved(AutoModelForCausalLM.from_pretrained(base, **kwargs), reference, **hub)
    return PeftModel.from_pretrained(model, str(reference), **hub)


def apply_saved(model: Any, reference: str | Path, **hub: Any) -> Any:
    """Apply TTT to a loaded model, with the settings and the prime MLPs of `reference`; return it.

    Raises:
        ValueError: the files are missing or damaged, or do not fit the model.
    """
    config, weights = find_file(reference, CONFIG_FILE, **hub), find_file(reference, WEIGHTS_FILE, **hub)
    if config is None:
        raise ValueError(f"{reference} has no {CONFIG_FILE}: it was not saved with TTT.")
    settings = read_config(config)
    if settings.layout == "prime" and weights is None:
        raise ValueError(f"{reference} has {CONFIG_FILE} but no {WEIGHTS_FILE}, which holds its prime MLPs.")
    model = apply_ttt(model, settings)
    if weights is not None:
        load_primes(model, weights)
    return model


def find_file(reference: str | Path, name: str, **hub: Any) -> str | None:
    """The path of a file of a folder or of a repository on the hub; None if it has no such file."""
    if Path(reference).is_dir():
        file = Path(reference) / name
        return str(file) if file.is_file() else None
    return cached_file(
        str(reference),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
