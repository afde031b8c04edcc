"""The keys of a recipe: one class per section, one field per key, with its type, default and meaning.

`eaftdrope schema` prints these classes as a JSON schema. Checks of single fields are here; checks of several keys together
are in combinations.py, so that one mistake never hides another. Build a Recipe with `load_recipe` or `make_recipe`.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from eaftdrope.files import usable_path

from .base import OneOf, Section, describe, existing_model, recipe_folder, require_package
from .data_section import Data
from .parallel_section import PRESETS, Parallel, as_parallel
from .probe_sections import Probes
from .serve_section import Serve
from .stage_sections import STAGES, Drope, Pretrain, Recalibrate
from .training_sections import AnchoredLoss, Lora, Train
from .ttt_section import MetaTraining

LOGGERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "clearml": "clearml",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "trackio": "trackio",
    "dvclive": "dvclive",
}
"""transformers' `report_to` name -> the package it needs."""


class Model(Section):
    """The model to fine-tune."""

    reference: str = Field(min_length=1, description="Hub id, local folder, or `package:NAME` of a pip package.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "bfloat16", "auto", "fast"] = Field(
        "float32",
        description="Type the weights are loaded in; auto: the checkpoint's own; fast: bfloat16 if the device is fast "
        "at it, else float32.",
    )
    attn_implementation: str | None = Field(
        None,
        description="Attention implementation of transformers: sdpa, eager, flash_attention_2, ... (null: automatic).",
    )
    trust_remote_code: bool = Field(False, description="Run code from the model's repository.")
    quantization: Literal["none", "4bit"] = Field(
        "none", description="4bit: QLoRA, the frozen weights in 4 bits (needs bitsandbytes and a lora section)."
    )

    @field_validator("reference")
    @classmethod
    def _reference_exists(cls, value: str, info: ValidationInfo) -> str:
        return existing_model(value, info)

    @field_validator("quantization")
    @classmethod
    def _quantization_available(cls, value: str) -> str:
        if value == "4bit":
            require_package("bitsandbytes", "bitsandbytes", "'4bit' (QLoRA)")
        return value


def _as_loggers(value: object) -> object:
    if value in (None, "none", ["none"]):
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and "none" in value:
        raise ValueError("none is set together with a logger: leave one of them out")
    return value


def _logger_available(name: str) -> str:
    require_package(LOGGERS[name], LOGGERS[name], f"'{name}'")
    return name


class Output(Section):
    """Output folder and what is written to it."""

    dir: str = Field(min_length=1, description="Folder of the run, relative to the working directory.")
    report_to: Annotated[
        list[Annotated[str, OneOf(LOGGERS), AfterValidator(_logger_available)]],
        BeforeValidator(
            _as_loggers,
            json_schema_input_type=Annotated[str, OneOf(("none", *LOGGERS))]
            | list[Annotated[str, OneOf(LOGGERS)]]
            | None,
        ),
    ] = Field([], description="Experiment trackers (none, or a list such as [tensorboard, wandb]).")
    merge: bool = Field(False, description="Also write the model with the adapters merged into its weights.")
    push_to_hub: str | None = Field(
        None, pattern=r"^[\w.-]+(/[\w.-]+)?$", description="Repository to upload the result to, such as me/my-model."
    )
    private: bool = Field(True, description="Make the repository of push_to_hub private if it is created.")

    @field_validator("dir")
    @classmethod
    def _dir_is_a_folder(cls, value: str, info: ValidationInfo) -> str:
        if recipe_folder(info) is not None and os.path.isfile(usable_path(value)):
            raise ValueError(f"'{value}' is a file. Choose a folder, which need not exist yet")
        return value


def _as_model(value: object) -> object:
    if not isinstance(value, (str, dict)):
        raise ValueError(f"expected a hub id, a folder or package:NAME, or a mapping, found {describe(value)}")
    return {"reference": value} if isinstance(value, str) else value


class Recipe(Section):
    """One run of eaftdrope: a model, its data, the loss, and the probes before and after; or several, one per stage."""

    # the checks of combinations.py that a JSON schema can express, for editors
    model_config = ConfigDict(
        json_schema_extra={"if": {"not": {"required": ["stages"]}}, "then": {"required": ["data"]}}
    )

    model: Annotated[Model, BeforeValidator(_as_model, json_schema_input_type=str | Model)] = Field(
        description="Hub id, local folder or package:NAME; or a mapping with more options."
    )
    stages: Annotated[list[Annotated[str, OneOf(STAGES)]], Field(min_length=1)] | None = Field(
        None,
        description="Stages in order: pretrain, drope, recalibrate, eaft, ttt (null: only eaft, in output.dir itself).",
    )
    any_order: bool = Field(
        False, description="Accept eaft before drope, and ttt before eaft, to measure what the order is worth."
    )
    pretrain: Pretrain | None = Field(None, description="A small model from random weights, and its training.")
    drope: Drope | None = Field(None, description="Options of the conversion (null: the defaults).")
    recalibrate: Recalibrate | None = Field(None, description="Data and budget of the recalibration.")
    ttt: MetaTraining | None = Field(
        None, description="Conversion to a model that keeps learning as it reads, and its training."
    )
    data: Data | None = Field(None, description="Training data and held-out data.")
    loss: AnchoredLoss = Field(
        AnchoredLoss(), description="The gate on each token's cross-entropy, the anchor, and how the loss is computed."
    )
    lora: Lora | None = Field(None, description="Low-rank adapters; null or left out: full fine-tuning.")
    train: Train = Field(Train(), description="Length, learning rate and optimiser of the training.")
    probes: Probes = Field(Probes(), description="Probes measured before and after training.")
    parallel: Annotated[
        Parallel, BeforeValidator(as_parallel, json_schema_input_type=Annotated[str, OneOf(PRESETS)] | Parallel)
    ] = Field(Parallel(), description="How the processes of a launch share the training; a preset, or a mapping.")
    output: Output = Field(description="Output folder and what is written to it.")
    serve: Serve | None = Field(
        None, description="Which reader answers `eaftdrope ask`, by the length of the text (null: the defaults)."
    )

    @field_validator("probes")
    @classmethod
    def _held_out_loss_by_default(cls, value: Probes, info: ValidationInfo) -> Probes:
        data = info.data.get("data")
        return value.with_defaults(held_out=bool(data and data.held_out))

    @field_validator("pretrain")
    @classmethod
    def _pretraining_defaults(cls, value: Pretrain | None) -> Pretrain | None:
        return value and value.with_defaults()

    @field_validator("recalibrate")
    @classmethod
    def _recalibration_defaults(cls, value: Recalibrate | None, info: ValidationInfo) -> Recalibrate | None:
        drope = info.data.get("drope")
        return value and value.with_defaults(qk_norm=bool(drope and drope.qk_norm))

    @field_validator("ttt")
    @classmethod
    def _ttt_defaults(cls, value: MetaTraining | None) -> MetaTraining | None:
        return value and value.with_defaults()

    def learns_before(self, stage: str) -> bool:
        """True if the model that `stage` starts from learns as it reads (`any_order`)."""
        earlier = self.stages[: self.stages.index(stage)] if self.stages else []
        return "ttt" in earlier

    @property
    def adapters(self) -> Lora | None:
        """The adapters that the last stage trains; None if it trains weights, or nothing."""
        last = self.stages[-1] if self.stages else "eaft"
        if last == "ttt":
            return self.ttt.lora if self.ttt else None
        return self.lora if last == "eaft" else None
