"""Every key of a row is read, reported or refused."""

import json

import pytest

from eaftdrope.data import Source, build_dataset, encode, normalise
from eaftdrope.data.fields import is_metadata
from eaftdrope.errors import DataError
from tests.data import chat_templates as t

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def calling(*calls, **extra):
    return {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": list(calls)}], **extra}


def said(**extra):
    """A row whose answer has more keys."""
    return {"messages": [ASK, {**SAY, **extra}]}


@pytest.mark.parametrize(
    ("row", "read", "ignored"),
    [
        (
            {**said(annotations=[], name="n", timestamp=5), "id": 1, "topic": None, "tools": None},
            ["messages[].content", "messages[].name", "messages[].role"],
            ["id", "messages[].annotations", "messages[].timestamp"],
        ),
        (
            calling({"id": "c", "index": 0, **CALL, "function": {**CALL["function"], "strict": True}}),
            ["messages[].content", "messages[].role"]
            + [f"messages[].tool_calls[].{key}" for key in ("function.arguments", "function.name", "id", "type")],
            ["messages[].tool_calls[].function.strict", "messages[].tool_calls[].index"],
        ),
        (
            {"messages": json.dumps([ASK, {"role": "assistant", "function_call": {"name": "f", "args": {}}}])},
            [
                "messages",
                *(f"messages[].{key}" for key in ("content", "function_call.args", "function_call.name", "role")),
            ],
            [],
        ),
        (
            {"messages": [{**ASK, "content": [{"type": "text", "text": "q", "cache_control": {}}]}, SAY]},
            ["messages[].content", "messages[].content[].text", "messages[].content[].type", "messages[].role"],
            ["messages[].content[].cache_control"],
        ),
        (
            {**calling(CALL), "tools": [{"type": "function", "function": {**TOOL, "any": 1}, "strict": True}]},
            ["messages[].content", "messages[].role"]
            + [f"messages[].tool_calls[].{key}" for key in ("function.arguments", "function.name", "type")]
            + ["tools[].function", "tools[].type"],
            ["tools[].strict"],
        ),
        (
            {"conversations": [TURNS[0], {**TURNS[1], "markdown": None, "score": 1}], "system": "s"},
            ["conversations[].from", "conversations[].value", "system"],
            ["conversations[].score"],
        ),
        (
            {"instruction": "q", "input": "", "output": "a", "text": "q a"},
            ["input", "instruction", "output"],
            ["text"],
        ),
        (
            {"prompt": [ASK], "completion": [SAY], "chosen": [SAY]},
            ["completion[].content", "completion[].role", "prompt[].content", "prompt[].role"],
            ["chosen"],
        ),
        (
            {"prompt": "p", "completion": "c", "images": [], "label": True},
            ["completion", "images", "prompt"],
            ["label"],
        ),
        ({"text": "t", "title": "x"}, ["text"], ["title"]),
        ({"Question": "q", "question": None, "Answer": "a", "hint": "h"}, ["Answer", "Question"], ["hint"]),
        (
            {"question": "q", "context": {"contexts": ["c"], "labels": ["B"]}, "answer": "a"},
            ["answer", "context.contexts", "question"],
            ["context.labels"],
        ),
        (
            {
                "id": 0,
                "query": "q",
                "tools": json.dumps([TOOL]),
                "answers": [{"name": "f", "arguments": {}, "note": 1}],
            },
            ["answers[].arguments", "answers[].name", "query", "tools"],
            ["answers[].note", "id"],
        ),
        (
            {"system": "SYSTEM: -", "chat": "USER: q\n\n\nASSISTANT: a <|endoftext|>", "lang": "en"},
            ["chat", "system"],
            ["lang"],
        ),
    ],
)
def test_what_was_read_and_what_was_not(row, read, ignored):
    example = normalise(row)
    assert (sorted(example.fields_read), sorted(example.fields_ignored)) == (read, ignored)


@pytest.mark.parametrize("key", ["parameters", "args", "input", "kwargs", "params", "tool_input", "Arguments"])
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_under_any_published_name(key, as_text):
    arguments = json.dumps({"x": 1}) if as_text else {"x": 1}
    for call in (
        {"type": "function", "function": {"name": "f", key: arguments}},
        {"type": "function", "function": {"name": "f"}, key: arguments},
        {"name": "f", key: arguments},
        {"function": "f", key: arguments},
        {"tool_name": "f", key: arguments},
        {"functionCall": {"name": "f", key: arguments}},
    ):
        assert normalise(calling(call)).expected_calls == [{"name": "f", "arguments": {"x": 1}}]
    call = {"name": "f", key: arguments}
    for row in (
        {"conversations": [TURNS[0], {"from": "function_call", "value": json.dumps(call)}]},
        {"conversations": [TURNS[0], {"from": "gpt", "value": "", "tool_calls": [call]}]},
        {"query": "q", "tools": [TOOL], "answers": json.dumps([call])},
        {"messages": [ASK, {**SAY, "function_call": call}]},
        {"messages": [ASK, {**SAY, "tool_calls": [call], "function_call": call}]},
    ):
        assert normalise(row).expected_calls == [{"name": "f", "arguments": {"x": 1}}]


@pytest.mark.parametrize(
    ("row", "system", "tools", "last"),
    [
        ({"messages": [ASK, SAY], "system": "s"}, "s", None, SAY),
        ({"messages": [{"role": "system", "content": "s"}, ASK, SAY], "system": " s\n"}, " s\n", None, SAY),
        ({"conversations": TURNS, "system_prompt": "s"}, "s", None, SAY),
        ({"conversations": [ASK, SAY], "systemPrompt": "s", "system": "s"}, "s", None, SAY),
        ({"instruction": "q", "output": "a", "system_message": "s", "tools": [TOOL]}, "s", [TOOL], SAY),
        ({"question": "q", "answer": "a", "system": "s", "functions": json.dumps([TOOL])}, "s", [TOOL], SAY),
        ({"prompt": [ASK], "completion": [SAY], "system": "s", "tools": [TOOL]}, "s", [TOOL], SAY),
        (
            {"messages": [{"role": "system", "content": "s", "tools": [TOOL]}, ASK, SAY]},
            "s",
            [TOOL],
            SAY,
        ),
        (
            {"query": "q", "tools": [], "answers": [CALL], "system": "s", "available_tools": [TOOL]},
            "s",
            [TOOL],
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"question": "q", "answer": "a", "thinking": "r", "system": "s"},
            "s",
            None,
            {**SAY, "reasoning_content": "r"},
        ),
    ],
)
def test_columns_beside_the_conversation(row, system, tools, last):
    example = normalise(row)
    assert example.messages[0] == {"role": "system", "content": system}
    assert [tool["function"] for tool in example.tools or []] == (tools or [])
    assert example.messages[-1] == last
    assert not example.fields_ignored


def test_an_anthropic_schema_is_the_parameters():
    tool = {"name": "f", "description": "d", "input_schema": TOOL["parameters"]}
    assert normalise(calling(CALL, tools=[tool])).tools[0]["function"] == {**TOOL, "description": "d"}


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"context": "c", "question": "q"}, "Context: c\n\nQuestion: q"),
        ({"context": ["c", "d"], "question": "q"}, "Context: c d\n\nQuestion: q"),
        ({"question": "q", "options": {"A": "x", "B": 2}}, "q\n\nA. x\nB. 2"),
        ({"question": "q", "choices": ["x", "y"]}, "q\n\nA. x\nB. y"),
        ({"question": "q", "choices": {"label": ["1", "2"], "text": ["x", "y"]}}, "q\n\n1. x\n2. y"),
        ({"question": "q", "options": ["A) x", "B) y"]}, "q\n\nA) x\nB) y"),
        ({"question": "q", "context": "", "options": []}, "q"),
    ],
)
def test_context_and_options_of_a_question(row, asked):
    assert normalise({**row, "answer": "B"}).messages == [{**ASK, "content": asked}, {**SAY, "content": "B"}]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought", "reasoningContent", "cot"])
def test_reasoning_has_one_name(key):
    for row in (said(**{key: "r"}), {"conversations": [TURNS[0], {**TURNS[1], key: "r"}]}):
        assert normalise(row).messages[1] == {**SAY, "reasoning_content": "r"}
        assert normalise(row, reasoning=False).messages[1] == SAY
    assert normalise(said(**{"reasoning_content": "r", key: "r"})).messages[1]["reasoning_content"] == "r"


@pytest.mark.parametrize(
    "marks",
    [{name: False} for name in ("train", "trainable", "training", "loss", "train_on_turn", "trainOnTurn", "weight")]
    + [{name: 0} for name in ("weight", "loss_mask", "loss_scale", "train")]
    + [{"loss_weight": 0.0}, {"mask": True}, {"is_masked": True}, {"ignore_loss": True}, {"train": False, "weight": 0}],
    ids=str,
)
def test_a_turn_marked_as_not_trained_is_not_trained(marks, make_tokenizer, trained):
    tokenizer = make_tokenizer(t.CHATML)
    for row in (
        {"messages": [ASK, {**SAY, "content": "no", **marks}, ASK, SAY]},
        {"conversations": [TURNS[0], {"from": "gpt", "value": "no", **marks}, *TURNS]},
    ):
        example = normalise(row)
        assert [message.get("weight") for message in example.messages] == [None, 0, None, None]
        assert trained(tokenizer, encode(example, tokenizer)) == ["a<|im_end|>"]
    opposite = {key: not value for key, value in marks.items()}
    assert normalise(said(**opposite)).messages[1]["weight"] == 1
    # a turn of context that is marked as context is what it is anyway
    assert normalise({"messages": [{**ASK, **marks}, SAY]}).messages[1] == SAY


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (said(loss_weight=-0.5), "messages[1].loss_weight is -0.5; it must be a number from 0 (not trained) to 1000"),
        (said(train=0.5), "messages[1].train is 0.5; it must be 0 (not trained) or 1 (trained)"),
        (said(train="false"), "messages[1].train is 'false'; it must be 0 (not trained) or 1 (trained)"),
        (said(mask=1), "messages[1].mask is 1; it must be true (not trained) or false (trained)"),
        (said(loss_mask=[0, 1]), "messages[1].loss_mask is [0, 1]; it must be 0"),
        (
            said(train=True, weight=0),
            "messages[1].train and messages[1].weight disagree on whether the turn is trained",
        ),
        (said(train_detail=[{"begin_offset": 0}]), "messages[1].train_detail marks parts of a turn, which is not read"),
        ({"messages": [{**ASK, "train": True}, SAY]}, "messages[0].train marks a user turn as trained"),
        ({"prompt": [ASK, {**SAY, "weight": 1}, ASK], "completion": [SAY]}, "prompt[1] is marked as trained, but"),
        ({**said(), "train": False}, "train marks the whole row as not trained: leave the row out"),
        ({"text": "t", "loss_mask": 0}, "loss_mask marks the whole row as not trained"),
        ({**said(), "loss_mask": [0, 1]}, "loss_mask marks parts of the row, which is not read. Mark each message"),
        (said(reasoning="r", thinking="s"), "messages[1].reasoning and messages[1].thinking are both the reasoning"),
        (said(reasoning_content=[]), "messages[1].reasoning_content must be a string; it is a list"),
        (said(thinking=True), "messages[1].thinking must be a string; it is a bool"),
        ({"messages": [{**ASK, "thinking": "r"}, SAY]}, "messages[0].thinking is reasoning, but the turn is not the"),
        (said(refusal="I cannot"), "messages[1].refusal is not read: only content, calls and reasoning are trained"),
        (said(audio={"id": "a"}), "messages[1].audio is not read"),
        (said(prefix=True), "messages[1].prefix is not read"),
        (said(reasoning_details=[{"text": "r"}]), "messages[1].reasoning_details is not read"),
        ({"messages": [{**ASK, "images": ["x"]}, SAY]}, "messages[0].images is not read"),
        ({"messages": [{**ASK, "function_call": CALL["function"]}, SAY]}, "only an assistant message may call"),
        ({"messages": [{**ASK, "tools": [TOOL]}, SAY]}, "messages[0].tools: tools belong to the row or to its system"),
        ({**said(), "images": ["cat.png"]}, "images is not read: only text is trained"),
        ({"text": "t", "audio_path": "x.wav"}, "audio_path is not read"),
        ({"messages": [{**ASK, "content": "<image>What?"}, SAY]}, "messages[0].content has the placeholder <image>"),
        ({"instruction": "Look:\n<|image|>", "output": "a"}, "instruction has the placeholder <|image|>"),
        ({"prompt": "<video>\nWhat?", "completion": "a"}, "prompt has the placeholder <video>"),
        (
            {"messages": [{"role": "system", "content": "s"}, ASK, SAY], "system_prompt": "z"},
            "system_prompt and the first message are both the system turn, and differ",
        ),
        ({**said(), "system": "s", "system_prompt": "z"}, "system and system_prompt are both the system turn"),
        (
            {**said(), "tools": [TOOL], "functions": [{"name": "g"}]},
            "tools and functions are both the tools of the row",
        ),
        ({"prompt": "p", "completion": "c", "tools": [TOOL]}, "tools has no place in a row of strings (format prompt_"),
        ({"text": "t", "system_prompt": "s"}, "system_prompt has no place in a row of strings (format text)"),
        ({"prompt": "p", "completion": "c", "reasoning": "r"}, "reasoning has no place in a row of strings"),
        (
            calling({"name": "f", "values": {"x": 1}}),
            "messages[1].tool_calls[0] has no arguments, and messages[1].tool_calls[0].values is not read",
        ),
        (
            calling({"name": "f", "arguments": "", "values": {"x": 1}}),
            "messages[1].tool_calls[0] has no arguments, and messages[1].tool_calls[0].values is not read",
        ),
        (calling({"name": "f", "city": "Rome"}), "messages[1].tool_calls[0].city is not read. Put the arguments under"),
        (
            calling({"name": "f", "arguments": {"x": 1}, "input": {"x": 2}}),
            "messages[1].tool_calls[0].arguments and messages[1].tool_calls[0].input are both the arguments of the call",
        ),
        (calling({"name": "f", "function": {"name": "g"}}), "are both the name of the call, and differ"),
        (calling({"name": " ", "arguments": {}}), "messages[1].tool_calls[0] must be an object with function.name"),
        (calling({"name": "f"}, tools=[TOOL]), "messages[1].tool_calls[0] has no arguments, but the tool f requires x"),
        (
            {"messages": [ASK, {**SAY, "tool_calls": [CALL], "function_call": {"name": "g", "arguments": "{}"}}]},
            "messages[1].tool_calls and messages[1].function_call are both the calls of the turn, and differ",
        ),
        (
            calling({"name": "f", "arguments": '{"x": 1, "x": 2}'}),
            "messages[1].tool_calls[0].arguments has the key 'x' twice in one object; keep one",
        ),
        ({"question": "q", "answer": "a", "options": {"A": ["x"]}}, "options must be a list of strings, or an object"),
        ({"instruction": "q", "output": "a", "history": 1.5}, "history must be a list of pairs of question and answer"),
    ],
)
def test_what_cannot_be_honoured_is_refused(row, reason):
    with pytest.raises(DataError) as caught:
        normalise(row)
    assert reason in str(caught.value)


@pytest.mark.parametrize("content", ["What does `<image>` do?", "<video>\n<source>\n</video>", "a < b <imagery>"])
def test_talk_about_tags_is_no_picture(content):
    assert normalise({"messages": [{**ASK, "content": content}, SAY]}).messages[0]["content"] == content


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000, '{"a":' * 100_000], ids=["digits", "lists", "objects"])
@pytest.mark.parametrize(
    "row",
    [
        lambda text: {"messages": text},
        lambda text: {"conversations": text},
        lambda text: {"messages": [ASK, SAY], "tools": text},
        lambda text: {"query": "q", "tools": "[]", "answers": text},
        lambda text: {"query": "q", "tools": text, "answers": "[]"},
        lambda text: calling({"name": "f", "arguments": text}),
        lambda text: {"messages": [ASK, SAY], "ground_truth": "[{" + text},
        lambda text: {"system": "SYSTEM: {" + text, "chat": "USER: q"},
        lambda text: {"system": "-", "chat": f"USER: q\nASSISTANT: <functioncall> {text}"},
    ],
)
def test_json_that_python_cannot_take_is_a_bad_row(row, text):
    with pytest.raises(DataError):
        normalise(row(text))


def test_metadata_is_told_from_text():
    for path in ("id", "messages[].created_at", "conversation_id", "sourceUrl", "num_tokens", "context.labels", "UUID"):
        assert is_metadata(path)
    for path in ("hint", "messages[].text", "valid", "label", "messages[].annotations", "documents", "idea"):
        assert not is_metadata(path)


def test_each_source_names_what_was_not_read_once(make_tokenizer, write_jsonl, recwarn):
    plain = {"id": 7, "source": "web", **said()}
    first, second = write_jsonl([{**plain, "hint": "h"}, {**said(note="n"), "hint": "h"}, plain], "a.jsonl"), None
    second = write_jsonl([plain], "b.jsonl")
    _, report = build_dataset([Source(first), Source(second)], make_tokenizer(t.CHATML))
    assert report.by_source[first].fields_ignored == {"id": 2, "source": 2, "hint": 2, "messages[].note": 1}
    assert report.by_source[second].fields_read == {"messages[].role": 1, "messages[].content": 1}
    (warning,) = [text for text in report.warnings if "not read" in text]
    assert warning == (
        f"{first}: not read, so nothing of it is trained: hint (2 of 3 rows), messages[].note (1 of 3 rows). If it belongs "
        "to the text, write it into a field that the format reads; `eaftdrope preview` has the table."
    )
    assert [str(caught.message) for caught in recwarn if caught.category is UserWarning] == report.warnings
