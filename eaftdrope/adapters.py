"""Folders with a PEFT adapter: which model it was trained on, and both together as one live model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError
from eaftdrope.models import load_model, load_tokenizer
from eaftdrope.paths import usable_path

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter(reference: str | Path) -> bool:
    """Whether a reference is a folder with an adapter and no model.

    Raises:
        UserError: no folder can have that name.
    """
    folder = usable_path(reference)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_settings(folder: Path) -> dict:
    """adapter_config.json; `base_model_name_or_path` is any model reference, `revision` its commit or None.

    Raises:
        UserError: no weights beside it, not JSON, or it does not name its base model.
    """
    file = folder / CONFIG
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise UserError(
            f"{folder} has an {CONFIG} but no {WEIGHTS[0]}. Was its saving interrupted? Take an earlier checkpoint."
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}). Restore it, or take another checkpoint.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file} is not a JSON object. Restore it, or take another checkpoint.")
    if not isinstance(settings.get("base_model_name_or_path"), str) or not settings["base_model_name_or_path"]:
        raise UserError(f"{file} does not name its base model. Write it there as `base_model_name_or_path`.")
    return settings


def adapter_tokenizer(folder: Path, base: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer (its template may be the one it was trained with), else the base model's."""
    from transformers import AutoTokenizer

    if (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(str(folder))
    return load_tokenizer(base, revision=revision)


def load_adapted(folder: Path, base: str, revision: str | None, *, dtype: str) -> PeftModel:
    """Base model and adapter, not merged, with the tokens that end an answer as the adapter's folder has them.

    Raises:
        UserError: the base cannot be loaded, or the adapter does not fit it.
    """
    from peft import PeftModel
    from transformers import GenerationConfig

    model = load_model(base, dtype=dtype, revision=revision)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise misfit(folder, error) from error


def misfit(folder: Path, error: RuntimeError) -> UserError:
    """What to say when an adapter's tensors do not fit its base model."""
    return UserError(
        f"{folder} does not fit its base model: {str(error).splitlines()[-1].strip()} Put the model that the "
        f"adapter was trained on into `base_model_name_or_path` of its {CONFIG}."
    )
