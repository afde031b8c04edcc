"""What --suite and --data mean, and the parts of the suites on files of each shape."""

import json

import pytest

from eaftdrope.errors import UserError
from eaftdrope.evaluate.probes.multiple_choice import MultipleChoiceProbe, Question
from eaftdrope.evaluate.suites.catalogue import SUITES, Part, build_part, find_data, parse_suites
from tests.evaluate.probe_options import probe_options


def names(text):
    wanted = parse_suites(text)
    return {suite: [part.name for part in parts] for suite, parts in wanted.parts.items()}, wanted.tasks


def part(name) -> tuple[str, Part]:
    return next((suite, part) for suite, parts in SUITES.items() for part in parts if part.name == name)


def build(name, file=None, limit=None):
    return build_part(*part(name), file, limit)


def rows(file, *values):
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return file


@pytest.mark.parametrize(
    ("text", "parts", "tasks"),
    [
        ("general", {"general": ["perplexity", "multiple_choice", "instructions", "agreement"]}, []),
        ("medical, math", {"medical": ["pubmedqa", "medqa"], "math": ["gsm8k"]}, []),
        ("medical:pubmedqa", {"medical": ["pubmedqa"]}, []),
        ("behaviour:verbosity,recall", {"behaviour": ["verbosity"], "recall": ["long_recall"]}, []),
        ("general:agreement,general:perplexity", {"general": ["agreement", "perplexity"]}, []),
        ("medical:medqa,medical", {"medical": ["medqa", "pubmedqa"]}, []),
        # what stands behind lm-eval: is lm-eval's, also a name that a part of ours has
        ("lm-eval:mmlu,gsm8k,pubmedqa", {}, ["mmlu", "gsm8k", "pubmedqa"]),
        ("lm-eval:mmlu,ifeval,math,lm-eval:math,tool_use", {"math": ["gsm8k"], "tool_use": ["calls"]}, None),
        ("general:perplexity,lm-eval:a,lm-eval:b,b", {"general": ["perplexity"]}, ["a", "b"]),
    ],
)
def test_names(text, parts, tasks):
    assert names(text) == (parts, ["mmlu", "ifeval", "math"] if tasks is None else tasks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "genral",
            r"--suite genral: no such suite\. Did you mean general\? Suites: general, medical, math, tool_use, "
            r"behaviour, recall; ",
        ),
        ("mmlu", r"--suite mmlu: no such suite\..* tasks of lm-eval as lm-eval:TASK\."),
        ("gsm8k", r"--suite gsm8k: no such suite\."),
        ("medical:pubmed", r"medical has no such part\. Did you mean pubmedqa\? Its parts: pubmedqa, medqa\."),
        ("lm-eval", r"no task after lm-eval:\. Add some, such as lm-eval:mmlu,ifeval\."),
        ("lm-eval:mmlu,lm-eval:", r"no task after lm-eval:\."),
        (" , ", r"--suite is empty\. Suites: "),
    ],
)
def test_wrong_names(text, message):
    with pytest.raises(UserError, match=message):
        parse_suites(text)


def test_files_for_parts(tmp_path):
    for name in ("math_gsm8k_test.jsonl", "math_gsm8k_train.jsonl", "pubmedqa.parquet", "notes.txt", "mymedqa.jsonl"):
        (tmp_path / name).write_text("")
    wanted = parse_suites("general,medical,math")

    def found(*given):
        return {name: file.name for name, file in find_data(given, wanted).items()}

    # the split to test on wins; medqa is in no file's name as a word
    assert found(str(tmp_path)) == {"pubmedqa": "pubmedqa.parquet", "gsm8k": "math_gsm8k_test.jsonl"}
    mine = f"medqa={tmp_path / 'mymedqa.jsonl'}"
    assert found(mine, str(tmp_path))["medqa"] == "mymedqa.jsonl"
    # what is named wins over what a folder has
    train = str(tmp_path / "math_gsm8k_train.jsonl")
    assert found(train, str(tmp_path))["gsm8k"] == "math_gsm8k_train.jsonl"
    assert found(f"gsm8k={train}") == {"gsm8k": "math_gsm8k_train.jsonl"}
    assert found(f"perplexity={tmp_path / 'notes.txt'}") == {"perplexity": "notes.txt"}

    (tmp_path / "pubmedqa_more.jsonl").write_text("")
    for given, message in {
        str(
            tmp_path
        ): r"several files are named pubmedqa: pubmedqa\.parquet, pubmedqa_more\.jsonl\. Choose one: --data pub",
        str(tmp_path / "notes.txt"): r"for which part of a suite\? Write PART=FILE, with one of perplexity, ",
        f"gsm8k={tmp_path / 'gone'}": r"--data gsm8k=.*gone: no such file\.",
        str(tmp_path / "gone"): r"gone: no such file\.",
        f"calls={train}": r"--data: calls is not part of --suite\. Add tool_use:calls, or leave the file out\.",
    }.items():
        with pytest.raises(UserError, match=message):
            find_data([given], wanted)


def test_shipped_parts_and_limits(tmp_path):
    assert len(build("multiple_choice").questions) == 120 and len(build("multiple_choice", limit=5).questions) == 5
    assert len(build("instructions", limit=3).instructions) == 3
    perplexity = build("perplexity", limit=3)
    # its size is in tokens
    assert (perplexity.max_tokens, len(perplexity.texts)) == (8192, 1)
    assert build("agreement", limit=7).name == "agreement"
    text = tmp_path / "a.txt"
    text.write_text("Mine.")
    assert build("perplexity", text).texts == ["Mine."]
    mine = rows(tmp_path / "q.jsonl", {"question": "A?", "choices": ["x", "y"], "answer": 1})
    assert build("multiple_choice", mine).questions == [Question("A?", ("x", "y"), 1)]


def test_math_as_published_and_as_chat(tmp_path):
    published = {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
    chat = {"messages": [{"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "It is 6."}]}
    probe = build("gsm8k", rows(tmp_path / "g.jsonl", published, chat))
    assert (probe.name, probe.group, probe.max_new_tokens) == ("numeric_answers", "target", 256)
    assert [task.example.messages[0]["content"] for task in probe.tasks] == ["2 + 2?", "3 + 3?"]
    assert probe.tasks[0].reference.endswith("#### 4")
    assert len(build("gsm8k", tmp_path / "g.jsonl", limit=1).tasks) == 1


def test_pubmedqa_as_published_and_as_chat(tmp_path):
    published = {
        "pubid": 1,
        "question": "Does it help?",
        "context": {"contexts": ["It was tried.", "It helped."], "labels": ["A", "B"]},
        "long_answer": "It does.",
        "final_decision": "yes",
    }
    chat = {
        "messages": [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Maybe. Who knows."}]
    }
    probe = build("pubmedqa", rows(tmp_path / "p.jsonl", published, chat))
    first, second = probe.tasks
    assert "It was tried. It helped." in first.example.messages[0]["content"]
    assert first.reference.startswith("yes") and second.reference.startswith("Maybe")
    assert probe.name == "yes_no_maybe"


def test_questions_as_published(tmp_path):
    letters = {"question": "A?", "options": {"A": "x", "B": "y"}, "answer": "y", "answer_idx": "B"}
    arc = {"question": "B?", "choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answer": "2"}
    plain = {"question": "C?", "choices": ["x", "y", "z"], "answer": 0}
    probe = build("medqa", rows(tmp_path / "m.jsonl", letters, arc, plain))
    assert isinstance(probe, MultipleChoiceProbe) and probe.group == "target"
    assert [(q.question, len(q.choices), q.answer) for q in probe.questions] == [
        ("A?", 2, 1),
        ("B?", 2, 1),
        ("C?", 3, 0),
    ]
    rows(tmp_path / "m.jsonl", plain, {**plain, "answer": 3})
    with pytest.raises(
        UserError, match=r"medical:medqa cannot be measured: .*m\.jsonl:2: not a question with choices"
    ) as caught:
        build("medqa", tmp_path / "m.jsonl")
    assert "--data medqa=FILE (rows with question, choices (or options)" in str(caught.value)
    assert str(caught.value).endswith("or pass only --suite medical:pubmedqa.")


def test_calls(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = {
        "messages": [{"role": "user", "content": "Add 1."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    }
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    probe = build("calls", rows(tmp_path / "c.jsonl", {**row, "tools": tools}))
    assert (probe.name, len(probe.tasks)) == ("function_calls", 1)
    with pytest.raises(UserError, match=r"tool_use:calls cannot be measured: .*function_calls needs held-out rows"):
        build("calls", rows(tmp_path / "c.jsonl", {"question": "a", "answer": "b"}))


def test_data_that_cannot_be_had():
    # the tests have no network
    with pytest.raises(
        UserError, match=r"math:gsm8k cannot be measured: openai/gsm8k\[main:test\]: the dataset cannot"
    ) as e:
        build("gsm8k")
    assert str(e.value).endswith(
        "--data gsm8k=FILE (rows with messages, or with question and answer that ends with a number)."
    )


def test_the_suite_of_behaviour(tmp_path):
    """Every part has a hundred items or more, and the options of a recipe's probe."""
    sizes = {
        "format_keeping": len(build("format_keeping").tasks),
        "verbosity": len(build("verbosity").prompts),
        "language_drift": len(build("language_drift").prompts),
        "turn_consistency": len(build("turn_consistency").pairs),
        "long_recall": build("long_recall").trials,
    }
    assert min(sizes.values()) >= 100, sizes
    assert len(build("turn_consistency", limit=7).pairs) == 7
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    mine = rows(tmp_path / "mine.jsonl", {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]})
    assert len(build("call_refusal", mine).offers) == 1
    for suite in ("behaviour", "recall"):
        for found in SUITES[suite]:
            assert found.options.keys() == probe_options(found.probe).keys()
