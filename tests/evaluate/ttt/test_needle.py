"""Needles: where they lie, and what an answer costs, against one forward over the whole text."""

import math

import pytest
import torch
from torch.nn import functional as F

from eaftdrope.errors import UserError
from eaftdrope.evaluate.long_context.needles import Hay
from eaftdrope.evaluate.ttt.needle import GUESSING, PLACES, PassKey, PassKeys, ask_pass_key
from eaftdrope.ttt import TTTConfig, apply_ttt, sequence_nll

TEXT = "".join(f"Sentence {i} says that {i} and {i} make {2 * i}. " for i in range(60))
WINDOW = 160


@pytest.fixture
def keys(byte_tokenizer):
    return PassKeys(byte_tokenizer, Hay(byte_tokenizer, [TEXT]), WINDOW, seed=3)


def test_needles_lie_inside_and_outside_the_window(keys, byte_tokenizer):
    seen = set()
    for index in range(12):
        inside, outside = (keys.trial(where, index) for where in PLACES)
        assert len(inside.prompt) == len(outside.prompt) and inside.answer == outside.answer
        digits = byte_tokenizer.decode(inside.answer).strip()
        assert len(digits) == 5 and digits.isdigit()
        seen.add(digits)
        for trial in (inside, outside):
            text = byte_tokenizer.decode(trial.prompt)
            needle = f" The pass key is {digits}. Remember it. {digits} is the pass key."
            assert text.count(needle) == 1
            assert text.rstrip().endswith("\nWhat is the pass key? The pass key is")
            # one token per byte
            end = text.index(needle) + len(needle)
            assert len(text) - end == trial.gap
            assert text.index(needle) >= 32
            if trial is inside:
                # the last digit still sees the needle's first token
                assert trial.gap + len(needle) + len(trial.answer) <= WINDOW
            else:
                assert trial.gap >= 2 * WINDOW
    assert len(seen) == 12
    assert keys.trial("inside", 4) == keys.trial("inside", 4)
    assert pytest.approx(math.log(10**5)) == GUESSING


def test_a_window_without_room_is_refused(byte_tokenizer):
    with pytest.raises(UserError, match=r"a window of 100 tokens is too small for a needle .* Leave needle out"):
        PassKeys(byte_tokenizer, Hay(byte_tokenizer, [TEXT]), 100)


@pytest.mark.parametrize("learning", [False, True])
def test_the_loss_of_the_digits_is_that_of_the_whole_text(keys, tiny_llama, learning):
    trial = keys.trial("outside", 0)
    row = torch.tensor([[*trial.prompt, *trial.answer]])
    if learning:
        model = apply_ttt(tiny_llama, TTTConfig(window=WINDOW, chunk=64, fast_blocks=1, lr=0.5))
        expected = sequence_nll(model, row)[0, -len(trial.answer) :].sum()
    else:
        model = tiny_llama
        logits = model(row).logits[0, -len(trial.answer) - 1 : -1]
        expected = F.cross_entropy(logits, row[0, -len(trial.answer) :], reduction="sum")
    answer = ask_pass_key(model, trial)
    assert answer.nll == pytest.approx(expected.item(), rel=1e-5)
    assert not answer.right


def test_an_answer_that_greedy_decoding_gives_is_right(keys, tiny_llama):
    prompt = keys.trial("inside", 0).prompt
    given = tiny_llama.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    own = given[0, len(prompt) :].tolist()
    assert ask_pass_key(tiny_llama, PassKey(prompt, own, 0)).right
    assert not ask_pass_key(tiny_llama, PassKey(prompt, [*own[:2], (own[2] + 1) % 259], 0)).right
