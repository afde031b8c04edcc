"""A journal as turns, and the strategies of what it did."""

import pytest

from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.journal import conversations, read_journal
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.rlm.strategies import strategies_of, strategy_of, summary_of, tagged_turns
from eaftdrope.rlm.turns import conversation_tree

END = "answer['content'] = 'it'\nanswer['ready'] = True\n"


def fenced(*blocks):
    return "\n".join(f"```repl\n{block.rstrip()}\n```" for block in blocks)


def run(path, replies, **limits):
    def answer(messages):
        return fenced("print(llm_query('below'))", END) if "of a child" in messages[1]["content"] else next(left)

    left = iter(replies)
    rlm = RLM(ScriptedModel(answer), ScriptedModel(lambda messages: "ok", name="sub"), limits=Limits(depth=2, **limits))
    rlm.complete("some text " * 50, "Which?", journal=path)
    return conversation_tree(read_journal(path))


def test_blocks_have_their_outputs_calls_and_children(tmp_path):
    replies = [
        fenced("print(1)", "print(llm_query('a'))\nprint(llm_query_batched(['b', 'c']))", "1/0", "print('never')"),
        fenced("x = rlm_query_batched(['of a child', 'of a child'], [context, context])", END),
    ]
    root = run(tmp_path / "run.jsonl", replies)
    first, second = root.turns
    assert [(block.ran, block.output.strip(), len(block.calls)) for block in first.blocks] == [
        (True, "1", 0),
        (True, "ok\n['ok', 'ok']", 3),
        (True, "", 0),
        (False, "", 0),
    ]
    assert [call.prompt for call in first.blocks[1].calls] == ["a", "b", "c"]
    assert "ZeroDivisionError" in first.error and first.shown.startswith("1")
    children = second.blocks[0].children
    assert [(child.place, child.query, child.answer, child.sub_calls) for child in children] == [
        ("root/1", "of a child", "it", 1),
        ("root/2", "of a child", "it", 1),
    ]
    assert (root.query, root.answer, root.sub_calls, root.ended, root.repeated) == ("Which?", "it", 5, True, False)


def test_the_turns_are_the_messages_of_the_conversation(tmp_path):
    path = tmp_path / "run.jsonl"
    root = run(path, [fenced("print(1)"), "I think.", fenced(END)])
    messages = dict(conversations(read_journal(path)))["root"][2:]
    found = [text for turn in root.turns for text in (turn.reply, turn.shown) if text is not None]
    assert found == [message["content"] for message in messages]


def test_a_branch_that_a_resumed_run_left_is_not_shown(tmp_path):
    path = tmp_path / "run.jsonl"
    run(path, [fenced("print(1)"), fenced("print(2)"), fenced(END)])
    events = read_journal(path)
    places = [event["event"] for event in events]
    second = [n for n, kind in enumerate(places) if kind == "turn"][1]
    again = [
        {**next(e for e in events if e["event"] == "cell"), "output": "other\n"},
        {**next(e for e in events if e["event"] == "turn"), "shown": "other"},
    ]
    end = [event for event in events[second + 1 :] if event["event"] in ("call", "cell", "stop")]
    end[-1] = {**end[-1], "turn": 2}
    root = conversation_tree([*events[: second + 1], *again, *end])
    assert [turn.shown for turn in root.turns] == ["other", None] and root.repeated and root.answer == "it"


@pytest.mark.parametrize(
    ("replies", "expected", "strategy"),
    [
        (["FINAL(5)"], [["no code", "finish"]], "without reading"),
        ([fenced("print(context[:9])"), fenced(END)], [["look"], ["finish"]], "code only"),
        ([fenced("print(context.count('x'))", END)], [["search", "finish"]], "code only"),
        ([fenced("x = [w for w in context if 'a' in w]", END)], [["search", "finish"]], "code only"),
        ([fenced("parts = context.split()", END)], [["split", "finish"]], "code only"),
        ([fenced("oops"), fenced("print(1)"), fenced(END)], [["error"], ["recovery"], ["finish"]], "without reading"),
        ([fenced("llm_query('a')", END)], [["sub-call", "finish"]], "one sub-call"),
        ([fenced("[llm_query(c) for c in 'ab']", END)], [["batch", "finish"]], "map"),
        ([fenced("rlm_query('of a child', context)", END)], [["recursion", "finish"]], "recursion"),
    ],
)
def test_strategies(tmp_path, replies, expected, strategy):
    root = run(tmp_path / "run.jsonl", replies)
    assert [names for _, names in tagged_turns(root)] == expected
    assert strategy_of(root) == strategy
    assert strategies_of(root.turns[-1], finished=False) == [n for n in expected[-1] if n not in ("finish", "recovery")]


def test_a_summary_counts_every_call(tmp_path):
    path = tmp_path / "run.jsonl"
    run(path, [fenced("llm_query_batched(['a', 'b'])"), fenced("rlm_query('of a child', context)", END)])
    events = read_journal(path)
    found = summary_of("run", events)
    assert (found.finished, found.turns, found.sub_calls) == (True, 2, 3)
    assert found.tokens == events[-1]["tokens"]
    assert summary_of("run", events[:-2]).finished is None
    assert summary_of("stopped", run_events(tmp_path)).finished is False


def run_events(folder):
    run(folder / "stopped.jsonl", ["no"], iterations=1)
    return read_journal(folder / "stopped.jsonl")
