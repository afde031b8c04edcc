"""`convert`: a checkpoint without rotary embedding, by configuration alone.

    SRC -> DST.partial: weights linked, config.json, tokenizer and generation limits edited -> checked -> renamed to DST

Nothing stands under DST before it is whole and checked. What was replaced is kept in DST/drope_original, for `undo`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from . import queries
from .by_position import with_temperature_by_position
from .card import write_card
from .check import Check, check_folder
from .checkpoint import (
    INDEX,
    MANIFEST,
    ORIGINALS,
    carried_files,
    carry,
    made,
    read_header,
    read_json,
    weight_map,
    write_json,
)
from .config import RECORD, converted, text_part
from .engines import Serving, serving
from .layers import Layers, choose_layers
from .qk_norm import add_norms, as_qwen3, check_qk_norm
from .rope import form_of, layer_ropes

_EDITED = ("config.json", "tokenizer_config.json", "generation_config.json", "README.md")


@dataclass(frozen=True)
class Conversion:
    """What `convert` did. Lengths in tokens; `linked` whether the weights are the source's own files."""

    source: Path
    target: Path
    architecture: str
    layers: str
    trained_length: int
    max_length: int
    temperature: float
    linked: bool
    left_out: list[str]
    notes: list[str]
    checks: list[Check]
    engines: list[Serving]


@dataclass(frozen=True)
class _Plan:
    """What will be done, all of it known to be possible."""

    source: Path
    raw: dict
    config: object
    layers: Layers
    form: str
    length: int
    temperature: float
    qk_norm: bool
    copy: bool


def convert(
    source: str | Path,
    target: str | Path,
    *,
    max_length: int | None = None,
    layers: str | float | list[int] = "all",
    temperature: float | None = None,
    slope_by_position: float | None = None,
    qk_norm: bool = False,
    engine: str = "any",
    copy: bool = False,
    check_weights: bool = False,
) -> Conversion:
    """Drop the rotary embedding of the checkpoint `source` into the new folder `target` (DroPE, arXiv 2512.12167).

    The result is an ordinary checkpoint that stock libraries load. Dropping alone costs quality: recalibrate it.
    A checkpoint that was converted before may be converted again, for another length, temperature or engine.

    Args:
        source: folder of a checkpoint with safetensors weights (`resolve_checkpoint` finds one for a reference).
        target: folder to make; it must not exist.
        max_length: context to announce, in tokens, to engines and to the tokenizer; by default the source's.
        layers: "all"; or a list ("0,2,4-7"), a share (0.5), or an attention type ("full_attention") where the
            architecture can say it.
        temperature: factor on the attention scores, folded into the query weights (the only tensors rewritten).
        slope_by_position: save a Llama-shaped model as Ministral-3, whose scores grow with the position by this slope.
        qk_norm: save a Llama-shaped model as Qwen 3 with query and key norms of 1.
        engine: "any", or "gguf" for the form that llama.cpp's converter understands.
        copy: copy the weights instead of linking them.
        check_weights: run the checks of `check_folder` on the weights themselves, which loads them, not on a slice.

    Raises:
        UserError: anything that cannot be honoured; nothing is left under `target`.
    """
    source, target = Path(source), Path(target).expanduser()
    if not (source / "config.json").is_file():
        raise UserError(f"{source} is not a checkpoint folder: it has no config.json.")
    carried, left_out = carried_files(source)
    plan = _plan(source, max_length, layers, temperature, slope_by_position, qk_norm, engine, copy)
    with made(target) as partial:
        linked = _carry_all(plan, carried, partial)
        _edit(plan, partial)
        checks = check_folder(partial, weights=check_weights)
        failed = [str(result) for result in checks if not result.passed]
        if failed:
            raise UserError(
                f"{source} cannot be converted by configuration: its class, {_architecture(plan.raw)}, does not do "
                "what the configuration says. Nothing was written.\n  " + "\n  ".join(failed)
            )
    raw = read_json(target / "config.json")
    return Conversion(
        source=source,
        target=target,
        architecture=_architecture(raw),
        layers=raw[RECORD]["layers"],
        trained_length=raw[RECORD]["trained_length"],
        max_length=plan.length,
        temperature=raw[RECORD]["temperature"],
        linked=linked,
        left_out=left_out,
        notes=_notes(plan),
        checks=checks,
        engines=serving(raw),
    )


def _architecture(raw: dict) -> str:
    return (raw.get("architectures") or [raw["model_type"]])[0]


def resolve_checkpoint(reference: str, *, revision: str | None = None) -> Path:
    """The local folder of a model reference; a hub model is downloaded into the hub's cache (safetensors alone).

    Raises:
        UserError: the reference is wrong, or the hub cannot be reached.
    """
    from ..models import resolve_model

    found = resolve_model(reference, revision=revision)
    if found.kind != "hub":
        return Path(found.path)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*"]
    try:
        return Path(snapshot_download(found.path, revision=revision, allow_patterns=wanted))
    # an HTTP library's errors pass through the hub's client, and which library that is depends on its version
    except Exception as error:
        raise UserError(f"{reference} cannot be downloaded: {error}") from error


def _plan(source, max_length, layers, temperature, slope, qk_norm, engine, copy) -> _Plan:
    """Everything that can be refused, refused before a file is made."""
    raw = read_json(source / "config.json")
    if raw.get("auto_map"):
        raise UserError(
            f"{source} runs code of its own (auto_map), which a configuration cannot change. Not converted."
        )
    if qk_norm:
        if RECORD in raw:
            raise UserError(f"{source} is already converted; qk_norm belongs to the first conversion.")
        check_qk_norm(raw)
        raw = as_qwen3(raw)
    weight_map(source)
    config = _read_config(raw, source)
    if slope is not None:
        raw = with_temperature_by_position(raw, config, slope)
        config = _read_config(raw, source)
    text = config.get_text_config()
    _check_rope(text)
    length = text.max_position_embeddings if max_length is None else max_length
    if length < 2:
        raise UserError(f"max_length {length} is no context. Give a number of tokens.")
    if temperature is not None and not 0 < temperature < 100:
        raise UserError(f"temperature {temperature:g} is no factor on attention scores. Give one near 1, such as 1.1.")
    plan = _Plan(source, raw, config, Layers(), form_of(text.model_type), length, temperature or 1.0, qk_norm, copy)
    plan = replace(plan, layers=_kept_layers(raw, layers, config), form=_form(engine, text.model_type))
    if temperature is not None and not qk_norm:
        queries.find_queries(source, weight_map(source), config)
    return plan


def _read_config(raw: dict, source: Path):
    """As transformers reads it: not from the file, because what a conversion adds may change the class."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**{key: value for key, value in raw.items() if key != "quantization_config"})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"transformers cannot read {source}/config.json: {error}") from error


def _check_rope(text) -> None:
    for parameters in layer_ropes(text).values():
        if "mrope_section" in parameters or "mrope_interleaved" in parameters:
            raise UserError(
                f"{text.model_type}: its rotary embedding also carries where in an image a token is (mrope). Dropping it "
                "would scramble images, and no recalibration on text repairs that. Not converted."
            )


def _kept_layers(raw: dict, wanted, config) -> Layers:
    """A second conversion keeps the layers of the first unless it drops all of them."""
    if RECORD in raw and raw[RECORD]["layers"] != "all" and wanted == "all":
        wanted = raw[RECORD]["layers"]
    return choose_layers(wanted, config)


def _form(engine: str, model_type: str) -> str:
    if engine == "any":
        return form_of(model_type)
    if engine != "gguf":
        raise UserError(f"engine {engine!r} is not one of any, gguf.")
    if model_type in ("phi3", "ministral3"):
        raise UserError(
            f"llama.cpp's converter cannot say NoPE for {model_type} (its class takes no linear rope). Convert the plain "
            "model to GGUF and serve it with `--rope-scaling linear --rope-freq-scale 1e-30`."
        )
    return "linear"


def _carry_all(plan: _Plan, carried: list[str], partial: Path) -> bool:
    """Every file linked, those that will be edited kept in drope_original; returns whether weights are linked."""
    for name in carried:
        kept = name in _EDITED or name.startswith(ORIGINALS + "/") or (plan.qk_norm and name == INDEX)
        if name in _EDITED or (plan.qk_norm and name == INDEX):
            # edited below: a link would edit the source
            shutil.copy2(plan.source / name, partial / name)
        if kept:
            carry(plan.source / name, partial / ORIGINALS / name, copy=True)
        else:
            carry(plan.source / name, partial / name, copy=plan.copy)
    sample = next(name for name in carried if name.endswith(".safetensors"))
    return (partial / sample).stat().st_ino == (plan.source / sample).resolve().stat().st_ino


def _edit(plan: _Plan, partial: Path) -> None:
    """config.json, tokenizer and generation limits, norms, temperature, card, and the manifest for `undo`."""
    side = partial / ORIGINALS
    side.mkdir(exist_ok=True)
    before = {str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()}
    replaced = [str(path.relative_to(side)) for path in sorted(side.rglob("*")) if path.is_file()]
    carried = sorted(name for name in before if name not in replaced and not name.startswith(ORIGINALS + "/"))

    renamed = add_norms(partial, plan.raw, plan.temperature) if plan.qk_norm else {}
    carried = [next((new for new, old in renamed.items() if old == name), name) for name in carried]
    raw = converted(plan.raw, plan.config, form=plan.form, layers=plan.layers, length=plan.length)
    raw[RECORD]["temperature"] *= plan.temperature
    raw[RECORD]["qk_norm"] = plan.qk_norm or raw[RECORD].get("qk_norm", False)
    (partial / "config.json").unlink()
    write_json(partial / "config.json", raw)
    _raise_limits(partial, text_part(plan.raw).get("max_position_embeddings"), plan.length)
    patches = []
    if plan.temperature != 1.0 and not plan.qk_norm:
        found = queries.find_queries(partial, weight_map(partial), plan.config)
        for file in found:
            # the file may be a link to the source
            shutil.copy2(partial / file, partial / f"{file}.copy")
            (partial / f"{file}.copy").replace(partial / file)
        patches = queries.rescale(partial, found, plan.temperature, plan.config, side / queries.SAVED)
    write_card(partial, raw, serving(raw))
    manifest = {
        "carried": carried,
        "replaced": replaced,
        "renamed": renamed,
        "patches": patches,
        "headers": {name: read_header(partial / name)[1] for name in carried if name.endswith(".safetensors")},
    }
    write_json(side / MANIFEST, manifest)


def _raise_limits(folder: Path, old_length: int | None, length: int) -> None:
    """The announced length for the tokenizer, and for generation where it stood at the old limit."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        write_json(path, read_json(path) | {"model_max_length": length})
    path = folder / "generation_config.json"
    if path.is_file():
        generation = read_json(path)
        if generation.get("max_length") == old_length and old_length is not None:
            generation["max_length"] = length
        write_json(path, generation)


def _notes(plan: _Plan) -> list[str]:
    """What the user should know and cannot see."""
    text = plan.config.get_text_config()
    notes = []
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or []
    sliding = kinds.count("sliding_attention") if kinds else (text.num_hidden_layers if window else 0)
    drops_sliding = plan.layers.indices is None and (
        plan.layers.types is None or "sliding_attention" in plan.layers.types
    )
    if window and sliding and drops_sliding:
        keep = " `--layers full_attention` keeps their rotation." if len(layer_ropes(text)) > 1 else ""
        notes.append(f"{sliding} layers see a window of {window} tokens alone; they lose their rotation too.{keep}")
    if plan.qk_norm:
        notes.append(
            "the query and key norms are new and start at 1: the model computes something else until recalibrated."
        )
    if getattr(text, "rope_parameters", {}).get("llama_4_scaling_beta"):
        slope = text.rope_parameters["llama_4_scaling_beta"]
        notes.append(f"the scores grow with the position (llama_4_scaling_beta {slope:g}), on top of any temperature.")
    return notes
