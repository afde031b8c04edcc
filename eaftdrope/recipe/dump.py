"""From a Recipe back to YAML: the resolved recipe of a run."""

from __future__ import annotations

import os
from pathlib import Path

from .schema import Recipe
from .serve_section import Serve
from .stage_sections import STAGE_SECTIONS
from .yaml_lines import write_yaml


def dump_recipe(recipe: Recipe, *, folder: str | Path | None = None) -> str:
    """The recipe as YAML with every default written out; `load_recipe` reads it back to an equal Recipe.

    Args:
        folder: where the text will be saved. Local files are then relative to it, so that the recipe works from there and
            contains no absolute path.
    """
    data = recipe.model_dump(mode="json", exclude_none=True)
    if recipe.stages and "eaft" not in recipe.stages:
        # defaults of a stage that the recipe does not have
        for section in STAGE_SECTIONS["eaft"]:
            data.pop(section, None)
    if folder is not None:
        _make_relative(data, Path(folder))
    return write_yaml(data)


def dump_serve(section: Serve) -> str:
    """The section `serve` as YAML of its own, with every default written out."""
    return write_yaml(section.model_dump(mode="json", exclude_none=True))


def _make_relative(data: dict, folder: Path) -> None:
    def relative(path: str) -> str:
        return os.path.relpath(path, folder) if os.path.exists(path) else path

    data["model"]["reference"] = relative(data["model"]["reference"])
    recovery = data.get("recalibrate", {}).get("recovery", {})
    if "original" in recovery:
        recovery["original"] = relative(recovery["original"])
    if "files" in recovery:
        recovery["files"] = [relative(path) for path in recovery["files"]]
    for training in (data, *(data.get(stage, {}) for stage in ("pretrain", "recalibrate", "ttt"))):
        rows = training.get("data", {})
        for sources in (rows.get("train", []), rows.get("held_out")):
            for source in sources if isinstance(sources, list) else []:
                source["path"] = relative(source["path"])
        replay = rows.get("replay", {})
        for key in ("from", "prompts"):
            if replay.get(key, "model") != "model":
                replay[key] = relative(replay[key])
        probes = training.get("probes", {})
        for options in (
            o for group in ("target", "general") for probe in probes.get(group, []) for o in probe.values()
        ):
            if "files" in options:
                options["files"] = [relative(path) for path in options["files"]]
            if "file" in options:
                options["file"] = relative(options["file"])
