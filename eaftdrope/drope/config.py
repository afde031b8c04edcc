"""config.json of a converted checkpoint: read as transformers reads it, rope keys for transformers 5 and 4, the record.

A file that has only the keys of transformers 5 silently runs full RoPE in transformers 4, and every save by transformers
5 writes only those: `restore_v4_keys` puts the older ones back after a training.

The record is under the key `drope`, which stock loaders carry along untouched: the keys before the conversion, the trained
length, and what was done.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from eaftdrope.errors import UserError

from .checkpoint import read_json, write_json
from .layers import Layers
from .rope import changed_ropes, dropped_rope

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
# Classes with one rotary embedding per attention type that transformers 4 has.
_NESTED_IN_4 = ("gemma3_text", "gemma3n_text", "olmo3")
# Left out when a configuration is read: the checks concern the rotation, however the weights are packed.
_LEFT_OUT = ("quantization_config", "auto_map")


def read_config(raw: dict[str, Any], where: str | Path) -> PretrainedConfig:
    """Return the configuration that transformers reads from the content of a config.json.

    It goes through a file, because the loader does more than the class: it decodes infinities, for example.

    Args:
        raw (`dict`): the content.
        where (`str` or `Path`): its name in messages.

    Raises:
        UserError: transformers has no class for it, or the class refuses a value.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(
            f"transformers cannot read {where}: transformers {transformers.__version__} has no class for model_type {kind!r}."
        )
    if not isinstance(raw.get("text_config", {}), dict):
        raise UserError(f"transformers cannot read {where}: text_config is not a mapping.")
    kept = _without_packing(raw)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / "config.json", kept)
            config = AutoConfig.from_pretrained(folder)
            text = getattr(config, "text_config", None) if "text_config" in kept else config.get_text_config()
    # a configuration class runs code of its own, which may raise anything
    except Exception as error:
        raise UserError(f"transformers cannot read {where}: {one_line(error)}") from error
    if not isinstance(text, PretrainedConfig):
        raise UserError(f"transformers cannot read {where}: {kind} has no `text_config`.")
    if text is not config and "text_config" not in raw:
        raise UserError(
            f"{where}: the language model of {kind} is not described under `text_config`, so its rotary embedding cannot "
            "be changed there."
        )
    return config


def _without_packing(raw: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in raw.items() if key not in _LEFT_OUT}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = _without_packing(kept["text_config"])
    return kept


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping inside a config.json that describes the language model."""
    return raw.get("text_config", raw)


def one_line(error: BaseException) -> str:
    """Return the message of another library's error in one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def without_published_code(raw: dict[str, Any], source: Path) -> tuple[dict[str, Any], list[str]]:
    """Remove the code that a checkpoint was published with (`auto_map`): the stock class then serves the checkpoint.

    Returns:
        The content of config.json without `auto_map`, and notes for the user.

    Raises:
        UserError: transformers does not have the class, so only that code can run the model.
    """
    published = raw.get("auto_map")
    if not published:
        return raw, []
    places = list(published.values()) if isinstance(published, dict) else [published]
    # a hub reference is ORG/NAME--file.Class; those of tokenizers come as a pair, and are no model classes
    names = [place.rsplit(".", 1)[-1] for place in places if isinstance(place, str)]
    names = [name for name in names if "Token" not in name and "Process" not in name]
    missing = [name for name in (*names, *(raw.get("architectures") or [])) if not hasattr(transformers, name)]
    if missing or not names:
        raise UserError(
            f"{source} runs code of its own (auto_map), which a configuration cannot change: transformers "
            f"{transformers.__version__} has no class {missing[0] if missing else 'for it'}. Not converted."
        )
    kept = {key: value for key, value in raw.items() if key != "auto_map"}
    return kept, [
        f"the code that the source was published with (auto_map: {names[0]}) is not used: transformers has the class."
    ]


def trained_length(config: PretrainedConfig) -> int:
    """Return the context that the model was trained on, in tokens.

    It is the length that a conversion recorded, else the original length of a stretched rotary embedding, else
    `max_position_embeddings`.

    Raises:
        UserError: the configuration has none of them.
    """
    text, record = config.get_text_config(), getattr(config, RECORD, None)
    if record is not None:
        return int(record["trained_length"])
    rope = getattr(text, "rope_parameters", None) or {}
    for flat in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        # Of these types only: for Llama 3.1's own type it is the length before its long-context training.
        if flat.get("rope_type") in ("yarn", "linear", "dynamic") and flat.get("original_max_position_embeddings"):
            return int(flat["original_max_position_embeddings"])
    length = getattr(text, "max_position_embeddings", None)
    if length is None:
        raise UserError(
            f"the configuration ({text.model_type}) does not have the length that the model was trained on. Write it into "
            "config.json as max_position_embeddings, or set it where an option exists (--trained-length; in a recipe "
            "recalibrate.data.max_length)."
        )
    return int(length)


def converted_config(
    raw: dict[str, Any], config: PretrainedConfig, *, form: str, layers: Layers, length: int
) -> dict[str, Any]:
    """Return the content of config.json with the rotary embedding of `layers` dropped.

    Args:
        raw (`dict`): the content of config.json.
        config (`PretrainedConfig`): the same, as transformers reads it (its `rope_parameters` are complete whatever
            version wrote the file).
        form (`str`): one of `rope.FORMS`.
        layers (`Layers`): the layers that lose their rotation.
        length (`int`): the context to announce, in tokens.
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

        def dropped(name: str, old: dict[str, Any]) -> dict[str, Any]:
            if layers.types is not None and name not in layers.types:
                return old
            return dropped_rope(text, old, form, length)

        part["rope_parameters"] = changed_ropes(text, dropped)
    _write_v4_keys(part)
    first = {"trained_length": trained_length(config), "temperature": 1.0, "original": original}
    raw[RECORD] = {**first, **raw.get(RECORD, {}), "layers": str(layers), "form": form}
    return raw


def check_record(raw: dict[str, Any], where: str | Path) -> None:
    """Raise UserError if a config.json has a `drope` record that no conversion wrote."""
    record = raw.get(RECORD, {})
    whole = {"trained_length": (int, float), "temperature": (int, float), "original": dict, "layers": str, "form": str}
    if RECORD in raw and not (
        isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in whole.items())
    ):
        raise UserError(f"{where}: its `{RECORD}` record is not that of a conversion. Convert the source again.")


def original_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a converted config.json's content with the rope keys that it had before its (first) conversion."""
    raw = copy.deepcopy(raw)
    part = text_part(raw)
    for key, value in raw.pop(RECORD)["original"].items():
        if value is None:
            part.pop(key, None)
        else:
            part[key] = value
    return raw


def restore_v4_keys(folder: str | Path) -> bool:
    """Put the rope keys of transformers 4 back into the config.json of a converted checkpoint that transformers 5 saved.

    Returns:
        Whether the folder holds a converted checkpoint (any other is left alone).
    """
    path = Path(folder) / "config.json"
    raw = read_json(path) if path.is_file() else {}
    if RECORD not in raw:
        return False
    whole = with_v4_keys(raw)
    if whole != raw:
        write_json(path, whole)
    return True


def with_v4_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a converted config.json's content with the rope keys of transformers 4."""
    raw = copy.deepcopy(raw)
    _write_v4_keys(text_part(raw))
    return raw


def _write_v4_keys(part: dict[str, Any]) -> None:
    """Write `rope_scaling`, `rope_theta` and others beside `rope_parameters`, as transformers 4 and engines read them."""
    ropes = part["rope_parameters"]
    if "rope_type" not in ropes:
        if part["model_type"] not in _NESTED_IN_4:
            # transformers 4 does not have these classes, and in version 5 the older keys would override the newer ones
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
        # the only form that these classes of transformers 4 accept
        scaling = {"type": "linear", "factor": rope["factor"]}
    if rope["rope_type"] == "longrope":
        part["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        # transformers 4 accepts exactly these three of Phi-3, and all of them of PhiMoE
        kept = ("short_factor", "long_factor", "short_mscale", "long_mscale")
        if part["model_type"] == "phimoe":
            kept += ("original_max_position_embeddings",)
        scaling = {"type": "longrope", **{key: scaling[key] for key in kept if key in scaling}}
    if rope.get("llama_4_scaling_beta"):
        # vLLM's name for it
        original = {"original_max_position_embeddings": rope["original_max_position_embeddings"]}
        part["llama_4_scaling"] = {**original, "beta": rope["llama_4_scaling_beta"]}
    if rope["rope_type"] == "default":
        part.pop("rope_scaling", None)
    else:
        part["rope_scaling"] = scaling
