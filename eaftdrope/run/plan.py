"""The plan of a training, before anything is loaded: parameters, tokens, steps, memory, files.

The model is built on torch's meta device from its configuration, so parameters (and the adapters', attached by peft
itself) are counted exactly and no weight is read.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from eaftdrope.errors import UserError
from eaftdrope.recipe.schema import Model
from eaftdrope.recipe.training_sections import Lora, Loss
from eaftdrope.ttt import TTTConfig, apply_ttt
from eaftdrope.ttt.fast_mlps import ATTRIBUTE, fast_mlps

from . import limits
from .degrees import Degrees
from .fast_weights import FastWeights
from .lora import freeze_non_text_modules, lora_config
from .machine import Device, format_bytes, precision_line, training_device, weights_dtype
from .memory import Fit, Memory, estimate, fast_weights_of, fit_lines, fits, on_each_device
from .record import DataStats
from .settings import TrainingSettings

Lines = list[tuple[str, str]]
"""A plan as (name, text) lines."""


@dataclass(frozen=True)
class StagePlan:
    """A training in numbers. Tokens and steps are None where the data has not been read; `memory` is per device.

    `tokens_per_step` counts all data-parallel ranks, and is an upper bound where `data` is None."""

    model: str
    architecture: str
    parameters: int
    trained_parameters: int
    method: str
    gate: str
    anchor: str | None
    precision: str
    degrees: Degrees
    rows_per_step: int
    tokens_per_step: int
    steps: int | None
    data: DataStats | None
    memory: Memory
    device: Device
    gpus: tuple[Fit, ...]
    folder: str
    files: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    reading: FastWeights | None = None

    @property
    def fits(self) -> bool | None:
        """True if the estimate is below the device's memory; None if that is unknown."""
        return None if self.device.memory is None else self.memory.total <= self.device.memory


def make_plan(
    settings: TrainingSettings,
    config: PretrainedConfig,
    data: DataStats | None = None,
    *,
    autocast: bool,
    device: Device | None = None,
    longest: int = 0,
) -> StagePlan:
    """The plan of a training for a model of this configuration.

    Args:
        data: counts of the training rows, where they have been read: steps and tokens are then exact.
        autocast: the arithmetic is bfloat16 autocast.
        device: the device to compare the memory with, by default the one that training uses.
        longest: tokens of the longest row, where the rows have been read.

    Raises:
        UserError: peft cannot put such an adapter on the model, a row is longer than its table of positions, or the model
            cannot learn as it reads with these settings.
    """
    limits.check_sink(settings, config)
    device = device or training_device()
    train, lora, degrees = settings.train, settings.lora, Degrees.present()
    model = meta_model(settings.model, lora, config, device, settings.ttt)
    rows = train.batch_size * train.accumulation * degrees.ranks
    mean = min(settings.max_length, data.tokens / max(1, data.rows)) if data else settings.max_length
    if settings.packing:
        mean = settings.max_length
    else:
        limits.check_positions(model, config, longest)
    whole = estimate(settings, config, model, device=device.kind, autocast=autocast)
    memory = on_each_device(whole, model, degrees, autocast=autocast)
    reading = fast_weights_of(settings, config, model, autocast=autocast)
    return StagePlan(
        model=settings.model.reference,
        architecture=architecture(config),
        parameters=sum(p.numel() for n, p in model.named_parameters() if not _is_added(n)),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        method=f"LoRA r {lora.r}, alpha {lora.alpha:g}" if lora else "full fine-tune",
        gate=_gate(settings.loss),
        anchor=_anchor(settings),
        precision=precision_line(settings.model.dtype, autocast, device),
        degrees=degrees,
        rows_per_step=rows,
        tokens_per_step=round(rows * mean),
        steps=train.steps or (steps_of(settings, data, degrees.ranks) if data else None),
        data=data,
        memory=memory,
        device=device,
        gpus=fits(settings, config, model, autocast=autocast or train.precision == "auto"),
        folder=settings.folder,
        files=_files(settings, model, whole.optimizer),
        notes=tuple(limits.notes(settings, config, model, data, memory, device, longest)),
        reading=reading,
    )


def architecture(config: PretrainedConfig) -> str:
    """The name of the model's class."""
    return (config.architectures or [type(config).__name__])[0]


def meta_model(
    section: Model,
    lora: Lora | None,
    config: PretrainedConfig,
    device: Device | None = None,
    ttt: TTTConfig | None = None,
) -> PreTrainedModel:
    """The model on the meta device, with its adapters and fast MLPs, and with the types and `requires_grad` of a training
    on `device`."""
    dtype = getattr(torch, weights_dtype(section.dtype, device), None) or config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=section.trust_remote_code)
        freeze_non_text_modules(model)
        if ttt:
            apply_ttt(model, ttt)
        if lora:
            from peft import get_peft_model

            with warnings.catch_warnings():
                # peft calls transformers by a deprecated name; nothing that the user could change
                warnings.simplefilter("ignore", FutureWarning)
                try:
                    model = get_peft_model(model, lora_config(lora, model))
                except ValueError as error:
                    raise UserError(_no_adapter(lora, str(error))) from error
            if ttt:
                fast_mlps(model).requires_grad_(True)
    return model


def _no_adapter(lora: Lora, problem: str) -> str:
    """The reason why peft cannot adapt a model, with the way out."""
    if "lora_dropout" in problem and lora.dropout:
        return f"lora.dropout: {problem} Set it to 0, or set lora.target_modules without the experts."
    return f"lora.target_modules: {problem} Use modules of the model, or leave the key out for all-linear."


def steps_of(settings: TrainingSettings, data: DataStats, ranks: int) -> int:
    """Optimiser steps of the epochs on so many data-parallel ranks, counted as transformers' Trainer counts them.

    A last, smaller batch and a last, shorter accumulation are a step too.
    """
    return steps_of_rows(
        settings, math.ceil(data.tokens / settings.max_length) if settings.packing else data.rows, ranks
    )


def steps_of_rows(settings: TrainingSettings, rows: int, ranks: int) -> int:
    """As `steps_of`, of a number of rows as the trainer has them, which are packed already."""
    train = settings.train
    if train.steps:
        return train.steps
    assert train.epochs is not None, "a training has steps or epochs"
    batches = math.ceil(math.ceil(rows / ranks) / train.batch_size)
    per_epoch = max(1, math.ceil(batches / train.accumulation))
    return math.ceil(train.epochs * per_epoch)


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def _is_added(name: str) -> bool:
    return _is_adapter(name) or ATTRIBUTE in name.split(".")


def _gate(loss: Loss) -> str:
    options = ", ".join(f"{name} {value}" for name, value in loss.gate_kwargs().items())
    tail = ", sparse tail" if loss.tail == "sparse" else ""
    skipped = f", gates below {loss.gate_threshold:g} left out" if loss.gate_threshold else ""
    exempt = f", not on {', '.join(map(repr, loss.exempt))}" if loss.exempt else ""
    return loss.gate + (f" ({options})" if options else "") + exempt + tail + skipped


def _anchor(settings: TrainingSettings) -> str | None:
    """The anchor of the loss and what it costs."""
    if settings.anchor is None:
        return None
    frozen = settings.lora is not None and not settings.lora.modules_to_save
    products = "3 products with the head instead of 2" if frozen else "4 products with the head instead of 3"
    base = "a second copy of the model" if settings.needs_second_model else "the model without its adapters"
    return f"{settings.anchor.formula}; one more forward, of {base}, and {products}"


def _files(settings: TrainingSettings, model: PreTrainedModel, optimizer: int) -> tuple[tuple[str, str], ...]:
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if not _is_adapter(n))
    written = "the adapters" if settings.lora else "the model's weights"
    train, checkpoint = settings.train, weights + optimizer
    files = [
        (f"{written} and the fast MLPs" if settings.ttt else written, f"about {format_bytes(weights)}"),
        ("tokenizer with its chat template, model card, resolved recipe, metrics.jsonl", "small"),
        (
            f"checkpoints every {train.save_every} steps, {train.keep_checkpoints} kept",
            f"about {format_bytes(checkpoint)} each",
        ),
    ]
    if settings.merge:
        files.append(("the merged model", f"about {format_bytes(whole)}"))
    return tuple(files)


# Rendering


def plan_lines(plan: StagePlan) -> Lines:
    """The plan as (name, text) lines."""
    share = plan.trained_parameters / (plan.parameters + (plan.reading.added if plan.reading else 0))
    most = "" if plan.data else "at most "
    lines: Lines = [
        ("model", f"{plan.model} ({plan.architecture}, {plan.parameters:,} parameters)"),
        ("trained", f"{plan.trained_parameters:,} parameters ({share:.2%}), {plan.method}"),
        *_reading_lines(plan),
        ("loss", f"gate {plan.gate}"),
        *([("anchor", plan.anchor)] if plan.anchor else []),
        ("precision", plan.precision),
        *([("parallel", plan.degrees.text)] if plan.degrees.processes > 1 else []),
    ]
    if plan.data:
        d = plan.data
        lines.append(
            (
                "data",
                f"{d.rows:,} rows, {d.tokens:,} tokens, {d.trained_tokens:,} of them trained "
                f"({d.trained_tokens / max(1, d.tokens):.0%}), {d.truncated} rows truncated, {d.skipped} skipped",
            )
        )
    lines.append(("per step", f"{plan.rows_per_step} rows, {most}{plan.tokens_per_step:,} tokens"))
    if plan.steps is None:
        lines.append(("steps", "known once the data has been read"))
    else:
        lines.append(("steps", f"{plan.steps:,}, {most}{plan.steps * plan.tokens_per_step:,} tokens"))
    m = plan.memory
    lines += [
        ("memory", f"about {format_bytes(m.total)} on {plan.device.name}" + _of(plan)),
        ("  weights", format_bytes(m.weights)),
        ("  gradients", format_bytes(m.gradients)),
        ("  optimizer", format_bytes(m.optimizer)),
        ("  activations", f"{format_bytes(m.activations)} (when every row has the full length)"),
        ("  loss tile", format_bytes(m.loss_tile)),
    ]
    if m.gathered:
        lines.append(("  gathered", f"{format_bytes(m.gathered)}, whole for a moment"))
    if m.base_model:
        lines.append(("  base model", f"{format_bytes(m.base_model)}, whole on every device"))
    if plan.reading:
        kept = format_bytes(plan.reading.kept_bytes)
        lines.append(("  fast MLPs", f"{format_bytes(m.fast_weights)}, {kept} of it kept from chunk to chunk"))
    table = fit_lines(plan.gpus)
    lines += [("fits on", table[0]), *(("", line) for line in table[1:])]
    lines.append(("writes", f"{plan.folder}/"))
    lines += [("", f"{what}: {size}") for what, size in plan.files]
    lines += [("note", note) for note in plan.notes]
    return lines


def _reading_lines(plan: StagePlan) -> Lines:
    """How a model learns as it reads."""
    reading = plan.reading
    if reading is None:
        return []
    share = reading.parameters / (plan.parameters + reading.added)
    added = f", {reading.added:,} parameters added" if reading.added else ""
    return [
        ("learns", f"{reading.parameters:,} fast weights ({share:.1%}) in the last {reading.blocks} blocks{added}"),
        ("", f"{reading.chunks} chunks per row of full length, {format_bytes(reading.row_bytes)} per row"),
    ]


def print_plan(lines: Lines, console: Console) -> None:
    """Print a plan: as a table in a terminal, as plain lines in a log."""
    console.print()
    if console.is_terminal:
        console.print(plan_table(lines))
    else:
        console.print(plan_text(lines), highlight=False, markup=False, soft_wrap=True)
    console.print()


def plan_text(lines: Lines) -> str:
    return "\n".join(f"{name:13} {text}" for name, text in lines)


def plan_table(lines: Lines) -> RenderableType:
    table = Table(title="Plan", show_header=False, box=None, pad_edge=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in lines:
        table.add_row(name, Text(text, style="yellow" if name == "note" else ""))
    return table


def _of(plan: StagePlan) -> str:
    return f", which has {format_bytes(plan.device.memory)}" if plan.device.memory else ""
