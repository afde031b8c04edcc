"""The plan of `eaftdrope rlm bench`: arms x tasks x lengths, and how many trials each cell has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from eaftdrope.errors import UserError, raise_problems
from eaftdrope.rlm import Limits
from eaftdrope.rlm.tasks import KINDS, SETS

from ..suites.subject import find_subject
from .trials import ARMS, CEILING, FLOOR

DEFAULT_TASKS = tuple(kind for kind in KINDS if kind != "count")
# these read the whole context with the model, so they cost the most
_SLOW_ARMS, _SLOW_TRIALS = ("map-reduce", "summary"), 10
_LONG, _LONG_TRIALS = 500_000, 3
_LENGTH = re.compile(r"(\d+)([km]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}


@dataclass(frozen=True)
class BenchOptions:
    """The options of `eaftdrope rlm bench`.

    Args:
        model, sub_model: references; names at the endpoint, if there is one.
        window: context of served models in tokens; None: as the server states it.
        classifier_errors: error rate of a scripted sub-model, used instead of a real one; None: a real one.
        lengths: of contexts, in characters.
        trials: of a cell; fewer of slow arms and long contexts.
        names, phrasings: the sets of the tasks.
        limits: of a trial; its seconds are those of a group of trials in lockstep.
    """

    model: str
    sub_model: str | None = None
    endpoint: str | None = None
    window: int | None = None
    classifier_errors: float | None = None
    tasks: tuple[str, ...] = DEFAULT_TASKS
    lengths: str = "8k,64k,1m"
    arms: tuple[str, ...] = ARMS
    trials: int = 50
    names: str = "test"
    phrasings: str = "train"
    device: str = "cpu"
    dtype: str = "float32"
    short_prompt: bool = False
    limits: Limits = field(default_factory=lambda: Limits(seconds=10.0**7))


@dataclass(frozen=True)
class BenchCell:
    """Trials with the seeds 0 to `trials` - 1 of a task at a length under an arm."""

    task: str
    chars: int
    arm: str
    trials: int

    @property
    def key(self) -> tuple[str, int, str]:
        """What identifies the cell in the results."""
        return self.task, self.chars, self.arm


@dataclass(frozen=True)
class BenchPlan:
    """A checked plan; `settings` is what determines the results, as JSON."""

    options: BenchOptions
    cells: tuple[BenchCell, ...]
    settings: dict[str, Any]


def make_plan(options: BenchOptions, problems: Sequence[str] = ()) -> BenchPlan:
    """Check the options and list the cells, the cheap ones first.

    Args:
        problems: those that the caller has found; reported with the rest.

    Raises:
        UserError: with every problem that was found.
    """
    problems = [*problems]
    for option, names, known in (
        ("--tasks", options.tasks, KINDS),
        ("--arms", options.arms, ARMS),
        ("--names", (options.names,), SETS),
        ("--phrasings", (options.phrasings,), SETS),
    ):
        problems += [_unknown(option, name, known) for name in names if name not in known]
        if not names:
            problems.append(f"{option} is empty. Pass some of {', '.join(known)}.")
    lengths: list[int] = []
    try:
        lengths = parse_chars(options.lengths)
    except UserError as error:
        problems.append(f"--lengths: {error}")
    checkpoints = {}
    for reference in _references(options):
        try:
            checkpoints[reference] = find_subject(reference).fingerprint()
        except UserError as error:
            problems.append(str(error))
    raise_problems(problems)
    cells = tuple(
        BenchCell(task, chars, arm, _trials(options.trials, chars, arm))
        for chars in lengths
        for task in options.tasks
        for arm in ARMS
        if arm in options.arms
    )
    settings = {**asdict(options), "tasks": list(options.tasks), "arms": list(options.arms), "lengths": lengths}
    settings["checkpoints"] = checkpoints
    return BenchPlan(options, cells, settings)


def _references(options: BenchOptions) -> list[str]:
    """The models to load: none at an endpoint, and none for arms that call none."""
    if options.endpoint is not None or not set(options.arms) - {FLOOR, CEILING}:
        return []
    sub_model = options.sub_model if options.classifier_errors is None else None
    return [reference for reference in (options.model, sub_model) if reference is not None]


def _unknown(option: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{option}: {name!r} is not one of {', '.join(known)}.{hint}"


def _trials(trials: int, chars: int, arm: str) -> int:
    if chars >= _LONG:
        trials = min(trials, _LONG_TRIALS)
    return min(trials, _SLOW_TRIALS) if arm in _SLOW_ARMS else trials


def parse_chars(text: str) -> list[int]:
    """Parse lengths in characters, such as `8k,64k,1m`; return them ascending, each once.

    Raises:
        UserError: a part is not a length, or below 100 characters.
    """
    lengths = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _LENGTH.fullmatch(part)
        if match is None:
            raise UserError(f"{part!r} is not a length in characters. Write 8000, 8k or 1m.")
        lengths.add(int(match[1]) * _UNITS[match[2].lower()])
    if not lengths or min(lengths) < 100:
        raise UserError(f"{text!r}: a length is at least 100 characters, such as 8k,64k.")
    return sorted(lengths)
