"""The section `parallel`: how the processes of a launch share a training, and what cannot be combined with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, field_validator

from .base import OneOf, Positive, Section, describe, require_package
from .training_sections import LONGEST
from .yaml_lines import Loc

_DEGREES = ("tp", "fsdp", "cp", "dp")
PRESETS = ("fsdp2", "zero3", "tp_fsdp")
TP_OF_PRESET = 2
"""Tensor parallelism of the preset tp_fsdp, where the recipe does not set `tp`."""


class Parallel(Section):
    """How the processes of a launch share a training. Without a preset and degrees the launcher's configuration decides."""

    preset: Annotated[str, OneOf(PRESETS)] | None = Field(
        None,
        description="fsdp2: weights sharded over all processes; zero3: the same by DeepSpeed; tp_fsdp: tensor parallelism "
        f"(tp, {TP_OF_PRESET} by default), and FSDP2 over the rest.",
    )
    tp: Positive | None = Field(None, description="Processes that share every matrix (tensor parallelism).")
    fsdp: Positive | None = Field(None, description="Processes that the weights are sharded over (FSDP2).")
    cp: Positive | None = Field(None, description="Processes that share every sequence (context parallelism): only 1.")
    dp: Positive | None = Field(None, description="Replicas of the model (null: as many as the processes allow).")
    timeout_minutes: float = Field(
        30.0, gt=0, le=LONGEST, description="Minutes after which a process that does not respond ends the run."
    )

    @field_validator("preset")
    @classmethod
    def _deepspeed_installed(cls, value: str | None) -> str | None:
        if value == "zero3":
            require_package("deepspeed", "deepspeed", "'zero3'")
        return value


def as_parallel(value: object) -> object:
    """A preset's name as the section."""
    if isinstance(value, str):
        return {"preset": value}
    if not isinstance(value, (dict, Parallel)):
        raise ValueError(f"expected {', '.join(PRESETS)} or a mapping, found {describe(value)}")
    return value


def parallel_problems(raw: dict[str, Any]) -> Iterator[tuple[Loc, str]]:
    """(location, text) of each combination in the recipe's plain data that cannot work, whatever the number of processes."""
    given = raw.get("parallel")
    section: object = {"preset": given} if isinstance(given, str) else given
    if not isinstance(section, dict):
        return
    preset = section.get("preset")
    degrees = {key: size for key, size in section.items() if key in _DEGREES and isinstance(size, int)}
    yield from _degrees(preset, degrees)
    if preset == "tp_fsdp" or degrees.get("tp", 1) > 1:
        yield from _tensor_parallel(raw)
    elif preset or degrees.get("fsdp", 1) > 1:
        yield from _sharded(raw, preset)


def _degrees(preset: object, degrees: dict[str, int]) -> Iterator[tuple[Loc, str]]:
    if degrees.get("cp", 1) > 1:
        yield (
            ("parallel", "cp"),
            "context parallelism has not been verified: torch splits the attention of a sequence on GPUs only, and no "
            "training on split sequences was compared with one process. Leave cp out; fsdp, tp, gradient_checkpointing and a "
            "smaller batch_size make room for long sequences",
        )
    if preset == "zero3" and (others := [key for key in degrees if degrees[key] > 1 and key != "cp"]):
        yield (
            ("parallel", others[0]),
            f"zero3 shards over all processes, so {others[0]} does not apply. Leave it out, or use the preset fsdp2",
        )
    if preset == "fsdp2" and degrees.get("tp", 1) > 1:
        yield ("parallel", "tp"), "the preset fsdp2 has no tensor parallelism. Use the preset tp_fsdp, or leave tp out"
    if not preset and degrees.get("tp", 1) > 1 and degrees.get("dp", 1) > 1 and degrees.get("fsdp", 1) == 1:
        yield (
            ("parallel", "dp"),
            "transformers replicates a tensor-parallel model only together with FSDP2. Set fsdp to that number instead of dp",
        )


def _tensor_parallel(raw: dict[str, Any]) -> Iterator[tuple[Loc, str]]:
    stages = raw.get("stages") or ["eaft"]
    if isinstance(raw.get("lora"), dict) and "eaft" in stages:
        yield (
            ("lora",),
            "PEFT's adapters cannot be trained on a tensor-parallel model (parallel.tp). Use parallel: fsdp2, or lora: null",
        )
    others = [stage for stage in stages if stage != "eaft"] if isinstance(stages, list) else []
    if others:
        yield (
            ("stages", stages.index(others[0])),
            f"the stage {others[0]} has not been verified under tensor parallelism (parallel.tp). Use parallel: fsdp2 for "
            "drope and recalibrate; ttt trains on replicas only",
        )
    loss = raw.get("loss")
    if isinstance(loss, dict) and (loss.get("anchor") is not None or loss.get("preset") is not None):
        yield (
            ("loss",),
            "an anchor needs a second copy of the model, which is not sharded by tensor parallelism (parallel.tp). Use "
            "parallel: fsdp2, or leave the anchor out",
        )


def _sharded(raw: dict[str, Any], preset: object) -> Iterator[tuple[Loc, str]]:
    stages = raw.get("stages") or []
    if isinstance(stages, list) and "ttt" in stages:
        yield (
            ("stages", stages.index("ttt")),
            "the stage ttt reads the fast weights of all blocks at once and runs them again for every chunk, so its weights "
            "cannot be sharded. Leave the degrees and the preset of parallel out: the processes then train replicas (DDP)",
        )
    loss = raw.get("loss")
    has_anchor = isinstance(loss, dict) and (loss.get("anchor") is not None or loss.get("preset") is not None)
    if preset == "zero3" and has_anchor:
        yield (
            ("loss",),
            "zero3 gathers weights in the order of one forward per step, and that of an anchor's base model is a second one. "
            "Use parallel: fsdp2",
        )
