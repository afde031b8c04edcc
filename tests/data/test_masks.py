"""What is trained, to the token: templates with and without markers, tools, unicode, boundaries, stop tokens."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eaftdrope.data import encode, encode_prompt, normalise
from eaftdrope.data.chat import render_conversation, render_prompt
from eaftdrope.data.template import template_of
from eaftdrope.errors import DataError
from tests.data import chat_templates as t

TALK = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "How are you?"},
        {"role": "user", "content": "The capital of France?"},
        {"role": "assistant", "content": "Paris 😀 is it"},
    ]
}
WEATHER = {"name": "weather", "description": "Get it", "parameters": {"type": "object", "properties": {"city": {}}}}
CALLS = {
    "tools": [{"type": "function", "function": WEATHER}],
    "messages": [
        {"role": "user", "content": "Weather in Paris and Rome?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
                {"id": "b", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        {"role": "tool", "tool_call_id": "b", "content": "rain"},
        {"role": "assistant", "content": "Sunny and rain."},
    ],
}
FIRST, LAST = "How are you?", "Paris 😀 is it"


@pytest.mark.parametrize(
    ("template", "kind", "answers", "stop"),
    [
        (t.CHATML, "byte", [FIRST + "<|im_end|>", LAST + "<|im_end|>"], "<|im_end|>"),
        (t.CHATML, "byte-whole", [FIRST + "<|im_end|>", LAST + "<|im_end|>"], "<|im_end|>"),
        (t.MARKED, "byte", [FIRST + "<|im_end|>", LAST + "<|im_end|>"], "<|im_end|>"),
        (t.MARKED_WITHOUT_STOP, "byte", [FIRST + "<|im_end|>", LAST + "<|im_end|>"], "<|im_end|>"),
        (t.QWEN, "byte", [FIRST + "<|im_end|>", LAST + "<|im_end|>"], "<|im_end|>"),
        # What follows the prompt "... [/INST]" begins with the space: the model has to write it.
        (t.LLAMA2, "byte", [f" {FIRST} </s>", f" {LAST} </s>"], "</s>"),
        (t.WITHOUT_STOP, "byte", [FIRST + "\n\n", LAST + "\n\n"], None),
    ],
    ids=["chatml", "chatml-whole-offsets", "marked", "marked-without-stop", "qwen", "llama2", "without-stop"],
)
def test_trained_text_of_each_template(make_tokenizer, trained, template, kind, answers, stop):
    tokenizer = make_tokenizer(template, kind)
    example = normalise(TALK)
    every = encode(example, tokenizer, train_on="assistant")
    assert trained(tokenizer, every) == answers
    assert every.stop == stop
    assert trained(tokenizer, encode(example, tokenizer, train_on="last_assistant")) == answers[1:]
    assert trained(tokenizer, encode(example, tokenizer, train_on="completion")) == answers[1:]
    whole = encode(example, tokenizer, train_on="all")
    assert whole.labels == whole.input_ids == every.input_ids
    assert not every.truncated


@pytest.mark.parametrize(
    "template", [t.CHATML, t.MARKED, t.QWEN, t.LLAMA2, t.GEMMA], ids=["chatml", "marked", "qwen", "llama2", "gemma"]
)
def test_ids_are_those_of_the_chat_template(make_tokenizer, template):
    """The row is what apply_chat_template gives at inference, and begins with the prompt the probe asks with."""
    tokenizer = make_tokenizer(template)
    messages = [message for message in TALK["messages"] if message["role"] != "system"]
    example = normalise({"messages": messages})
    row = encode(example, tokenizer)
    assert row.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = encode_prompt(example, tokenizer)
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt == asked == row.input_ids[: len(prompt)]
    assert row.labels[len(prompt)] != -100
    assert row.labels[len(prompt) - 1] == -100


def test_the_mask_of_a_marked_template_is_that_of_transformers(make_tokenizer):
    tokenizer = make_tokenizer(t.MARKED)
    reference = tokenizer.apply_chat_template(TALK["messages"], return_dict=True, return_assistant_tokens_mask=True)
    row = encode(normalise(TALK), tokenizer)
    assert row.input_ids == reference["input_ids"]
    assert [int(label != -100) for label in row.labels] == reference["assistant_masks"]


def test_markers_in_a_branch_that_is_not_taken_do_not_unmask_the_row(make_tokenizer, trained):
    template = t.CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    tokenizer = make_tokenizer(template)
    assert trained(tokenizer, encode(normalise(TALK), tokenizer)) == [FIRST + "<|im_end|>", LAST + "<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns(make_tokenizer, trained):
    """No prefix of the conversation is a prefix of the text here: the turn is found by comparing renderings."""
    tokenizer = make_tokenizer(t.QWEN)
    talk = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>long</think>\nHello"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "<think>more</think>\nThere"},
    ]
    text = render_conversation(talk, None, tokenizer).text
    assert "long" not in text
    row = encode(normalise({"messages": talk}), tokenizer)
    assert trained(tokenizer, row) == ["Hello<|im_end|>", "<think>more</think>\nThere<|im_end|>"]


def test_a_template_that_always_writes_the_generation_prompt(make_tokenizer, trained):
    template = t.CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
    tokenizer = make_tokenizer(template)
    row = encode(normalise(TALK), tokenizer)
    assert tokenizer.decode(row.input_ids).endswith("<|im_start|>assistant\n")
    assert trained(tokenizer, row) == [FIRST + "<|im_end|>", LAST + "<|im_end|>"]
    assert row.stop == "<|im_end|>"


def test_trimmed_content(make_tokenizer, trained):
    tokenizer = make_tokenizer(t.GEMMA)
    messages = [{"role": "user", "content": " hi \n"}, {"role": "assistant", "content": "\n  yes  \n\n"}] * 2
    assert trained(tokenizer, encode(normalise({"messages": messages}), tokenizer)) == ["yes<|im_end|>"] * 2


def test_a_conversation_that_begins_with_the_assistant(make_tokenizer, trained):
    tokenizer = make_tokenizer(t.CHATML)
    messages = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "x"}]
    assert trained(tokenizer, encode(normalise({"messages": messages}), tokenizer)) == ["Hello<|im_end|>"]


def test_equal_question_and_answer_are_told_apart(make_tokenizer, trained):
    tokenizer = make_tokenizer(t.CHATML)
    messages = [{"role": role, "content": "same"} for role in ("user", "assistant", "user", "assistant")]
    row = encode(normalise({"messages": messages}), tokenizer)
    assert trained(tokenizer, row) == ["same<|im_end|>"] * 2
    assert trained(tokenizer, encode(normalise({"messages": messages}), tokenizer, train_on="last_assistant")) == [
        "same<|im_end|>"
    ]
    assert row.labels.count(-100) == len(row.labels) - row.trained_tokens


def test_weight_zero_is_context(make_tokenizer, trained):
    talk = json.loads(json.dumps(TALK))
    talk["messages"][2]["weight"] = 0
    for template in (t.CHATML, t.MARKED):
        tokenizer = make_tokenizer(template)
        assert trained(tokenizer, encode(normalise(talk), tokenizer)) == [LAST + "<|im_end|>"]
    talk["messages"][4]["weight"] = 0
    row = encode(normalise(talk), tokenizer)
    assert row.trained_tokens == 0
    assert row.stop is None


@pytest.mark.parametrize("kind", ["byte", "byte-whole", "metaspace"])
def test_a_token_that_joins_prompt_and_completion_is_trained(make_tokenizer, trained, kind):
    """ " yes" is one token: without it the answer would lose its word."""
    tokenizer = make_tokenizer(kind=kind)
    row = encode(normalise({"prompt": "The answer is ", "completion": "yes and no"}), tokenizer)
    assert trained(tokenizer, row)[0].strip() == "yes and no<|im_end|>"
    after = encode(normalise({"prompt": "The answer is", "completion": " yes and no"}), tokenizer)
    assert (after.input_ids, after.labels) == (row.input_ids, row.labels)


def test_bytes_of_one_character(make_tokenizer, trained):
    """Each byte of an emoji is a token and all of them name the same character: all are trained, or none."""
    tokenizer = make_tokenizer()
    row = encode(normalise({"prompt": "é😀", "completion": "😀é"}), tokenizer)
    assert trained(tokenizer, row) == ["😀é<|im_end|>"]
    assert row.labels.count(-100) == 6


def test_prompt_and_completion_keep_what_the_tokenizer_adds(make_tokenizer, trained):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(eos="</s>")
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=special)
    row = encode(normalise({"prompt": "Hello", "completion": " there"}), tokenizer)
    assert tokenizer.decode(row.input_ids) == "<s>Hello there</s>"
    assert trained(tokenizer, row) == [" there</s>"]
    assert row.stop == "</s>"
    prompt = encode_prompt(normalise({"prompt": "Hello", "completion": " there"}), tokenizer)
    assert tokenizer.decode(prompt) == "<s>Hello"


def test_text_is_trained_whole_and_ends(make_tokenizer, trained):
    tokenizer = make_tokenizer(eos="<|endoftext|>")
    row = encode(normalise({"text": "Hello there"}), tokenizer)
    assert trained(tokenizer, row) == ["Hello there<|endoftext|>"]
    assert row.stop == "<|endoftext|>"


def test_the_tokens_that_the_tokenizer_adds_are_there_once(make_tokenizer, trained):
    """Also where the text already begins or ends with them."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    special = [("<s>", tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)]
    talk = {"prompt": "user\nhi<|im_end|>\n", "completion": "yo<|im_end|>\n"}
    for added in ("<s> $A", "<s> $A <|im_end|>"):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(added, special_tokens=special)
        for text in ("Hello", "<s>Hello", "<s>Hello<|im_end|>", "Hello<|im_end|>\n"):
            assert trained(tokenizer, encode(normalise({"text": text}), tokenizer)) == ["<s>Hello<|im_end|>"]
        for prompt in (talk["prompt"], "<s>" + talk["prompt"]):
            example = normalise({**talk, "prompt": prompt})
            row = encode(example, tokenizer)
            assert tokenizer.decode(row.input_ids) == "<s>user\nhi<|im_end|>\nyo<|im_end|>"
            assert trained(tokenizer, row) == ["yo<|im_end|>"]
            assert encode_prompt(example, tokenizer) == row.input_ids[: row.labels.index(row.input_ids[-2]) - 1]
    # Two of its own are the text's matter.
    assert trained(tokenizer, encode(normalise({"text": "<s><s>Hello"}), tokenizer)) == ["<s><s>Hello<|im_end|>"]


@pytest.mark.parametrize("strip", [{"rstrip": True}, {"lstrip": True}, {"rstrip": True, "lstrip": True}])
def test_a_head_that_swallows_white_space_is_not_trained(make_tokenizer, trained, strip):
    from tokenizers import AddedToken

    template = t.CHATML.replace("<|im_start|>' + m['role'] + '\n", "<|' + m['role'] + '|>\n").replace(
        "<|im_start|>assistant\n", "<|assistant|>\n"
    )
    tokenizer = make_tokenizer(template)
    heads = [AddedToken(f"<|{role}|>", special=True, **strip) for role in ("user", "assistant")]
    tokenizer.add_tokens(heads, special_tokens=True)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "  def f():"}] * 2
    row = encode(normalise({"messages": messages}), tokenizer)
    answer = "def f():<|im_end|>" if "rstrip" in strip else "  def f():<|im_end|>"
    assert trained(tokenizer, row) == [answer] * 2


def test_truncation_keeps_the_start_and_loses_the_stop(make_tokenizer, trained):
    tokenizer = make_tokenizer(t.CHATML)
    whole = encode(normalise(TALK), tokenizer, max_length=None)
    cut = encode(normalise(TALK), tokenizer, max_length=len(whole.input_ids) - 2)
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:-2]
    assert trained(tokenizer, cut) == [FIRST + "<|im_end|>", LAST]
    assert cut.stop is None
    just = encode(normalise(TALK), tokenizer, max_length=len(whole.input_ids))
    assert not just.truncated
    assert just.stop == "<|im_end|>"


# --- tools ------------------------------------------------------------------------------------------------------------


def test_tools_of_a_template_that_drops_them(make_tokenizer, trained):
    tokenizer = make_tokenizer(t.CHATML)
    assert not template_of(tokenizer).has_tools
    row = encode(normalise(CALLS), tokenizer)
    calls = ", ".join(f'{{"name": "weather", "arguments": {{"city": "{city}"}}}}' for city in ("Paris", "Rome"))
    call = f"<tool_call>[{calls}]</tool_call>"
    assert trained(tokenizer, row) == [call + "<|im_end|>", "Sunny and rain.<|im_end|>"]
    text = tokenizer.decode(row.input_ids)
    assert text.startswith("<|im_start|>system\nYou can call functions.")
    assert f"<tools>{json.dumps([WEATHER])}</tools>" in text
    results = "<tool_response>sunny</tool_response>\n<tool_response>rain</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>\n" in text
    assert "Be helpful." not in text


def test_tools_join_the_system_turn_of_the_row(make_tokenizer):
    tokenizer = make_tokenizer(t.CHATML)
    messages = [{"role": "system", "content": "Be kind."}, *CALLS["messages"]]
    text = tokenizer.decode(encode(normalise({**CALLS, "messages": messages}), tokenizer).input_ids)
    assert text.startswith("<|im_start|>system\nBe kind.\n\nYou can call functions.")


def test_tools_join_the_user_turn_where_there_is_no_system_role(make_tokenizer):
    tokenizer = make_tokenizer(t.GEMMA)
    text = render_prompt(normalise(CALLS).messages[:1], normalise(CALLS).tools, tokenizer)
    assert text.startswith("<|im_start|>user\nYou can call functions.")
    assert text.endswith("\n\nWeather in Paris and Rome?<|im_end|>\n<|im_start|>model\n")


def test_tools_of_a_template_that_has_its_own_way(make_tokenizer, trained):
    tokenizer = make_tokenizer(t.QWEN)
    assert template_of(tokenizer).has_tools
    assert not template_of(tokenizer).arguments_as_text
    row = encode(normalise(CALLS), tokenizer)
    calls = "".join(
        f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
        for city in ("Paris", "Rome")
    )
    assert trained(tokenizer, row) == [calls + "<|im_end|>", "Sunny and rain.<|im_end|>"]
    assert "# Tools\n" in tokenizer.decode(row.input_ids)


def test_a_template_that_wants_arguments_as_text(make_tokenizer, trained):
    tokenizer = make_tokenizer(t.TEXT_ARGUMENTS)
    assert template_of(tokenizer).arguments_as_text
    own = encode(normalise(CALLS), make_tokenizer(t.QWEN))
    assert encode(normalise(CALLS), tokenizer) == own


def test_a_changed_template_is_looked_at_again(make_tokenizer):
    tokenizer = make_tokenizer(t.CHATML)
    assert not template_of(tokenizer).has_tools
    tokenizer.chat_template = t.QWEN
    assert template_of(tokenizer).has_tools


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_encoded_is_refused_with_the_reason(make_tokenizer):
    with pytest.raises(DataError, match=r"has no chat template.*format prompt_completion"):
        encode(normalise(TALK), make_tokenizer())
    with pytest.raises(DataError, match="the chat template refuses this conversation: roles must alternate"):
        encode(normalise({"messages": TALK["messages"][1:2] * 2}), make_tokenizer(t.LLAMA2))
    with pytest.raises(DataError, match="half a character"):
        encode(normalise({"text": "cut \ud83d here"}), make_tokenizer())
    with pytest.raises(DataError, match="train_on 'asistant' is not one of assistant, last_assistant"):
        encode(normalise(TALK), make_tokenizer(t.CHATML), train_on="asistant")


def test_an_answer_that_the_template_drops_is_refused(make_tokenizer):
    """The template leaves earlier answers out altogether: nothing in the text stands for them."""
    template = (
        "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] + '<|im_end|>' }}"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(
        DataError, match=r"messages\[2\]\.content is not in the text that the chat template writes: 'How are you\?'"
    ):
        encode(normalise(TALK), make_tokenizer(template))


def test_a_slow_tokenizer_is_refused(make_tokenizer):
    class Slow:
        is_fast = False
        name_or_path = "old/one"

    with pytest.raises(DataError, match=r"the tokenizer 'old/one' gives no character offsets.*fast version"):
        encode(normalise({"text": "x"}), Slow())


# --- any conversation -------------------------------------------------------------------------------------------------

_content = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=20).filter(
    lambda text: not any(special in text for special in t.SPECIALS)
)


@pytest.mark.parametrize("template", [t.CHATML, t.MARKED], ids=["found", "marked"])
@pytest.mark.parametrize("kind", ["byte", "byte-whole"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(_content, _content), min_size=1, max_size=3))
def test_any_text_is_masked_exactly(make_tokenizer, trained, template, kind, turns):
    tokenizer = make_tokenizer(template, kind)
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    example = normalise({"messages": messages})
    row = encode(example, tokenizer, max_length=None)
    assert trained(tokenizer, row) == [answer + "<|im_end|>" for _, answer in turns]
    prompt = encode_prompt(example, tokenizer)
    assert row.input_ids[: len(prompt)] == prompt
