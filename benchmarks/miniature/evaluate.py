"""Needles and filler at 1, 2, 4 and 8 times the training length, with and without a fitted temperature.

Notable:
- float32, with eaftdrope's own functions: `with_rope` and `swapped_rope` make an arm, `scaled_queries` its temperature.
- A sequence queries each of its six needles once, at its end; an answer is correct if it is the most likely token. The
  dense text of 8x has 24 needles, three times as many as any training sequence, and queries six of them.
- Filler is measured only on the last tokens, one training length, which have the whole context before them.
- The temperature is beta = 1 + slope * ln(scale). The slope is fitted for each arm and length by the training objective
  (mean loss of filler plus that of answers), on separate sequences. Slopes are tried upwards from 0 until the loss
  rises.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eaftdrope.drope.rope import swapped_rope, with_rope
from eaftdrope.drope.temperature import beta_for, scaled_queries

from . import data

SCALES = (1, 2, 4, 8)
QUARTERS = 4
SLOPES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
# sequences at 1x per sequence at a greater length
MORE_AT_1X = 4
# tokens of one forward pass, chosen to fit the CPU's cache
_TOKENS = 8192
_EVALUATED, _FITTED, _DENSE = 1, 2, 3
# name of the cell
DENSE = f"{SCALES[-1]} dense"


@dataclass(frozen=True)
class View:
    """A model with a rope `method`; with `crop`, the context is cut to the last training length."""

    model: nn.Module
    method: str
    crop: bool = False


def text(seed: int, scale: int, count: int, purpose: int = _EVALUATED) -> data.Batch:
    """Evaluation sequences, the same for all arms of a seed."""
    random = np.random.default_rng([seed, purpose, scale])
    needles = data.DENSE_NEEDLES if purpose == _DENSE else data.ASKED
    return data.evaluation_batch(random, count, scale * data.TRAINED_BLOCKS, needles)


@torch.no_grad()
def measure(view: View, batch: data.Batch, scale: int, slope: float = 0.0) -> dict:
    """Return the accuracy of the answers (also by quarter of the depth, from the start of the text to its end), its
    standard error over sequences, and mean losses in nats."""
    beta = beta_for(scale, 1, slope)
    stretched = scale > 1 and not view.crop
    # at 1x the rotation is unchanged
    method = view.method if stretched or view.method == "nope" else "rope"
    rope = with_rope(view.model.config, method, factor=scale if stretched else 1)
    right, losses = [], []
    rows = max(1, _TOKENS // batch.tokens_BT.shape[1])
    with swapped_rope(view.model, rope), scaled_queries(view.model, beta) if slope else contextlib.nullcontext():
        for tokens_BT in batch.tokens_BT.split(rows):
            logits_BTV, labels_BT = _last_logits(view, tokens_BT)
            right.append(logits_BTV.argmax(2) == labels_BT)
            losses.append(cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none"))
    return _summary(batch, torch.cat(right), torch.cat(losses)) | {"slope": slope, "beta": round(beta, 4)}


def _last_logits(view: View, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and the tokens they predict, for the last training length less one token."""
    window = data.TRAINED_LENGTH - 1
    if view.crop:
        begin = torch.full((len(tokens_BT), 1), data.BOS)
        tokens_BT = torch.cat([begin, tokens_BT[:, -window:]], dim=1)
    hidden_BTH = view.model.model(tokens_BT[:, :-1], use_cache=False).last_hidden_state[:, -window:]
    return view.model.lm_head(hidden_BTH), tokens_BT[:, -window:]


def _summary(batch: data.Batch, right_BT: Tensor, loss_BT: Tensor) -> dict:
    window = right_BT.shape[1]
    filler_BT, answer_BT, depth_BT = (part[:, -window:] for part in (batch.filler_BT, batch.answer_BT, batch.depth_BT))
    right, depth = right_BT[answer_BT].float(), depth_BT[answer_BT]
    quarter = (depth * QUARTERS).long().clamp(max=QUARTERS - 1)
    by_sequence = right.view(len(right_BT), -1).mean(1)
    return {
        "accuracy": round(right.mean().item(), 4),
        "standard_error": round(by_sequence.std().item() / math.sqrt(len(by_sequence)), 4),
        "by_quarter": [round(right[quarter == number].mean().item(), 4) for number in range(QUARTERS)],
        "answer_loss": round(loss_BT[answer_BT].mean().item(), 4),
        "filler_loss": round(loss_BT[filler_BT].mean().item(), 4),
    }


def fit_slope(view: View, seed: int, scale: int, count: int) -> tuple[float, dict[str, float]]:
    """Return the best slope, and the loss of every slope tried."""
    batch = text(seed, scale, count, _FITTED)
    tried: dict[float, float] = {}
    for slope in SLOPES:
        found = measure(view, batch, scale, slope)
        tried[slope] = round(found["answer_loss"] + found["filler_loss"], 4)
        if tried[slope] > min(tried.values()):
            break
    return min(tried, key=tried.get), {f"{slope:g}": loss for slope, loss in tried.items()}


def evaluate(view: View, seed: int, sequences: int, fit: int) -> dict:
    """Return `plain` and `fitted` cells by scale. At 1x and for a crop there is nothing to fit, and dense text has the
    temperature of its length."""
    plain, fitted, fits, slopes = {}, {}, {}, dict.fromkeys(SCALES, 0.0)
    for scale in SCALES:
        if scale > 1 and not view.crop:
            slopes[scale], fits[scale] = fit_slope(view, seed, scale, fit)
    for name, scale in [*((scale, scale) for scale in SCALES), (DENSE, SCALES[-1])]:
        count = sequences * MORE_AT_1X if scale == 1 else sequences
        batch = text(seed, scale, count, _DENSE if name == DENSE else _EVALUATED)
        plain[name] = fitted[name] = measure(view, batch, scale)
        if slopes[scale]:
            fitted[name] = measure(view, batch, scale, slopes[scale])
    return {"plain": plain, "fitted": fitted, "fits": fits}
