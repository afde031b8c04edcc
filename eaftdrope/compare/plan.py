"""The plan of a comparison: its arms (gate x learning rate x seed), each a recipe.

An arm is the recipe with the arm's gate, rate and seed and without probes, in DIR/arms/LABEL-seedS. It is the run that

    eaftdrope train RECIPE loss.gate=GATE train.seed=S 'probes.target=[]' 'probes.general=[]' output.dir=DIR/arms/GATE-seedS

trains, so a run of that command is used as the arm.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.loss.gates import ALL_GATE_OPTIONS, GATE_OPTIONS
from eaftdrope.recipe import load_recipe
from eaftdrope.recipe.schema import Recipe
from eaftdrope.recipe.suggest import did_you_mean

PLAIN = "none"
# the gate whose mean is the weight of a constant
MEASURED_GATE = "eaft"


@dataclass(frozen=True)
class ArmGate:
    """A gate as the user wrote it: its name, and its options as text."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """The gate and its options, such as `eaft alpha=2`."""
        return " ".join([self.name, *(f"{option}={value}" for option, value in self.options)])

    @property
    def is_matched_scale(self) -> bool:
        """The gate is a constant without a weight: its weight is the mean gate of the eaft arm."""
        return self.name == "constant" and not self.options


@dataclass(frozen=True)
class Arm:
    """One training. `label` is the gate, with the rate if several are compared; arms that differ in the seed only
    share it."""

    gate: ArmGate
    learning_rate: float
    seed: int
    label: str

    @property
    def name(self) -> str:
        """The name of its folder and of its file of scores."""
        return f"{self.label.replace(' ', '-')}-seed{self.seed}"


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison that passed every check that needs no data or weights.

    Attributes:
        file: the recipe.
        overrides: changes to the recipe for every arm.
        recipe: the recipe with those changes, and with its probes.
        folder: of the comparison and all its files.
        arms: in the order of training: a constant after the arm that determines its weight.
        match: also compare retention at equal target gain.
    """

    file: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    folder: Path
    arms: tuple[Arm, ...]
    match: bool

    @property
    def seeds(self) -> tuple[int, ...]:
        """Each seed once."""
        return tuple(dict.fromkeys(arm.seed for arm in self.arms))

    @property
    def labels(self) -> tuple[str, ...]:
        """Each label once, in the order of the arms."""
        return tuple(dict.fromkeys(arm.label for arm in self.arms))

    def reference_of(self, arm: Arm) -> Arm:
        """Return the arm to compare with, of the same rate and seed: gate `none`, else the first."""
        beside = [other for other in self.arms if (other.seed, other.learning_rate) == (arm.seed, arm.learning_rate)]
        return next((other for other in beside if other.gate.label == PLAIN), beside[0])

    def path(self, arm: Arm) -> Path:
        """Return the run folder of an arm."""
        return self.folder / "arms" / arm.name

    def weight_source(self, arm: Arm) -> Arm:
        """Return the arm whose mean gate is the weight of a constant without one."""
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
) -> ComparisonPlan:
    """Read the recipe and plan its arms; no data or weights are loaded, and nothing is written.

    Args:
        gates: names separated by commas, each with its options after colons: `none,eaft,eaft:alpha=2,constant`.
        rates: learning rates separated by commas; the recipe's by default.
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
        # with a split drawn by the training seed, an arm would train on the held-out rows of another
        changes.append(f"data.seed={recipe.train.seed}")
        recipe = load_recipe(file, changes)
    arms = tuple(
        Arm(gate, rate, recipe.train.seed + number, gate.label + (f"@{rate:g}" if len(learning_rates) > 1 else ""))
        for number in range(seeds)
        for rate in learning_rates
        for gate in sorted(wanted, key=lambda gate: gate.is_matched_scale)
    )
    plan = ComparisonPlan(file, tuple(changes), recipe, folder or Path("runs/compare") / file.stem, arms, match)
    for arm in arms:
        # checks the options of the gate and their values
        arm_recipe(plan, arm, weight=1.0)
    return plan


def arm_recipe(plan: ComparisonPlan, arm: Arm, *, weight: float | None = None) -> Recipe:
    """Return the recipe that trains `arm`.

    Args:
        weight: of a constant without a weight; None for any other gate.

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


def _problems_of(recipe: Recipe, match: bool) -> Iterator[str]:
    if recipe.stages:
        yield (
            "a recipe with stages cannot be compared: every arm would convert and recalibrate the model again. Run its first "
            "stages once with `eaftdrope train`, then compare a recipe without stages whose model is their result."
        )
        return
    for group in ("target", "general"):
        if not getattr(recipe.probes, group):
            yield f"probes.{group} is empty, so there is nothing to compare. Add at least one probe to it."
    if match and all(probe.name != "held_out_loss" for probe in recipe.probes.target):
        yield (
            "--match target brings the arms to the same held-out loss, which is not measured. Set data.held_out and add "
            "held_out_loss to probes.target, or omit --match."
        )
    if match and recipe.lora and recipe.lora.use_dora:
        yield (
            "--match target needs a straight path of weights from the base model to the adapter, which DoRA does not have "
            "(its directions are normalised). Omit --match, or compare LoRA adapters."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield (
            "compare trains and measures in one process. Train the arms with `accelerate launch -m eaftdrope train` into "
            "the folders that --dry-run lists; compare then uses them as its arms."
        )


def _parse_gates(text: str) -> tuple[list[ArmGate], list[str]]:
    """Return the gates, each once, and the problems found."""
    gates, problems = {}, []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, *options = (piece.strip() for piece in part.split(":"))
        if name not in GATE_OPTIONS:
            problems.append(
                f"--gates {part}: no such gate.{did_you_mean(name, GATE_OPTIONS)} Gates: {', '.join(GATE_OPTIONS)}."
            )
        parts = [option.partition("=") for option in options]
        pairs = [(option.strip(), value.strip()) for option, _, value in parts]
        if any(not name or not value for name, value in pairs):
            problems.append(f"--gates {part}: write options as gate:option=value, such as eaft:alpha=2.")
        gate = ArmGate(name, tuple(pairs))
        gates[gate.label] = gate
    found = list(gates.values())
    if not problems and len(found) < 2:
        problems.append("--gates: pass at least two gates, such as none,eaft.")
    if any(gate.is_matched_scale for gate in found) and all(gate.name != MEASURED_GATE for gate in found):
        problems.append(
            "--gates constant: its weight is the mean gate of the eaft arm, which is missing. Add eaft to --gates, or "
            "set the weight: constant:weight=0.3."
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
        return [], [f"--lr {text}: pass learning rates above 0, separated by commas, such as 1e-5,1e-4."]
    return found, []
