"""The section `data`: the rows to train on, their form, and the rows to hold out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from eaftdrope.data import Source, check_source
from eaftdrope.data.formats import FORMATS

from . import paths
from .base import MOST, OneOf, Positive, Section, describe, existing_file, recipe_folder


class DataSource(Section):
    """One source of rows."""

    path: str = Field(
        min_length=1,
        description="File (.jsonl, .json, .parquet, .csv), folder of such files, hub dataset id, or `package:` and one of "
        "bfcl, gsm8k, medquad, novels, rlm_expert.",
    )
    weight: float = Field(
        1.0, gt=0, le=1000, description="Repetitions of each row: 2 uses every row twice, 0.5 uses half of the rows."
    )
    split: str = Field("train", description="Split of a hub dataset or package.")
    limit: Positive | None = Field(None, description="Maximum number of rows.")
    name: str | None = Field(None, description="Configuration name of a hub dataset.")
    reasoning: bool = Field(True, description="Keep the assistant's reasoning (<think>) before its answer.")

    @field_validator("path")
    @classmethod
    def _path_exists(cls, value: str, info: ValidationInfo) -> str:
        folder = recipe_folder(info)
        return value if folder is None else paths.resolved(value, folder)

    @model_validator(mode="after")
    def _source_is_usable(self, info: ValidationInfo) -> DataSource:
        if recipe_folder(info) is not None:
            problem = check_source(self.source())
            if problem:
                raise ValueError(problem)
        return self

    def source(self) -> Source:
        """The source as the package data reads it."""
        return Source(**self.model_dump())


def _as_sources(value: object) -> object:
    """A path, a mapping, or a list of either, as a list of mappings; numbers and null pass (a share, no data)."""
    if isinstance(value, (str, dict)):
        value = [value]
    if isinstance(value, list):
        if not value:
            raise ValueError("an empty list: it needs at least one file or dataset")
        return [{"path": entry} if isinstance(entry, str) else entry for entry in value]
    return value


def _as_train_sources(value: object) -> object:
    value = _as_sources(value)
    if not isinstance(value, list):
        raise ValueError(f"expected a file, a dataset id or a list of them, found {describe(value)}")
    return value


def _as_held_out(value: object) -> object:
    value = _as_sources(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float, list))):
        raise ValueError(
            f"expected a file, a dataset id, a list of them, or a share of train such as 0.05, found {describe(value)}"
        )
    return value


_SourceInput = str | DataSource | list[str | DataSource]
_HeldOut = Annotated[
    Annotated[list[DataSource], Tag("<sources>")] | Annotated[float, Field(gt=0, lt=1), Tag("<share>")],
    Discriminator(lambda value: "<sources>" if isinstance(value, list) else "<share>"),
]


class Rows(Section):
    """Data sources, as fine-tuning and recalibration share them."""

    train: Annotated[list[DataSource], BeforeValidator(_as_train_sources, json_schema_input_type=_SourceInput)] = Field(
        description="A source, or a list of them: paths, ids, or mappings (path, weight, split, limit, name, reasoning)."
    )
    held_out: Annotated[
        _HeldOut | None,
        BeforeValidator(_as_held_out, json_schema_input_type=_SourceInput | Annotated[float, Field(gt=0, lt=1)] | None),
    ] = Field(None, description="Rows never trained on: sources as for train, or a share of train such as 0.05.")
    format: Annotated[str, OneOf(FORMATS)] = Field(
        "auto", description="Format of the rows; auto detects it from each row's columns."
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="For a row that cannot be read: stop, or skip and count it."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="Seed of a held-out share and of fractional weights (null: train.seed)."
    )

    def train_sources(self) -> list[Source]:
        """The sources of the training rows."""
        return [entry.source() for entry in self.train]

    def held_out_sources(self) -> list[Source]:
        """The held-out sources; empty without any, or if `held_out` is a share of train."""
        return [entry.source() for entry in self.held_out] if isinstance(self.held_out, list) else []

    def data_seed(self, train_seed: int) -> int:
        """Seed of a held-out share and of fractional weights; runs of several training seeds can share their rows."""
        return train_seed if self.seed is None else self.seed

    @property
    def held_out_share(self) -> float | None:
        """The share of the training rows to hold out; None if `held_out` is not a share."""
        return self.held_out if isinstance(self.held_out, float) else None


def _model_or_file(value: str, info: ValidationInfo) -> str:
    """`model`, or a file or dataset as it was found."""
    folder = recipe_folder(info)
    if value == "model" or folder is None:
        return value
    found = paths.resolved(value, folder)
    if problem := check_source(Source(found)):
        raise ValueError(f"{problem} Or write model, for replies that the model generates")
    return found


class _ReplayOptions(Section):
    share: float = Field(0.2, gt=0, lt=1, description="Share of the training rows that are replay.")
    prompts: str | None = Field(
        None, description="from: model: file of prompts (.jsonl with prompt, question or messages)."
    )
    max_tokens: Positive = Field(256, description="from: model: longest reply; longer ones are left out.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="Seed of the replies and of the choice of rows (null: that of the data)."
    )

    @field_validator("prompts")
    @classmethod
    def _prompts_exist(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else existing_file(value, info)

    @property
    def origin(self) -> str:
        """The key `from`, which Python cannot name: `model`, or a source of rows."""
        return getattr(self, "from")

    @property
    def is_generated(self) -> bool:
        """True if the model generates the rows."""
        return self.origin == "model"


# a field of this name cannot be written in a class
Replay = create_model(
    "Replay",
    __base__=_ReplayOptions,
    __doc__="Rows against forgetting, mixed into the training rows and masked like them.",
    __module__=__name__,
    **{
        "from": (
            Annotated[str, AfterValidator(_model_or_file)],
            Field(
                "model",
                min_length=1,
                description="model: replies of the model itself, before the training; or a file or dataset of rows.",
            ),
        )
    },
)


class Data(Rows):
    """What to train on, and what to hold out."""

    train_on: Literal["assistant", "last_assistant", "completion", "all"] = Field(
        "assistant", description="Which tokens carry the loss."
    )
    max_length: int = Field(
        1024,
        ge=8,
        le=MOST,
        description="Maximum length in tokens; longer rows are truncated, and the number is reported.",
    )
    replay: Replay | None = Field(
        None, description="Rows of the model itself, or of other data, mixed in against forgetting (null: none)."
    )
    packing: bool = Field(
        False, description="Pack several rows into one sequence (refused if attention would mix them)."
    )
