"""`convert` and `undo`: a checkpoint without rotary embedding, by its configuration only, and the way back.

    SRC -> .DST.partial: weights linked, config.json, tokenizer and generation limits edited -> checked -> renamed to DST

Nothing exists under DST before it is complete and checked. What was replaced is kept in DST/drope_original, for `undo`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from eaftdrope.errors import UserError
from eaftdrope.files import honour_umask
from eaftdrope.models import resolve_model

from . import query_weights
from .card import write_card
from .check import Check, check_folder
from .checkpoint import (
    INDEX,
    MANIFEST,
    ORIGINALS,
    carried_files,
    check_outside,
    link_or_copy,
    new_checkpoint,
    read_header,
    read_json,
    weight_map,
    write_json,
)
from .config import RECORD, text_part
from .conversion_plan import ConversionOptions, ConversionPlan, plan_conversion
from .engines import Serving, serving
from .llama_shaped import add_norms

_EDITED = ("config.json", "tokenizer_config.json", "generation_config.json", "README.md")


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`.

    Attributes:
        source, target (`Path`): the checkpoints.
        architecture (`str`): the class of the new one.
        layers (`str`): the layers without rotation, as in the record.
        trained_length, max_length (`int`): in tokens; the second is announced.
        temperature (`float`): folded into the query weights.
        linked (`bool`): the weights are the source's own files.
        left_out (`list[str]`): weight files in other formats that were not carried over.
        notes (`list[str]`): what the user should read.
        checks (`list[Check]`): all passed.
        engines (`list[Serving]`): which engines serve it.
    """

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
        source (`str` or `Path`): folder of a checkpoint with safetensors weights (`resolve_checkpoint` finds one for a
            reference).
        target (`str` or `Path`): folder to create; it must not exist.
        max_length (`int`, *optional*): context to announce, in tokens, to engines and to the tokenizer; by default the
            source's.
        layers (`str`, `float` or `list[int]`): "all"; or a list ("0,2,4-7"), a share (0.5), or an attention type
            ("full_attention") if the architecture can express it.
        temperature (`float`, *optional*): factor on the attention scores, folded into the query weights (the only tensors
            rewritten). By default the one that the source's own rotary embedding came with (YaRN, LongRoPE), else 1.
        slope_by_position (`float`, *optional*): save a Llama-shaped model as Ministral-3, whose scores grow with the
            position by this slope.
        qk_norm (`bool`): save a Llama-shaped model as Qwen 3 with query and key norms of 1.
        engine (`str`): "any", or "gguf" for the form that llama.cpp's converter understands.
        copy (`bool`): copy the weights instead of linking them.
        check_weights (`bool`): run the checks of `check_folder` on the weights themselves, which loads them, not on a
            slice.

    Returns:
        A `Conversion`.

    Raises:
        UserError: anything that cannot be honoured; nothing is left under `target`.
    """
    options = ConversionOptions(
        max_length, layers, temperature, slope_by_position, qk_norm, engine, copy, check_weights
    )
    return _convert(Path(source), Path(target).expanduser(), options)


def _convert(source: Path, target: Path, options: ConversionOptions) -> Conversion:
    if not (source / "config.json").is_file():
        raise UserError(f"{source} is not a checkpoint folder: it has no config.json.")
    check_outside(target, source)
    carried, left_out = carried_files(source)
    plan = plan_conversion(source, options)
    with new_checkpoint(target) as partial:
        linked = _carry_files(plan, carried, partial, copy=options.copy)
        card_notes = _edit_files(plan, partial)
        # links to the source's files stay as they are
        honour_umask(partial)
        checks = check_folder(partial, weights=options.check_weights)
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
        notes=[*plan.notes, *card_notes],
        checks=checks,
        engines=serving(raw),
    )


def undo(folder: str | Path, target: str | Path, *, copy: bool = False) -> Path:
    """Create `target` from the converted checkpoint `folder`: every file as the conversion found it, bit for bit.

    Args:
        folder (`str` or `Path`): a folder written by `convert`.
        target (`str` or `Path`): folder to create; it must not exist.
        copy (`bool`): copy the weights instead of linking them.

    Raises:
        UserError: `folder` was not written by `convert`, or its weight files are no longer those of the conversion.
    """
    folder, target = Path(folder), Path(target).expanduser()
    kept = folder / ORIGINALS
    if not (kept / MANIFEST).is_file():
        raise UserError(f"{folder} cannot be undone: it has no {ORIGINALS}/{MANIFEST}, so `convert` did not write it.")
    manifest = read_json(kept / MANIFEST)
    whole = {"headers": dict, "patches": list, "carried": list, "replaced": list, "renamed": dict}
    if not all(isinstance(manifest.get(key), kind) for key, kind in whole.items()):
        raise UserError(
            f"{folder} cannot be undone: {kept / MANIFEST} is incomplete. Convert the source again instead."
        )
    check_outside(target, folder)
    for name, header in manifest["headers"].items():
        if not (folder / name).is_file() or read_header(folder / name)[1] != header:
            raise UserError(
                f"{folder} cannot be undone: {name} is not the file that the conversion wrote (the model was saved "
                "again, or quantised). Convert the source again instead."
            )
    patched = {patch[0] for patch in manifest["patches"]}
    with new_checkpoint(target) as partial:
        for name in manifest["carried"]:
            link_or_copy(folder / name, partial / manifest["renamed"].get(name, name), copy=copy or name in patched)
        for name in manifest["replaced"]:
            link_or_copy(kept / name, partial / name, copy=copy)
        patches = [query_weights.Patch(manifest["renamed"].get(p[0], p[0]), p[1], p[2]) for p in manifest["patches"]]
        if patches:
            query_weights.restore(partial, patches, kept / query_weights.SAVED)
    return target


def resolve_checkpoint(reference: str, *, revision: str | None = None) -> Path:
    """Return the local folder of a model reference; a hub model is downloaded into the hub's cache (only safetensors).

    Raises:
        UserError: the reference is wrong, or the hub cannot be reached.
    """
    found = resolve_model(reference, revision=revision)
    if found.kind != "hub":
        return Path(found.path)
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*"]
    try:
        return Path(snapshot_download(found.path, revision=revision, allow_patterns=wanted))
    # the hub's client passes on the errors of an HTTP library, which depends on its version
    except Exception as error:
        raise UserError(f"{reference} cannot be downloaded: {error}") from error


def _architecture(raw: dict[str, Any]) -> str:
    return (raw.get("architectures") or [raw["model_type"]])[0]


def _carry_files(plan: ConversionPlan, carried: list[str], partial: Path, *, copy: bool) -> bool:
    """Link every file, and keep those that will be edited in drope_original; return whether the weights are linked."""
    for name in carried:
        is_edited = name in _EDITED or (plan.qk_norm and name == INDEX)
        if is_edited:
            # edited below: a link would edit the source
            shutil.copy2(plan.source / name, partial / name)
        if is_edited or name.startswith(ORIGINALS + "/"):
            link_or_copy(plan.source / name, partial / ORIGINALS / name, copy=True)
        else:
            link_or_copy(plan.source / name, partial / name, copy=copy)
    sample = next(name for name in carried if name.endswith(".safetensors"))
    return (partial / sample).stat().st_ino == (plan.source / sample).resolve().stat().st_ino


def _edit_files(plan: ConversionPlan, partial: Path) -> list[str]:
    """Write config.json, limits, norms, temperature, card, and the manifest for `undo`; return notes about the card."""
    side = partial / ORIGINALS
    side.mkdir(exist_ok=True)
    present = {str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()}
    replaced = [str(path.relative_to(side)) for path in sorted(side.rglob("*")) if path.is_file()]
    carried = sorted(name for name in present if name not in replaced and not name.startswith(ORIGINALS + "/"))

    # configuration
    text = plan.config.get_text_config()
    renamed = add_norms(partial, text.num_hidden_layers, text.head_dim, plan.temperature) if plan.qk_norm else {}
    carried = [next((new for new, old in renamed.items() if old == name), name) for name in carried]
    raw = plan.new_config()
    write_json(partial / "config.json", raw)
    _raise_limits(partial, text_part(plan.raw).get("max_position_embeddings"), plan.length)

    # query weights
    patches = []
    if plan.temperature != 1.0 and not plan.qk_norm:
        found = query_weights.find_queries(partial, weight_map(partial), plan.config)
        for file in found:
            # the file may be a link to the source
            shutil.copy2(partial / file, partial / f"{file}.copy")
            (partial / f"{file}.copy").replace(partial / file)
        patches = query_weights.rescale(partial, found, plan.temperature, plan.config, side / query_weights.SAVED)

    # model card and manifest
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
    """Write the announced length for the tokenizer, and for generation if its limit was the old one."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        write_json(path, read_json(path) | {"model_max_length": length})
    path = folder / "generation_config.json"
    if path.is_file():
        generation = read_json(path)
        if generation.get("max_length") == old_length and old_length is not None:
            generation["max_length"] = length
        write_json(path, generation)
