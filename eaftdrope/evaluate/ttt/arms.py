"""The arms of a measurement: which weights, which attention, which learning; and a model put into the state of one.

    full             full attention, in the model's own class                        the base weights
    window           a sliding window                                                the base weights
    sink             the window with the first tokens kept in view                   the base weights
    naive            the same, learning with untrained fast weights                  the base weights, a fitted rate
    control          no TTT, trained on the same tokens                              --control
    control-naive    the same, learning with untrained fast weights                  --control, a fitted rate
    ttt              TTT as it was trained                                           the model, its own rate
    off              the same without learning                                       the model

The base weights are those of --base, or else the model's own without its TTT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from eaftdrope.loaded_model import evaluating
from eaftdrope.ttt import TTTConfig, apply_ttt, is_ttt, remove_ttt, sequence_nll

from ..long_context.perplexity import token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = ("base", "control", "model")
# Tokens kept in view by the arm `sink` where the model itself keeps none.
_SINK = 4


@dataclass(frozen=True)
class TTTArm:
    """One way to read a passage.

    Attributes:
        name, title: on the command line, and in tables.
        weights: one of `WEIGHTS`.
        attention: "full", "window" (no sink), "sink", or "own" (that of the model's TTT configuration).
        learning: "none", "fitted" (at the rate that is best on other text) or "own" (at the model's own rate).
    """

    name: str
    title: str
    weights: str
    attention: str
    learning: str


ARMS = {
    arm.name: arm
    for arm in (
        TTTArm("full", "full attention", "base", "full", "none"),
        TTTArm("window", "window", "base", "window", "none"),
        TTTArm("sink", "window + sink", "base", "sink", "none"),
        TTTArm("naive", "naive TTT", "base", "own", "fitted"),
        TTTArm("control", "fine-tuned without TTT", "control", "own", "none"),
        TTTArm("control-naive", "fine-tuned, then naive TTT", "control", "own", "fitted"),
        TTTArm("ttt", "TTT", "model", "own", "own"),
        TTTArm("off", "TTT off", "model", "own", "none"),
    )
}


@contextmanager
def as_reader(
    model: PreTrainedModel, arm: TTTArm, config: TTTConfig, lr: float | None = None
) -> Iterator[PreTrainedModel]:
    """Put a model into the state of an arm for the duration of the block.

    Args:
        model: with TTT for arms on the model's own weights, without it for the others.
        config: of the model with TTT; the other arms have its window, chunk, layout and fast blocks.
        lr: the inner rate of an arm whose rate is fitted.
    """
    assert (arm.learning == "fitted") == (lr is not None)
    with evaluating(model):
        if arm.attention == "full":
            yield model
        elif arm.weights == "model":
            own = model.ttt.config
            model.ttt.config = own if arm.learning == "own" else dataclasses.replace(own, lr=0.0)
            try:
                yield model
            finally:
                model.ttt.config = own
        else:
            try:
                yield apply_ttt(model, arm_config(arm, config, lr)).eval()
            finally:
                remove_ttt(model)


def arm_config(arm: TTTArm, config: TTTConfig, lr: float | None) -> TTTConfig:
    """Return the configuration of an arm with a window on weights without TTT; no learning is a rate of 0."""
    # a stock window (None) has no sink, whatever is set here
    sink = {"window": 0, "sink": config.sink or _SINK, "own": config.sink}[arm.attention]
    return dataclasses.replace(config, sink=sink, lr=0.0 if lr is None else lr)


@torch.no_grad()
def passage_losses(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return the loss of every prediction of one passage, float64 [T - 1] on the CPU, without logits of the whole passage."""
    row = torch.tensor([ids])
    if is_ttt(model):
        return sequence_nll(model, row.to(model.device))[0].double().cpu()
    return token_losses(model, row)[0]
