"""The verdict on training with a sparse tail, relative to training with exact gradients.

The rule, fixed before any run: **the sparse tail is safe if no seed's final held-out loss differs from that of
exact gradients (same seed, so same rows in the same order) by more than exact training itself varies between
seeds.** That spread is the sample standard deviation over seeds of the final held-out loss of exact training.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

RULE = (
    "safe if, for every seed, |final held-out loss, sparse - exact| <= the sample standard deviation over seeds of the "
    "final held-out loss of exact"
)

Curve = Sequence[tuple[int, float]]
"""(step, held-out loss), by step."""


def judge(exact: Mapping[int, Curve], sparse: Mapping[int, Curve]) -> dict:
    """Apply the rule to the curves by seed, and return its outcome with the numbers it is based on.

    Raises:
        ValueError: fewer than two seeds, or curves of different seeds or steps.
    """
    if len(exact) < 2 or set(exact) != set(sparse):
        raise ValueError(f"a verdict needs two seeds of both arms: exact has {sorted(exact)}, sparse {sorted(sparse)}.")
    for seed, curve in exact.items():
        if [step for step, _ in curve] != [step for step, _ in sparse[seed]]:
            raise ValueError(f"seed {seed}: the two curves were not measured at the same steps.")
    final = {seed: sparse[seed][-1][1] - exact[seed][-1][1] for seed in exact}
    spread = statistics.stdev(curve[-1][1] for curve in exact.values())
    largest = max(
        (
            {"difference": theirs - ours, "step": step, "seed": seed}
            for seed in exact
            for (step, ours), (_, theirs) in zip(exact[seed], sparse[seed], strict=True)
        ),
        key=lambda place: abs(place["difference"]),
    )
    # relative to the gain of exact training
    gain = statistics.mean(curve[0][1] - curve[-1][1] for curve in exact.values())
    return {
        "rule": RULE,
        # written so that NaN is never safe
        "safe": all(abs(difference) <= spread for difference in final.values()),
        "final_exact": {seed: curve[-1][1] for seed, curve in exact.items()},
        "final_difference": final,
        "mean_final_difference": statistics.mean(final.values()),
        "spread_over_seeds": spread,
        "largest_along_the_curve": largest,
        "gain_of_exact": gain,
        "largest_final_difference_by_gain": max(map(abs, final.values())) / gain if gain else None,
    }
