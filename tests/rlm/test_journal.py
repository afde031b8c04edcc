"""A journal: resumed after kills, replayed without a model, refused for another run, with one writer at a time."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from eaftdrope.errors import UserError
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.calls import SLICE
from eaftdrope.rlm.journal import Journal, conversations
from eaftdrope.rlm.models import ScriptedModel
from tests.rlm import killed
from tests.rlm.boxes import BOXES, lacking

LIMITS = Limits(depth=2, sub_calls=40)
CONTEXT = [f"part {number}" for number in range(40)]


def root(messages):
    """Two cells with sub-calls, one of them by a child."""
    if "a str of" in messages[0]["content"]:
        return "```repl\nanswer = {'content': llm_query(context), 'ready': True}\n```"
    return [
        "```repl\nfirst = llm_query_batched(context[:37])\nprint(set(first[:3]))\n```",
        "```repl\nsecond = rlm_query('Again', context[37])\nprint(second)\nanswer['content'] = first[-1] + second\n```",
        "```repl\nanswer['ready'] = True\n```",
    ][len(messages) // 2 - 1]


def upper(messages):
    return messages[0]["content"].upper()


def rlm_of(*, replies=root, sub=upper, limits=LIMITS, sandbox="monty", **options):
    if reason := lacking(sandbox):
        pytest.skip(reason)
    return RLM(ScriptedModel(replies), ScriptedModel(sub, name="sub"), limits=limits, sandbox=sandbox, **options)


def silent(_):
    raise AssertionError("a replay calls no model")


def same(result):
    return result.answer, result.finished, result.stopped, result.turns, result.messages, result.usage["tokens"]


@pytest.mark.parametrize("sandbox", BOXES)
def test_two_runs_write_the_same_bytes(tmp_path, sandbox):
    for name in ("a", "b"):
        rlm_of(sandbox=sandbox).complete(CONTEXT, "?", journal=tmp_path / name)
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes()
    kinds = [json.loads(line)["event"] for line in first.splitlines()]
    assert kinds == [
        "begin",
        "start",
        *["call"] * 38,
        "cell",
        "turn",
        "call",
        "start",
        "call",
        "call",
        "cell",
        "stop",
        "cell",
        "turn",
        "call",
        "cell",
        "stop",
        "end",
    ]
    assert not (tmp_path / "a.lock").exists()


@pytest.mark.parametrize("sandbox", BOXES)
def test_a_replay_needs_no_model_and_changes_nothing(tmp_path, sandbox):
    path = tmp_path / "journal"
    first = rlm_of(sandbox=sandbox).complete(CONTEXT, "?", journal=path)
    written = path.read_bytes()
    again = rlm_of(replies=silent, sub=silent, sandbox=sandbox).complete(CONTEXT, "?", journal=path)
    assert same(again) == same(first) and first.answer == "PART 36PART 37"
    assert (first.usage["replayed"], again.usage["replayed"]) == (0, 42)
    assert path.read_bytes() == written


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 20, 40, 41, 43, 46, 47])
def test_from_any_line_on_the_journal_is_written_again(tmp_path, kept):
    path, whole = tmp_path / "journal", tmp_path / "whole"
    first = rlm_of().complete(CONTEXT, "?", journal=whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    # a kill may cut the last line
    path.write_bytes(b"".join(lines[:kept]) + lines[kept][:30])
    rlm = rlm_of()
    assert same(rlm.complete(CONTEXT, "?", journal=path)) == same(first)
    assert path.read_bytes() == whole.read_bytes()
    answered = sum(b'"event": "call"' in line for line in lines[:kept])
    assert len(rlm.model.seen) + len(rlm.sub_model.seen) == 42 - answered


def test_a_stopped_run_is_resumed(tmp_path):
    """A model that fails ends the run with its error; the calls before it are not made again."""
    path = tmp_path / "journal"

    def failing(messages):
        if messages[0]["content"] == "part 35":
            raise ConnectionError("the server is gone")
        return upper(messages)

    with pytest.raises(ConnectionError):
        rlm_of(sub=failing).complete(CONTEXT, "?", journal=path)
    rlm = rlm_of()
    assert rlm.complete(CONTEXT, "?", journal=path).answer == "PART 36PART 37"
    # the slice that failed, and what came after it
    assert [messages[0]["content"] for messages in rlm.sub_model.seen] == CONTEXT[SLICE:38]


def test_the_same_prompt_asked_twice_is_two_calls(tmp_path):
    path, code = (
        tmp_path / "journal",
        "```repl\nanswer = {'content': [llm_query('a') for _ in range(3)], 'ready': True}\n```",
    )
    numbers = iter("123")
    assert (
        rlm_of(replies=[code], sub=lambda _: next(numbers)).complete("", "?", journal=path).answer == "['1', '2', '3']"
    )
    assert rlm_of(replies=silent, sub=silent).complete("", "?", journal=path).answer == "['1', '2', '3']"


def test_tokens_and_calls_are_counted_again_from_the_journal(tmp_path):
    path = tmp_path / "journal"
    first = rlm_of().complete(CONTEXT, "?", journal=path)
    again = rlm_of(replies=silent, sub=silent).complete(CONTEXT, "?", journal=path)
    assert again.usage["tokens"] == first.usage["tokens"] > 0
    assert again.usage["sub_calls"] == first.usage["sub_calls"] == 39


# ---- refusals ----


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"context": CONTEXT[:-1]}, "context, described"),
        ({"context": [*CONTEXT[:-1], "part 4O"]}, "context"),
        ({"query": "Which?"}, "query"),
        ({"limits": replace(LIMITS, sub_calls=41)}, "limits"),
        ({"limits": replace(LIMITS, cell_seconds=9.0)}, "limits"),
        ({"name": "another"}, "model"),
        ({"sub_name": "another"}, "sub_model"),
        ({"window": 4096}, "windows"),
        ({"system": "Answer about {kind}."}, "system"),
        ({"helpers": True}, "helpers"),
    ],
)
def test_a_journal_of_another_run_is_refused(tmp_path, change, different):
    path = tmp_path / "journal"
    rlm_of().complete(CONTEXT, "?", journal=path)
    written = path.read_bytes()
    options = {key: change[key] for key in ("limits", "system", "helpers") if key in change}
    rlm = RLM(
        ScriptedModel(root, name=change.get("name", "scripted"), window=change.get("window", 8192)),
        ScriptedModel(upper, name=change.get("sub_name", "sub")),
        **{"limits": LIMITS, **options},
    )
    with pytest.raises(UserError, match=rf"is the journal of another run \(different: {different}\)"):
        rlm.complete(change.get("context", CONTEXT), change.get("query", "?"), journal=path)
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    "content", [b"text", b"text\n", b"[1]\n", b'{"event": "begin", "version": 0}\n', b'{"event": "call"}\n', b"{}\n"]
)
def test_another_file_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a journal of an RLM run"):
        Journal(path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damaged", [b"rubbish\n", b"{}\n", b'{"event": "call", "key": "a"}\n', b"[]\n"])
def test_a_damaged_line_is_named(tmp_path, damaged):
    path = tmp_path / "journal"
    rlm_of().complete(CONTEXT, "?", journal=path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = damaged
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="journal, line 5: damaged"):
        rlm_of().complete(CONTEXT, "?", journal=path)
    assert path.read_bytes() == b"".join(lines)


def test_a_second_writer_is_refused(tmp_path):
    """In another process, in this one, and in the same call."""
    path = tmp_path / "journal"
    code = (
        "import sys\nfrom eaftdrope.rlm.journal import Journal\nkept = Journal(sys.argv[1])\nprint(flush=True)\ninput()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "\n"
        with pytest.raises(UserError, match="another run is writing"):
            rlm_of().complete(CONTEXT, "?", journal=path)
        # a kill releases it
        other.kill()
    assert rlm_of().complete(CONTEXT, "?", journal=path).finished
    with pytest.raises(UserError, match="another run is writing"):
        rlm_of().complete_many([(CONTEXT, "?")] * 2, journals=[path, path])
    assert rlm_of(replies=silent, sub=silent).complete(CONTEXT, "?", journal=path).finished


# ---- conversations ----


def rebuilt(path):
    return dict(conversations([json.loads(line) for line in path.read_bytes().splitlines()]))


def test_conversations_are_what_the_models_saw(tmp_path):
    path = tmp_path / "journal"
    rlm = rlm_of()
    result = rlm.complete(CONTEXT, "?", journal=path)
    found = rebuilt(path)
    assert found["root"] == result.messages
    assert list(found) == ["root", "root/1"]
    seen = [*rlm.model.seen]
    for messages in found.values():
        for turn in range(2, len(messages), 2):
            seen.remove(messages[:turn])
    assert not seen


def test_a_run_that_was_stopped_by_its_time_is_resumed(tmp_path, monkeypatch):
    """`seconds` begin again, so the second start has time for what the first had not."""
    path, now = tmp_path / "journal", [time.monotonic()]

    class Clock:
        monotonic = staticmethod(lambda: now[0])

    def slow(messages):
        now[0] += 400
        return root(messages)

    monkeypatch.setattr("eaftdrope.rlm.limits.time", Clock)
    stopped = rlm_of(replies=slow).complete(CONTEXT, "?", journal=path)
    assert stopped.stopped == "seconds: 600 have passed" and stopped.turns == 2
    monkeypatch.undo()
    rlm = rlm_of()
    result = rlm.complete(CONTEXT, "?", journal=path)
    assert result.answer == "PART 36PART 37"
    assert rebuilt(path)["root"] == result.messages


def test_another_output_than_before_leads_to_another_conversation(tmp_path):
    """CPython has a clock. The second start prints another time, so the root is asked again from there on."""
    path, code = tmp_path / "journal", "```repl\nimport time\nprint(time.time_ns())\n```"
    replies = {2: "```repl\nprint(1)\n```", 4: code, 6: "Hm.", 8: "FINAL(1)"}
    for _ in range(2):
        rlm = rlm_of(replies=lambda messages: replies[len(messages)], sandbox="cpython")
        result = rlm.complete("", "?", journal=path)
        assert result.answer == "1" and rebuilt(path)["root"] == result.messages
    # the first two replies were before the clock
    assert [len(messages) for messages in rlm.model.seen] == [6, 8]


def test_half_of_a_surrogate_pair_is_kept(tmp_path):
    """Text from a faulty source: the preview shows it, and the journal holds it."""
    path = tmp_path / "journal"
    for replies in (["FINAL(1)"], silent):
        result = rlm_of(replies=replies, sandbox="cpython").complete("a \ud800 b", "What \udfff?", journal=path)
        assert result.answer == "1" and result.messages[1]["content"].startswith("Query: What \udfff?")


# ---- kills ----


def after_kills(kills, seed, folder):
    command = [sys.executable, "-m", "tests.rlm.killed", str(kills), str(seed), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    runs = [json.loads(line) for line in ran.stdout.splitlines()]
    for deaths, repeated, different, run in runs:
        for name in ("journal", "result"):
            assert (folder / "whole" / name).read_bytes() == (folder / run / name).read_bytes(), run
        # at most a slice for each kill, of 30 sub-calls and 4 of the root
        assert repeated <= killed.SLICE * deaths and different == 34
    assert sum(deaths for deaths, *_ in runs) == kills
    return sum(repeated for _, repeated, *_ in runs)


def test_ten_kills(tmp_path):
    assert after_kills(10, 0, tmp_path) > 0


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    assert after_kills(200, 1, tmp_path) > 0
