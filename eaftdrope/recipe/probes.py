"""The `probes` section: what is measured before and after training, each probe a name or {name: {option: value}}."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator

from .base import Positive, Section, describe, existing_file
from .suggest import did_you_mean


class HeldOutLoss(Section):
    """Cross-entropy on the held-out rows."""

    limit: Positive | None = Field(None, description="Rows at most (null: all).")


class FunctionCalls(Section):
    """Generate the function calls of held-out rows and compare them with the expected ones."""

    limit: Positive = Field(32, description="Rows at most: generation is slow.")
    max_new_tokens: Positive = Field(96, description="Longest answer in tokens.")


class Perplexity(Section):
    """Perplexity of text that has nothing to do with the target."""

    files: list[str] | None = Field(None, description="Text or JSONL files (null: the text that eaftdrope ships).")
    max_tokens: Positive = Field(4096, description="Tokens at most, spread over the text.")

    @field_validator("files")
    @classmethod
    def _files_exist(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        return None if value is None else [existing_file(path, info) for path in value]


class MultipleChoice(Section):
    """Questions with choices, answered by likelihood."""

    file: str | None = Field(None, description="JSONL of question, choices, answer (null: the one eaftdrope ships).")
    limit: Positive | None = Field(None, description="Questions at most (null: all).")

    @field_validator("file")
    @classmethod
    def _file_exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else existing_file(value, info)


class Probe(Section):
    """One entry of a list of probes: exactly one of the fields is set, and its name is the probe's."""

    @property
    def name(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def options(self) -> Section:
        return getattr(self, self.name)


class TargetProbe(Probe):
    held_out_loss: HeldOutLoss | None = Field(None, description="Cross-entropy on data.held_out.")
    function_calls: FunctionCalls | None = Field(None, description="Function calls of data.held_out, by generation.")


class GeneralProbe(Probe):
    perplexity: Perplexity | None = Field(None, description="Perplexity of general text.")
    multiple_choice: MultipleChoice | None = Field(None, description="Multiple choice, by likelihood.")


TARGET_PROBES = tuple(TargetProbe.model_fields)
GENERAL_PROBES = tuple(GeneralProbe.model_fields)


def _as_probe(names: tuple[str, ...], others: tuple[str, ...], belongs: str):
    """Reads one entry; `others` are the probes of the other list, called `belongs`."""

    def read(value: object) -> object:
        if isinstance(value, str):
            if value in others:
                raise ValueError(f"'{value}' belongs under probes.{belongs}")
            if value not in names:
                raise ValueError(
                    f"unknown probe '{value}'.{did_you_mean(value, names)} Probes here: {', '.join(names)}"
                )
            return {value: {}}
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError(f"expected a probe's name or one {{name: {{option: value}}}}, found {describe(value)}")
        return {name: {} if options is None else options for name, options in value.items()}

    return read


def _entries(value: object) -> object:
    """A single probe may stand without a list."""
    return [value] if isinstance(value, (str, dict)) else value


def _list_of(model: type[BaseModel], names: tuple[str, ...], others: tuple[str, ...], belongs: str):
    entry = Annotated[
        model, BeforeValidator(_as_probe(names, others, belongs), json_schema_input_type=Literal[names] | model)
    ]
    return Annotated[list[entry], BeforeValidator(_entries, json_schema_input_type=list[entry])]


class Probes(Section):
    """What is measured before and after training."""

    target: _list_of(TargetProbe, TARGET_PROBES, GENERAL_PROBES, "general") | None = Field(
        None, description="What should get better (null: held_out_loss where there is held-out data)."
    )
    general: _list_of(GeneralProbe, GENERAL_PROBES, TARGET_PROBES, "target") = Field(
        ["perplexity", "multiple_choice"],
        description="What should not get worse.",
    )
    batch_tokens: Annotated[int, Field(ge=64)] = Field(
        2048, description="Tokens the probes take at once, padding included; bounds their logits."
    )

    def with_defaults(self, *, held_out: bool) -> Probes:
        """`target` filled in where the recipe leaves it out."""
        if self.target is not None:
            return self
        target = [TargetProbe(held_out_loss=HeldOutLoss())] if held_out else []
        return self.model_copy(update={"target": target})
