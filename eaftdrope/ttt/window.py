"""Attention that sees the last `window` tokens and the first `sink` ones, in a stock model and its own class.

A cache layer drops the keys that no later token sees, and a 4D mask, which stock forwards hand through, hides those that
some tokens of a piece must not see. Positions are absolute: rotary attention depends on their differences only, and within
a window these are small. The distance to the sink grows, so beyond the length that the model was trained on the sink's few
keys are rotated after the sequence.

`sliding` is the other way to a window: a stock class and configuration that other engines serve too, without a sink.

Legend: B rows, n tokens of a piece, K keys in view, h heads of the keys, d size of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .config import TTTConfig

KeysValues = tuple[Tensor | None, Tensor | None]
"""Keys and values `[B, h, K, d]` that a layer keeps; (None, None) before it has read anything."""

Turn = tuple[Callable[..., tuple[Tensor, Tensor]], Tensor, Tensor]
"""The model's function that rotates, and the cosines and sines of a rotation."""

MASKED_ATTENTION = ("sdpa", "eager")
"""Implementations of attention that use a 4D mask."""

_QWEN_SHAPED = ("qwen2", "qwen3", "smollm3")


class WindowLayer(DynamicLayer):
    """Keys and values of the first `sink` tokens and of the last `window` - 1.

    Attributes:
        turn (`Turn` or `None`): rotation of the sink's keys as attention sees them; those kept are never rotated.
    """

    def __init__(self, window: int, sink: int) -> None:
        super().__init__()
        self.window, self.sink, self.cumulative_length = window, sink, 0
        self.turn: Turn | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take up a piece; return the keys and values that it can see and its own, `[B, h, K + n, d]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        assert self.keys is not None and self.values is not None
        keys, values = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        seen = keys
        if self.turn is not None:
            rotate, cos, sin = self.turn
            sink = keys[..., : self.sink, :]
            seen = torch.cat([rotate(sink, sink, cos, sin)[1], keys[..., self.sink :, :]], -2)
        self.keys, self.values = self._kept(keys), self._kept(values)
        return seen, values

    def _kept(self, states: Tensor) -> Tensor:
        if states.shape[-2] <= self.sink + self.window - 1:
            return states
        recent = states.shape[-2] - (self.window - 1)
        return torch.cat([states[..., : self.sink, :], states[..., recent:, :]], -2)

    def get_seq_length(self) -> int:
        return self.cumulative_length


def make_layer(
    model: PreTrainedModel, config: TTTConfig, kept: KeysValues = (None, None), length: int = 0
) -> CacheLayerMixin:
    """A cache layer for one block, empty or with what was kept after `length` tokens."""
    layer: Any
    if config.window is not None:
        layer = WindowLayer(config.window, config.sink)
    elif has_own_window(model):
        layer = DynamicSlidingWindowLayer(model.config.get_text_config().sliding_window)
    else:
        layer = DynamicLayer()
    keys, values = kept
    if keys is not None and values is not None:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
    return layer


def has_own_window(model: PreTrainedModel) -> bool:
    """Return whether the model's configuration has a window, which holds in every layer (`checks` refuses others)."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds:
        return kinds == {"sliding_attention"}
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def window_mask(
    model: PreTrainedModel, config: TTTConfig, layer: CacheLayerMixin | None, start: int, count: int
) -> Tensor | None:
    """The mask `[1, 1, n, K + n]` of a piece of `count` tokens from position `start`; None where causal attention is right.

    Args:
        layer: a layer before it takes up the piece; None where no cache is used.
    """
    if config.window is None or start + count <= config.window:
        return None
    kept = 0 if layer is None or layer.keys is None else layer.keys.shape[-2]
    device = model.device
    query = torch.arange(start, start + count, device=device)[:, None]
    key = torch.arange(start + count, device=device)
    if layer is not None and kept < start:
        key = torch.cat([key[: config.sink], key[start - kept + config.sink :]])
    visible = ((key <= query) & ((key > query - config.window) | (key < config.sink)))[None, None]
    if model.config._attn_implementation == "eager":
        # eager attention adds the mask to its scores
        hidden = torch.finfo(model.dtype).min
        return torch.zeros(visible.shape, dtype=model.dtype, device=device).masked_fill(~visible, hidden)
    return visible


# The sink beyond the trained length


def trained_limit(model: PreTrainedModel) -> int | None:
    """The largest distance that the model's attention was trained on; None if the configuration does not state it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def set_turns(
    model: PreTrainedModel, config: TTTConfig, blocks: Sequence[nn.Module], layers: Sequence[Any], start: int
) -> None:
    """Rotate the sink's keys of `layers` for a piece of the chunk that holds position `start`, if it lies that far.

    Every piece of a chunk sees the sink at the same place, so reading in any pieces is the same.

    Raises:
        ValueError: the model's class does not rotate keys in the way of Llama.
    """
    limit = trained_limit(model)
    if not config.sink or limit is None:
        return
    shift = (start // config.chunk + 1) * config.chunk - limit
    if shift <= 0:
        return
    turn = _turn(model, layers[0], shift)
    for block, layer in zip(blocks, layers, strict=True):
        # a layer without positions (SmolLM3) has nothing to rotate
        layer.turn = turn if getattr(getattr(block, "self_attn", None), "use_rope", True) else None


def _turn(model: PreTrainedModel, layer: WindowLayer, shift: int) -> Turn:
    base: Any = model.base_model
    rotate = getattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", None)
    rotary = getattr(base, "rotary_emb", None)
    if rotate is None or rotary is None or layer.keys is None:
        raise ValueError(
            f"{type(model).__name__} was trained on {trained_limit(model):,} tokens, and its class has no rotary embedding "
            "with which its sink could be kept within that distance. Read less, or set sink=0."
        )
    positions = torch.full((1, 1), shift, device=layer.keys.device)
    cos, sin = rotary(layer.keys, position_ids=positions)
    if cos.shape[-1] != layer.keys.shape[-1]:
        raise ValueError(
            f"{type(model).__name__} rotates only a part of each key, so its sink cannot be kept within the "
            f"{trained_limit(model):,} tokens that it was trained on. Read less, or set sink=0."
        )
    # a factor on the attention (YaRN) is in the kept keys already
    scaling = getattr(rotary, "attention_scaling", 1.0)
    return rotate, cos / scaling, sin / scaling


# A window by stock configuration


def sliding(model: PreTrainedModel, window: int) -> PreTrainedModel:
    """Return the same weights in a stock class and configuration whose every layer attends to `window` tokens.

    Other engines serve the result as a sliding-window model, and flash kernels apply. It has no sink: right for models that
    were trained with a window, or will be trained at length. The new model shares its parameters with `model`; use only one
    of the two.

    Args:
        model ([`~transformers.PreTrainedModel`]): a Llama, Mistral, Qwen 2, Qwen 3 or SmolLM3 causal language model.
        window (`int`): tokens in view, the token itself included.

    Raises:
        ValueError: no stock class has this architecture with a window in every layer.
    """
    if window < 1:
        raise ValueError(f"window={window}: must be at least 1.")
    config = model.config.to_dict()
    for key in ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version"):
        config.pop(key, None)
    kind, new_class, new_config = model.config.model_type, type(model), type(model.config)
    if kind in ("llama", "mistral"):
        # Mistral's class is Llama's with a window: the same keys and arithmetic
        if getattr(model.config, "attention_bias", False) or getattr(model.config, "mlp_bias", False):
            raise ValueError("a Llama with biases has no stock class with a window: use TTTConfig(window=...) instead.")
        for key in ("attention_bias", "mlp_bias", "pretraining_tp", "layer_types"):
            config.pop(key, None)
        new_class, new_config = MistralForCausalLM, MistralConfig
        config["sliding_window"] = window
    elif kind in _QWEN_SHAPED:
        layers = ["sliding_attention"] * model.config.num_hidden_layers
        config |= {"use_sliding_window": True, "sliding_window": window, "layer_types": layers, "max_window_layers": 0}
    else:
        raise ValueError(
            f"no stock configuration of {kind} is known with a window in every layer. Use TTTConfig(window=...), which works "
            "in the model's own class."
        )
    new_config = new_config(**config)
    new_config._attn_implementation = model.config._attn_implementation
    new: Any = new_class._from_config(new_config, dtype=model.dtype)
    new.load_state_dict(model.state_dict(), assign=True)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new.train(model.training)
