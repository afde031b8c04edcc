"""Models on the toy of benchmarks/ttt (successor tables, 24 symbols), trained once and shared by the labs.

"first" is the toy's own arm of that name: its weights in `benchmarks.ttt toy --output DIR` (DIR/weights) can be copied.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from benchmarks.ttt.toy import task
from benchmarks.ttt.toy.arms import BATCH, Arm, new_model, stock_nll, train
from benchmarks.ttt.toy.run import with_ttt
from eaftdrope import apply_eaft, remove_eaft
from eaftdrope.drope.rope import with_rope
from eaftdrope.files import replacing
from eaftdrope.loss import TokenStats
from eaftdrope.loss.gates import Custom, resolve_gate
from eaftdrope.ttt import is_ttt, sequence_nll

from .lab import SEEDS, Reading

STEPS, RATE = 238, 3e-3
TEST = 96
SIZE = (
    "Toy of benchmarks/ttt: stock Qwen 3, 3 blocks, hidden 48, window and chunk 16, one fast block (85,776 weights), 256 "
    "tokens, 24 symbols."
)
BINS = "bin of 32 positions"
# rows read at once
_ROWS = 48


def _complement(stats: TokenStats) -> Tensor:
    """1 - h: what EAFT's gate takes away."""
    return 1 - resolve_gate("eaft")(stats)


INNER_GATES: Mapping[str, Any] = {
    "none": "none",
    "eaft": "eaft",
    "complement": Custom(_complement, topk=20, row_local=True),
}


@dataclass(frozen=True)
class ToyTraining:
    """A training on the toy.

    Attributes:
        ttt (`dict`): fields of `TTTConfig` that differ from the toy's.
        inner_gate (`str`): one of `INNER_GATES`.
        outer_gate (`str`): gate of the loss that trains.
        rotation (`str`): "rope", "nope" (from scratch), or "drope": rope, dropped after `1 - recalibrated` of the steps.
    """

    name: str
    steps: int = STEPS
    ttt: dict[str, Any] = field(default_factory=lambda: {"horizon": 1})
    inner_gate: str = "none"
    outer_gate: str = "none"
    rotation: str = "rope"
    recalibrated: float = 0.2

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self) | {"rate": RATE, "batch": BATCH}

    def new(self, seed: int, rotation: str) -> nn.Module:
        """The untrained model with TTT."""
        torch.manual_seed(seed)
        model = new_model("full")
        if rotation == "nope":
            model = without_rotation(model)
        with_ttt(model, Arm(self.name, "", "ttt", ttt=self.ttt), seed)
        model.ttt.config = replace(model.ttt.config, inner_gate=INNER_GATES[self.inner_gate])
        return model.train()


FIRST = ToyTraining("first")


def sizes(quick: bool) -> tuple[int, tuple[int, ...], int]:
    """Return (steps of a training, seeds, test sequences)."""
    return (2, SEEDS[:2], 2) if quick else (STEPS, SEEDS, TEST)


def without_rotation(model: nn.Module) -> nn.Module:
    """The same stock model without rotary embedding."""
    dropped = Qwen3ForCausalLM._from_config(with_rope(model.config, "nope"))
    dropped.load_state_dict(model.state_dict())
    return dropped


def trained(training: ToyTraining, seed: int, weights: Path) -> nn.Module:
    """Return the trained model; weights that were kept are not trained again."""
    last = "nope" if training.rotation in ("nope", "drope") else "rope"
    model, path = training.new(seed, last), weights / f"{training.name}-{seed}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path)["model"])
        return model
    steps = training.steps
    if training.rotation == "drope":
        after = max(1, round(training.recalibrated * steps))
        before = training.new(seed, "rope")
        fit(before, seed, steps - after, gate=training.outer_gate)
        model.load_state_dict(before.state_dict())
        # other batches than those of the first part
        fit(model, seed + 1000, after, gate=training.outer_gate)
    else:
        fit(model, seed, steps, gate=training.outer_gate)
    with replacing(path) as partial:
        torch.save({"model": model.state_dict(), "training": training.settings}, partial)
    return model


def fit(
    model: nn.Module,
    seed: int,
    steps: int,
    *,
    gate: str = "none",
    rate: float = RATE,
    batch: Callable[[int, int, int], np.ndarray] = task.training_batch,
) -> None:
    """Train weights that require a gradient, in place, as the toy does.

    Args:
        gate (`str`): of the loss that trains.
        batch (`Callable`): sequences `[B, T]` of a seed, a step and a count.
    """
    model.train()
    if gate != "none":
        apply_eaft(model, gate)

    def loss(tokens_BT: Tensor) -> Tensor:
        return model(tokens_BT, labels=tokens_BT).loss

    train(model, loss, lambda: 0.0, arm=Arm("", "", "ttt", steps=steps, rate=rate), seed=seed, batch=batch)
    if gate != "none":
        remove_eaft(model)


def read(model: nn.Module, tokens_BT: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood of every token after the first, `[B, T - 1]`."""
    nll = sequence_nll if is_ttt(model) else torch.no_grad()(stock_nll)
    rows = torch.from_numpy(tokens_BT).split(_ROWS)
    return torch.cat([nll(model, rows_BT) for rows_BT in rows]).double().numpy()


def reading(nll_BT: np.ndarray, first: int = 0) -> Reading:
    """The mean of each sequence over the predicted tokens from `first` on, and the curve by position."""
    return Reading(nll_BT[:, first:].mean(1).tolist(), task.by_bin(nll_BT).mean(0).tolist())


def ceilings(count: int) -> dict[str, float]:
    """The best possible losses on the toy's test sequences."""
    sequences_BT = task.test_sequences(count)
    reach = {"Bayes, all tokens": None, "Bayes, last 46 tokens": 46}
    return {name: round(float(task.bayes_nll(sequences_BT, tokens).mean()), 4) for name, tokens in reach.items()}
