"""What is trained, for every chat template that TRL carries and every kind of conversation.

- What a row has is in its text; of that the assistant's words are trained, each once, and nobody else's (41 templates).
- For the templates of which TRL has a training variant, what is trained is what TRL's `{% generation %}` blocks hold (31),
  but for the differences in the tables below.
"""

import functools
import re

import pytest

from eaftdrope.data import encode, normalise
from eaftdrope.data.chat import _prepare, _template_for
from eaftdrope.errors import DataError
from tests.data.conversations import CONVERSATIONS, PLAIN, TRAINING, carried, row, stretches

# Kinds of conversation that a template cannot write, and the words of the refusal.
REFUSED = {
    ("gemma", "system"): "System role not supported",
    ("gemma", "developer"): "System role not supported",
    ("gemma4_v2", "reasoning with call"): r"writes messages\[1\]\.reasoning_content after the call",
    ("gemma4_v2", "reasoning, text and call"): r"writes messages\[1\]\.reasoning_content after the call",
    ("gptoss", "call with text"): r"messages\[1\]\.content is not in the text.*the text of a turn that also calls",
    ("gptoss", "parallel calls"): r"messages\[1\]\.tool_calls\[1\]\.function\.name is not.*only one call in a turn",
    ("gptoss", "reasoning, text and call"): "Cannot pass both content and thinking",
    (
        "muse_glimmer",
        "call with text",
    ): r"messages\[1\]\.content is not in the text.*the text of a turn that also calls",
    ("muse_glimmer", "reasoning, text and call"): r"messages\[1\]\.content is not in the text",
}
for _name in ("llama3_1", "llama3_2"):
    REFUSED |= {
        (_name, "call with text"): r"messages\[1\]\.content is not in the text.*the text of a turn that also calls",
        (_name, "parallel calls"): r"only supports single tool-calls at once! .*give each a turn of its own",
        (_name, "reasoning with call"): r"messages\[1\]\.reasoning_content is not in.*reasoning of a turn that calls",
        (
            _name,
            "reasoning, text and call",
        ): r"messages\[1\]\.reasoning_content is not in.*1 more: messages\[1\]\.content",
    }
# Templates that leave out the reasoning of turns that others follow, by design: a model does not see it at inference.
LEAVES_OUT = {
    (name, "reasoning in two turns"): ("messages[1].reasoning_content",)
    for name in (
        *("diffusion_gemma", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"),
        *("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
        *("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"),
    )
} | {("gptoss", "reasoning with call"): ("messages[1].reasoning_content",)}

# --- where TRL's blocks hold something else ---

# In front of ours: the head of the turn, which the generation prompt has, so that no model gets to write it ...
_HEADS = {
    "deepseek_r1_distill": r"<｜Assistant｜>(<think>\n)?",
    "deepseekv3": r"<｜Assistant｜>(<think>\n)?",
    "gptoss": r"<\|start\|>assistant",
    "muse_glimmer": r"<\|start\|>assistant",
    "qwen2_5": r"\n",
}
# ... with an opened thought, or the empty one that such a template writes for an answer without (the training variants
# keep the reasoning of earlier turns as well).
for _name in ("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"):
    _HEADS[_name] = r"<think>\n((THINK1)?\n</think>\n\n)?"
for _name in ("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"):
    _HEADS[_name] = r"<think>(</think>|\n)"
# Behind ours: white space behind the stop token, which no model gets to write, and what Phi's template appends to that.
_TAIL = r"\s*(<\|endoftext\|>)?"
# DiffusionGemma calls end in <|tool_response>, which stops the model: it is trained. Behind a result the generation prompt
# has no head of a turn, but the text does: the model has to write it.
_OURS_MORE = {"diffusion_gemma": (r"(<\|turn>model\n)?", r"(<\|tool_response>)?")}
# Kinds of conversation that are equal, but for the white space behind the stop token, and with other differences.
COUNTS = {
    **dict.fromkeys(("cohere", "cohere2", "glm4moe", "llama3", "llava_next"), (18, 0, 0)),
    **dict.fromkeys(("gemma3", "idefics3", "lfm2", "lfm2_v2", "qwen2_5_vl"), (0, 18, 0)),
    **dict.fromkeys(("qwen3_instruct_2507", "qwen3_vl", "smolvlm"), (0, 18, 0)),
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3", "qwen2_5", "qwen3_5_nothink"), (0, 0, 18)),
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8", "nemotron_3_5_lightning"), (0, 0, 18)),
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"), (0, 0, 18)),
    **{"diffusion_gemma": (0, 11, 7), "gemma": (0, 16, 0), "gptoss": (0, 0, 15), "muse_glimmer": (0, 0, 16)},
    **{"phi3": (0, 2, 16), "phi3_5": (0, 2, 16), "qwen3": (0, 8, 10)},
}


@functools.cache
def _encoded(name, kind):
    tokenizer = carried(name)
    return tokenizer, encode(normalise(row(kind)), tokenizer, max_length=None)


def _trained(tokenizer, encoded):
    """Stretches of trained tokens, decoded."""
    found, run = [], []
    for token, label in [*zip(encoded.input_ids, encoded.labels), (None, -100)]:
        if label == -100 and run:
            found.append(tokenizer.decode(run))
            run = []
        elif label != -100:
            run.append(token)
    return found


@pytest.mark.parametrize("name", PLAIN)
def test_the_assistant_alone_is_trained_and_nothing_is_lost(name):
    for kind in CONVERSATIONS:
        if (name, kind) in REFUSED:
            with pytest.raises(DataError, match=REFUSED[name, kind]):
                _encoded(name, kind)
            continue
        tokenizer, encoded = _encoded(name, kind)
        text, kept = tokenizer.decode(encoded.input_ids), "|".join(_trained(tokenizer, encoded))
        assert encoded.dropped == LEAVES_OUT.get((name, kind), ()), kind
        left_out = {"THINK1"} if encoded.dropped else set()
        for word in set(re.findall(r"[A-Z]+\d", repr(row(kind)))) - left_out:
            assert word in text, (kind, word)
            own = word.startswith(("ANSWER", "SAY", "THINK", "ARG"))
            assert kept.count(word) == own, (kind, word, kept)
        assert left_out.isdisjoint(re.findall(r"[A-Z]+\d", text))
        assert not re.search("DESC|12345" if "nested" not in kind else "DESC", kept)
        assert encoded.stop, kind


@pytest.mark.parametrize("name", TRAINING)
def test_what_is_trained_is_what_trl_trains(name):
    equal = spaced = differing = 0
    before, behind = _OURS_MORE.get(name, ("", ""))
    for kind in CONVERSATIONS:
        if (name, kind) in REFUSED:
            continue
        ours, theirs = _trained(*_encoded(name, kind)), _marked_by_trl(name, kind)
        assert len(ours) == len(theirs), (kind, ours, theirs)
        for mine, other in zip(ours, theirs):
            core = re.sub(rf"\A{before}|{behind}\Z", "", mine) if before else mine
            assert re.fullmatch(rf"({_HEADS.get(name, '')})?{re.escape(core)}{_TAIL}", other), (kind, mine, other)
        but_spaces = ours == [other.rstrip() for other in theirs]
        equal += ours == theirs
        spaced += but_spaces and ours != theirs
        differing += not but_spaces and ours != theirs
    assert (equal, spaced, differing) == COUNTS[name]


def _marked_by_trl(name, kind):
    """The text of TRL's `{% generation %}` blocks, those that touch as one."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = carried(f"{name}_training")
    example = normalise(row(kind))
    messages, tools = _prepare(
        example.messages, example.tools, _template_for(example.messages, example.tools, tokenizer)
    )
    (text,), (blocks,) = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    marked = [False] * len(text)
    for start, end in blocks:
        marked[start:end] = [True] * (end - start)
    return [stretch.replace("\ue0f2", "</think>") for stretch in stretches(text, marked)]
