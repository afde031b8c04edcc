"""Rotary embeddings in stock terms: what `rope_parameters` of a configuration can express.

- A rotation whose inverse frequencies are all (next to) 0 is the identity, so a stock configuration can express "no rotary
  embedding": that is DroPE (arXiv 2512.12167) without code. 1e30 is large enough for cos to be exactly 1 and for sin to
  vanish in the sum in float32 at a million positions, and small enough for the frequency to stay a normal number.
- The usual ways to stretch a rotary embedding (position interpolation, NTK, YaRN) are stock types as well: DroPE is
  compared with them.

Rope parameters are a flat mapping (`rope_type`, `rope_theta`, ...), or one such mapping per layer type (Gemma 3, OLMo 3).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from .identity import OTHER_TOWERS, text_modules

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

METHODS = ("rope", "nope", "pi", "ntk", "yarn")
FORMS = ("llama3", "linear", "longrope")
_SCALES = ("short_mscale", "long_mscale")
_STRETCH = 1e30
_ORIGINAL = 8192
# Classes that rotate only in layers with a window, and use no positions in those that see all tokens.
_ROTATE_IN_WINDOWS = (
    "afmoe",
    "cohere2",
    "cohere2_moe",
    "exaone4",
    "exaone_moe",
    "flint",
    "kolibri1",
)
_WINDOWS = ("sliding", "chunked", "local")
# Kept when the rotation is changed: none of them scales the rotation.
_KEPT = ("rope_theta", "partial_rotary_factor", "llama_4_scaling_beta")


def layer_ropes(config: PretrainedConfig) -> dict[str, dict]:
    """Return the flat rope parameters of `config`: one entry per layer type, or a single one with the key "".

    Raises:
        UserError: the model has no rotary embedding that its configuration describes.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        raise UserError(
            f"{text.model_type} models have no `rope_parameters`: they have no rotary embedding that the configuration "
            "could change (learned or no positions, ALiBi, or an older remote-code model)."
        )
    nested = text.nested_rope_parameter_keys(parameters)
    ropes = {key: parameters[key] for key in nested if parameters[key] is not None} if nested else {"": parameters}
    for rope in ropes.values():
        base = rope.get("rope_theta") if isinstance(rope, dict) else None
        if not isinstance(base, (int, float)) or not base > 0:
            raise UserError(
                f"the rotary embedding of this {text.model_type} has no base (rope_theta) in its configuration."
            )
    return ropes


def check_known(rope: dict, model_type: str) -> None:
    """Raise UserError if transformers does not have the type of these flat rope parameters."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope.get("rope_type", "default")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(("default", *ROPE_INIT_FUNCTIONS))
        raise UserError(f"transformers has no rotary embedding of type {kind!r} for this {model_type} ({known}).")


def form_of(model_type: str) -> str:
    """Return the form of the identity rotation that this architecture's class accepts."""
    return "longrope" if model_type in ("phi3", "phimoe") else "llama3"


def identity_rope(parameters: dict, form: str, *, length: int, rotary_dim: int, needs_scales: bool = False) -> dict:
    """Return the flat rope parameters of the identity rotation.

    Args:
        parameters (`dict`): flat rope parameters of the model.
        form (`str`): one of `FORMS`. Most engines serve "llama3"; llama.cpp's converter understands "linear"; Phi-3's class
            accepts only "longrope".
        length (`int`): the context that the checkpoint will announce, in tokens.
        rotary_dim (`int`): rotated dimensions of a head, for "longrope".
        needs_scales (`bool`): for "longrope", write PhiMoE's own factors on cosines and sines as well.
    """
    kept = {key: parameters[key] for key in _KEPT if key in parameters}
    if parameters.get("rope_type") == "proportional":
        # of this type only, the factor sets which frequencies are 0, and all dimensions are rotated
        kept.pop("partial_rotary_factor", None)
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
            **(dict.fromkeys(_SCALES, 1.0) if needs_scales else {}),
            **kept,
        }
    # Every wavelength (at least 2 pi) is above original / low = 1, so its frequency is divided by the factor. transformers
    # would warn about an original length that is not below the announced one; Ministral-3's temperature reads it.
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


def dropped_rope(text: PretrainedConfig, parameters: dict, form: str, length: int) -> dict:
    """Return `identity_rope` for the flat rope parameters of this model."""
    dim = rotary_dim(text, parameters) if form == "longrope" else 0
    return identity_rope(parameters, form, length=length, rotary_dim=dim, needs_scales=text.model_type == "phimoe")


def rotary_dim(config: PretrainedConfig, parameters: dict) -> int:
    """Return the number of dimensions of a head that are rotated."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def with_rope(
    config: PretrainedConfig, method: str, factor: float = 1.0, original_length: int | None = None
) -> PretrainedConfig:
    """Return a copy of `config` with another rotary embedding, in stock terms.

    Args:
        config (`PretrainedConfig`): of a causal language model.
        method (`str`): "rope" (as it is), "nope" (the identity), or a stretch by `factor`: "pi" (position interpolation, Chen
            et al. 2023), "ntk" (a larger base, theta * factor^(d / (d - 2))), "yarn" (Peng et al. 2023). Attention types
            with a window keep their own rotary embedding if they have one: they see no distance beyond the window.
        factor (`float`): multiple of the trained length; the copy announces `original_length * factor` positions.
        original_length (`int`, *optional*): trained length in tokens; by default `max_position_embeddings`.

    Raises:
        UserError: the architecture or its present rotary embedding cannot express it.
    """
    if method not in METHODS:
        raise UserError(f"rope method {method!r} is not one of {', '.join(METHODS)}.")
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    length = original_length or text.max_position_embeddings
    if method == "nope":
        form = form_of(text.model_type)
        announced = round(length * factor)
        text.rope_parameters = changed_ropes(text, lambda _, old: dropped_rope(text, old, form, announced))
        if form == "longrope":
            text.original_max_position_embeddings = announced
    elif method != "rope":
        stretched = _stretched_types(text, method)
        text.rope_parameters = changed_ropes(
            text, lambda name, old: _stretched(text, old, method, factor, length) if name in stretched else old
        )
    text.max_position_embeddings = round(length * factor)
    return changed


def changed_ropes(config: PretrainedConfig, change: Callable[[str, dict], dict]) -> dict:
    """Return `rope_parameters` of `config` with `change(layer type or "", flat parameters)` applied, in the same form."""
    text = config.get_text_config()
    ropes = {name: change(name, old) for name, old in layer_ropes(text).items()}
    if "" in ropes:
        return ropes[""]
    return {**text.rope_parameters, **ropes}


def _stretched_types(text: PretrainedConfig, method: str) -> set[str]:
    """Return the keys of `layer_ropes` that a longer context stretches: those of attention without a window.

    The families that were trained for long contexts (Gemma 3, OLMo 3) do the same.
    """
    unwindowed = {name for name in layer_ropes(text) if not _has_window(name)}
    rotating = _rotating_kinds(text) if "" in unwindowed else []
    if not unwindowed or (rotating and all(map(_has_window, rotating))):
        raise UserError(
            f"{method} has nothing to stretch: the layers of this {text.model_type} that rotate see a window of tokens, "
            "and no distance in it is beyond what they were trained on. Compare with the model as it is (rope)."
        )
    if method == "ntk" and any(getattr(text, "layer_rope_theta", None) or []):
        raise UserError(
            f"ntk enlarges one base, and {text.model_type} has one for each layer (layer_rope_theta). Compare "
            "with pi or yarn."
        )
    return unwindowed


def _rotating_kinds(text: PretrainedConfig) -> list[str]:
    """Return the attention types of the layers that rotate, if one rotary embedding serves all of them."""
    kinds = list(getattr(text, "layer_types", None) or [])
    switches = getattr(text, "no_rope_layers", None) or []
    if len(switches) == len(kinds):
        kinds = [kind for kind, rotates in zip(kinds, switches) if rotates]
    elif text.model_type in _ROTATE_IN_WINDOWS and getattr(text, "sliding_window", None):
        kinds = [kind for kind in kinds if _has_window(kind)]
    return [kind for kind in kinds if "attention" in kind and "linear" not in kind]


def _has_window(kind: str) -> bool:
    return any(word in kind for word in _WINDOWS)


def _stretched(text: PretrainedConfig, old: dict, method: str, factor: float, length: int) -> dict:
    kept = {key: old[key] for key in _KEPT if key in old}
    if method == "ntk":
        dim = rotary_dim(text, old)
        # its exponents count in the whole head's dimensions
        whole = rotary_dim(text, {}) if old.get("rope_type") == "proportional" else dim
        return {**old, "rope_theta": old["rope_theta"] * factor ** (whole / (dim - 2))}
    if method == "pi" and old.get("rope_type") == "proportional":
        return {**old, "factor": old.get("factor", 1.0) * factor}
    if old.get("rope_type", "default") != "default":
        raise UserError(
            f"{method} stretches a plain rotary embedding, and this one is already of type {old['rope_type']!r}. "
            "Compare with ntk, or with the model as it is (rope)."
        )
    if text.model_type == "phi3":
        if method == "yarn":
            raise UserError("Phi-3's class does not accept YaRN. Compare with pi or ntk.")
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
    """Give the live `model` the rotary modules of another configuration until the block ends.

    Raises:
        UserError: the model has no rotary module, or several of different bases.
    """
    text = config.get_text_config()
    if getattr(text, "layer_rope_theta", None):
        raise UserError(
            f"{type(model).__name__} has a rotary embedding for each base (layer_rope_theta), which cannot be exchanged in a "
            "live model."
        )
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
    """Return (parent, attribute) of the modules that compute cosines and sines.

    Raises:
        UserError: the model has none.
    """
    places = [
        (parent, name)
        for _, parent in text_modules(model)
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RotaryEmbedding") and not OTHER_TOWERS.search(name)
    ]
    if not places:
        raise UserError(f"{type(model).__name__} has no rotary embedding module, so none can be exchanged.")
    return places
