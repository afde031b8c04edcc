"""A run: the root model writes code, the code calls sub-models, until it sets an answer or a limit ends it.

The core is a generator that yields the calls it wants answered. `complete` drives one; `complete_many` drives many in
lockstep and answers all waiting calls together. Every limit is checked on the host, where a model is called or before, so
no code can evade one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eaftdrope.errors import UserError

from .calls import Calls, Core, Run, drive, in_lockstep, replies_to
from .cpython import CPythonSandbox
from .functions import HostFunctions, is_context
from .journal import Event, Journal
from .limits import Budget, LimitReached, Limits
from .models import Message, Model
from .protocol import HELPERS, NOTHING_RUN, SYSTEM, Context, describe, first_messages, parse, shown
from .reader import Reader
from .sandbox import READ, TOOLS, HostCall, MontyInBubblewrap, MontySandbox, Outcome, Sandbox

SANDBOXES: dict[str, type[Sandbox]] = {
    "monty": MontySandbox,
    "monty+bubblewrap": MontyInBubblewrap,
    "cpython": CPythonSandbox,
}


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Args:
        answer: "" if it did not finish.
        finished: the model set an answer itself.
        stopped: the limit that ended the run, or None.
        turns: replies of the root.
        usage: tokens, sub_calls, seconds, and calls that were replayed from the journal.
        messages: the root's conversation.
        journal: the file of the journal, or None.
    """

    answer: str
    finished: bool
    stopped: str | None
    turns: int
    usage: dict[str, float]
    messages: list[Message]
    journal: Path | None = None


class RLM(HostFunctions):
    """A recursive language model.

    Args:
        model ([`~eaftdrope.rlm.models.Model`]): the root: it reads the query, and writes code.
        sub_model ([`~eaftdrope.rlm.models.Model`], *optional*): answers llm_query; the root's model by default.
        reader ([`~eaftdrope.rlm.reader.Reader`], *optional*): offers `read(texts)` in the REPL; once code has read
            something, llm_query asks the reader.
        limits ([`Limits`], *optional*): what a run may use.
        sandbox (`str`, *optional*, defaults to `"monty"`): where code runs, one of `SANDBOXES`.
        system (`str`, *optional*): the system prompt, with places for `kind`, `output_chars`, `window`, `reading` and
            `lacking`.
        helpers (`bool`, *optional*, defaults to `False`): offer the names that articles use (`peek`, `search`, ...).

    Raises:
        UserError: an unknown sandbox, or one that this machine does not have.
    """

    def __init__(
        self,
        model: Model,
        sub_model: Model | None = None,
        *,
        reader: Reader | None = None,
        limits: Limits | None = None,
        sandbox: str = "monty",
        system: str = SYSTEM,
        helpers: bool = False,
    ) -> None:
        if sandbox not in SANDBOXES:
            raise UserError(f"unknown sandbox {sandbox!r}. Sandboxes: {', '.join(SANDBOXES)}.")
        SANDBOXES[sandbox].require()
        self.model, self.sub_model, self.reader = model, sub_model or model, reader
        self.limits = limits or Limits()
        self.sandbox, self.system, self.helpers = sandbox, system, helpers

    def complete(
        self,
        context: Context | Path,
        query: str,
        *,
        journal: str | Path | None = None,
        watch: Callable[[Event], None] | None = None,
    ) -> Result:
        """Answer a query about a context.

        Args:
            context (`str`, `list[str]` or `Path`): the text; a list of documents; or a file of text.
            query (`str`): the question.
            journal (`str` or `Path`, *optional*): file to write, or to resume from.
            watch (`Callable[[Event], None]`, *optional*): called with each event of the journal, as it is written.

        Raises:
            UserError: a wrong context; a journal of another run.
        """
        return self.complete_many([(context, query)], journals=[journal], watch=watch)[0]

    def complete_many(
        self,
        tasks: Sequence[tuple[Context | Path, str]],
        *,
        journals: Sequence[str | Path | None] | None = None,
        watch: Callable[[Event], None] | None = None,
    ) -> list[Result]:
        """Answer many queries, in lockstep: what they wait for is answered in one batch per round.

        Args:
            tasks: (context, query) pairs.
            journals: a file per task, or None.
            watch: called with each event of the journals, as it is written.
        """
        given = [None] * len(tasks) if journals is None else journals
        with contextlib.ExitStack() as opened:
            cores = [
                self._whole(_as_context(context), query, opened.enter_context(contextlib.closing(Journal(path, watch))))
                for (context, query), path in zip(tasks, given, strict=True)
            ]
            return drive(in_lockstep(cores))

    def _whole(self, context: Context, query: str, journal: Journal) -> Core[Result]:
        """A run from its first event to its last."""
        journal.begin(self._identity(context, query))
        run = Run(journal, Budget(self.limits))
        result = yield from self._conversation(run, context, query, "root", 1)
        values = {"answer": result.answer, "finished": result.finished, "stopped": result.stopped}
        tokens, calls = result.usage["tokens"], result.usage["sub_calls"]
        journal.write("end", **values, turns=result.turns, tokens=tokens, sub_calls=calls)
        return result

    def _identity(self, context: Context, query: str) -> dict[str, Any]:
        """What must be the same for a journal to be resumed."""
        return {
            "context": _digest(context),
            "described": describe(context),
            "query": query,
            "limits": asdict(self.limits),
            "model": self.model.name,
            "sub_model": self.sub_model.name,
            "reader": None if self.reader is None else self.reader.name,
            "windows": [self.model.window, self.sub_model.window],
            "sandbox": self.sandbox,
            "system": _digest(self.system),
            "helpers": self.helpers,
        }

    # One conversation: the root's, or a child's

    def _conversation(self, run: Run, context: Context, query: str, place: str, depth: int) -> Core[Result]:
        limits, kind = self.limits, SANDBOXES[self.sandbox]
        messages = first_messages(
            self.system,
            context,
            query,
            preview_chars=limits.preview_chars,
            output_chars=limits.output_chars,
            window=self.sub_model.window,
            reads=self.reader is not None,
            lacking=kind.lacking,
        )
        run.journal.write("start", place=place, messages=[dict(message) for message in messages])
        turn, answer, stopped = 0, None, None
        tools = TOOLS if self.reader is None else (*TOOLS, READ)
        box = kind(replace(limits, cell_seconds=min(limits.cell_seconds, limits.seconds)), tools)
        try:
            yield from self._prepare(run, box, context, place, depth)
            for turn in range(1, limits.iterations + 1):
                run.budget.check()
                self._check_root(messages)
                (reply,) = yield from replies_to(Calls(run, place, self.model, [list(messages)], limits.root_tokens))
                messages.append({"role": "assistant", "content": reply.text})
                answer, text = yield from self._turn(run, box, reply.text, place, depth)
                if answer is not None:
                    break
                messages.append({"role": "user", "content": text})
                run.journal.write("turn", place=place, turn=turn, shown=text)
            else:
                stopped = f"iterations: {limits.iterations} replies without an answer"
        except LimitReached as limit:
            stopped = str(limit)
        finally:
            box.close()
        run.journal.write("stop", place=place, turn=turn, answer=answer, stopped=stopped)
        usage = {
            "tokens": run.budget.tokens,
            "sub_calls": run.budget.sub_calls,
            "seconds": run.budget.seconds,
            "replayed": run.journal.replayed,
        }
        return Result(answer or "", answer is not None, stopped, turn, usage, messages, run.journal.path)

    def _check_root(self, messages: list[Message]) -> None:
        try:
            self.model.check(messages, self.limits.root_tokens)
        except ValueError as error:
            raise LimitReached(f"window of the root: {error}") from error

    def _prepare(self, run: Run, box: Sandbox, context: Context, place: str, depth: int) -> Core[None]:
        try:
            box.set({"context": context, "answer": {"content": "", "ready": False}})
        except UserError as error:
            if depth == 1:
                raise
            # made by the code of its parent
            raise LimitReached(f"memory: {error}") from error
        if self.helpers:
            yield from self._cell(run, box, f"import re\n{HELPERS}", place, depth)

    def _turn(self, run: Run, box: Sandbox, reply: str, place: str, depth: int) -> Core[tuple[str | None, str]]:
        """Run a reply's blocks; return the answer, or None and what the root is shown."""
        parsed, outputs, hidden, failed = parse(reply), [], 0, False
        for code in parsed.blocks:
            cell = yield from self._cell(run, box, code, place, depth)
            run.journal.write("cell", place=place, output=cell.output, error=cell.error, stopped=cell.stopped)
            outputs.append(cell.output)
            hidden += cell.hidden
            if cell.error is not None:
                # the rest of the reply was written for another state
                outputs.append(cell.error)
                failed = True
                break
            try:
                answer = _ready(box)
            except (NameError, ValueError, RecursionError) as error:
                outputs.append(f"answer: {error}")
                continue
            if answer is not None:
                return answer, ""
        if not failed and parsed.final is not None:
            return parsed.final, ""
        if not failed and parsed.variable is not None:
            try:
                return str(box.get(parsed.variable)), ""
            except (NameError, ValueError, RecursionError) as error:
                outputs.append(f"FINAL_VAR: {error}")
        if not parsed.blocks and not outputs:
            return None, NOTHING_RUN
        return None, shown(outputs, self.limits.output_chars, hidden)

    def _cell(self, run: Run, box: Sandbox, code: str, place: str, depth: int) -> Core[Any]:
        """Run a block of code and answer its host calls."""
        steps = box.run(code)
        try:
            call = next(steps)
            while True:
                outcome = yield from self._host_call(run, call, place, depth)
                call = steps.send(outcome)
        except StopIteration as done:
            return done.value
        finally:
            steps.close()

    def _host_call(self, run: Run, call: HostCall, place: str, depth: int) -> Core[Outcome]:
        """Answer a host call. A mistake of the code is an error that it can catch; a limit is not."""
        run.budget.check()
        try:
            value = yield from getattr(self, f"_{call.name}")(run, place, depth, *call.args, **call.kwargs)
        except UserError:
            # this machine's, such as a REPL that cannot be started
            raise
        except (TypeError, ValueError) as error:
            # a subclass may be unknown in the REPL
            return Outcome(error="TypeError" if isinstance(error, TypeError) else "ValueError", message=str(error))
        return Outcome(value)


def _ready(box: Sandbox) -> str | None:
    """The content of `answer` once it is ready; code may have made anything else of it.

    Raises:
        NameError, ValueError, RecursionError: it is not there, or cannot be turned into text.
    """
    state = box.get("answer")
    return str(state.get("content", "")) if isinstance(state, dict) and state.get("ready") else None


def _as_context(context: Any) -> Context:
    """
    Raises:
        UserError: a context that is not text.
    """
    if isinstance(context, Path):
        try:
            return context.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{context} is not text in UTF-8: {error}.") from error
        except OSError as error:
            raise UserError(f"{context}: {error.strerror}.") from error
    if is_context(context):
        return context if isinstance(context, str) else list(context)
    raise UserError(f"the context must be text, a list of texts or a Path, and is a {type(context).__name__}.")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:24]
