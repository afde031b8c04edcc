"""What a base model says, in one file: its greedy answers to the prompts, and its distribution at positions of them.

The distributions are log-probabilities in float16, so a value l is off by at most 2^-11 |l|; read back they are normalised
again. At most `BYTES` of them are kept, whatever the vocabulary: 1,365 positions of one with 49,152 tokens, 441 of one with
151,936. The positions are spread evenly over all answers; the one after the last token of an answer is among them, because a
model must also know when to stop.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate.likelihood import Row, batches, logits_at, padded
from eaftdrope.evaluate.sampling import evenly
from eaftdrope.permissions import honour_umask

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
    for i, t in evenly(places, min(max_tokens, BYTES // (2 * vocabulary))):
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
        input_ids, _, mask = padded([Row(rows[i].input_ids, rows[i].input_ids) for i in batch], model.device)
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
    partial = file.with_name(f".{file.name}.partial")
    save_file(tensors, partial, metadata={"of": of})
    os.replace(partial, file)
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
