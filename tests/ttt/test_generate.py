"""Stock `generate` with a model that learns: what it produces is what reading the result again gives."""

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from eaftdrope.ttt import TTTState
from tests.ttt.test_reading import off
from tests.ttt.tiny import CHUNK, WINDOWS, random_ids, read, tiny

PROMPT, NEW = 8, 17
# generate keeps logits in float32
KEPT = 1e-6


def generate(model, ids, state=None, *, new=NEW, **options):
    given = {} if state is None else {"past_key_values": state}
    options = dict(do_sample=False, return_dict_in_generate=True, output_logits=True) | options
    return model.generate(ids, max_new_tokens=new, **given, **options)


def teacher_forced(model, sequences):
    """Logits `[B, new, V]` of the generated tokens, each row read from its beginning in one pass."""
    with torch.no_grad():
        return model(sequences).logits[:, PROMPT - 1 : -1]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_greedy_is_teacher_forced_across_updates(kind, window):
    model, state = WINDOWS[window](kind), None
    state = TTTState(model)
    found = generate(model, random_ids(1, PROMPT), state)
    expected = teacher_forced(model, found.sequences)
    assert found.sequences.shape == (1, PROMPT + NEW)
    assert (torch.stack(found.logits, dim=1) - expected).abs().max() < KEPT
    assert torch.equal(expected.argmax(-1), found.sequences[:, PROMPT:])
    # the last token is generated and not read
    assert state.position == PROMPT + NEW - 1 and state.updates == (PROMPT + NEW - 2) // CHUNK
    assert not torch.allclose(expected, teacher_forced(off(model), found.sequences), atol=1e-3)


def test_by_default_the_state_is_fresh():
    model, ids = tiny(), random_ids(1, PROMPT)
    expected = generate(model, ids, TTTState(model))
    for _ in range(2):
        found = generate(model, ids)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert isinstance(found.past_key_values, TTTState) and found.past_key_values.updates == 4


def test_a_batch_of_prompts():
    model, ids = tiny(), random_ids(2, PROMPT)
    found = generate(model, ids)
    for index, row in enumerate(ids):
        assert torch.equal(generate(model, row[None]).sequences[0], found.sequences[index])


@pytest.mark.parametrize("first", [3, 7, 12])
def test_continuing_is_generating_in_one_go(first):
    model, ids, state = tiny(), random_ids(1, PROMPT), None
    state = TTTState(model)
    part = generate(model, ids, state, new=first)
    rest = generate(model, part.sequences, state, new=NEW - first)
    assert torch.equal(rest.sequences, generate(model, ids).sequences)


def test_a_question_after_a_text_that_was_read():
    """All tokens are passed, or those that follow with a mask for all, as to every cache of transformers."""
    model, text, question = tiny(), random_ids(1, 14), random_ids(1, 6, seed=4)
    both = torch.cat([text, question], dim=1)
    expected = generate(model, both).sequences
    state = TTTState(model)
    read(model, text, 5, state)
    assert torch.equal(generate(model, both, state.fork()).sequences, expected)
    found = generate(model, question, state.fork(), attention_mask=torch.ones_like(both))
    assert torch.equal(found.sequences, expected[:, 14:])
    # a stock cache would drop as many tokens of the question as it has read
    for ids in (question, random_ids(1, 20, seed=6), text):
        with pytest.raises(ValueError, match="has read 14 tokens"):
            generate(model, ids, state)
    assert state.position == 14


def test_without_a_cache_the_text_is_read_again_for_each_token():
    model, ids = tiny(), random_ids(1, PROMPT)
    found = generate(model, ids, use_cache=False, new=6)
    expected = generate(model, ids, new=6)
    assert torch.equal(found.sequences, expected.sequences)
    assert (torch.stack(found.logits) - torch.stack(expected.logits)).abs().max() < KEPT


def test_sampling_several_sequences():
    model, ids = tiny(), random_ids(1, PROMPT)
    torch.manual_seed(0)
    found = generate(model, ids, do_sample=True, num_return_sequences=3)
    assert found.sequences.shape == (3, PROMPT + NEW) and len({tuple(row) for row in found.sequences.tolist()}) == 3
    expected = teacher_forced(model, found.sequences)
    assert (torch.stack(found.logits, dim=1) - expected).abs().max() < KEPT


@pytest.mark.parametrize("options", [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}], ids=str)
def test_a_state_of_one_row_serves_several_sequences(options):
    model, text, question = tiny(), random_ids(1, 14), random_ids(1, 6, seed=4)
    state = TTTState(model)
    read(model, text, 5, state)
    both = torch.cat([text, question], dim=1)
    torch.manual_seed(0)
    found = generate(model, both, state, **options)
    torch.manual_seed(0)
    assert torch.equal(found.sequences, generate(model, both, **options).sequences)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_score_of_a_beam_is_its_log_probability(window):
    model, ids = WINDOWS[window](), random_ids(1, PROMPT)
    options = dict(num_beams=3, num_return_sequences=3, output_scores=True, length_penalty=1.0)
    found = generate(model, ids, TTTState(model), new=12, **options)
    log_probs = teacher_forced(model, found.sequences).log_softmax(-1)
    expected = log_probs.gather(-1, found.sequences[:, PROMPT:, None]).sum((1, 2))
    assert (found.sequences_scores * 12 - expected).abs().max() < 1e-5
    assert len({tuple(row) for row in found.sequences.tolist()}) == 3
    # a search is not worse than its first guess
    greedy = generate(model, ids, new=12).sequences
    least = teacher_forced(model, greedy).log_softmax(-1).gather(-1, greedy[:, PROMPT:, None]).sum()
    assert expected[0] >= least - 1e-9


class Kept(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_gets_each_token():
    model, ids, streamer = tiny(), random_ids(1, PROMPT), Kept()
    found = generate(model, ids, streamer=streamer)
    assert streamer.ended and streamer.tokens == found.sequences[0].tolist()


def test_only_the_last_logits_are_returned_where_only_they_are_wanted():
    model, ids = tiny(), random_ids()
    with torch.no_grad():
        expected = model(ids).logits
        assert model(ids, logits_to_keep=1).logits.shape[1] == 1
        found = model(ids, past_key_values=TTTState(model), use_cache=True, logits_to_keep=1).logits
    assert found.shape == (2, 1, 31) and (found - expected[:, -1:]).abs().max() < 1e-12


def test_a_left_padded_batch_is_refused_with_the_way_out():
    model = tiny()
    ids = random_ids(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match=r"length"):
        generate(model, ids, attention_mask=mask)
