"""The sections `loss`, `lora` and `train`. Other stages have them too, with other defaults."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from eaftdrope.loss.anchor import PRESETS, Anchor
from eaftdrope.loss.gates import ALL_GATE_OPTIONS, GATE_OPTIONS

from .base import LARGEST_RATE, MOST, STRONGEST, OneOf, Positive, Section, Share, describe, require_package
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


class Loss(Section):
    """The gate on each token's cross-entropy, and how the loss is computed."""

    gate: Annotated[str, OneOf(GATE_OPTIONS)] = Field(
        "eaft", description="Gate that weights the tokens; none: plain SFT."
    )
    alpha: float | None = Field(
        None, ge=0, le=STRONGEST, description="eaft, eaft-vocab, eaft-exact: exponent of the gate (1.0)."
    )
    k: int | None = Field(
        None,
        ge=2,
        le=MOST,
        description="eaft, eaft-sigmoid, eaft-mask: size of the top-K entropy; eaft-exact: ln k is its scale (20).",
    )
    divisor: float | None = Field(
        None,
        ge=1 / STRONGEST,
        le=STRONGEST,
        description="eaft: divide the entropy by this (null: ln k; 3.0: LLaMA-Factory; 1.0: Axolotl).",
    )
    slope: float | None = Field(None, ge=-STRONGEST, le=STRONGEST, description="eaft-sigmoid: slope (30.0).")
    threshold: Share | None = Field(None, description="eaft-sigmoid (0.17), profit (0.1): threshold.")
    quantile: Share | None = Field(None, description="eaft-mask, conflict-mask: share of low tokens (0.15).")
    gamma: float | None = Field(None, ge=0, le=STRONGEST, description="focal (2.0), mile (1.0): exponent.")
    floor: Share | None = Field(None, description="talr: smallest weight (0.01).")
    keep: Literal["higher", "lower"] | None = Field(None, description="profit: keep tokens above or below (higher).")
    weight: float | None = Field(None, ge=0, le=STRONGEST, description="constant: the weight of every token (1.0).")
    tail: Literal["exact", "sparse"] = Field(
        "exact", description="sparse: gradients only from the vocabulary columns that matter; faster, error about 1 %."
    )
    tail_threshold: Share | None = Field(
        None, gt=0, lt=1, description="with tail: sparse, logit gradients below this are dropped (2^-12)."
    )
    gate_threshold: Share = Field(0.0, lt=1, description="Tokens with a smaller gate are left out of the gradient.")
    recompute: bool = Field(
        False, description="Recompute the logits for the backward pass: a third more work, less memory."
    )
    exempt: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Strings whose tokens keep a gate of 1 wherever they are trained: names that the model does not have, "
        "the stop token.",
    )
    backend: Literal["auto", "torch", "cpu", "triton", "cuda"] = Field(
        "auto", description="Backend of the loss; auto: the fastest available."
    )
    tile_mb: Positive | None = Field(None, description="Memory of one tile of logits in MB (null: automatic).")

    def gate_kwargs(self) -> dict[str, object]:
        """The options that the recipe sets for its gate; those left out have the gate's own defaults."""
        return {name: getattr(self, name) for name in ALL_GATE_OPTIONS if getattr(self, name) is not None}


class AnchorOptions(Section):
    """A divergence from the base model, added to the gated loss of every trained token."""

    kl: float = Field(Anchor.kl, gt=0, le=STRONGEST, description="Factor on the divergence, which is in nats.")
    direction: Literal["forward", "reverse"] = Field(
        "forward", description="forward: KL(base || model); reverse: KL(model || base)."
    )
    mask_target: bool = Field(
        Anchor.mask_target, description="Leave the label out of both distributions, which are renormalised."
    )


class AnchoredLoss(Loss):
    """The gate on each token's cross-entropy, the anchor to the base model, and how the loss is computed."""

    preset: Annotated[str, OneOf(PRESETS)] | None = Field(
        None, description="A published loss: the gate and anchor of sft-kl, asft or mask-target where they are not set."
    )
    anchor: AnchorOptions | None = Field(
        None,
        description="Divergence from the base model: with lora the model without its adapters, else a second copy.",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, value: object) -> object:
        name = value.get("preset") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(name, str) or name not in PRESETS:
            return value
        preset, given = PRESETS[name], value.get("anchor")
        if given is not None and not isinstance(given, dict):
            return value
        return {"gate": preset.gate, **value, "anchor": {**asdict(preset.anchor), **(given or {})}}

    @property
    def anchor_of_loss(self) -> Anchor | None:
        """The anchor as the loss reads it."""
        return None if self.anchor is None else Anchor(**self.anchor.model_dump())


def _as_target_modules(value: object) -> object:
    if isinstance(value, str) and value != "all-linear":
        hint = did_you_mean(value, ["all-linear"]) or f" For this module only, write [{value}]"
        raise ValueError(f"expected all-linear or a list of module names, found {describe(value)}.{hint}")
    return value


_TargetModules = Annotated[
    Annotated[Literal["all-linear"], Tag("<name>")] | Annotated[list[str], Tag("<list>"), Field(min_length=1)],
    Discriminator(lambda value: "<name>" if isinstance(value, str) else "<list>"),
]


class Lora(Section):
    """Low-rank adapters on the frozen model; leave the section out for a full fine-tune."""

    r: Annotated[int, Field(ge=1, le=2**16)] = Field(16, description="Rank.")
    alpha: float | None = Field(
        None, gt=0, le=STRONGEST, description="Scaling: the update is multiplied by alpha / r (null: 2 r)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: Annotated[
        _TargetModules, BeforeValidator(_as_target_modules, json_schema_input_type=Literal["all-linear"] | list[str])
    ] = Field("all-linear", description="Modules that get an adapter: all-linear (all but the head), or names.")
    modules_to_save: list[str] = Field([], description="Modules trained in full beside the adapters, such as lm_head.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead.")
    use_dora: bool = Field(False, description="DoRA: separate direction and magnitude.")

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


LONGEST = 7 * 24 * 60
"""Minutes of a week: the largest time that a recipe can set."""


class Train(Section):
    """How long and how fast."""

    steps: Positive | None = Field(None, description="Optimiser steps (instead of epochs).")
    epochs: float | None = Field(
        None, gt=0, le=STRONGEST, description="Passes over the training rows (1 when steps is not set)."
    )
    learning_rate: float = Field(
        1e-5, gt=0, le=LARGEST_RATE, description="Peak learning rate; the paper uses 1e-5 for full fine-tuning."
    )
    batch_size: Positive = Field(4, description="Sequences per device and forward pass.")
    accumulation: Positive = Field(1, description="Batches whose gradients are accumulated before a step.")
    scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = Field("cosine", description="Learning-rate schedule of transformers.")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="Share of the steps to warm up.")
    warmup_steps: Annotated[int, Field(ge=0, le=MOST)] | None = Field(
        None, description="Steps to warm up (instead of the ratio)."
    )
    decay_ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="warmup_stable_decay: final share of the steps in which the rate decays (0.2)."
    )
    min_rate_ratio: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="warmup_stable_decay: rate at the end, as a share of the peak (0)."
    )
    weight_decay: float = Field(0.0, ge=0, le=LARGEST_RATE, description="AdamW's weight decay.")
    max_grad_norm: float = Field(
        1.0, ge=0, le=LARGEST_RATE, description="Clip the gradient norm at this (0: do not clip)."
    )
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = Field(
        "adamw_torch", description="Optimiser, by its name in transformers."
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta2.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="Seed of order, dropout and new weights.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Arithmetic: bfloat16 autocast or float32; auto: bfloat16 if the device is fast at it."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    save_every: Positive = Field(100, description="Steps between checkpoints.")
    save_every_minutes: float | None = Field(
        None, gt=0, le=LONGEST, description="Also save a checkpoint after this many minutes (null: by steps only)."
    )
    keep_checkpoints: Positive = Field(2, description="Checkpoints kept; older ones are deleted.")
    log_every: Positive = Field(1, description="Steps between lines of the log.")
    eval_every: Positive | None = Field(
        None, description="Steps between evaluations on held_out (null: none; with stop_at, a twentieth of all steps)."
    )
    stop_at: float | None = Field(
        None,
        gt=0,
        le=STRONGEST,
        description="End the training once the loss on held_out is at most this (null: never).",
    )
    dataloader_workers: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="Processes that load data.")

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
