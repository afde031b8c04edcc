"""Tokens of a tool call as llama.cpp feeds them to the model, compared with the trained ones.

A server of llama.cpp has a GGUF with a template and a vocabulary of its own: `llama-server -m MODEL.gguf --jinja`. For each
row whose last answer calls a function, it renders and tokenises what it would feed the model, twice: up to the call, and up
to the answer after the call and its result. Both must be the tokens that this tokenizer and its template give, which are
those of training. The weights play no part, so the score is the same before and after training.

Scores: the share of rows whose prompt is the trained one, and the share whose call and result are. The first difference is
a warning with the text around it.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaftdrope.data import Example, render_prompt
from eaftdrope.errors import UserError

from ..scores import ENOUGH, Score, score_units
from ..texts import evenly_spaced, json_lines
from .answers import read_example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut

_RESULT = '{"result": "done"}'
_SECONDS = 60
_SHOWN = 8


@dataclass(frozen=True)
class ServingProbe:
    """Shares of `rows` that the server at `server` feeds the model as they are trained."""

    rows: list[Example]
    server: str
    group: str = "target"
    name: str = "serving"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> ServingProbe:
        """Build the probe; options: `server` (its address), `file` (JSONL of rows with calls; None: the held-out rows) and
        `limit`."""
        file = options["file"]
        rows = held_out.examples or []
        if file is not None:
            rows = [read_example(row, place) for place, row in json_lines(Path(file).read_text("utf-8"), Path(file))]
        calling = [row for row in rows if _calls(row)]
        if not calling:
            raise UserError(
                f"the probe {name} needs rows whose last answer calls a function (`tool_calls`), and none were found. Set "
                "`data.held_out` to such rows, give the probe a `file`, or leave it out."
            )
        return cls(evenly_spaced(calling, options["limit"]), options["server"].rstrip("/"), group)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        """Compare the tokens of every row.

        Raises:
            UserError: no server of llama.cpp answers at the address.
        """
        prompts, calls, first = [], [], ""
        for done, row in enumerate(self.rows, 1):
            before = row.prompt_messages
            for messages, units in ((before, prompts), ([*before, row.answer, *_results(row)], calls)):
                difference = self._difference(messages, row.tools, tokenizer)
                first = first or (difference and f"{row.origin or f'row {done}'}: {difference}")
                units.append((float(not difference), 1.0))
            if progress is not None:
                progress(done, len(self.rows))
        if first:
            warnings.warn(f"llama.cpp feeds the model other tokens than those of training: {first}", stacklevel=2)
        options = {"kind": "share", "better": "higher", "least": ENOUGH}
        return [
            score_units(self.name, self.group, "prompts served as trained", prompts, **options),
            score_units(self.name, self.group, "calls served as trained", calls, **options),
        ]

    def _difference(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase
    ) -> str:
        """Return the first difference in words; "" if the tokens are equal."""
        text = render_prompt(messages, tools, tokenizer)
        trained = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        body: dict[str, Any] = {"messages": [_as_sent(message) for message in messages]}
        if tools:
            body["tools"] = tools
        rendered = self._post("apply-template", body)
        if "prompt" not in rendered:
            return f"llama.cpp refuses the conversation: {rendered.get('error', rendered)}"
        served = self._post("tokenize", {"content": rendered["prompt"], "add_special": True, "parse_special": True})
        ids = served["tokens"]
        if ids == trained:
            return ""
        at = next((i for i, (one, other) in enumerate(zip(trained, ids)) if one != other), min(len(trained), len(ids)))
        shown = [repr(tokenizer.decode(part[at : at + _SHOWN])) for part in (trained, ids)]
        return f"from token {at} on, {shown[1]} instead of {shown[0]}"

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.server}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if path == "apply-template" and error.code in (400, 500):
                return {"error": error.read().decode(errors="replace")[:200]}
            raise UserError(f"the probe serving: {self.server}/{path} answers {error.code} {error.reason}.") from error
        except (OSError, ValueError) as error:
            raise UserError(
                f"the probe serving: no server of llama.cpp at {self.server} ({error}). Start one with `llama-server -m "
                "MODEL.gguf --jinja`, and set `server` to its address."
            ) from error


def _calls(row: Example) -> list[dict[str, Any]]:
    answers = [message for message in row.messages or [] if message["role"] == "assistant"]
    return answers[-1].get("tool_calls", []) if answers else []


def _results(row: Example) -> list[dict[str, Any]]:
    """A result for each call of the last answer."""
    return [
        {
            "role": "tool",
            "content": _RESULT,
            "name": call["function"]["name"],
            **({"tool_call_id": call["id"]} if "id" in call else {}),
        }
        for call in row.answer["tool_calls"]
    ]


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as OpenAI's interface has it: the arguments of a call are a string of JSON."""
    sent = {name: value for name, value in message.items() if name != "weight"}
    if calls := message.get("tool_calls"):
        sent["tool_calls"] = [
            {
                "type": "function",
                "id": call.get("id", f"call_{number}"),
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for number, call in enumerate(calls)
        ]
    return sent
