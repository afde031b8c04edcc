"""Latency and memory by position, and what reading costs the model."""

import pytest
import torch

from eaftdrope.evaluate.texts import shipped_text
from eaftdrope.evaluate.ttt.latency import crossover, step_costs
from eaftdrope.evaluate.ttt.passages import cut_passages
from eaftdrope.evaluate.ttt.retention import BLOCK, read_into_state, retention_scores, text_to_read
from eaftdrope.ttt import TTTConfig, apply_ttt, is_ttt, learned

CONFIG = TTTConfig(window=32, sink=2, chunk=16, fast_blocks=1, lr=0.5)
TEXT = "".join(f"Sentence {i} says that {i} and {i} make {2 * i}. " for i in range(60))


def test_memory_grows_with_full_attention_only(tiny_llama):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    found = {position: step_costs(tiny_llama, CONFIG, 32, position, repeats=1) for position in (64, 256)}
    # keys and values of two layers, two heads of 8 float32 values
    per_token = 2 * 2 * 2 * 8 * 4
    assert [found[position]["full"].nbytes for position in (64, 256)] == [64 * per_token, 256 * per_token]
    for reader in ("window", "ttt"):
        assert found[64][reader].nbytes == found[256][reader].nbytes < 256 * per_token + 4 * 3 * 32 * 64
    assert all(cost.chunk_seconds > 0 and cost.token_seconds > 0 for one in found.values() for cost in one.values())
    assert not is_ttt(tiny_llama)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())
    assert set(step_costs(tiny_llama, CONFIG, 32, 64, full=False, repeats=1)) == {"window", "ttt"}


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        # TTT takes 2 s everywhere: the ratio is 1 halfway, on logarithmic axes
        ({512: 1.0, 2048: 4.0, 8192: 16.0}, 1024.0),
        ({512: 4.0, 2048: 4.0}, 512.0),
        ({512: 1.0, 2048: 1.5}, None),
        # noise at a short position is not the crossover
        ({512: 2.1, 2048: 1.0, 8192: 4.0}, 4096.0),
    ],
)
def test_crossover(full, expected):
    costs = {position: {"full": seconds, "ttt": 2.0} for position, seconds in full.items()}
    assert crossover(costs) == (None if expected is None else pytest.approx(expected))


def test_no_crossover_without_full_attention():
    assert crossover({512: {"ttt": 2.0}}) is None


def test_the_text_that_is_read_has_none_of_the_probe(byte_tokenizer):
    novel = shipped_text()
    documents = [byte_tokenizer(text).input_ids for text in (TEXT, novel[5000:9000], TEXT[::-1])]
    blocks = cut_passages(documents, [], BLOCK)
    read = text_to_read(byte_tokenizer, blocks, [1], 10**6)
    text = byte_tokenizer.decode(read.ids[1:])
    assert read.ids[0] == 1 and text.startswith(TEXT[:200]) and TEXT[::-1][:200] in text
    assert not any(novel[start : start + 100] in text for start in range(5000, 8900, 100))
    # one token per byte
    assert read.left_out == len(documents[1]) // BLOCK
    assert len(text_to_read(byte_tokenizer, blocks, [1], 300).ids) == 300


def test_reading_changes_the_scores_and_nothing_stays(tiny_llama, byte_tokenizer):
    model = apply_ttt(tiny_llama, CONFIG)
    ids = byte_tokenizer(TEXT).input_ids[:200]
    options = {"questions": 4, "tokens": 512}
    fresh = retention_scores(model, byte_tokenizer, None, **options)
    read = retention_scores(model, byte_tokenizer, ids, **options)
    assert [score.metric for score in read] == ["perplexity", "multiple choice", "multiple choice, plain"]
    assert [score.n for score in read] == [2, 4, 4]
    assert abs(read[0].value - fresh[0].value) > 0.01
    assert retention_scores(model, byte_tokenizer, None, **options) == fresh
    # by definition: the fast weights of the state that has read the text
    state = read_into_state(model, ids)
    assert (state.position, state.updates) == (200, 12)
    with learned(model, state):
        again = retention_scores(model, byte_tokenizer, None, **options)
    assert again == read
