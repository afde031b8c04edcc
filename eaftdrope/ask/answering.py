"""One question about a text: the reader that answers it, the answer, and what it cost."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from eaftdrope.data.chat import render_prompt
from eaftdrope.errors import UserError
from eaftdrope.evaluate.rlm.chat_models import open_chat_model
from eaftdrope.evaluate.suites.subject import find_subject
from eaftdrope.recipe.serve_section import ServedRLM
from eaftdrope.report.system import ANSWERS
from eaftdrope.rlm import RLM
from eaftdrope.rlm.baselines import answer_many, plain_prompt
from eaftdrope.rlm.journal import Event
from eaftdrope.rlm.models import HFModel
from eaftdrope.rlm.protocol import SYSTEM, SYSTEM_SHORT, Context
from eaftdrope.ttt.loading import find_ttt
from eaftdrope.ttt.state import TTTState

from .built import BuiltRun
from .choice import choose_method, count_tokens, joined
from .reader import ReadPiece, TTTReader, TTTReading

# of a digest that names a journal or a state
_DIGITS = 12


@dataclass(frozen=True)
class Answered:
    """An answer.

    Attributes:
        method: plain, ttt or rlm.
        text: "" if an RLM did not finish.
        finished, stopped: of an RLM: whether it set an answer, and the limit that ended it.
        text_tokens: of text and question.
        tokens: read and written by all models, those of a state or a journal that was there before included.
        cpu_seconds: of this process and those that it started, loading the models included.
        file: the journal of an RLM, or the state of a reader.
        notes: what a user should be told of how it was answered.
        pieces: what a reader read now, in pieces, with the loss and the time of each.
    """

    method: str
    text: str
    finished: bool
    stopped: str | None
    text_tokens: int
    tokens: int
    cpu_seconds: float
    file: Path | None = None
    notes: tuple[str, ...] = ()
    pieces: tuple[ReadPiece, ...] = field(default=(), repr=False)


class Models:
    """The models of a run, each loaded when it is first needed."""

    def __init__(self, run: BuiltRun, *, device: str = "cpu", dtype: str = "float32") -> None:
        self.run, self._device, self._dtype = run, device, dtype
        self._chat: dict[str, HFModel] = {}
        self._reader: TTTReader | None = None

    def chat(self, reference: str) -> HFModel:
        if reference not in self._chat:
            self._chat[reference] = open_chat_model(reference, device=self._device, dtype=self._dtype)
        return self._chat[reference]

    def reader(self) -> TTTReader | None:
        """The model of the stage ttt; None if the run has none."""
        if self.run.ttt is None:
            return None
        if self._reader is None:
            source = find_ttt(self.run.ttt, {})
            tokenizer = source.tokenizer()
            # the run's folder may be moved or copied: what was read before stays known
            name = f"{Path(self.run.ttt).name}@{find_subject(self.run.ttt).identity(tokenizer)[:_DIGITS]}"
            model = source.load(self._dtype, self._device)
            self._reader = TTTReader(model, tokenizer, name=name, policy=self.run.serve.ttt.policy)
        return self._reader

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer; weights are not loaded for it."""
        reference = self.run.plain or self.run.ttt
        assert reference is not None, "a run has a model"
        return find_subject(reference).tokenizer()

    def window(self) -> int | None:
        """Tokens of text and question that the model of plain can read beside its answer; None without that model."""
        if self.run.plain is None:
            return None
        subject = find_subject(self.run.plain)
        context = subject.config().get_text_config().max_position_embeddings
        empty = render_prompt([{"role": "user", "content": ""}], [], subject.tokenizer())
        around = count_tokens(subject.tokenizer(), empty)
        return max(0, context - around - self.run.serve.answer_tokens)


def answer(
    run: BuiltRun,
    context: Context,
    query: str,
    *,
    method: str = "auto",
    device: str = "cpu",
    dtype: str = "float32",
    watch: Callable[[Event], None] | None = None,
    chosen: Callable[[str, int], None] | None = None,
) -> Answered:
    """Answer a question about a text, or a list of documents.

    Args:
        method: plain, ttt, rlm, or auto: chosen by the number of tokens.
        watch: called with each event of the journal of an RLM.
        chosen: called with the method and the tokens of text and question, before anything is loaded.

    Raises:
        UserError: the method cannot read so long a text, or the run has no model for it.
    """
    began = _cpu_seconds()
    models = Models(run, device=device, dtype=dtype)
    tokens = count_tokens(models.tokenizer(), plain_prompt(joined(context), query))
    method = choose_method(run, method, tokens, models.window())
    if chosen is not None:
        chosen(method, tokens)
    if method == "rlm":
        found = _ask_rlm(models, context, query, watch)
    else:
        found = _ask_plain(models, context, query) if method == "plain" else _ask_reader(models, context, query)
    answered = Answered(method=method, text_tokens=tokens, cpu_seconds=_cpu_seconds() - began, **found)
    _keep(run, query, answered)
    return answered


def _keep(run: BuiltRun, query: str, answered: Answered) -> None:
    """Append the answer and its cost to the file that the run's report reads."""
    names = ("method", "finished", "stopped", "text_tokens", "tokens")
    entry = {"question": query, "answer": answered.text, **{name: getattr(answered, name) for name in names}}
    entry |= {
        "cpu_seconds": round(answered.cpu_seconds, 2),
        "pieces": [list(vars(p).values()) for p in answered.pieces],
    }
    run.asked.mkdir(parents=True, exist_ok=True)
    with (run.folder / ANSWERS).open("a", encoding="utf-8", errors="surrogatepass") as file:
        file.write(json.dumps(entry) + "\n")


def _cpu_seconds() -> float:
    """Of this process, its threads, and the processes that it started and that have ended."""
    return sum(os.times()[:4])


def _ask_plain(models: Models, context: Context, query: str) -> dict[str, Any]:
    run = models.run
    assert run.plain is not None
    model = models.chat(run.plain)
    messages = [{"role": "user", "content": plain_prompt(joined(context), query)}]
    try:
        # a baseline would cut the middle out
        model.check(messages, run.serve.answer_tokens)
    except ValueError as error:
        raise UserError(f"plain: {error} Use --method ttt or rlm.") from error
    (given,) = answer_many("plain", model, [(context, query)], max_tokens=run.serve.answer_tokens)
    return {"text": given.text, "finished": True, "stopped": None, "tokens": given.tokens}


def _ask_reader(models: Models, context: Context, query: str) -> dict[str, Any]:
    run, reader = models.run, models.reader()
    assert reader is not None
    texts = [context] if isinstance(context, str) else list(context)
    file = None if reader.policy == "reset" else run.asked / f"{_digest(reader.name, texts)}.safetensors"
    known = _known_state(reader, file)
    reading = TTTReading(reader, known)
    if known is None:
        reading.read(texts)
    messages = [{"role": "user", "content": query}]
    try:
        reading.check(messages, run.serve.answer_tokens)
    except ValueError as error:
        raise UserError(f"the question does not fit into the window of the reader: {error}") from error
    (reply,) = reading.generate([messages], run.serve.answer_tokens)
    state, notes = reading.state(), []
    if known is not None:
        notes.append(f"the text was read before: {file}")
    read = state.position
    if reader.policy == "accumulate":
        reading.note(query, reply.text)
        state = reading.state()
    if file is not None and (known is None or reader.policy == "accumulate"):
        file.parent.mkdir(parents=True, exist_ok=True)
        state.save(file)
    return {
        **{"text": reply.text.strip(), "finished": True, "stopped": None, "file": file, "notes": tuple(notes)},
        **{"tokens": read + reply.tokens_in + reply.tokens_out, "pieces": tuple(reading.pieces)},
    }


def _known_state(reader: TTTReader, file: Path | None) -> TTTState | None:
    """The state of a text that was read before; a file that a kill has cut is read again."""
    if file is not None and file.is_file():
        with suppress(ValueError):
            return TTTState.load(file, reader.model)
    return None


def _ask_rlm(models: Models, context: Context, query: str, watch: Callable[[Event], None] | None) -> dict[str, Any]:
    run, served = models.run, models.run.serve.rlm or ServedRLM()
    reference = served.root or run.plain
    assert reference is not None
    root = models.chat(reference)
    sub_model = models.chat(run.plain) if run.plain is not None else root
    reader = models.reader()
    engine = RLM(
        root,
        sub_model,
        reader=reader,
        limits=served.limits.resolved(),
        sandbox=served.sandbox,
        system=SYSTEM_SHORT if served.short_prompt else SYSTEM,
    )
    names = [root.name, sub_model.name, reader.name if reader else None]
    digest = _digest(names, served.model_dump(), context if isinstance(context, str) else list(context), query)
    file = run.asked / f"{digest}.jsonl"
    result = engine.complete(context, query, journal=file, watch=watch)
    usage = result.usage
    note = f"{result.turns} turns, {usage['sub_calls']:,} sub-calls, {usage['replayed']:,} calls from the journal"
    return {
        **{"text": result.answer, "finished": result.finished, "stopped": result.stopped, "file": file},
        **{"tokens": int(usage["tokens"]), "notes": (note,)},
    }


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]
