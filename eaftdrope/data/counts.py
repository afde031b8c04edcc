"""What became of the rows: counts by source, what of their fields was read, and the warnings about how answers end."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eaftdrope.errors import LostTextError

from .encoding import Encoded
from .fields import is_metadata
from .formats import Example
from .template import template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows may have keys that are data (an identifier for a key): their paths are counted together.
_PATHS_KEPT = 200
_OTHER_PATHS = "(other fields)"
_NAMES_WARNED_OF = 6


@dataclass
class SourceReport:
    """Counts of one source. `read` to `cut_off` count rows of the source; the rest counts the mixture's rows.

    Args:
        read (`int`): rows read.
        skipped (`int`): bad rows left out.
        fully_masked (`int`): rows without a trained token, left out.
        cut_off (`int`): those of `fully_masked` whose trained tokens all lay beyond `max_length`.
        truncated (`int`): rows kept of which the end was cut off at `max_length`.
        encoded (`int`): rows kept, before the weight applied.
        rows (`int`): rows in the dataset, repetitions counted.
        tokens (`int`): their tokens.
        trained_tokens (`int`): their tokens that count in the loss.
        fields_read (`dict[str, int]`): for each path of a key that was read, in how many rows (`messages[].role`).
        fields_ignored (`dict[str, int]`): the same of the keys that were not read.
        dropped (`dict[str, int]`): for each path that the chat template leaves out by design (reasoning of earlier turns), in
            how many rows; they are trained.
        lost (`dict[str, int]`): for each path whose text is missing from the rendering, in how many rows; they are bad.
    """

    read: int = 0
    skipped: int = 0
    fully_masked: int = 0
    cut_off: int = 0
    truncated: int = 0
    encoded: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    fields_read: dict[str, int] = field(default_factory=dict)
    fields_ignored: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)

    def add_fields(self, example: Example) -> None:
        """Count which fields of a row were read and which were not."""
        _count(self.fields_read, example.fields_read)
        _count(self.fields_ignored, example.fields_ignored)

    def add_dropped(self, paths: Iterable[str]) -> None:
        """Count what the chat template leaves out of a row by design."""
        _count(self.dropped, _without_indices(paths))

    def add_lost(self, error: Exception) -> None:
        """Count what a row lost, if that is why it is refused."""
        if isinstance(error, LostTextError):
            _count(self.lost, _without_indices(error.lost))

    @property
    def unread_text(self) -> dict[str, int]:
        """Those of `fields_ignored` that may be more than metadata (`id`, `source`, ...), most rows first."""
        names = [path for path in self.fields_ignored if not is_metadata(path)]
        return {path: self.fields_ignored[path] for path in sorted(names, key=lambda path: -self.fields_ignored[path])}


def _without_indices(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"\[\d+\]", "[]", path) for path in paths))


def _count(counts: dict[str, int], paths: Iterable[str]) -> None:
    for path in paths:
        if path not in counts and len(counts) >= _PATHS_KEPT:
            path = _OTHER_PATHS
        counts[path] = counts.get(path, 0) + 1


@dataclass
class DataReport:
    """What became of the rows.

    Args:
        by_source (`dict[str, SourceReport]`): counts by source, in order.
        skipped (`list[tuple[str, str]]`): origin and reason of the bad rows left out, the first 100 of them.
        stop_token_trained (`bool`): every row that is not truncated ends its last answer in a trained stop token.
        stop_tokens (`list[str]`): the stop tokens met, such as `["<|im_end|>"]`.
        warnings (`list[str]`): what may go wrong in training, with the consequence and the ways out.
    """

    by_source: dict[str, SourceReport] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    stop_token_trained: bool = False
    stop_tokens: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def _sum(self, name: str) -> int:
        return sum(getattr(source, name) for source in self.by_source.values())

    @property
    def read(self) -> int:
        return self._sum("read")

    @property
    def rows(self) -> int:
        return self._sum("rows")

    @property
    def skipped_rows(self) -> int:
        return self._sum("skipped")

    @property
    def fully_masked(self) -> int:
        return self._sum("fully_masked")

    @property
    def cut_off(self) -> int:
        return self._sum("cut_off")

    @property
    def truncated(self) -> int:
        return self._sum("truncated")

    @property
    def encoded(self) -> int:
        return self._sum("encoded")

    @property
    def tokens(self) -> int:
        return self._sum("tokens")

    @property
    def trained_tokens(self) -> int:
        return self._sum("trained_tokens")

    @property
    def truncated_share(self) -> float:
        """Share of the encoded rows of which the end was cut off."""
        return self.truncated / self.encoded if self.encoded else 0.0

    def warn_of_ignored_fields(self) -> None:
        """Add one warning for each source that has fields that are not read and may be more than metadata."""
        for name, source in self.by_source.items():
            fields = [f"{path} ({count:,} of {source.read:,} rows)" for path, count in source.unread_text.items()]
            if fields:
                more = len(fields) - _NAMES_WARNED_OF
                listed = ", ".join(fields[:_NAMES_WARNED_OF]) + (f" and {more} more" if more > 0 else "")
                self.warnings.append(
                    f"{name}: not read, so nothing of it is trained: {listed}. If it belongs to the text, write it into a "
                    "field that the format reads; `eaftdrope preview` has the table."
                )


class StopTokens:
    """Keeps count of which rows end in a trained stop token."""

    def __init__(self) -> None:
        self.conversations = 0
        self.complete = 0
        self.without = 0
        self.tokens: dict[str, int] = {}

    def add(self, encoded: Encoded) -> None:
        self.conversations += encoded.is_conversation
        # The end of a truncated row is missing by definition; it says nothing about the template.
        if encoded.truncated:
            return
        self.complete += 1
        if encoded.stop is None:
            self.without += 1
        else:
            self.tokens[encoded.stop] = self.tokens.get(encoded.stop, 0) + 1

    def report_to(self, report: DataReport, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        report.stop_tokens = sorted(self.tokens, key=lambda token: -self.tokens[token])
        report.stop_token_trained = self.complete > 0 and self.without == 0
        consequence = (
            "the model may not learn to stop, and its answers run on to the length limit, while the training loss "
            "still looks healthy."
        )
        if self.complete == 0:
            report.warnings.append(
                f"every row is cut off at max_length: {max_length}, so no end of an answer is trained: {consequence} "
                "Raise max_length, or split the rows."
            )
        elif self.without:
            report.warnings.append(
                f"{self.without} of {self.complete} complete rows do not end in a trained stop token: {consequence} "
                "Use a chat template whose assistant turn ends in a special token such as <|im_end|>, or bring the rows "
                f"as prompt and completion strings: they end in the end-of-sequence token ({tokenizer.eos_token})."
            )
        if self.conversations and template_of(tokenizer).prompt_differs:
            report.warnings.append(
                "the chat template ends its generation prompt in "
                f"{template_of(tokenizer).prompt_differs!r}, which answered conversations do not have there: at "
                "inference the model is asked in a way that it was not trained on. Put it in front of the answers "
                "(reasoning belongs in reasoning_content), or use a template whose conversations begin with its prompt."
            )
