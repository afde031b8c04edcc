"""QK-norm: a Llama-shaped checkpoint becomes a stock Qwen 3, whose queries and keys are normalised head by head.

Normalised scores let recalibration take a larger learning rate (arXiv 2512.12167, table 11). The new norms start at 1 and
do change what the model computes: it needs the recalibration. (The paper's own code normalises all heads together, which
no stock Llama-shaped class does.)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from .checkpoint import INDEX, SINGLE, read_header, read_json, weight_map, write_json
from .reading import read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NORMS = "model-qk-norm.safetensors"
_LLAMA_SHAPED = ("llama", "mistral")
_GONE = ("pretraining_tp", "mlp_bias", "sliding_window")


def hosting_problem(config: PretrainedConfig) -> str | None:
    """Why another class of Llama's shape (Qwen 3, Ministral-3) could not hold this model, or None."""
    kind = config.model_type
    if kind not in _LLAMA_SHAPED:
        return f"{kind} is not Llama-shaped (llama, mistral)"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "it has biases that the other class has no place for"
    if getattr(config, "sliding_window", None):
        return "its attention has a sliding window"
    return None


def rehosted(raw: dict, config: PretrainedConfig, gone: tuple[str, ...], changes: dict) -> dict:
    """config.json's content for another class. What the source leaves to its own class's defaults is written out where
    the other class has another default.

    Args:
        raw, config: the source's, as it is and as its own class reads it.
        gone: keys that the other class does not take over.
        changes: the other class's model type, and what else it needs.
    """
    new = {key: value for key, value in raw.items() if key not in gone} | changes
    theirs = read_config(new, "the new config.json").to_dict()
    own = {key: value for key, value in config.to_dict().items() if key not in gone}
    return new | {key: own[key] for key in own.keys() & theirs.keys() - new.keys() if own[key] != theirs[key]}


def check_qk_norm(config: PretrainedConfig) -> None:
    """Raises UserError where Qwen 3's class could not hold this model."""
    problem = hosting_problem(config)
    if problem:
        raise UserError(f"qk_norm saves the model as Qwen 3, which cannot hold this one: {problem}. Leave qk_norm out.")


def as_qwen3(raw: dict, config: PretrainedConfig) -> dict:
    """config.json's content of a Llama-shaped model as Qwen 3's."""
    changes = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "attention_bias": False,
        "num_key_value_heads": config.num_key_value_heads,
        "use_sliding_window": False,
        "max_window_layers": config.num_hidden_layers,
    }
    return rehosted(raw, config, _GONE, changes)


def add_norms(folder: Path, layers: int, head_dim: int, temperature: float) -> dict[str, str]:
    """Write the norms (1; those of the queries `temperature`) to a file of their own and index it; a single weight file
    is renamed, as an index asks.

    Args:
        folder: the converted checkpoint in the making; its weight files are not written to.
        layers, head_dim: how many norms of each kind, and of what size.

    Returns:
        New file name -> the name it had.
    """
    import torch
    from safetensors.torch import save_file

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
    (folder / INDEX).unlink(missing_ok=True)
    write_json(folder / INDEX, index)
    return renamed
