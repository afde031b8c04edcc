"""Replay: rows of the model itself, or of other data, mixed into the training rows against forgetting.

    share s of N + R rows are replay:  R = s / (1 - s) N

With `from: model` the base model replies once to a file of prompts, by sampling from its whole distribution (Forgetting in
Language Models: Capacity, Optimization, Self-Generated Replay, arXiv 2605.26097). The replies are kept in the cache folder by
model, tokenizer, prompts, length and seed:

    cache_dir()/replay/KEY/00000.json ...    the replies to 32 prompts each, so that a killed start resumes
    cache_dir()/replay/KEY/rows-R.jsonl      the first R rows, complete

Each part has a seed of its own, so the rows do not depend on where a start was killed. Prompts are used again, in another
order, once all have a reply. A reply that does not end within `max_tokens` is left out: trained on, it would teach the model
to stop in the middle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eaftdrope.data import Example, Source
from eaftdrope.errors import UserError
from eaftdrope.evaluate.generation import generate_ids, stop_token_ids
from eaftdrope.evaluate.probes.agreement import read_prompts
from eaftdrope.evaluate.probes.answers import prompt_ids
from eaftdrope.evaluate.score_cache import content_hash, tokenizer_fingerprint, writable_folder
from eaftdrope.files import cache_dir, write_atomically
from eaftdrope.loaded_model import evaluating
from eaftdrope.recipe.data_section import Data

from .model_files import model_fingerprint, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .settings import TrainingSettings

_PART = 32
"""Prompts of one part of the cache."""
_TRIES = 4
"""Parts may have this many times as many prompts as rows are wanted, because some replies do not end."""
NAME = "replay"


def rows_wanted(share: float, rows: int) -> int:
    """Return the number of replay rows beside `rows` others, at least one."""
    return max(1, round(share / (1 - share) * rows))


@dataclass(frozen=True)
class Replies:
    """The cached replies of one model to one file of prompts.

    Args:
        folder: of the cache; None while the model is not on this machine.
        prompts: the file of prompts.
    """

    folder: Path | None
    prompts: Path
    max_tokens: int
    seed: int

    def file(self, rows: int) -> Path | None:
        """Return the file of the first `rows` rows; None if they were not all generated."""
        found = self.folder / f"rows-{rows}.jsonl" if self.folder else None
        return found if found is not None and found.is_file() else None

    @property
    def newest(self) -> Path | None:
        """The file with the most rows; None if none is complete."""
        files = list(self.folder.glob("rows-*.jsonl")) if self.folder and self.folder.is_dir() else []
        return max(files, key=lambda file: file.stat().st_size, default=None)

    def cached(self, rows: int) -> int:
        """Return how many of `rows` rows are in the cache."""
        if self.file(rows):
            return rows
        parts = sorted(self.folder.glob("[0-9]*.json")) if self.folder and self.folder.is_dir() else []
        return min(rows, sum(len(json.loads(part.read_text(encoding="utf-8"))) for part in parts))

    def generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        *,
        batch_tokens: int,
        progress: Callable[[int, int], object],
    ) -> Path:
        """Generate the rows that are missing; return the file of the first `rows`.

        Args:
            progress: called with the rows that there are, and `rows`.

        Raises:
            UserError: too few replies end within `max_tokens`, the prompts cannot be read, or the cache cannot be written.
        """
        assert self.folder is not None, "a model that was loaded is on this machine"
        writable_folder(self.folder)
        prompts = read_prompts(self.prompts)
        found: list[dict[str, Any]] = []
        tried = 0
        while len(found) < rows:
            if tried >= _TRIES * rows + _PART:
                raise UserError(
                    f"data.replay: of {tried} replies of the model only {len(found)} end within max_tokens: "
                    f"{self.max_tokens}. Raise data.replay.max_tokens, or use other prompts."
                )
            file = self.folder / f"{tried // _PART:05}.json"
            if not file.is_file():
                part = self._part(model, tokenizer, prompts, tried, batch_tokens)
                write_atomically(file, json.dumps(part, ensure_ascii=False))
            found += json.loads(file.read_text(encoding="utf-8"))
            tried += _PART
            progress(min(rows, len(found)), rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found[:rows])
        return write_atomically(self.folder / f"rows-{rows}.jsonl", text)

    def _part(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Example],
        start: int,
        batch_tokens: int,
    ) -> list[dict[str, Any]]:
        """Return the rows of the replies number `start` to `start` + 31 that ended."""
        chosen = [prompts[self._order(number, len(prompts))] for number in range(start, start + _PART)]
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), evaluating(model):
            torch.manual_seed(int(content_hash([self.seed, start])[:15], 16))
            replies = generate_ids(
                model,
                tokenizer,
                [prompt_ids(example, tokenizer) for example in chosen],
                max_new_tokens=self.max_tokens,
                batch_tokens=batch_tokens,
                sample=True,
            )
        can_end = bool(stop_token_ids(model, tokenizer))
        ended = [(e, r) for e, r in zip(chosen, replies) if r and (len(r) < self.max_tokens or not can_end)]
        return [_row(example, str(tokenizer.decode(reply)), tokenizer) for example, reply in ended]

    def _order(self, number: int, prompts: int) -> int:
        """Return which prompt has the reply of this number: all of them once, then all again in another order."""
        again, place = divmod(number, prompts)
        return random.Random(f"{self.seed}:{NAME}:{again}").sample(range(prompts), prompts)[place]


def find_replies(settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase) -> Replies:
    """Return the cached replies for a training whose replay the model generates; nothing is loaded or written."""
    assert isinstance(settings.data, Data) and settings.data.replay, "only conversations have replay"
    replay = settings.data.replay
    seed = settings.data_seed if replay.seed is None else replay.seed
    assert replay.prompts is not None, "checked with the recipe"
    prompts = Path(replay.prompts)
    try:
        place = model_folder(settings.model)
    except UserError:
        # the result of a stage that is still to be run
        place = None
    folder = None
    if place is not None and place.is_dir():
        what = [model_fingerprint(place), tokenizer_fingerprint(tokenizer), prompts, replay.max_tokens, seed]
        folder = cache_dir() / NAME / content_hash([*what, settings.model.dtype, settings.model.quantization])[:32]
    return Replies(folder, prompts, replay.max_tokens, seed)


def choose_rows(available: int, wanted: int, seed: int) -> list[int]:
    """Return the indices of `wanted` rows of `available`: all of them as often as they fit, and some once more."""
    whole, extra = divmod(wanted, available)
    chosen = sorted(random.Random(f"{seed}:{NAME}").sample(range(available), extra))
    return [*range(available)] * whole + chosen


def source_of(file: Path | str) -> Source:
    """Return the source of replay rows."""
    return Source(str(file))


def _row(example: Example, reply: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a row of the form in which the model was prompted."""
    if example.messages is None:
        return {"prompt": example.prompt, "completion": reply}
    turns = example.prompt_messages
    if tokenizer.chat_template is None:
        # as prompt_ids writes a single question
        return {"prompt": f"Question: {turns[0]['content']}\nAnswer:", "completion": _spaced(reply)}
    tools = {"tools": example.tools} if example.tools else {}
    return {"messages": [*turns, {"role": "assistant", "content": reply.strip()}], **tools}


def _spaced(reply: str) -> str:
    return reply if reply[:1].isspace() else f" {reply}"
