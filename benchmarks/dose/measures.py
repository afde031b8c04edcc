"""What is measured: the loss of the new skill, the facts still answered, perplexity; and the same at equal target loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eaftdrope.compare.arms import ArmSpec
from eaftdrope.compare.match import find_share, left_out_reasons, level_of
from eaftdrope.compare.plan import Arm
from eaftdrope.evaluate.likelihood import TokenRow, batches, rows_nll
from eaftdrope.evaluate.scores import ENOUGH, Score, score_units
from eaftdrope.inspection.on_policy import survey_of_rows
from eaftdrope.inspection.tokens import measure_tokens
from eaftdrope.loss.gates import NoGate, resolve_gate

from .subjects import Measured, Subject
from .training import autocast

BATCH_TOKENS = 2048
TARGET, FACTS, TEXT = "held-out loss", "facts", "perplexity"
Scores = dict[str, Score]


@torch.no_grad()
def target(model: PreTrainedModel, measured: Measured) -> Score:
    """The held-out loss of the new skill."""
    with autocast():
        units = rows_nll(model, measured.held_out, batch_tokens=BATCH_TOKENS)
    return score_units(TARGET, "target", TARGET, units, kind="mean", better="lower")


@torch.no_grad()
def retention(model: PreTrainedModel, measured: Measured) -> Scores:
    """Share of the facts of which every token is the model's first choice, and perplexity of general text."""
    with autocast():
        units = rows_nll(model, measured.text, batch_tokens=BATCH_TOKENS)
        hits = facts_answered(model, measured.facts)
    return {
        FACTS: score_units(FACTS, "general", FACTS, hits, kind="share", better="higher", least=ENOUGH),
        TEXT: score_units(TEXT, "general", TEXT, units, kind="exp", better="lower"),
    }


def facts_answered(model: PreTrainedModel, rows: list[TokenRow]) -> list[tuple[float, float]]:
    """Return (1, 1) for every row of which all labels are the model's first choice, else (0, 1)."""
    units = [(0.0, 1.0)] * len(rows)
    for batch in batches([len(row.input_ids) for row in rows], BATCH_TOKENS):
        tokens = measure_tokens(model, [rows[i] for i in batch], NoGate())
        for place, i in enumerate(batch):
            units[i] = (float(tokens.stats.correct[tokens.row == place].all()), 1.0)
    return units


@torch.no_grad()
def inspected(model: PreTrainedModel, rows: list[TokenRow]) -> dict[str, float]:
    """What `eaftdrope inspect` reports of training rows: means over the trained tokens."""
    with autocast():
        return survey_of_rows(model, rows, resolve_gate("eaft"), batch_tokens=BATCH_TOKENS)["summary"]


def levels(base: Score, ends: dict[str, Score], seed: int) -> tuple[float, float, dict[str, str]]:
    """Return the target loss that the arms of a cell have in common, its tolerance, and the arms that do not take part.

    The rule is that of `eaftdrope compare --match target`. Without two arms that take part the loss is NaN.
    """
    arms = {Arm(ArmSpec(), 1.0, seed, name): (base, end) for name, end in ends.items()}
    reasons = left_out_reasons(arms)
    left = {arm: pair for arm, pair in arms.items() if arm not in reasons}
    out = {arm.label: why for arm, why in reasons.items()}
    if len(left) < 2:
        return float("nan"), 0.0, out
    level = level_of(left)
    return level.level, level.tolerance, out


def line(subject: Subject, weights: dict[str, Tensor]) -> Callable[[float], PreTrainedModel]:
    """Return share -> model between the base (0) and the trained weights (1), in evaluation mode."""
    model = subject.load().requires_grad_(False).eval()
    tensors = {name: tensor for name, tensor in model.named_parameters() if name in weights}
    base = {name: tensor.clone() for name, tensor in tensors.items()}

    def move(share: float) -> PreTrainedModel:
        for name, tensor in tensors.items():
            tensor.data.copy_(torch.lerp(base[name], weights[name], share))
        return model

    return move


def matched(
    subject: Subject, weights: dict[str, Tensor], base: Score, end: Score, level: float, tolerance: float
) -> tuple[float | None, Scores]:
    """Return the share of the way from the base at which an arm has the target loss `level`, and all scores there."""
    move, known = line(subject, weights), {0.0: base, 1.0: end}

    def loss(share: float) -> float:
        if share not in known:
            known[share] = target(move(share), subject.measured)
        return known[share].value

    found = find_share(loss, level, tolerance).share
    if found is None:
        return None, {}
    return found, {TARGET: known[found], **retention(move(found), subject.measured)}
