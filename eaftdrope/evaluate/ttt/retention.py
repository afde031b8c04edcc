"""What reading costs the model: general probes with a fresh state against a state that has read a long text.

Only probes by likelihood: their rows are padded on the right, as reading in a batch needs them. A row that is longer than a
chunk is learned from as it is read, in both measurements alike.

The text that is read has none of the text that the perplexity probe measures, the opening of a novel: a model that has read
its probe would look better than before. The rest of that novel helps it too, so a note states where some was left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from eaftdrope.ttt import TTTState, learned
from eaftdrope.versions import cache_argument

from ..likelihood import Progress
from ..probes.build import build_probes, run_probes
from ..scores import Score
from ..texts import shipped_text
from .passages import Passage, runs_of, shared

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATES = ("fresh", "read")
BLOCK = 256
"""Tokens of the blocks that a text to read is made of."""
# The largest share of a block that the probe's text may contain.
_SHARED = 0.01


class TextToRead(NamedTuple):
    """`ids` are the tokens to read; `left_out` blocks between them contain text of the perplexity probe."""

    ids: list[int]
    left_out: int


def text_to_read(
    tokenizer: PreTrainedTokenizerBase, blocks: Sequence[Passage], prefix: list[int], tokens: int
) -> TextToRead:
    """Return at most `tokens` tokens of `blocks` in order, without blocks that contain text of the perplexity probe.

    Args:
        blocks: cut without a prefix; `prefix` are the tokens that begin every text.
    """
    probe = runs_of([tokenizer(shipped_text(), add_special_tokens=False, verbose=False).input_ids])
    ids, left_out = list(prefix), 0
    for block in blocks:
        if len(ids) >= tokens:
            break
        if shared(block.ids, probe) > _SHARED:
            left_out += 1
        else:
            ids += block.ids
    return TextToRead(ids[:tokens], left_out)


def retention_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    read: list[int] | None,
    *,
    questions: int | None = None,
    tokens: int | None = None,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> list[Score]:
    """Return the scores of the general probes by a model that has read the tokens `read`, or nothing (None).

    Args:
        questions, tokens: at most this many questions, and tokens of text; None: all.
    """
    wanted = [
        ("perplexity", "general", {"files": None, "max_tokens": tokens}),
        ("multiple_choice", "general", {"file": None, "limit": questions}),
    ]
    probes = build_probes(wanted)

    def report(name: str, done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)

    if read is None:
        return run_probes(model, tokenizer, probes, batch_tokens=batch_tokens, progress=report)
    with learned(model, read_into_state(model, read)):
        return run_probes(model, tokenizer, probes, batch_tokens=batch_tokens, progress=report)


@torch.no_grad()
def read_into_state(model: PreTrainedModel, ids: list[int]) -> TTTState:
    """Return the state of a model that has read `ids` from a fresh state."""
    state = TTTState(model)
    row = torch.tensor([ids], device=model.device)
    model(input_ids=row, **cache_argument(state), use_cache=True, logits_to_keep=1)
    return state
