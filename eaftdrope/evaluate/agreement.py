"""How far a model has drifted from the one it was made from, on general prompts, without labels:

    KL      mean over positions of  sum_v p(v) (log p(v) - log q(v))       p: base model, q: this model, nats per token
    top-1   share of positions whose most probable token is the base model's

both teacher-forced on the base model's own greedy answers. The base model is asked once (`capture`); later models are
compared with the file. Of the base model itself the scores are known without measuring: 0 and 1.

The distributions of the file are rounded to float16 (capture.py). For SmolLM2-135M-Instruct, 362 positions, this moved the KL
of the base model with itself from 0 to 1.6e-7 nats, and that of a model with 2 % of noise on its weights, 0.03768, by 1.2e-6.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate.answering import prompt_ids
from eaftdrope.evaluate.capture import Capture, key, load, predictions, save, spread
from eaftdrope.evaluate.generation import generate_ids
from eaftdrope.evaluate.sampling import evenly
from eaftdrope.evaluate.scores import Score, score_units

if TYPE_CHECKING:
    from eaftdrope.data import Example


@dataclass
class Agreement:
    """Agreement with a base model.

    Args:
        prompts: what is asked; the last turn of each is left to the model.
        max_tokens: positions that are compared, at most, over all answers.
        max_new_tokens: longest answer of the base model.
        limit: prompts of the capture that are compared, at most (None: all of them).
        captured: the file with what the base model said; `capture` sets it, and so may whoever knows it to be there.
    """

    prompts: list[Example]
    max_tokens: int = 1024
    max_new_tokens: int = 32
    limit: int | None = None
    group: str = "general"
    name: str = "agreement"
    captured: Path | None = field(default=None, repr=False, compare=False)

    def capture(self, model, tokenizer, file: Path, *, batch_tokens: int = 2048, progress=None) -> list[Score]:
        """Stores in `file` what the base model says, unless an earlier call has, and returns the base model's own scores.

        The model must be in evaluation mode (`run_probes` sees to it). Any model that shares the tokenizer can then be
        compared with the file, by this probe and by others of the same prompts and settings.

        Raises:
            UserError: the file is a capture of other prompts or settings.
        """
        asked = [prompt_ids(example, tokenizer) for example in self.prompts]
        if not file.exists():
            self._ask(model, tokenizer, asked, file, batch_tokens, progress)
        self.captured = file
        counts = [float(len(row.positions)) for row in self._stored(tokenizer).rows]
        return self._scores([(0.0, count) for count in counts], [(count, count) for count in counts])

    def run(self, model, tokenizer, *, batch_tokens: int = 2048, progress=None) -> list[Score]:
        """
        Raises:
            UserError: there is no capture to compare with, or it is one of other prompts or settings.
        """
        stored = self._stored(tokenizer)
        starts = [0]
        for row in stored.rows:
            starts.append(starts[-1] + len(row.positions))
        chosen = evenly(range(len(stored.rows)), self.limit)
        rows = [stored.rows[i] for i in chosen]
        divergence = [0.0] * len(rows)
        same = [0.0] * len(rows)
        for i, first, now in predictions(model, rows, batch_tokens=batch_tokens, progress=progress):
            start = starts[chosen[i]] + first
            base = stored.log_probs[start : start + len(now)].to(now.device).float()
            # The highest is looked for in what was stored, where float16 may have made two equal: either then agrees.
            top = base.gather(1, now.argmax(1, keepdim=True)).squeeze(1) == base.max(1).values
            base = base.log_softmax(1)
            divergence[i] += (base.exp() * (base - now)).sum(dtype=torch.float64).item()
            same[i] += top.sum().item()
        counts = [float(len(row.positions)) for row in rows]
        return self._scores(list(zip(divergence, counts)), list(zip(same, counts)))

    def subset(self, limit: int) -> Agreement:
        """The same probe on at most `limit` of the prompts, with the same capture."""
        return replace(self, limit=limit if self.limit is None else min(limit, self.limit))

    def _ask(self, model, tokenizer, asked: list[list[int]], file: Path, batch_tokens: int, progress) -> None:
        answers = generate_ids(
            model,
            tokenizer,
            asked,
            max_new_tokens=self.max_new_tokens,
            batch_tokens=4 * batch_tokens,
            progress=progress,
        )
        vocabulary = model.config.get_text_config().vocab_size
        rows = spread(asked, answers, vocabulary=vocabulary, max_tokens=self.max_tokens)
        log_probs = torch.empty(sum(len(row.positions) for row in rows), vocabulary, dtype=torch.float16)
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + len(row.positions))
        for i, first, now in predictions(model, rows, batch_tokens=batch_tokens):
            start = starts[i] + first
            log_probs[start : start + len(now)] = now.half().cpu()
        save(file, rows, log_probs, of=self._key(tokenizer))

    def _stored(self, tokenizer) -> Capture:
        if self.captured is None or not self.captured.is_file():
            raise UserError(
                "the probe agreement compares with a base model, and nothing is stored of what that says. A run stores it "
                "before training; start it anew with --overwrite."
            )
        return load(self.captured, of=self._key(tokenizer))

    def _key(self, tokenizer) -> str:
        asked = [prompt_ids(example, tokenizer) for example in self.prompts]
        return key([asked, self.max_tokens, self.max_new_tokens])

    def _scores(self, divergence: list[tuple[float, float]], same: list[tuple[float, float]]) -> list[Score]:
        return [
            score_units(self.name, self.group, "KL from the base model", divergence, kind="mean", better="lower"),
            score_units(
                self.name, self.group, "top-1 agreement with the base model", same, kind="mean", better="higher"
            ),
        ]
