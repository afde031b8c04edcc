"""A temperature that grows with the position, in the one stock class that has it: Ministral-3.

    q *= 1 + slope * ln(1 + floor(position / original_length))

That is nearly 1 + slope * ln(s), with s how many times the trained length a token has before it: short texts keep their
temperature of 1. Llama-shaped weights fit the class as they are. The price: only transformers 5 and vLLM serve it right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from .config import trained_length
from .qk_norm import hosting_problem, rehosted
from .rope import layer_ropes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_OLD_KEYS = ("rope_scaling", "rope_theta", "pretraining_tp", "mlp_bias", "attention_bias")


def with_temperature_by_position(raw: dict, config: PretrainedConfig, slope: float) -> dict:
    """config.json's content with that temperature; a Llama-shaped model's becomes Ministral-3's.

    Raises:
        UserError: no stock class has this temperature for the model.
    """
    if config.model_type == "ministral3":
        return {**raw, "rope_parameters": {**config.rope_parameters, "llama_4_scaling_beta": slope}}
    problem = hosting_problem(config)
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
    return rehosted(raw, config, _OLD_KEYS, changes)
