"""A model that learns as it reads, as the reader of an RLM's passages and of whole texts.

    reading = TTTReader(model, tokenizer, name="mine").begin()
    reading.read(["first passage", "second passage"])
    (reply,) = reading.generate([[{"role": "user", "content": "Who?"}]], max_tokens=64)

What a question finds in the state, and leaves there, is the policy:

    reset         only the passages of the last `read`
    fork          all passages in order; a question leaves nothing
    accumulate    all passages, and the questions with their answers, in the order in which they came

Nothing is read before something is asked: a run that is answered from its journal reads nothing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from eaftdrope.data.chat import render_prompt
from eaftdrope.errors import UserError
from eaftdrope.evaluate.generation import stop_token_ids
from eaftdrope.evaluate.likelihood import bos_prefix
from eaftdrope.rlm.models import Message, Reply, check_fits, in_order
from eaftdrope.ttt.fast_mlps import fast_mlps
from eaftdrope.ttt.reading import read_pieces
from eaftdrope.ttt.state import TTTState
from eaftdrope.versions import cache_argument

_BETWEEN = "\n\n"
_DIGITS = 12


@dataclass(frozen=True)
class ReadPiece:
    """A piece of what was read: its tokens up to `end`, their mean loss in nats (None: a first token), and the seconds."""

    end: int
    tokens: int
    loss: float | None
    seconds: float


class TTTReader:
    """A model with TTT that reads passages and answers questions about them; greedy.

    Args:
        model: with TTT applied.
        tokenizer: with a chat template.
        name: of the model in a journal.
        policy: one of `POLICIES`.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, name: str, policy: str = "fork") -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"{name} has no chat template, and a question is a turn of a chat. Train it on conversations."
            )
        self.model, self.tokenizer, self.policy = model, tokenizer, policy
        self.name = f"{name}, {policy}"

    def begin(self) -> TTTReading:
        """See `Reader.begin`."""
        return TTTReading(self)


class TTTReading:
    """See `eaftdrope.rlm.reader.Reading`.

    Args:
        state: of what was read before, which stays as it is; a fresh one by default.
    """

    def __init__(self, reader: TTTReader, state: TTTState | None = None) -> None:
        self._reader = reader
        self._state = state or TTTState(reader.model)
        # what is still to be read, and a digest of everything
        self._waiting: list[list[int]] = []
        self._digest = hashlib.sha256()
        self.remembers = reader.policy == "accumulate"
        self.pieces: list[ReadPiece] = []

    @property
    def name(self) -> str:
        return f"{self._reader.name}, after {self._digest.hexdigest()[:_DIGITS]}"

    @property
    def window(self) -> int:
        """Tokens that are in view at once: a question and its answer have to fit."""
        model = self._reader.model
        return fast_mlps(model).config.window or model.config.get_text_config().max_position_embeddings

    def count(self, texts: Sequence[str]) -> int:
        return sum(len(self._encode(text)) for text in texts)

    def read(self, texts: Sequence[str]) -> None:
        if self._reader.policy == "reset":
            self._state, self._waiting, self._digest = TTTState(self._reader.model), [], hashlib.sha256()
        for text in texts:
            self._take(["text", text], self._encode(text))

    def note(self, prompt: str, reply: str) -> None:
        self._take(["asked", prompt, reply], [*self._question(prompt), *self._encode(reply)])

    def check(self, messages: list[Message], max_tokens: int) -> None:
        check_fits(len(self._question(_prompt(messages))), max_tokens, self.window)

    def generate(self, batch: Sequence[list[Message]], max_tokens: int) -> list[Reply]:
        return in_order(self.generate_each(batch, max_tokens))

    def generate_each(self, batch: Sequence[list[Message]], max_tokens: int) -> Iterator[tuple[int, Reply]]:
        """Answer each question from a fork of what was read so far."""
        state = self.state()
        for index, messages in enumerate(batch):
            yield index, self._answer(state.fork(), _prompt(messages), max_tokens)

    def state(self) -> TTTState:
        """The state after everything that was to be read."""
        ids = [token for part in self._waiting for token in part]
        self._waiting = []
        if ids and self._state.position == 0:
            ids = bos_prefix(self._reader.tokenizer) + ids
        if ids:
            for piece in read_pieces(self._reader.model, self._state, ids):
                self._state = piece.state
                loss = piece.nll.mean().item() if len(piece.nll) else None
                self.pieces.append(ReadPiece(piece.state.position, piece.tokens, loss, piece.seconds))
        return self._state

    def _take(self, what: list[str], ids: list[int]) -> None:
        between = self._encode(_BETWEEN) if self._waiting or self._state.position else []
        self._waiting.append([*between, *ids] if what[0] == "text" else ids)
        # each entry by its length, so that two lists of texts never look alike
        self._digest.update(json.dumps(what, ensure_ascii=False).encode("utf-8", "surrogatepass"))

    def _encode(self, text: str) -> list[int]:
        return self._reader.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _question(self, prompt: str) -> list[int]:
        return question_tokens(self._reader.tokenizer, prompt, is_fresh=False)

    def _answer(self, state: TTTState, prompt: str, max_tokens: int) -> Reply:
        reader, began = self._reader, time.perf_counter()
        is_fresh = state.position == 0
        ids = question_tokens(reader.tokenizer, prompt, is_fresh=is_fresh)
        new = greedy_answer(reader.model, reader.tokenizer, state, ids, max_tokens)
        text = reader.tokenizer.decode(new, skip_special_tokens=True)
        return Reply(text, len(ids), len(new), time.perf_counter() - began)


def question_tokens(
    tokenizer: PreTrainedTokenizerBase, question: str, *, is_fresh: bool, raw: bool = False
) -> list[int]:
    """The tokens of a question after what a state has read: with a BOS token only where nothing was read before.

    Args:
        raw: continue the text as it is, without the chat template.
    """
    text = question if raw else render_prompt([{"role": "user", "content": question}], [], tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    bos = bos_prefix(tokenizer) if raw else [tokenizer.bos_token_id]
    if is_fresh:
        return bos + ids if raw else ids
    return ids[1:] if ids[:1] == bos and not _opens_turns(tokenizer, ids[0]) else ids


def _opens_turns(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a BOS token is also what begins every turn, as in ChatML: then it belongs to the question."""
    text = render_prompt([{"role": "user", "content": "a"}], [], tokenizer)
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids.count(token) > 1


def generation_settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float | None = None
) -> GenerationConfig:
    """Greedy, or drawn at a temperature; everything is stated, because unset options come from the checkpoint."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=temperature is not None,
        temperature=1.0 if temperature is None else temperature,
        top_k=50 if temperature is None else 0,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )


def greedy_answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, state: TTTState, prompt: list[int], max_tokens: int
) -> list[int]:
    """The tokens of the answer; `state` reads the prompt and the answer."""
    ids = torch.tensor([prompt], device=model.device)
    # as long as what was read and the prompt together: the tokens that were read are not passed again
    mask = torch.ones(1, state.position + len(prompt), dtype=torch.long, device=model.device)
    settings = generation_settings(model, tokenizer, max_tokens)
    found = model.generate(ids, attention_mask=mask, **cache_argument(state), generation_config=settings)
    return found[0, len(prompt) :].tolist()


def _prompt(messages: list[Message]) -> str:
    (message,) = messages
    return message["content"]
