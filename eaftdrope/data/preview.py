"""The preview: a few rows with their trained tokens marked, the fields of the rows, and the counts of the whole mixture.

On a terminal trained tokens are bold green and the rest is dim; elsewhere trained stretches are in [[ ]]. Special tokens
are shown as they are, control characters as escapes (a row must not be able to control the terminal).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from eaftdrope.errors import printable
from eaftdrope.loaded_model import check_token_ids

from .arrow_file import WEIGHTS
from .build import build_dataset
from .counts import DataReport
from .encoding import IGNORED
from .fields import is_metadata
from .sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRAINED, _CONTEXT = "bold green", "dim"
_REASONS_SHOWN = 5


@dataclass(frozen=True)
class PreviewRow:
    """One row: its text in stretches (text, trained), in order; together they are the decoded row. `weights` are the
    smallest and the largest of its trained tokens, `exempt` how many of them are exempt from the gate."""

    origin: str
    stretches: list[tuple[str, bool]]
    tokens: int
    trained_tokens: int
    weights: tuple[float, float] = (1.0, 1.0)
    exempt: int = 0


@dataclass(frozen=True)
class Preview:
    """Rows spread over the mixture, and the report of all rows read: at most `scan` of each source (None: all)."""

    rows: list[PreviewRow]
    report: DataReport
    max_length: int | None
    on_bad_row: str
    scan: int | None
    is_partial: bool


def make_preview(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int = 3,
    format: str = "auto",
    train_on: str = "assistant",
    max_length: int | None = 1024,
    on_bad_row: str = "stop",
    seed: int = 0,
    exempt: Sequence[str] = (),
    scan: int | None = 2000,
    vocabulary: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Preview:
    """Encode the mixture as training would (the first `scan` rows of each source) and pick `rows` rows spread over it.

    With `scan` None all rows are read. Bad rows never stop a preview: they are listed. `vocabulary` is the number of tokens
    that the model has an embedding for.

    Raises:
        DataError: a source cannot be read, no row is left, or a row has a token beyond `vocabulary`.
    """
    scanned = sources
    if scan is not None:
        scanned = [replace(source, limit=min(scan, source.limit or scan)) for source in sources]
    with warnings.catch_warnings():
        # The preview shows them.
        warnings.simplefilter("ignore", UserWarning)
        dataset, report = build_dataset(
            scanned,
            tokenizer,
            format=format,
            train_on=train_on,
            max_length=max_length,
            on_bad_row="skip",
            seed=seed,
            exempt=exempt,
            progress=progress,
        )
    if vocabulary is not None:
        check_token_ids(dataset, vocabulary, tokenizer)
    picked = sorted({number * len(dataset) // rows for number in range(rows)})
    is_partial = scan is not None and any(
        counts.read == scan and source.limit != scan for source, counts in zip(sources, report.by_source.values())
    )
    return Preview(
        rows=[_row(dataset[index], tokenizer) for index in picked],
        report=report,
        max_length=max_length,
        on_bad_row=on_bad_row,
        scan=scan,
        is_partial=is_partial,
    )


def _row(row: dict, tokenizer: PreTrainedTokenizerBase) -> PreviewRow:
    ids, trained = row["input_ids"], [label != IGNORED for label in row["labels"]]
    stretches, end, before = [], 0, ""
    for is_trained, group in groupby(trained):
        end += len(list(group))
        # Decoded from the start each time: a stretch decoded by itself may lose the space it begins with.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        stretches.append((text[len(before) :], is_trained))
        before = text
    weights = [w for w, counts in zip(row.get(WEIGHTS, [])[1:], trained[1:]) if counts] or [1.0]
    extremes = min(map(abs, weights)), max(map(abs, weights))
    return PreviewRow(row["origin"], stretches, len(ids), sum(trained[1:]), extremes, sum(w < 0 for w in weights))


def preview_text(preview: Preview, *, marks: bool) -> Text:
    """Return the preview as styled text; with `marks` trained stretches are also in [[ ]], for output without colour."""
    text = Text()
    for number, row in enumerate(preview.rows, start=1):
        full = " (max_length reached)" if row.tokens == preview.max_length else ""
        text.append(f"--- row {number}: {printable(row.origin)}\n", style="bold")
        text.append(
            f"    {row.tokens} tokens{full}, {row.trained_tokens} trained ({_share(row.trained_tokens, row.tokens)})"
            f"{_weights(row)}\n"
        )
        for stretch, is_trained in row.stretches:
            shown = printable(stretch, lines=True)
            text.append(f"[[{shown}]]" if marks and is_trained else shown, style=_TRAINED if is_trained else _CONTEXT)
        text.append("\n\n")
    return text.append_text(report_text(preview))


def _weights(row: PreviewRow) -> str:
    low, high = row.weights
    weights = "" if low == high == 1 else f", weight {low:g}" if low == high else f", weights {low:g} to {high:g}"
    return weights + (f", {row.exempt} exempt from the gate" if row.exempt else "")


def report_text(preview: Preview) -> Text:
    """Return the part of the preview about all rows: the table of their fields, the counts, the warnings."""
    text = Text()
    text.append("--- fields\n", style="bold")
    text.append("\n".join(_fields(preview.report)) + "\n\n")
    text.append("--- all rows\n", style="bold")
    text.append("\n".join(_summary(preview)))
    for warning in preview.report.warnings:
        text.append(f"\nwarning: {printable(warning, lines=True)}", style="yellow")
    return text


def _fields(report: DataReport) -> list[str]:
    """Return a table of the fields of each source: read, not read, lost in the rendering."""
    table: list[tuple[str, ...]] = [("source", "field", "rows", "")]
    for name, counts in report.by_source.items():
        lines = [(path, rows, "read") for path, rows in counts.fields_read.items()]
        lines += [
            (path, rows, "not read (metadata)" if is_metadata(path) else "NOT READ")
            for path, rows in counts.fields_ignored.items()
        ]
        lines += [(path, rows, "left out by the chat template's design") for path, rows in counts.dropped.items()]
        lines += [(path, rows, "LOST: not in the rendered text, row refused") for path, rows in counts.lost.items()]
        if counts.skipped:
            lines.append(("(bad rows, lost ones included)", counts.skipped, "refused"))
        for number, (path, rows, became) in enumerate(lines):
            table.append(("" if number else name, path, f"{rows:,} of {counts.read:,}", became))
    return _aligned(table, left=(0, 1, 3))


def _aligned(table: list[tuple[str, ...]], left: Sequence[int]) -> list[str]:
    """Return the lines of the table; the columns of `left` are aligned to the left, the others to the right."""
    table = [tuple(printable(cell) for cell in line) for line in table]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in table
    ]


def _summary(preview: Preview) -> list[str]:
    report = preview.report
    heads = ("source", "read", "bad", "nothing trained", "truncated", "rows", "tokens", "trained")
    table: list[tuple[str, ...]] = [heads] + [
        (
            name,
            *(
                f"{count:,}"
                for count in (c.read, c.skipped, c.fully_masked, c.truncated, c.rows, c.tokens, c.trained_tokens)
            ),
        )
        for name, c in report.by_source.items()
    ]
    lines = _aligned(table, left=(0,))
    if preview.is_partial:
        lines.append(f"Counted over the first {preview.scan:,} rows of each source.")
    lines.append(
        f"trained: {report.trained_tokens:,} of {report.tokens:,} tokens ({_share(report.trained_tokens, report.tokens)})"
    )
    lines.append(
        f"truncated at max_length {preview.max_length}: {report.truncated:,} of {report.encoded:,} rows "
        f"({_share(report.truncated, report.encoded)})"
    )
    if report.fully_masked:
        lines.append(f"left out, no trained token: {report.fully_masked:,} rows")
    if report.stop_token_trained:
        lines.append(f"stop token: {', '.join(report.stop_tokens)} is trained at the end of every complete row")
    weights = report.weights
    if (weights.smallest, weights.largest) != (1.0, 1.0):
        lines.append(
            f"weights of trained tokens: {weights.smallest:g} to {weights.largest:g}, mean {weights.mean:.3g}; "
            "the loss is divided by their number"
        )
    if weights.exempt:
        strings = ", ".join(f"{string!r} {count:,}" for string, count in weights.exempt.items())
        lines.append(f"tokens exempt from the gate: {strings}")
    if report.skipped_rows:
        stops = " (training stops at the first: on_bad_row is stop)" if preview.on_bad_row == "stop" else " (left out)"
        lines.append(f"bad rows: {report.skipped_rows:,}{stops}")
        lines += [
            f"  {printable(origin)}: {printable(reason, lines=True)}"
            for origin, reason in report.skipped[:_REASONS_SHOWN]
        ]
        if report.skipped_rows > _REASONS_SHOWN:
            lines.append(f"  and {report.skipped_rows - _REASONS_SHOWN:,} more")
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"
