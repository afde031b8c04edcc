"""The stage that drops the rotary embeddings: seconds, no training. The converted folder appears whole or not at all."""

from __future__ import annotations

import copy
import os
import shutil
from typing import TYPE_CHECKING

from eaftdrope.recipe.dump import dump_recipe
from eaftdrope.recipe.stage_sections import Drope

from ..finish import versions
from ..machine import training_device
from .chain import Stage

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PretrainedConfig


def drope_section(stage: Stage) -> Drope:
    return stage.record.drope or Drope()


def planned_config(stage: Stage, config: PretrainedConfig) -> PretrainedConfig:
    """The configuration that a stage's model will have, as far as a plan looks at it: the announced length."""
    if "drope" not in (stage.record.stages or []) or getattr(config, "drope", None):
        return config
    planned = copy.deepcopy(config)
    text = planned.get_text_config()
    text.max_position_embeddings = drope_section(stage).max_length or text.max_position_embeddings
    return planned


def show_conversion(stage: Stage, console: Console) -> None:
    """The plan of the conversion.

    Raises:
        UserError: the architecture cannot be converted as the recipe asks.
    """
    from eaftdrope.drope.layers import choose_layers
    from eaftdrope.drope.llama_shaped import check_qk_norm
    from eaftdrope.models import load_config

    model, section = stage.record.model, drope_section(stage)
    config = load_config(model.reference, revision=model.revision, trust_remote_code=model.trust_remote_code)
    text = config.get_text_config()
    layers = choose_layers(section.layers, config)
    if section.qk_norm:
        check_qk_norm(config)
    temperature = "" if section.temperature is None else f", temperature {section.temperature:g}"
    length = section.max_length or text.max_position_embeddings
    lines = [
        ("model", f"{model.reference} ({(config.architectures or [type(config).__name__])[0]})"),
        ("drops", f"the rotary embedding of layers {layers}{', adds QK-norm' if section.qk_norm else ''}{temperature}"),
        ("context", f"{length:,} tokens announced, {text.max_position_embeddings:,} before"),
        ("writes", f"{stage.folder.path}/"),
    ]
    console.print(f"\n{stage.heading}\n", highlight=False, markup=False)
    for name, line in lines:
        console.print(f"{name:13} {line}", highlight=False, markup=False, soft_wrap=True)


def convert_stage(stage: Stage, console: Console) -> None:
    """Converts on the main process; the others wait.

    Raises:
        UserError: the model has no safetensors weights, or it cannot be converted as the recipe asks.
    """
    # not before all of them have seen what is to be done: a slow one would find the stage finished, and not come here
    wait_for_everyone()
    if int(os.environ.get("RANK", "0")) == 0:
        _convert(stage, console)
    wait_for_everyone()


def wait_for_everyone() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=training_device().kind == "cpu").wait_for_everyone()


def _convert(stage: Stage, console: Console) -> None:
    from eaftdrope.drope import convert, resolve_checkpoint

    model, section = stage.record.model, drope_section(stage)
    console.print(f"\n{stage.heading}", highlight=False, markup=False)
    source = resolve_checkpoint(model.reference, revision=model.revision)
    making = stage.folder.path.with_name(f".{stage.folder.path.name}.making")
    # what a start left that was killed while it converted
    shutil.rmtree(making, ignore_errors=True)
    made = making / stage.folder.path.name
    making.mkdir(parents=True)
    conversion = convert(
        source,
        made,
        max_length=section.max_length,
        layers=section.layers,
        temperature=section.temperature,
        qk_norm=section.qk_norm,
    )
    for line in (*map(str, conversion.checks), *conversion.notes):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for later in stage.later:
        later.discard()
    stage.folder.take(made, dump_recipe(stage.record, folder=stage.folder.path), versions())
    making.rmdir()
