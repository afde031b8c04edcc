"""The baselines: what their calls contain, that they fit, what they cost; the router."""

import re

import pytest

from eaftdrope.errors import UserError
from eaftdrope.rlm.baselines import BASELINES, answer_many, route
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.rlm.tasks import make_task
from eaftdrope.rlm.tasks.task import NAMES

QUERY = "What is the magic number for maple?"


def prompts(model):
    return [messages[0]["content"] for messages in model.seen]


def echo(window=1_000):
    """A model of `window` tokens of four characters that replies `reply 1`, `reply 2`, ..."""
    counted = iter(range(1, 100_000))
    return ScriptedModel(lambda messages: f"<think>no</think> reply {next(counted)}\n", window=window)


def text_of(lines):
    return "\n".join(f"line {number:05d} of the text" for number in range(lines))


def test_a_short_text_is_sent_whole():
    model = echo()
    (answer,) = answer_many("plain", model, [("all of it", QUERY)], max_tokens=50)
    assert prompts(model) == [f"all of it\n\nQuestion: {QUERY}\nReply with the answer only."]
    assert (answer.text, answer.calls) == ("reply 1", 1)
    assert answer.tokens == len(prompts(model)[0]) // 4 + len("<think>no</think> reply 1\n") // 4


def test_the_middle_of_a_long_text_is_cut_out():
    model, text = echo(), text_of(1_000)
    answer_many("plain", model, [(text, QUERY)], max_tokens=50)
    (prompt,) = prompts(model)
    # one more character would not fit
    assert len(prompt) // 4 + 50 == 1_000
    shown, _ = prompt.split("\n\nQuestion")
    head, left_out, tail = re.split(r"\n\[\.\.\. ([\d,]+) characters left out \.\.\.\]\n", shown)
    assert text.startswith(head) and text.endswith(tail) and 0 <= len(head) - len(tail) <= 1
    assert int(left_out.replace(",", "")) == len(text) - len(head) - len(tail)


def test_documents_are_joined():
    model = echo()
    answer_many("plain", model, [(["one", "two"], QUERY)])
    assert prompts(model)[0].startswith("one\n\ntwo\n\n")


def test_map_reduce_reads_every_line_once_and_joins_the_notes():
    model, text = echo(), text_of(500)
    (answer,) = answer_many("map-reduce", model, [(text, QUERY)], max_tokens=50)
    *maps, reduce = prompts(model)
    parts = [re.search(r"of a text:\n(.*?)\n*\nQuestion about", prompt, re.DOTALL)[1] for prompt in maps]
    assert "\n".join(parts) == text
    assert all(len(prompt) // 4 <= 500 for prompt in maps) and len(prompts(model)[0]) // 4 > 480
    assert [f"Part {n} of {len(maps)}" in prompt for n, prompt in enumerate(maps, 1)] == [True] * len(maps)
    assert re.findall(r"Part \d+: reply \d+", reduce) == [f"Part {n}: reply {n}" for n in range(1, len(maps) + 1)]
    assert (answer.calls, answer.text) == (len(maps) + 1, f"reply {len(maps) + 1}")


def test_a_summary_carries_its_notes():
    model = echo()
    (answer,) = answer_many("summary", model, [(text_of(200), QUERY)], max_tokens=50)
    *carried, last = prompts(model)
    assert len(carried) > 2 and "so far:\n(none)\n" in carried[0]
    for number, prompt in enumerate([*carried[1:], last], 1):
        assert f"\nreply {number}\n" in prompt
    assert answer.text == f"reply {len(carried) + 1}"


def test_bm25_sends_the_passages_that_match():
    filler = [f"the {word} was seen near the river" for word in ("copper", "meadow", "ledger") for _ in range(300)]
    filler.insert(450, "The magic number for maple is 12345.")
    filler.insert(100, "The magic number for hazel is 54321.")
    model = echo(window=2_000)
    answer_many("bm25", model, [("\n".join(filler), QUERY)], max_tokens=50)
    (prompt,) = prompts(model)
    # in the order of the text
    assert 0 < prompt.find("54321") < prompt.find("12345")
    assert len(prompt) < 8_000 < len("\n".join(filler))


@pytest.mark.parametrize("context", ["", [], ["", ""], "one"])
@pytest.mark.parametrize("query", ["zebra?", "?"])
@pytest.mark.parametrize("name", BASELINES)
def test_nothing_is_too_short(name, query, context):
    (answer,) = answer_many(name, echo(), [(context, query)])
    assert answer.text.startswith("reply")


@pytest.mark.parametrize("name", BASELINES)
def test_every_prompt_fits_whatever_the_text(name):
    """A tokenizer for which the beginning has few tokens, and the rest many; no line ends."""

    class Dense(ScriptedModel):
        def check(self, messages, max_tokens):
            text = messages[0]["content"]
            tokens = len(text) // 8 + 4 * text.count("#")
            if tokens + max_tokens > self.window:
                raise ValueError(f"{tokens} tokens")

        def generate(self, batch, max_tokens):
            for messages in batch:
                self.check(messages, max_tokens)
            return super().generate(batch, max_tokens)

    model = Dense(lambda messages: "note", window=600)
    (answer,) = answer_many(name, model, [("word " * 600 + "#" * 900, QUERY)], max_tokens=60)
    assert answer.text == "note"
    if name in ("map-reduce", "summary"):
        assert sum(prompt.count("#") for prompt in prompts(model)) == 900


@pytest.mark.parametrize("name", BASELINES)
def test_tasks_share_batches_and_do_not_mix(name):
    tasks = [make_task("needle", seed, 3_000 + 3_000 * seed) for seed in range(3)]
    batches = []

    class Counting(ScriptedModel):
        def generate(self, batch, max_tokens):
            batches.append(len(batch))
            return super().generate(batch, max_tokens)

    def reply(messages):
        question = messages[0]["content"].rpartition("uestion")[2]
        (key,) = set(re.findall(r"\w+", question)) & set(NAMES["test"])
        found = re.findall(rf"magic number for {key} is (\d+)|^(?:Part \d+: )?(\d{{5}})$", messages[0]["content"], re.M)
        return next(("".join(numbers) for numbers in found), "nothing")

    model = Counting(reply, window=2_000)
    answers = answer_many(name, model, [(task.context, task.query) for task in tasks], max_tokens=50)
    assert sum(batches) == sum(answer.calls for answer in answers) and batches[0] >= 3
    if name != "plain":
        assert [task.score(answer.text) for task, answer in zip(tasks, answers, strict=True)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", BASELINES)
def test_a_query_that_does_not_fit(name):
    with pytest.raises(UserError, match=r"the window of scripted is too small for the query .* tokens; .* fit"):
        answer_many(name, echo(window=200), [("text", "why? " * 400)], max_tokens=50)


@pytest.mark.parametrize(
    ("chars", "window", "crossover", "expected"),
    [
        (3_000, 8_192, 1_000, "plain"),
        (5_000, 8_192, 1_000, "rlm"),
        (5_000, 8_192, 2_000, "plain"),
        # the window is smaller than the crossover
        (5_000, 1_024, 2_000, "rlm"),
        # read without its tokens being counted
        (10_000_000, 8_192, 2_000, "rlm"),
    ],
)
def test_route(chars, window, crossover, expected):
    model = ScriptedModel([], window=window)
    assert route(model, "abcd" * (chars // 4), "Why?", crossover=crossover, max_tokens=64) == expected
