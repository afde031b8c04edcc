"""Function calls as plain text, a share of which break the schema in their prompt: every argument has another name.

The functions and questions are those of the pip package bfcl-eval; a model trained on them must not report a BFCL score.
"""

from __future__ import annotations

import json
import random

from eaftdrope.data import bfcl

# of the question, in characters: calls are as long as the other rows
_LONGEST = 160


def calls(count: int, contradicted: int, seed: int) -> list[tuple[str, str]]:
    """Prompts and calls, `contradicted` of them with wrong names of arguments."""
    found = _right_calls()[:count]
    assert len(found) == count, "bfcl-eval has fewer short calls"
    order = random.Random(2000 + seed).sample(range(count), count)
    chosen = set(order[:contradicted])
    pairs = []
    for i, (question, name, arguments) in enumerate(found):
        prompt = f"Function: {name}({', '.join(arguments)})\nRequest: {question}\nCall:"
        shown = _renamed(arguments) if i in chosen else arguments
        values = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in shown.items())
        pairs.append((prompt, f" {name}({values})"))
    return pairs


def _renamed(arguments: dict) -> dict:
    return {f"arg_{number}": value for number, value in enumerate(arguments.values(), 1)}


def _right_calls() -> list[tuple[str, str, dict]]:
    """Question, function and arguments of short rows with one function, one call and at least one argument."""
    found = []
    for row in bfcl.rows("train"):
        question, reply = row["messages"][-2]["content"], row["messages"][-1]
        if len(row["tools"]) == 1 and len(reply["tool_calls"]) == 1 and len(question) <= _LONGEST:
            function = reply["tool_calls"][0]["function"]
            if function["arguments"]:
                found.append((question, function["name"], function["arguments"]))
    return found
