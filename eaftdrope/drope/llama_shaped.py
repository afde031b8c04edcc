"""Llama-shaped checkpoints saved as another stock class, whose weights fit as they are.

Qwen 3 normalises queries and keys head by head (QK-norm). Normalised scores let recalibration use a larger learning rate
(arXiv 2512.12167, table 11). The new norms start at 1 and do change what the model computes: it needs the recalibration.
(The paper's own code normalises all heads together, which no stock Llama-shaped class does.)

Ministral-3 has a temperature that grows with the position:

    q *= 1 + slope * ln(1 + floor(position / original_length))

That is nearly 1 + slope * ln(s), with s how many times the trained length a token has before it: short texts keep their
temperature of 1. Only transformers 5 and vLLM serve it correctly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from eaftdrope.errors import UserError

from .checkpoint import INDEX, SINGLE, read_header, read_json, weight_map, write_json
from .config import read_config, trained_length
from .rope import layer_ropes

NORMS = "model-qk-norm.safetensors"
_LLAMA_SHAPED = ("llama", "mistral")
_GONE_IN_QWEN3 = ("pretraining_tp", "mlp_bias", "sliding_window")
_GONE_IN_MINISTRAL3 = ("rope_scaling", "rope_theta", "pretraining_tp", "mlp_bias", "attention_bias")


def _hosting_problem(config: PretrainedConfig) -> str | None:
    """Return why another class of Llama's shape could not hold this model, or None."""
    kind = config.model_type
    if kind not in _LLAMA_SHAPED:
        return f"{kind} is not Llama-shaped (llama, mistral)"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "it has biases that the other class has no place for"
    if getattr(config, "sliding_window", None):
        return "its attention has a sliding window"
    return None


def _rehosted(
    raw: dict[str, Any], config: PretrainedConfig, gone: tuple[str, ...], changes: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of config.json for another class.

    What the source leaves to its own class's defaults is written out if the other class has another default.

    Args:
        raw, config (`dict`, `PretrainedConfig`): the source's, as it is and as its own class reads it.
        gone (`tuple[str, ...]`): keys that the other class does not have.
        changes (`dict`): the other class's model type, and what else it needs.
    """
    new = {key: value for key, value in raw.items() if key not in gone} | changes
    theirs = read_config(new, "the new config.json").to_dict()
    own = {key: value for key, value in config.to_dict().items() if key not in gone}
    return new | {key: own[key] for key in own.keys() & theirs.keys() - new.keys() if own[key] != theirs[key]}


def with_temperature_by_position(raw: dict[str, Any], config: PretrainedConfig, slope: float) -> dict[str, Any]:
    """Return the content of config.json with that temperature; a Llama-shaped model's becomes Ministral-3's.

    Raises:
        UserError: no stock class has this temperature for the model.
    """
    if config.model_type == "ministral3":
        return {**raw, "rope_parameters": {**config.rope_parameters, "llama_4_scaling_beta": slope}}
    problem = _hosting_problem(config)
    if problem:
        raise UserError(
            f"a temperature by position is in Ministral-3's class only, which cannot hold this model: {problem}. Fold one "
            "temperature into the weights instead (--target-length, --temperature)."
        )
    rope = {
        **layer_ropes(config)[""],
        "llama_4_scaling_beta": slope,
        "original_max_position_embeddings": trained_length(config),
    }
    changes = {
        "model_type": "ministral3",
        "architectures": ["Ministral3ForCausalLM"],
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "sliding_window": None,
        "rope_parameters": rope,
    }
    return _rehosted(raw, config, _GONE_IN_MINISTRAL3, changes)


def check_qk_norm(config: PretrainedConfig) -> None:
    """Raise UserError if Qwen 3's class could not hold this model."""
    problem = _hosting_problem(config)
    if problem:
        raise UserError(f"qk_norm saves the model as Qwen 3, which cannot hold this one: {problem}. Leave qk_norm out.")


def as_qwen3(raw: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """Return the content of a Llama-shaped model's config.json as Qwen 3's."""
    changes = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "attention_bias": False,
        "num_key_value_heads": config.num_key_value_heads,
        "use_sliding_window": False,
        "max_window_layers": config.num_hidden_layers,
    }
    return _rehosted(raw, config, _GONE_IN_QWEN3, changes)


def add_norms(folder: Path, layers: int, head_dim: int, temperature: float) -> dict[str, str]:
    """Write the norms (1; those of the queries `temperature`) to a file of their own and add it to the index.

    A single weight file is renamed, as an index requires.

    Args:
        folder (`Path`): the new checkpoint; its weight files are not written to.
        layers, head_dim (`int`): the number of norms of each kind, and their size.
        temperature (`float`): the value of the query norms.

    Returns:
        New file name -> former name.
    """
    names, renamed = weight_map(folder), {}
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {"metadata": {}, "weight_map": names}
    if SINGLE in names.values():
        new = "model-00001-of-00001.safetensors"
        (folder / SINGLE).rename(folder / new)
        renamed[new] = SINGLE
        index["weight_map"] = dict.fromkeys(names, new)
    sample = next(name for name in names if name.endswith("input_layernorm.weight"))
    stored = read_header(folder / index["weight_map"][sample])[0][sample].dtype
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]
    norms = {
        f"model.layers.{layer}.self_attn.{kind}_norm.weight": torch.full((head_dim,), value, dtype=dtype)
        for layer in range(layers)
        for kind, value in (("q", temperature), ("k", 1.0))
    }
    save_file(norms, folder / NORMS, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(norms, NORMS)
    if "total_size" in index["metadata"]:
        index["metadata"]["total_size"] += sum(norm.numel() * norm.element_size() for norm in norms.values())
    write_json(folder / INDEX, index)
    return renamed
