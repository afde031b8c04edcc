"""Rotary embeddings in stock terms: what `rope_parameters` of a configuration says, and what it can be made to say.

- A rotation whose inverse frequencies are all (next to) 0 is the identity, so a stock configuration can say "no rotary
  embedding": that is DroPE (arXiv 2512.12167) without code. 1e30 is large enough for cos to be exactly 1 and for sin to
  vanish in the sum in float32 at a million positions, and small enough for the frequency to stay a normal number.
- The usual ways to stretch a rotary embedding (position interpolation, NTK, YaRN) are stock types as well: they are what
  DroPE is compared with.

Rope parameters are a flat mapping (`rope_type`, `rope_theta`, ...), or one such mapping a layer type (Gemma 3, OLMo 3).
Nothing heavy is imported at module level.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

METHODS = ("rope", "nope", "pi", "ntk", "yarn")
FORMS = ("llama3", "linear", "longrope")
_STRETCH = 1e30
_ORIGINAL = 8192
# What stays when the rotation is changed: none of it says how the rotation is scaled.
_KEPT = ("rope_theta", "partial_rotary_factor", "llama_4_scaling_beta")


def layer_ropes(config: PretrainedConfig) -> dict[str, dict]:
    """The flat rope parameters of `config`: one entry a layer type, or a single one named "".

    Raises:
        UserError: the model has no rotary embedding that its configuration describes.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        raise UserError(
            f"{text.model_type} models have no `rope_parameters`: there is no rotary embedding that the configuration "
            "could change (learned or no positions, ALiBi, or an older remote-code model)."
        )
    nested = text.nested_rope_parameter_keys(parameters)
    return {key: parameters[key] for key in nested if parameters[key] is not None} if nested else {"": parameters}


def form_of(model_type: str) -> str:
    """The form of the identity rotation that this architecture's class accepts."""
    return "longrope" if model_type == "phi3" else "llama3"


def identity_rope(parameters: dict, form: str, *, length: int, rotary_dim: int) -> dict:
    """Flat rope parameters -> those of the identity rotation.

    Args:
        parameters: flat rope parameters.
        form: one of `FORMS`. "llama3" is what most engines serve; "linear" is what llama.cpp's converter understands;
            "longrope" is the only type that Phi-3's class takes.
        length: the context that the checkpoint will announce, in tokens.
        rotary_dim: rotated dimensions of a head, for "longrope".
    """
    kept = {key: parameters[key] for key in _KEPT if key in parameters}
    if form == "linear":
        return {"rope_type": "linear", "factor": _STRETCH, **kept}
    if form == "longrope":
        # original = announced length: no engine then scales the attention by a ratio of the two
        factors = [_STRETCH] * (rotary_dim // 2)
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": list(factors),
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": length,
            **kept,
        }
    # Every wavelength (at least 2 pi) is above original / low = 1, hence divided by the factor. An original length that
    # is not below the announced one would make transformers warn; Ministral-3 reads it for its own temperature.
    original = min(_ORIGINAL, max(1, length // 2))
    if "llama_4_scaling_beta" in parameters:
        original = parameters["original_max_position_embeddings"]
    low = max(_ORIGINAL, original)
    return {
        "rope_type": "llama3",
        "factor": _STRETCH,
        "original_max_position_embeddings": original,
        "low_freq_factor": float(low),
        "high_freq_factor": 2.0 * low,
        **kept,
    }


def rotary_dim(config: PretrainedConfig, parameters: dict) -> int:
    """Dimensions of a head that are rotated."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def with_rope(
    config: PretrainedConfig, method: str, factor: float = 1.0, original_length: int | None = None
) -> PretrainedConfig:
    """A copy of `config` whose rotary embedding is another one, in stock terms.

    Args:
        config: of a causal language model.
        method: "rope" (as it is), "nope" (the identity), or a stretch by `factor`: "pi" (position interpolation, Chen et
            al. 2023), "ntk" (a larger base, theta * factor^(d / (d - 2))), "yarn" (Peng et al. 2023).
        factor: how many times the trained length; the copy announces `original_length * factor` positions.
        original_length: trained length in tokens; by default `max_position_embeddings`.

    Raises:
        UserError: the architecture or its present rotary embedding cannot say it.
    """
    if method not in METHODS:
        raise UserError(f"rope method {method!r} is not one of {', '.join(METHODS)}.")
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    length = original_length or text.max_position_embeddings
    if method == "nope":
        form = form_of(text.model_type)
        announced = round(length * factor)
        text.rope_parameters = changed_ropes(
            text, lambda _, old: identity_rope(old, form, length=announced, rotary_dim=rotary_dim(text, old))
        )
        if form == "longrope":
            text.original_max_position_embeddings = announced
    elif method != "rope":
        text.rope_parameters = changed_ropes(text, lambda _, old: _stretched(text, old, method, factor, length))
    text.max_position_embeddings = round(length * factor)
    return changed


def changed_ropes(config: PretrainedConfig, change: Callable[[str, dict], dict]) -> dict:
    """`rope_parameters` of `config` with `change(layer type or "", flat parameters)` applied, in the same form."""
    text = config.get_text_config()
    ropes = {name: change(name, old) for name, old in layer_ropes(text).items()}
    if "" in ropes:
        return ropes[""]
    return {**text.rope_parameters, **ropes}


def _stretched(text: PretrainedConfig, old: dict, method: str, factor: float, length: int) -> dict:
    kept = {key: old[key] for key in _KEPT if key in old}
    if method == "ntk":
        dim = rotary_dim(text, old)
        return {**old, "rope_theta": old["rope_theta"] * factor ** (dim / (dim - 2))}
    if old.get("rope_type", "default") != "default":
        raise UserError(
            f"{method} stretches a plain rotary embedding, and this one is already of type {old['rope_type']!r}. "
            "Compare with ntk, or with the model as it is (rope)."
        )
    if text.model_type == "phi3":
        if method == "yarn":
            raise UserError("Phi-3's class takes no YaRN. Compare with pi or ntk.")
        factors = [float(factor)] * (rotary_dim(text, old) // 2)
        stretched = {"rope_type": "longrope", "short_factor": factors, "long_factor": list(factors)}
        return {
            **stretched,
            "factor": float(factor),
            "attention_factor": 1.0,
            "original_max_position_embeddings": length,
            **kept,
        }
    if method == "pi":
        return {"rope_type": "linear", "factor": float(factor), **kept}
    return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": length, **kept}


@contextlib.contextmanager
def swapped_rope(model: nn.Module, config: PretrainedConfig) -> Iterator[None]:
    """The live `model` with the rotary modules of another configuration; its own are put back in the end.

    Raises:
        UserError: no rotary module was found.
    """
    text = config.get_text_config()
    device = next(model.parameters()).device
    places = rotary_modules(model)
    own = [getattr(parent, name) for parent, name in places]
    try:
        for parent, name in places:
            setattr(parent, name, type(getattr(parent, name))(config=text).to(device))
        yield
    finally:
        for (parent, name), module in zip(places, own):
            setattr(parent, name, module)


def rotary_modules(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the modules that compute cosines and sines are: (parent, attribute).

    Raises:
        UserError: there is none.
    """
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RotaryEmbedding")
    ]
    if not places:
        raise UserError(f"{type(model).__name__} has no rotary embedding module, so none can be exchanged.")
    return places
