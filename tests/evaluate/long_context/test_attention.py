"""Attention on the needle against the whole matrix that output_attentions gives."""

import pytest
import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate.long_context import attention_on_needle
from eaftdrope.evaluate.long_context.attention import NeedleAttention, head_masses, last_weights
from eaftdrope.evaluate.long_context.needles import Hay, Needles

TEXT = "The rain fell on the town. Nobody minded. " * 20


def test_mass_equals_the_whole_matrix(tiny_llama, byte_tokenizer):
    found = attention_on_needle(tiny_llama, byte_tokenizer, [TEXT], 700, trials=3, depths=3)
    needles = Needles("niah", byte_tokenizer, Hay(byte_tokenizer, [TEXT]), 700, depths=3)
    before = tiny_llama.config._attn_implementation
    assert before == "sdpa"
    tiny_llama.set_attn_implementation("eager")
    sums = torch.zeros(3, 2, 4, dtype=torch.float64)
    for i in range(3):
        trial = needles.trial(i)
        a, b = trial.span
        with torch.no_grad():
            out = tiny_llama(torch.tensor([trial.ids]), output_attentions=True)
        for layer, weights in enumerate(out.attentions):
            for head in range(4):
                row = weights[0, head, -1].double()
                assert row.sum().item() == pytest.approx(1, abs=1e-5)
                near = sum(row[j].item() for j in range(len(row)) if a - 1 <= j < b + 1)
                outside = sum(row[j].item() for j in range(len(row)) if j < a - 4 or j >= b + 4)
                sums[:, layer, head] += torch.tensor([row[a:b].max().item(), near, outside])
    expected = sums / 3
    assert [found.mean.peak, found.mean.near, found.mean.outside] == pytest.approx(
        expected.mean(dim=(1, 2)).tolist(), abs=1e-5
    )
    flat = expected[1].flatten().tolist()
    best = flat.index(max(flat))
    assert (found.best_layer, found.best_head) == divmod(best, 4)
    assert [found.best.peak, found.best.near, found.best.outside] == pytest.approx(
        expected[:, found.best_layer, found.best_head].tolist(), abs=1e-5
    )
    assert 0.05 < found.uniform < 0.2
    assert NeedleAttention.from_json(found.as_json()) == found


def test_the_model_keeps_its_attention(tiny_llama, byte_tokenizer):
    attention_on_needle(tiny_llama, byte_tokenizer, [TEXT], 700, trials=1)
    assert tiny_llama.config._attn_implementation == "sdpa"


def test_chunks_do_not_change_the_weights(tiny_llama, byte_tokenizer, monkeypatch):
    ids = byte_tokenizer(TEXT).input_ids[:200]
    whole = last_weights(tiny_llama, ids)
    monkeypatch.setattr("eaftdrope.evaluate.long_context.attention._PREFILL", 37)
    for a, b in zip(whole, last_weights(tiny_llama, ids)):
        assert (a - b).abs().max() < 1e-6


def test_a_sliding_window_has_no_weight_outside():
    layer = torch.tensor([[0.5, 0.3, 0.2]])
    peak, near, outside = head_masses([layer], 10, (6, 8))[:, 0, 0].tolist()
    # keys are tokens 7, 8 and 9
    assert (peak, near) == (pytest.approx(0.5), pytest.approx(0.8))
    assert outside == 0.0
    assert head_masses([layer], 10, (1, 3))[:, 0, 0].tolist() == pytest.approx([0.0, 0.0, 1.0])


def test_a_model_without_weights(tiny_llama, byte_tokenizer, monkeypatch):
    forward = tiny_llama.forward

    def silent(*args, logits_to_keep=0, output_attentions=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_llama, "forward", silent)
    with pytest.raises(UserError, match=r"LlamaForCausalLM returns no attention weights\. Leave attention out"):
        last_weights(tiny_llama, [5, 6, 7])
