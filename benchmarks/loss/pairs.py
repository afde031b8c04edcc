"""Times of a method and of the floor, measured in turn, and their statistics. Does not import torch.

A machine that slows down slows both of a pair, so the ratio of a pair stays meaningful while seconds do not. The order
within a pair alternates. The reported figure is the median of the ratios, not the ratio of two medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Time:
    """Seconds of one call: CPU time of all threads, wall time, and (on a device) the time between its events."""

    cpu: float
    wall: float
    device: float | None = None


Timed = Callable[[Callable[[], None]], Time]


def time_on_cpu(call: Callable[[], None]) -> Time:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return Time(time.process_time() - cpu, time.perf_counter() - wall)


def time_on_cuda(call: Callable[[], None]) -> Time:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return Time(time.process_time() - cpu, time.perf_counter() - wall, start.elapsed_time(end) / 1e3)


def take_pairs(
    method: Callable[[], None], floor: Callable[[], None], timed: Timed, *, repeat: int, seconds: float
) -> list[tuple[Time, Time]]:
    """Return `repeat` pairs of `(method, floor)` times; fewer, but at least one, if they would exceed `seconds`."""
    pairs: list[tuple[Time, Time]] = []
    start = time.perf_counter()
    while len(pairs) < repeat:
        # in an even number of pairs, each is first in half
        pairs.append(_pair(method, floor, timed, method_first=len(pairs) % 2 == 0))
        spent = time.perf_counter() - start
        if spent + spent / len(pairs) > seconds:
            break
    return pairs


def _pair(method, floor, timed: Timed, *, method_first: bool) -> tuple[Time, Time]:
    if method_first:
        first = timed(method)
        return first, timed(floor)
    first = timed(floor)
    return timed(method), first


def summarise(pairs: list[tuple[Time, Time]], clock: str) -> dict[str, float | int | None]:
    """Return median, lowest and highest ratio by `clock` ("cpu", "wall" or "device"), and median seconds of all clocks."""
    ratios = [getattr(method, clock) / getattr(floor, clock) for method, floor in pairs]

    def median(who: int, name: str) -> float | None:
        values = [getattr(pair[who], name) for pair in pairs]
        return None if None in values else statistics.median(values)

    return {
        "pairs": len(pairs),
        "clock": clock,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "cpu_seconds": median(0, "cpu"),
        "wall_seconds": median(0, "wall"),
        "device_seconds": median(0, "device"),
        "floor_cpu_seconds": median(1, "cpu"),
        "floor_wall_seconds": median(1, "wall"),
        "floor_device_seconds": median(1, "device"),
    }


def row_slices(rows: int, step: int) -> Iterator[slice]:
    """Return slices of at most `step` rows that cover all rows."""
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
