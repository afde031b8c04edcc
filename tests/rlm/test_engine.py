"""A run with scripted models: what the root sees, how it finishes, and what code cannot do to it."""

import resource
import subprocess
import sys
import time

import pytest

from eaftdrope.errors import UserError
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.engine import SANDBOXES
from eaftdrope.rlm.functions import CHILDREN
from eaftdrope.rlm.models import ScriptedModel
from tests.rlm.boxes import BOXES, lacking

FINISH = '```repl\nanswer["content"] = {}\nanswer["ready"] = True\n```'


def repl(code):
    return f"```repl\n{code}\n```"


def rlm_of(replies, sub=None, *, sandbox="monty", window=8192, **limits):
    if reason := lacking(sandbox):
        pytest.skip(reason)
    sub_model = None if sub is None else ScriptedModel(sub, name="sub")
    return RLM(ScriptedModel(replies, window=window), sub_model, limits=Limits(**limits), sandbox=sandbox)


def marked(chars):
    """A text with a different mark every few hundred characters."""
    return "".join(f"<mark {number:06d}>" + "lorem ipsum " * 25 for number in range(chars // 314))


# ---- what models see ----


@pytest.mark.parametrize("sandbox", BOXES)
def test_a_run_from_question_to_answer(sandbox):
    rlm = rlm_of(
        [
            repl("parts = [context[:4], context[4:]]\nprint(parts)\nreplies = llm_query_batched(parts)"),
            FINISH.format("replies"),
        ],
        lambda messages: messages[0]["content"].upper(),
        sandbox=sandbox,
    )
    result = rlm.complete("abcdefgh", "What is it in capitals?")
    assert (result.answer, result.finished, result.stopped, result.turns) == ("['ABCD', 'EFGH']", True, None, 2)
    assert [message["role"] for message in result.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert result.messages[3]["content"] == "['abcd', 'efgh']\n"
    assert [messages[0]["content"] for messages in rlm.sub_model.seen] == ["abcd", "efgh"]
    assert result.usage["sub_calls"] == 2 and result.usage["replayed"] == 0


def test_models_see_no_more_than_the_limits_allow():
    """The root's first prompt has the preview of the context only, and each turn adds at most `output_chars`."""
    text, noisy = marked(200_000), repl("print(context)")

    def root(messages):
        system = messages[0]["content"]
        if "a str of 100,000 characters" in system:
            return noisy if len(messages) < 6 else FINISH.format("'child'")
        if len(messages) < 6:
            return noisy
        return repl("part = rlm_query('Again', context[:100000])") if len(messages) < 8 else FINISH.format("part")

    rlm = rlm_of(root, depth=2, preview_chars=100, output_chars=500)
    result = rlm.complete(text, "Which marks?")
    assert result.answer == "child" and result.turns == 4
    for messages in rlm.model.seen:
        assert messages[1]["content"].count("<mark") == 1
        assert len(messages[1]["content"]) < 100 + 50
        for message in messages[3::2]:
            # the note of what is not shown comes with it
            assert len(message["content"]) <= 500 + 60 and message["content"].count("<mark") <= 3
    assert {len(messages) for messages in rlm.model.seen} == {2, 4, 6, 8}


def test_a_failed_cell_is_shown_and_the_rest_of_the_reply_is_not_run():
    replies = [f"{repl('x = 1')}\n{repl('print(y)')}\n{repl('x = 2')}\nFINAL(wrong)", FINISH.format("x")]
    result = rlm_of(replies).complete("", "?")
    assert result.answer == "1"
    assert (
        result.messages[3]["content"].startswith("Traceback")
        and "name 'y' is not defined" in result.messages[3]["content"]
    )


@pytest.mark.parametrize(
    ("replies", "answer"),
    [
        (["FINAL(f(1))"], "f(1)"),
        ([repl("x = [1, 2]") + "\nFINAL_VAR(x)"], "[1, 2]"),
        (["I would look first.", "FINAL(2)"], "2"),
        (["FINAL_VAR(nothing)", "FINAL(3)"], "3"),
        ([repl("answer['content'] = 1.5"), repl("answer['ready'] = True")], "1.5"),
        ([repl("answer = 5"), "FINAL(4)"], "4"),
        ([repl("answer = {'content': None, 'ready': 1}")], "None"),
        (["```text\nFINAL(1)\n```", "FINAL(5)"], "5"),
        (["```repl\nanswer['content'] = 'cut'\nanswer['ready'] = True"], "cut"),
    ],
)
def test_finishes(replies, answer):
    result = rlm_of(replies).complete("context", "?")
    assert (result.answer, result.finished, result.turns) == (answer, True, len(replies))


def test_what_the_root_is_shown_when_it_does_not_finish():
    result = rlm_of(["Hm.", "FINAL_VAR(nothing)", repl("x = 1"), "FINAL(done)"]).complete("", "?")
    assert [message["content"] for message in result.messages[3::2]] == [
        "Nothing was run: write a ```repl block, or finish.",
        "FINAL_VAR: nothing is not defined",
        "(no output)",
    ]


@pytest.mark.parametrize("sandbox", ["cpython"])
def test_code_can_delete_its_answer(sandbox):
    assert rlm_of([repl("del answer"), "FINAL(1)"], sandbox=sandbox).complete("", "?").answer == "1"


def test_without_an_answer_there_is_none():
    result = rlm_of(lambda _: "Hm.", iterations=3).complete("", "?")
    assert (result.answer, result.finished, result.turns) == ("", False, 3)
    assert result.stopped == "iterations: 3 replies without an answer"


# ---- sub-calls ----


@pytest.mark.parametrize("sandbox", BOXES)
def test_mistakes_of_the_code_are_errors_it_can_read(sandbox):
    code = """
for wrong in [lambda: llm_query(5), lambda: llm_query(''), lambda: llm_query(), lambda: llm_query_batched('text'),
              lambda: llm_query('x' * 40_000), lambda: llm_query(question='x'), lambda: rlm_query_batched(['a'], [])]:
    try:
        wrong()
    except (TypeError, ValueError) as error:
        print(type(error).__name__)
"""
    rlm = rlm_of([repl(code), "FINAL(1)"], lambda _: "never", sandbox=sandbox)
    result = rlm.complete("", "?")
    expected = "TypeError\n" * 4 + "ValueError\n" + "TypeError\n" * 2
    assert (result.messages[3]["content"], result.usage["sub_calls"], rlm.sub_model.seen) == (expected, 0, [])


@pytest.mark.parametrize("sandbox", BOXES)
def test_a_wrong_context_of_a_child_is_an_error_of_the_code(sandbox):
    code = """
for wrong in [5, ['a', 5], {'a': 'b'}, 1.5]:
    try:
        rlm_query('Again', wrong)
    except TypeError as error:
        print(error)
try:
    rlm_query_batched(['Again', 'Again'], ['text', None])
except TypeError as error:
    print(error)
"""
    result = rlm_of([repl(code), "FINAL(1)"], lambda _: "never", sandbox=sandbox, depth=2).complete("", "?")
    stated = "the context of rlm_query is a string or a list of strings; of a batch, all have one or none has\n"
    assert (result.answer, result.messages[3]["content"]) == ("1", 5 * stated)


def test_a_text_that_does_not_fit_into_a_child_is_an_error_of_the_code():
    code = "try:\n    rlm_query('Again', 'x' * 10_000_000)\nexcept ValueError as error:\n    print(error)"
    result = rlm_of([repl(code), "FINAL(1)"], depth=2, memory_mb=16).complete("", "?")
    shown = result.messages[3]["content"]
    assert result.answer == "1" and shown.startswith("rlm_query did not finish: memory: the context does not fit into")


def test_a_repl_that_cannot_be_started_ends_the_run(monkeypatch):
    """It is no error of the code, which could go on without an answer."""

    class Broken(SANDBOXES["monty"]):
        def __init__(self, limits, tools):
            if made:
                raise UserError("the REPL cannot be started: no memory.")
            made.append(limits)
            super().__init__(limits)

    made = []
    monkeypatch.setitem(SANDBOXES, "monty", Broken)
    code = repl("try:\n    rlm_query('Again', 'text')\nexcept Exception:\n    pass")
    with pytest.raises(UserError, match="the REPL cannot be started: no memory"):
        rlm_of([code, "FINAL(1)"], depth=2).complete("", "?")


@pytest.mark.parametrize("sandbox", BOXES)
def test_an_answer_that_cannot_be_read_is_shown_to_the_root(sandbox):
    replies = [
        repl("answer['content'] = 10 ** 5000\nanswer['ready'] = True"),
        repl("answer['ready'] = False\nx = 10 ** 5000") + "\nFINAL_VAR(x)",
        "FINAL(1)",
    ]
    result = rlm_of(replies, sandbox=sandbox).complete("", "?")
    assert result.answer == "1"
    for place, name in ((3, "answer: "), (5, "FINAL_VAR: ")):
        shown = result.messages[place]["content"]
        assert name in shown and ("integer string conversion" in shown or "cannot be read" in shown)


def test_many_runs_share_their_batches():
    class Counting(ScriptedModel):
        def generate(self, batch, max_tokens):
            sizes.append(len(batch))
            return super().generate(batch, max_tokens)

    sizes = []
    model = Counting(lambda messages: FINISH.format("context") if len(messages) > 3 else repl("print(1)"))
    results = RLM(model).complete_many([(f"text {number}", "?") for number in range(5)])
    assert [result.answer for result in results] == [f"text {number}" for number in range(5)]
    assert sizes == [5, 5]


def test_children_are_answered_together_but_few_at_once():
    def root(messages):
        if "20 strings" in messages[0]["content"]:
            return repl("answer = {'content': rlm_query_batched(['?'] * 20, context), 'ready': True}")
        sizes.append(messages[0]["content"])
        return FINISH.format("context[-2:]")

    sizes, batches = [], []

    class Counting(ScriptedModel):
        def generate(self, batch, max_tokens):
            batches.append(len(batch))
            return super().generate(batch, max_tokens)

    result = RLM(Counting(root), limits=Limits(depth=2)).complete([f"text {number:02d}" for number in range(20)], "?")
    assert result.answer == str([f"{number:02d}" for number in range(20)])
    assert batches == [1, CHILDREN, CHILDREN, 20 - 2 * CHILDREN] and len(sizes) == 20


def test_a_stopped_cell_leaves_no_trace():
    """Variables from before it are there, and those that it set are not."""
    replies = [
        repl("x = llm_query('a')"),
        repl("x = 'gone'\ny = 1\nwhile True: pass"),
        repl("print(x)\nprint(y)"),
        "FINAL(1)",
    ]
    for sandbox in BOXES:
        result = rlm_of(replies, lambda _: "kept", sandbox=sandbox, cell_seconds=0.3).complete("", "?")
        stopped, after = (result.messages[place]["content"] for place in (5, 7))
        assert stopped == "The cell was stopped (it ran longer than 0.3 s) and its variables were put back."
        assert after.startswith("kept\n") and "name 'y' is not defined" in after
        # the first cell's sub-call is not made again
        assert result.usage["sub_calls"] == 1


@pytest.mark.parametrize("sandbox", BOXES)
def test_the_helpers_of_articles(sandbox):
    if reason := lacking(sandbox):
        pytest.skip(reason)
    code = """
print_intermediate(get_context_length())
print(peek(2, 3), search('d.f'), call_llm('more'))
set_answer(7)
"""
    model = ScriptedModel(lambda messages: repl(code) if messages[0]["role"] == "system" else "yes")
    result = RLM(model, sandbox=sandbox, helpers=True).complete("abcdefgh", "?")
    assert (result.answer, result.turns) == ("7", 1)
    code = code.replace("set_answer", "print")
    result = RLM(model, sandbox=sandbox, helpers=True, limits=Limits(iterations=1)).complete("abcdefgh", "?")
    assert result.messages[3]["content"] == "8\ncde ['abcdefgh'] yes\n7\n"


# ---- sizes ----


def needle(chars):
    filler = "nothing to see in this line of the document\n"
    text = filler * (chars // len(filler))
    place = len(text) * 2 // 3
    return f"{text[:place]}The magic number is 4711.\n{text[place:]}"


def find_it(size):
    text = needle(size)
    rlm = rlm_of(
        [
            repl("place = context.find('magic number')\nprint(context[place:place + 24])"),
            FINISH.format("context[place + 16:place + 20]"),
        ],
        memory_mb=2048,
    )
    began, children = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = rlm.complete(text, "What is the magic number?")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = time.process_time() - began + ended.ru_utime + ended.ru_stime - children.ru_utime - children.ru_stime
    assert result.answer == "4711"
    first = sum(len(message["content"]) for message in rlm.model.seen[0])
    return first, spent


def test_ten_megabytes_in_a_cpu_second():
    first, spent = find_it(10_000_000)
    assert first < 1000 and spent < 1.0, (first, spent)


@pytest.mark.slow
def test_fifty_megabytes():
    first, _ = find_it(50_000_000)
    assert first < 1000


# ---- refusals ----


def test_refusals():
    with pytest.raises(UserError, match=r"unknown sandbox 'docker'. Sandboxes: monty, monty\+bubblewrap, cpython"):
        RLM(ScriptedModel([]), sandbox="docker")
    for context in (5, b"bytes", [1], None):
        with pytest.raises(UserError, match="the context must be text, a list of texts or a Path"):
            RLM(ScriptedModel([])).complete(context, "?")


def test_a_context_that_is_too_large_is_refused():
    for sandbox in BOXES:
        with pytest.raises(UserError, match="does not fit into"):
            rlm_of([], sandbox=sandbox, memory_mb=8).complete("x" * 30_000_000, "?")


def test_a_file_as_context(tmp_path):
    path = tmp_path / "context.txt"
    path.write_text("naïve", encoding="utf-8")
    assert rlm_of([FINISH.format("context")]).complete(path, "?").answer == "naïve"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        rlm_of([]).complete(path, "?")
    with pytest.raises(UserError, match="No such file"):
        rlm_of([]).complete(tmp_path / "missing", "?")


def test_importing_the_package_loads_neither_torch_nor_a_sandbox():
    code = "import sys, eaftdrope.rlm.engine; print(sorted({'torch', 'transformers', 'pydantic_monty'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
