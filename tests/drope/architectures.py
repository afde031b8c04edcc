"""Tiny random models of the real classes: every architecture that the converter names."""

from __future__ import annotations

import json
from pathlib import Path

LENGTH = 64
"""Their `max_position_embeddings`."""
_COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_YARN_WITH_TEMPERATURE = {
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "max_position_embeddings": LENGTH,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
ARCHITECTURES = {
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"sliding_window": None, "num_key_value_heads": 2},
    "Ministral3": {"head_dim": 16, "num_key_value_heads": 2, "rope_parameters": _YARN_WITH_TEMPERATURE},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"head_dim": 16, "num_key_value_heads": 2},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "Gemma2": {"head_dim": 16, "sliding_window": 48},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 48, "sliding_window_pattern": 2},
    "Phi": {},
    "Phi3": {"num_key_value_heads": 2},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 48},
    "Granite": {"num_key_value_heads": 2},
    "Glm4": {"head_dim": 16, "num_key_value_heads": 2},
    "Cohere2": {"sliding_window": 48, "sliding_window_pattern": 2},
    "StableLm": {"use_qkv_bias": True, "num_key_value_heads": 4},
    "GPTNeoX": {},
    "SmolLM3": {"num_key_value_heads": 2},
}


def save(name: str, folder: Path, *, dtype=None, **changes) -> Path:
    """A model of random weights that are large enough for positions to matter; Gemma 2's attention is the eager one."""
    import torch
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **ARCHITECTURES[name], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype or torch.float32).save_pretrained(folder)
    if name == "Qwen3Moe":
        # as the checkpoints on the hub have it; transformers 5 renames it
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": config.num_experts}))
    return folder
