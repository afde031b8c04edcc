"""Tasks over long contexts, with the model as the root of a recursive language model (`eaftdrope.rlm`).

For each task four shares of its trials: the model wrote a block of code; a block ran without an error; it set an answer; the
answer is right. The sub-model is scripted, so the scores are the root's. The names are those of the test set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import UserError
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.models import HFModel
from eaftdrope.rlm.protocol import SYSTEM, SYSTEM_SHORT
from eaftdrope.rlm.tasks import make_task
from eaftdrope.rlm.tasks.entries import classifier

from ..rlm.trials import STEPS, TaskTrial, run_trials
from ..scores import Score, score_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut

# trials in lockstep
_GROUP = 25
# tokens of a root's conversation, for the size of batches
_CONVERSATION = 1024
_METRICS = dict(zip(STEPS, ("wrote a block", "ran a block", "finished", "right")))


@dataclass(frozen=True)
class RLMTasksProbe:
    """Shares of `limit` trials of each of `tasks`, over contexts of `chars` characters."""

    tasks: tuple[str, ...]
    limit: int
    chars: int
    phrasings: str
    iterations: int
    max_new_tokens: int
    short_prompt: bool
    group: str = "target"
    name: str = "rlm_tasks"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> RLMTasksProbe:
        """Build the probe; its options are its fields."""
        return cls(
            tuple(options["tasks"]),
            options["limit"],
            options["chars"],
            options["phrasings"],
            options["iterations"],
            options["max_new_tokens"],
            options["short_prompt"],
            group,
        )

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        if tokenizer.chat_template is None:
            raise UserError(
                "the probe rlm_tasks needs a chat model, and the tokenizer has no chat template. Leave it out."
            )
        # generation keeps the logits of one position per row, as in `answers`
        size = max(1, 4 * batch_tokens // _CONVERSATION)
        limits = Limits(iterations=self.iterations, root_tokens=self.max_new_tokens, sub_calls=10_000, seconds=10.0**7)
        rlm = RLM(
            HFModel(model, tokenizer, name=self.name, batch_size=size),
            classifier(),
            limits=limits,
            system=SYSTEM_SHORT if self.short_prompt else SYSTEM,
        )
        scores, done = [], 0
        for task in self.tasks:
            trials: list[TaskTrial] = []
            while len(trials) < self.limit:
                seeds = range(len(trials), min(len(trials) + _GROUP, self.limit))
                made = [(seed, make_task(task, seed, self.chars, phrasings=self.phrasings)) for seed in seeds]
                trials += run_trials("rlm", made, rlm)
                done += len(seeds)
                if progress is not None:
                    progress(done, self.limit * len(self.tasks))
            scores += [self._score(task, step, trials) for step in STEPS]
        return scores

    def _score(self, task: str, step: str, trials: list[TaskTrial]) -> Score:
        units = [(float(bool(getattr(trial, step))), 1.0) for trial in trials]
        unseen = ", unseen phrasings" if self.phrasings == "test" else ""
        metric = f"{task}{unseen}: {_METRICS[step]}"
        return score_units(self.name, self.group, metric, units, kind="share", better="higher")
