"""Rows of published data sets, shaped as they are on the hub, all the way to what is trained."""

import json

import pytest

from eaftdrope.data import Source, build_dataset, detect_format, encode, iter_examples, normalise
from eaftdrope.errors import DataError
from tests.data import chat_templates as t

WEATHER = {"name": "get_weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}
XLAM_TOOL = {
    "name": "giveaways",
    "description": "Live giveaways.",
    "parameters": {
        "kind": {"description": "Which.", "type": "str", "default": "game"},
        "most": {"description": "How many.", "type": "int, optional"},
        "stores": {"description": "Where.", "type": "List[str]"},
        "rank": {"description": "Order.", "type": "Callable[[float], float]"},
    },
}
# name -> (row as published, format, messages)
ROWS = {
    "medical-o1": (
        {"Question": "Which drug?", "Complex_CoT": "Okay, let's see.", "Response": "Aspirin."},
        "reasoning",
        [
            {"role": "user", "content": "Which drug?"},
            {"role": "assistant", "content": "Aspirin.", "reasoning_content": "Okay, let's see."},
        ],
    ),
    "medical-r1": (
        {"question": "q", "reasoning (reasoning_content)": "r", "response (content)": "a"},
        "reasoning",
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}],
    ),
    "gsm8k": (
        {"question": "4 and 5?", "answer": "4 + 5 = <<4+5=9>>9\n#### 9"},
        "question_answer",
        [
            {"role": "user", "content": "4 and 5?"},
            {"role": "assistant", "content": "4 + 5 = <<4+5=9>>9\n#### 9"},
        ],
    ),
    "medquad": (
        {"qtype": "symptoms", "Question": "q", "Answer": "a"},
        "question_answer",
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    ),
    "pubmedqa": (
        {
            "pubid": 1,
            "question": "Does it help?",
            "context": {"contexts": ["One.", "Two."], "labels": ["BACKGROUND", "RESULTS"], "meshes": ["Humans"]},
            "long_answer": "It does.",
            "final_decision": "yes",
        },
        "pubmedqa",
        [
            {
                "role": "user",
                "content": "Context: One. Two.\n\nQuestion: Does it help?\nAnswer yes, no or maybe, then explain.",
            },
            {"role": "assistant", "content": "yes. It does."},
        ],
    ),
    "numina": (
        {
            "source": "cn_k12",
            "problem": "q",
            "solution": "a",
            "messages": [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}],
        },
        "messages",
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    ),
    "nemotron-agentic": (
        {
            "uuid": "1",
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "r",
                    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "tool_call_id": "c", "content": "7"},
                {"role": "assistant", "content": "a", "tool_calls": []},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
        "messages",
        [
            {"role": "system", "content": ""},
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                "reasoning_content": "r",
            },
            {"role": "tool", "content": "7", "tool_call_id": "c"},
            {"role": "assistant", "content": "a"},
        ],
    ),
    "xlam": (
        {
            "id": 0,
            "query": "Where?",
            "tools": json.dumps([XLAM_TOOL]),
            "answers": json.dumps([{"name": "giveaways", "arguments": {"kind": "beta"}}]),
        },
        "xlam",
        [
            {"role": "user", "content": "Where?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "giveaways", "arguments": {"kind": "beta"}}}],
            },
        ],
    ),
    "glaive": (
        {
            "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
            + json.dumps(WEATHER, indent=4)
            + "\n\n"
            + json.dumps({**WEATHER, "name": "other"})
            + "\n",
            "chat": "USER: Rain in Paris?\n\n\nASSISTANT: I look. <functioncall> "
            """{"name": "get_weather", "arguments": '{"city": "Paris", "note": "it\\'s {soon}"}'} <|endoftext|>"""
            '\n\n\nFUNCTION RESPONSE: {"rain": true}\n\n\nASSISTANT: It rains. <|endoftext|>\n\n\n',
        },
        "glaive",
        [
            {"role": "user", "content": "Rain in Paris?"},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": {"city": "Paris", "note": "it's {soon}"}},
                    }
                ],
            },
            {"role": "tool", "content": '{"rain": true}'},
            {"role": "assistant", "content": "It rains."},
        ],
    ),
    "glaive without functions": (
        {
            "system": "SYSTEM: You are a helpful assistant, with no access to external functions.",
            "chat": "USER: q\n\n\nASSISTANT: a <|endoftext|>",
        },
        "glaive",
        [
            {"role": "system", "content": "You are a helpful assistant, with no access to external functions."},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of(name, make_tokenizer, trained):
    row, format, messages = ROWS[name]
    assert detect_format(row) == format
    for given in ("auto", format):
        assert normalise(row, given).messages == messages
    # all the way, through a template that knows tools and one that does not
    for template in (t.QWEN, t.CHATML):
        tokenizer = make_tokenizer(template)
        answers = trained(tokenizer, encode(normalise(row), tokenizer, max_length=None))
        assert len(answers) == sum(message["role"] == "assistant" for message in messages)
        assert answers[-1].endswith("<|im_end|>")


def test_tools_come_with_a_json_schema():
    (tool,) = normalise(ROWS["xlam"][0]).tools
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "kind": {"type": "string", "description": "Which.", "default": "game"},
            "most": {"type": "integer", "description": "How many."},
            "stores": {"type": "array", "description": "Where."},
            "rank": {"description": "Order."},
        },
        "required": ["stores", "rank"],
    }
    assert [tool["function"]["name"] for tool in normalise(ROWS["glaive"][0]).tools] == ["get_weather", "other"]
    assert normalise(ROWS["glaive"][0]).tools[0]["function"] == WEATHER
    assert normalise(ROWS["glaive without functions"][0]).tools is None
    schema = {**ROWS["xlam"][0], "tools": [WEATHER]}
    assert normalise(schema).tools[0]["function"] == WEATHER


def test_reasoning_may_be_left_out():
    o1 = normalise(ROWS["medical-o1"][0], reasoning=False).messages
    assert o1[1] == {"role": "assistant", "content": "Aspirin."}
    agentic = normalise(ROWS["nemotron-agentic"][0], reasoning=False).messages
    assert "reasoning_content" not in agentic[2] and agentic[2]["tool_calls"]
    inline = {"messages": [{"role": "user", "content": "<think>?"}]}
    inline["messages"].append({"role": "assistant", "content": "<think>\nlong\n</think>\n\nshort"})
    assert [message["content"] for message in normalise(inline, reasoning=False).messages] == ["<think>?", "short"]
    assert normalise(inline).messages[1]["content"].startswith("<think>")
    inline["messages"][1]["content"] = "<think>only</think>"
    with pytest.raises(DataError, match=r"messages\[1\]\.content is empty"):
        normalise(inline, reasoning=False)


def test_each_source_says_what_becomes_of_its_reasoning(make_tokenizer, write_jsonl, trained):
    tokenizer = make_tokenizer(t.CHATML)
    path = write_jsonl([ROWS["medical-o1"][0]])
    rows, _ = build_dataset([Source(path), Source(path, reasoning=False)], tokenizer)
    kept, left_out = (trained(tokenizer, row) for row in rows)
    assert kept == ["<think>\nOkay, let's see.\n</think>\n\nAspirin.<|im_end|>"]
    assert left_out == ["Aspirin.<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({"question": "q", "answer": 1, "choices": ["a"]}, "auto", "answer must be a string; it is a int"),
        (
            {"question": "q", "answer": None},
            "question_answer",
            "format question_answer needs the field answer; the row",
        ),
        (
            {"Question": "q", "Response": "a"},
            "reasoning",
            "format reasoning needs the field reasoning; the row has Question",
        ),
        ({**ROWS["pubmedqa"][0], "context": {"labels": []}}, "auto", "an object with such a list as contexts"),
        ({**ROWS["xlam"][0], "answers": "[{'name'"}, "auto", "answers is a string but not valid JSON: Expecting"),
        ({**ROWS["xlam"][0], "answers": "{}"}, "auto", "answers must be a list of objects, or a JSON string of one"),
        ({**ROWS["glaive"][0], "chat": "hello"}, "auto", "chat has no USER: and ASSISTANT: turns"),
        (
            {"system": "SYSTEM: -", "chat": "USER: q\n\n\nASSISTANT: <functioncall> f(x) <|endoftext|>"},
            "auto",
            "chat, turn 1: the <functioncall> is not valid JSON: Expecting value",
        ),
        ({"system": 'SYSTEM: - {"name": ', "chat": "USER: q"}, "auto", "system has a function that is not valid JSON"),
    ],
)
def test_bad_rows_name_the_reason(row, format, reason):
    with pytest.raises(DataError) as caught:
        normalise(row, format)
    assert reason in str(caught.value)


def test_bad_rows_that_nobody_asks_for_stop_nobody(write_jsonl):
    """MedQuAD has questions without an answer: skipped in training, they must not stop the probe on the held-out rows."""
    path = write_jsonl([{"question": "q", "answer": None}, ROWS["gsm8k"][0]])
    with pytest.raises(DataError, match="no known format"):
        list(iter_examples(Source(path)))
    (example,) = iter_examples(Source(path), only={f"{path}:2"})
    assert example.answer["content"].endswith("#### 9")
