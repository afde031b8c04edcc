"""The options of `eaftdrope ttt eval`, and what is wrong with them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from eaftdrope.errors import UserError

from ..suites.subject import find_subject
from .arms import ARMS
from .rate import RATES

PROBES = ("loss", "needle", "latency", "retention")
QUICK = {
    "passages": 2,
    "fit_passages": 1,
    "rates": (0.1, 0.3),
    "trials": 8,
    "read": 2048,
    "positions": (512, 2048),
    "questions": 24,
    "probe_tokens": 4096,
}
"""Options of a first look."""


@dataclass(frozen=True)
class TTTEvalOptions:
    """The options of `eaftdrope ttt eval`.

    Attributes:
        model: with or without TTT.
        base: the model that it was trained from; None for its own weights without TTT.
        control: trained on the same tokens without TTT.
        texts, fit_texts: files; none for the shipped novel, and for the last passages of the texts.
        length, passages, fit_passages: tokens of a passage (None: four windows), and how many at most.
        window, sink, chunk: of a model without TTT; None for the defaults of `TTTConfig`.
        rates: inner rates that naive TTT chooses from; a single one is used as it is.
        arms: names of `ARMS`; none for all that are possible.
        trials: needles in each place.
        read: tokens that the retention reads.
        positions: context positions of the latency.
        questions, probe_tokens: limits of the retention's probes; None for all.
        device, dtype: torch's names.
    """

    model: str
    base: str | None = None
    control: str | None = None
    texts: tuple[Path, ...] = ()
    fit_texts: tuple[Path, ...] = ()
    length: int | None = None
    passages: int = 16
    fit_passages: int = 4
    window: int | None = None
    sink: int | None = None
    chunk: int | None = None
    rates: tuple[float, ...] = RATES
    arms: tuple[str, ...] = ()
    probes: tuple[str, ...] = PROBES
    trials: int = 50
    read: int = 16384
    positions: tuple[int, ...] = (512, 2048, 8192, 32768)
    questions: int | None = None
    probe_tokens: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


def wrong_options(options: TTTEvalOptions) -> list[str]:
    """Return every problem that needs no file but the models'."""
    problems = []
    for option, names, known in (("--arms", options.arms, tuple(ARMS)), ("--probes", options.probes, PROBES)):
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                problems.append(f"{option}: {name!r} is not one of {', '.join(known)}.{hint}")
    if not options.probes:
        problems.append(f"--probes is empty. Pass some of {', '.join(PROBES)}.")
    if not options.rates or min(options.rates) <= 0:
        problems.append("--lr: every rate is above 0, such as 0.1,0.3,1.")
    for option, reference in (("MODEL", options.model), ("--base", options.base), ("--control", options.control)):
        try:
            if reference is not None:
                find_subject(reference)
        except UserError as error:
            problems.append(f"{option}: {error}")
    return problems
