"""The language of arms: what `--arms` may contain, and what each word does.

    --arms none,eaft:alpha=2,lr/5,eaft+replay=0.1,early-stop,none+denoise,none+restore=q_proj,k_proj

An arm is a list of terms joined with +:

    GATE[:OPTION=VALUE]...     a gate of the loss; without one, plain fine-tuning (none)
    METHOD[=VALUE]             changes of the recipe, listed in METHODS
    lr/N                       the learning rate divided by N
    early-stop                 ends once the held-out loss is that of the weakest other arm of its seed
    denoise, share=A, restore=MODULE,...
                               a repair of the finished arm that the other terms describe, without training

A new method is a line of METHODS.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from eaftdrope.checkpoints.repair_options import NOTHING, Repair
from eaftdrope.errors import UserError
from eaftdrope.loss.anchor import PRESETS
from eaftdrope.loss.gates import GATE_OPTIONS
from eaftdrope.recipe.suggest import did_you_mean

PLAIN = "none"
# the gate whose mean is the weight of a constant
MEASURED_GATE = "eaft"
EARLY_STOP = "early-stop"


class Method(NamedTuple):
    """Changes of the recipe under one name.

    Attributes:
        changes: key of the recipe -> value; `{}` stands for the value of the term.
        default: value of a term without one; None for a method that has no value.
        gate: the gate that belongs to the method; None for any.
        without: the same for the arms without the method, in a comparison where another arm has it.
    """

    changes: Mapping[str, str]
    default: str | None = None
    gate: str | None = None
    without: Mapping[str, str] = MappingProxyType({})


_NO_ANCHOR = {"loss.preset": "null", "loss.anchor": "null"}
_ANCHORS = {
    name: Method(
        {"loss.preset": name, "loss.anchor": "{{kl: {}}}"},
        default=f"{preset.anchor.kl:g}",
        gate=None if preset.gate == PLAIN else preset.gate,
        without=_NO_ANCHOR,
    )
    for name, preset in PRESETS.items()
}
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        # Forgetting in Language Models: Capacity, Optimization, Self-Generated Replay (arXiv 2605.26097)
        "replay": Method({"data.replay.share": "{}"}, default="0.2", without={"data.replay": "null"}),
        **_ANCHORS,
    }
)
_REFUSED = {
    "sdft": (
        "self-distillation is no arm yet. TRL's experimental SDFTTrainer runs, but its replies are in no checkpoint, so an "
        "arm that was killed would not resume as the same training, and nothing here trains through it. Train with it into a "
        "folder, and measure that with `eaftdrope eval BASE TUNED`."
    ),
}
_REPAIRS = ("denoise", "share", "restore")
_RATE = re.compile(r"lr/(\S+)")


@dataclass(frozen=True)
class ArmSpec:
    """An arm as the user wrote it, without its seed.

    Attributes:
        gate: name of the gate.
        options: of the gate, as text.
        methods: (name, value) of each method; the value is "" for one without.
        rate_divisor: of the learning rate.
        stops_early: the training ends once it has reached the level of the weakest other arm.
        repair: what is done to the finished arm.
    """

    gate: str = PLAIN
    options: tuple[tuple[str, str], ...] = ()
    methods: tuple[tuple[str, str], ...] = ()
    rate_divisor: float = 1.0
    stops_early: bool = False
    repair: Repair = NOTHING

    @property
    def label(self) -> str:
        """The arm for tables, such as `eaft alpha=2 + lr/5 + denoise`."""
        parts = [name if not value else f"{name} {value}" for name, value in self.methods]
        parts += [f"lr/{self.rate_divisor:g}"] if self.rate_divisor != 1 else []
        parts += ["early stop"] if self.stops_early else []
        gates = [method.gate for name, _ in self.methods if (method := METHODS[name]).gate]
        if not parts or (self.gate != PLAIN and self.gate not in gates) or self.options:
            parts.insert(0, " ".join([self.gate, *(f"{option}={value}" for option, value in self.options)]))
        parts += ["denoise"] if self.repair.denoise else []
        parts += [f"restore {' '.join(self.repair.restore)}"] if self.repair.restore else []
        parts += [f"share {self.repair.share:g}"] if self.repair.share != 1 else []
        return " + ".join(parts)

    @property
    def training(self) -> ArmSpec:
        """The arm that is trained: this one without its repair."""
        return replace(self, repair=NOTHING)

    @property
    def is_matched_scale(self) -> bool:
        """The gate is a constant without a weight: its weight is the mean gate of the eaft arm."""
        return self.gate == "constant" and not self.options

    @property
    def order(self) -> int:
        """Arms of a higher order need finished arms of a lower one."""
        return 3 if self.repair else 2 if self.stops_early else 1 if self.is_matched_scale else 0

    def recipe_changes(self, others: Iterable[ArmSpec]) -> dict[str, str]:
        """Return key -> value of the methods of this arm, and of those that only `others` have."""
        absent = {name for other in others for name, _ in other.methods} - dict(self.methods).keys()
        changes = {key: text for name in sorted(absent) for key, text in METHODS[name].without.items()}
        for name, value in self.methods:
            changes |= {key: text.format(value) for key, text in METHODS[name].changes.items()}
        return changes


def parse_arms(text: str) -> tuple[list[ArmSpec], list[str]]:
    """Return the arms, each once and those that need others last, and the problems found."""
    specs: dict[str, ArmSpec] = {}
    problems = []
    for arm in _split(text):
        try:
            spec = _parse(arm)
        except UserError as error:
            problems.append(f"--arms {arm}: {error}")
        else:
            specs[spec.label] = spec
    found = sorted(specs.values(), key=lambda spec: spec.order)
    if not problems:
        problems += _missing_arms(found)
    return found, problems


def _missing_arms(specs: list[ArmSpec]) -> Iterator[str]:
    if len(specs) < 2:
        yield "--arms: pass at least two arms, such as none,eaft."
        return
    for spec in specs:
        if spec.repair and spec.training not in specs:
            yield (
                f"--arms {spec.label}: a repair needs the finished arm {spec.training.label}, which is missing. Add it to "
                "--arms."
            )
        elif spec.is_matched_scale and not any(is_source_of_weight(other, spec) for other in specs):
            yield (
                f"--arms {spec.label}: its weight is the mean gate of the eaft arm, which is missing. Add eaft to --arms, or "
                "set the weight: constant:weight=0.3."
            )
    if any(spec.stops_early for spec in specs) and all(spec.stops_early or spec.repair for spec in specs):
        yield f"--arms {EARLY_STOP}: it ends at the loss of the weakest other arm. Add another arm."


def is_source_of_weight(spec: ArmSpec, constant: ArmSpec) -> bool:
    """Return whether the mean gate of `spec` is the weight of a constant: an eaft arm that differs in nothing else."""
    return spec.gate == MEASURED_GATE and replace(spec, gate=constant.gate, options=()) == constant.training


def _split(text: str) -> list[str]:
    """Split at the commas between arms; those between the modules of a restore are kept."""
    arms: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        continues = bool(arms) and arms[-1].rpartition("+")[2].strip().startswith("restore=")
        if continues and not _is_known(part.partition("+")[0].strip()):
            arms[-1] += f",{part}"
        else:
            arms.append(part)
    return arms


def _is_known(term: str) -> bool:
    name = re.split("[:=]", term)[0]
    return name in (*GATE_OPTIONS, *METHODS, *_REPAIRS, EARLY_STOP) or _RATE.fullmatch(term) is not None


def _parse(text: str) -> ArmSpec:
    """Return the arm of a text.

    Raises:
        UserError: an unknown term, or terms that exclude each other.
    """
    spec, gates, repair = ArmSpec(), [], NOTHING
    for term in (term.strip() for term in text.split("+")):
        name, _, value = term.partition("=")
        gate, *options = (part.strip() for part in term.split(":"))
        if gate in GATE_OPTIONS:
            gates.append(gate)
            spec = replace(spec, gate=gate, options=_options(options))
        elif match := _RATE.fullmatch(term):
            spec = replace(spec, rate_divisor=spec.rate_divisor * _number(match[1], "lr/", above=0, below=math.inf))
        elif term == EARLY_STOP:
            spec = replace(spec, stops_early=True)
        elif name in METHODS:
            spec = replace(spec, methods=(*spec.methods, (name, _value(name, value))))
        elif name in _REFUSED:
            raise UserError(_REFUSED[name])
        elif name in _REPAIRS:
            repair = _with_repair(repair, name, value)
        else:
            known = ("lr/2", EARLY_STOP, *GATE_OPTIONS, *METHODS, *_REPAIRS)
            raise UserError(
                f"no such gate or method.{did_you_mean(re.split('[:=]', term)[0], known)} Gates: {', '.join(GATE_OPTIONS)}. "
                f"Others: lr/2, {EARLY_STOP}, {', '.join(METHODS)}; repairs: {', '.join(_REPAIRS)}."
            )
    gates += [gate for name, _ in spec.methods if (gate := METHODS[name].gate)]
    if len(gates) > 1:
        raise UserError(f"{' and '.join(gates)} are two gates, and an arm has one.")
    _refuse_same_key([name for name, _ in spec.methods])
    return replace(spec, gate=gates[0] if gates else PLAIN, repair=repair)


def _refuse_same_key(methods: list[str]) -> None:
    """Refuse methods that set one key of the recipe, such as two anchors."""
    for first, second in itertools.combinations(methods, 2):
        if shared := METHODS[first].changes.keys() & METHODS[second].changes.keys():
            raise UserError(f"{first} and {second} both set {' and '.join(sorted(shared))}. Keep one.")


def _options(parts: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = [(option.strip(), value.strip()) for option, _, value in (part.partition("=") for part in parts)]
    if any(not option or not value for option, value in pairs):
        raise UserError("write options as gate:option=value, such as eaft:alpha=2.")
    return tuple(pairs)


def _value(name: str, value: str) -> str:
    default = METHODS[name].default
    if value and default is None:
        raise UserError(f"{name} has no value. Write {name}.")
    return value or default or ""


def _with_repair(repair: Repair, name: str, value: str) -> Repair:
    if name == "denoise":
        if value:
            raise UserError("denoise has no value. Write denoise.")
        return replace(repair, denoise=True)
    if name == "share":
        return replace(repair, share=_number(value, "share=", above=0, below=1))
    modules = tuple(filter(None, (module.strip() for module in value.split(","))))
    if not modules:
        raise UserError("restore needs modules. Write restore=q_proj,k_proj.")
    return replace(repair, restore=modules)


def _number(text: str, what: str, *, above: float, below: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not above < number < below:
        limits = f"above {above:g}" + (f" and below {below:g}" if below < math.inf else "")
        raise UserError(f"{what} needs a number {limits}, such as {what}{0.5 if below == 1 else 2}.")
    return number
