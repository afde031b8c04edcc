"""The arms of a comparison: gate x learning rate x seed, each a recipe of its own.

An arm is the recipe with its gate, rate and seed and without probes, in DIR/arms/LABEL-seedS. It is what

    eaftdrope train RECIPE loss.gate=GATE train.seed=S 'probes.target=[]' 'probes.general=[]' output.dir=DIR/arms/GATE-seedS

trains, so a run that was made that way counts as the arm.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.loss.gates import ALL_GATE_OPTIONS, GATE_OPTIONS
from eaftdrope.recipe import load_recipe
from eaftdrope.recipe.schema import Recipe
from eaftdrope.recipe.suggest import did_you_mean

PLAIN = "none"
# the gate whose mean the constant takes
MEASURED_GATE = "eaft"


@dataclass(frozen=True)
class Gate:
    """A gate as it was asked for: its name, and the options it was given, as text."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        return " ".join([self.name, *(f"{option}={value}" for option, value in self.options)])

    @property
    def is_matched_scale(self) -> bool:
        """A constant without a weight: it takes the mean gate of the eaft arm."""
        return self.name == "constant" and not self.options


@dataclass(frozen=True)
class Arm:
    """One training. `label` is the gate, with the rate where several are compared; arms that differ in the seed alone
    have the same."""

    gate: Gate
    learning_rate: float
    seed: int
    label: str

    @property
    def name(self) -> str:
        """Of its folder and files."""
        return f"{self.label.replace(' ', '-')}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison that was found to be possible as far as that can be told without loading anything.

    Args:
        file, overrides: the recipe and what is changed in it for every arm.
        recipe: the recipe with those changes, and with its probes.
        folder: where everything goes.
        arms: in the order of their training: a constant after the arm that it takes its weight from.
        match: whether retention is also compared at equal target gain.
    """

    file: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    folder: Path
    arms: tuple[Arm, ...]
    match: bool

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(arm.seed for arm in self.arms))

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order they were asked for, rate by rate."""
        return tuple(dict.fromkeys(arm.label for arm in self.arms))

    def reference_of(self, arm: Arm) -> Arm:
        """What an arm is compared with: no gate where that is an arm, else the first; under its own rate and seed."""
        beside = [other for other in self.arms if (other.seed, other.learning_rate) == (arm.seed, arm.learning_rate)]
        return next((other for other in beside if other.gate.label == PLAIN), beside[0])

    def path(self, arm: Arm) -> Path:
        return self.folder / "arms" / arm.name

    def source_of_weight(self, arm: Arm) -> Arm:
        """The arm whose mean gate a constant without a weight takes."""
        return next(
            other
            for other in self.arms
            if other.gate.name == MEASURED_GATE and (other.seed, other.learning_rate) == (arm.seed, arm.learning_rate)
        )


def plan_comparison(
    file: Path,
    overrides: list[str],
    *,
    gates: str,
    seeds: int = 3,
    rates: str | None = None,
    folder: Path | None = None,
    match: bool = False,
) -> Plan:
    """Read the recipe and lay out its arms; nothing is loaded or written.

    Args:
        gates: names separated by commas, each with options after colons: `none,eaft,eaft:alpha=2,constant`.
        rates: learning rates separated by commas; None is the recipe's.
        folder: runs/compare/<name of the recipe> by default.

    Raises:
        UserError: the recipe, a gate or an option is wrong, or the recipe cannot be compared.
    """
    recipe = load_recipe(file, overrides)
    problems = list(_problems_of(recipe, match))
    wanted, wrong = _parse_gates(gates)
    problems += wrong
    learning_rates, wrong = _parse_rates(rates, recipe)
    problems += wrong
    if problems:
        raise UserError("\n".join(problems))
    changes = list(overrides)
    if recipe.data.held_out_share and recipe.data.seed is None:
        # drawn by the seed of training, the held-out rows of one arm would be trained on by another
        changes.append(f"data.seed={recipe.train.seed}")
        recipe = load_recipe(file, changes)
    arms = tuple(
        Arm(gate, rate, recipe.train.seed + number, gate.label + (f"@{rate:g}" if len(learning_rates) > 1 else ""))
        for number in range(seeds)
        for rate in learning_rates
        for gate in sorted(wanted, key=lambda gate: gate.is_matched_scale)
    )
    plan = Plan(file, tuple(changes), recipe, folder or Path("runs/compare") / file.stem, arms, match)
    for arm in arms:
        # an option that its gate does not have, or a value it cannot take
        arm_recipe(plan, arm, weight=1.0)
    return plan


def arm_recipe(plan: Plan, arm: Arm, *, weight: float | None = None) -> Recipe:
    """The recipe that trains `arm`.

    Args:
        weight: of a constant without one; None for any other gate.

    Raises:
        RecipeError: the gate has no such option, or its value is out of range.
    """
    options = dict(arm.gate.options)
    if arm.gate.is_matched_scale:
        options["weight"] = repr(weight)
    foreign = [option for option in ALL_GATE_OPTIONS if option not in GATE_OPTIONS[arm.gate.name]]
    return load_recipe(
        plan.file,
        [
            *plan.overrides,
            f"loss.gate={arm.gate.name}",
            *(f"loss.{option}=null" for option in foreign if option not in options),
            *(f"loss.{option}={value}" for option, value in options.items()),
            f"train.seed={arm.seed}",
            f"train.learning_rate={arm.learning_rate!r}",
            "probes.target=[]",
            "probes.general=[]",
            f"output.dir={plan.path(arm)}",
            "output.merge=false",
            "output.push_to_hub=null",
        ],
    )


def _problems_of(recipe: Recipe, match: bool):
    if recipe.stages:
        yield (
            "a recipe with stages is not compared: every arm would convert and recalibrate the model anew. Run its first "
            "stages once with `eaftdrope train`, and compare a recipe without stages whose model is their result."
        )
        return
    for group in ("target", "general"):
        if not getattr(recipe.probes, group):
            yield f"probes.{group} is empty, so there is nothing to compare. Name at least one probe there."
    if match and all(probe.name != "held_out_loss" for probe in recipe.probes.target):
        yield (
            "--match target brings the arms to the same held-out loss, which is not measured. Set data.held_out and put "
            "held_out_loss under probes.target, or leave --match out."
        )
    if match and recipe.lora and recipe.lora.use_dora:
        yield (
            "--match target: between the base model and a DoRA adapter there is no straight path of weights (its "
            "directions are normalised). Leave --match out, or compare LoRA adapters."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield (
            "compare trains and measures in one process. Train the arms with `accelerate launch -m eaftdrope train` into "
            "the folders that --dry-run names; compare takes them as its own."
        )


def _parse_gates(text: str) -> tuple[list[Gate], list[str]]:
    """Gates, each once, and what is wrong with them."""
    gates, problems = {}, []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, *options = (piece.strip() for piece in part.split(":"))
        if name not in GATE_OPTIONS:
            problems.append(
                f"--gates {part}: no such gate.{did_you_mean(name, GATE_OPTIONS)} Gates: {', '.join(GATE_OPTIONS)}."
            )
        pairs = [tuple(map(str.strip, option.partition("=")[::2])) for option in options]
        if any(not name or not value for name, value in pairs):
            problems.append(f"--gates {part}: options are written gate:option=value, such as eaft:alpha=2.")
        gate = Gate(name, tuple(pairs))
        gates[gate.label] = gate
    found = list(gates.values())
    if not problems and len(found) < 2:
        problems.append("--gates: name at least two, such as none,eaft.")
    if any(gate.is_matched_scale for gate in found) and all(gate.name != MEASURED_GATE for gate in found):
        problems.append(
            "--gates constant: its weight is the mean gate of the eaft arm, and there is none. Add eaft to --gates, or "
            "give the weight: constant:weight=0.3."
        )
    return found, problems


def _parse_rates(text: str | None, recipe: Recipe) -> tuple[list[float], list[str]]:
    if text is None:
        return [recipe.train.learning_rate], []
    try:
        found = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = []
    if not found or not all(rate > 0 and math.isfinite(rate) for rate in found):
        return [], [f"--lr {text}: name learning rates above 0, separated by commas, such as 1e-5,1e-4."]
    return found, []
