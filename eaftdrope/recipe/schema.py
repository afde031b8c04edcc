"""The keys of a recipe: one class a section, one field a key, with its type, default and meaning.

`eaftdrope schema` prints these classes as a JSON schema. What one field alone can tell is checked here; what two keys
say together is checked in combinations.py, so that one mistake never hides another. Build a Recipe with `load_recipe`
or `make_recipe`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator

from . import files
from .base import Positive, Section, Share, describe, recipe_folder, require_package
from .data_section import Data
from .gates import ALL_GATE_OPTIONS, GATE_OPTIONS
from .probes import Probes
from .suggest import did_you_mean

OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
)
"""transformers' `optim` names that need no further options; those ending in bit need bitsandbytes."""

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
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32", description="Type the weights are loaded in; auto: as the checkpoint says."
    )
    attn_implementation: str | None = Field(
        None, description="Attention of transformers: sdpa, eager, flash_attention_2, ... (null: its own choice)."
    )
    trust_remote_code: bool = Field(False, description="Run code that the model's repository carries.")
    quantization: Literal["none", "4bit"] = Field(
        "none", description="4bit: QLoRA, the frozen weights in 4 bits (needs bitsandbytes and a lora section)."
    )

    @field_validator("reference")
    @classmethod
    def _reference_exists(cls, value: str, info: ValidationInfo) -> str:
        folder = recipe_folder(info)
        if folder is None:
            return value
        value = files.resolved(value, folder)
        from eaftdrope.models import check_model_reference

        problem = check_model_reference(value)
        if problem:
            raise ValueError(problem)
        return value

    @field_validator("quantization")
    @classmethod
    def _quantization_available(cls, value: str) -> str:
        if value == "4bit":
            require_package("bitsandbytes", "bitsandbytes", "'4bit' (QLoRA)")
        return value


class Loss(Section):
    """The gate on each token's cross-entropy, and how the loss is computed."""

    gate: Literal[tuple(GATE_OPTIONS)] = Field("eaft", description="What weights the tokens; none: plain SFT.")
    alpha: float | None = Field(None, ge=0, description="eaft, eaft-vocab, eaft-exact: exponent of the gate (1.0).")
    k: int | None = Field(
        None,
        ge=2,
        description="eaft, eaft-sigmoid, eaft-mask: size of the top-K entropy; eaft-exact: ln k is its scale (20).",
    )
    divisor: float | None = Field(
        None, gt=0, description="eaft: divide the entropy by this (null: ln k; 3.0: LLaMA-Factory; 1.0: Axolotl)."
    )
    slope: float | None = Field(None, description="eaft-sigmoid: slope (30.0).")
    threshold: Share | None = Field(None, description="eaft-sigmoid (0.17), profit (0.1): threshold.")
    quantile: Share | None = Field(None, description="eaft-mask, conflict-mask: share of low tokens (0.15).")
    gamma: float | None = Field(None, ge=0, description="focal (2.0), mile (1.0): exponent.")
    floor: Share | None = Field(None, description="talr: smallest weight (0.01).")
    keep: Literal["higher", "lower"] | None = Field(None, description="profit: keep tokens above or below (higher).")
    weight: float | None = Field(None, ge=0, description="constant: the weight of every token (1.0).")
    tail: Literal["exact", "sparse"] = Field(
        "exact", description="sparse: gradients from the vocabulary columns that matter; faster, error about 1 %."
    )
    tail_threshold: Share | None = Field(
        None, gt=0, lt=1, description="tail sparse: gradients by a logit that are dropped (2^-12)."
    )
    gate_threshold: Share = Field(0.0, lt=1, description="Tokens with a smaller gate are left out of the gradient.")
    recompute: bool = Field(False, description="Project twice: a third more work, no float32 sum of head gradients.")
    backend: Literal["auto", "torch", "cpu", "triton", "cuda"] = Field(
        "auto", description="Who computes the loss; auto: the fastest here."
    )
    tile_mb: Positive | None = Field(None, description="Memory of one tile of logits in MB (null: chosen by itself).")

    def gate_kwargs(self) -> dict[str, object]:
        """The options that the recipe sets for its gate; those left out take the gate's own defaults."""
        return {name: getattr(self, name) for name in ALL_GATE_OPTIONS if getattr(self, name) is not None}


def _as_target_modules(value: object) -> object:
    if isinstance(value, str) and value != "all-linear":
        hint = did_you_mean(value, ["all-linear"]) or f" For this module alone write [{value}]"
        raise ValueError(f"expected all-linear or a list of module names, found {describe(value)}.{hint}")
    return value


_TargetModules = Annotated[
    Annotated[Literal["all-linear"], Tag("<name>")] | Annotated[list[str], Tag("<list>"), Field(min_length=1)],
    Discriminator(lambda value: "<name>" if isinstance(value, str) else "<list>"),
]


class Lora(Section):
    """Low-rank adapters on the frozen model; leave the section out for a full fine-tune."""

    r: Positive = Field(16, description="Rank.")
    alpha: float | None = Field(None, gt=0, description="Scaling, the update is multiplied by alpha / r (null: 2 r).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: Annotated[
        _TargetModules, BeforeValidator(_as_target_modules, json_schema_input_type=Literal["all-linear"] | list[str])
    ] = Field("all-linear", description="Modules that get an adapter: all-linear (all but the head), or names.")
    modules_to_save: list[str] = Field([], description="Modules trained in full beside the adapters, such as lm_head.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead.")
    use_dora: bool = Field(False, description="DoRA: direction and magnitude apart.")

    @field_validator("alpha", mode="after")
    @classmethod
    def _alpha_default(cls, value: float | None, info: ValidationInfo) -> float | None:
        return 2.0 * info.data["r"] if value is None and "r" in info.data else value

    @field_validator("target_modules")
    @classmethod
    def _head_is_read_directly(cls, value: str | list[str]) -> str | list[str]:
        if any(name.split(".")[-1] == "lm_head" for name in value if isinstance(value, list)):
            raise ValueError(
                "an adapter on lm_head: the fused loss reads the head's weight directly and would not see it. "
                "Put lm_head in lora.modules_to_save instead"
            )
        return value


class Train(Section):
    """How long and how fast."""

    steps: Positive | None = Field(None, description="Optimiser steps (instead of epochs).")
    epochs: float | None = Field(None, gt=0, description="Passes over the training rows (1 when steps is not set).")
    learning_rate: float = Field(
        1e-5, gt=0, description="Peak learning rate; the paper uses 1e-5 for full fine-tuning."
    )
    batch_size: Positive = Field(4, description="Sequences a device takes at once.")
    accumulation: Positive = Field(1, description="Batches whose gradients are added up before a step.")
    scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = Field("cosine", description="Learning-rate schedule of transformers.")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="Share of the steps to warm up.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Steps to warm up (instead of the ratio)."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient norm at this (0: do not clip).")
    optimizer: Literal[OPTIMIZERS] = Field("adamw_torch", description="Optimiser, by its name in transformers.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta2.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="Seed of order, dropout and new weights.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Arithmetic: bfloat16 autocast or float32; auto: bfloat16 where the device is fast at it."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    save_every: Positive = Field(100, description="Steps between checkpoints.")
    keep_checkpoints: Positive = Field(2, description="Checkpoints kept; older ones are deleted.")
    log_every: Positive = Field(1, description="Steps between lines of the log.")
    eval_every: Positive | None = Field(None, description="Steps between evaluations on held_out (null: none).")
    dataloader_workers: Annotated[int, Field(ge=0)] = Field(0, description="Processes that load data.")

    @field_validator("epochs")
    @classmethod
    def _one_epoch(cls, value: float | None, info: ValidationInfo) -> float | None:
        return 1.0 if value is None and info.data.get("steps") is None else value

    @field_validator("optimizer")
    @classmethod
    def _optimizer_available(cls, value: str) -> str:
        if value.endswith("bit"):
            require_package("bitsandbytes", "bitsandbytes", f"'{value}'")
        return value


def _as_loggers(value: object) -> object:
    if value in (None, "none", ["none"]):
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and "none" in value:
        raise ValueError("none together with a logger: leave one out")
    return value


def _logger_available(name: str) -> str:
    require_package(LOGGERS[name], LOGGERS[name], f"'{name}'")
    return name


class Output(Section):
    """What is written, and where."""

    dir: str = Field(min_length=1, description="Folder of the run, relative to the working directory.")
    report_to: Annotated[
        list[Annotated[Literal[tuple(LOGGERS)], AfterValidator(_logger_available)]],
        BeforeValidator(
            _as_loggers,
            json_schema_input_type=Literal[("none", *LOGGERS)] | list[Literal[tuple(LOGGERS)]] | None,
        ),
    ] = Field([], description="Experiment trackers (none, or a list such as [tensorboard, wandb]).")
    merge: bool = Field(False, description="Also write the model with the adapters merged into its weights.")
    push_to_hub: str | None = Field(
        None, pattern=r"^[\w.-]+(/[\w.-]+)?$", description="Repository to upload the result to, such as me/my-model."
    )
    private: bool = Field(True, description="Make a repository that push_to_hub creates private.")

    @field_validator("dir")
    @classmethod
    def _dir_is_a_folder(cls, value: str, info: ValidationInfo) -> str:
        from pathlib import Path

        if recipe_folder(info) is not None and Path(value).expanduser().is_file():
            raise ValueError(f"'{value}' is a file. Name a folder, which need not exist yet")
        return value


def _as_model(value: object) -> object:
    if not isinstance(value, (str, dict)):
        raise ValueError(f"expected a hub id, a folder or package:NAME, or a mapping, found {describe(value)}")
    return {"reference": value} if isinstance(value, str) else value


class Recipe(Section):
    """One run of eaftdrope: a model, its data, the loss, and what to measure before and after."""

    model: Annotated[Model, BeforeValidator(_as_model, json_schema_input_type=str | Model)] = Field(
        description="Hub id, local folder or package:NAME; or a mapping when more is to be said."
    )
    data: Data = Field(description="What to train on, and what to hold out.")
    loss: Loss = Field(Loss(), description="The gate on each token's cross-entropy, and how the loss is computed.")
    lora: Lora | None = Field(None, description="Low-rank adapters; null or left out: a full fine-tune.")
    train: Train = Field(Train(), description="How long and how fast.")
    probes: Probes = Field(Probes(), description="What is measured before and after.")
    output: Output = Field(description="What is written, and where.")

    @field_validator("probes")
    @classmethod
    def _held_out_loss_by_default(cls, value: Probes, info: ValidationInfo) -> Probes:
        return value.with_defaults(held_out=bool("data" in info.data and info.data["data"].held_out))
