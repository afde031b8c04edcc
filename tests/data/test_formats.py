"""Rows as they are written, and the examples they become."""

import json

import pytest

from eaftdrope.data import detect_format, normalise
from eaftdrope.errors import DataError

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def call(arguments, **extra):
    return {**extra, "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("row", "format", "messages"),
    [
        ({"messages": [ASK, SAY]}, "messages", [ASK, SAY]),
        ({"messages": json.dumps([ASK, SAY])}, "messages", [ASK, SAY]),
        ({"conversations": [ASK, SAY]}, "messages", [ASK, SAY]),
        ({"messages": [ASK, SAY], "text": None, "tools": None}, "messages", [ASK, SAY]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "sharegpt",
            [{"role": "system", "content": "s"}, ASK, SAY],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "7"},
                    {"from": "gpt", "value": "a", "weight": 0},
                ]
            },
            "sharegpt",
            [
                {"role": "system", "content": "s"},
                ASK,
                {"role": "assistant", "content": "", "tool_calls": [call({"x": 1})]},
                {"role": "tool", "content": "7"},
                {**SAY, "weight": 0},
            ],
        ),
        ({"instruction": "q", "output": "a"}, "alpaca", [ASK, SAY]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [ASK, SAY]),
        ({"instruction": "q", "input": "more", "output": "a"}, "alpaca", [{**ASK, "content": "q\nmore"}, SAY]),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["q", "a"]]},
            "alpaca",
            [{"role": "system", "content": "s"}, ASK, SAY, ASK, SAY],
        ),
        (
            {"prompt": [ASK, SAY, ASK], "completion": [SAY]},
            "prompt_completion",
            [{**ASK, "weight": 0}, {**SAY, "weight": 0}, {**ASK, "weight": 0}, SAY],
        ),
        # `arguments` as a JSON string, an object, null or empty; null content; text parts; a structured tool result.
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "2"}]},
                    {
                        "role": "assistant",
                        "content": None,
                        "refusal": None,
                        "tool_calls": [call('{"x": [1, "y"]}', id="c1"), call({"x": None}), call(None), call("")],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": {"é": 7}},
                    {"role": "assistant", "content": "a", "tool_calls": []},
                ]
            },
            "messages",
            [
                {"role": "user", "content": "q2"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [call({"x": [1, "y"]}, id="c1"), call({"x": None}), call({}), call({})],
                },
                {"role": "tool", "tool_call_id": "c1", "content": '{"é": 7}'},
                SAY,
            ],
        ),
    ],
)
def test_conversations(row, format, messages):
    assert detect_format(row) == format
    for given in ("auto", format):
        assert normalise(row, given).messages == messages


def test_strings():
    example = normalise({"prompt": "p ", "completion": "c"})
    assert (example.prompt, example.completion, example.messages) == ("p ", "c", None)
    assert normalise({"text": "t", "title": "x"}).text == "t"


@pytest.mark.parametrize(
    "tools",
    [[TOOL], json.dumps([TOOL]), [TOOL["function"]], json.dumps([TOOL["function"]]), [json.dumps(TOOL)]],
    ids=["list", "string", "bare list", "bare string", "list of strings"],
)
def test_tools(tools):
    assert normalise({"messages": [ASK, SAY], "tools": tools}).tools == [TOOL]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert normalise({"conversations": turns, "tools": tools}).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(tools):
    assert normalise({"messages": [ASK, SAY], "tools": tools}).tools is None


def test_what_a_probe_asks_and_expects():
    truth = [{"f": {"x": [1, 2]}}]
    row = {"messages": [ASK, SAY, ASK, {"role": "assistant", "tool_calls": [call({"x": 1})]}], "ground_truth": truth}
    example = normalise(row, origin="here:1")
    assert example.prompt_messages == [ASK, SAY, ASK]
    assert example.answer["tool_calls"] == [call({"x": 1})]
    assert example.expected_calls == [{"name": "f", "arguments": {"x": 1}}]
    assert example.ground_truth == normalise({**row, "ground_truth": json.dumps(truth)}).ground_truth == truth
    assert example.origin == "here:1"
    # The same name is used for other things elsewhere; it must not make a row bad.
    assert normalise({**row, "ground_truth": "72"}).ground_truth is None
    with pytest.raises(DataError, match="no assistant turn"):
        _ = normalise({"messages": [ASK]}).answer


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        (
            {"problem": "q", "solution": "a"},
            "auto",
            "no known format has the fields problem, solution. Known formats: messages",
        ),
        ({}, "auto", "no known format has the fields (none)."),
        ({"text": "t"}, "messages", "format messages needs the field messages; the row has text."),
        (
            {"prompt": "p"},
            "prompt_completion",
            "format prompt_completion needs the field completion; the row has prompt.",
        ),
        ({"text": "t"}, "alpaca", "format alpaca needs the fields instruction and output; the row has text."),
        ({"text": "t"}, "txt", "format 'txt' is not one of auto, messages,"),
        ({"text": 3}, "auto", "text must be a string; it is a int"),
        ({"text": " \n"}, "auto", "text is empty: there is nothing to train"),
        ({"prompt": "p", "completion": ""}, "auto", "completion is empty: there is nothing to train"),
        ({"prompt": "p", "completion": [SAY]}, "auto", "they are str and list"),
        ({"messages": []}, "auto", "messages must be a list of messages that is not empty"),
        ({"messages": "[{"}, "auto", "messages is a string but not valid JSON: Expecting property name"),
        ({"messages": ["hi"]}, "auto", "messages[0] must be an object with the fields role and content"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "auto", "messages[0].role is 'bot'; known are system,"),
        (
            {"messages": [ASK, {"role": "assistant", "content": None}]},
            "auto",
            "messages[1].content is null and there are no",
        ),
        (
            {"messages": [ASK, {"role": "assistant", "content": ""}]},
            "auto",
            "messages[1].content is empty and there are no",
        ),
        ({"messages": [{"role": "user"}, SAY]}, "auto", "messages[0].content is null: the user message says nothing"),
        ({"messages": [ASK, {**SAY, "content": 5}]}, "auto", "messages[1].content must be a string, null or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAY]},
            "auto",
            "messages[0].content has parts of type image_url; only text is trained",
        ),
        ({"messages": [ASK, {**SAY, "weight": -0.5}]}, "auto", "messages[1].weight is -0.5; it must be a number"),
        ({"messages": [{**ASK, "tool_calls": [call({})]}, SAY]}, "auto", "only an assistant message may call"),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [call('{"x": ')]}]},
            "auto",
            "messages[1].tool_calls[0].function.arguments is a string but not valid JSON: Expecting value at column 7",
        ),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [call("[1]")]}]},
            "auto",
            "messages[1].tool_calls[0].function.arguments must be an object; it is a list",
        ),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "auto",
            "messages[1].tool_calls[0] must be an object with function.name",
        ),
        ({"messages": [ASK, SAY], "tools": {"name": "f"}}, "auto", "tools must be a list or a JSON string of one"),
        ({"messages": [ASK, SAY], "tools": [{"description": "x"}]}, "auto", "tools[0] must be an object with a name"),
        ({"messages": [ASK, SAY], "tools": "[{]"}, "auto", "tools is a string but not valid JSON"),
        (
            {"conversations": [{"from": "human"}]},
            "auto",
            "conversations[0] must be an object with the fields from and value",
        ),
        (
            {"conversations": [{"from": "robot", "value": "x"}]},
            "auto",
            "conversations[0].from is 'robot'; known are system,",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f(x)"}]},
            "auto",
            "conversations[0].value is a string but not valid JSON",
        ),
        (
            {"instruction": "q", "output": "a", "history": ["q"]},
            "auto",
            "history[0] must be a pair of question and answer",
        ),
    ],
)
def test_bad_rows_name_the_reason(row, format, reason):
    with pytest.raises(DataError) as caught:
        normalise(row, format)
    assert reason in str(caught.value)
