"""Rows that nobody would write, of every format, all the way: what cannot be used is a bad row, never a traceback.

`FUZZ_ROWS` is the number of rows (1,000; `make fuzz` sets 20,000); `FUZZ_SEED` another seed.
"""

import copy
import json
import os
import random

from eaftdrope.data import Source, detect_format, encode, iter_rows, normalise
from eaftdrope.data.formats import FORMATS
from eaftdrope.errors import DataError
from tests.data import chat_templates as t

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["x"]}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "q"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "r", "weight": 0},
    {"role": "tool", "content": {"a": [1, None]}, "tool_call_id": "c", "name": "f"},
    {"role": "assistant", "content": "a", "train": True},
]
TURNS = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": json.dumps(CALL["function"])},
    {"from": "observation", "value": "7"},
    {"from": "gpt", "value": "a", "thinking": "r"},
]
CHAT = (
    """USER: q\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": '{"x": 1}'} <|endoftext|>\n\n\nASSISTANT: a"""
)
ROWS = {
    "messages": {"messages": TALK, "tools": [TOOL], "ground_truth": [{"f": {"x": [1]}}], "id": 1},
    "sharegpt": {"conversations": TURNS, "system": "s", "tools": json.dumps([TOOL])},
    "alpaca": {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]], "system": "s"},
    "prompt_completion": {"prompt": TALK[:2], "completion": TALK[4:], "tools": [TOOL]},
    "text": {"text": "t", "title": "x"},
    "question_answer": {"question": "q", "answer": "a", "context": ["c"], "options": {"A": "x", "B": "y"}},
    "reasoning": {"Question": "q", "Complex_CoT": "r", "Response": "a"},
    "pubmedqa": {"question": "q", "context": {"contexts": ["c"]}, "final_decision": "yes", "long_answer": "a"},
    "xlam": {"query": "q", "tools": json.dumps([TOOL["function"]]), "answers": json.dumps([CALL["function"]])},
    "glaive": {"system": 'SYSTEM: - {"name": "f", "parameters": {}}', "chat": CHAT},
}
VALUES = [
    None,
    True,
    0,
    -1,
    0.5,
    1e999,
    10**40,
    "",
    " ",
    "x",
    "9" * 4301,
    "[" * 3000,
    "{",
    '{"a": 1, "a": 2}',
    "[]",
    [],
    {},
]
VALUES += [[[]], [None], [{}], {"": ""}, "\ud83d", "\0", "\ue0f0turn\ue0f1", "<image>", "</think>", "<|im_end|>", 2**63]
VALUES += [
    {"role": "user"},
    {"type": "text"},
    {"type": "image_url"},
    {"name": "f"},
    {"function": "f"},
    json.dumps(TALK),
]
KEYS = [
    "role",
    "content",
    "from",
    "value",
    "name",
    "arguments",
    "parameters",
    "function",
    "function_call",
    "tool_calls",
]
KEYS += [
    "reasoning_content",
    "thinking",
    "weight",
    "mask",
    "train",
    "train_detail",
    "type",
    "text",
    "tools",
    "functions",
]
KEYS += [
    "system",
    "system_prompt",
    "images",
    "refusal",
    "history",
    "context",
    "choices",
    "conversations",
    "\ud800",
    "",
    "é",
]


def spots(value):
    """(container, key) of every place in a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [spot for key, inner in items for spot in ((value, key), *spots(inner))]


def mutated(row, dice):
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3))):
        places = spots(row)
        if not places:
            break
        place, key = dice.choice(places)
        value = copy.deepcopy(dice.choice(VALUES))
        change = dice.randrange(8)
        if change == 0:
            place.pop(key)
        elif change == 1 and isinstance(place, dict):
            place[dice.choice(KEYS)] = value
        elif change == 2:
            place[key] = copy.deepcopy(dice.choice(places)[0])
        elif change == 3:
            place[key] = json.dumps(place[key])
        elif change == 4:
            for _ in range(dice.choice((3, 150))):
                place[key] = [place[key]] if dice.random() < 0.5 else {"a": place[key]}
        elif change == 5 and isinstance(place, dict):
            place[dice.choice(KEYS)] = place.pop(key)
        else:
            place[key] = value
    return row


def as_line(row, dice):
    """The row as a line of JSON, sometimes with a key twice, a number of 4,301 digits, deep nesting or broken bytes."""
    line = json.dumps(row, ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")
    damage = dice.randrange(40)
    if damage == 0:
        line = line[: dice.randrange(len(line))]
    elif damage == 1:
        line = line.replace(b"}", b', "content": "again", "content": "twice"}', 1)
    elif damage == 2:
        line = line.replace(b": 1", b": " + b"9" * 4301, 1)
    elif damage == 3:
        depth, parts = dice.choice((300, 900, 3000)), line.split(b": ")
        at = dice.randrange(1, len(parts)) if len(parts) > 1 else 0
        parts[at] = b"[" * depth + b"]" * depth + b', "z": ' + parts[at]
        line = b": ".join(parts)
    elif damage == 4:
        at = dice.randrange(len(line))
        line = line[:at] + bytes([dice.randrange(256)]) + line[at + 1 :]
    return line.replace(b"\n", b" ")


def test_rows_are_read_or_refused(make_tokenizer, tmp_path):
    dice = random.Random(int(os.environ.get("FUZZ_SEED", "10")))
    count = int(os.environ.get("FUZZ_ROWS", "1000"))
    kinds = list(ROWS)
    path = tmp_path / "rows.jsonl"
    lines = [as_line(mutated(copy.deepcopy(ROWS[kinds[n % len(kinds)]]), dice), dice) for n in range(count)]
    path.write_bytes(b"\n".join(line if line.strip() else b"{" for line in lines))
    tokenizers = [make_tokenizer(template) for template in (t.CHATML, t.QWEN)]
    outcomes = {"trained": 0, "refused": 0, "unread": 0}
    for number, row in enumerate(iter_rows(Source(str(path)))):
        if row.error is not None:
            outcomes["unread"] += 1
            continue
        try:
            format = dice.choice(("auto", "auto", "auto", *FORMATS))
            example = normalise(row.data, format, reasoning=dice.random() < 0.8)
            outcome = encode(example, tokenizers[number % 2], max_length=256)
            assert len(outcome.input_ids) == len(outcome.labels) <= 256
            outcomes["trained"] += 1
        except DataError:
            outcomes["refused"] += 1
        except Exception as error:
            error.add_note(f"row {number} of FUZZ_SEED, format {format}: {str(row.data)[:2000]}")
            raise
    assert number + 1 == count == sum(outcomes.values())
    # neither is everything refused nor nothing
    assert outcomes["trained"] > count / 10 and outcomes["refused"] > count / 10 and outcomes["unread"] > count / 100


def test_every_format_is_there():
    assert {"auto", *ROWS} == set(FORMATS)
    assert [detect_format(row) for row in ROWS.values()] == list(ROWS)
