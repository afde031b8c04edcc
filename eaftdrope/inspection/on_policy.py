"""On-policy text for contrast: answers that the model samples itself, after the prompts of the same rows.

They are sampled at temperature 1 from the whole vocabulary, so their tokens have exactly the model's probabilities: their
share of confident conflicts is due to chance, and a larger share in the data is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate.generation import generate_ids
from eaftdrope.evaluate.likelihood import IGNORED, Progress, TokenRow, batches
from eaftdrope.evaluate.texts import evenly_spaced
from eaftdrope.loss.gates import Gate

from .tally import Tally
from .tokens import measure_tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NEW_TOKENS = 128


def sampled_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    count: int,
    *,
    seed: int,
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[TokenRow]:
    """Return `count` evenly spaced rows, each cut before its first trained token and continued with at most 128 sampled
    tokens.

    Raises:
        UserError: a row begins with a trained token, so it has no prompt.
    """
    prompts = []
    for number in evenly_spaced(range(len(rows)), count):
        row = rows[number]
        first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
        prompts.append(row["input_ids"][:first])
    if not all(prompts):
        raise UserError(
            "--on-policy needs rows with a prompt before their trained tokens; these are trained from the first token."
        )
    torch.manual_seed(seed)
    answers = generate_ids(
        model, tokenizer, prompts, max_new_tokens=_NEW_TOKENS, batch_tokens=batch_tokens, sample=True, progress=progress
    )
    return [
        TokenRow([*prompt, *answer], [IGNORED] * len(prompt) + answer)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]


def survey_of_rows(
    model: PreTrainedModel,
    rows: list[TokenRow],
    gate: Gate,
    *,
    batch_tokens: int,
    backend: str = "auto",
    tile_bytes: int | None = None,
) -> dict:
    """Return `{"tokens", "landscape", "summary"}` of a few rows; `backend` and `tile_bytes` as in [`measure_tokens`]."""
    tally = Tally(["the model itself"])
    for batch in batches([len(row.input_ids) for row in rows], batch_tokens):
        chosen = [rows[i] for i in batch]
        tally.add(measure_tokens(model, chosen, gate, backend=backend, tile_bytes=tile_bytes), [0] * len(batch))
    return {"tokens": tally.tokens, "landscape": tally.landscape(), "summary": tally.summary()}
