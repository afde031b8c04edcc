"""What a row has is found in its rendering, to the place, or named."""

import pytest

from eaftdrope.data import Source, build_dataset, encode, normalise
from eaftdrope.errors import DataError, LostTextError
from tests.data import chat_templates as t
from tests.data.conversations import TOOLS, byte_tokenizer, call, carried, result, says, user

_EACH = "{% for k, v in c.function.arguments.items() %}{{ k }}={{ VALUE }};{% endfor %}"
PARIS = [
    {"type": "function", "function": {"name": "lookup", "parameters": {"properties": {"city": {"enum": ["Paris"]}}}}}
]


def with_calls(written, tools="{{ t | tojson }}"):
    """A template that writes a call in this way."""
    return (
        "{% for t in tools or [] %}" + tools + "{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}<call>" + written + "</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def lost(template, messages, tools=None):
    tokenizer = byte_tokenizer(template) if "{" in template else carried(template)
    with pytest.raises(LostTextError) as caught:
        encode(normalise({"messages": messages, "tools": tools}), tokenizer, max_length=None)
    return caught.value


def asked(*calls, question="The weather in Paris, true or false, 5 times?", answer="Paris: true, 5"):
    return [user(question), says("", *calls), result("sunny"), says(answer)]


def kept(condition):
    return "{{ c.function.name }}" + _EACH.replace("{{ k }}", f"{{% if {condition} %}}{{{{ k }}}}").replace(
        "VALUE }};", "v }};{% endif %}"
    )


@pytest.mark.parametrize(
    ("condition", "arguments", "path", "shown"),
    [
        # each of them is in the question, in the answer or in the tool's schema as well
        ("k != 'city'", {"city": "Paris", "n": 1}, "city", "'Paris'"),
        ("v is string", {"city": "Rome", "n": 5}, "n", "'5'"),
        ("v is string", {"city": "Rome", "ok": True}, "ok", "'true'"),
        ("v is string", {"city": "Rome", "deep": [{"x": "Paris"}]}, "deep[0].x", "'Paris'"),
        ("v is not mapping", {"city": "Rome", "a": 7, "b": {"c": 7}}, "b.c", "'7'"),
    ],
)
def test_a_lost_argument_is_named(condition, arguments, path, shown):
    error = lost(with_calls(kept(condition)), asked(call(**arguments)), PARIS)
    where = f"messages[1].tool_calls[0].function.arguments.{path}"
    if path == "b.c":
        where = "messages[1].tool_calls[0].function.arguments.a"  # one of two equal numbers: either may be named
        assert set(error.lost) == {where, where[:-1] + "b.c"}
    else:
        assert error.lost == (where,)
    assert f"is not in the text that the chat template writes: {shown}" in str(error)
    assert "The chat template leaves out this part of the call." in str(error)


def test_a_lost_value_is_not_found_in_its_equal():
    """The second call's value, the third turn's text: the first call and the first turn have the same."""
    first = "{% if loop.first %}{{ c.function.arguments | tojson }}{% endif %}{{ c.function.name }}"
    error = lost(with_calls(first), asked(call(key="V"), call(2, key="V")))
    assert error.lost == ("messages[1].tool_calls[1].function.arguments.key",)
    assert "only one call in a turn. Give each call a turn of its own" in str(error)
    skips = t.WITHOUT_STOP.replace("{{ '### '", "{% if loop.index0 != 2 %}{{ '### '").replace(
        "{% endfor %}", "{% endif %}{% endfor %}", 1
    )
    for text in ("same", "the same, and long enough to be looked for"):
        error = lost(skips, [user(text), says("a"), user(text), says("b")])
        assert error.lost == ("messages[2].content",)
        assert "The chat template leaves out this user turn. Put its text into a turn that" in str(error)


def test_each_kind_of_loss_has_its_cause_and_its_remedy():
    beside = [user("Q"), says("Let me look.", call()), result("R"), says("A")]
    for name in ("llama3_1", "llama3_2", "muse_glimmer"):
        error = lost(name, beside, TOOLS)
        assert error.lost == ("messages[1].content",)
        assert str(error) == (
            "messages[1].content is not in the text that the chat template writes: 'Let me look.'. The chat template leaves "
            "out the text of a turn that also calls a tool. Give the text a turn of its own in front of the call, or set a "
            "chat template that writes both."
        )
    error = lost("llama3_1", [user("Q"), says("", call(), thinks="So."), result("R"), says("A")], TOOLS)
    assert error.lost == ("messages[1].reasoning_content",)
    assert (
        "reasoning of a turn that calls a tool. Set a chat template that writes it, or train without reasoning"
        in str(error)
    )
    first_system = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}" + t.CHATML.replace(
        "{{ '<|im_start|>' + m['role']",
        "{% if m['role'] == 'system' %}{% continue %}{% endif %}{{ '<|im_start|>' + m['role']",
    )
    error = lost(
        first_system, [*({"role": "system", "content": text} for text in ("One", "Two")), user("Q"), says("A")]
    )
    assert error.lost == ("messages[1].content",)
    assert "leaves out this system turn" in str(error)
    no_tools = with_calls("{{ c.function | tojson }}").replace(
        "tools or []", "([] if messages[0].role == 'system' or not tools else tools)"
    )
    talk = [{"role": "system", "content": "Be kind."}, *asked(call(city="Paris"))]
    error = lost(no_tools, talk, PARIS)
    assert error.lost == ("tools[0].function.name",)
    assert "leaves out the tools of this conversation" in str(error)
    twice = t.CHATML.replace(
        "+ m['content']", "+ (m.thinking + m.reasoning_content if m.thinking else '') + m['content']"
    )
    assert "writes messages[1].reasoning_content twice: 'So.'" in str(lost(twice, [user("Q"), says("A", thinks="So.")]))


def test_a_text_that_is_cut_short_is_lost():
    """The marks change what is written here: the values are counted instead."""
    cut = t.CHATML.replace("m['content'] +", "m['content'][:24] +")
    assert lost(cut, [user("x" * 80), says("short")]).lost == ("messages[0].content",)
    long = "an answer that goes on and on, and longer than sixty characters altogether"
    error = lost(cut, [user("short"), says(long)])
    assert error.lost == ("messages[1].content",)
    assert f"'{long[:57]}...'" in str(error)


@pytest.mark.parametrize(
    "written",
    [
        "{{ c.function.name }}{{ c.function.arguments | tojson }}",
        "{{ c.function.name }}{{ c.function.arguments | tojson(ensure_ascii=true) }}",
        "{{ c.function.name }}{{ c.function.arguments | tojson(indent=4) }}",
        "{{ c.function.name }}" + _EACH.replace("VALUE", "v"),
        "{{ c.function.name }}" + _EACH.replace("VALUE", "v | e"),
        "{{ c.function.name }}" + _EACH.replace("VALUE", "v | tojson").replace(".items()", " | dictsort"),
        _EACH.replace("VALUE", "v | tojson") + "{{ c.function.name }}",
        "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}",
        "{{ c.function | tojson }}",
    ],
)
def test_no_way_to_write_a_value_is_taken_for_a_loss(trained, written):
    arguments = {
        **{"text": "Zürich 😀 \"'<b>&\n\t\\", "spaced": "  a ", "empty": "", "list": ["x", ["y", {"z": "ß'"}]]},
        **{"one": 1.0, "two": 2, "minus": -3, "big": 10**20, "tiny": 1e-05, "yes": True, "no": False, "none": None},
    }
    tokenizer = byte_tokenizer(with_calls(written))
    row = encode(normalise({"messages": asked(call(**arguments)), "tools": PARIS}), tokenizer, max_length=None)
    assert len(trained(tokenizer, row)) == 2
    assert row.dropped == ()


def test_rows_that_cannot_carry_marks(trained):
    """Private-use characters of the row's own, a template that compares names: no false alarm, and a loss is found."""
    icons = asked(call(city="Paris \U000f0001", n=7), question="\U000f0000 icon \ue0f0")
    tokenizer = carried("qwen3")
    assert (
        "\U000f0001"
        in trained(tokenizer, encode(normalise({"messages": icons, "tools": PARIS}), tokenizer, max_length=None))[0]
    )
    assert lost(with_calls(kept("k != 'city'")), icons, PARIS).lost == (
        "messages[1].tool_calls[0].function.arguments.city",
    )
    tools = [
        {"type": "function", "function": {"name": f"math.{n}", "description": "d", "parameters": {}}} for n in "ab"
    ]
    tokenizer = carried("muse_glimmer")
    row = {"messages": asked(call(name="math.a", x=3)), "tools": tools}
    assert len(trained(tokenizer, encode(normalise(row), tokenizer, max_length=None))) == 2
    with pytest.raises(DataError, match="cannot separate the tool's result from the rest of turn 1"):
        talk = [user("\U000f0000"), says("SAY", call()), result("RESULT7"), says("A")]
        encode(normalise({"messages": talk, "tools": TOOLS}), carried("gemma4"), max_length=None)


def test_reasoning_left_out_by_design_is_counted():
    """Qwen 3 writes no reasoning before the last question, also where it stands in the content."""
    talk = [user("a"), says("b", thinks="early"), user("c"), says("<think>\nmid\n</think>\n\nd"), user("e"), says("f")]
    row = encode(normalise({"messages": talk}), carried("qwen3"), max_length=None)
    assert row.dropped == ("messages[1].reasoning_content", "messages[3].content (<think>)")
    assert encode(normalise({"messages": talk[:2]}), carried("qwen3"), max_length=None).dropped == ()


def test_a_lost_text_names_its_line_and_can_be_skipped(write_jsonl):
    tokenizer = carried("llama3_1")
    rows = [{"messages": [user("Q"), says("A")]}, {"messages": [user("Q"), says("SAY", call())], "tools": TOOLS}]
    path = write_jsonl(rows)
    with pytest.raises(DataError, match=rf"{path}:2: messages\[1\]\.content is not in.*\nOr set on_bad_row: skip"):
        build_dataset([Source(path)], tokenizer, max_length=None)
    dataset, report = build_dataset([Source(path)], tokenizer, max_length=None, on_bad_row="skip")
    assert len(dataset) == 1
    assert report.skipped[0][0] == f"{path}:2"
    assert report.skipped[0][1].startswith("messages[1].content is not in the text")
