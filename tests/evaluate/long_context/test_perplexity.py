"""Chunked losses over the cache against one plain forward, and windows against their definition."""

import math

import pytest
import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate.long_context import perplexity_by_length, token_losses
from eaftdrope.evaluate.long_context.needles import Hay
from eaftdrope.evaluate.long_context.perplexity import WindowLosses, bucket_edges, cropped_losses


def plain_losses(model, ids):
    """One forward over everything, float64 log-softmax."""
    with torch.no_grad():
        logp = model(ids, use_cache=False).logits.double().log_softmax(-1)
    return -logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def random_ids(rows, length, seed=0):
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_chunks_over_the_cache_equal_one_forward(tiny_llama, chunk):
    ids = random_ids(3, 150)
    found = token_losses(tiny_llama, ids, chunk=chunk)
    assert found.dtype == torch.float64 and found.shape == (3, 149)
    assert (found - plain_losses(tiny_llama, ids)).abs().max() < 1e-5


def test_chunks_go_past_max_position_embeddings(tiny_llama):
    tiny_llama.config.max_position_embeddings = 64
    ids = random_ids(1, 200)
    assert (token_losses(tiny_llama, ids, chunk=32) - plain_losses(tiny_llama, ids)).abs().max() < 1e-5


def test_chunks_with_sliding_windows():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    ids = random_ids(2, 90)
    assert (token_losses(model, ids, chunk=23) - plain_losses(model, ids)).abs().max() < 1e-5


def test_logits_of_one_chunk_exist_at_a_time(tiny_llama):
    widths = []
    tiny_llama.lm_head.register_forward_hook(lambda _, inputs, out: widths.append(out.shape[1]))
    token_losses(tiny_llama, random_ids(1, 100), chunk=32)
    assert widths == [32, 32, 32, 3]


@pytest.mark.parametrize("begin", [0, 1])
def test_cropped_losses_equal_feeding_the_last_tokens(tiny_llama, begin):
    ids, crop = random_ids(2, 100), 24
    found = cropped_losses(tiny_llama, ids, crop, prefix=begin)
    assert found.shape == (2, 99)
    assert (found[:, : crop - 1] - plain_losses(tiny_llama, ids[:, :crop])).abs().max() < 1e-5
    stride = (crop - begin) // 2
    for t in range(crop, 100):
        # The pass that scores token t ends where its stride ends, and sees the `crop` tokens before that.
        stop = min(100, crop + ((t - crop) // stride + 1) * stride)
        seen = torch.cat([ids[:, :begin], ids[:, stop - (crop - begin) : stop]], dim=1)
        expected = plain_losses(tiny_llama, seen)[:, t - stop]
        assert (found[:, t - 1] - expected).abs().max() < 1e-5
        # tokens before it in that pass
        assert (crop - begin) // 2 <= crop - (stop - t) < crop


def test_a_window_no_longer_than_the_crop_is_not_cropped(tiny_llama):
    ids = random_ids(1, 40)
    assert torch.equal(cropped_losses(tiny_llama, ids, 64), token_losses(tiny_llama, ids))


def test_perplexity_by_length_equals_a_plain_loop(tiny_llama, byte_tokenizer):
    texts = ["".join(chr(97 + i * i % 26) for i in range(100)), "short", "xyz. " * 30]
    found = perplexity_by_length(tiny_llama, byte_tokenizer, texts, [16, 40, 100, 200], windows=50, batch_tokens=90)
    rows = {
        length: [
            byte_tokenizer(text[start : start + length]).input_ids
            for text in texts
            for start in range(0, len(text) - length + 1, length)
        ]
        for length in (16, 40, 100)
    }
    joined = byte_tokenizer("\n\n".join(texts)).input_ids
    rows[200] = [joined[:200]]
    assert [len(rows[length]) for length in (16, 40, 100, 200)] == [15, 5, 2, 1]
    for length, windows in rows.items():
        losses = plain_losses(tiny_llama, torch.tensor(windows))
        score = found[length].score()
        assert score.n == len(windows) and found[length].joined == (length == 200)
        assert math.log(score.value) == pytest.approx(losses.mean().item(), abs=1e-5)
        for start, stop, part in found[length].by_position():
            expected = losses[:, max(0, start - 1) : stop - 1].mean().item()
            assert math.log(part.value) == pytest.approx(expected, abs=1e-5)
        assert sum(int(w) for _, _, part in found[length].by_position() for _, w in part.units) == losses.numel()
    assert WindowLosses.from_json(100, found[100].as_json()) == found[100]


def test_a_text_that_is_too_short_is_not_repeated(tiny_llama, byte_tokenizer):
    with pytest.raises(UserError, match=r"the text has 20 tokens, too few for a window of 21\. Use a longer text\."):
        perplexity_by_length(tiny_llama, byte_tokenizer, ["a" * 20], [21])


def test_windows_begin_as_texts_do(word_tokenizer):
    from tokenizers.processors import TemplateProcessing

    backend = word_tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    try:
        hay = Hay(word_tokenizer, ["w4 w5 w6 w7 w8"])
        assert hay.windows(3, 9) == ([[1, 4, 5], [1, 6, 7]], False)
        assert hay.windows(3, 1) == ([[1, 4, 5]], False)
        assert hay.windows(7, 1) is None
    finally:
        backend.post_processor = before


def test_buckets_cover_a_window():
    assert bucket_edges(2048) == list(range(0, 2049, 128))
    assert bucket_edges(5) == [0, 2, 5]
    assert bucket_edges(100)[0] == 0 and bucket_edges(100)[-1] == 100 and len(bucket_edges(100)) == 17


def test_an_empty_text(byte_tokenizer):
    with pytest.raises(UserError, match="the text is empty"):
        Hay(byte_tokenizer, ["", ""])
