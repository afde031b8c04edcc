"""Attention from the answer position to the needle, head by head.

The prompt without its last token is read into the cache in chunks, with the model's fast attention; the last token, from
which the number is predicted, follows with eager attention. Its row of weights is the last row of the whole S x S matrix,
and costs layers x heads x S numbers.

Shapes: S tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from eaftdrope.errors import UserError
from eaftdrope.loaded_model import evaluating

from ..likelihood import Progress, keeps_logits
from .needles import Hay, Needles

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PREFILL = 2048
# Tokens on either side that count as the needle, and that do not yet count as outside.
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
    """Attention on needles of one length.

    Attributes:
        mean: over layers, heads and trials.
        best: of the head with the most mass near the needle, over trials; `best_layer` and `best_head` are its indices.
        uniform: `near` if all tokens had the same weight.
    """

    length: int
    trials: int
    mean: Mass
    best: Mass
    best_layer: int
    best_head: int
    uniform: float

    def as_json(self) -> dict[str, Any]:
        """Return the document that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, result: dict[str, Any]) -> NeedleAttention:
        """Return the attention that `as_json` wrote."""
        fields: dict[str, Any] = {**result, "mean": Mass(**result["mean"]), "best": Mass(**result["best"])}
        return cls(**fields)


def attention_on_needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    length: int,
    *,
    trials: int = 4,
    depths: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> NeedleAttention:
    """Return the attention on the needle of the position that predicts the number, over `trials` prompts of kind `niah`.

    Raises:
        UserError: `length` is too short, or the model has no eager attention that returns weights.
    """
    needles = Needles("niah", tokenizer, Hay(tokenizer, texts), length, depths=depths, seed=seed)
    return needle_attention(model, needles, trials, progress=progress)


def needle_attention(
    model: PreTrainedModel, needles: Needles, trials: int, *, progress: Progress | None = None
) -> NeedleAttention:
    """Return the same for existing needles; see [`attention_on_needle`]."""
    total: torch.Tensor | None = None
    near_uniform = 0.0
    with evaluating(model):
        for i in range(trials):
            trial = needles.trial(i)
            masses = head_masses(last_weights(model, trial.ids), len(trial.ids), trial.span)
            total = masses if total is None else total + masses
            near_uniform += (trial.span[1] - trial.span[0] + 2 * _NEAR) / len(trial.ids) / trials
            if progress is not None:
                progress(i + 1, trials)
    assert total is not None, "at least one trial"
    by_head = total / trials
    layer, head = divmod(by_head[1].argmax().item(), by_head.shape[2])
    mean = Mass(*by_head.mean(dim=(1, 2)).tolist())
    best = Mass(*by_head[:, layer, head].tolist())
    return NeedleAttention(needles.length, trials, mean, best, layer, head, near_uniform)


@torch.no_grad()
def last_weights(model: PreTrainedModel, ids: list[int]) -> list[torch.Tensor]:
    """Return the attention of the last token of `ids`, a float tensor [heads, keys] per layer.

    Layers with a sliding window have only the last keys, fewer than tokens.

    Raises:
        UserError: the model returns no attention weights.
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
    """Return [3, layers, heads]: peak, near and outside of each head for a needle at tokens span[0] to span[1] - 1."""
    rows = []
    for layer in weights:
        # A key outside of a sliding window has no weight.
        full = torch.zeros(layer.shape[0], length)
        full[:, length - layer.shape[1] :] = layer
        start, stop = span
        peak = full[:, start:stop].amax(dim=1)
        near = full[:, max(0, start - _NEAR) : stop + _NEAR].sum(dim=1)
        outside = full[:, : max(0, start - _FAR)].sum(dim=1) + full[:, stop + _FAR :].sum(dim=1)
        rows.append(torch.stack([peak, near, outside]))
    return torch.stack(rows, dim=1)
