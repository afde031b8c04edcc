"""The rows of a training: read, masked and encoded; text is cut into blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from eaftdrope.data import (
    DataReport,
    Example,
    Source,
    build_dataset,
    held_out_warnings,
    hold_out,
    iter_examples,
    join_rows,
    text_blocks,
)
from eaftdrope.errors import DataError
from eaftdrope.evaluate.texts import evenly_spaced
from eaftdrope.loaded_model import check_token_ids
from eaftdrope.recipe.data_section import Data
from eaftdrope.recipe.probe_sections import READ_HELD_OUT, Probes
from eaftdrope.recipe.stage_sections import TextData

from .record import DataStats
from .replay import Replies, choose_rows, find_replies, rows_wanted, source_of
from .settings import TrainingSettings

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLES = 4
"""Prompts whose answers are kept for people to read."""
_BATCH = 10_000
_SKIPPED_SHOWN = 5


@dataclass(frozen=True)
class RunData:
    """Encoded rows; the held-out ones also as examples, for the probes that generate. `replay`: how many of the training
    rows are replay, and which of them the model has still to generate."""

    train: Dataset
    report: DataReport
    held_out: Dataset | None
    held_out_examples: list[Example]
    replay: ReplayRows | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest training row."""
        import pyarrow.compute as pc

        batches = arrow_batches(self.train, ["input_ids"], _BATCH)
        return max((pc.max(pc.list_value_length(batch["input_ids"])).as_py() or 0 for batch in batches), default=0)

    @property
    def stats(self) -> DataStats:
        """Counts of the training rows, without those set aside by a held-out share. Replay that is still to be generated
        counts with the mean length of the other rows."""
        import pyarrow.compute as pc

        tokens = trained = 0
        for batch in arrow_batches(self.train, ["labels"], _BATCH):
            labels = pc.list_flatten(batch["labels"])
            tokens += len(labels)
            trained += pc.sum(pc.not_equal(labels, -100)).as_py() or 0
        report = self.report
        skipped = report.skipped_rows + report.fully_masked
        rows = len(self.train)
        if self.replay and self.replay.replies:
            whole = rows + self.replay.rows
            tokens, trained, rows = tokens * whole // rows, trained * whole // rows, whole
        return DataStats(rows, tokens, trained, truncated=report.truncated, skipped=skipped)


@dataclass(frozen=True)
class ReplayRows:
    """The replay of a training.

    Args:
        rows: how many of the training rows are replay.
        replies: where the model's replies are stored, if some of them are still to be generated: the rows are not among
            those of the training then.
    """

    rows: int
    replies: Replies | None = None

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The replay as lines of a plan."""
        if self.replies is None:
            return [("replay", f"{self.rows:,} of the rows")]
        left = self.rows - self.replies.cached(self.rows)
        most = left * self.replies.max_tokens
        return [
            (
                "replay",
                f"{self.rows:,} of the rows, which the model generates first: {left:,} replies are missing, at most "
                f"{most:,} tokens, and are kept for later runs",
            )
        ]


def arrow_batches(rows: Dataset, columns: list[str], size: int) -> Iterator[Any]:
    """Some columns of a dataset as arrow tables of at most `size` rows."""
    # pyrefly: ignore[missing-attribute]  # datasets annotates with_format as if it could return a DatasetDict
    return rows.select_columns(columns).with_format("arrow").iter(size)


def encode_rows(
    data: Data | TextData,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    max_length: int | None,
    exempt: Sequence[str] = (),
    enough: Callable[[int, int], bool] | None = None,
) -> tuple[Dataset, DataReport]:
    """The rows of `sources`, masked and encoded as the section `data` requires.

    Args:
        seed: of fractional weights.
        max_length: longer rows are truncated, None for no limit.
        exempt: strings whose tokens are exempt from the gate.
        enough: called with (rows, tokens) read so far; reading ends once it returns True.

    Raises:
        DataError: a source or row cannot be used, or no row has a trained token.
    """
    with warnings.catch_warnings():
        # the report has them, and the run prints the report
        warnings.simplefilter("ignore", UserWarning)
        return build_dataset(
            sources,
            tokenizer,
            format=data.format,
            train_on=data.train_on,
            max_length=max_length,
            on_bad_row=data.on_bad_row,
            seed=seed,
            exempt=exempt,
            enough=enough,
        )


def build_data(settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Read, mask and encode the rows of a training, or cut its text into blocks.

    Raises:
        DataError: a source or row cannot be used, no row has a trained token, or there is too little text for a block.
    """
    if isinstance(settings.data, TextData):
        return _text(settings, settings.data, tokenizer)
    return _conversations(settings, settings.data, tokenizer)


def _conversations(settings: TrainingSettings, data: Data, tokenizer: PreTrainedTokenizerBase) -> RunData:
    def encode(sources: list[Source], exempt: Sequence[str] = ()) -> tuple[Dataset, DataReport]:
        options = {"seed": settings.data_seed, "max_length": data.max_length, "exempt": exempt}
        return encode_rows(data, sources, tokenizer, **options)

    train, report = encode(data.train_sources(), settings.loss.exempt)
    sources = data.held_out_sources()
    if data.held_out_share:
        train, held_out = hold_out(train, data.held_out_share, seed=settings.data_seed)
        sources = data.train_sources()
    elif sources:
        held_out, held_out_report = encode(sources)
        report.warnings += held_out_warnings(train, held_out, held_out_report)
    else:
        train, report, replay = _with_replay(train, report, settings, data, tokenizer)
        return RunData(train, report, None, [], replay)
    # held-out rows are never replay: a share of the rows was set aside before
    train, report, replay = _with_replay(train, report, settings, data, tokenizer)
    chosen = set(_answered_rows(settings.probes, list(held_out["origin"])))
    # by origin: bad rows were skipped when the others were encoded
    examples = [e for source in sources for e in iter_examples(source, format=data.format, only=chosen)]
    return RunData(train, report, held_out, examples, replay)


def _with_replay(
    train: Dataset, report: DataReport, settings: TrainingSettings, data: Data, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, DataReport, ReplayRows | None]:
    """The training rows with their replay, which is left out as long as the model has not generated all of it."""
    replay = data.replay
    if replay is None:
        return train, report, None
    seed = settings.data_seed if replay.seed is None else replay.seed
    wanted = rows_wanted(replay.share, len(train))
    file = replay.origin
    if replay.is_generated:
        replies = find_replies(settings, tokenizer)
        file = replies.file(wanted)
        if file is None:
            return train, report, ReplayRows(wanted, replies)
    sources = [source_of(file)]
    # a reply of the model may be one that its template cannot write again
    lenient = data.model_copy(update={"on_bad_row": "skip"}) if replay.is_generated else data
    options = {"seed": seed, "max_length": data.max_length, "exempt": settings.loss.exempt}
    rows, found = encode_rows(lenient, sources, tokenizer, **options)
    chosen = choose_rows(len(rows), wanted, seed)
    (counts,) = found.by_source.values()
    name = "replay by the model" if replay.is_generated else f"replay of {sources[0]}"
    report.by_source[name] = replace(counts, rows=len(chosen), tokens=0, trained_tokens=0)
    # a string that is exempt in the other rows need not occur in these
    kept = [warning for warning in found.warnings if not warning.startswith("loss.exempt:")]
    report.warnings += [f"{name}: {warning}" for warning in kept]
    # pyrefly: ignore[bad-argument-type]  # datasets annotates select as if it could return a DatasetDict
    return join_rows([train, rows.select(chosen)]), report, ReplayRows(len(chosen))


def _answered_rows(probes: Probes, origins: list[str]) -> list[str]:
    """The held-out rows to generate answers for: all if a probe needs them, a few as samples, none without probes."""
    target = probes.target or []
    if any(
        probe.name == "function_calls" or (probe.name in READ_HELD_OUT and not probe.options.model_dump()["file"])
        for probe in target
    ):
        return origins
    return evenly_spaced(origins, SAMPLES) if target or probes.general else []


def _text(settings: TrainingSettings, data: TextData, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Blocks of text, also the held-out ones; reading ends once there is enough for the steps of the training."""
    share, steps, seed = data.held_out_share or 0.0, settings.train.steps, settings.data_seed

    def enough(rows: int, tokens: int) -> bool:
        assert steps is not None
        # no source has to supply more than all steps use, and a share of the rows is at least one
        return tokens * (1 - share) >= steps * settings.tokens_per_step and (not share or rows * share >= 1)

    def encode(sources: list[Source], **options: Any) -> tuple[Dataset, DataReport]:
        return encode_rows(data, sources, tokenizer, seed=seed, max_length=None, **options)

    rows, report = encode(data.train_sources(), enough=enough if steps else None, exempt=settings.loss.exempt)
    # text has no answers, so it does not change where generation stops
    report.stop_tokens.clear()
    held_out = None
    if share:
        rows, held_out = hold_out(rows, share, seed=seed)
    elif sources := data.held_out_sources():
        held_out, held_out_report = encode(sources)
        report.warnings += held_out_warnings(rows, held_out, held_out_report)

    def blocks(rows: Dataset, name: str, *, boundaries: bool = False) -> Dataset:
        try:
            return text_blocks(rows, length=settings.max_length, eos=tokenizer.eos_token_id, boundaries=boundaries)
        except DataError as error:
            raise DataError(f"{settings.stage}.data.{name}: {error}") from error

    trained = blocks(rows, "train", boundaries=settings.separate_documents)
    return RunData(trained, report, None if held_out is None else blocks(held_out, "held_out"), [])


def check_vocabulary(data: RunData, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Check the tokens of every row against the model's embedding, before its weights are loaded.

    Raises:
        DataError: the embedding has no row for a token.
    """
    for rows in (data.train, data.held_out):
        if rows is not None:
            check_token_ids(rows, config.get_text_config().vocab_size, tokenizer)


def print_audit(data: RunData, console: Console) -> None:
    """Print the warnings about the data and the rows that were skipped."""
    report = data.report
    for warning in report.warnings:
        console.print(Text.assemble(("warning", "yellow"), f" {warning}"), soft_wrap=True)
    for origin, reason in report.skipped[:_SKIPPED_SHOWN]:
        console.print(f"skipped {origin}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if report.skipped_rows > _SKIPPED_SHOWN:
        console.print(f"... and {report.skipped_rows - _SKIPPED_SHOWN} more rows skipped", highlight=False)
