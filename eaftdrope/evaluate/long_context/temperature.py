"""The softmax temperature that a length wants: beta with the least loss there, and the slope that joins the lengths.

    beta(s) = 1 + c ln(s),  s = length / trained length        (arXiv 2512.12167, appendix C.2)

For each length beta is found by a coarse grid and a golden-section search on the mean loss of held-out windows; c is the
least-squares slope through beta = 1 at s = 1. Windows are the same for every beta, so the error of a gain is taken over the
windows' differences. The gain is that of the best beta on the windows that chose it, and flatters it a little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from eaftdrope.drope.temperature import scaled_queries
from eaftdrope.errors import UserError
from eaftdrope.evaluate.scores import Score, change_stderr, verdict

from .haystack import Hay
from .perplexity import window_losses

GRID = (0.9, 1.0, 1.1, 1.25, 1.45, 1.7)
# Nobody has seen a beta outside; a search that ends here has found no minimum.
LOWEST, HIGHEST = 0.5, 4.0
_TOLERANCE = 0.01
# The grid and golden section: more where the least is far from 1.
USUAL_PASSES = 16
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Fit:
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
        """Whether the best beta is better than 1 by more than two standard errors."""
        return verdict(self.plain, self.best) == "better"


def fit_temperature(
    model, tokenizer, texts: list[str], length: int, *, windows: int = 8, batch_tokens: int = 16384, progress=None
) -> Fit:
    """Find the beta with the least perplexity on windows of `length` tokens; each beta tried costs a pass over them.

    Args:
        progress: called with (beta, perplexity) after each pass.

    Raises:
        UserError: the texts are shorter than a window, or the model has no scores to scale.
    """
    hay = Hay(tokenizer, texts)
    cut = hay.windows(length, windows)
    if cut is None:
        raise UserError(f"the text has {len(hay.tokens)} tokens, too few for a window of {length}. Name a longer text.")

    def measure(beta: float) -> Score:
        with scaled_queries(model, beta):
            score = window_losses(model, cut, begin=len(hay.begin), batch_tokens=batch_tokens).score()
        if progress is not None:
            progress(beta, score.value)
        return score

    return search(length, measure)


def search(length: int, measure: Callable[[float], Score]) -> Fit:
    """Minimise the value of `measure(beta)`: the grid, further steps where the least is at its end, golden section."""
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
    return Fit(length, _least(tried), dict(sorted(tried.items())), at_edge)


def fit_slope(betas: dict[float, float]) -> float:
    """c of beta = 1 + c ln(s) by least squares; `betas` is s -> beta, and s = 1 says nothing about c.

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
    """Narrow [low, high], which holds a minimum, down to `_TOLERANCE`; what was tried stays in the caller's memory."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    while high - low > _TOLERANCE:
        # Rounded so that what is printed is what was tried.
        left, right = round(left, 4), round(right, 4)
        if value(left) <= value(right):
            high, right = right, left
            left = high - _GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + _GOLDEN * (high - low)
