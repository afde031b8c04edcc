"""Who answers: a model in this process, or a script (`served` has models behind a server). One method, batch first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eaftdrope.errors import UserError

Message = dict[str, str]


@dataclass(frozen=True)
class Reply:
    """An answer, the tokens read and written for it, and its share of the time of its batch."""

    text: str
    tokens_in: int
    tokens_out: int
    seconds: float = 0.0


class Model(Protocol):
    """A chat model. `name` identifies it in a journal; `window` is its context in tokens.

    A model that answers a batch in pieces also has `generate_each`, which yields (index, reply) as they come: a run that is
    killed in the middle of a batch keeps them.
    """

    name: str
    window: int

    def check(self, messages: list[Message], max_tokens: int) -> None:
        """
        Raises:
            ValueError: the conversation and its reply do not fit into the window; states how many tokens do.
        """

    def generate(self, batch: Sequence[list[Message]], max_tokens: int) -> list[Reply]:
        """Answer conversations, each of which fits."""
        ...


def generate_each(model: Model, batch: Sequence[list[Message]], max_tokens: int) -> Iterator[tuple[int, Reply]]:
    """Answer conversations, and yield (index, reply) as early as the model has them."""
    in_pieces = getattr(model, "generate_each", None)
    if in_pieces is not None:
        return in_pieces(batch, max_tokens)
    return enumerate(model.generate(batch, max_tokens))


def in_order(replies: Iterable[tuple[int, Reply]]) -> list[Reply]:
    """The replies of `generate_each` in the order of their conversations."""
    return [reply for _, reply in sorted(replies, key=lambda numbered: numbered[0])]


class ScriptedModel:
    """Replies from a list, or from a function of the messages: for tests, oracles and expert trajectories.

    Args:
        replies: the replies in order, or a function of a conversation.
        name: of the model in a journal, the same whatever the function.
        window: its context in tokens, counted as four characters each.

    Attributes:
        seen: the conversations that it was asked, in order.
    """

    def __init__(
        self, replies: Sequence[str] | Callable[[list[Message]], str], name: str = "scripted", window: int = 8192
    ) -> None:
        self.name, self.window = name, window
        self.seen: list[list[Message]] = []
        self._replies = replies

    def generate(self, batch: Sequence[list[Message]], max_tokens: int) -> list[Reply]:
        return [self._answer(messages) for messages in batch]

    def check(self, messages: list[Message], max_tokens: int) -> None:
        check_fits(_quarter(messages), max_tokens, self.window)

    def _answer(self, messages: list[Message]) -> Reply:
        number = len(self.seen)
        self.seen.append([dict(message) for message in messages])
        if callable(self._replies):
            text = self._replies(messages)
        elif number < len(self._replies):
            text = self._replies[number]
        else:
            raise ValueError(f"this scripted model has {len(self._replies)} replies and was asked once more.")
        return Reply(text, _quarter(messages), len(text) // 4)


def _quarter(messages: list[Message]) -> int:
    return sum(len(message["content"]) for message in messages) // 4


def check_fits(tokens: int, max_tokens: int, window: int) -> None:
    """
    Raises:
        ValueError: a prompt and its reply do not fit into the window.
    """
    if tokens + max_tokens > window:
        raise ValueError(f"the prompt has {tokens:,} tokens; {max(window - max_tokens, 0):,} fit. Send a shorter part.")


# stated because unset options come from the checkpoint
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}


class HFModel:
    """A transformers chat model in this process: greedy, in left-padded batches of similar lengths.

    In bfloat16 the reply to a prompt can depend on the other prompts of its batch; in float32 it does not.

    Args:
        model, tokenizer: as loaded.
        name: of the model in a journal.
        batch_size: prompts at once.
        window: its context in tokens; None: that of its configuration.

    Raises:
        UserError: it has no chat template, or one that refuses the messages of a run.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, batch_size: int = 8, window: int | None = None
    ) -> None:
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size
        self.window = window or model.config.get_text_config().max_position_embeddings
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # characters of a token, at most
        self._longest = max(map(len, tokenizer.get_vocab()))
        self._check_template()

    def _check_template(self) -> None:
        from jinja2 import TemplateError

        try:
            self._ids([{"role": role, "content": "text"} for role in ("system", "user", "assistant", "user")])
        except (TemplateError, ValueError) as error:
            raise UserError(
                f"{self.name} cannot be asked in turns with a system prompt ({str(error).splitlines()[0]}). Use a model "
                "whose tokenizer has a chat template for it."
            ) from error

    def generate(self, batch: Sequence[list[Message]], max_tokens: int) -> list[Reply]:
        return in_order(self.generate_each(batch, max_tokens))

    def generate_each(self, batch: Sequence[list[Message]], max_tokens: int) -> Iterator[tuple[int, Reply]]:
        prompts = [self._ids(messages) for messages in batch]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            yield from zip(rows, self._batch([prompts[row] for row in rows], max_tokens), strict=True)

    def check(self, messages: list[Message], max_tokens: int) -> None:
        # a text of megabytes, which code can make in no time, is not encoded: that takes half a minute
        if sum(len(message["content"]) for message in messages) > self._longest * self.window:
            raise ValueError(f"the prompt has more than {self.window:,} tokens. Send a shorter part.")
        check_fits(len(self._ids(messages)), max_tokens, self.window)

    def _ids(self, messages: list[Message]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _batch(self, prompts: list[list[int]], max_tokens: int) -> list[Reply]:
        import torch

        began = time.perf_counter()
        pad, longest = self.tokenizer.pad_token_id, max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.model.device)
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device
        )
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, pad_token_id=pad, **_GREEDY
            )
        seconds = (time.perf_counter() - began) / len(prompts)
        replies = []
        for prompt, new in zip(prompts, output[:, longest:].tolist(), strict=True):
            new = _up_to_stop(new, self._stop_tokens())
            replies.append(Reply(self.tokenizer.decode(new, skip_special_tokens=True), len(prompt), len(new), seconds))
        return replies

    def _stop_tokens(self) -> set[int]:
        stop = self.model.generation_config.eos_token_id
        return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


def _up_to_stop(ids: list[int], stop: set[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stop:
            return ids[: place + 1]
    return ids
