"""What a comparison will take, told before anything is loaded."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from eaftdrope.run.machine import uses_bfloat16
from eaftdrope.run.plan import make_plan
from eaftdrope.run.settings import eaft_settings

from .arms import Arm, Plan
from .training import is_trained, seconds

if TYPE_CHECKING:
    from rich.table import Table

    from .measuring import Bench

# side of the square matrices whose product tells the machine's speed
_SIDE = 1024
_SECONDS = 0.5


def arms_table(plan: Plan) -> Table:
    """Every arm with where it goes and how far it is."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("arm", "seed", "learning rate", "folder", ""):
        table.add_column(column, overflow="fold")
    for arm in plan.arms:
        table.add_row(
            arm.gate.label, str(arm.seed), f"{arm.learning_rate:g}", Text(str(plan.path(arm))), _state(plan, arm)
        )
    return table


def estimate(bench: Bench) -> list[str]:
    """Steps, disk and time in words. The time is that of the finished arms; where there are none, the least that this
    machine's matrix products need for the operations (6 for each parameter and token, 4 where it is frozen)."""
    plan, recipe = bench.plan, bench.plan.recipe
    settings = eaft_settings(recipe)
    one = make_plan(settings, bench.config, bench.data.stats, autocast=settings.autocast)
    done = [arm for arm in plan.arms if is_trained(plan, arm)]
    left = len(plan.arms) - len(done)
    lines = [
        f"{len(plan.arms)} arms of {one.steps:,} steps, at most {one.steps * one.tokens_per_step:,} tokens each; "
        f"{len(done)} trained, {left} to train",
        f"each leaves {one.files[0][0]}: {one.files[0][1]}",
    ]
    times = [found for arm in done if (found := seconds(plan.path(arm))) is not None]
    if times:
        lines.append(f"training: about {_duration(left * statistics.mean(times))}, as long as those that are trained")
    elif left:
        operations = (4 * one.parameters + 2 * one.trained_parameters) * one.steps * one.tokens_per_step
        lines.append(
            f"training: at least {_duration(left * operations / _speed(bench))}, the time of the matrix products alone; the "
            "first arm will tell"
        )
    return lines


def _state(plan: Plan, arm: Arm) -> str:
    return {True: "trained", False: "to train", None: "to train, after eaft"}[is_trained(plan, arm)]


def _speed(bench: Bench) -> float:
    """Operations a second of this machine's matrix products, in the recipe's arithmetic."""
    import torch

    dtype = torch.bfloat16 if uses_bfloat16(bench.plan.recipe.train.precision) else torch.float32
    a, b = (torch.randn(_SIDE, _SIDE, device=bench.device, dtype=dtype) for _ in range(2))
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        # a number, so that a device that works on its own is waited for
        (a @ b)[0, 0].item()
        count += 1
    return count * 2 * _SIDE**3 / (time.perf_counter() - started)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
