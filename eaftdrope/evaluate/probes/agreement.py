"""Drift from the base model, on general prompts without labels:

    KL      mean over positions of  sum_v p(v) (log p(v) - log q(v))       p: base model, q: this model, nats per token
    top-1   share of positions whose most probable token is the base model's

both teacher-forced on the base model's own greedy answers. The base model is run once (`capture`); later models are
compared with the file it writes. The base model's own scores need no measurement: 0 and 1.

A capture holds the base model's answers and its distributions at positions of them, as log-probabilities in float16: a
value l is off by at most 2^-11 |l|, and is normalised again after reading. For SmolLM2-135M-Instruct, 362 positions, this
moved the KL of the base model with itself from 0 to 1.6e-7 nats, and that of a model with 2 % of noise on its weights,
0.03768, by 1.2e-6. At most `CAPTURE_BYTES` of distributions are kept, whatever the vocabulary: 1,365 positions for 49,152
tokens, 441 for 151,936. The positions are spread evenly over all answers; the one after the last token of an answer is
among them, because ending an answer is a prediction too.

Shapes: P positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eaftdrope.errors import DataError, UserError
from eaftdrope.files import honour_umask, replacing

from ..generation import generate_ids
from ..likelihood import TokenRow, batches, logits_at, padded
from ..scores import Score, score_units
from ..texts import asset, evenly_spaced, json_lines
from .answers import prompt_ids, question, read_example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from eaftdrope.data import Example

    from ..likelihood import Progress
    from .base import HeldOut

CAPTURE_BYTES = 128 * 10**6
LOWEST = torch.finfo(torch.float16).min
"""Smallest log-probability stored; an impossible token has it instead of minus infinity."""
_SHIPPED = "general_prompts.jsonl"
# Rows of logits converted to float32 at once.
_CHUNK_ROWS = 128


@dataclass
class AgreementProbe:
    """Agreement with a base model.

    Args:
        prompts: conversations; the last turn of each is left to the model.
        max_tokens: positions compared, at most, over all answers.
        max_new_tokens: longest answer of the base model.
        limit: prompts of the capture that are compared, at most (None: all).
        captured: the file with the base model's predictions; set by `capture`, or directly if the file exists.
    """

    prompts: list[Example]
    max_tokens: int
    max_new_tokens: int
    limit: int | None = None
    group: str = "general"
    name: str = "agreement"
    captured: Path | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> AgreementProbe:
        """Build the probe; options: `file` (JSONL of prompts; None: those shipped), `limit`, `max_tokens` and
        `max_new_tokens`."""
        prompts = general_prompts() if options["file"] is None else read_prompts(Path(options["file"]))
        chosen = evenly_spaced(prompts, options["limit"])
        return cls(chosen, options["max_tokens"], options["max_new_tokens"], group=group)

    def capture(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        file: Path,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        """Store the base model's predictions in `file`, unless it exists, and return the base model's own scores.

        The model must be in evaluation mode (`run_probes` does this). Any model with the same tokenizer can then be
        compared with the file, by this probe and by others with the same prompts and settings.

        Raises:
            UserError: the file is a capture of other prompts or settings.
        """
        if not file.exists():
            self._store(model, tokenizer, file, batch_tokens, progress)
        return self.own_scores(tokenizer, file)

    def own_scores(self, tokenizer: PreTrainedTokenizerBase, file: Path) -> list[Score]:
        """Return the base model's own scores, 0 and 1 at every position of its capture `file`; the probe then uses the file.

        Raises:
            UserError: the file is a capture of other prompts or settings.
        """
        self.captured = file
        counts = [float(len(row.positions)) for row in self._stored(tokenizer).rows]
        return self._scores([(0.0, count) for count in counts], [(count, count) for count in counts])

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        """Compare a model with the capture.

        Raises:
            UserError: no capture exists, or it is one of other prompts or settings.
        """
        stored = self._stored(tokenizer)
        starts = _starts(stored.rows)
        chosen = evenly_spaced(range(len(stored.rows)), self.limit)
        rows = [stored.rows[i] for i in chosen]
        divergence = [0.0] * len(rows)
        same = [0.0] * len(rows)
        for i, first, log_probs in predictions(model, rows, batch_tokens=batch_tokens, progress=progress):
            start = starts[chosen[i]] + first
            base = stored.log_probs[start : start + len(log_probs)].to(log_probs.device).float()
            # The maximum is that of the stored values, where float16 may have made two equal: either then agrees.
            top = base.gather(1, log_probs.argmax(1, keepdim=True)).squeeze(1) == base.max(1).values
            base = base.log_softmax(1)
            divergence[i] += (base.exp() * (base - log_probs)).sum(dtype=torch.float64).item()
            same[i] += top.sum().item()
        counts = [float(len(row.positions)) for row in rows]
        return self._scores(list(zip(divergence, counts)), list(zip(same, counts)))

    def subset(self, limit: int) -> AgreementProbe:
        """Return the same probe on at most `limit` of the prompts, with the same capture."""
        return replace(self, limit=limit if self.limit is None else min(limit, self.limit))

    def _store(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        file: Path,
        batch_tokens: int,
        progress: Progress | None,
    ) -> None:
        prompts = self._prompt_ids(tokenizer)
        answers = generate_ids(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            batch_tokens=4 * batch_tokens,
            progress=progress,
        )
        vocabulary = model.config.get_text_config().vocab_size
        rows = spread(prompts, answers, vocabulary=vocabulary, max_tokens=self.max_tokens)
        starts = _starts(rows)
        stored = torch.empty(starts[-1], vocabulary, dtype=torch.float16)
        for i, first, log_probs in predictions(model, rows, batch_tokens=batch_tokens):
            start = starts[i] + first
            stored[start : start + len(log_probs)] = log_probs.half().cpu()
        save(file, rows, stored, key=self._key(tokenizer))

    def _stored(self, tokenizer: PreTrainedTokenizerBase) -> Capture:
        if self.captured is None or not self.captured.is_file():
            raise UserError(
                "the probe agreement compares with a base model, whose predictions are not stored. A run stores them "
                "before training; start it again with --overwrite."
            )
        return load(self.captured, key=self._key(tokenizer))

    def _prompt_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        return [prompt_ids(example, tokenizer) for example in self.prompts]

    def _key(self, tokenizer: PreTrainedTokenizerBase) -> str:
        text = json.dumps([self._prompt_ids(tokenizer), self.max_tokens, self.max_new_tokens], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _scores(self, divergence: list[tuple[float, float]], same: list[tuple[float, float]]) -> list[Score]:
        return [
            score_units(self.name, self.group, "KL from the base model", divergence, kind="mean", better="lower"),
            score_units(
                self.name, self.group, "top-1 agreement with the base model", same, kind="mean", better="higher"
            ),
        ]


def general_prompts() -> list[Example]:
    """Return the 48 everyday questions and requests that eaftdrope ships."""
    return [question(row["prompt"]) for _, row in json_lines(asset(_SHIPPED), Path(_SHIPPED))]


def read_prompts(file: Path) -> list[Example]:
    """Read the prompts of a JSONL file: `prompt`, `question` or `messages` each.

    Raises:
        DataError: a row without a prompt, or no rows.
    """
    prompts = [read_example(row, place) for place, row in json_lines(file.read_text(encoding="utf-8"), file)]
    if not prompts:
        raise DataError(f"{file}: no prompts. A line is {{prompt}} or {{messages}}.")
    return prompts


class Answered(NamedTuple):
    """A prompt with the base model's answer as one sequence, and the positions that are compared.

    Position t stands for the prediction after tokens 0 to t.
    """

    input_ids: list[int]
    positions: list[int]


@dataclass(frozen=True)
class Capture:
    """A base model's predictions.

    Attributes:
        rows: in the order of the prompts, without those that have no position.
        log_probs: float16 [P, V], memory-mapped: the positions of all rows one after the other.
    """

    rows: list[Answered]
    log_probs: Tensor


def _starts(rows: list[Answered]) -> list[int]:
    """Return the index of each row's first position among all positions, and their number last."""
    return list(accumulate((len(row.positions) for row in rows), initial=0))


def spread(prompts: list[list[int]], answers: list[list[int]], *, vocabulary: int, max_tokens: int) -> list[Answered]:
    """Return prompts and answers as rows, with at most `max_tokens` positions, and no more than fit in `CAPTURE_BYTES`."""
    places = [(i, t) for i, (p, a) in enumerate(zip(prompts, answers)) for t in range(len(p) - 1, len(p) + len(a))]
    chosen: dict[int, list[int]] = {}
    for i, t in evenly_spaced(places, min(max_tokens, CAPTURE_BYTES // (2 * vocabulary))):
        chosen.setdefault(i, []).append(t)
    return [Answered(prompts[i] + answers[i], positions) for i, positions in chosen.items()]


@torch.no_grad()
def predictions(
    model: PreTrainedModel, rows: list[Answered], *, batch_tokens: int, progress: Progress | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (row, index of the first of its positions, float32 log-probabilities [P, V]) in pieces, rows in any order.

    Each row passes through the model once; the head runs only on positions that some row of the batch compares.
    """
    done = 0
    for batch in batches([len(row.input_ids) for row in rows], batch_tokens):
        needed = sorted({t for i in batch for t in rows[i].positions})
        input_ids, _, mask = padded([TokenRow(rows[i].input_ids, rows[i].input_ids) for i in batch], model.device)
        logits = logits_at(model, input_ids, mask, torch.tensor(needed, device=model.device))
        column_of = {t: column for column, t in enumerate(needed)}
        for line, i in enumerate(batch):
            for first in range(0, len(rows[i].positions), _CHUNK_ROWS):
                columns = [column_of[t] for t in rows[i].positions[first : first + _CHUNK_ROWS]]
                yield i, first, logits[line, columns].float().log_softmax(-1).clamp(min=LOWEST)
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))


def save(file: Path, rows: list[Answered], log_probs: Tensor, *, key: str) -> None:
    """Write a capture atomically. `key` identifies its prompts and settings: `load` requires the same."""
    ids = torch.tensor([token for row in rows for token in row.input_ids], dtype=torch.int32)
    positions = torch.tensor([t for row in rows for t in row.positions], dtype=torch.int32)
    lengths = torch.tensor([[len(row.input_ids), len(row.positions)] for row in rows], dtype=torch.int32)
    tensors = {"ids": ids, "positions": positions, "lengths": lengths, "log_probs": log_probs}
    with replacing(file) as partial:
        save_file(tensors, partial, metadata={"of": key})
    honour_umask(file.parent)


def load(file: Path, *, key: str) -> Capture:
    """Read a capture.

    Raises:
        UserError: it is damaged, or one of other prompts or settings.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            found = (stored.metadata() or {}).get("of")
            tensors = {name: stored.get_tensor(name) for name in ("ids", "positions", "lengths", "log_probs")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}). Delete it to measure the base model again.") from error
    if found != key:
        raise UserError(
            f"{file} has the base model's answers to other prompts, or with other settings. Delete it to measure the base "
            "model again."
        )
    counts = tensors["lengths"].T.tolist()
    ids, positions = (
        [part.tolist() for part in tensors[name].split(sizes)] for name, sizes in zip(("ids", "positions"), counts)
    )
    return Capture([Answered(*row) for row in zip(ids, positions)], tensors["log_probs"])
