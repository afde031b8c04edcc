"""Which tool a configuration is for, by keys that only one of them has; and its translation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from eaftdrope.errors import UserError

from .axolotl import translate_axolotl
from .draft import Translation
from .llamafactory import translate_llamafactory
from .trl_cli import translate_trl

_TRANSLATORS: dict[str, Callable[[dict[str, Any], Path], Translation]] = {
    "llamafactory": translate_llamafactory,
    "axolotl": translate_axolotl,
    "trl": translate_trl,
}
TOOLS = tuple(_TRANSLATORS)
_OWN_KEYS = {
    "llamafactory": (
        *("stage", "finetuning_type", "dataset", "dataset_dir", "template", "cutoff_len", "lora_rank", "lora_target"),
        *("use_eaft_loss", "use_dft_loss", "use_asft_loss", "quantization_bit", "val_size", "flash_attn"),
    ),
    "axolotl": (
        *("base_model", "micro_batch_size", "sequence_len", "sample_packing", "adapter", "val_set_size", "num_epochs"),
        *("lora_target_linear", "use_eaft", "use_dft", "optimizer", "lr_scheduler", "train_on_inputs", "test_datasets"),
    ),
    "trl": (
        *("dataset_name", "dataset_config", "dataset_train_split", "use_peft", "lora_r", "assistant_only_loss"),
        *(
            "completion_only_loss",
            "loss_type",
            "max_length",
            "packing_strategy",
            "attn_implementation",
            "test_split_size",
        ),
    ),
}


def translate(config: dict[str, Any], folder: Path, tool: str | None = None) -> Translation:
    """Translate a configuration.

    Args:
        config: its plain data.
        folder: where it lies; LLaMA-Factory's dataset_info.json is also searched there.
        tool: one of TOOLS; None to detect it.

    Raises:
        UserError: the tool cannot be detected, or the configuration cannot become a recipe.
    """
    return _TRANSLATORS[tool or detect_tool(config)](config, folder)


def detect_tool(config: dict[str, Any]) -> str:
    """Return the tool with most keys of its own.

    Raises:
        UserError: there is no such key, or as many of two tools.
    """
    counts = {tool: sum(key in config for key in keys) for tool, keys in _OWN_KEYS.items()}
    best = max(counts.values())
    tools = [tool for tool, count in counts.items() if count == best]
    if best == 0 or len(tools) > 1:
        raise UserError(
            f"this configuration could be for {' or '.join(tools)}: it has as many of their keys. Pass --tool."
            if best
            else f"this is no configuration of {', '.join(TOOLS)}: it has none of their keys. Pass --tool if it is one."
        )
    return tools[0]
