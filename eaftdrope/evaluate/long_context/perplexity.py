"""Perplexity by the length of the window, and by the position inside it.

A window's loss is the mean over all its tokens except the first, so a longer window has a larger share of tokens with a
long context: a model that uses its context gets better with length, one that fails beyond its trained length gets worse.
A cropped model keeps its perplexity too: perplexity does not prove that a long context is used.

The loss of every token of a long window is computed in constant memory: tokens pass through the model in chunks, over its
cache.

Shapes: B windows, S tokens, V vocabulary. Logits exist for one chunk at a time, [B, chunk, V].
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from eaftdrope.errors import UserError
from eaftdrope.loaded_model import evaluating

from ..likelihood import Progress
from ..scores import Score, score_units
from .needles import Hay, Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUCKETS = 16


@dataclass(frozen=True)
class WindowLosses:
    """Losses of the parts of each window: `sums[w][b]` is (nats, tokens) of part b of window w."""

    length: int
    joined: bool
    sums: tuple[tuple[tuple[float, int], ...], ...]

    def score(self) -> Score:
        """Return the perplexity over all tokens; its standard error is over windows."""
        units = [(sum(nll for nll, _ in parts), float(sum(n for _, n in parts))) for parts in self.sums]
        return score_units("perplexity", "general", f"perplexity at {self.length}", units, kind="exp", better="lower")

    def by_position(self) -> list[tuple[int, int, Score]]:
        """Return (first position, one past the last, perplexity of the tokens there) of each part, in order."""
        edges = bucket_edges(self.length)
        scores = []
        for b, (start, stop) in enumerate(pairwise(edges)):
            units = [(parts[b][0], float(parts[b][1])) for parts in self.sums]
            metric = f"perplexity at {start}-{stop}"
            scores.append(
                (start, stop, score_units("perplexity", "general", metric, units, kind="exp", better="lower"))
            )
        return scores

    def as_json(self) -> dict[str, Any]:
        """Return the document that `from_json` reads."""
        return {"joined": self.joined, "sums": self.sums}

    @classmethod
    def from_json(cls, length: int, result: dict[str, Any]) -> WindowLosses:
        """Return the losses that `as_json` wrote."""
        sums = tuple(tuple((nll, count) for nll, count in parts) for parts in result["sums"])
        return cls(length, result["joined"], sums)


def perplexity_by_length(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    lengths: list[int],
    *,
    windows: int = 8,
    crop: int | None = None,
    batch_tokens: int = 16384,
    progress: Progress | None = None,
) -> dict[int, WindowLosses]:
    """Return the losses of at most `windows` windows of each length.

    Args:
        texts: documents. If no document is as long as a window, windows are cut from all of them in a row.
        crop: number of tokens that the model sees at once (see `cropped_losses`); None: all.
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
                f"the text has {len(hay.tokens)} tokens, too few for a window of {length}. Use a longer text."
            )
        measured[length] = window_losses(
            model, cut, prefix=len(hay.prefix), crop=crop, batch_tokens=batch_tokens, progress=progress
        )
    return measured


def window_losses(
    model: PreTrainedModel,
    windows: Windows,
    *,
    prefix: int = 0,
    crop: int | None = None,
    batch_tokens: int = 16384,
    progress: Progress | None = None,
) -> WindowLosses:
    """Return the losses of windows; the first `prefix` tokens of each are those that begin every text."""
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
                losses = cropped_losses(model, ids, crop, prefix=prefix)
            # Entry t is of token t + 1: the first token of a window has no loss.
            parts = [losses[:, max(0, a - 1) : b - 1] for a, b in pairwise(edges)]
            sums += [tuple((part[w].sum().item(), part.shape[1]) for part in parts) for w in range(len(ids))]
            if progress is not None:
                progress(len(sums), len(rows))
    return WindowLosses(length, windows.joined, tuple(sums))


def bucket_edges(length: int) -> list[int]:
    """Return the borders of the parts of a window, of (nearly) equal size; the first part lacks the first token's loss."""
    count = min(BUCKETS, length // 2)
    return [round(b * length / count) for b in range(count + 1)]


# Positions whose logits exist at once: 512 x 152k x 4 bytes = 311 MB.
CHUNK = 512
# Rows of logits converted to float32 at once.
_ROWS = 256


@torch.no_grad()
def token_losses(model: PreTrainedModel, input_ids: torch.Tensor, *, chunk: int = CHUNK) -> torch.Tensor:
    """Return the cross-entropy of every token given all before it in its window.

    Args:
        input_ids: int64 [B, S], no padding.
        chunk: positions per forward.

    Returns:
        float64 [B, S - 1] in nats, on the CPU: entry t is of token t + 1.
    """
    cache = None
    losses = []
    width = input_ids.shape[1] - 1
    for start in range(0, width, chunk):
        stop = min(start + chunk, width)
        out = model(input_ids=input_ids[:, start:stop].to(model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        losses.append(_cross_entropy(out.logits, input_ids[:, start + 1 : stop + 1]))
    return torch.cat(losses, dim=1)


def cropped_losses(
    model: PreTrainedModel, input_ids: torch.Tensor, crop: int, *, prefix: int = 0, chunk: int = CHUNK
) -> torch.Tensor:
    """Return the losses of a model that never sees more than `crop` tokens, as [`token_losses`] does.

    A window that slides by one token would cost a forward of `crop` tokens for each loss, so it slides by half of them:
    beyond the first `crop`, every token is predicted from at least (crop - prefix) / 2 and fewer than `crop` tokens.

    Args:
        input_ids: int64 [B, S].
        crop: tokens that the model sees, at least `prefix` + 2.
        prefix: number of tokens that begin every text (BOS); a crop keeps them.
    """
    assert crop >= prefix + 2
    losses = [token_losses(model, input_ids[:, :crop], chunk=chunk)]
    done, stride = min(crop, input_ids.shape[1]), max(1, (crop - prefix) // 2)
    while done < input_ids.shape[1]:
        stop = min(done + stride, input_ids.shape[1])
        seen = torch.cat([input_ids[:, :prefix], input_ids[:, stop - (crop - prefix) : stop]], dim=1)
        losses.append(token_losses(model, seen, chunk=chunk)[:, done - stop :])
        done = stop
    return torch.cat(losses, dim=1)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    flat, labels = logits.flatten(0, 1), targets.flatten().to(logits.device)
    parts = [
        F.cross_entropy(flat[i : i + _ROWS].float(), labels[i : i + _ROWS], reduction="none")
        for i in range(0, len(labels), _ROWS)
    ]
    return torch.cat(parts).view(targets.shape).double().cpu()
