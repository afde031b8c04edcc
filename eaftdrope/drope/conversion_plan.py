"""The plan of a conversion: everything that can be refused is refused here, before a file is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from eaftdrope.errors import UserError

from . import query_weights
from .check import original_and_converted, parameters
from .checkpoint import read_json, weight_map
from .config import RECORD, check_record, converted_config, read_config, text_part, without_published_code
from .layers import Layers, choose_layers
from .llama_shaped import as_qwen3, check_qk_norm, with_temperature_by_position
from .rope import check_known, form_of, layer_ropes
from .slices import small_pair
from .temperature import has_factor, inherited_temperature


@dataclass(frozen=True)
class ConversionOptions:
    """The options of `convert`, under the same names."""

    max_length: int | None = None
    layers: str | float | list[int] = "all"
    temperature: float | None = None
    slope_by_position: float | None = None
    qk_norm: bool = False
    engine: str = "any"
    copy: bool = False
    check_weights: bool = False


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that is known to be possible.

    Attributes:
        source (`Path`): the checkpoint.
        raw (`dict`): the content of its config.json, for the class that it will be saved as.
        config (`PretrainedConfig`): the same, as transformers reads it.
        layers (`Layers`): the layers that lose their rotation.
        form (`str`): one of `rope.FORMS`.
        length (`int`): the context to announce, in tokens.
        temperature (`float`): the factor to fold into the query weights.
        qk_norm (`bool`): add query and key norms.
        notes (`tuple[str, ...]`): what the user should read.
    """

    source: Path
    raw: dict[str, Any]
    config: PretrainedConfig
    layers: Layers
    form: str
    length: int
    temperature: float = 1.0
    qk_norm: bool = False
    notes: tuple[str, ...] = ()

    def new_config(self) -> dict[str, Any]:
        """Return the content of the new config.json, with its record."""
        raw = converted_config(self.raw, self.config, form=self.form, layers=self.layers, length=self.length)
        raw[RECORD]["temperature"] *= self.temperature
        raw[RECORD]["qk_norm"] = self.qk_norm or raw[RECORD].get("qk_norm", False)
        return raw


def plan_conversion(source: Path, options: ConversionOptions) -> ConversionPlan:
    """Plan the conversion of the checkpoint `source`.

    Raises:
        UserError: anything that cannot be honoured.
    """
    where = source / "config.json"
    raw, notes = without_published_code(read_json(where), source)
    weight_map(source)
    check_record(raw, where)
    config = read_config(raw, where)
    _check_rope(config.get_text_config(), is_multimodal="text_config" in raw)
    _check_numbers(options)
    # saved as another class
    if options.qk_norm:
        if RECORD in raw:
            raise UserError(f"{source} is already converted; qk_norm belongs to the first conversion.")
        check_qk_norm(config)
        raw = as_qwen3(raw, config)
        config = read_config(raw, where)
    if options.slope_by_position is not None:
        raw = with_temperature_by_position(raw, config, options.slope_by_position)
        config = read_config(raw, where)
    plan = ConversionPlan(
        source=source,
        raw=raw,
        config=config,
        layers=_kept_layers(raw, options.layers, config),
        form=_form(options.engine, config.get_text_config().model_type),
        length=_announced_length(config, options.max_length, where),
        qk_norm=options.qk_norm,
        notes=tuple(notes),
    )
    plan = _with_temperature(plan, options.temperature)
    return replace(plan, notes=(*plan.notes, *_notes(plan)))


def _check_numbers(options: ConversionOptions) -> None:
    length, temperature = options.max_length, options.temperature
    if length is not None and length < 2:
        raise UserError(f"max_length must be at least 2 tokens, got {length}.")
    if temperature is not None and not 0 < temperature < 100:
        raise UserError(f"temperature must be between 0 and 100 (usually near 1), got {temperature:g}.")


def _announced_length(config: PretrainedConfig, wanted: int | None, where: Path) -> int:
    length = getattr(config.get_text_config(), "max_position_embeddings", None) if wanted is None else wanted
    if length is None or length < 2:
        found = f"a length of {length}" if length is not None else "no length"
        raise UserError(f"{where} announces {found} (max_position_embeddings). Correct it there.")
    return length


def _with_temperature(plan: ConversionPlan, wanted: float | None) -> ConversionPlan:
    """Return the plan with the temperature requested, or the one that comes with the source's rotary embedding (measured)."""
    inherits = has_factor(plan.config) and RECORD not in plan.raw
    if plan.qk_norm and not inherits:
        return replace(plan, temperature=wanted or 1.0)
    if wanted is None and not inherits:
        return plan
    if wanted is not None:
        _check_unquantised(plan.raw)
    new, old = original_and_converted(plan.new_config(), plan.source / "config.json")
    new, old = small_pair(new.get_text_config(), old.get_text_config(), parameters(plan.source))
    factor, uniform = inherited_temperature(new, old) if inherits else (1.0, True)
    found = f"the source's rotary embedding came with a temperature of up to {factor:.4g} on the scores"
    if wanted is not None or plan.qk_norm or not uniform:
        if factor != 1.0:
            why = "on some of a head's dimensions only" if not uniform else "which is not in the weights"
            advice = f" --temperature {factor:.6g} folds it in." if uniform and wanted is None else ""
            plan = replace(plan, notes=(*plan.notes, f"{found}, {why}.{advice}"))
        if wanted is not None and not plan.qk_norm:
            _check_folding(plan, new, wanted)
        return replace(plan, temperature=wanted or 1.0)
    if factor == 1.0:
        return plan
    try:
        _check_unquantised(plan.raw)
        _check_folding(plan, new, factor)
    except UserError as error:
        return replace(plan, notes=(*plan.notes, f"{found}, which is lost: {error}"))
    note = f"{found}; it is kept, folded into the query weights (--temperature 1 leaves it out)."
    return replace(plan, temperature=factor, notes=(*plan.notes, note))


def _check_folding(plan: ConversionPlan, small: PretrainedConfig, beta: float) -> None:
    found = query_weights.find_queries(plan.source, weight_map(plan.source), plan.config)
    names = [name for tensors in found.values() for name in tensors]
    if beta != 1.0:
        query_weights.check_folding(small, names, beta, plan.config.get_text_config())


def _check_unquantised(raw: dict[str, Any]) -> None:
    packed = raw.get("quantization_config") or text_part(raw).get("quantization_config")
    if packed:
        kind = packed.get("quant_method", "unknown") if isinstance(packed, dict) else "unknown"
        raise UserError(
            f"the source is quantised ({kind}), and a temperature cannot be folded into quantised weights. Convert the model "
            "before it is quantised, or leave the temperature out."
        )


def _check_rope(text: PretrainedConfig, *, is_multimodal: bool) -> None:
    for rope in layer_ropes(text).values():
        check_known(rope, text.model_type)
        by_default = is_multimodal and "mrope_section" in (text.ignore_keys_at_rope_validation or ())
        if by_default or "mrope_section" in rope or "mrope_interleaved" in rope:
            raise UserError(
                f"{text.model_type}: its rotary embedding also carries the position of a token within an image (mrope). "
                "Dropping it would scramble images, and no recalibration on text repairs that. Not converted."
            )


def _kept_layers(raw: dict[str, Any], wanted: str | float | list[int], config: PretrainedConfig) -> Layers:
    """Choose the layers; a second conversion keeps those of the first unless it drops all of them."""
    if RECORD in raw and raw[RECORD]["layers"] != "all" and wanted == "all":
        wanted = raw[RECORD]["layers"]
    return choose_layers(wanted, config)


def _form(engine: str, model_type: str) -> str:
    if engine == "any":
        return form_of(model_type)
    if engine != "gguf":
        raise UserError(f"engine {engine!r} is not one of any, gguf.")
    if model_type in ("phi3", "phimoe", "ministral3"):
        raise UserError(
            f"llama.cpp's converter cannot express NoPE for {model_type} (its class has no linear rope). Convert the plain "
            "model to GGUF and serve it with `--rope-scaling linear --rope-freq-scale 1e-30`."
        )
    return "linear"


def _notes(plan: ConversionPlan) -> list[str]:
    """Return what the user should know and cannot see."""
    text, notes = plan.config.get_text_config(), []
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or []
    sliding = kinds.count("sliding_attention") if kinds else (text.num_hidden_layers if window else 0)
    drops_sliding = plan.layers.indices is None and (
        plan.layers.types is None or "sliding_attention" in plan.layers.types
    )
    if window and sliding and drops_sliding:
        keep = " `--layers full_attention` keeps their rotation." if len(layer_ropes(text)) > 1 else ""
        notes.append(f"{sliding} layers see a window of {window} tokens only; they lose their rotation too.{keep}")
    if plan.qk_norm:
        notes.append(
            "the query and key norms are new and start at 1: the model computes something else until recalibrated."
        )
    if getattr(text, "rope_parameters", {}).get("llama_4_scaling_beta"):
        slope = text.rope_parameters["llama_4_scaling_beta"]
        notes.append(f"the scores grow with the position (llama_4_scaling_beta {slope:g}), on top of any temperature.")
    return notes
