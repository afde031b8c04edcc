"""What a recipe will do, told before anything is loaded: parameters, tokens, steps, memory, files.

The model is built on torch's meta device from its configuration, so parameters (and the adapters', attached by peft
itself) are counted exactly and no weight is read.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError
from eaftdrope.recipe.stage_sections import TextData

from . import memory
from .limits import check_positions, context_notes, room_notes
from .lora import freeze_beside_the_text, lora_config
from .machine import Device, gib, precision_line, slow_in_bfloat16, training_device, weights_dtype
from .memory import Fit, fit_lines, fits
from .stages.chain import tokens_of_a_step

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn
    from transformers import PretrainedConfig

    from eaftdrope.recipe.schema import Lora, Recipe


@dataclass(frozen=True)
class DataStats:
    """What is known about the training rows once they have been read; tokens are after truncation."""

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Plan:
    """A run in numbers. Counts of tokens and steps are None where the data is not known yet; `memory` is a device's.

    `tokens_per_step` counts all processes, and is the most it can be when `data` is None."""

    model: str
    architecture: str
    parameters: int
    trained_parameters: int
    method: str
    gate: str
    precision: str
    processes: int
    rows_per_step: int
    tokens_per_step: int
    steps: int | None
    data: DataStats | None
    memory: memory.Memory
    device: Device
    gpus: tuple[Fit, ...]
    folder: str
    files: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether the estimate is below the device's memory; None when that is not known."""
        return None if self.device.memory is None else self.memory.total <= self.device.memory


def make_plan(
    recipe: Recipe,
    config: PretrainedConfig,
    data: DataStats | None = None,
    *,
    autocast: bool,
    device: Device | None = None,
    longest: int = 0,
) -> Plan:
    """The plan of `recipe` for a model of this configuration.

    Args:
        data: statistics of the training rows, where they are known: steps and tokens are then exact.
        autocast: whether the run computes in bfloat16 under autocast.
        device: what to compare the memory with; the device that training takes by default.
        longest: tokens of the longest row, where the rows are known.

    Raises:
        UserError: peft puts no such adapter on the model, or a row is longer than the positions that the model has learned.
    """
    device = device or training_device()
    model = meta_model(recipe, config, device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows = recipe.train.batch_size * recipe.train.accumulation * processes
    mean = min(recipe.data.max_length, data.tokens / max(1, data.rows)) if data else recipe.data.max_length
    if recipe.data.packing:
        mean = recipe.data.max_length
    lora = recipe.lora
    if not recipe.data.packing:
        check_positions(model, config, longest)
    estimated = memory.estimate(recipe, config, model, device=device.kind, autocast=autocast)
    return Plan(
        model=recipe.model.reference,
        architecture=(config.architectures or [type(config).__name__])[0],
        parameters=sum(p.numel() for n, p in model.named_parameters() if not _is_adapter(n)),
        trained_parameters=trained,
        method=f"LoRA r {lora.r}, alpha {lora.alpha:g}" if lora else "full fine-tune",
        gate=_gate(recipe),
        precision=precision_line(recipe, autocast, device),
        processes=processes,
        rows_per_step=rows,
        tokens_per_step=round(rows * mean),
        steps=recipe.train.steps or (steps_of(recipe, data, processes) if data else None),
        data=data,
        memory=estimated,
        device=device,
        gpus=fits(recipe, config, model, autocast=autocast or recipe.train.precision == "auto"),
        folder=recipe.output.dir,
        files=_files(recipe, model, estimated.optimizer),
        notes=(
            *context_notes(recipe, config, longest),
            *_notes(recipe, config, data, estimated, device),
            *room_notes(recipe, config, model),
        ),
    )


def meta_model(recipe: Recipe, config: PretrainedConfig, device: Device | None = None) -> nn.Module:
    """The model of the recipe on the meta device, with its adapters and with `requires_grad` as in training; in the types
    of a training on `device`."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, weights_dtype(recipe, device), None) or config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=recipe.model.trust_remote_code)
        freeze_beside_the_text(model)
        if recipe.lora:
            from peft import get_peft_model

            with warnings.catch_warnings():
                # peft asks transformers by a deprecated name; nothing the user could change
                warnings.simplefilter("ignore", FutureWarning)
                try:
                    model = get_peft_model(model, lora_config(recipe.lora, model))
                except ValueError as error:
                    raise UserError(_no_adapter(recipe.lora, str(error))) from error
    return model


def _no_adapter(lora: Lora, problem: str) -> str:
    """Why peft puts no adapter on a model, and what to do about it."""
    if "lora_dropout" in problem and lora.dropout:
        return f"lora.dropout: {problem} Set it to 0, or name lora.target_modules without the experts."
    return f"lora.target_modules: {problem} Name modules of the model, or leave the key out for all-linear."


def steps_of(recipe: Recipe, data: DataStats, processes: int) -> int:
    """Optimiser steps of the run's epochs, counted as transformers' Trainer counts them: a last, smaller batch and a
    last, shorter accumulation make a step too."""
    rows = data.rows
    if recipe.data.packing:
        rows = math.ceil(data.tokens / recipe.data.max_length)
    batches = math.ceil(math.ceil(rows / processes) / recipe.train.batch_size)
    an_epoch = max(1, math.ceil(batches / recipe.train.accumulation))
    return math.ceil(recipe.train.epochs * an_epoch)


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def _gate(recipe: Recipe) -> str:
    options = ", ".join(f"{name} {value}" for name, value in recipe.loss.gate_kwargs().items())
    loss = recipe.loss
    tail = ", sparse tail" if loss.tail == "sparse" else ""
    skipped = f", gates below {loss.gate_threshold:g} left out" if loss.gate_threshold else ""
    return loss.gate + (f" ({options})" if options else "") + tail + skipped


def _files(recipe: Recipe, model: nn.Module, optimizer: int) -> tuple[tuple[str, str], ...]:
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if not _is_adapter(n))
    checkpoint = weights + optimizer
    files = [
        ("the adapters" if recipe.lora else "the model's weights", f"about {gib(weights)}"),
        ("tokenizer with its chat template, model card, resolved recipe, metrics.jsonl", "small"),
        (
            f"checkpoints every {recipe.train.save_every} steps, {recipe.train.keep_checkpoints} kept",
            f"about {gib(checkpoint)} each",
        ),
    ]
    if recipe.output.merge:
        files.append(("the merged model", f"about {gib(whole)}"))
    return tuple(files)


def _notes(recipe: Recipe, config: PretrainedConfig, data: DataStats | None, estimated, device: Device):
    if isinstance(recipe.data, TextData):
        yield from _text_notes(recipe, data)
    if data and data.truncated:
        yield f"{data.truncated} of {data.rows} rows ({data.truncated / data.rows:.0%}) are cut at data.max_length."
    chosen = weights_dtype(recipe, device)
    weights = str(config.dtype).removeprefix("torch.") if chosen == "auto" else chosen
    if device.kind == "cpu" and "bfloat16" in (weights, recipe.train.precision) and slow_in_bfloat16():
        yield (
            "This processor has no bfloat16 instructions and is several times as slow in it as in float32: "
            "model.dtype=fast train.precision=auto."
        )
    if device.memory is not None and estimated.total > device.memory:
        ways = ["a smaller train.batch_size (raise train.accumulation as much)", "a smaller data.max_length"]
        if not recipe.train.gradient_checkpointing:
            ways.insert(0, "train.gradient_checkpointing: true")
        if not recipe.lora:
            ways.append("lora")
        yield (
            f"It will probably not fit: {gib(estimated.total)} needed, {device.name} has {gib(device.memory)}. "
            f"Ways out: {', '.join(ways)}."
        )


def _text_notes(recipe: Recipe, data: DataStats | None):
    train, text = recipe.train, recipe.data
    if data and train.steps:
        passes = train.steps * tokens_of_a_step(recipe) / data.tokens
        if passes > 1.05:
            yield f"The text is read {passes:.1f} times to make up the tokens: more text would do better."
    if text.documents == "separate" and train.batch_size > 1 and "flash" not in str(recipe.model.attn_implementation):
        yield (
            "documents separate puts a batch in one row. Without flash attention that costs batch_size times the "
            f"attention: batch_size=1 accumulation={train.batch_size * train.accumulation} is the same training for less."
        )


# Rendering


def plan_lines(plan: Plan) -> list[tuple[str, str]]:
    """The plan as (name, text) lines."""
    share = plan.trained_parameters / plan.parameters
    most = "" if plan.data else "at most "
    lines = [
        ("model", f"{plan.model} ({plan.architecture}, {plan.parameters:,} parameters)"),
        ("trained", f"{plan.trained_parameters:,} parameters ({share:.2%}), {plan.method}"),
        ("loss", f"gate {plan.gate}"),
        ("precision", plan.precision),
    ]
    if plan.data:
        d = plan.data
        lines.append(
            (
                "data",
                f"{d.rows:,} rows, {d.tokens:,} tokens, {d.trained_tokens:,} of them trained "
                f"({d.trained_tokens / max(1, d.tokens):.0%}), {d.truncated} rows cut, {d.skipped} skipped",
            )
        )
    lines.append(("a step", f"{plan.rows_per_step} rows, {most}{plan.tokens_per_step:,} tokens"))
    if plan.steps is None:
        lines.append(("steps", "known once the data has been read"))
    else:
        lines.append(("steps", f"{plan.steps:,}, {most}{plan.steps * plan.tokens_per_step:,} tokens"))
    m = plan.memory
    lines += [
        ("memory", f"about {gib(m.total)} on {plan.device.name}" + _of(plan)),
        ("  weights", gib(m.weights)),
        ("  gradients", gib(m.gradients)),
        ("  optimizer", gib(m.optimizer)),
        ("  activations", f"{gib(m.activations)} (when every row has the full length)"),
        ("  loss tile", gib(m.loss_tile)),
    ]
    table = fit_lines(plan.gpus)
    lines += [("fits on", table[0]), *(("", line) for line in table[1:])]
    lines.append(("writes", f"{plan.folder}/"))
    lines += [("", f"{what}: {size}") for what, size in plan.files]
    lines += [("note", note) for note in plan.notes]
    return lines


def plan_text(plan: Plan) -> str:
    """The plan as plain lines, for logs and pipes."""
    return "\n".join(f"{name:13} {text}" for name, text in plan_lines(plan))


def plan_table(plan: Plan) -> RenderableType:
    """The plan as a rich table, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Plan", show_header=False, box=None, pad_edge=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in plan_lines(plan):
        table.add_row(name, Text(text, style="yellow" if name == "note" else ""))
    return table


def _of(plan: Plan) -> str:
    return f", which has {gib(plan.device.memory)}" if plan.device.memory else ""
