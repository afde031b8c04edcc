"""The section `serve`: which reader answers a question about a text, by the length of the text.

`eaftdrope ask RUN` reads it. It may be changed after the training: it is no part of what a run is compared by.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Discriminator, Field, Tag

from eaftdrope.rlm.limits import Limits

from .base import MOST, OneOf, Positive, Section, describe

POLICIES = ("reset", "fork", "accumulate")
"""What a question finds in the state of a reader, and leaves there: see `ServedTTT.policy`."""
SERVED_SANDBOXES = ("monty", "monty+bubblewrap", "cpython")


def _as_upto(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError(f"expected a number of tokens, or the rlm_bench.json that decides it, found {describe(value)}")


_Upto = Annotated[
    Annotated[str, Tag("<file>"), Field(min_length=1)] | Annotated[int, Tag("<number>"), Field(ge=0, le=MOST)],
    Discriminator(lambda value: "<file>" if isinstance(value, str) else "<number>"),
]


class ServedPlain(Section):
    """One call of the model, which sees the whole text."""

    upto: Annotated[_Upto, BeforeValidator(_as_upto, json_schema_input_type=str | int)] | None = Field(
        None,
        description="Tokens of text and question, at most; or the rlm_bench.json of a bench, whose crossover it then is "
        "(null: the model's context).",
    )


class ServedTTT(Section):
    """The model of the stage ttt, which learns as it reads."""

    upto: Positive | None = Field(None, description="Tokens of text and question, at most (null: no limit).")
    policy: Annotated[str, OneOf(POLICIES)] = Field(
        "fork",
        description="reset: each question reads the text again; fork: a text is read once, and each question leaves it as it "
        "is; accumulate: questions and answers are read too.",
    )


class ServedLimits(Section):
    """Limits of a run of the RLM, held where a model is called."""

    iterations: Positive = Field(Limits.iterations, description="Replies of the root, and of each child.")
    depth: Positive = Field(Limits.depth, description="Levels of REPLs; 1: sub-calls are plain calls.")
    sub_calls: Annotated[int, Field(ge=0, le=MOST)] = Field(Limits.sub_calls, description="Calls of the sub-model.")
    tokens: Positive = Field(Limits.tokens, description="Tokens read and written by all models.")
    seconds: float = Field(Limits.seconds, gt=0, le=MOST, description="Wall-clock time; resuming begins at 0 again.")
    cell_seconds: float = Field(Limits.cell_seconds, gt=0, le=MOST, description="Computing time of a block of code.")
    output_chars: Positive = Field(Limits.output_chars, description="Characters of output that the root is shown.")
    preview_chars: Annotated[int, Field(ge=0, le=MOST)] = Field(
        Limits.preview_chars, description="Characters of the text that the first prompt shows."
    )
    memory_mb: Positive = Field(Limits.memory_mb, description="Memory of a REPL in MB.")
    root_tokens: Positive = Field(Limits.root_tokens, description="New tokens of a reply of the root.")
    sub_tokens: Positive = Field(Limits.sub_tokens, description="New tokens of a reply of the sub-model.")

    def resolved(self) -> Limits:
        """The limits as the engine has them."""
        return Limits(**self.model_dump())


class ServedRLM(Section):
    """A recursive language model: the root writes code that reads the text; the run's own models answer its questions."""

    root: str | None = Field(
        None, min_length=1, description="Folder (adapters too), hub id or package:NAME (null: the model of plain)."
    )
    short_prompt: bool = Field(False, description="Use the system prompt for tiny models.")
    sandbox: Annotated[str, OneOf(SERVED_SANDBOXES)] = Field("monty", description="Where the root's code runs.")
    limits: ServedLimits = Field(ServedLimits(), description="What a question may cost.")


class Serve(Section):
    """Readers of a text, the shortest texts first: a plain call, test-time training, a recursive language model."""

    plain: ServedPlain = Field(ServedPlain(), description="One call of the model that the stages before ttt leave.")
    ttt: ServedTTT = Field(ServedTTT(), description="The model of the stage ttt, if there is one.")
    rlm: ServedRLM | None = Field(None, description="A recursive language model (null: only with --method rlm).")
    answer_tokens: Positive = Field(128, description="New tokens of an answer of plain and ttt.")
