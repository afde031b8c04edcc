"""How much evidence a difference needs: Holm's correction over metrics, Student's t over seeds, and the size of a study.

One level is used everywhere: that of two standard errors of a normal distribution, two-sided (4.55 %). Where m metrics are
compared, Holm's step-down test (Scandinavian Journal of Statistics 6, 1979) keeps the probability that any of them is called
by chance at this level: the smallest p-value is compared with level / m, the next with level / (m - 1), and so on until one
fails; those after it are compared with the same bound. With k for the divisor of a metric, its margin is

    items   z(level / k) * standard error             z(level) = 2
    seeds   t(level / k, n - 1) * sd / sqrt(n)        t: Student's quantile with n - 1 degrees of freedom

The studies that would be needed assume that difference and spread stay as measured. The true difference may be smaller than
the measured one, so they are lower ends of a plan, not a promise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = math.erfc(math.sqrt(2))
"""Probability that a normal value is beyond two standard errors, on either side."""
MOST_SEEDS = 1000
"""A larger number of seeds is not computed: nobody trains so many."""
_STEPS = 60  # of a bisection: all digits of a float


def holm(p_values: Sequence[float]) -> list[int]:
    """Return for each p-value the k of its bound LEVEL / k; it is significant if and only if p < LEVEL / k."""
    counts = [0] * len(p_values)
    k = len(p_values)
    for index in sorted(range(len(p_values)), key=p_values.__getitem__):
        counts[index] = k
        if k * p_values[index] < LEVEL:
            k -= 1
        else:
            # the others are no smaller, and the bound stays
            for other in range(len(p_values)):
                counts[other] = counts[other] or k
            break
    return counts


def normal_p(ratio: float) -> float:
    """Return the two-sided p-value of a difference of `ratio` standard errors."""
    return math.erfc(abs(ratio) / math.sqrt(2))


def normal_quantile(count: int = 1) -> float:
    """Return the number of standard errors that is exceeded with probability LEVEL / count; 2 for a count of 1."""
    return 2.0 if count == 1 else NormalDist().inv_cdf(1 - LEVEL / count / 2)


def student_p(t: float, freedom: int) -> float:
    """Return the two-sided p-value of Student's t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    return 1 - _student_inside(math.atan(abs(t) / math.sqrt(freedom)), freedom)


@functools.cache
def student_quantile(freedom: int, count: int = 1) -> float:
    """Return the value of Student's t that is exceeded, on either side, with probability LEVEL / count."""
    low, high = 0.0, math.pi / 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - _student_inside(middle, freedom) > LEVEL / count else (low, middle)
    return math.sqrt(freedom) * math.tan(high)


def _student_inside(angle: float, freedom: int) -> float:
    """Return the probability that |t| is below sqrt(freedom) * tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom % 2 == 0:
        term, total = 1.0, 1.0
        for i in range(2, freedom, 2):
            term *= cosine * cosine * (i - 1) / i
            total += term
        return sine * total
    term, total = cosine, cosine if freedom > 1 else 0.0
    for i in range(3, freedom, 2):
        term *= cosine * cosine * (i - 1) / i
        total += term
    return 2 / math.pi * (angle + sine * total)


def seeds_needed(difference: float, sd: float, count: int = 1) -> int | None:
    """Return the number of seeds at which a mean difference would be beyond its margin, if it and the standard deviation
    over seeds stay; None if more than MOST_SEEDS."""

    def is_enough(n: int) -> bool:
        return abs(difference) > student_quantile(n - 1, count) * sd / math.sqrt(n)

    low, high = 1, MOST_SEEDS
    if not is_enough(high):
        return None
    # is_enough(low) is false or low is 1, is_enough(high) is true
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def items_needed(n: int, margin: float, wanted: float) -> int | None:
    """Return the number of items at which a margin measured on `n` items would be at most `wanted`; None if no number is
    enough."""
    if wanted <= 0:
        return None
    return math.ceil(n * (margin / wanted) ** 2)


def about(count: int) -> str:
    """Return a count with two significant digits, rounded up: a study that is a little too small is not enough."""
    scale = 10 ** max(0, len(str(count)) - 2)
    return f"{math.ceil(count / scale) * scale:,}"
