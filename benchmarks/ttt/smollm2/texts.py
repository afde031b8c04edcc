"""Training rows, fit passages (held out from the training text, to fit inner rates) and test passages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eaftdrope.errors import UserError
from eaftdrope.evaluate.long_context.needles import Hay
from eaftdrope.evaluate.texts import read_texts

PASSAGE = 2048
ROW = 1024


@dataclass(frozen=True)
class Texts:
    """Token ids: `rows` [R, 1024] to train on, `fit` [P, 2048], `test` [P, 2048], and the test text in one piece."""

    rows: Tensor
    fit: Tensor
    test: Tensor
    novel: list[int]

    @property
    def digest(self) -> str:
        """A fingerprint of every token that is trained on or measured."""
        seen = hashlib.sha256()
        for tokens in (self.rows, self.fit, self.test, torch.tensor(self.novel)):
            seen.update(tokens.contiguous().numpy().tobytes())
        return seen.hexdigest()[:16]


def load_texts(tokenizer, train: Path, test: Path, fit_passages: int, test_passages: int) -> Texts:
    """Cut the texts. Documents that lend a fit passage, evenly spaced over the training text, are not trained on.

    Raises:
        UserError: a file is missing, or too short.
    """
    documents = _documents(train)
    held_out = _held_out(tokenizer, documents, fit_passages, train)
    trained = "\n\n".join(text for index, text in enumerate(documents) if index not in held_out)
    tests = Hay(tokenizer, _documents(test))
    return Texts(
        rows=_windows(Hay(tokenizer, [trained]), ROW, None, train),
        fit=_windows(Hay(tokenizer, [documents[index] for index in held_out]), PASSAGE, fit_passages, train),
        test=_windows(tests, PASSAGE, test_passages, test),
        novel=tests.tokens,
    )


def _documents(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"{file}: no such file.")
    return read_texts(file, "the benchmark")


def _held_out(tokenizer, documents: list[str], count: int, file: Path) -> list[int]:
    """Return the indices of `count` documents of at least a passage, evenly spaced."""
    long = [index for index, text in enumerate(documents) if len(tokenizer(text).input_ids) >= PASSAGE]
    if len(long) <= count:
        raise UserError(
            f"{file} has {len(long)} documents of at least {PASSAGE} tokens; more than {count} are needed: {count} are "
            "held out to fit inner rates. Cut the text into more documents."
        )
    return [long[(2 * place + 1) * len(long) // (2 * count)] for place in range(count)]


def _windows(hay: Hay, length: int, count: int | None, file: Path) -> Tensor:
    found = hay.windows(length, len(hay.tokens) if count is None else count)
    if found is None or (count is not None and len(found.rows) < count):
        raise UserError(f"{file} has too few tokens for {count or 1} pieces of {length}. Use more text.")
    return torch.tensor(found.rows)
