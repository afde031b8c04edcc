"""Limits and notes of a plan: positions of the model, room on the disk, precision, memory, text."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from eaftdrope.errors import UserError
from eaftdrope.recipe.stage_sections import TextData
from eaftdrope.ttt.config import TTTConfig

from .machine import Device, format_bytes, slow_in_bfloat16, weights_dtype
from .memory import Memory
from .record import DataStats
from .settings import TrainingSettings

# Tables of learned (or tabulated) positions, as the model classes name them; rotary and ALiBi models have none.
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
_SPARE = 64 << 20
# more passes over the text than this are worth a note
_PASSES = 1.05


def check_positions(model: nn.Module, config: PretrainedConfig, longest: int) -> None:
    """Refuse rows beyond a table of positions, where the training would end in an index error.

    Args:
        model: on any device, including meta.
        longest: tokens of the longest row.

    Raises:
        UserError: the row is longer than the model's context.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not limit or longest <= limit:
        return
    if any(name.rpartition(".")[2] in _POSITION_TABLES for name, _ in model.named_modules()):
        raise UserError(
            f"the longest row has {longest:,} tokens, and the model has a table of {limit:,} positions: set data.max_length "
            f"to at most {limit}."
        )


def check_sink(settings: TrainingSettings, config: PretrainedConfig) -> None:
    """Refuse rows beyond the trained length whose sink cannot be kept within it: that needs the cache, which gradient
    checkpointing drops.

    Raises:
        UserError: such rows.
    """
    ttt, limit = settings.ttt, getattr(config.get_text_config(), "max_position_embeddings", None)
    if ttt is None or not ttt.sink or not limit or not settings.train.gradient_checkpointing:
        return
    if math.ceil(settings.max_length / ttt.chunk) * ttt.chunk > limit:
        raise UserError(
            f"ttt.data.max_length {settings.max_length:,} with gradient checkpointing: beyond the {limit:,} tokens that the "
            "model was trained on, the sink needs the cache that gradient checkpointing drops. Use shorter rows, ttt.sink=0, "
            "or ttt.checkpoint=true with ttt.train.gradient_checkpointing=false."
        )


def notes(
    settings: TrainingSettings,
    config: PretrainedConfig,
    model: nn.Module,
    data: DataStats | None,
    memory: Memory,
    device: Device,
    longest: int,
) -> Iterator[str]:
    """The notes of a plan, one sentence or two each."""
    yield from _context(settings.max_length, config, longest)
    if isinstance(settings.data, TextData):
        yield from _text(settings, data)
    if data and data.truncated:
        share = data.truncated / data.rows
        yield f"{data.truncated} of {data.rows} rows ({share:.0%}) are truncated at data.max_length."
    if settings.ttt:
        yield from _reading(settings, settings.ttt)
    yield from _precision(settings, config, device)
    yield from _memory(settings, memory, device)
    if settings.merge and settings.lora:
        yield from _disk(settings.folder, config, model)


def _context(max_length: int, config: PretrainedConfig, longest: int) -> Iterator[str]:
    """A maximum length beyond the model's context, and whether any row is as long."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not limit or max_length <= limit:
        return
    rows = ""
    if longest:
        rows = f" The longest row has {longest}." if longest > limit else f" No row is: the longest has {longest}."
    if getattr(config, "drope", None):
        yield (
            f"data.max_length {max_length} is beyond the {limit} tokens that the converted model announces. It has no rotary "
            f"positions that end there, but engines that serve it do.{rows}"
        )
    else:
        yield f"data.max_length {max_length} is beyond the model's context of {limit} tokens.{rows}"


def _text(settings: TrainingSettings, data: DataStats | None) -> Iterator[str]:
    train = settings.train
    if data and train.steps:
        passes = train.steps * settings.tokens_per_step / data.tokens
        if passes > _PASSES:
            yield f"The text will be repeated {passes:.1f} times to reach the token budget. Add more text if you can."
    has_flash = "flash" in str(settings.model.attn_implementation)
    if settings.separate_documents and train.batch_size > 1 and not has_flash:
        yield (
            "documents separate puts a batch in one row. Without flash attention that costs batch_size times the "
            f"attention: batch_size=1 accumulation={train.batch_size * train.accumulation} is the same training for less."
        )


def _reading(settings: TrainingSettings, ttt: TTTConfig) -> Iterator[str]:
    """Settings of a model that learns as it reads which a row of full length cannot use."""
    length, chunks = settings.max_length, settings.max_length // ttt.chunk
    if ttt.window is not None and length <= ttt.window + ttt.sink:
        yield (
            f"Every row fits into the window of {ttt.window:,} tokens, so the model is not trained to remember what it no "
            f"longer sees. Use rows of several windows."
        )
    if ttt.horizon is not None and ttt.horizon > chunks:
        yield f"ttt.horizon {ttt.horizon}: a row has at most {chunks} chunks, so this is the same as all."
    if ttt.warmup >= chunks:
        yield f"ttt.warmup {ttt.warmup}: a row has at most {chunks} chunks, so the inner rate never reaches ttt.lr."
    if ttt.lr == 0:
        yield "ttt.lr 0: nothing is learned while reading. This trains the model with its window, the control of TTT."


def _precision(settings: TrainingSettings, config: PretrainedConfig, device: Device) -> Iterator[str]:
    chosen = weights_dtype(settings.model.dtype, device)
    weights = str(config.dtype).removeprefix("torch.") if chosen == "auto" else chosen
    if device.kind == "cpu" and "bfloat16" in (weights, settings.train.precision) and slow_in_bfloat16():
        yield (
            "This CPU has no bfloat16 instructions and is several times slower in it than in float32: use "
            "model.dtype=fast train.precision=auto."
        )


def _memory(settings: TrainingSettings, memory: Memory, device: Device) -> Iterator[str]:
    if device.memory is None or memory.total <= device.memory:
        return
    ways = ["a smaller train.batch_size (raise train.accumulation as much)", "a smaller data.max_length"]
    if not settings.train.gradient_checkpointing:
        ways.insert(0, "train.gradient_checkpointing: true")
    if settings.ttt:
        ways.append("fewer ttt.fast_blocks")
        if not settings.ttt.checkpoint:
            ways.insert(0, "ttt.checkpoint: true")
    if not settings.lora:
        ways.append("lora")
    yield (
        f"It will probably not fit: {format_bytes(memory.total)} needed, {device.name} has {format_bytes(device.memory)}. "
        f"What reduces it: {', '.join(ways)}."
    )


def _disk(folder: str, config: PretrainedConfig, model: nn.Module) -> Iterator[str]:
    """Too little room for the merged model, which is written after the training."""
    # pyrefly: ignore[missing-attribute]  # a configuration that was built, and not read, has a torch.dtype
    size = (config.dtype or torch.float32).itemsize
    whole = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n and "modules_to_save" not in n)
    place = Path(folder).expanduser().absolute()
    while not place.is_dir():
        place = place.parent
    needed, free = whole * size + _SPARE, shutil.disk_usage(place).free
    if free < needed:
        yield (
            f"output.merge will need {math.ceil(needed / 1e6):,} MB in {folder}, whose disk has {free // 10**6:,} MB free: "
            "make room before the training ends, or leave it out and merge elsewhere."
        )
