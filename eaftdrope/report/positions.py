"""The loss by position in the row, as a training logs it: `position/nll_512_1024` is the mean over positions 512 to 1023."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

_KEY = re.compile(r"position/nll_(\d+)_(\d+)")
# the loss of the first quarter of the training is compared with that of the last
_PARTS = 4


def position_bins(metrics: Sequence[dict]) -> dict[str, str]:
    """The logged bins in order: key of metrics.jsonl -> label such as `512 to 1,023`."""
    found = {match for row in metrics for key in row if (match := _KEY.fullmatch(key))}
    bounds = {(int(match[1]), int(match[2])): match[0] for match in found}
    return {key: f"{start:,} to {end - 1:,}" for (start, end), key in sorted(bounds.items())}


def position_rows(metrics: Sequence[dict]) -> list[tuple[str, float, float]]:
    """(positions, mean loss in the first quarter of the training, in the last) of each bin, in nats per token."""
    rows = []
    for key, label in position_bins(metrics).items():
        values = [row[key] for row in metrics if key in row]
        part = max(1, len(values) // _PARTS)
        rows.append((label, fmean(values[:part]), fmean(values[-part:])))
    return rows


def position_markdown(metrics: Sequence[dict]) -> str:
    """The loss by position as a table; "" if it was not logged."""
    rows = position_rows(metrics)
    if not rows:
        return ""
    lines = [f"| {label} | {first:.3f} | {last:.3f} |" for label, first, last in rows]
    head = "| position | first quarter of the training | last quarter |"
    return "\n".join(["Loss of the training batches by position, nats per token:", "", head, "|---|---|---|", *lines])
