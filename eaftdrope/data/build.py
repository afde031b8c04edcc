"""The tokenised dataset of a mixture of sources: columns `input_ids`, `labels`, `origin`, and a report of its rows; and
`token_weights`, if a token has a weight other than 1 (`weights.py`).

- Constant memory: rows go to an Arrow file in batches, the dataset is a memory map of it. Nested fields
  are never stored in Arrow.
- Every row is encoded once; the weights of the mixture then choose and repeat rows by index.
- The rows are in the order of the sources and of their files: the trainer shuffles.
"""

from __future__ import annotations

import random
import traceback
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import ChatTemplateError, DataError, LostTextError, TemplateLimitError

from .arrow_file import WEIGHTS, write_rows
from .counts import DataReport, SourceReport, StopTokens, choose, content_key, groups_of, repeated_rows
from .encoding import Encoded, encode
from .formats import Example, normalise
from .sources import Row, Source, iter_rows, left_out

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_COLUMNS = ("input_ids", "labels", "origin")
_BATCH = 1000
_REASONS_KEPT = 100


def build_dataset(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "auto",
    train_on: str = "assistant",
    max_length: int | None = 1024,
    on_bad_row: str = "stop",
    seed: int = 0,
    exempt: Sequence[str] = (),
    enough: Callable[[int, int], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Dataset, DataReport]:
    """Build the mixture of `sources` as a dataset of `input_ids`, `labels` (-100 if not trained, not shifted), `origin`.

    Args:
        sources (`Sequence[Source]`): where the rows come from; a weight w repeats a source's rows w times.
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer; conversations need its chat template.
        format (`str`): one of `FORMATS`; "auto" detects it row by row.
        train_on (`str`): one of `TRAIN_ON`.
        max_length (`int`, *optional*): longer rows lose their end; None keeps all.
        on_bad_row (`str`): "stop" raises at the first bad row, "skip" leaves it out and counts it.
        seed (`int`): chooses the rows of a fractional weight.
        exempt (`Sequence[str]`): strings whose tokens are exempt from the gate.
        enough (`Callable[[int, int], bool]`, *optional*): called with the rows and tokens read from a source so far; the
            rest of it is not read once this returns true.
        progress (`Callable[[int], None]`, *optional*): called with the number of rows read, every 1,000 rows.

    Raises:
        DataError: a source cannot be read; a bad row under "stop", with file and line; no row is left, or none has a
            trained token.
    """
    if on_bad_row not in ("stop", "skip"):
        raise DataError(f"on_bad_row {on_bad_row!r} is not one of stop, skip.")
    names = _names(sources)
    report = DataReport(by_source={name: SourceReport() for name in names})
    report.weights.exempt = dict.fromkeys(exempt, 0)
    stops = StopTokens()
    lengths, trained, keys = array("I"), array("I"), array("Q")

    def encoded_rows() -> Iterator[dict[str, object]]:
        for name, source in zip(names, sources):
            rows = tokens = 0
            read = partial(normalise, format=format, reasoning=source.reasoning)
            for row in iter_rows(source):
                if enough is not None and enough(rows, tokens):
                    break
                if progress is not None and report.read % _BATCH == 0:
                    progress(report.read)
                options = {"train_on": train_on, "max_length": max_length, "exempt": exempt}
                encoded = _encode_row(row, report, name, on_bad_row, tokenizer, read, options)
                if encoded is not None:
                    stops.add(encoded)
                    report.weights.add(encoded)
                    lengths.append(len(encoded.input_ids))
                    trained.append(encoded.trained_tokens)
                    keys.append(content_key(encoded.input_ids))
                    rows, tokens = rows + 1, tokens + lengths[-1]
                    columns = {"input_ids": encoded.input_ids, "labels": encoded.labels, "origin": row.origin}
                    yield {**columns, WEIGHTS: encoded.weights.values}

    dataset = _complete(write_rows(encoded_rows(), (*_COLUMNS, WEIGHTS)), report)
    _refuse_empty(report, names, train_on, max_length)
    indices = _mixture(report, sources, seed)
    _count(report, indices, lengths, trained)
    if report.rows == 0:
        raise DataError(f"the weights leave no row of {', '.join(names)} ({report.encoded} rows). Raise a weight.")
    report.warnings += filter(None, map(left_out, sources))
    report.warnings += _copies(keys, dataset)
    stops.report_to(report, tokenizer, max_length)
    report.warn_of_weights()
    report.warn_of_ignored_fields()
    for text in report.warnings:
        warnings.warn(text, UserWarning, stacklevel=2)
    if all(source.weight == 1.0 for source in sources):
        return dataset, report
    return dataset.select([index for part in indices for index in part]), report


def _complete(dataset: Dataset, report: DataReport) -> Dataset:
    """Return the rows without the column of weights if no row has any, else with weights for every row."""
    if not report.weights.rows:
        return dataset.remove_columns(WEIGHTS)
    return dataset if report.weights.rows == len(dataset) else _with_weights(dataset)


def _with_weights(dataset: Dataset) -> Dataset:
    """Return the rows with weights, of 1 where a row has none."""

    def rows() -> Iterator[dict[str, object]]:
        for row in dataset:
            yield {**row, WEIGHTS: row.get(WEIGHTS) or [1.0] * len(row["input_ids"])}

    return write_rows(rows(), (*_COLUMNS, WEIGHTS))


def join_rows(parts: Sequence[Dataset]) -> Dataset:
    """Concatenate built datasets: with weights for every row if one of them has weights."""
    from datasets import concatenate_datasets

    weighted = [WEIGHTS in part.column_names for part in parts]
    if any(weighted):
        parts = [part if has_weights else _with_weights(part) for part, has_weights in zip(parts, weighted)]
    return concatenate_datasets(list(parts))


def hold_out(dataset: Dataset, share: float, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split a built dataset into rows to train on and rows held out: about `share` of its rows by origin, chosen by `seed`.

    All repetitions of a row (by the mixture's weights), and all rows with the same tokens, go to one side; the held-out
    side has each row once.

    Raises:
        DataError: one of the two sides would be empty.
    """
    origins = dataset["origin"][:]
    first: dict[str, int] = {}
    for index, origin in enumerate(origins):
        first.setdefault(origin, index)
    groups = groups_of(origins, dataset)
    wanted = int(share * len(first) + 0.5)
    if not 0 < wanted < len(first) or len(groups) < 2:
        copies = "" if len(groups) == len(first) else f" ({len(groups)} without their copies)"
        raise DataError(
            f"holding out {share:g} of {len(first)} rows{copies} leaves one side empty. Set a held-out file, or change "
            "the share."
        )
    chosen = {origin for group in choose(groups, share, wanted, seed) for origin in group}
    kept = [index for index, origin in enumerate(origins) if origin not in chosen]
    return dataset.select(kept), dataset.select([index for origin, index in first.items() if origin in chosen])


def iter_examples(source: Source, *, format: str = "auto", only: set[str] | None = None) -> Iterator[Example]:
    """Yield the examples of `source` in order; with `only`, only the rows of these origins are read.

    Raises:
        DataError: the source, or a row of it, cannot be used (with file and line).
    """
    read = partial(normalise, format=format, reasoning=source.reasoning)
    for row in iter_rows(source):
        if only is None or row.origin in only:
            yield _example(row, read)


def examples_for_probe(
    source: Source, *, count: int | None = None, format: str = "auto", seed: int = 0
) -> list[Example]:
    """Return examples for a probe: all of `source`, or `count` of them chosen by `seed`. The source's weight is not used.

    Raises:
        DataError: as `iter_examples`, or the source has no row.
    """
    examples = list(iter_examples(source, format=format))
    if not examples:
        raise DataError(f"{source} has no row to probe with.")
    if count is None or count >= len(examples):
        return examples
    return random.Random(f"{seed}:probe").sample(examples, count)


# --- rows -------------------------------------------------------------------------------------------------------------


def _names(sources: Sequence[Source]) -> list[str]:
    """Return a name for each source; one that occurs twice is numbered."""
    if not sources:
        raise DataError("no data source. Set at least one file, folder, dataset id or package.")
    names = [str(source) for source in sources]
    return [f"{name} #{n + 1}" if names.count(name) > 1 else name for n, name in enumerate(names)]


def _example(row: Row, read: Callable[..., Example]) -> Example:
    if row.error is not None:
        raise DataError(f"{row.origin}: {row.error}")
    try:
        return read(row.data, origin=row.origin)
    except (MemoryError, TemplateLimitError):
        raise
    except Exception as error:
        raise DataError(f"{row.origin}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return why a row is bad. An unforeseen error is one row's too: it states its place, and `on_bad_row` decides."""
    if isinstance(error, DataError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"the row cannot be used: {type(error).__name__}: {error} (at {Path(last.filename).name}:{last.lineno}; not "
        "foreseen, please report it with the row)"
    )


def _remedy(error: Exception | None) -> str:
    if isinstance(error, ChatTemplateError):
        return ""  # no row can be repaired so that it passes
    if isinstance(error, LostTextError):
        return "Or set on_bad_row: skip to leave such rows out."
    return "Repair the row, or set on_bad_row: skip to leave such rows out."


def _encode_row(
    row: Row,
    report: DataReport,
    name: str,
    on_bad_row: str,
    tokenizer: PreTrainedTokenizerBase,
    read: Callable[..., Example],
    options: dict[str, Any],
) -> Encoded | None:
    """Encode a row and update its source's counts; None if it is left out."""
    counts = report.by_source[name]
    counts.read += 1
    reason, remedy = row.error, _remedy(None)
    encoded = None
    if reason is None:
        try:
            example = read(row.data, origin=row.origin)
            counts.add_fields(example)
            encoded = encode(example, tokenizer, **options)
            counts.add_dropped(encoded.dropped)
        except (MemoryError, TemplateLimitError):
            raise
        except Exception as error:
            reason, remedy = _reason(error), _remedy(error)
            counts.add_lost(error)
    if encoded is None:
        assert reason is not None
        if on_bad_row == "stop":
            raise DataError(f"{row.origin}: {reason}\n{remedy}".rstrip())
        counts.skipped += 1
        if len(report.skipped) < _REASONS_KEPT:
            report.skipped.append((row.origin, reason))
        return None
    if encoded.trained_tokens == 0:
        counts.fully_masked += 1
        counts.cut_off += encoded.truncated
        return None
    counts.encoded += 1
    counts.truncated += encoded.truncated
    return encoded


def _copies(keys: Sequence[int], dataset: Dataset) -> list[str]:
    found = repeated_rows(keys)
    if found is None:
        return []
    count, (earlier, row) = found
    return [
        f"{count:,} of {len(keys):,} rows are copies of earlier ones (the first: {dataset[row]['origin']} of "
        f"{dataset[earlier]['origin']}) and count as often. Remove them, unless that is intended."
    ]


def _refuse_empty(report: DataReport, names: list[str], train_on: str, max_length: int | None) -> None:
    if report.encoded:
        return
    where = ", ".join(names)
    if report.read == 0:
        raise DataError(f"{where}: no row.")
    if report.fully_masked == 0:
        first = "\n".join(f"  {origin}: {reason}" for origin, reason in report.skipped[:3])
        raise DataError(f"{where}: all {report.read} rows are bad; the first:\n{first}")
    cut_off = report.cut_off
    raise DataError(
        f"{where}: has no trained token in any row ({report.read} rows: {report.fully_masked - cut_off} have none under "
        f"train_on: {train_on}, {cut_off} lose theirs at max_length: {max_length}, {report.skipped_rows} are bad). "
        "Check train_on and the rows' assistant turns, or raise max_length; "
        "`eaftdrope preview` shows what is trained."
    )


# --- the mixture ------------------------------------------------------------------------------------------------------


def _mixture(report: DataReport, sources: Sequence[Source], seed: int) -> list[list[int]]:
    """Return, for each source, the indices of its rows in the mixture.

    Weight 2.5 uses each row twice, and half of the rows (rounded) once more, chosen by the seed.
    """
    parts, start = [], 0
    for number, (source, counts) in enumerate(zip(sources, report.by_source.values())):
        rows = range(start, start + counts.encoded)
        start += counts.encoded
        whole = int(source.weight)
        extra = int((source.weight - whole) * len(rows) + 0.5)
        # The path is not part of the seed: the same rows are chosen wherever the files are.
        chosen = sorted(random.Random(f"{seed}:mixture:{number}").sample(rows, extra))
        parts.append([*rows] * whole + chosen)
    return parts


def _count(report: DataReport, indices: list[list[int]], lengths: array[int], trained: array[int]) -> None:
    for counts, part in zip(report.by_source.values(), indices):
        counts.rows = len(part)
        counts.tokens = sum(lengths[index] for index in part)
        counts.trained_tokens = sum(trained[index] for index in part)
