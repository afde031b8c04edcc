"""Steps, disk and time that a comparison needs, before weights are loaded."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from rich.text import Text

from eaftdrope.run.machine import uses_bfloat16
from eaftdrope.run.plan import make_plan
from eaftdrope.run.settings import eaft_settings

from .plan import Arm
from .training import is_trained, train_seconds

if TYPE_CHECKING:
    from .measurement import Measurement

# side of the square matrices whose product measures the speed of the machine
_SIDE = 1024
_SECONDS = 0.5


def arms_table(measurement: Measurement) -> Table:
    """Return the table of the arms with their folders and states."""
    plan, table = measurement.plan, Table()
    for column in ("arm", "seed", "learning rate", "folder", ""):
        table.add_column(column, overflow="fold")
    for arm in plan.arms:
        table.add_row(
            arm.spec.label, str(arm.seed), f"{arm.learning_rate:g}", Text(str(plan.path(arm))), _state(measurement, arm)
        )
    return table


def estimate(measurement: Measurement) -> list[str]:
    """Return lines on steps, disk and time.

    The time is extrapolated from the finished arms. Without one it is a lower bound: the time of the operations (6 per
    parameter and token, 4 if it is frozen) at the speed of this machine's matrix products.
    """
    plan, recipe = measurement.plan, measurement.plan.recipe
    settings = eaft_settings(recipe)
    one = make_plan(settings, measurement.config, measurement.data.stats, autocast=settings.autocast)
    done = [arm for arm in plan.trained if is_trained(plan, arm, measurement.held_out_loss)]
    left = len(plan.trained) - len(done)
    repaired = len(plan.arms) - len(plan.trained)
    lines = [
        f"{len(plan.trained)} arms of {one.steps:,} steps, at most {one.steps * one.tokens_per_step:,} tokens each; "
        f"{len(done)} trained, {left} to train" + (f"; {repaired} repaired from them" if repaired else ""),
        f"each writes {one.files[0][0]}: {one.files[0][1]}",
    ]
    times = [found for arm in done if (found := train_seconds(plan.path(arm))) is not None]
    if times:
        lines.append(f"training: about {_duration(left * statistics.mean(times))}, extrapolated from the trained arms")
    elif left:
        operations = (4 * one.parameters + 2 * one.trained_parameters) * one.steps * one.tokens_per_step
        lines.append(
            f"training: at least {_duration(left * operations / _speed(measurement))}, the time of the matrix products only, "
            "until the first arm is trained"
        )
    return lines


def _state(measurement: Measurement, arm: Arm) -> str:
    plan = measurement.plan
    trained = is_trained(plan, arm, measurement.held_out_loss)
    if arm.spec.repair:
        return f"repaired from {plan.source_of(arm).spec.label}" + ("" if trained else ", once that is trained")
    if trained is None:
        return "to train, after " + ("the others" if arm.spec.stops_early else plan.weight_source(arm).spec.label)
    return "trained" if trained else "to train"


def _speed(measurement: Measurement) -> float:
    """Measure the operations per second of this machine's matrix products, in the recipe's arithmetic."""
    dtype = torch.bfloat16 if uses_bfloat16(measurement.plan.recipe.train.precision) else torch.float32
    a, b = (torch.randn(_SIDE, _SIDE, device=measurement.device, dtype=dtype) for _ in range(2))
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        # reading a number waits for an asynchronous device
        (a @ b)[0, 0].item()
        count += 1
    return count * 2 * _SIDE**3 / (time.perf_counter() - started)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
