"""The plan of a comparison: its arms (what arms.py describes x learning rate x seed), each a recipe.

An arm is the recipe with the arm's changes, rate and seed and without probes, in DIR/arms/LABEL-seedS. It is the run that

    eaftdrope train RECIPE loss.gate=GATE train.seed=S 'probes.target=[]' 'probes.general=[]' output.dir=DIR/arms/GATE-seedS

trains, so a run of that command is used as the arm.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from eaftdrope.checkpoints.repair_options import SMALLEST
from eaftdrope.errors import UserError
from eaftdrope.loss.gates import ALL_GATE_OPTIONS, GATE_OPTIONS
from eaftdrope.recipe import load_recipe
from eaftdrope.recipe.schema import Recipe

from .arms import EARLY_STOP, ArmSpec, is_source_of_weight, parse_arms

# in place of what finished arms determine, for the checks of the recipe
_ANY_VALUES = MappingProxyType({"loss.weight": "1.0", "train.stop_at": "1.0"})


@dataclass(frozen=True)
class Arm:
    """One training, or one repair of a training. `label` has the rate if several are compared; arms that differ in the seed
    only share it. `base_rate` is the learning rate before the arm divides it."""

    spec: ArmSpec
    base_rate: float
    seed: int
    label: str

    @property
    def name(self) -> str:
        """The name of its folder and of its file of scores."""
        return f"{re.sub('[^A-Za-z0-9_.=@-]+', '-', self.label)}-seed{self.seed}"

    @property
    def learning_rate(self) -> float:
        """The learning rate of its training."""
        return self.base_rate / self.spec.rate_divisor


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison that passed every check that needs no data or weights.

    Attributes:
        file: the recipe.
        overrides: changes to the recipe for every arm.
        recipe: the recipe with those changes, and with its probes.
        folder: of the comparison and all its files.
        arms: in the order of training: each after those that it needs.
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

    @property
    def trained(self) -> tuple[Arm, ...]:
        """The arms that are trained; the others are repairs of one of them."""
        return tuple(arm for arm in self.arms if not arm.spec.repair)

    def beside(self, arm: Arm) -> list[Arm]:
        """Return all arms of the same seed and rate, in order."""
        return [other for other in self.arms if (other.seed, other.base_rate) == (arm.seed, arm.base_rate)]

    def reference_of(self, arm: Arm) -> Arm:
        """Return the arm to compare with: plain fine-tuning, else the first."""
        beside = self.beside(arm)
        return next((other for other in beside if other.spec == ArmSpec()), beside[0])

    def source_of(self, arm: Arm) -> Arm:
        """Return the training that an arm is a repair of; the arm itself if it is none."""
        return next(other for other in self.beside(arm) if other.spec == arm.spec.training)

    def path(self, arm: Arm) -> Path:
        """Return the run folder of an arm's training."""
        return self.folder / "arms" / self.source_of(arm).name

    def weight_source(self, arm: Arm) -> Arm:
        """Return the arm whose mean gate is the weight of a constant without one."""
        return next(other for other in self.beside(arm) if is_source_of_weight(other.spec, arm.spec))


def plan_comparison(
    file: Path,
    overrides: list[str],
    *,
    arms: str,
    seeds: int = 3,
    rates: str | None = None,
    folder: Path | None = None,
    match: bool = False,
) -> ComparisonPlan:
    """Read the recipe and plan its arms; no data or weights are loaded, and nothing is written.

    Args:
        arms: separated by commas, in the language of arms.py: `none,eaft,eaft:alpha=2,constant,lr/2,none+denoise`.
        rates: learning rates separated by commas; the recipe's by default.
        folder: runs/compare/<name of the recipe> by default.

    Raises:
        UserError: the recipe, a gate or an option is wrong, or the recipe cannot be compared.
    """
    recipe = load_recipe(file, overrides)
    specs, wrong = parse_arms(arms)
    problems = [*_problems_of(recipe, match), *wrong, *_unsuited_arms(recipe, specs)]
    learning_rates, wrong = _parse_rates(rates, recipe)
    problems += wrong
    if problems:
        raise UserError("\n".join(problems))
    changes = list(overrides)
    if recipe.data.held_out_share and recipe.data.seed is None:
        # with a split drawn by the training seed, an arm would train on the held-out rows of another
        changes.append(f"data.seed={recipe.train.seed}")
        recipe = load_recipe(file, changes)
    planned = tuple(
        Arm(spec, rate, recipe.train.seed + number, spec.label + (f"@{rate:g}" if len(learning_rates) > 1 else ""))
        for number in range(seeds)
        for rate in learning_rates
        for spec in specs
    )
    plan = ComparisonPlan(file, tuple(changes), recipe, folder or Path("runs/compare") / file.stem, planned, match)
    for arm in plan.trained:
        # checks the options of the gate, the methods and their values
        arm_recipe(plan, arm, _ANY_VALUES if arm.spec.order else {})
    return plan


def arm_recipe(plan: ComparisonPlan, arm: Arm, depending: Mapping[str, str] = MappingProxyType({})) -> Recipe:
    """Return the recipe that trains `arm`.

    Args:
        depending: changes that depend on finished arms, by key: the weight of a constant without one, the loss at which
            an early stop ends.

    Raises:
        RecipeError: the gate or a method has no such option, or its value is out of range.
    """
    spec = arm.spec
    options = dict(spec.options)
    if spec.is_matched_scale:
        options["weight"] = depending["loss.weight"]
    foreign = [option for option in ALL_GATE_OPTIONS if option not in GATE_OPTIONS[spec.gate]]
    changes = spec.recipe_changes(other.spec for other in plan.arms)
    stop = {"train.stop_at": depending["train.stop_at"]} if spec.stops_early else {}
    return load_recipe(
        plan.file,
        [
            *plan.overrides,
            f"loss.gate={spec.gate}",
            *(f"loss.{option}=null" for option in foreign if option not in options),
            *(f"loss.{option}={value}" for option, value in options.items()),
            *(f"{key}={value}" for key, value in {**changes, **stop}.items()),
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


def _unsuited_arms(recipe: Recipe, specs: list[ArmSpec]) -> Iterator[str]:
    """Yield the problems of arms that this recipe does not allow."""
    repairs = [spec for spec in specs if spec.repair]
    if repairs and recipe.lora and recipe.lora.use_dora:
        yield (
            f"--arms {repairs[0].label}: a repair acts on the change of the weights, and DoRA's is no sum of low-rank "
            "updates. Leave the repairs out, or compare LoRA adapters."
        )
    denoised = next((spec for spec in repairs if spec.repair.denoise), None)
    if denoised and recipe.lora and recipe.lora.r < SMALLEST:
        yield (
            f"--arms {denoised.label}: adapters of rank {recipe.lora.r} have too few singular values for a threshold. Raise "
            f"lora.r to {SMALLEST} or more, or leave denoise out."
        )
    early = any(spec.stops_early for spec in specs)
    if early and all(probe.name != "held_out_loss" for probe in recipe.probes.target or []):
        yield (
            f"--arms {EARLY_STOP}: it ends at the held-out loss of another arm, which is not measured. Set data.held_out and "
            f"add held_out_loss to probes.target, or leave {EARLY_STOP} out."
        )


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
