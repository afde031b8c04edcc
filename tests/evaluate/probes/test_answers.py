"""What answers say (numbers, labels, exact text), the rows that probes of answers read, and their scores."""

import json
from fractions import Fraction

import pytest

from eaftdrope.data import Example
from eaftdrope.errors import DataError, UserError
from eaftdrope.evaluate import build_probes, run_probes
from eaftdrope.evaluate.probes.answers import final_number, first_label, normalised, prompt_ids, question
from tests.evaluate.probe_options import probe_options

NUMBERS = {
    # after ####
    "Janet sells 16 - 3 = <<16-3=13>>13.\n#### 18": 18,
    "#### 72 clips in 2 months": 72,
    "#### -1,000.50": Fraction(-2001, 2),
    "####18": 18,
    "#### 1\n#### 2": 2,
    "#### none": None,
    # boxed
    r"so \boxed{42} of 50": 42,
    r"\boxed{\frac{3}{4}}": Fraction(3, 4),
    # the last number
    "The answer is 5.": 5,
    "First 3, then 4 apples": 4,
    "It costs $3.50.": Fraction(7, 2),
    "1,234 apples": 1234,
    "$1,234,567.89": Fraction(123456789, 100),
    "1,2": 2,
    "10,20": 20,
    "18 %": 18,
    "12.5%.": Fraction(25, 2),
    "about €7": 7,
    ".5": Fraction(1, 2),
    "5.": 5,
    # signs
    "-5": -5,
    "\u22127 degrees": -7,
    "-$3": -3,
    "$-3": -3,
    "8-5": 5,
    "8 - 5 = 3": 3,
    "x-5": 5,
    # fractions
    "3/4": Fraction(3, 4),
    "a share of 10 / 4": Fraction(5, 2),
    "1 1/2 cups": Fraction(3, 2),
    "-1/2": Fraction(-1, 2),
    r"\dfrac{7}{2}": Fraction(7, 2),
    "1/0": None,
    # thinking
    "<think>7 or 8?</think> It is 9": 9,
    "or 7</think>9": 9,
    "<think>7 or 8": None,
    # nothing
    "": None,
    "no idea": None,
    "9" * 5000: None,
}


@pytest.mark.parametrize("answer", NUMBERS, ids=lambda answer: answer[:30])
def test_final_number(answer):
    assert final_number(answer) == NUMBERS[answer]


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The total is $1,200.", "#### 1200", True),
        ("18.00", "18", True),
        ("50%", "50", True),
        ("0.75", "3/4", True),
        ("17", "18", False),
        ("0.333", "1/3", False),
        ("18 of the 20", "18", False),
    ],
)
def test_same_number(answer, reference, same):
    assert (final_number(answer) == final_number(reference)) is same


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Eiffel Tower.", "eiffel tower"),
        ("an A-frame", "aframe"),
        (" theatre ", "theatre"),
        ("<think>x</think>\nParis!", "paris"),
        ("?!", ""),
    ],
)
def test_normalised(answer, expected):
    assert normalised(answer) == expected


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Yes.", "yes"),
        ("**No**, because yes would", "no"),
        ("The answer is maybe, not yes", "maybe"),
        ("Nobody knows; yesterday", None),
        ("<think>no</think>YES", "yes"),
        ("", None),
    ],
)
def test_first_label(answer, label):
    assert first_label(answer) == label


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_rows_of_every_form_are_read(tmp_path):
    file = write(
        tmp_path / "rows.jsonl",
        {"question": "A?", "answer": "1"},
        {"prompt": "B?", "answer": 2},
        chat("C?", "so\n#### 3"),
        {**chat("D?", "words"), "answer": "4"},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "E?"}], "answer": "5"},
        {"prompt": "F is", "completion": " 6"},
    )
    (probe,) = build_probes([("numeric_answers", "general", probe_options("numeric_answers", file=file))])
    assert [final_number(task.reference) for task in probe.tasks] == [1, 2, 3, 4, 5, 6]
    asked = [task.example.prompt or task.example.prompt_messages[-1]["content"] for task in probe.tasks]
    assert asked == ["A?", "B?", "C?", "D?", "E?", "F is"]
    assert (probe.name, probe.group, probe.max_new_tokens) == ("numeric_answers", "general", 256)
    options = probe_options("exact_answers", file=file, limit=3, max_new_tokens=9)
    (probe,) = build_probes([("exact_answers", "general", options)])
    assert [task.reference for task in probe.tasks] == ["1", "so\n#### 3", "5"] and probe.max_new_tokens == 9


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "numeric_answers",
            {"question": "A?", "answer": "many"},
            ":1: the reference lacks a number, which numeric_answers",
        ),
        ("numeric_answers", {"question": "A?"}, ":1: the reference lacks a number"),
        ("numeric_answers", {"question": "A?", "answer": True}, ":1: the reference lacks a number"),
        ("exact_answers", {"question": "A?", "answer": "..."}, ":1: the reference lacks an answer"),
        ("yes_no_maybe", {"question": "A?", "answer": "perhaps"}, ":1: the reference lacks yes, no or maybe"),
        ("exact_answers", {"text": "a document"}, ":1: a text is not a prompt."),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, name, row, message):
    file = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError) as caught:
        build_probes([(name, "general", probe_options(name, file=file))])
    assert str(caught.value).startswith(f"{file}{message}")


def test_an_empty_file_is_refused(tmp_path):
    options = probe_options("exact_answers", file=write(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows\."):
        build_probes([("exact_answers", "general", options)])


HELD_OUT = [
    Example(origin="r1", **chat("A?", "It is 5.")),
    Example(origin="r2", **chat("B?", "Yes, it does 2 things.")),
    Example(origin="r3", **chat("C?", "There is no evidence.")),
    Example(origin="r4", text="a document of 1890"),
    Example(origin="r5", prompt="D is", completion=" 7"),
]


def test_held_out_rows_that_a_probe_can_read():
    def origins(name):
        (probe,) = build_probes([(name, "target", probe_options(name))], held_out_examples=HELD_OUT)
        return [task.example.origin for task in probe.tasks]

    assert origins("numeric_answers") == ["r1", "r2", "r5"]
    assert origins("yes_no_maybe") == ["r2"]
    assert origins("exact_answers") == ["r1", "r2", "r3", "r5"]
    with pytest.raises(
        UserError, match=r"yes_no_maybe needs held-out rows whose last answer has yes, no or maybe, and"
    ):
        build_probes([("yes_no_maybe", "target", probe_options("yes_no_maybe"))], held_out_examples=HELD_OUT[2:])


def test_answers_are_scored(tmp_path, answering, byte_tokenizer):
    model = answering({"A?": "It is 1,000.", "B?": "8 then", "C?": "I think Yes", "D?": "The Sun!"})
    numbers = write(tmp_path / "n.jsonl", {"question": "A?", "answer": "1000"}, {"question": "B?", "answer": "9"})
    labels = write(tmp_path / "l.jsonl", {"question": "C?", "answer": "yes"}, {"question": "D?", "answer": "no"})
    exact = write(tmp_path / "e.jsonl", {"question": "D?", "answer": "sun"}, {"question": "C?", "answer": "yes"})
    wanted = [("numeric_answers", numbers), ("yes_no_maybe", labels), ("exact_answers", exact)]
    probes = build_probes(
        [(name, "general", probe_options(name, file=file, max_new_tokens=20)) for name, file in wanted]
    )
    scores = run_probes(model, byte_tokenizer, probes)
    assert [score.metric for score in scores] == ["right numbers", "yes, no or maybe", "exact answers"]
    assert [[hit for hit, _ in score.units] for score in scores] == [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    assert {(score.kind, score.better, score.n) for score in scores} == {("share", "higher", 2)}


def test_a_model_without_a_chat_template_is_asked_in_plain_text(word_tokenizer):
    assert word_tokenizer.chat_template is None
    ids = prompt_ids(question("w4 w5"), word_tokenizer)
    plain = word_tokenizer("Question: w4 w5\nAnswer:", add_special_tokens=False).input_ids
    assert ids == plain and 4 in ids
    talk = Example(messages=[{"role": "system", "content": "S"}, *chat("A?", "b")["messages"]], origin="r1")
    with pytest.raises(DataError, match="no chat template"):
        prompt_ids(talk, word_tokenizer)
