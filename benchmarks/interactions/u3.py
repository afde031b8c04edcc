"""U3: recursive calls of a model whose weights change while it reads: what each call starts from, and whether the answers
agree when the calls come in another order.

A document is six passages that follow one successor table. The root (scripted) asks the same question about each passage in
a call of its own, through the RLM engine: what follows this symbol? The sub-model is the toy's meta-trained model with a
policy for its state:

- reset        every call begins with the trained weights
- fork         every call begins with what the root read, the first passage; nothing comes back
- accumulate   one state reads on from call to call
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.ttt.toy import task
from eaftdrope.rlm import RLM
from eaftdrope.rlm.models import Message, Reply, ScriptedModel
from eaftdrope.ttt import TTTState

from .lab import Comparison, Lab, Piece, Reading
from .toy_training import FIRST, SIZE, ToyTraining, sizes, trained

POLICIES = ("reset", "fork", "accumulate")
PASSAGES, PASSAGE = 6, 64
TRIALS = 24
RIGHT, REPEATED, REORDERED, DECIDED = (
    "right answers",
    "equal when repeated",
    "equal in the reverse order",
    "majority equal in the reverse order",
)
_TASK = 19
# lines of the context: the passages, then the symbol
_CODE = """```repl
lines = context.split("\\n")
replies = [""] * (len(lines) - 1)
for i in {order}:
    replies[i] = llm_query(lines[i] + " ? " + lines[-1])
answer["content"] = " ".join(replies)
answer["ready"] = True
```"""


class LearningReader:
    """A sub-model of an RLM that reads the passage of a call into a state, and answers with the likeliest next symbol.

    Args:
        policy (`str`): one of `POLICIES`.
        start (`Sequence[int]`): what the root has read, which a fork begins with.
    """

    window = 1 << 20

    def __init__(self, model: nn.Module, policy: str, start: Sequence[int]) -> None:
        self.model, self.policy, self.name = model, policy, f"toy-{policy}"
        self.state = TTTState(model)
        if policy == "fork":
            self._read(self.state, start)

    def check(self, messages: list[Message], max_tokens: int) -> None:
        """Everything fits: the state has one size."""

    def generate(self, batch: Sequence[list[Message]], max_tokens: int) -> list[Reply]:
        return [self._answer(messages[0]["content"]) for messages in batch]

    def _answer(self, prompt: str) -> Reply:
        passage, symbol = prompt.split(" ? ")
        state = {"reset": lambda: TTTState(self.model), "fork": self.state.fork, "accumulate": lambda: self.state}
        now = state[self.policy]()
        ids = [int(word) for word in passage.split()]
        self._read(now, ids)
        # the question is not kept
        return Reply(str(self._read(now.fork(), [int(symbol)])), len(ids) + 1, 1)

    def _read(self, state: TTTState, ids: Sequence[int]) -> int:
        with torch.no_grad():
            logits = self.model(torch.tensor([list(ids)]), past_key_values=state, use_cache=True).logits
        return int(logits[0, -1].argmax())


def document(seed: int, trial: int) -> tuple[list[list[int]], int, int]:
    """Return (passages, the symbol in question, its successor)."""
    random = np.random.default_rng([_TASK, seed, trial])
    table_S = random.integers(task.SYMBOLS, size=(1, task.SYMBOLS))
    text_T = task.follow(random, table_S, PASSAGES * PASSAGE)[0]
    symbol = int(random.integers(task.SYMBOLS))
    return text_T.reshape(PASSAGES, PASSAGE).tolist(), symbol, int(table_S[0, symbol])


def answers(model: nn.Module, policy: str, seed: int, trial: int, order: Sequence[int]) -> list[str]:
    """Return the replies by passage, of calls made in `order`."""
    passages, symbol, _ = document(seed, trial)
    reader = LearningReader(model, policy, passages[0])
    context = "\n".join([*(" ".join(map(str, passage)) for passage in passages), str(symbol)])
    result = RLM(ScriptedModel([_CODE.format(order=list(order))]), reader).complete(context, "What follows the symbol?")
    assert result.finished, result.stopped
    return result.answer.split()


def lab(quick: bool) -> Lab:
    steps, seeds, _ = sizes(quick)
    start, trials = ToyTraining("first", steps, FIRST.ttt), 2 if quick else TRIALS
    pieces = [
        Piece(policy, seed, start.settings | {"trials": trials}, partial(_measure, start, policy, seed, trials))
        for seed in seeds
        for policy in POLICIES
    ]
    compared = [
        Comparison(f"{policy} minus reset: {name}", (policy, name), ("reset", name), 0.02)
        for name in (RIGHT, REORDERED, DECIDED)
        for policy in POLICIES[1:]
    ]
    return Lab(
        "u3",
        "U3: recursive calls of a model whose weights change",
        f"{SIZE} {trials} documents per seed, {PASSAGES} calls over passages of {PASSAGE} tokens, three runs each.",
        "share",
        "call, in order",
        pieces,
        compared,
        {"guess": round(1 / task.SYMBOLS, 4)},
    )


def _measure(start: ToyTraining, policy: str, seed: int, trials: int, weights: Path) -> dict[str, Reading]:
    model = trained(start, seed, weights).eval()
    found: dict[str, list[float]] = {name: [] for name in (RIGHT, REPEATED, REORDERED, DECIDED)}
    right_TC = np.empty((trials, PASSAGES))
    for trial in range(trials):
        order = list(range(PASSAGES))
        first, again, reverse = (answers(model, policy, seed, trial, one) for one in (order, order, order[::-1]))
        right_TC[trial] = [reply == str(document(seed, trial)[2]) for reply in first]
        found[RIGHT].append(float(right_TC[trial].mean()))
        found[REPEATED].append(_equal(first, again))
        found[REORDERED].append(_equal(first, reverse))
        found[DECIDED].append(float(_majority(first) == _majority(reverse)))
    return {name: Reading(values, right_TC.mean(0).tolist() if name == RIGHT else ()) for name, values in found.items()}


def _equal(one: Sequence[str], other: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _majority(replies: Sequence[str]) -> str:
    """The commonest reply; of several the one that comes first in the order of the symbols."""
    return max(sorted(set(replies)), key=replies.count)
