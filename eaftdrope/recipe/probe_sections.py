"""The section `probes`: the measurements before and after training, each a name or {name: {option: value}}.

The defaults of probes are stated here only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from eaftdrope.rlm.tasks import KINDS, SETS

from .base import MOST, OneOf, Positive, Section, describe, existing_file
from .suggest import did_you_mean

GENERATED = ("numeric_answers", "exact_answers", "yes_no_maybe")
"""Probes that are allowed in both lists: on the held-out rows, or on a file."""
READ_HELD_OUT = (*GENERATED, "serving")
"""Probes of the target that read the held-out rows, unless they have a file."""


class HeldOutLoss(Section):
    """Cross-entropy on the held-out rows."""

    limit: Positive | None = Field(None, description="Maximum number of rows (null: all).")


class FunctionCalls(Section):
    """Generate the function calls of held-out rows and compare them with the expected ones."""

    limit: Positive = Field(32, description="Maximum number of rows; generation is slow.")
    max_new_tokens: Positive = Field(96, description="Maximum length of an answer in tokens.")


class Perplexity(Section):
    """Perplexity of text that has nothing to do with the target."""

    files: list[str] | None = Field(None, description="Text or JSONL files (null: the text that comes with eaftdrope).")
    max_tokens: Positive = Field(4096, description="Maximum number of tokens, spread over the text.")

    @field_validator("files")
    @classmethod
    def _files_exist(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        return None if value is None else [existing_file(path, info) for path in value]


class MultipleChoice(Section):
    """Questions with choices, answered by likelihood."""

    file: str | None = Field(
        None, description="JSONL of question, choices, answer (null: the one that comes with eaftdrope)."
    )
    limit: Positive | None = Field(None, description="Maximum number of questions (null: all).")

    @field_validator("file")
    @classmethod
    def _file_exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else existing_file(value, info)


class Generated(Section):
    """A probe that answers rows and compares the answers with their references."""

    file: str | None = Field(
        None, description="JSONL of question and answer, or of messages (null: the held-out rows; target only)."
    )
    limit: Positive = Field(64, description="Maximum number of rows; generation is slow.")

    @field_validator("file")
    @classmethod
    def _file_exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else existing_file(value, info)


class NumericAnswers(Generated):
    """Answer by generation; right if the last number, or the one after ####, is the reference's (as for GSM8K)."""

    max_new_tokens: Positive = Field(256, description="Maximum length of an answer in tokens.")


class ExactAnswers(Generated):
    """Answer by generation; right if the whole answer is the reference, but for case, punctuation and articles."""

    max_new_tokens: Positive = Field(32, description="Maximum length of an answer in tokens.")


class YesNoMaybe(Generated):
    """Answer by generation; right if the first yes, no or maybe is the reference's (as for PubMedQA)."""

    max_new_tokens: Positive = Field(32, description="Maximum length of an answer in tokens.")


class Instructions(Section):
    """Short instructions whose keeping can be verified (so many words, bullets, JSON), answered by generation."""

    limit: Positive | None = Field(None, description="Maximum number of instructions (null: all 40).")
    max_new_tokens: Positive = Field(160, description="Maximum length of an answer in tokens.")


class RLMTasks(Section):
    """Tasks over long contexts, with the model as the root of a recursive language model; names of the test set."""

    tasks: list[Annotated[str, OneOf(KINDS)]] = Field(
        ["needle", "count"], min_length=1, description="Kinds of tasks; four shares of each are measured."
    )
    limit: Positive = Field(50, description="Trials of each task.")
    chars: Positive = Field(8000, description="Length of a context in characters.")
    phrasings: Annotated[str, OneOf(SETS)] = Field("train", description="Set of phrasings of the queries.")
    iterations: Positive = Field(4, description="Maximum number of replies of a trial.")
    max_new_tokens: Positive = Field(128, description="Maximum length of a reply in tokens.")
    short_prompt: bool = Field(True, description="Use the system prompt for tiny models.")


class Agreement(Section):
    """KL divergence from the base model, and top-1 agreement with it, on its own answers to general prompts."""

    file: str | None = Field(None, description="JSONL of prompt or messages (null: the 48 that come with eaftdrope).")
    limit: Positive | None = Field(None, description="Maximum number of prompts (null: all).")
    max_tokens: Positive = Field(1024, description="Maximum number of compared tokens, spread over all answers.")
    max_new_tokens: Positive = Field(32, description="Maximum length of the base model's answers in tokens.")

    @field_validator("file")
    @classmethod
    def _file_exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else existing_file(value, info)


class FormatKeeping(Section):
    """Formats that the prompt states to the letter (JSON, lists, tags), checked exactly."""

    limit: Positive | None = Field(None, description="Maximum number of prompts (null: all 120).")
    max_new_tokens: Positive = Field(48, description="Maximum length of an answer in tokens.")


class CallRefusal(Section):
    """Questions that no function on offer answers: the share that is answered without a call."""

    file: str | None = Field(
        None, description="JSONL of messages and tools that no call answers (null: those of bfcl-eval)."
    )
    limit: Positive = Field(100, description="Maximum number of questions, and of answerable ones as a control.")
    max_new_tokens: Positive = Field(48, description="Maximum length of an answer in tokens.")

    @field_validator("file")
    @classmethod
    def _file_exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else existing_file(value, info)


class Verbosity(Section):
    """Length of the answers to everyday requests; the change is the log of its ratio to the base model's."""

    limit: Positive | None = Field(100, description="Maximum number of prompts (null: all).")
    max_new_tokens: Positive = Field(128, description="Maximum length of an answer in tokens.")


class LanguageDrift(Section):
    """Share of an answer's letters in a script that the question does not have, in eight languages."""

    limit: Positive | None = Field(None, description="Maximum number of questions (null: all 104).")
    max_new_tokens: Positive = Field(32, description="Maximum length of an answer in tokens.")


class TurnConsistency(Section):
    """Pairs of turns whose second one can only be answered by keeping what the first one states."""

    limit: Positive | None = Field(None, description="Maximum number of pairs (null: all 120).")
    max_new_tokens: Positive = Field(32, description="Maximum length of an answer in tokens.")


class LongRecall(Section):
    """Needles hidden in texts of 1, 2 and 4 times the trained length."""

    length: Annotated[int, Field(ge=64, le=MOST)] | None = Field(
        None, description="Trained length in tokens (null: max_length of the data)."
    )
    multiples: list[Positive] = Field([1, 2, 4], min_length=1, description="Lengths, as multiples of it.")
    trials: Positive = Field(100, description="Needles per length.")


class LongLoss(Section):
    """Loss of the same tokens after 1, 2 and 4 times the trained length."""

    files: list[str] | None = Field(None, description="Text or JSONL files (null: the text that comes with eaftdrope).")
    length: Annotated[int, Field(ge=16, le=MOST)] | None = Field(
        None, description="Trained length in tokens (null: max_length of the data)."
    )
    multiples: list[Positive] = Field([1, 2, 4], min_length=1, description="Lengths, as multiples of it.")
    passages: Positive = Field(32, description="Passages of each length.")

    @field_validator("files")
    @classmethod
    def _files_exist(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        return None if value is None else [existing_file(path, info) for path in value]


class Serving(Section):
    """Tokens of a tool call as a server of llama.cpp feeds them to the model, compared with the trained ones."""

    server: str = Field(
        "http://127.0.0.1:8080", min_length=1, description="Address of `llama-server -m MODEL.gguf --jinja`."
    )
    file: str | None = Field(None, description="JSONL of rows whose last answer calls (null: the held-out rows).")
    limit: Positive = Field(100, description="Maximum number of rows.")

    @field_validator("file")
    @classmethod
    def _file_exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else existing_file(value, info)


class Probe(Section):
    """One entry of a list of probes: exactly one of the fields is set, and its name is the probe's."""

    @property
    def name(self) -> str:
        """The probe's name in a recipe."""
        return next(iter(self.model_fields_set))

    @property
    def options(self) -> Section:
        """The probe's options, all of them set."""
        return getattr(self, self.name)


class TargetProbe(Probe):
    held_out_loss: HeldOutLoss | None = Field(None, description="Cross-entropy on data.held_out.")
    function_calls: FunctionCalls | None = Field(None, description="Function calls of data.held_out, by generation.")
    numeric_answers: NumericAnswers | None = Field(None, description="Final numbers of answers, by generation.")
    exact_answers: ExactAnswers | None = Field(None, description="Whole answers, by generation.")
    yes_no_maybe: YesNoMaybe | None = Field(None, description="Yes, no or maybe, by generation.")
    rlm_tasks: RLMTasks | None = Field(None, description="Long contexts, as the root of an RLM.")
    serving: Serving | None = Field(None, description="Tokens of tool calls as llama.cpp feeds them.")


class GeneralProbe(Probe):
    perplexity: Perplexity | None = Field(None, description="Perplexity of general text.")
    multiple_choice: MultipleChoice | None = Field(None, description="Multiple choice, by likelihood.")
    agreement: Agreement | None = Field(None, description="KL divergence from the base model, and agreement with it.")
    instructions: Instructions | None = Field(None, description="Verifiable instructions, by generation.")
    format_keeping: FormatKeeping | None = Field(None, description="Stated formats, by generation.")
    call_refusal: CallRefusal | None = Field(None, description="No call where none fits, by generation.")
    verbosity: Verbosity | None = Field(None, description="Length of answers, by generation.")
    language_drift: LanguageDrift | None = Field(None, description="Script of answers, by generation.")
    turn_consistency: TurnConsistency | None = Field(None, description="Two-turn pairs, by generation.")
    long_recall: LongRecall | None = Field(None, description="Needles beyond the trained length, by generation.")
    long_loss: LongLoss | None = Field(None, description="Loss of the same tokens after contexts of several lengths.")
    numeric_answers: NumericAnswers | None = Field(None, description="Final numbers of answers, by generation.")
    exact_answers: ExactAnswers | None = Field(None, description="Whole answers, by generation.")
    yes_no_maybe: YesNoMaybe | None = Field(None, description="Yes, no or maybe, by generation.")

    @field_validator(*GENERATED)
    @classmethod
    def _has_its_own_rows(cls, value: Generated | None) -> Generated | None:
        if value is not None and value.file is None:
            raise ValueError("under general this probe needs its own file: the held-out rows are the target's")
        return value


TARGET_PROBES = tuple(TargetProbe.model_fields)
GENERAL_PROBES = tuple(GeneralProbe.model_fields)


def _as_probe(names: tuple[str, ...], others: tuple[str, ...], belongs: str) -> Callable[[object], object]:
    """A validator of one entry; `others` are the probes of the other list, whose name is `belongs`."""

    def read(value: object) -> object:
        if isinstance(value, str):
            if value in others and value not in names:
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
    """A list of probes; a single one may be given without a list."""
    return [value] if isinstance(value, (str, dict)) else value


_TargetEntry = Annotated[
    TargetProbe,
    BeforeValidator(
        _as_probe(TARGET_PROBES, GENERAL_PROBES, "general"),
        json_schema_input_type=Annotated[str, OneOf(TARGET_PROBES)] | TargetProbe,
    ),
]
_GeneralEntry = Annotated[
    GeneralProbe,
    BeforeValidator(
        _as_probe(GENERAL_PROBES, TARGET_PROBES, "target"),
        json_schema_input_type=Annotated[str, OneOf(GENERAL_PROBES)] | GeneralProbe,
    ),
]


class Probes(Section):
    """What is measured before, during and after training."""

    target: Annotated[list[_TargetEntry], BeforeValidator(_entries)] | None = Field(
        None, description="Probes that should improve (null: held_out_loss if there is held-out data)."
    )
    # pyrefly: ignore[bad-assignment]  # names, which validation turns into probes
    general: Annotated[list[_GeneralEntry], BeforeValidator(_entries)] = Field(
        ["perplexity", "multiple_choice"],
        description="Probes that should not get worse.",
    )
    every: Positive | None = Field(None, description="Steps between measurements during training (null: none).")
    during_limit: Positive = Field(
        32, description="Maximum number of rows, windows, questions or prompts per probe of such a measurement."
    )
    batch_tokens: Annotated[int, Field(ge=64, le=MOST)] = Field(
        2048, description="Tokens per forward pass of the probes, padding included; bounds their logits."
    )

    def with_defaults(self, *, held_out: bool) -> Probes:
        """The section with `target` filled in if the recipe leaves it out."""
        if self.target is not None:
            return self
        target = [TargetProbe(held_out_loss=HeldOutLoss())] if held_out else []
        return self.model_copy(update={"target": target})
