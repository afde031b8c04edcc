"""The sections of the stages `pretrain`, `drope`, the conversion, and `recalibrate`, the training on text after it.

`recalibrate` has the sections of an ordinary run (data, loss, train, probes) with the defaults of the paper (arXiv
2512.12167, tables 4 and 11), a budget in tokens, and a measure of how much of the perplexity is recovered.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator

from eaftdrope.loss.gates import GATE_OPTIONS

from .base import LARGEST_RATE, MOST, MOST_TOKENS, OneOf, Positive, Section, describe, existing_file, existing_model
from .data_section import Rows
from .probe_sections import Probes
from .training_sections import Loss, Train

STAGE_SECTIONS = {
    "pretrain": ("pretrain",),
    "drope": ("drope",),
    "recalibrate": ("recalibrate",),
    "eaft": ("data", "loss", "lora", "train", "probes"),
    "ttt": ("ttt",),
}
"""The stages that a recipe can chain, in their order (see `any_order`) -> the sections that each of them reads."""

STAGES = tuple(STAGE_SECTIONS)

LEARNING_RATE, LEARNING_RATE_QK_NORM = 3e-4, 1e-3
"""Table 11: 1e-3 diverges without QK-norm, and beats 3e-4 with it."""

WARMUP_RATIO = 0.01
"""Table 4 warms up for 490 steps, about 1 % of the steps at that scale."""


def _as_layers(value: object) -> object:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, list) or value == "all" or is_number:
        return value
    raise ValueError(
        f"expected all, a list of layer numbers, or a share of the layers such as 0.5, found {describe(value)}"
    )


def _layers_tag(value: object) -> str:
    return "<name>" if isinstance(value, str) else "<list>" if isinstance(value, list) else "<share>"


_Layers = Annotated[
    Annotated[Literal["all"], Tag("<name>")]
    | Annotated[list[Annotated[int, Field(ge=0, le=MOST)]], Tag("<list>"), Field(min_length=1)]
    | Annotated[float, Tag("<share>"), Field(gt=0, lt=1)],
    Discriminator(_layers_tag),
]


class Drope(Section):
    """The conversion: rotary embeddings become the identity, by configuration."""

    max_length: Annotated[int, Field(ge=8, le=MOST)] | None = Field(
        None, description="Context that the converted model announces, in tokens (null: the model's own)."
    )
    layers: Annotated[
        _Layers, BeforeValidator(_as_layers, json_schema_input_type=Literal["all"] | list[int] | float)
    ] = Field("all", description="Layers to drop it from: all, a list, or a share (if the architecture allows it).")
    temperature: float | None = Field(
        None, ge=1e-3, le=1e3, description="Factor on the attention's logits, folded into the query weights (null: 1)."
    )
    qk_norm: bool = Field(False, description="Normalise queries and keys of each head (Llama-shaped models).")


class TextData(Rows):
    """Text to recalibrate on: documents, each ended by the end-of-sequence token, in blocks of one length."""

    train_on: Literal["all", "assistant", "last_assistant", "completion"] = Field(
        "all", description="Tokens of chat rows that carry the loss; in text, all do."
    )
    max_length: Annotated[int, Field(ge=8, le=MOST)] | None = Field(
        None, description="Length of a block in tokens (null: the context that the model was trained with)."
    )
    documents: Literal["joined", "separate"] = Field(
        "joined",
        description="joined: documents in a block attend to those before them, as in the paper; separate: they do not.",
    )


class TextLoss(Loss):
    """The loss of a training on text: plain cross-entropy unless a gate is set."""

    gate: Annotated[str, OneOf(GATE_OPTIONS)] = Field(
        "none", description="Gate that weights the tokens; none: plain cross-entropy."
    )


class TextTrain(Train):
    """How long and how fast a recalibration trains. Its length is better set in tokens."""

    # pyrefly: ignore[bad-override]  # null until drope.qk_norm is known; `with_defaults` sets it
    learning_rate: float | None = Field(
        None, gt=0, le=LARGEST_RATE, description="Peak learning rate (null: 3e-4, or 1e-3 with drope.qk_norm)."
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Share of the steps to warm up (null: 0.01, if the scheduler has a warm-up)."
    )
    weight_decay: float = Field(0.1, ge=0, le=LARGEST_RATE, description="AdamW's weight decay.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's beta2.")

    @field_validator("epochs")
    @classmethod
    def _one_epoch(cls, value: float | None, info: ValidationInfo) -> float | None:
        # one epoch is the default only without a budget, which is outside this section
        return value

    def with_defaults(self, *, qk_norm: bool, has_budget: bool) -> TextTrain:
        """The section with the defaults that depend on other keys."""
        changes: dict[str, object] = {}
        if self.learning_rate is None:
            changes["learning_rate"] = LEARNING_RATE_QK_NORM if qk_norm else LEARNING_RATE
        if self.warmup_ratio is None and self.warmup_steps is None and self.scheduler != "constant":
            changes["warmup_ratio"] = WARMUP_RATIO
        if self.epochs is None and self.steps is None and not has_budget:
            changes["epochs"] = 1.0
        return self.model_copy(update=changes)


def _as_setting(value: object) -> object:
    if value is None or isinstance(value, (dict, list)):
        raise ValueError(f"expected a number, a text, true or false, found {describe(value)}")
    return value


class Pretrain(Section):
    """Training of a small model from random weights; `model` gives its architecture and its tokenizer."""

    config: dict[str, Annotated[bool | int | float | str, BeforeValidator(_as_setting)]] = Field(
        {}, description="Changes of the configuration of `model`, by its keys, such as hidden_size."
    )
    vocabulary: Annotated[int, Field(ge=300, le=MOST)] | None = Field(
        None, description="Size of a tokenizer of the same kind that is trained on the text (null: that of `model`)."
    )
    data: TextData = Field(description="Training text and held-out text.")
    loss: TextLoss = Field(TextLoss(), description="The gate on each token's cross-entropy; none by default.")
    train: TextTrain = Field(
        TextTrain(), description="Learning rate and optimiser, and the length if no budget in tokens is set."
    )
    tokens: float | None = Field(None, gt=0, le=MOST_TOKENS, description="Tokens to train on (the steps follow).")
    probes: Probes = Field(Probes(), description="What is measured before and after.")

    @property
    def budget(self) -> float | None:
        """Tokens to train on; None if steps or epochs set the length."""
        return self.tokens

    def with_defaults(self) -> Pretrain:
        """The section with the defaults that depend on other keys."""
        train = self.train.with_defaults(qk_norm=False, has_budget=self.tokens is not None)
        probes = self.probes.with_defaults(held_out=bool(self.data.held_out))
        return self.model_copy(update={"train": train, "probes": probes})


class Recovery(Section):
    """How near the model's perplexity is to the original's: original / now, 1 when all of it is recovered."""

    every: Positive = Field(50, description="Steps between measurements.")
    max_tokens: Positive = Field(
        16384, description="Maximum number of measured tokens, in blocks spread over the text."
    )
    stop_at: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="End the training when this share is recovered, such as 0.98 (null: train the whole budget)."
    )
    files: list[str] | None = Field(
        None,
        description="Text or JSONL files to measure on (null: data.held_out, else the text that comes with eaftdrope).",
    )
    original: str | None = Field(
        None,
        description="The model before it was converted (null: the recipe's model, if drope is one of the stages).",
    )

    @field_validator("files")
    @classmethod
    def _files_exist(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        return None if value is None else [existing_file(path, info) for path in value]

    @field_validator("original")
    @classmethod
    def _original_exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else existing_model(value, info)


class Recalibrate(Section):
    """Training on text after the rotary embeddings are dropped."""

    data: TextData = Field(description="Training text and held-out text.")
    loss: TextLoss = Field(TextLoss(), description="The gate on each token's cross-entropy; none by default.")
    train: TextTrain = Field(
        TextTrain(), description="Learning rate and optimiser, and the length if no budget in tokens is set."
    )
    tokens: float | None = Field(None, gt=0, le=MOST_TOKENS, description="Tokens to train on (the steps follow).")
    share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Tokens to train on as a share of pretraining_tokens, such as 0.02."
    )
    pretraining_tokens: float | None = Field(
        None, gt=0, le=MOST_TOKENS, description="Tokens that the model was pretrained on."
    )
    recovery: Recovery = Field(
        Recovery(), description="Comparison with the original model's perplexity, and the rule to stop."
    )
    probes: Probes = Field(Probes(), description="What is measured before and after.")

    @property
    def budget(self) -> float | None:
        """Tokens to train on; None if steps or epochs set the length."""
        if self.share is not None and self.pretraining_tokens is not None:
            return self.share * self.pretraining_tokens
        return self.tokens

    def with_defaults(self, *, qk_norm: bool) -> Recalibrate:
        """The section with the defaults that depend on other keys."""
        train = self.train.with_defaults(qk_norm=qk_norm, has_budget=self.budget is not None)
        probes = self.probes.with_defaults(held_out=bool(self.data.held_out))
        return self.model_copy(update={"train": train, "probes": probes})
