"""`read(texts)`: a root that selects passages, and a reader that has read them when the sub-model is asked."""

import hashlib

import pytest

from eaftdrope.errors import UserError
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.journal import read_journal
from eaftdrope.rlm.models import ScriptedModel, check_fits
from eaftdrope.rlm.protocol import SYSTEM_SHORT
from tests.rlm.boxes import BOXES, lacking

FINISH = '```repl\nanswer["content"] = {}\nanswer["ready"] = True\n```'
LIBRARIAN = (
    '```repl\nn = read([context[:3], context[3:6]])\nread(context[6:])\nreplies = llm_query_batched(["a", "b"])\n```'
)


class ListReader:
    """Replies with all that it has read; `work` counts the texts that were really read."""

    def __init__(self, policy="fork"):
        self.name, self.policy, self.work = f"list, {policy}", policy, 0

    def begin(self):
        return ListReading(self)


class ListReading:
    window = 100

    def __init__(self, reader):
        self.reader, self.texts, self.remembers = reader, [], reader.policy == "accumulate"

    @property
    def name(self):
        return f"{self.reader.name} after {hashlib.sha256('|'.join(self.texts).encode()).hexdigest()[:8]}"

    def count(self, texts):
        return sum(map(len, texts))

    def read(self, texts):
        self.texts = [*([] if self.reader.policy == "reset" else self.texts), *texts]

    def note(self, prompt, reply):
        self.texts += [prompt]

    def check(self, messages, max_tokens):
        check_fits(len(messages[0]["content"]), 1, self.window)

    def generate(self, batch, max_tokens):
        self.reader.work += len(self.texts) * len(batch)
        return [
            ScriptedModel(lambda messages: f"{messages[0]['content']}:{'+'.join(self.texts)}")._answer(m) for m in batch
        ]


def rlm_of(replies, reader, sandbox="monty", **limits):
    if reason := lacking(sandbox):
        pytest.skip(reason)
    sub = ScriptedModel(lambda messages: "sub", name="sub")
    return RLM(ScriptedModel(replies), sub, reader=reader, limits=Limits(**limits), sandbox=sandbox)


@pytest.mark.parametrize("sandbox", BOXES)
def test_the_reader_has_read_what_the_root_selected(sandbox):
    rlm = rlm_of(
        ['```repl\nbefore = llm_query("x")\n```', LIBRARIAN, FINISH.format("[before, n, *replies]")],
        ListReader(),
        sandbox,
    )
    result = rlm.complete("abcdefghi", "Which?")
    assert result.answer == "['sub', 6, 'a:abc+def+ghi', 'b:abc+def+ghi']"
    assert result.usage["sub_calls"] == 3
    system = result.messages[0]["content"]
    assert "- read(texts): " in system and system.index("rlm_query_batched") < system.index("read(texts)")


@pytest.mark.parametrize("sandbox", BOXES)
def test_without_a_reader_there_is_no_read(sandbox):
    rlm = rlm_of(
        ['```repl\ntry:\n    read("a")\nexcept NameError:\n    print("none")\n```', FINISH.format("1")], None, sandbox
    )
    result = rlm.complete("abc", "Which?")
    assert result.messages[3]["content"] == "none\n" and "read(" not in result.messages[0]["content"]
    short = RLM(ScriptedModel([FINISH.format("1")]), reader=ListReader(), system=SYSTEM_SHORT, sandbox="monty")
    assert "read(texts)" in short.complete("abc", "Which?").messages[0]["content"]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("reset", ["a:ghi", "b:ghi", "c:jkl"]),
        ("fork", ["a:abc+def+ghi", "b:abc+def+ghi", "c:abc+def+ghi+jkl"]),
        ("accumulate", ["a:abc+def+ghi", "b:abc+def+ghi+a", "c:abc+def+ghi+a+b+jkl"]),
    ],
)
def test_policies(policy, expected):
    code = LIBRARIAN.replace("context[6:]", "context[6:9]")
    more = '```repl\nread("jkl")\nreplies.append(llm_query("c"))\n```'
    result = rlm_of([code, more, FINISH.format("replies")], ListReader(policy)).complete("abcdefghi", "Which?")
    assert result.answer == str(expected)


@pytest.mark.parametrize("policy", ["fork", "accumulate"])
def test_a_run_resumes_from_its_journal_and_a_finished_one_reads_nothing(policy, tmp_path):
    """Cut after each event in turn: the same journal in the end, and every answer is paid once."""
    whole = tmp_path / "whole.jsonl"
    replies = [LIBRARIAN, FINISH.format("replies")]
    first = rlm_of(replies, ListReader(policy)).complete("abcdefghi", "Which?", journal=whole)
    lines = whole.read_text().splitlines(keepends=True)
    kinds = [event["event"] for event in read_journal(whole)]
    assert kinds == [
        "begin",
        "start",
        "call",
        "read",
        "read",
        "call",
        "call",
        "cell",
        "turn",
        "call",
        "cell",
        "stop",
        "end",
    ]
    assert read_journal(whole)[3] == {"event": "read", "place": "root", "texts": 2, "chars": 6, "tokens": 6}
    for count in range(1, len(lines)):
        cut = tmp_path / f"{count}.jsonl"
        cut.write_text("".join(lines[:count]))
        # a root that is asked again begins at the reply that is missing
        left = replies[kinds[:count].count("call") > 0 :] if kinds[:count].count("call") < 4 else []
        assert rlm_of(left, ListReader(policy)).complete("abcdefghi", "Which?", journal=cut).answer == first.answer
        assert [line for line in cut.read_text().splitlines(keepends=True) if '"call"' not in line] == [
            line for line in lines if '"call"' not in line
        ]
    reader = ListReader(policy)
    again = rlm_of([], reader).complete("abcdefghi", "Which?", journal=whole)
    assert (again.answer, reader.work, again.usage["replayed"]) == (first.answer, 0, 4)
    with pytest.raises(UserError, match="different: reader"):
        rlm_of([], ListReader("reset")).complete("abcdefghi", "Which?", journal=whole)


def test_reading_costs_tokens_before_it_is_done():
    reader, replies = ListReader(), ['```repl\nread("a" * 90)\n```', '```repl\nread("b" * 90)\n```']
    free = rlm_of([*replies, FINISH.format("1")], reader).complete("x", "Which?")
    used = rlm_of(replies, reader, iterations=2).complete("x", "Which?").usage["tokens"]
    assert used > 180 and free.finished
    # the second reading passes the limit by one token
    result = rlm_of(replies, reader, tokens=used - 1).complete("x", "Which?")
    assert (result.finished, result.stopped) == (False, "tokens: 90 to read, and 89 left")
    assert result.usage["tokens"] == used - 90
    # a text that could not fit is not even counted
    reader.begin = None
    code = '```repl\nread("a" * 900_000)\n```'
    assert rlm_of([code], reader, tokens=1000).complete("x", "Which?").stopped.startswith("tokens: 900,000 characters")


def test_mistakes_are_errors_that_code_can_catch():
    code = (
        '```repl\nfor texts in ("", 3, ["a", 3]):\n    try:\n        read(texts)\n'
        "    except TypeError as e:\n        print(e)\n```"
    )
    result = rlm_of([code, FINISH.format("llm_query('q')")], ListReader()).complete("x", "Which?")
    assert result.messages[3]["content"] == "read takes a non-empty string or a list of them\n" * 3
    # nothing was read, so the sub-model answers
    assert result.answer == "sub"
    long = rlm_of(['```repl\nread("a")\nllm_query("q" * 200)\n```', FINISH.format("1")], ListReader()).complete(
        "x", "Which?"
    )
    assert "99 fit" in long.messages[3]["content"]


def test_a_child_reads_for_itself():
    root = [
        '```repl\nread("root")\nchild = rlm_query("Child?", "text")\nmine = llm_query("m")\n```',
        FINISH.format("[child, mine]"),
    ]
    child = ['```repl\nread("child")\n```', FINISH.format("llm_query('c')")]
    seen = {"root": iter(root), "child": iter(child)}

    def reply(messages):
        return next(seen["child" if "Child?" in messages[1]["content"] else "root"])

    assert rlm_of(reply, ListReader(), depth=2).complete("x", "Which?").answer == "['c:child', 'm:root']"
