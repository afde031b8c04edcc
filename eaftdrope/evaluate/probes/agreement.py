"""How far a model has drifted from the one it was made from, on general prompts, without labels:

    KL      mean over positions of  sum_v p(v) (log p(v) - log q(v))       p: base model, q: this model, nats per token
    top-1   share of positions whose most probable token is the base model's

both teacher-forced on the base model's own greedy answers. The base model is asked once (`capture`); later models are
compared with the file. Of the base model itself the scores are known without measuring: 0 and 1.

The distributions of the file are rounded to float16 (capture.py). For SmolLM2-135M-Instruct, 362 positions, this moved the KL
of the base model with itself from 0 to 1.6e-7 nats, and that of a model with 2 % of noise on its weights, 0.03768, by 1.2e-6.

What a base model says, in one file: its greedy answers to the prompts, and its distribution at positions of them.

The distributions are log-probabilities in float16, so a value l is off by at most 2^-11 |l|; read back they are normalised
again. At most `BYTES` of them are kept, whatever the vocabulary: 1,365 positions of one with 49,152 tokens, 441 of one with
151,936. The positions are spread evenly over all answers; the one after the last token of an answer is among them, because a
model must also know when to stop.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from eaftdrope.errors import UserError

from ..generation import generate_ids
from ..scores import Score, score_units
from ..texts import evenly_spaced
from .answers import prompt_ids

if TYPE_CHECKING:
    from eaftdrope.data import Example
import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

from eaftdrope.files import honour_umask, replacing

from ..likelihood import TokenRow, batches, logits_at, padded


@dataclass
class AgreementProbe:
    """Agreement with a base model.

    Args:
        prompts: what is asked; the last turn of each is left to the model.
        max_tokens: positions that are compared, at most, over all answers.
        max_new_tokens: longest answer of the base model.
        limit: prompts of the capture that are compared, at most (None: all of them).
        captured: the file with what the base model said; `capture` sets it, and so may whoever knows it to be there.
    """

    prompts: list[Example]
    max_tokens: int = 1024
    max_new_tokens: int = 32
    limit: int | None = None
    group: str = "general"
    name: str = "agreement"
    captured: Path | None = field(default=None, repr=False, compare=False)

    def capture(self, model, tokenizer, file: Path, *, batch_tokens: int = 2048, progress=None) -> list[Score]:
        """Stores in `file` what the base model says, unless an earlier call has, and returns the base model's own scores.

        The model must be in evaluation mode (`run_probes` sees to it). Any model that shares the tokenizer can then be
        compared with the file, by this probe and by others of the same prompts and settings.

        Raises:
            UserError: the file is a capture of other prompts or settings.
        """
        asked = [prompt_ids(example, tokenizer) for example in self.prompts]
        if not file.exists():
            self._ask(model, tokenizer, asked, file, batch_tokens, progress)
        self.captured = file
        counts = [float(len(row.positions)) for row in self._stored(tokenizer).rows]
        return self._scores([(0.0, count) for count in counts], [(count, count) for count in counts])

    def run(self, model, tokenizer, *, batch_tokens: int = 2048, progress=None) -> list[Score]:
        """
        Raises:
            UserError: there is no capture to compare with, or it is one of other prompts or settings.
        """
        stored = self._stored(tokenizer)
        starts = [0]
        for row in stored.rows:
            starts.append(starts[-1] + len(row.positions))
        chosen = evenly_spaced(range(len(stored.rows)), self.limit)
        rows = [stored.rows[i] for i in chosen]
        divergence = [0.0] * len(rows)
        same = [0.0] * len(rows)
        for i, first, now in predictions(model, rows, batch_tokens=batch_tokens, progress=progress):
            start = starts[chosen[i]] + first
            base = stored.log_probs[start : start + len(now)].to(now.device).float()
            # The highest is looked for in what was stored, where float16 may have made two equal: either then agrees.
            top = base.gather(1, now.argmax(1, keepdim=True)).squeeze(1) == base.max(1).values
            base = base.log_softmax(1)
            divergence[i] += (base.exp() * (base - now)).sum(dtype=torch.float64).item()
            same[i] += top.sum().item()
        counts = [float(len(row.positions)) for row in rows]
        return self._scores(list(zip(divergence, counts)), list(zip(same, counts)))

    def subset(self, limit: int) -> AgreementProbe:
        """The same probe on at most `limit` of the prompts, with the same capture."""
        return replace(self, limit=limit if self.limit is None else min(limit, self.limit))

    def _ask(self, model, tokenizer, asked: list[list[int]], file: Path, batch_tokens: int, progress) -> None:
        answers = generate_ids(
            model,
            tokenizer,
            asked,
            max_new_tokens=self.max_new_tokens,
            batch_tokens=4 * batch_tokens,
            progress=progress,
        )
        vocabulary = model.config.get_text_config().vocab_size
        rows = spread(asked, answers, vocabulary=vocabulary, max_tokens=self.max_tokens)
        log_probs = torch.empty(sum(len(row.positions) for row in rows), vocabulary, dtype=torch.float16)
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + len(row.positions))
        for i, first, now in predictions(model, rows, batch_tokens=batch_tokens):
            start = starts[i] + first
            log_probs[start : start + len(now)] = now.half().cpu()
        save(file, rows, log_probs, of=self._key(tokenizer))

    def _stored(self, tokenizer) -> Capture:
        if self.captured is None or not self.captured.is_file():
            raise UserError(
                "the probe agreement compares with a base model, and nothing is stored of what that says. A run stores it "
                "before training; start it anew with --overwrite."
            )
        return load(self.captured, of=self._key(tokenizer))

    def _key(self, tokenizer) -> str:
        asked = [prompt_ids(example, tokenizer) for example in self.prompts]
        return key([asked, self.max_tokens, self.max_new_tokens])

    def _scores(self, divergence: list[tuple[float, float]], same: list[tuple[float, float]]) -> list[Score]:
        return [
            score_units(self.name, self.group, "KL from the base model", divergence, kind="mean", better="lower"),
            score_units(
                self.name, self.group, "top-1 agreement with the base model", same, kind="mean", better="higher"
            ),
        ]


BYTES = 128 * 10**6
LOWEST = torch.finfo(torch.float16).min
"""Of a log-probability: an impossible token, whose logarithm is minus infinity, has it too."""
# Rows of logits turned to float32 at a time.
_CHUNK_ROWS = 128


class Answered(NamedTuple):
    """A prompt with the base model's answer as one sequence, and the positions of it whose prediction is looked at: t means
    what the model says after tokens 0 to t."""

    input_ids: list[int]
    positions: list[int]


@dataclass(frozen=True)
class Capture:
    """`rows` in the order of the prompts (without those that got no position); `log_probs` float16 [P, V], memory-mapped,
    the positions of all rows one after the other."""

    rows: list[Answered]
    log_probs: torch.Tensor


def spread(prompts: list[list[int]], answers: list[list[int]], *, vocabulary: int, max_tokens: int) -> list[Answered]:
    """Prompts and answers as rows, with at most `max_tokens` positions, and no more than fit in `BYTES`."""
    places = [(i, t) for i, (p, a) in enumerate(zip(prompts, answers)) for t in range(len(p) - 1, len(p) + len(a))]
    chosen: dict[int, list[int]] = {}
    for i, t in evenly_spaced(places, min(max_tokens, BYTES // (2 * vocabulary))):
        chosen.setdefault(i, []).append(t)
    return [Answered(prompts[i] + answers[i], positions) for i, positions in chosen.items()]


@torch.no_grad()
def predictions(
    model, rows: list[Answered], *, batch_tokens: int, progress=None
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(row, which of its positions comes first, float32 log-probabilities [n, V]) in pieces, rows in any order.

    An ordinary forward over each row; the head runs on the positions that some row of the batch looks at.
    """
    done = 0
    for batch in batches([len(row.input_ids) for row in rows], batch_tokens):
        wanted = sorted({t for i in batch for t in rows[i].positions})
        input_ids, _, mask = padded([TokenRow(rows[i].input_ids, rows[i].input_ids) for i in batch], model.device)
        logits = logits_at(model, input_ids, mask, torch.tensor(wanted, device=model.device))
        where = {t: column for column, t in enumerate(wanted)}
        for line, i in enumerate(batch):
            for first in range(0, len(rows[i].positions), _CHUNK_ROWS):
                columns = [where[t] for t in rows[i].positions[first : first + _CHUNK_ROWS]]
                yield i, first, logits[line, columns].float().log_softmax(-1).clamp(min=LOWEST)
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))


def save(file: Path, rows: list[Answered], log_probs: torch.Tensor, *, of: str) -> None:
    """Writes a capture, whole or not at all. `of` says what was asked: `load` wants the same."""
    from safetensors.torch import save_file

    ids = torch.tensor([token for row in rows for token in row.input_ids], dtype=torch.int32)
    positions = torch.tensor([t for row in rows for t in row.positions], dtype=torch.int32)
    lengths = torch.tensor([[len(row.input_ids), len(row.positions)] for row in rows], dtype=torch.int32)
    tensors = {"ids": ids, "positions": positions, "lengths": lengths, "log_probs": log_probs}
    with replacing(file) as partial:
        save_file(tensors, partial, metadata={"of": of})
    honour_umask(file.parent)


def load(file: Path, *, of: str) -> Capture:
    """Reads a capture.

    Raises:
        UserError: it is damaged, or one of other prompts or settings.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            asked = (stored.metadata() or {}).get("of")
            tensors = {name: stored.get_tensor(name) for name in ("ids", "positions", "lengths", "log_probs")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}). Delete it to have the base model asked again.") from error
    if asked != of:
        raise UserError(
            f"{file} holds what the base model said to other prompts, or under other settings. Delete it to have it "
            "asked again."
        )
    counts = tensors["lengths"].T.tolist()
    ids, positions = (
        [part.tolist() for part in tensors[name].split(sizes)] for name, sizes in zip(("ids", "positions"), counts)
    )
    return Capture([Answered(*row) for row in zip(ids, positions)], tensors["log_probs"])


def key(what: object) -> str:
    """A short name of JSON data, for `of`."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
