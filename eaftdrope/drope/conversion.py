"""`convert`: a checkpoint without rotary embedding, by its configuration only.

    SRC -> DST.partial: weights linked, config.json, tokenizer and generation limits edited -> checked -> renamed to DST

Nothing stands under DST before it is whole and checked. What was replaced is kept in DST/drope_original, for `undo`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.files import honour_umask

from . import queries
from .by_position import with_temperature_by_position
from .card import write_card
from .check import Check, check_folder, configs, parameters
from .checkpoint import (
    INDEX,
    MANIFEST,
    ORIGINALS,
    carried_files,
    carry,
    made,
    outside,
    read_header,
    read_json,
    weight_map,
    write_json,
)
from .config import RECORD, check_record, converted
from .engines import Serving, serving
from .folding import check_folding
from .inherited import has_factor, inherited_temperature
from .layers import Layers, choose_layers
from .published_code import without_published_code
from .qk_norm import add_norms, as_qwen3, check_qk_norm
from .reading import read_config, text_part
from .rope import check_known, form_of, layer_ropes
from .slices import small_pair

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
    notes: tuple[str, ...] = ()


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
        temperature: factor on the attention scores, folded into the query weights (the only tensors rewritten). By default
            the one that the source's own rotary embedding came with (YaRN, LongRoPE), else 1.
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
    outside(target, source)
    carried, left_out = carried_files(source)
    plan = _plan(source, max_length, layers, temperature, slope_by_position, qk_norm, engine, copy)
    with made(target) as partial:
        linked = _carry_all(plan, carried, partial)
        notes = _notes(plan) + _edit(plan, partial)
        # what is the source's own (a link) stays as it is
        honour_umask(partial)
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
        notes=notes,
        checks=checks,
        engines=serving(raw),
    )


def _architecture(raw: dict) -> str:
    return (raw.get("architectures") or [raw["model_type"]])[0]


def resolve_checkpoint(reference: str, *, revision: str | None = None) -> Path:
    """The local folder of a model reference; a hub model is downloaded into the hub's cache (only safetensors).

    Raises:
        UserError: the reference is wrong, or the hub cannot be reached.
    """
    from eaftdrope.models import resolve_model

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
    raw, notes = without_published_code(read_json(source / "config.json"), source)
    weight_map(source)
    check_record(raw, source / "config.json")
    config = read_config(raw, source / "config.json")
    _check_rope(config.get_text_config(), is_multimodal="text_config" in raw)
    if max_length is not None and max_length < 2:
        raise UserError(f"max_length {max_length} is no context. Give a number of tokens.")
    if temperature is not None and not 0 < temperature < 100:
        raise UserError(f"temperature {temperature:g} is no factor on attention scores. Give one near 1, such as 1.1.")
    if qk_norm:
        if RECORD in raw:
            raise UserError(f"{source} is already converted; qk_norm belongs to the first conversion.")
        check_qk_norm(config)
        raw = as_qwen3(raw, config)
        config = read_config(raw, source / "config.json")
    if slope is not None:
        raw = with_temperature_by_position(raw, config, slope)
        config = read_config(raw, source / "config.json")
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) if max_length is None else max_length
    if length is None or length < 2:
        found = f"a length of {length}" if length is not None else "no length"
        raise UserError(f"{source / 'config.json'} announces {found} (max_position_embeddings). Correct it there.")
    form = _form(engine, text.model_type)
    plan = _Plan(source, raw, config, _kept_layers(raw, layers, config), form, length, 1.0, qk_norm, copy, tuple(notes))
    return _with_temperature(plan, temperature)


def _with_temperature(plan: _Plan, wanted: float | None) -> _Plan:
    """The plan with the temperature asked for, or the one that comes with the source's rotary embedding; measured."""
    inherits = has_factor(plan.config) and RECORD not in plan.raw
    if plan.qk_norm and not inherits:
        return replace(plan, temperature=wanted or 1.0)
    if wanted is None and not inherits:
        return plan
    if wanted is not None:
        _check_unquantised(plan.raw)
    new, old = configs(_converted(plan), plan.source / "config.json")
    new, old = small_pair(new.get_text_config(), old.get_text_config(), parameters(plan.source))
    factor, uniform = inherited_temperature(new, old) if inherits else (1.0, True)
    kind = f"the source's rotary embedding came with a temperature of up to {factor:.4g} on the scores"
    if wanted is not None or plan.qk_norm or not uniform:
        if factor != 1.0:
            why = "on some of a head's dimensions only" if not uniform else "which is not in the weights"
            advice = f" --temperature {factor:.6g} folds it in." if uniform and wanted is None else ""
            plan = replace(plan, notes=(*plan.notes, f"{kind}, {why}.{advice}"))
        if wanted is not None and not plan.qk_norm:
            _check_folding(plan, new, wanted)
        return replace(plan, temperature=wanted or 1.0)
    if factor == 1.0:
        return plan
    try:
        _check_unquantised(plan.raw)
        _check_folding(plan, new, factor)
    except UserError as error:
        return replace(plan, notes=(*plan.notes, f"{kind}, which is lost: {error}"))
    note = f"{kind}; it is kept, folded into the query weights (--temperature 1 leaves it out)."
    return replace(plan, temperature=factor, notes=(*plan.notes, note))


def _check_folding(plan: _Plan, small, beta: float) -> None:
    found = queries.find_queries(plan.source, weight_map(plan.source), plan.config)
    names = [name for tensors in found.values() for name in tensors]
    if beta != 1.0:
        check_folding(small, names, beta, plan.config.get_text_config())


def _check_unquantised(raw: dict) -> None:
    packed = raw.get("quantization_config") or text_part(raw).get("quantization_config")
    if packed:
        kind = packed.get("quant_method", "unknown") if isinstance(packed, dict) else "unknown"
        raise UserError(
            f"the source is quantised ({kind}), and a temperature cannot be folded into quantised weights. Convert the model "
            "before it is quantised, or leave the temperature out."
        )


def _converted(plan: _Plan) -> dict:
    raw = converted(plan.raw, plan.config, form=plan.form, layers=plan.layers, length=plan.length)
    raw[RECORD]["temperature"] *= plan.temperature
    raw[RECORD]["qk_norm"] = plan.qk_norm or raw[RECORD].get("qk_norm", False)
    return raw


def _check_rope(text, *, is_multimodal: bool) -> None:
    for rope in layer_ropes(text).values():
        check_known(rope, text.model_type)
        by_default = is_multimodal and "mrope_section" in (text.ignore_keys_at_rope_validation or ())
        if by_default or "mrope_section" in rope or "mrope_interleaved" in rope:
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
    if model_type in ("phi3", "phimoe", "ministral3"):
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


def _edit(plan: _Plan, partial: Path) -> list[str]:
    """config.json, tokenizer and generation limits, norms, temperature, card, and the manifest for `undo`; gives notes."""
    side = partial / ORIGINALS
    side.mkdir(exist_ok=True)
    before = {str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()}
    replaced = [str(path.relative_to(side)) for path in sorted(side.rglob("*")) if path.is_file()]
    carried = sorted(name for name in before if name not in replaced and not name.startswith(ORIGINALS + "/"))

    text = plan.config.get_text_config()
    renamed = add_norms(partial, text.num_hidden_layers, text.head_dim, plan.temperature) if plan.qk_norm else {}
    carried = [next((new for new, old in renamed.items() if old == name), name) for name in carried]
    raw = _converted(plan)
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
    notes = write_card(partial, raw, serving(raw))
    manifest = {
        "carried": carried,
        "replaced": replaced,
        "renamed": renamed,
        "patches": patches,
        "headers": {name: read_header(partial / name)[1] for name in carried if name.endswith(".safetensors")},
    }
    write_json(side / MANIFEST, manifest)
    return notes


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
    notes = list(plan.notes)
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
