"""The contrast: text that the model samples itself, after the prompts of the same rows.

Sampled at temperature 1 from the whole vocabulary, so its tokens are as likely as the model thinks they are: what of them
lies in the corner of the confident conflicts is chance, and the rest of the data's is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate.generation import generate_ids
from eaftdrope.evaluate.likelihood import IGNORED, TokenRow, batches
from eaftdrope.evaluate.texts import evenly_spaced
from eaftdrope.loss.gates import Gate

from .tally import Tally
from .tokens import measure_tokens

if TYPE_CHECKING:
    from datasets import Dataset

_NEW_TOKENS = 128


def sampled_rows(
    model,
    tokenizer,
    rows: Dataset,
    count: int,
    *,
    seed: int,
    batch_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenRow]:
    """`count` rows (spread over all) with what comes before their first trained token, and an answer of at most 128
    sampled tokens in the place of the rest.

    Raises:
        UserError: the rows begin with a trained token, so there is nothing to ask with.
    """
    prompts = []
    for number in evenly_spaced(range(len(rows)), count):
        row = rows[number]
        first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
        prompts.append(row["input_ids"][:first])
    if not all(prompts):
        raise UserError(
            "--on-policy needs rows with a prompt before what is trained; these are trained from their start."
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
    model,
    rows: list[TokenRow],
    gate: Gate,
    *,
    batch_tokens: int,
    backend: str = "auto",
    tile_bytes: int | None = None,
) -> dict:
    """`{"tokens", "landscape", "summary"}` of a few rows; for `backend` and `tile_bytes` see [`measure_tokens`]."""
    tally = Tally(["the model itself"])
    for batch in batches([len(row.input_ids) for row in rows], batch_tokens):
        chosen = [rows[i] for i in batch]
        tally.add(measure_tokens(model, chosen, gate, backend=backend, tile_bytes=tile_bytes), [0] * len(batch))
    return {"tokens": tally.tokens, "landscape": tally.landscape(), "summary": tally.summary()}
