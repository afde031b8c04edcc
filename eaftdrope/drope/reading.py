"""config.json's content as transformers' own loader reads it, in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from .checkpoint import write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What the checks leave out: they look at the rotation, whatever the weights are packed in and whoever published the code.
_LEFT_OUT = ("quantization_config", "auto_map")


def read_config(raw: dict, where: str | Path) -> PretrainedConfig:
    """The configuration of a config.json's content; `where` names it in messages.

    It goes through a file, because the loader does more than the class: it decodes infinities, for example.

    Raises:
        UserError: transformers has no class for it, or the class refuses a value.
    """
    import transformers
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(
            f"transformers cannot read {where}: transformers {transformers.__version__} has no class for model_type {kind!r}."
        )
    if not isinstance(raw.get("text_config", {}), dict):
        raise UserError(f"transformers cannot read {where}: text_config is not a mapping.")
    kept = _without(raw)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / "config.json", kept)
            config = AutoConfig.from_pretrained(folder)
            text = getattr(config, "text_config", None) if "text_config" in kept else config.get_text_config()
    # a configuration class runs code of its own, which raises what it likes
    except Exception as error:
        raise UserError(f"transformers cannot read {where}: {one_line(error)}") from error
    if not isinstance(text, PreTrainedConfig):
        raise UserError(f"transformers cannot read {where}: {kind} has no `text_config`.")
    if text is not config and "text_config" not in raw:
        raise UserError(
            f"{where}: the language model of {kind} is not described under `text_config`, so its rotary embedding cannot "
            "be changed there."
        )
    return config


def text_part(raw: dict) -> dict:
    """The mapping inside a config.json that describes the language model."""
    return raw.get("text_config", raw)


def one_line(error: BaseException) -> str:
    """The message of an error of another library, in one line that is not endless."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _without(raw: dict) -> dict:
    kept = {key: value for key, value in raw.items() if key not in _LEFT_OUT}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = _without(kept["text_config"])
    return kept
