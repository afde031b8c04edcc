"""Calls as text and back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eaftdrope.data import parse_tool_calls
from eaftdrope.data.tools import as_plain_messages, render_tool_calls

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_call = st.fixed_dictionaries(
    {"name": st.text(min_size=1), "arguments": st.dictionaries(st.text(max_size=8), _json | st.just("</tool_call>"))}
)


@settings(deadline=None)
@given(calls=st.lists(_call, min_size=1, max_size=3), before=st.text().filter(lambda text: "<tool_call>" not in text))
def test_round_trip(calls, before):
    written = render_tool_calls([{"type": "function", "function": call} for call in calls])
    assert parse_tool_calls(written) == calls
    assert parse_tool_calls(f"{before}\n{written}\n") == calls


ONE = {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', [ONE]),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n' * 2, [ONE, ONE]),
        ('<tool_call>[{"name": "f", "arguments": "{\\"x\\": 1}"}]</tool_call>', [ONE]),
        ('{"name": "f", "parameters": {"x": 1}}', [ONE]),
        (' [{"name": "f", "arguments": {"x": 1}}] ', [ONE]),
        ("It is sunny.", None),
        ("", None),
        ("[]", None),
        ("<tool_call>[]</tool_call>", None),
        ('<tool_call>[{"name": "f", "arguments": {"x": 1}}]', None),
        ('<tool_call>[{"name": "f", "arguments": {"x": 1}]</tool_call>', None),
        ('<tool_call>[{"name": "f"}]</tool_call>', None),
        ('<tool_call>[{"name": "f", "arguments": [1]}]</tool_call>', None),
        ('<tool_call>[{"arguments": {"x": 1}}]</tool_call>', None),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><tool_call>oops</tool_call>', None),
        ("<tool_call>" + "[" * 100_000, None),
    ],
)
def test_answers_of_models(text, calls):
    assert parse_tool_calls(text) == calls


def test_plain_messages_leave_the_input_alone():
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "I look.", "tool_calls": [{"type": "function", "function": ONE}]},
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"role": "tool", "content": "2", "tool_call_id": "b"},
        {"role": "user", "content": "and?"},
    ]
    before = json.dumps(messages)
    tools = [{"type": "function", "function": {"name": "f"}}]
    plain = as_plain_messages(messages, tools, has_system_role=True)
    assert json.dumps(messages) == before
    assert plain[0]["role"] == "system"
    assert '<tools>[{"name": "f"}]</tools>' in plain[0]["content"]
    assert plain[1:] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": 'I look.\n<tool_call>[{"name": "f", "arguments": {"x": 1}}]</tool_call>'},
        {"role": "user", "content": "<tool_response>1</tool_response>\n<tool_response>2</tool_response>"},
        {"role": "user", "content": "and?"},
    ]
