"""Perplexity by the length of the window, and by the position inside it.

A window's loss is the mean over all its tokens but the first, so a longer window has a larger share of tokens with much
before them: a model that uses its context gets better with length, one that is lost beyond its trained length gets worse.
A cropped model holds its perplexity too: it proves nothing about reach by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate.probes import evaluating
from eaftdrope.evaluate.scores import Score, score_units

from .haystack import Hay, Windows
from .losses import cropped_losses, token_losses

BUCKETS = 16


@dataclass(frozen=True)
class WindowLosses:
    """Sums over the parts of each window: `sums[w][b]` is (nats, tokens) of part b of window w."""

    length: int
    joined: bool
    sums: tuple[tuple[tuple[float, int], ...], ...]

    def score(self) -> Score:
        """Perplexity over all tokens; the standard error is over windows."""
        units = [(sum(nll for nll, _ in parts), float(sum(n for _, n in parts))) for parts in self.sums]
        return score_units("perplexity", "general", f"perplexity at {self.length}", units, kind="exp", better="lower")

    def by_position(self) -> list[tuple[int, int, Score]]:
        """(first position, position behind the last, perplexity of the tokens there), in order."""
        edges = bucket_edges(self.length)
        scores = []
        for b, (start, stop) in enumerate(pairwise(edges)):
            units = [(parts[b][0], float(parts[b][1])) for parts in self.sums]
            metric = f"perplexity at {start}-{stop}"
            scores.append(
                (start, stop, score_units("perplexity", "general", metric, units, kind="exp", better="lower"))
            )
        return scores

    def as_json(self) -> dict:
        return {"joined": self.joined, "sums": self.sums}

    @classmethod
    def from_json(cls, length: int, result: dict) -> WindowLosses:
        sums = tuple(tuple((nll, count) for nll, count in parts) for parts in result["sums"])
        return cls(length, result["joined"], sums)


def perplexity_by_length(
    model,
    tokenizer,
    texts: list[str],
    lengths: list[int],
    *,
    windows: int = 8,
    crop: int | None = None,
    batch_tokens: int = 16384,
    progress=None,
) -> dict[int, WindowLosses]:
    """The losses of at most `windows` windows of each length.

    Args:
        texts: documents. Where none is as long as a window, windows are cut from all of them in a row.
        crop: the model sees only so many tokens at once (`losses.cropped_losses`).
        batch_tokens: tokens in the cache at once (at least one window).
        progress: called with (windows done, windows) of each length.

    Raises:
        UserError: the texts are shorter than a length.
    """
    hay = Hay(tokenizer, texts)
    measured = {}
    for length in lengths:
        cut = hay.windows(length, windows)
        if cut is None:
            raise UserError(
                f"the text has {len(hay.tokens)} tokens, too few for a window of {length}. Name a longer text."
            )
        measured[length] = window_losses(
            model, cut, begin=len(hay.begin), crop=crop, batch_tokens=batch_tokens, progress=progress
        )
    return measured


def window_losses(
    model, windows: Windows, *, begin: int = 0, crop: int | None = None, batch_tokens: int = 16384, progress=None
) -> WindowLosses:
    """The losses of windows that are cut already; `begin` tokens of each stand at the beginning of every text."""
    rows, length = windows.rows, len(windows.rows[0])
    size = max(1, batch_tokens // length)
    edges = bucket_edges(length)
    sums: list[tuple[tuple[float, int], ...]] = []
    with evaluating(model):
        for start in range(0, len(rows), size):
            ids = torch.tensor(rows[start : start + size])
            if crop is None or crop >= length:
                losses = token_losses(model, ids)
            else:
                losses = cropped_losses(model, ids, crop, begin=begin)
            # Entry t is of token t + 1: the first token of a window has no loss.
            parts = [losses[:, max(0, a - 1) : b - 1] for a, b in pairwise(edges)]
            sums += [tuple((part[w].sum().item(), part.shape[1]) for part in parts) for w in range(len(ids))]
            if progress is not None:
                progress(len(sums), len(rows))
    return WindowLosses(length, windows.joined, tuple(sums))


def bucket_edges(length: int) -> list[int]:
    """Borders of the parts of a window, all of (nearly) the same size; the first part lacks the first token's loss."""
    count = min(BUCKETS, length // 2)
    return [round(b * length / count) for b in range(count + 1)]
