"""The functions that code in the REPL can call: what each checks, and which models it calls.

    llm_query, llm_query_batched     the sub-model; the reader, once code has read something
    rlm_query, rlm_query_batched     a child with a REPL of its own, or at the last depth the same as llm_query
    read                             passages for the reader, if the run has one

A mistake of the code is a TypeError or a ValueError, which it can catch; a limit is a LimitReached, which it never sees.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from .calls import Calls, Core, Run, in_lockstep, replies_to
from .limits import LimitReached, Limits
from .models import Message, Model
from .protocol import Context
from .reader import Reader, Reading

# children at once: each has a REPL of its own, with memory of its own
CHILDREN = 8
# no tokenizer has longer tokens on average
_MOST_CHARS_PER_TOKEN = 16


class HostFunctions:
    """The host's side of the functions in the REPL, by their names with an underscore."""

    sub_model: Model
    reader: Reader | None
    limits: Limits

    @abstractmethod
    def _conversation(self, run: Run, context: Context, query: str, place: str, depth: int) -> Core[Any]:
        """A child's conversation from its first message to its result."""

    def _llm_query(self, run: Run, place: str, depth: int, prompt: Any) -> Core[str]:
        replies = yield from self._llm_query_batched(run, place, depth, [prompt])
        return replies[0]

    def _llm_query_batched(self, run: Run, place: str, depth: int, prompts: Any) -> Core[list[str]]:
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt for prompt in prompts):
            raise TypeError("llm_query takes a non-empty string, llm_query_batched a list of them")
        # before a million prompts are counted in tokens
        run.budget.check_calls(len(prompts))
        reading = run.readings.get(place)
        model = self.sub_model if reading is None else reading
        conversations: list[list[Message]] = [[{"role": "user", "content": prompt}] for prompt in prompts]
        for messages in conversations:
            model.check(messages, self.limits.sub_tokens)
        run.budget.reserve_calls(len(prompts))
        if reading is not None and reading.remembers:
            return (yield from self._in_turn(run, place, reading, prompts))
        calls = Calls(run, f"{place}.sub", model, conversations, self.limits.sub_tokens, prompts)
        replies = yield from replies_to(calls)
        return [reply.text for reply in replies]

    def _in_turn(self, run: Run, place: str, reading: Reading, prompts: list[str]) -> Core[list[str]]:
        """Ask a reader that remembers: each question after the answers to those before it."""
        texts = []
        for prompt in prompts:
            messages: list[Message] = [{"role": "user", "content": prompt}]
            calls = Calls(run, f"{place}.sub", reading, [messages], self.limits.sub_tokens, [prompt])
            (reply,) = yield from replies_to(calls)
            reading.note(prompt, reply.text)
            texts.append(reply.text)
        return texts

    def _read(self, run: Run, place: str, depth: int, texts: Any) -> Core[int]:
        """Let the reader read passages; what they cost in tokens is counted before anything is read."""
        passages = [texts] if isinstance(texts, str) else texts
        if not isinstance(passages, list) or not all(isinstance(text, str) and text for text in passages):
            raise TypeError("read takes a non-empty string or a list of them")
        assert self.reader is not None, "the sandbox offers read only with a reader"
        left = self.limits.tokens - run.budget.tokens
        chars = sum(map(len, passages))
        if chars > _MOST_CHARS_PER_TOKEN * left:
            # a text of megabytes takes seconds to be counted
            raise LimitReached(f"tokens: {chars:,} characters to read, and {left:,} tokens left")
        reading = run.readings.get(place) or self.reader.begin()
        tokens = reading.count(passages)
        if tokens > left:
            raise LimitReached(f"tokens: {tokens:,} to read, and {left:,} left")
        run.budget.tokens += tokens
        if passages:
            reading.read(passages)
            run.readings[place] = reading
        run.journal.write("read", place=place, texts=len(passages), chars=chars, tokens=tokens)
        yield from ()
        return tokens

    def _rlm_query(self, run: Run, place: str, depth: int, query: Any, context: Any = None) -> Core[str]:
        answers = yield from self._rlm_query_batched(run, place, depth, [query], [context])
        return answers[0]

    def _rlm_query_batched(self, run: Run, place: str, depth: int, queries: Any, contexts: Any) -> Core[list[str]]:
        if not isinstance(queries, list) or not isinstance(contexts, list) or len(queries) != len(contexts):
            raise TypeError("rlm_query_batched takes a list of queries and a list of as many contexts")
        if not all(isinstance(query, str) and query for query in queries):
            raise TypeError("rlm_query takes a non-empty string")
        if not (all(context is None for context in contexts) or all(map(is_context, contexts))):
            raise TypeError(
                "the context of rlm_query is a string or a list of strings; of a batch, all have one or none has"
            )
        if depth >= self.limits.depth or all(context is None for context in contexts):
            # at the last depth, or without a text of its own, a child is a plain call
            prompts = [_with_context(query, context) for query, context in zip(queries, contexts, strict=True)]
            return (yield from self._llm_query_batched(run, place, depth, prompts))
        run.budget.reserve_calls(len(queries))
        children = [
            self._conversation(run, context, query, run.child_of(place), depth + 1)
            for query, context in zip(queries, contexts, strict=True)
        ]
        results = []
        for start in range(0, len(children), CHILDREN):
            results += yield from in_lockstep(children[start : start + CHILDREN])
        run.budget.check()
        unfinished = next((result for result in results if not result.finished), None)
        if unfinished is not None:
            raise ValueError(f"rlm_query did not finish: {unfinished.stopped}")
        return [result.answer for result in results]


def is_context(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value))


def _with_context(query: str, context: Any) -> str:
    if context is None:
        return query
    text = context if isinstance(context, str) else "\n\n".join(map(str, context))
    return f"{query}\n\n{text}"
