"""Tiny random models of further classes of transformers 5.23: hybrids, MLA, complex rotations, values layer by layer.

Every causal language model with rope parameters that the converter takes, beside `architectures`; by model type.
"""

from __future__ import annotations

from pathlib import Path

# Passed on where the class has a field of this name.
_SIZES = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "swa_v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
}
# Multi-head latent attention: its heads are of other sizes, and share their keys in another way.
_MLA = {"head_dim": None, "num_key_value_heads": 4}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}

OTHERS = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": _MLA,
    "bailing_hybrid": {**_MLA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "beam": {},
    "bitnet": {},
    "cohere": {},
    "cohere2_moe": {},
    "cwm": {},
    "deepseek_v2": {**_MLA, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {},
    "falcon_h1": {},
    "flex_olmo": {},
    "flint": {},
    "gemma": {},
    "gemma3n_text": {**_TWO_KINDS, "activation_sparsity_pattern": [0.9, 0.0, 0.9, 0.0]},
    "gemma4_text": {**_TWO_KINDS, "global_head_dim": 32},
    "glm": {},
    "glm4_moe": {},
    "glm4_moe_lite": _MLA,
    "gpt_neox_japanese": {},
    "gpt_oss": {"max_position_embeddings": 256},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hyperclovax": {},
    "jais2": {},
    "jetmoe": {},
    "kolibri1": _TWO_KINDS,
    "laguna": _TWO_KINDS,
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "lfm3": {},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0]},
    "mellum": _TWO_KINDS,
    "mimo_v2_flash": {"v_head_dim": 16},
    "minicpm3": _MLA,
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "ministral": {},
    "mixtral": {},
    "modernbert-decoder": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "persimmon": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_5_text": {},
    "qwen3_next": {},
    "seed_oss": {},
    "solar_open": {},
    "starcoder2": {},
    "vaultgemma": {},
    "youtu": _MLA,
}


def save_other(model_type: str, folder: Path, **changes) -> Path:
    """A model of random weights that are large enough for positions to matter."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = CONFIG_MAPPING[model_type]
    known = set(fields.__dataclass_fields__) | set(fields.attribute_map)
    sizes = {key: value for key, value in _SIZES.items() if key in known} | OTHERS[model_type] | changes
    config = fields(**{key: value for key, value in sizes.items() if value is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
