"""Slices: a small model of an architecture to check a conversion on, with few layers, few heads and random weights.

    whole      the configuration as it is, if the model is small
    of kinds   the first layer of each kind (attention type, dense or sparse MLP, rotation before and after)
    prefix     the first layers, as many as include each kind: for classes that place their layers by number

with its own widths if those are small, else with few heads, experts and tokens. Classes tie these numbers to one another
in their own ways, so the first slice that can be built and still rotates is found by trying.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from eaftdrope.errors import UserError

from .config import one_line
from .identity import identity_rotation

CONTROL = 1e-3
"""Logits differ by at least this much with and without the rotation, or the slice does not rotate."""

_LENGTH = 24
_STILL = "no layer rotates"
# The largest number of parameters of a model that is checked as it is.
_SMALL_MODEL = 4_000_000
_SHORT = 8
# Sizes that a slice reduces; a name that the architecture's configuration does not have is skipped.
_COUNTS = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "ffn_hidden_size": 32,
    "expert_ffn_hidden_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "zero_expert_num": 2,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "lru_width": 64,
}


def small_pair(
    new: PretrainedConfig, old: PretrainedConfig, parameters: int
) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Cut the configurations after and before a conversion alike, to a model that can be built and that rotates.

    Args:
        new, old (`PretrainedConfig`): after and before the conversion.
        parameters (`int`): number of parameters of the model itself.

    Raises:
        UserError: no slice was found; the message has the failure of the last one.
    """
    if type(new) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"transformers has no causal language model of {new.model_type} on its own, so no small model of it can be "
            "built to check the conversion on. Not converted."
        )
    if new.num_hidden_layers < 1:
        raise UserError(f"this {new.model_type} has {new.num_hidden_layers} layers, so nothing can be dropped.")
    reason = _STILL
    for cut in _cuts(new, old, parameters):
        try:
            small, before = cut(new), cut(old)
            model = random_model(before)
            ids = tokens(before)
            with identity_rotation(model):
                straight = logits(model, ids)
            rotated = logits(model, ids)
        except UserError:
            # no module that rotates
            continue
        # the class's own code may refuse a combination with any error
        except Exception as error:
            reason = one_line(error)
            continue
        if rotated.isfinite().all() and (rotated - straight).abs().max() >= CONTROL:
            return small, before
    if reason == _STILL:
        raise UserError(
            f"{new.model_type} models of this configuration have no layer that rotates, so nothing can be dropped."
        )
    raise UserError(
        f"no small model of {new.model_type} can be built to check the conversion on ({reason}). Check on the weights "
        "themselves (--check-weights)."
    )


def one_layer(config: PretrainedConfig, layer: int) -> PretrainedConfig:
    """Return the configuration with this layer only."""
    return _with_layers(config, [layer])


def random_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build a model with random weights, the same each time; by default float32.

    The weights are large enough for attention to be far from uniform.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # built in its dtype, as loading does: buffers then have the types that the class intends
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype or torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, 2.0 * parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(config: PretrainedConfig, rows: int = 2, length: int = _LENGTH) -> torch.Tensor:
    """Return token ids [rows, length], the same each time."""
    return torch.randint(3, config.vocab_size, (rows, length), generator=seeded())


def logits(model: nn.Module, ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return float32 logits [rows, length, V]; `position_ids` [length], by default 0, 1, 2, ..."""
    with torch.no_grad():
        positions = {} if position_ids is None else {"position_ids": position_ids[None].expand(len(ids), -1)}
        return model(input_ids=ids, use_cache=False, **positions).logits.float()


def seeded() -> torch.Generator:
    """Return a generator with seed 0."""
    return torch.Generator().manual_seed(0)


def _cuts(
    new: PretrainedConfig, old: PretrainedConfig, parameters: int
) -> Iterator[Callable[[PretrainedConfig], PretrainedConfig]]:
    """Yield functions from a configuration to a smaller one, in the order in which they are tried."""
    count, own = new.num_hidden_layers, parameters <= _SMALL_MODEL
    kinds = _kinds(new, old)
    firsts = sorted({kinds.index(kind) for kind in kinds} | set(range(min(2, count))))
    prefix = list(range(max(firsts) + 1))
    choices = [list(range(count))] if count <= _SHORT else []
    choices += [layers for layers in (firsts, prefix) if layers not in choices]
    widths: list[Callable[[PretrainedConfig], PretrainedConfig]] = [_narrow, _few_experts]
    if own:
        widths.insert(0, lambda config: config)
    for width in widths:
        for layers in choices:
            yield lambda config, width=width, layers=layers: width(_with_layers(config, layers))


def _kinds(new: PretrainedConfig, old: PretrainedConfig) -> list[tuple[str, ...]]:
    """Return the kind of each layer: its values in every list of the two configurations that has one per layer."""
    count = new.num_hidden_layers
    # a property of classes that place their layers by number
    lists = [getattr(config, "layer_types", None) for config in (new, old)]
    lists += [vars(config)[key] for config in (new, old) for key in _per_layer(config)]
    lists = [list(map(str, values)) for values in lists if values and len(values) == count]
    return list(zip(*lists)) or [()] * count


def _per_layer(config: PretrainedConfig) -> list[str]:
    count = config.num_hidden_layers
    return [key for key, value in vars(config).items() if isinstance(value, (list, tuple)) and len(value) == count]


def _with_layers(config: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    if layers == list(range(config.num_hidden_layers)):
        return config
    cut = {key: [vars(config)[key][layer] for layer in layers] for key in _per_layer(config)}
    # older releases of transformers have no such configurations
    if getattr(config, "is_heterogeneous", False):
        # values of single layers (Gemma 4) are numbered by layer
        data: dict[str, Any] = config.to_dict() | cut | {"num_hidden_layers": len(layers)}
        own = {int(layer): values for layer, values in data["per_layer_config"].items()}
        data["per_layer_config"] = {i: own[layer] for i, layer in enumerate(layers) if layer in own}
        return type(config).from_dict(data | {"num_kv_shared_layers": 0})
    small = copy.deepcopy(config)
    for key, values in cut.items():
        setattr(small, key, values)
    small.num_hidden_layers = len(layers)
    if getattr(config, "num_kv_shared_layers", None):
        # the last layers use keys of layers that may be gone
        small.num_kv_shared_layers = 0
    return small


def _few_experts(config: PretrainedConfig) -> PretrainedConfig:
    """Reduce tokens, experts and MLP columns; keep heads and hidden size."""
    small = copy.deepcopy(config)
    for key, value in _COUNTS.items():
        present = getattr(small, key, None)
        if isinstance(present, list):
            value = [value] * len(present)
        if present is not None and present != value and not isinstance(present, bool):
            setattr(small, key, value)
    return small


def _narrow(config: PretrainedConfig) -> PretrainedConfig:
    """Reduce the number of heads as well, and the hidden size that goes with them; keep the size of a head."""
    small = _few_experts(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    for key, value in _HEADS.items():
        if isinstance(getattr(small, key, None), int):
            setattr(small, key, value)
    if isinstance(groups, int):
        small.num_key_value_heads = 4 if groups == heads else min(groups, 2)
    small.hidden_size = 4 * head_dim
    inner = getattr(config, "mamba_expand", None)
    if inner and getattr(config, "mamba_n_heads", None):
        small.mamba_n_heads = int(inner * small.hidden_size) // small.mamba_d_head
        small.mamba_n_groups = 1
        if getattr(config, "mamba_d_ssm", None):
            small.mamba_d_ssm = small.mamba_n_heads * small.mamba_d_head
    return small
