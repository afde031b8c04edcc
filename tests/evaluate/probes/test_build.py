"""From a recipe's names and options to probes; the shipped files; wrong files."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from eaftdrope.data import Example
from eaftdrope.errors import DataError, UserError
from eaftdrope.evaluate import build_probes
from eaftdrope.evaluate.probes.build import PROBES
from eaftdrope.evaluate.probes.multiple_choice import Question
from eaftdrope.evaluate.texts import evenly_spaced
from tests.evaluate.probe_options import probe_options

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ASKED = {"role": "user", "content": "Is it so?"}
HELD_OUT = [
    Example(messages=[ASKED, {"role": "assistant", "content": "Yes, 1."}]),
    Example(messages=[ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
]


def build(name, group="general", **options):
    (probe,) = build_probes([(name, group, probe_options(name, **options))])
    return probe


def test_shipped_questions():
    questions = build("multiple_choice", limit=None).questions
    assert len(questions) == 120
    assert Counter(q.answer for q in questions) == {0: 30, 1: 30, 2: 30, 3: 30}
    assert all(len(set(q.choices)) == 4 for q in questions)
    assert len({q.question for q in questions}) == 120
    assert build("multiple_choice").questions == questions
    sample = build("multiple_choice", limit=60).questions
    assert sample == questions[::2]
    assert Counter(q.answer for q in sample).keys() == {0, 1, 2, 3}


def test_shipped_text():
    (text,) = build("perplexity").texts
    assert 40_000 < len(text.encode()) < 60_000
    assert text.startswith("CHAPTER I: DISCUSSION AND BED\n\nUp at the League, says a friend,")
    assert "gutenberg" not in text.lower()


def test_options_reach_their_probes(tmp_path):
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("Plain text.")
    rows.write_text('{"text": "First."}\n\n{"text": "Second."}\n')
    probe = build("perplexity", files=[str(text), str(rows)], max_tokens=77)
    assert (probe.texts, probe.max_tokens, probe.group) == (["Plain text.", "First.", "Second."], 77, "general")
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "A?", "choices": ["x", "y"], "answer": 1}\n')
    assert build("multiple_choice", file=str(questions), limit=9).questions == [Question("A?", ("x", "y"), 1)]
    dataset = [{"input_ids": [i, i], "labels": [-100, i]} for i in range(10)]
    (probe,) = build_probes(
        [("held_out_loss", "target", probe_options("held_out_loss", limit=4))], held_out_dataset=dataset
    )
    assert [row.input_ids for row in probe.rows] == [[0, 0], [2, 2], [5, 5], [7, 7]]
    assert (probe.rows[1].labels, probe.group, probe.name) == ([-100, 2], "target", "held_out_loss")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", ":2: not JSON: "),
        ("[1]", ":2: expected a JSON object."),
        ('{"question": "A?", "choices": ["x"], "answer": 0}', ":2: not a question. Expected `question`"),
        ('{"question": "A?", "choices": ["x", "y"], "answer": 2}', ":2: not a question. "),
        ('{"question": "A?", "choices": ["x", "y"], "answer": "B"}', ":2: not a question. "),
        ('{"question": "A?", "choices": ["x", ""], "answer": 0}', ":2: not a question. "),
    ],
)
def test_a_wrong_question_is_named_with_its_line(tmp_path, line, message):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "A?", "choices": ["x", "y"], "answer": 1}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        build("multiple_choice", file=str(file))
    assert str(caught.value).startswith(f"{file}{message}")


def test_empty_and_wrong_text_files(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"t\.jsonl:1: no `text`\."):
        build("perplexity", files=[str(file)])
    file.write_text("")
    with pytest.raises(DataError, match=r"t\.jsonl: no questions\."):
        build("multiple_choice", file=str(file))


def test_probes_of_the_target_need_held_out_data():
    with pytest.raises(
        UserError, match=r"held_out_loss needs held-out rows, and none were found\. Set `data\.held_out`"
    ):
        build("held_out_loss", "target")
    talk = Example(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    for examples in (None, [], [talk], [Example(text="x")]):
        with pytest.raises(UserError, match=r"function_calls needs held-out rows whose last answer calls a function"):
            build_probes([("function_calls", "target", probe_options("function_calls"))], held_out_examples=examples)
    with pytest.raises(UserError, match=r"unknown probe 'bleu'\. Probes: held_out_loss, function_calls, "):
        build_probes([("bleu", "general", {})])


@pytest.mark.parametrize("name", PROBES)
def test_every_option_of_the_recipe_is_required(name, tmp_path):
    """The recipe's schema alone has the defaults."""
    held_out = {"held_out_examples": HELD_OUT, "held_out_dataset": [{"input_ids": [1, 2], "labels": [-100, 2]}]}
    offers = tmp_path / "offers.jsonl"
    offers.write_text(json.dumps({"messages": [ASKED], "tools": [{"type": "function", "function": {"name": "add"}}]}))
    # what has no default that works by itself: a trained length, and rows of a package
    chosen = {"long_recall": {"length": 512}, "long_loss": {"length": 64}, "call_refusal": {"file": str(offers)}}
    options = probe_options(name, **chosen.get(name, {}))
    (probe,) = build_probes([(name, "target", options)], **held_out)
    assert (probe.name, probe.group) == (name, "target")
    for option in options:
        rest = {other: value for other, value in options.items() if other != option}
        with pytest.raises(KeyError, match=option):
            build_probes([(name, "target", rest)], **held_out)


def test_evenly_spaced():
    assert evenly_spaced(range(10), 3) == [0, 3, 6]
    assert evenly_spaced(range(3), 10) == [0, 1, 2]
    assert evenly_spaced("abc", None) == ["a", "b", "c"]


def test_scores_and_tables_need_no_torch():
    code = (
        "import sys, json; from eaftdrope.evaluate import comparison_markdown, scores_from_json; "
        "print(json.dumps([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []
