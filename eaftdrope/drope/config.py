"""config.json of a converted checkpoint: rope keys for transformers 5 and 4, the announced length, and the record.

A file that has only the keys of transformers 5 silently runs full RoPE in transformers 4, and every save by transformers
5 writes only those: `complete` puts the older ones back after a training.

The record stands under `drope`, which stock loaders carry along untouched: what the keys were before, the trained
length, and what was done.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from .checkpoint import read_json, write_json
from .layers import Layers
from .reading import text_part
from .rope import changed_ropes, dropped_rope

if TYPE_CHECKING:
    from transformers import PretrainedConfig

RECORD = "drope"
_ROPE_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "rotary_pct",
    "rotary_emb_base",
    "rope_local_base_freq",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "no_rope_layers",
    "layer_types",
)
# Classes with a rotary embedding for each attention type that transformers 4 has.
_NESTED_IN_4 = ("gemma3_text", "gemma3n_text", "olmo3")


def trained_length(config: PretrainedConfig) -> int:
    """The context that the model was trained on, in tokens, as far as its configuration tells: what a conversion
    recorded, else what a stretched rotary embedding calls its original length, else `max_position_embeddings`.

    Raises:
        UserError: the configuration has none of them.
    """
    text, record = config.get_text_config(), getattr(config, RECORD, None)
    if record is not None:
        return int(record["trained_length"])
    rope = getattr(text, "rope_parameters", None) or {}
    for flat in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        # Of these types only: Llama 3.1's own type names the length before its long-context training.
        if flat.get("rope_type") in ("yarn", "linear", "dynamic") and flat.get("original_max_position_embeddings"):
            return int(flat["original_max_position_embeddings"])
    length = getattr(text, "max_position_embeddings", None)
    if length is None:
        raise UserError(
            f"the configuration ({text.model_type}) does not have the length that the model was trained on. Write it into "
            "config.json as max_position_embeddings, or pass it where there is an option for it (--trained-length; in a "
            "recipe recalibrate.data.max_length)."
        )
    return int(length)


def converted(raw: dict, config: PretrainedConfig, *, form: str, layers: Layers, length: int) -> dict:
    """config.json's content with the rotary embedding of `layers` dropped.

    Args:
        raw: config.json as it is.
        config: the same, as transformers reads it (its `rope_parameters` are complete whatever version wrote the file).
        length: the context to announce.
    """
    raw = copy.deepcopy(raw)
    part, text = text_part(raw), config.get_text_config()
    original = {key: copy.deepcopy(part.get(key)) for key in _ROPE_KEYS}
    part["max_position_embeddings"] = length
    part.setdefault("model_type", text.model_type)
    if layers.indices is not None:
        chosen = set(layers.indices)
        part["no_rope_layers"] = [0 if i in chosen else has for i, has in enumerate(text.no_rope_layers)]
        # left out, they would be derived from the line above
        part["layer_types"] = list(text.layer_types)
        part["rope_parameters"] = text.rope_parameters
    else:

        def dropped(name: str, old: dict) -> dict:
            if layers.types is not None and name not in layers.types:
                return old
            return dropped_rope(text, old, form, length)

        part["rope_parameters"] = changed_ropes(text, dropped)
    _write_old_keys(part)
    first = {"trained_length": trained_length(config), "temperature": 1.0, "original": original}
    raw[RECORD] = {**first, **raw.get(RECORD, {}), "layers": str(layers), "form": form}
    return raw


def check_record(raw: dict, where: str | Path) -> None:
    """Raises UserError where a config.json has a record that no conversion wrote."""
    record = raw.get(RECORD, {})
    whole = {"trained_length": (int, float), "temperature": (int, float), "original": dict, "layers": str, "form": str}
    if RECORD in raw and not (
        isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in whole.items())
    ):
        raise UserError(f"{where}: its `{RECORD}` record is not that of a conversion. Convert the source again.")


def before(raw: dict) -> dict:
    """A converted config.json's content with the rope keys that it had before its (first) conversion."""
    raw = copy.deepcopy(raw)
    part = text_part(raw)
    for key, value in raw.pop(RECORD)["original"].items():
        if value is None:
            part.pop(key, None)
        else:
            part[key] = value
    return raw


def complete(folder: str | Path) -> bool:
    """Puts the rope keys of transformers 4 back into the config.json of a converted checkpoint that transformers 5 has
    saved. Returns whether the folder holds a converted checkpoint (any other is left alone)."""
    path = Path(folder) / "config.json"
    raw = read_json(path) if path.is_file() else {}
    if RECORD not in raw:
        return False
    whole = with_old_keys(raw)
    if whole != raw:
        write_json(path, whole)
    return True


def with_old_keys(raw: dict) -> dict:
    """A converted config.json's content with the rope keys of transformers 4, where they were lost."""
    raw = copy.deepcopy(raw)
    _write_old_keys(text_part(raw))
    return raw


def _write_old_keys(part: dict) -> None:
    """`rope_scaling`, `rope_theta` and their like beside `rope_parameters`, as transformers 4 and engines read them."""
    ropes = part["rope_parameters"]
    if "rope_type" not in ropes:
        if part["model_type"] not in _NESTED_IN_4:
            # transformers 4 does not have these classes, and in version 5 the older keys would overrule the newer ones
            return
        # transformers 4 has one scaling, for full attention, and a plain rotary embedding on sliding layers
        rope, local = ropes["full_attention"], ropes.get("sliding_attention")
        if part["model_type"] != "olmo3" and local:
            part["rope_local_base_freq"] = local["rope_theta"]
    else:
        rope = ropes
    theta, factor = rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)
    if part["model_type"] == "gpt_neox":
        part["rotary_emb_base"], part["rotary_pct"] = theta, factor
    part["rope_theta"] = theta
    if factor != 1.0:
        part["partial_rotary_factor"] = factor
    moved = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in moved}
    if part["model_type"] in ("olmo", "olmo2") and rope["rope_type"] == "linear":
        # the one form that transformers 4 takes of these classes
        scaling = {"type": "linear", "factor": rope["factor"]}
    if rope["rope_type"] == "longrope":
        part["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        # transformers 4 takes exactly these three of Phi-3, and all of them of PhiMoE
        kept = ("short_factor", "long_factor", "short_mscale", "long_mscale")
        if part["model_type"] == "phimoe":
            kept += ("original_max_position_embeddings",)
        scaling = {"type": "longrope", **{key: scaling[key] for key in kept if key in scaling}}
    if rope.get("llama_4_scaling_beta"):
        # vLLM's name for it
        kept = {"original_max_position_embeddings": rope["original_max_position_embeddings"]}
        part["llama_4_scaling"] = {**kept, "beta": rope["llama_4_scaling_beta"]}
    if rope["rope_type"] == "default":
        part.pop("rope_scaling", None)
    else:
        part["rope_scaling"] = scaling
