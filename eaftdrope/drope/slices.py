"""A small model of an architecture to check a conversion on: a few layers, few heads, random weights.

    whole      the configuration as it is, where the model is small
    of kinds   the first layer of each kind (attention type, dense or sparse MLP, rotation before and after)
    prefix     the first layers, as many as hold each kind: for classes that place their layers by number

in its own widths where that is small, else with few heads, experts and tokens. Classes tie these numbers to one another
in their own ways, so what builds and still rotates is found by trying.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from .identity import identity_rotation
from .reading import one_line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

CONTROL = 1e-3
"""Logits differ by at least this much with and without the rotation, or the slice does not rotate."""

_LENGTH = 24
_STILL = "no layer rotates"
# Parameters up to which a model is checked as it is.
_SMALL_MODEL = 4_000_000
_SHORT = 8
# What a slice has less of; a name that the architecture's configuration does not have is passed over.
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
    """The configurations before and after a conversion, cut alike to a model that can be built and that rotates.

    Args:
        parameters: how many the model itself has.

    Raises:
        UserError: none was found; the message has what the last one failed with.
    """
    from transformers import AutoModelForCausalLM

    if type(new) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"transformers has no causal language model of {new.model_type} by itself, so no small model of it can be made "
            "to check the conversion on. Not converted."
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
        # the class's own code refuses a combination in a way of its own
        except Exception as error:
            reason = one_line(error)
            continue
        if rotated.isfinite().all() and (rotated - straight).abs().max() >= CONTROL:
            return small, before
    if reason == _STILL:
        raise UserError(
            f"{new.model_type} models of this configuration have no layer that rotates, so none is dropped."
        )
    raise UserError(
        f"no small model of {new.model_type} can be made to check the conversion on ({reason}). Check on the weights "
        "themselves (--check-weights)."
    )


def one_layer(config: PretrainedConfig, layer: int) -> PretrainedConfig:
    """The configuration with this layer of it only."""
    return _with_layers(config, [layer])


def random_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> nn.Module:
    """A model with weights large enough for attention to be far from uniform, the same each time; by default float32."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # made in its dtype, as loading does it: buffers are then of the types that the class means
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
    """Token ids [rows, length], the same each time."""
    import torch

    return torch.randint(3, config.vocab_size, (rows, length), generator=seeded())


def logits(model: nn.Module, ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Float logits [rows, length, V]; `position_ids` [length], by default 0, 1, 2, ..."""
    import torch

    with torch.no_grad():
        positions = {} if position_ids is None else {"position_ids": position_ids[None].expand(len(ids), -1)}
        return model(input_ids=ids, use_cache=False, **positions).logits.float()


def seeded() -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(0)


def _cuts(new, old, parameters: int) -> Iterator:
    """Functions configuration -> smaller configuration, in the order in which they are tried."""
    count, own = new.num_hidden_layers, parameters <= _SMALL_MODEL
    kinds = _kinds(new, old)
    firsts = sorted({kinds.index(kind) for kind in kinds} | set(range(min(2, count))))
    prefix = list(range(max(firsts) + 1))
    choices = [list(range(count))] if count <= _SHORT else []
    choices += [layers for layers in (firsts, prefix) if layers not in choices]
    widths = [lambda config: config] * own + [_narrow, _few_experts]
    for width in widths:
        for layers in choices:
            yield lambda config, width=width, layers=layers: width(_with_layers(config, layers))


def _kinds(new, old) -> list[tuple]:
    """What each layer is, before and after."""
    count = new.num_hidden_layers
    # a property of classes that place their layers by number
    lists = [getattr(config, "layer_types", None) for config in (new, old)]
    lists += [vars(config)[key] for config in (new, old) for key in _per_layer(config)]
    lists = [list(map(str, values)) for values in lists if values and len(values) == count]
    return list(zip(*lists)) or [()] * count


def _per_layer(config) -> list[str]:
    count = config.num_hidden_layers
    return [key for key, value in vars(config).items() if isinstance(value, (list, tuple)) and len(value) == count]


def _with_layers(config, layers: list[int]):
    if layers == list(range(config.num_hidden_layers)):
        return config
    cut = {key: [vars(config)[key][layer] for layer in layers] for key in _per_layer(config)}
    # older releases of transformers have no such configurations
    if getattr(config, "is_heterogeneous", False):
        # values that layers have of their own (Gemma 4) are numbered by layer
        data = config.to_dict() | cut | {"num_hidden_layers": len(layers)}
        own = {int(layer): values for layer, values in data["per_layer_config"].items()}
        data["per_layer_config"] = {i: own[layer] for i, layer in enumerate(layers) if layer in own}
        return type(config).from_dict(data | {"num_kv_shared_layers": 0})
    small = copy.deepcopy(config)
    for key, values in cut.items():
        setattr(small, key, values)
    small.num_hidden_layers = len(layers)
    if getattr(config, "num_kv_shared_layers", None):
        # the last layers' keys are those of layers that may be gone
        small.num_kv_shared_layers = 0
    return small


def _few_experts(config):
    """Its own heads and hidden size; few tokens, experts and MLP columns."""
    small = copy.deepcopy(config)
    for key, value in _COUNTS.items():
        present = getattr(small, key, None)
        if isinstance(present, list):
            value = [value] * len(present)
        if present is not None and present != value and not isinstance(present, bool):
            setattr(small, key, value)
    return small


def _narrow(config):
    """Few heads as well, of their own size, and the hidden size that goes with them."""
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
