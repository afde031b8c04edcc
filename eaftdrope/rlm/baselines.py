"""What to compare a recursive language model with: the same model, called in the usual ways.

    (answer,) = answer_many("map-reduce", model, [(context, query)])

    plain        one call; of a text that does not fit, the middle is cut out
    map-reduce   notes on each part of half a window, then one call over the notes
    summary      notes carried from part to part, then one call over them
    bm25         one call over the passages that match the query best (the package bm25s)

A baseline is a generator that yields the conversations it wants answered, so that many tasks share the batches of a model.
`route` chooses between a plain call and a recursive language model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from eaftdrope.errors import UserError

from .models import Message, Model, Reply
from .protocol import Context, without_thinking

_Core = Generator[list[list[Message]], list[Reply], str]

# characters of a passage that BM25 ranks, and the passages in the call
_PASSAGE_CHARS = 800
_PASSAGES = 12
# no tokenizer has longer tokens on average
_MOST_CHARS_PER_TOKEN = 8

_ANSWER = "Question: {query}\nReply with the answer only."
_PLAIN = "{text}\n\n" + _ANSWER
_CUT = "\n[... {left_out:,} characters left out ...]\n"
_MAP = (
    "Part {number} of {count} of a text:\n{text}\n\nQuestion about the whole text: {query}\nNote briefly what this part "
    "contributes to the answer; for a count, the number in this part. If it contributes nothing, reply: nothing."
)
_REDUCE = "Notes on the parts of a text:\n{text}\n\n" + _ANSWER
_CARRY = (
    "Notes on a text so far:\n{notes}\n\nPart {number} of {count}:\n{text}\n\nQuestion about the whole text: {query}\nWrite "
    "the notes again, with what this part adds to the answer. Be brief."
)


@dataclass
class Answer:
    """An answer of a baseline and what it cost."""

    text: str = ""
    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0


def answer_many(
    name: str, model: Model, tasks: Sequence[tuple[Context, str]], *, max_tokens: int = 256
) -> list[Answer]:
    """Answer queries with a baseline, in lockstep: what they wait for is answered together.

    Args:
        name: one of `BASELINES`.
        tasks: (context, query) pairs.
        max_tokens: new tokens of a reply.

    Raises:
        UserError: a query does not fit into the window of the model.
    """
    answers = [Answer() for _ in tasks]
    cores = [BASELINES[name](model, context, query, max_tokens) for context, query in tasks]
    waiting = {index: next(core) for index, core in enumerate(cores)}
    while waiting:
        asked, waiting = waiting, {}
        replies = iter(model.generate([each for wanted in asked.values() for each in wanted], max_tokens))
        for index, wanted in asked.items():
            given = [next(replies) for _ in wanted]
            answers[index].calls += len(given)
            answers[index].tokens += sum(reply.tokens_in + reply.tokens_out for reply in given)
            answers[index].seconds += sum(reply.seconds for reply in given)
            try:
                waiting[index] = cores[index].send(given)
            except StopIteration as done:
                answers[index].text = done.value
    return answers


def plain(model: Model, context: Context, query: str, max_tokens: int) -> _Core:
    return (yield from _whole(model, _PLAIN, _joined(context), query, max_tokens))


def map_reduce(model: Model, context: Context, query: str, max_tokens: int) -> _Core:
    parts = _parts(model, _joined(context), query, max_tokens)
    notes = yield [
        _asked(_MAP.format(number=number, count=len(parts), text=part, query=query))
        for number, part in enumerate(parts, 1)
    ]
    joined = "\n".join(f"Part {number}: {_text(note)}" for number, note in enumerate(notes, 1))
    return (yield from _whole(model, _REDUCE, joined, query, max_tokens))


def summary(model: Model, context: Context, query: str, max_tokens: int) -> _Core:
    parts = _parts(model, _joined(context), query, max_tokens)
    notes = "(none)"
    for number, part in enumerate(parts, 1):
        prompt = _CARRY.format(notes=notes, number=number, count=len(parts), text=part, query=query)
        (reply,) = yield [_asked(prompt)]
        notes = _text(reply)
    return (yield from _whole(model, _REDUCE, notes, query, max_tokens))


def bm25(model: Model, context: Context, query: str, max_tokens: int) -> _Core:
    passages = _passages(context)
    ranked = _ranked(passages, query)[:_PASSAGES]
    # as many of the best as fit, in the order of the text
    while len(ranked) > 1 and not _fits(model, _PLAIN.format(text=_chosen(passages, ranked), query=query), max_tokens):
        ranked.pop()
    return (yield from _whole(model, _PLAIN, _chosen(passages, ranked), query, max_tokens))


BASELINES: dict[str, Callable[[Model, Context, str, int], _Core]] = {
    "plain": plain,
    "map-reduce": map_reduce,
    "summary": summary,
    "bm25": bm25,
}


def route(model: Model, context: Context, query: str, *, crossover: int = 2**14, max_tokens: int = 512) -> str:
    """Return "plain" for a context that a plain call of at most `crossover` tokens can hold, else "rlm".

    Below some length a model answers better from the text itself, and for less. For frontier models that is published
    as 2**14 tokens; for a small one `eaftdrope rlm bench` measures it.
    """
    text = _joined(context)
    if len(text) > _MOST_CHARS_PER_TOKEN * crossover:
        return "rlm"
    # a reply that leaves room for no more than the crossover
    reserved = max(max_tokens, model.window - crossover)
    return "plain" if _fits(model, plain_prompt(text, query), reserved) else "rlm"


# Prompts that fit


def plain_prompt(text: str, query: str) -> str:
    """The prompt of a plain call over a whole text."""
    return _PLAIN.format(text=text, query=query)


def _asked(prompt: str) -> list[Message]:
    return [{"role": "user", "content": prompt}]


def _text(reply: Reply) -> str:
    return without_thinking(reply.text).strip()


def _joined(context: Context) -> str:
    return context if isinstance(context, str) else "\n\n".join(context)


def _fits(model: Model, prompt: str, reserved: int) -> bool:
    try:
        model.check(_asked(prompt), reserved)
    except ValueError:
        return False
    return True


def _refuse(model: Model, prompt: str, reserved: int) -> None:
    """Raise what is wrong with a prompt that does not fit without any text."""
    try:
        model.check(_asked(prompt), reserved)
    except ValueError as error:
        raise UserError(f"the window of {model.name} is too small for the query without any text: {error}") from error


def _whole(model: Model, form: str, text: str, query: str, max_tokens: int) -> _Core:
    """One call over a text; of one that does not fit, the middle is cut out."""

    def prompt(kept: int) -> str:
        return form.format(text=_without_middle(text, kept), query=query)

    kept = _most(lambda chars: _fits(model, prompt(chars), max_tokens), len(text), model)
    if kept is None:
        _refuse(model, prompt(0), max_tokens)
    (reply,) = yield [_asked(prompt(kept or 0))]
    return _text(reply)


def _without_middle(text: str, kept: int) -> str:
    if kept >= len(text):
        return text
    head = kept - kept // 2
    return text[:head] + _CUT.format(left_out=len(text) - kept) + text[len(text) - kept // 2 :]


def _most(fits: Callable[[int], bool], chars: int, model: Model) -> int | None:
    """The largest number up to `chars` that fits; None if 0 does not."""
    chars = min(chars, _MOST_CHARS_PER_TOKEN * model.window)
    if fits(chars):
        return chars
    found = bisect_left(range(chars), True, key=lambda number: not fits(number)) - 1
    return None if found < 0 else found


def _parts(model: Model, text: str, query: str, max_tokens: int) -> list[str]:
    """A text cut at line ends into parts whose prompts take half of the window."""
    # of `_CARRY`, the notes are as long as a reply
    reserved = max(model.window // 2, 2 * max_tokens)

    def fits(part: str) -> bool:
        return _fits(model, _MAP.format(number=1, count=1, text=part, query=query), reserved)

    size = _most(lambda chars: fits(text[:chars]), len(text), model)
    if not size:
        _refuse(model, _MAP.format(number=1, count=1, text="", query=query), reserved)
    parts, start = [], 0
    while start < len(text) or not parts:
        part = _to_line_end(text, start, size or 1)
        while len(part) > 1 and not fits(part):
            # denser in tokens than the first one
            part = _to_line_end(text, start, len(part) * 3 // 4)
        parts.append(part)
        start += len(part)
    return parts


def _to_line_end(text: str, start: int, chars: int) -> str:
    """At most `chars` characters, to the end of a line if one ends among them."""
    if start + chars >= len(text):
        return text[start:]
    end = text.rfind("\n", start, start + chars) + 1
    return text[start : end if end > start else start + chars]


def _passages(context: Context) -> list[str]:
    """Pieces for BM25: lines together up to a size; a document begins a new one."""
    documents = [context] if isinstance(context, str) else context
    return [piece for document in documents for piece in _cut(document, _PASSAGE_CHARS)] or [""]


def _chosen(passages: Sequence[str], numbers: Iterable[int]) -> str:
    return "\n...\n".join(passages[number] for number in sorted(numbers))


def _ranked(passages: Sequence[str], query: str) -> list[int]:
    """Indices of passages, those that match the query best first."""
    import bm25s

    # its annotations have neither None nor what it returns
    tokenize: Any = bm25s.tokenize
    corpus, words = (tokenize(text, stopwords=None, show_progress=False) for text in (passages, query))
    if not corpus.vocab or not words.vocab:
        # the library does not rank a text without words
        return list(range(len(passages)))
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    best, _ = index.retrieve(words, k=min(_PASSAGES, len(passages)), show_progress=False)
    return [int(number) for number in best[0]]


def _cut(text: str, chars: int) -> Iterator[str]:
    start = 0
    while start < len(text):
        piece = _to_line_end(text, start, chars)
        yield piece
        start += len(piece)
