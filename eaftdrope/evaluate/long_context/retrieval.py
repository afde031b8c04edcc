"""Needles found: greedy answers, exact match of the numbers, and a confidence interval of the share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from eaftdrope.loaded_model import evaluating

from ..generation import generate_ids
from ..likelihood import Progress
from .needles import Hay, Needles, Trial, numbers_found

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of a prompt per forward.
_PREFILL = 2048


@dataclass(frozen=True)
class TrialOutcome:
    """One trial: the requested numbers, how many of them were found, and the answer."""

    depth: float | None
    found: int
    asked: int
    answer: str

    @property
    def right(self) -> bool:
        """True if every number was found."""
        return self.found == self.asked


@dataclass(frozen=True)
class Retrieval:
    """All trials of a kind at a length."""

    kind: str
    length: int
    outcomes: tuple[TrialOutcome, ...]

    @property
    def accuracy(self) -> float:
        """Share of trials with every number right."""
        return sum(outcome.right for outcome in self.outcomes) / len(self.outcomes)

    @property
    def recall(self) -> float:
        """Share of the requested numbers that were found; the accuracy if one number is requested."""
        return sum(o.found for o in self.outcomes) / sum(o.asked for o in self.outcomes)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of the accuracy."""
        return wilson(sum(outcome.right for outcome in self.outcomes), len(self.outcomes))

    def by_depth(self) -> dict[float, Retrieval]:
        """Return the trials at each depth, in order (for `niah`; the other kinds have random places)."""
        depths = sorted({outcome.depth for outcome in self.outcomes if outcome.depth is not None})
        return {
            depth: Retrieval(self.kind, self.length, tuple(o for o in self.outcomes if o.depth == depth))
            for depth in depths
        }

    def as_json(self) -> dict[str, Any]:
        """Return the document that `from_json` reads."""
        return {"outcomes": [asdict(outcome) for outcome in self.outcomes]}

    @classmethod
    def from_json(cls, kind: str, length: int, result: dict[str, Any]) -> Retrieval:
        """Return the trials that `as_json` wrote."""
        return cls(kind, length, tuple(TrialOutcome(**outcome) for outcome in result["outcomes"]))


def wilson(hits: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a share (J. American Statistical Association 22, 1927); z = 1.96 is 95 %."""
    share, square = hits / trials, z * z / trials
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    # At 0 and 1 the ends are exact, which the sum above misses by a rounding.
    low = 0.0 if hits == 0 else middle - half
    return low, 1.0 if hits == trials else middle + half


def needle_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    length: int,
    *,
    kind: str = "niah",
    trials: int = 100,
    depths: int = 10,
    seed: int = 0,
    crop: int | None = None,
    batch_tokens: int = 16384,
    progress: Progress | None = None,
) -> Retrieval:
    """Hide needles in `texts` and test if the model finds them, `trials` times.

    Args:
        length: tokens of prompt and answer together.
        kind: one of `needles.KINDS`; the trials of `niah` are spread over `depths` depths.
        crop: the model sees only the last `crop` tokens (of prompt and answer together).
        batch_tokens: tokens of the prompts of a batch, which are in the cache together (at least one prompt).
        progress: called with (trials done, trials).

    Raises:
        UserError: `length` is too short for the kind.
    """
    return find_needles(
        model,
        tokenizer,
        Needles(kind, tokenizer, Hay(tokenizer, texts), length, depths=depths, seed=seed),
        trials,
        crop=crop,
        batch_tokens=batch_tokens,
        progress=progress,
    )


def find_needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    needles: Needles,
    trials: int,
    *,
    crop: int | None = None,
    batch_tokens: int = 16384,
    progress: Progress | None = None,
) -> Retrieval:
    """Return the same for existing needles; see [`needle_accuracy`]."""
    size = max(1, batch_tokens // min(needles.length, crop or needles.length))
    outcomes = []
    with evaluating(model):
        for start in range(0, trials, size):
            batch = [needles.trial(i) for i in range(start, min(start + size, trials))]
            answers = generate_ids(
                model,
                tokenizer,
                [prompt(trial, needles, crop) for trial in batch],
                max_new_tokens=needles.answer_tokens,
                batch_tokens=size * needles.length,
                prefill_chunk=_PREFILL,
            )
            for trial, ids in zip(batch, answers):
                answer = tokenizer.decode(ids)
                found = numbers_found(answer, trial.numbers)
                outcomes.append(TrialOutcome(trial.depth, found, len(trial.numbers), answer))
            if progress is not None:
                progress(len(outcomes), trials)
    return Retrieval(needles.kind, needles.length, tuple(outcomes))


def prompt(trial: Trial, needles: Needles, crop: int | None) -> list[int]:
    """Return the tokens that the model gets: all, or the prefix and the last ones that leave room for the answer."""
    if crop is None or crop >= needles.length:
        return trial.ids
    prefix = needles.prefix
    return prefix + trial.ids[len(trial.ids) - (crop - needles.answer_tokens - len(prefix)) :]
