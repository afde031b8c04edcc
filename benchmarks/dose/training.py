"""One training: the gated loss of eaftdrope in a loop of its own, AdamW, a warm-up and a linear decay."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eaftdrope.evaluate.likelihood import IGNORED, TokenRow, padded
from eaftdrope.run.machine import training_device, uses_bfloat16
from eaftdrope.trainer import apply_eaft, pop_metrics, remove_eaft

from .plan import TrainedArm, Training
from .subjects import Subject


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        weights: the trained ones, by name.
        losses: cross-entropy per trained token of each step.
        mean_gate: over all trained tokens.
    """

    weights: dict[str, Tensor]
    losses: list[float]
    mean_gate: float


def autocast() -> torch.autocast:
    """bfloat16 where the device is fast at it."""
    return torch.autocast(training_device().kind, torch.bfloat16, enabled=uses_bfloat16("auto"))


def train(
    subject: Subject, rows: list[TokenRow], arm: TrainedArm, training: Training, *, seed: int, weight: float
) -> Trained:
    """Train an arm on rows.

    Args:
        seed: of the order in the passes after the first.
        weight: of the gate `constant`.
    """
    model = subject.load().requires_grad_(False).train()
    trained = {name: tensor for name, tensor in model.named_parameters() if subject.trains(name)}
    for tensor in trained.values():
        tensor.requires_grad_(True)
    options = {"weight": weight} if arm.gate == "constant" else {}
    base = subject.load().requires_grad_(False).eval() if arm.anchor else None
    apply_eaft(model, arm.gate, anchor=arm.anchor, base_model=base, **options)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=0.0, fused=True)
    batches = list(_batches(rows, training, seed))
    rate = _rates(len(batches), training.warmup)
    losses, gates, tokens = [], 0.0, 0
    for step, batch in enumerate(batches):
        input_ids, labels, mask = padded(batch, "cpu")
        count = (labels[:, 1:] != IGNORED).sum()
        with autocast():
            loss = model(
                input_ids=input_ids, labels=labels, attention_mask=mask, use_cache=False, num_items_in_batch=count
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), training.clip)
        for group in optimizer.param_groups:
            group["lr"] = training.rate * arm.rate * rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        metrics = pop_metrics(model)
        losses.append(round(metrics["eaft/cross_entropy"], 4))
        gates, tokens = gates + metrics["eaft/gate_mean"] * int(count), tokens + int(count)
    remove_eaft(model)
    return Trained({name: tensor.detach() for name, tensor in trained.items()}, losses, gates / tokens)


def _batches(rows: list[TokenRow], training: Training, seed: int):
    """Yield the batches of every pass: the first in the order of the rows."""
    draw = random.Random(seed)
    for epoch in range(training.epochs):
        order = rows if epoch == 0 else draw.sample(rows, len(rows))
        for start in range(0, len(order), training.batch):
            yield order[start : start + training.batch]


def _rates(steps: int, warmup: float) -> Callable[[int], float]:
    """Return the share of the peak rate by step: a linear warm-up, then linear to 0 after the last step."""
    first = max(1, round(warmup * steps))
    return lambda step: min((step + 1) / first, (steps - step) / (steps - first + 1))
