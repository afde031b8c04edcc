"""The section `ttt`: a model that keeps learning as it reads (TTT-E2E, arXiv 2512.23675), and the training of it.

Its own keys are those of `TTTConfig`, which has their defaults and checks. Below them are the sections of an ordinary run
(data, loss, lora, train, probes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from eaftdrope.loss.gates import GATE_OPTIONS, resolve_gate
from eaftdrope.ttt.config import LAYOUTS, TTTConfig

from .base import LARGEST_RATE, MOST, STRONGEST, OneOf, Positive, Section, describe
from .data_section import Data, Rows
from .probe_sections import Probes
from .stage_sections import TextData, TextLoss
from .training_sections import Lora, Train
from .yaml_lines import Loc

INNER_GATES = tuple(name for name in GATE_OPTIONS if resolve_gate(name).row_local)
"""A gate that reads other tokens than its own would let a row learn from the rows beside it."""

REFUSED_KEYS = {
    (
        "ttt",
        "data",
        "packing",
    ): "packed rows would share what is learned from them: a row learns from its first token to its "
    "last. Leave packing out; for short texts, sequences: blocks fills every row",
    (
        "ttt",
        "data",
        "documents",
    ): "documents of a block are always joined here: what is learned from one is not forgotten "
    "before the next. Leave documents out; sequences: rows makes a sequence of each row",
}
"""Keys that other sections have -> why this one does not."""


class TTTData(Rows):
    """What to learn to read: text, or conversations."""

    sequences: Literal["blocks", "rows"] = Field(
        "blocks",
        description="blocks: documents joined and cut into blocks of max_length tokens; rows: each row, such as a "
        "conversation, is a sequence, truncated at max_length.",
    )
    train_on: Literal["assistant", "last_assistant", "completion", "all"] | None = Field(
        None,
        description="Tokens that carry the training loss (null: all in blocks, assistant in rows). While reading, the model "
        "learns from every token.",
    )
    max_length: Annotated[int, Field(ge=8, le=MOST)] = Field(
        4096, description="Tokens of a sequence; more than a chunk, or nothing is learned within it."
    )

    def resolved(self) -> Data | TextData:
        """The section as the stages with conversations or with text have it."""
        shared = {name: getattr(self, name) for name in Rows.model_fields}
        if self.sequences == "blocks":
            return TextData(**shared, train_on=self.train_on or "all", max_length=self.max_length)
        return Data(**shared, train_on=self.train_on or "assistant", max_length=self.max_length)


class TTTTrain(Train):
    """How long and how fast to train a model that learns as it reads."""

    learning_rate: float = Field(1e-4, gt=0, le=LARGEST_RATE, description="Peak learning rate of the slow weights.")
    batch_size: Positive = Field(
        1, description="Sequences per device and forward pass; each has fast weights of its own."
    )
    weight_decay: float = Field(0.1, ge=0, le=LARGEST_RATE, description="AdamW's weight decay, as in the paper.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's beta2, as in the paper.")


def _as_horizon(value: object) -> object:
    if value == "all" or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError(f"expected a number of chunks or all, found {describe(value)}")


_Horizon = Annotated[
    Annotated[Literal["all"], Tag("<name>")] | Annotated[Positive, Tag("<number>")],
    Discriminator(lambda value: "<name>" if isinstance(value, str) else "<number>"),
]


class MetaTraining(Section):
    """Conversion to a model that keeps learning as it reads, and its training (meta-training)."""

    window: Positive | None = Field(
        TTTConfig.window, description="Tokens that attention sees (null: the window of the model's own configuration)."
    )
    sink: Annotated[int, Field(ge=0, le=MOST)] = Field(
        TTTConfig.sink, description="First tokens that stay in view beside the window."
    )
    chunk: Positive = Field(TTTConfig.chunk, description="Tokens that are learned at once; at most window.")
    fast_blocks: Positive | None = Field(
        TTTConfig.fast_blocks, description="Number of last blocks whose MLPs learn (null: the last quarter)."
    )
    layout: Annotated[str, OneOf(LAYOUTS)] = Field(
        TTTConfig.layout, description="prime: an added MLP of each fast block learns; in_place: the block's own."
    )
    lr: float = Field(TTTConfig.lr, ge=0, le=STRONGEST, description="Learning rate of the inner steps; 0: no learning.")
    clip: float = Field(
        TTTConfig.clip,
        ge=0,
        le=STRONGEST,
        description="Largest norm of a sequence's inner gradient over all fast weights.",
    )
    horizon: Annotated[_Horizon, BeforeValidator(_as_horizon, json_schema_input_type=Literal["all"] | Positive)] = (
        Field(
            TTTConfig.horizon or "all",
            description="Chunks that a gradient of the training loss spans through the inner steps: 1 is first order, all "
            "is the paper's meta-gradient.",
        )
    )
    checkpoint: bool = Field(
        TTTConfig.checkpoint, description="Recompute each chunk in the backward pass: less memory, more time."
    )
    inner_gate: Annotated[str, OneOf(INNER_GATES)] = Field(
        TTTConfig.inner_gate, description="Gate that weights the tokens of the inner loss; none: all equally."
    )
    warmup: Annotated[int, Field(ge=0, le=MOST)] = Field(
        TTTConfig.warmup, description="Chunks of a sequence over which the inner rate rises to lr."
    )
    data: TTTData = Field(description="Training text or conversations, and those held out.")
    loss: TextLoss = Field(TextLoss(), description="The gate on each token's cross-entropy; none by default.")
    lora: Lora | None = Field(
        None,
        description="Low-rank adapters for the slow weights; the fast MLPs are trained in full. Null: all weights.",
    )
    train: TTTTrain = Field(TTTTrain(), description="Length, learning rate and optimiser of the training.")
    probes: Probes = Field(Probes(), description="What is measured before and after, of the model that learns.")

    def config(self) -> TTTConfig:
        """The settings of the conversion."""
        settings: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(TTTConfig)}
        if self.horizon == "all":
            settings["horizon"] = None
        return TTTConfig(**settings)

    def with_defaults(self) -> MetaTraining:
        """The section with the defaults that depend on other keys."""
        probes = self.probes.with_defaults(held_out=bool(self.data.held_out))
        return self.model_copy(update={"probes": probes})


def ttt_problems(raw: dict[str, Any]) -> Iterator[tuple[Loc, str]]:
    """(location, text) of each combination in the section's plain data that cannot work; locations are relative to it."""
    window, chunk = (raw.get(key, getattr(TTTConfig, key)) for key in ("window", "chunk"))
    if _is_count(window) and _is_count(chunk) and chunk > window:
        key = "chunk" if "chunk" in raw else "window"
        yield (
            (key,),
            f"a chunk of {chunk:,} tokens is larger than the window of {window:,}, and the tokens of a chunk must see each "
            f"other. Set chunk to at most {window}, or a larger window",
        )
    data = raw["data"] if isinstance(raw.get("data"), dict) else {}
    length = data.get("max_length", TTTData.model_fields["max_length"].default)
    if _is_count(length) and _is_count(chunk) and length <= chunk:
        loc = ("data", "max_length") if "max_length" in data else ("chunk",)
        yield (
            loc,
            f"sequences of {length:,} tokens end within the first chunk of {chunk:,}, so nothing learned would ever be used. "
            f"Set data.max_length to several chunks, such as {8 * chunk}, or a smaller chunk",
        )
    if raw.get("window", ...) is None and raw.get("sink"):
        yield (
            ("sink",),
            "the window of the model's own configuration has no sink. Set a window, or leave sink out",
        )
    lora = raw.get("lora")
    if lora is not None and raw.get("layout") == "in_place":
        yield (
            ("layout",),
            "in_place makes the blocks' own MLPs the fast ones, and adapters freeze them: their initial values would not be "
            "trained. Use layout: prime, or leave lora out",
        )
    saved = lora.get("modules_to_save") if isinstance(lora, dict) else None
    for index, name in enumerate(saved if isinstance(saved, list) else ()):
        if isinstance(name, str) and "ttt" in name.split("."):
            yield (
                ("lora", "modules_to_save", index),
                "peft would train a copy of the fast MLPs that the model does not use. Leave it out: they are trained beside "
                "the adapters anyway",
            )


def _is_count(value: object) -> bool:
    """A whole number; the schema reports values of another type."""
    return isinstance(value, int) and not isinstance(value, bool)
