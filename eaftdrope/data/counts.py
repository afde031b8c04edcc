"""What became of the rows: counts by source, and the warnings about how answers end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eaftdrope.data.encoding import Encoded
from eaftdrope.data.template import template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
