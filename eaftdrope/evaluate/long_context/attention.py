"""How much attention the answer position pays to the needle, head by head.

The prompt but its last token goes into the cache in chunks, with whatever attention is fast; the last token, from which
the number is predicted, then takes one step with eager attention. That row of weights is the same as the last row of the
whole T x T matrix, and costs layers x heads x T numbers instead.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from eaftdrope.errors import UserError
from eaftdrope.loaded_model import evaluating

from ..likelihood import keeps_logits
from .needles import Hay, Needles

_PREFILL = 2048
# Tokens on either side that still count as the needle, and that no longer count as elsewhere.
_NEAR, _FAR = 1, 4


@dataclass(frozen=True)
class Mass:
    """Attention of one position on a needle.

    Attributes:
        peak: the largest weight of one token of the needle.
        near: sum of the weights of the needle and one token on either side.
        outside: sum of the weights beyond four tokens on either side.
    """

    peak: float
    near: float
    outside: float


@dataclass(frozen=True)
class NeedleAttention:
    """`mean` is over layers, heads and trials; `best` is of the head with the most mass near the needle, over trials;
    `uniform` is what `near` would be if all tokens had the same weight."""

    length: int
    trials: int
    mean: Mass
    best: Mass
    best_layer: int
    best_head: int
    uniform: float

    def as_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, result: dict) -> NeedleAttention:
        return cls(**{**result, "mean": Mass(**result["mean"]), "best": Mass(**result["best"])})


def attention_on_needle(
    model, tokenizer, texts: list[str], length: int, *, trials: int = 4, depths: int = 4, seed: int = 0, progress=None
) -> NeedleAttention:
    """Attention of the position that predicts the number, on the needle, over `trials` prompts of the kind `niah`.

    Raises:
        UserError: `length` is too short, or the model has no eager attention that returns weights.
    """
    needles = Needles("niah", tokenizer, Hay(tokenizer, texts), length, depths=depths, seed=seed)
    return needle_attention(model, needles, trials, progress=progress)


def needle_attention(model, needles: Needles, trials: int, *, progress=None) -> NeedleAttention:
    """`attention_on_needle` of needles that are made already."""
    total, near_uniform = None, 0.0
    with evaluating(model):
        for i in range(trials):
            trial = needles.trial(i)
            masses = head_masses(last_weights(model, trial.ids), len(trial.ids), trial.span)
            total = masses if total is None else total + masses
            near_uniform += (trial.span[1] - trial.span[0] + 2 * _NEAR) / len(trial.ids) / trials
            if progress is not None:
                progress(i + 1, trials)
    by_head = total / trials
    layer, head = divmod(by_head[1].argmax().item(), by_head.shape[2])
    mean = Mass(*by_head.mean(dim=(1, 2)).tolist())
    best = Mass(*by_head[:, layer, head].tolist())
    return NeedleAttention(needles.length, trials, mean, best, layer, head, near_uniform)


@torch.no_grad()
def last_weights(model, ids: list[int]) -> list[torch.Tensor]:
    """Attention of the last token of `ids`: a float tensor [heads, keys] a layer; layers with a sliding window have fewer
    keys than there are tokens, the last ones.

    Raises:
        UserError: the model returns no weights.
    """
    row = torch.tensor([ids], device=model.device)
    keep = {"logits_to_keep": 1} if keeps_logits(model) else {}
    cache = None
    for part in row[:, :-1].split(_PREFILL, dim=1):
        cache = model(input_ids=part, past_key_values=cache, use_cache=True, **keep).past_key_values
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model(input_ids=row[:, -1:], past_key_values=cache, use_cache=True, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    weights = [layer[0, :, -1].float().cpu() for layer in out.attentions or () if layer is not None]
    if not weights:
        raise UserError(f"{type(model).__name__} returns no attention weights. Leave attention out of --probes.")
    return weights


def head_masses(weights: list[torch.Tensor], length: int, span: tuple[int, int]) -> torch.Tensor:
    """[3, layers, heads]: peak, near and outside of each head for a needle at tokens span[0] to span[1] - 1."""
    rows = []
    for layer in weights:
        # A key that a sliding window has dropped has no weight.
        full = torch.zeros(layer.shape[0], length)
        full[:, length - layer.shape[1] :] = layer
        start, stop = span
        peak = full[:, start:stop].amax(dim=1)
        near = full[:, max(0, start - _NEAR) : stop + _NEAR].sum(dim=1)
        outside = full[:, : max(0, start - _FAR)].sum(dim=1) + full[:, stop + _FAR :].sum(dim=1)
        rows.append(torch.stack([peak, near, outside]))
    return torch.stack(rows, dim=1)
