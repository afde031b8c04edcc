"""The words between the engine and a root model: prompts, blocks of code, and the ways to finish.

A reply's blocks (```repl, ```python, ```py) are run in order; the root is shown what they print. It finishes by setting
`answer["ready"] = True` in a block, or with FINAL(text) or FINAL_VAR(name) at the start of a line outside of blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Context = str | list[str]

SYSTEM = """\
You answer a query about `context`, a variable too long to read. Write Python in a ```repl block: you see what it prints,
cut to {output_chars} characters. Variables stay. You have:
- context: {kind}
- llm_query(prompt) -> str: ask a model that sees only this prompt (about {window} tokens)
- llm_query_batched(prompts) -> list[str]: several at once, much faster
- rlm_query(query, context) -> str: the same with its own REPL, for a text that is too long
- rlm_query_batched(queries, contexts) -> list[str]
{reading}\
{lacking}Finish with answer["content"] = ...; answer["ready"] = True in a block, or outside of one with FINAL(text) or
FINAL_VAR(name).
"""
# For a small model that is trained on it: a third of the tokens.
SYSTEM_SHORT = """\
Answer the query about the variable `context` ({kind}). Write Python in ```repl blocks; you see what it prints.
llm_query(prompt) asks a model. Finish with answer["content"] = ...; answer["ready"] = True
{reading}"""
_READING = """\
- read(texts): give passages to a reader; from then on llm_query and llm_query_batched ask it, and it has read all of them
"""
NOTHING_RUN = "Nothing was run: write a ```repl block, or finish."
NO_OUTPUT = "(no output)"

# The names that articles about RLM use. They repeat what Python offers, and each costs the root tokens on every turn.
HELPERS = """\
def get_context_length():
    return len(context)
def peek(start=0, length=1000):
    return context[start:start + length]
def search(pattern, limit=20):
    text = context if isinstance(context, str) else "\\n".join(context)
    return [text[max(0, m.start() - 80):m.end() + 80] for m in list(re.finditer(pattern, text))[:limit]]
def call_llm(prompt):
    return llm_query(prompt)
def set_answer(content):
    answer["content"] = str(content)
    answer["ready"] = True
def print_intermediate(value):
    print(value)
"""

_FENCE = re.compile(r"^[ \t]*```(?:repl|python|py)[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_ANY_FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_MARKER = re.compile(r"^[ \t]*(FINAL_VAR|FINAL)\(", re.MULTILINE)
_PAIRS = {"(": 1, ")": -1}


@dataclass(frozen=True)
class Parsed:
    """A reply of the root.

    Args:
        blocks: its code, in order.
        final: the text of FINAL(text), or None.
        variable: the name of FINAL_VAR(name), or None.
    """

    blocks: list[str]
    final: str | None = None
    variable: str | None = None


def parse(reply: str) -> Parsed:
    """The blocks of a reply, and its finish outside of them. A last block that is not closed counts: the model was cut."""
    reply = _closed(without_thinking(reply.replace("\r\n", "\n")))
    blocks = [match.group(1) for match in _FENCE.finditer(reply)]
    outside = _ANY_FENCE.sub("", reply)
    found = _MARKER.search(outside)
    if found is None:
        return Parsed(blocks)
    text = _balanced(outside, found.end())
    if found.group(1) == "FINAL_VAR":
        return Parsed(blocks, variable=text.strip().strip("\"'"))
    return Parsed(blocks, final=_unquoted(text.strip()))


def outside_of_code(reply: str) -> str:
    """A reply without its fenced blocks, thinking included."""
    return _ANY_FENCE.sub("", _closed(reply.replace("\r\n", "\n")))


def _closed(reply: str) -> str:
    """A reply whose last block is closed, also where the model was cut."""
    if len(re.findall(r"^[ \t]*```", reply, re.MULTILINE)) % 2:
        return reply.rstrip("\n") + "\n```"
    return reply


def without_thinking(reply: str) -> str:
    """A reply without the thoughts of a reasoning model, also where they do not end."""
    opened, closed = reply.find("<think>"), reply.find("</think>")
    if closed >= 0 and not 0 <= opened < closed:
        # a template may open it in the prompt
        reply = reply[closed + len("</think>") :]
    return _THINKING.sub("", reply)


def _balanced(text: str, start: int) -> str:
    """The text up to the bracket that closes the one before `start`; all of it if none does."""
    depth = 1
    for place in range(start, len(text)):
        depth += _PAIRS.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return text[start:]


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def describe(context: Context) -> str:
    """The type and length of a context."""
    if isinstance(context, str):
        return f"a str of {len(context):,} characters"
    return f"a list of {len(context):,} strings, {sum(map(len, context)):,} characters in all"


def first_messages(
    system: str,
    context: Context,
    query: str,
    *,
    preview_chars: int,
    output_chars: int,
    window: int,
    lacking: str,
    reads: bool = False,
) -> list[dict[str, str]]:
    """The messages that a run begins with.

    Args:
        system: the system prompt, with places for `kind`, `output_chars`, `window`, `reading` and `lacking`.
        window: of the sub-model, in tokens.
        lacking: a line about what the REPL's Python lacks, or "".
        reads: the REPL has `read`.
    """
    text = context if isinstance(context, str) else (context[0] if context else "")
    reading = _READING if reads else ""
    filled = system.format(
        kind=describe(context), output_chars=output_chars, window=window, reading=reading, lacking=lacking
    )
    return [
        {"role": "system", "content": filled},
        {"role": "user", "content": f"Query: {query}\nIt begins: {text[:preview_chars]!r}"},
    ]


def shortened(text: str, chars: int, total: int | None = None) -> str:
    """The head (two thirds) and the tail (a third) of a text, with the number of characters left out between.

    Args:
        text: the whole text; or, of a longer one of `total` characters, its head and tail joined.
    """
    total = len(text) if total is None else total
    if total <= chars:
        return text
    head, tail = text[: chars * 2 // 3], text[len(text) - chars // 3 :]
    return f"{head}\n[... {total - len(head) - len(tail):,} characters not shown ...]\n{tail}"


def shown(outputs: Sequence[str], chars: int, hidden: int = 0) -> str:
    """What the root is shown of a reply's cells.

    Args:
        outputs: of each its head and its tail, of at least `chars` each.
        hidden: the characters between them.
    """
    text = "\n".join(output for output in outputs if output)
    return shortened(text, chars, len(text) + hidden) or NO_OUTPUT
