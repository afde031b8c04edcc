"""The softmax temperature for a length: the beta with the least loss there, and the slope over several lengths.

    beta(s) = 1 + c ln(s),  s = length / trained length        (arXiv 2512.12167, appendix C.2)

For each length beta is found by a coarse grid and a golden-section search on the mean loss of held-out windows; c is the
least-squares slope through beta = 1 at s = 1. Windows are the same for every beta, so the error of a gain is computed over
the windows' differences. The gain is measured on the windows that selected the best beta, so it is slightly optimistic.

`plan_temperature` is the plan of `eaftdrope drope temperature`: every mistake is found before the model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.drope.config import RECORD, trained_length
from eaftdrope.drope.temperature import scaled_queries
from eaftdrope.errors import UserError, raise_problems
from eaftdrope.models import load_config, load_model, load_tokenizer, refuse_ttt

from ..likelihood import Progress
from ..scores import Score, change_stderr
from ..texts import SHIPPED
from ..verdicts import BETTER, judge_change
from .lengths import parse_lengths
from .needles import Hay, Windows
from .perplexity import window_losses
from .plan import read_given_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GRID = (0.9, 1.0, 1.1, 1.25, 1.45, 1.7)
# No published beta lies outside; a search that ends here has found no minimum.
LOWEST, HIGHEST = 0.5, 4.0
_TOLERANCE = 0.01
# Grid and golden section; more if the minimum is far from 1.
USUAL_PASSES = 16
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class TemperatureFit:
    """The search at one length.

    Attributes:
        length, beta: tokens, and the beta with the least perplexity among those tried.
        tried: beta -> perplexity over the windows, in the order of beta; 1.0 is always among them.
        at_edge: no minimum was found between `LOWEST` and `HIGHEST`.
    """

    length: int
    beta: float
    tried: dict[float, Score]
    at_edge: bool

    @property
    def best(self) -> Score:
        return self.tried[self.beta]

    @property
    def plain(self) -> Score:
        """The perplexity at beta = 1."""
        return self.tried[1.0]

    @property
    def stderr(self) -> float | None:
        """Standard error of the change of perplexity from beta = 1 to the best (None with a single window)."""
        return change_stderr(self.plain, self.best)

    @property
    def distinguishable(self) -> bool:
        """True if the best beta is better than 1 by more than two standard errors."""
        return judge_change(self.plain, self.best).word == BETTER


def fit_temperature(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    length: int,
    *,
    windows: int = 8,
    batch_tokens: int = 16384,
    progress: Callable[[float, float], None] | None = None,
) -> TemperatureFit:
    """Return the beta with the least perplexity on windows of `length` tokens; each beta tried costs a pass over them.

    Args:
        progress: called with (beta, perplexity) after each pass.

    Raises:
        UserError: the texts are shorter than a window, or the model has no scores to scale.
    """
    hay = Hay(tokenizer, texts)
    cut = hay.windows(length, windows)
    if cut is None:
        raise UserError(f"the text has {len(hay.tokens)} tokens, too few for a window of {length}. Use a longer text.")

    def measure(beta: float) -> Score:
        with scaled_queries(model, beta):
            score = window_losses(model, cut, prefix=len(hay.prefix), batch_tokens=batch_tokens).score()
        if progress is not None:
            progress(beta, score.value)
        return score

    return search(length, measure)


def search(length: int, measure: Callable[[float], Score]) -> TemperatureFit:
    """Minimise the value of `measure(beta)`: the grid, further steps if the minimum is at its end, golden section."""
    tried: dict[float, Score] = {}

    def value(beta: float) -> float:
        if beta not in tried:
            tried[beta] = measure(beta)
        return tried[beta].value

    for beta in GRID:
        value(beta)
    while (best := _least(tried)) in (edge := (min(tried), max(tried))) and LOWEST < best < HIGHEST:
        value(max(LOWEST, best * 0.8) if best == edge[0] else min(HIGHEST, best * 1.25))
    at_edge = best in (LOWEST, HIGHEST)
    if not at_edge:
        _golden_section(value, *_neighbours(tried, best))
    return TemperatureFit(length, _least(tried), dict(sorted(tried.items())), at_edge)


def fit_slope(betas: dict[float, float]) -> float:
    """Return c of beta = 1 + c ln(s) by least squares; `betas` is s -> beta; entries with s = 1 do not matter.

    Raises:
        UserError: no s above 1.
    """
    points = [(math.log(s), beta - 1.0) for s, beta in betas.items() if s > 1]
    if not points:
        raise UserError("a slope needs a length beyond the trained one.")
    return sum(x * y for x, y in points) / sum(x * x for x, _ in points)


def _least(tried: dict[float, Score]) -> float:
    return min(tried, key=lambda beta: tried[beta].value)


def _neighbours(tried: dict[float, Score], beta: float) -> tuple[float, float]:
    ordered = sorted(tried)
    at = ordered.index(beta)
    return ordered[at - 1], ordered[at + 1]


def _golden_section(value: Callable[[float], float], low: float, high: float) -> None:
    """Narrow [low, high], which contains a minimum, down to `_TOLERANCE`; `value` remembers what it computed."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    while high - low > _TOLERANCE:
        # Rounded so that printed values are the values tried.
        left, right = round(left, 4), round(right, 4)
        if value(left) <= value(right):
            high, right = right, left
            left = high - _GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + _GOLDEN * (high - low)


@dataclass(frozen=True)
class TemperaturePlan:
    """A checked fit; `target` is the length to serve, `lengths` are fitted, `announced` is `max_position_embeddings`."""

    model: str
    target: int
    lengths: tuple[int, ...]
    trained: int
    announced: int
    windows: int
    text: str
    texts: list[str]
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[str, ...]


def plan_temperature(
    model: str,
    length: str,
    lengths: str | None,
    text: Path | None,
    windows: int,
    trained: int | None = None,
    problems: list[str] | None = None,
) -> TemperaturePlan:
    """Check the options of `eaftdrope drope temperature`; `problems` are those that the caller has found.

    Raises:
        UserError: with every problem that was found.
    """
    problems = list(problems or [])
    texts, config = [], None
    try:
        texts = read_given_texts(text)
    except UserError as error:
        problems.append(str(error))
    try:
        refuse_ttt(model)
        config = load_config(model)
        trained = trained or trained_length(config)
        folded = (getattr(config, RECORD, None) or {}).get("temperature", 1.0)
        if folded != 1.0:
            problems.append(
                f"{model} has a temperature of {folded:g} folded in already, so a further fit would not be a formula of the "
                "length. Fit on the checkpoint that it was converted from."
            )
    except UserError as error:
        problems.append(str(error))
    target, fitted = 0, []
    try:
        (target,) = parse_lengths(length, trained or 1024)
        fitted = sorted({target, *parse_lengths(lengths or length, trained or 1024)})
    except UserError as error:
        problems.append(f"--length and --lengths: {error}")
    except ValueError:
        problems.append(f"--length {length}: only one length is folded in. Pass the others with --lengths.")
    if trained and fitted and fitted[0] <= trained:
        problems.append(
            f"{fitted[0]:,} tokens are not beyond the trained {trained:,}, where beta is 1. Choose longer lengths, or "
            "correct --trained-length."
        )
    raise_problems(problems)
    assert config is not None and trained is not None, "a missing configuration is a problem"
    tokenizer = load_tokenizer(model)
    hay = Hay(tokenizer, texts)
    cut = {length: hay.windows(length, windows) for length in fitted}
    if missing := [f"{length:,}" for length, found in cut.items() if found is None]:
        raise UserError(
            f"the text has {len(hay.tokens):,} tokens, too few for a window of {', '.join(missing)}. Pass a longer one with "
            "--text: held-out text, which the model was not trained on."
        )
    announced = getattr(config.get_text_config(), "max_position_embeddings", None) or trained
    notes = tuple(_notes({length: found for length, found in cut.items() if found is not None}, len(hay.documents)))
    name = SHIPPED if text is None else text.name
    return TemperaturePlan(model, target, tuple(fitted), trained, announced, windows, name, texts, tokenizer, notes)


def fit_all(
    plan: TemperaturePlan,
    *,
    device: str,
    dtype: str,
    batch_tokens: int,
    started: Callable[[str], Progress],
) -> list[TemperatureFit]:
    """Load the model and search at each length.

    Args:
        started: called with a description before each length; returns the function that is called with (passes done,
            estimated passes).
    """
    model = load_model(plan.model, dtype=dtype).to(device)
    fits = []
    for length in plan.lengths:
        step = started(f"fitting at {length:,} tokens")
        done: list[float] = []

        def progress(beta: float, perplexity: float, step: Progress = step, done: list[float] = done) -> None:
            done.append(beta)
            step(len(done), max(len(done), USUAL_PASSES))

        fits.append(
            fit_temperature(
                model,
                plan.tokenizer,
                plan.texts,
                length,
                windows=plan.windows,
                batch_tokens=batch_tokens,
                progress=progress,
            )
        )
    return fits


def as_document(plan: TemperaturePlan, fits: list[TemperatureFit]) -> dict:
    """Return the content of temperature.json."""
    return {
        "schema": 1,
        "model": plan.model,
        "trained_length": plan.trained,
        "announced_length": plan.announced,
        "target": plan.target,
        "text": plan.text,
        "windows": plan.windows,
        "slope": fit_slope({fit.length / plan.trained: fit.beta for fit in fits}),
        "fits": [
            {
                "length": fit.length,
                "windows": fit.best.n,
                "beta": fit.beta,
                "perplexity": fit.best.value,
                "perplexity_at_1": fit.plain.value,
                "stderr": fit.stderr,
                "distinguishable": fit.distinguishable,
                "at_edge": fit.at_edge,
                "tried": [
                    {"beta": beta, "perplexity": score.value, "stderr": score.stderr}
                    for beta, score in fit.tried.items()
                ],
            }
            for fit in fits
        ],
    }


def _notes(cut: dict[int, Windows], documents: int) -> list[str]:
    notes = []
    joined = [f"{length:,}" for length, found in cut.items() if found.joined]
    if joined and documents > 1:
        notes.append(f"no document has {', '.join(joined)} tokens: windows cross documents there.")
    if few := [f"{length:,}" for length, found in cut.items() if len(found.rows) < 4]:
        notes.append(f"fewer than four windows at {', '.join(few)}: the result is uncertain.")
    return notes
