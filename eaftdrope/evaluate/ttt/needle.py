"""A pass key of five digits in the texts, inside and outside the window: what a reader recalls word for word.

    filler   The pass key is 40218. Remember it. 40218 is the pass key.   filler   What is the pass key? The pass key is 40218
                                                                       |----------------------- gap ------------------|

Trials inside and outside have the same length, filler and key; only the gap differs. Inside, the needle and the digits
are in the window together. Outside, the gap is twice the window. The digits are drawn independently, so guessing costs
5 ln 10 = 11.5 nats.
"""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch

from eaftdrope.errors import UserError
from eaftdrope.ttt import TTTState, is_ttt
from eaftdrope.versions import cache_argument, cache_of

from ..long_context.needles import Hay, place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLACES = ("inside", "outside")
DIGITS = 5
GUESSING = DIGITS * math.log(10)
_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "\nWhat is the pass key? The pass key is {key}"
# Tokens of filler before a needle outside the window: it is not among the first tokens, which a sink keeps in view.
_BEFORE = 32
# Tokens of a prompt per forward of a stock model; a model with TTT divides a prompt itself.
_PIECE = 2048


class PassKey(NamedTuple):
    """A prompt and the tokens of the digits that continue it; `gap` tokens lie between the needle and the digits."""

    prompt: list[int]
    answer: list[int]
    gap: int


class PassKeyAnswer(NamedTuple):
    """Summed loss of the digits in nats, and True if greedy decoding gives exactly them."""

    nll: float
    right: bool


class PassKeys:
    """Trials for a window of `window` tokens, each created on request.

    Raises:
        UserError: the window is too small for a needle and a question.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hay: Hay, window: int, *, seed: int = 0) -> None:
        self._tokenizer, self._hay, self._window, self._seed = tokenizer, hay, window, seed
        self.trial("inside", 0)

    def trial(self, where: str, index: int) -> PassKey:
        """Create trial number `index` inside or outside the window."""
        random = Random(f"{self._seed} {index}")
        key = "".join(random.choices("0123456789", k=DIGITS))
        needle, question = (self._encode(text.format(key=key)) for text in (_NEEDLE, _QUESTION))
        count = next((i for i, token in enumerate(reversed(question)) if not self._has_digit(token)), len(question))
        asked, answer = question[: len(question) - count], question[len(question) - count :]
        # Inside, the needle, the question and the digits leave this much of the window for filler.
        room = self._window - len(needle) - len(question)
        if room < 1:
            raise UserError(
                f"a window of {self._window} tokens is too small for a needle and its question, which need "
                f"{len(needle) + len(question) + 1}. Leave needle out of --probes."
            )
        after = {"inside": room // 2, "outside": 2 * self._window - len(asked)}
        filler, stops = self._hay.cut(_BEFORE + after["outside"], random)
        # At the end of a sentence, where one ends in the right part.
        at = place(1 - after[where] / len(filler), len(filler), [stop for stop in stops if stop >= _BEFORE])
        if where == "inside" and len(filler) - at > room:
            at = len(filler) - after[where]
        prompt = [*self._hay.prefix, *filler[:at], *needle, *filler[at:], *asked]
        return PassKey(prompt, answer, len(filler) - at + len(asked))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _has_digit(self, token: int) -> bool:
        return any(character.isdigit() for character in self._tokenizer.decode([token]))


@torch.no_grad()
def ask_pass_key(model: PreTrainedModel, trial: PassKey) -> PassKeyAnswer:
    """Let a model read the prompt, learning if it learns, and answer.

    The digits are given one after the other, so their losses are those of the right answer; greedy decoding gives exactly
    the answer if each digit is the most probable token after the digits before it.
    """
    cache = TTTState(model) if is_ttt(model) else None
    answer = torch.tensor(trial.answer, device=model.device)
    prompt = torch.tensor([trial.prompt], device=model.device)
    whole = [prompt] if is_ttt(model) else prompt.split(_PIECE, dim=1)
    pieces = [*whole, *answer[:-1].view(-1, 1, 1)]
    logits = []
    for number, piece in enumerate(pieces):
        out = model(input_ids=piece, **cache_argument(cache), use_cache=True, logits_to_keep=1)
        cache = cache_of(out)
        if number >= len(pieces) - len(trial.answer):
            logits.append(out.logits[0, -1].float())
    logprobs = torch.stack(logits).log_softmax(-1)
    nll = -logprobs.gather(1, answer[:, None]).sum().item()
    return PassKeyAnswer(nll, torch.equal(logprobs.argmax(-1), answer))
