"""Conversations of every kind, each value a word of its own, and a tokenizer for the chat templates that TRL carries."""

import importlib.util
import re
from pathlib import Path

CARRIED = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
PLAIN = sorted(path.stem for path in CARRIED.glob("*.jinja") if not path.stem.endswith("_training"))
TRAINING = [name for name in PLAIN if (CARRIED / f"{name}_training.jinja").exists()]
# <|...|>, <｜...｜>, <|...>, <...|>, <s>, <..._of_turn>, <end_of_utterance>
_SPECIAL = re.compile(r"<\|[\w ]+\|>|<｜[^｜]+｜>|<\|\w+>|<\w+\|>|</?s>|<(?:start|end)_of_\w+>")
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
    "<|return|>",
    "<end_of_utterance>",
    "</s>",
)


def carried(name):
    """The tokenizer of a template that TRL carries: one token a byte, the template's <...> words are special."""
    template = (CARRIED / f"{name}.jinja").read_text(encoding="utf-8")
    specials = set(_SPECIAL.findall(template))
    return byte_tokenizer(template, eos=next((end for end in _ENDS if end in specials), "<|endoftext|>"))


def byte_tokenizer(template, eos="<|im_end|>", specials=()):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys(["<pad>", "<bos>", eos, *specials, *sorted(_SPECIAL.findall(str(template)))]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *alphabet])}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        bos_token="<bos>",
        pad_token="<pad>",
        extra_special_tokens=special,
    )
    tokenizer.chat_template = template
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def says(text, *calls, thinks=None):
    message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = list(calls)
    return message if thinks is None else {**message, "reasoning_content": thinks}


def call(number=1, name="lookup", **arguments):
    arguments = arguments or {"key": f"ARG{number}"}
    return {"id": f"abc00000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, number=1):
    return {"role": "tool", "tool_call_id": f"abc00000{number}", "name": "lookup", "content": text}


_KEY = {"type": "string", "description": "KEYDESC"}
_PARAMETERS = {"type": "object", "properties": {"key": _KEY}, "required": ["key"]}
TOOLS = [{"type": "function", "function": {"name": "lookup", "description": "TOOLDESC", "parameters": _PARAMETERS}}]
_ASKED, _ANSWERED = user("USER1"), says("ANSWER1")
_NESTED = {"key": 'say "hi" <b> & ü\nARG1', "n": 1.0, "t": True, "z": None, "l": ["ARG2", {"d": "ARG3", "i": 12345}]}
CONVERSATIONS = {
    "plain": [_ASKED, _ANSWERED],
    "system": [{"role": "system", "content": "SYS1"}, _ASKED, _ANSWERED],
    "developer": [{"role": "developer", "content": "DEV1"}, _ASKED, _ANSWERED],
    "several turns": [_ASKED, _ANSWERED, user("USER2"), says("ANSWER2"), user("USER3"), says("ANSWER3")],
    "unicode": [user("USER1 Grüße 你好"), says("ANSWER1 naïve 😀\n\n日本"), user("USER2"), says("  ANSWER2  ")],
    "trailing user": [_ASKED, _ANSWERED, user("USER2")],
    "call": [_ASKED, says("", call()), result("RES1"), _ANSWERED],
    "call last": [_ASKED, says("", call())],
    "result last": [_ASKED, says("", call()), result("RES1")],
    "call with text": [_ASKED, says("SAY1", call()), result("RES1"), _ANSWERED],
    "parallel calls": [_ASKED, says("", call(1), call(2)), result("RES1"), result("RES2", 2), _ANSWERED],
    "calls in a row": [
        *(_ASKED, says("", call(1)), result("RES1"), says("", call(2)), result("RES2", 2), _ANSWERED),
        *(user("USER2"), says("ANSWER2")),
    ],
    "nested arguments": [_ASKED, says("", call(**_NESTED)), result("RES1"), _ANSWERED],
    "reasoning": [_ASKED, says("ANSWER1", thinks="THINK1")],
    "reasoning in two turns": [
        *(_ASKED, says("ANSWER1", thinks="THINK1")),
        *(user("USER2"), says("ANSWER2", thinks="THINK2")),
    ],
    "reasoning with call": [
        _ASKED,
        says("", call(), thinks="THINK1"),
        result("RES1"),
        says("ANSWER1", thinks="THINK2"),
    ],
    "reasoning, text and call": [_ASKED, says("SAY1", call(), thinks="THINK1"), result("RES1"), _ANSWERED],
    "<think> in content": [_ASKED, says("<think>\nTHINK1\n</think>\n\nANSWER1")],
}


def row(kind):
    """A row of this kind, with tools if it calls any."""
    messages = CONVERSATIONS[kind]
    return {"messages": messages} | ({"tools": TOOLS} if any("tool_calls" in message for message in messages) else {})


def stretches(text, marked):
    """The stretches of `text` at the characters that are marked."""
    found, begin = [], None
    for position, is_marked in enumerate([*marked, False]):
        if is_marked and begin is None:
            begin = position
        elif not is_marked and begin is not None:
            found.append(text[begin:position])
            begin = None
    return found
