"""Loss by position, and the pass-key test.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from eaftdrope.evaluate.long_context.perplexity import token_losses
from eaftdrope.ttt import is_ttt, sequence_nll

from .models import autocast
from .plan import CHUNK

DIGITS = 5
_TOLD = "The pass key is {key}. Remember it: {key} is the pass key.\n\n"
_ASKED = "\n\nWhat is the pass key? The pass key is "


def losses_by_chunk(model: PreTrainedModel, ids_T: Tensor) -> list[float]:
    """Mean loss of each chunk of a passage; the last has one token fewer, since nothing follows it."""
    with autocast():
        nll_T = (sequence_nll(model, ids_T[None]) if is_ttt(model) else token_losses(model, ids_T[None]))[0]
    return [round(float(part.double().mean()), 5) for part in nll_T.split(CHUNK)]


class PassKeys:
    """Five digits, stated twice, required after `gap` tokens of a novel. Trial `index` is the same for every model."""

    def __init__(self, tokenizer, novel: list[int]) -> None:
        self.tokenizer, self.novel = tokenizer, novel
        self.stops = [place for place, token in enumerate(novel) if tokenizer.decode([token]).strip() == "."]

    def trial(self, gap: int, index: int) -> tuple[Tensor, int]:
        """Return the token ids and the number of those that are the key, at the end."""
        random = Random(f"{gap} {index}")
        key = "".join(random.choice("0123456789") for _ in range(DIGITS))
        # one token per digit, whatever the tokenizer would merge
        digits = [self._ids(digit)[-1] for digit in key]
        start = random.choice([stop + 1 for stop in self.stops if stop + 1 + gap <= len(self.novel)])
        hay = self.novel[start : start + gap]
        told = self._ids(_TOLD.format(key=key))
        return torch.tensor([*told, *hay, *self._ids(_ASKED), *digits]), len(digits)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def pass_key(model: PreTrainedModel, ids_T: Tensor, count: int) -> tuple[float, bool]:
    """Return the summed loss of the last `count` tokens, and whether greedy decoding would produce exactly them."""
    with autocast():
        hidden = model.base_model(ids_T[None]).last_hidden_state[0, -count - 1 : -1]
        logits_V = model.get_output_embeddings()(hidden).float()
    target = ids_T[-count:]
    loss = cross_entropy(logits_V, target, reduction="sum").item()
    return round(loss, 4), bool((logits_V.argmax(-1) == target).all())
