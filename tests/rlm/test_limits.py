"""Limits hold inside a cell, against code that catches everything, and for children too. Calls are counted at the model."""

import time

import pytest

from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.limits import Budget, LimitReached
from eaftdrope.rlm.models import ScriptedModel
from tests.rlm.boxes import BOXES, lacking


def repl(code):
    return f"```repl\n{code}\n```"


def stubborn(call):
    """Code that does not give up."""
    return repl(f"while True:\n    try:\n        {call}\n    except BaseException:\n        pass")


def run(replies, sub=lambda _: "yes", *, sandbox="monty", context="", **limits):
    if reason := lacking(sandbox):
        pytest.skip(reason)
    sub_model = ScriptedModel(sub, name="sub")
    rlm = RLM(ScriptedModel(replies), sub_model, limits=Limits(**limits), sandbox=sandbox)
    return rlm.complete(context, "?"), sub_model


@pytest.mark.parametrize("sandbox", BOXES)
def test_sub_calls(sandbox):
    result, sub = run([stubborn("llm_query('a')")], sandbox=sandbox, sub_calls=10)
    assert result.stopped == "sub_calls: 10 + 1 would pass 10"
    assert (len(sub.seen), result.usage["sub_calls"], result.answer, result.finished) == (10, 10, "", False)


@pytest.mark.parametrize("sandbox", BOXES)
def test_a_batch_that_does_not_fit_is_not_begun(sandbox):
    result, sub = run([stubborn("llm_query_batched(['a'] * 4)")], sandbox=sandbox, sub_calls=10)
    assert (len(sub.seen), result.stopped) == (8, "sub_calls: 8 + 4 would pass 10")


def test_a_batch_beyond_the_limit_is_not_even_counted_in_tokens():
    class Expensive(ScriptedModel):
        def check(self, messages, max_tokens):
            checked.append(messages)

    checked = []
    model = Expensive([repl("llm_query_batched(['a'] * 100_000)")])
    result = RLM(model, limits=Limits(sub_calls=5)).complete("", "?")
    assert result.stopped == "sub_calls: 0 + 100000 would pass 5"
    assert len(checked) == 1


@pytest.mark.parametrize("sandbox", BOXES)
def test_tokens(sandbox):
    """The call that passes the limit is the last: a root's prompt and reply, then 300 and 25 tokens per call."""
    result, sub = run([stubborn("llm_query('a' * 1200)")], lambda _: "b" * 100, sandbox=sandbox, tokens=2000)
    assert result.stopped.startswith("tokens: ") and result.stopped.endswith(" of 2000 used")
    root = result.usage["tokens"] - 325 * len(sub.seen)
    assert 200 < root < 400
    assert root + 325 * (len(sub.seen) - 1) < 2000 <= root + 325 * len(sub.seen)


def test_tokens_hold_within_a_batch_at_each_slice():
    result, sub = run([repl("llm_query_batched(['a' * 400] * 100)")], tokens=3000)
    assert result.stopped.startswith("tokens: ") and len(sub.seen) == 32


def test_a_limit_ends_its_own_run_only():
    """Two runs in lockstep, of which one passes its tokens in the middle of a batch."""

    def root(messages):
        if len(messages) > 2:
            return "FINAL(done)"
        return repl(
            "llm_query_batched(['a' * 400] * 100)" if "'greedy'" in messages[1]["content"] else "x = llm_query('a')"
        )

    rlm = RLM(ScriptedModel(root), ScriptedModel(lambda _: "yes", name="sub"), limits=Limits(tokens=3000))
    greedy, modest = rlm.complete_many([("greedy", "?"), ("modest", "?")])
    assert greedy.stopped.startswith("tokens: ") and not greedy.finished
    assert (modest.answer, modest.stopped) == ("done", None)


@pytest.mark.parametrize("sandbox", BOXES)
def test_seconds(sandbox, monkeypatch):
    """Between the calls of a cell, by a clock that each call moves."""
    now = [time.monotonic()]

    class Clock:
        monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr("eaftdrope.rlm.limits.time", Clock)

    def sub(_):
        now[0] += 2
        return "yes"

    result, model = run([stubborn("llm_query('a')")], sub, sandbox=sandbox, seconds=9)
    assert (result.stopped, len(model.seen)) == ("seconds: 9 have passed", 5)


@pytest.mark.parametrize("sandbox", BOXES)
def test_a_stopped_cell_does_not_end_the_run(sandbox):
    replies = [
        repl("x = 1"),
        stubborn("while True: pass"),
        repl("x = []\nwhile True: x.append('a' * 10**6)"),
        repl("answer = {'content': x, 'ready': True}"),
    ]
    result, _ = run(replies, sandbox=sandbox, cell_seconds=0.3, memory_mb=64)
    assert result.answer == "1"
    assert [message["content"].split(" (")[0] for message in result.messages[5::2]] == ["The cell was stopped"] * 2


@pytest.mark.parametrize("sandbox", BOXES)
def test_a_cell_does_not_compute_longer_than_the_run_may_last(sandbox):
    result, _ = run(["```repl\nwhile True: pass\n```", "never"], sandbox=sandbox, seconds=0.5, cell_seconds=100)
    assert result.stopped == "seconds: 0.5 have passed"
    assert result.messages[3]["content"].startswith("The cell was stopped (it ran longer than 0.5 s)")


@pytest.mark.parametrize("sandbox", BOXES)
def test_the_time_of_calls_is_not_the_time_of_the_cell(sandbox):
    def sub(_):
        time.sleep(0.2)
        return "yes"

    code = repl("for _ in range(3): llm_query('a')\nanswer = {'content': 'done', 'ready': True}")
    assert run([code], sub, sandbox=sandbox, cell_seconds=0.5)[0].answer == "done"


def test_output():
    result, _ = run([repl("print('a' * 10**6)"), "FINAL(1)"], output_chars=300)
    assert result.messages[3]["content"] == "a" * 200 + "\n[... 999,701 characters not shown ...]\n" + "a" * 99 + "\n"


def test_the_window_of_the_root():
    """Its conversation grows by each turn until no reply fits."""
    rlm = RLM(ScriptedModel(lambda _: repl("print('a' * 2000)"), window=2000), limits=Limits(root_tokens=500))
    result = rlm.complete("", "?")
    assert result.stopped.startswith("window of the root: the prompt has ") and 1 < result.turns < 20


# ---- depth ----


def child_of(messages):
    return "a str of 4 characters" in messages[0]["content"]


@pytest.mark.parametrize(
    "code",
    [
        "x = rlm_query('Again', 'abcd')",
        "f = rlm_query\nx = f('Again', 'abcd')",
        "x = list(map(rlm_query, ['Again'], ['abcd']))",
        "def f(q, c): return rlm_query(q, c)\nrlm_query = f\nx = rlm_query('Again', 'abcd')",
        "x = rlm_query_batched(['Again', 'Again'], ['abcd', 'abcd'])",
        "x = eval(\"rlm_query('Again', 'abcd')\")",
    ],
)
def test_no_code_gets_deeper_than_the_limit(code):
    """Every conversation asks for a child; those at the last depth get a plain call instead."""
    places = set()

    def model(messages):
        if messages[0]["role"] == "user":
            places.add("plain call")
            return "plain"
        places.add("child" if child_of(messages) else "root")
        return repl(code + "\nanswer = {'content': 'done', 'ready': True}")

    rlm = RLM(ScriptedModel(model), limits=Limits(depth=2, iterations=2, sub_calls=50))
    rlm.complete("whole", "?")
    journal = [
        messages[0]["content"].split("- context: ")[1].split("\n")[0]
        for messages in rlm.model.seen
        if messages[0]["role"] == "system"
    ]
    assert set(journal) <= {"a str of 5 characters", "a str of 4 characters"}
    assert places <= {"root", "child", "plain call"} and "root" in places


def test_children_share_the_budget():
    """A child that loops uses up the calls of its parent, and of its siblings."""

    def model(messages):
        if messages[0]["role"] == "user":
            return "yes"
        return stubborn("llm_query('a')") if child_of(messages) else stubborn("rlm_query('Again', 'abcd')")

    model = ScriptedModel(model)
    result = RLM(model, limits=Limits(depth=2, sub_calls=7)).complete("whole", "?")
    assert result.stopped == "sub_calls: 7 + 1 would pass 7"
    # the child is one of the seven
    assert sum(messages[0]["role"] == "user" for messages in model.seen) == 6


def test_a_child_that_does_not_finish_is_an_error_of_the_code():
    code = """
try:
    rlm_query('Again', 'abcd')
except ValueError as error:
    answer = {'content': str(error), 'ready': True}
"""

    def model(messages):
        return "Hm." if child_of(messages) else repl(code)

    result = RLM(ScriptedModel(model), limits=Limits(depth=2, iterations=3)).complete("whole", "?")
    assert result.answer == "rlm_query did not finish: iterations: 3 replies without an answer"


def test_at_depth_one_a_child_is_a_plain_call():
    result, sub = run([repl("answer = {'content': rlm_query('Count', 'abcd'), 'ready': True}")], lambda _: "4")
    assert result.answer == "4" and sub.seen == [[{"role": "user", "content": "Count\n\nabcd"}]]


# ---- the limits themselves ----


@pytest.mark.parametrize(
    ("name", "value"), [("iterations", 0), ("depth", -1), ("cell_seconds", 0.0), ("preview_chars", -1)]
)
def test_limits_are_positive(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: must be positive"):
        Limits(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_limits_are_finite(value):
    """No time passes NaN, and infinity has no JSON."""
    with pytest.raises(ValueError, match=f"seconds={value}: must be finite"):
        Limits(seconds=value)


def test_a_budget_reserves_all_or_nothing():
    budget = Budget(Limits(sub_calls=5))
    budget.reserve_calls(5)
    budget.reserve_calls(0)
    with pytest.raises(LimitReached):
        budget.reserve_calls(1)
    assert budget.sub_calls == 5
