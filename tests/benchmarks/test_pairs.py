"""The arithmetic of the benchmark: pairs, medians of ratios, memory, and the products of the floor."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.loss.pairs import Time, row_slices, summarise, take_pairs, time_on_cpu
from benchmarks.loss.worker import make_floor
from eaftdrope.peak_memory import peak_of


def test_the_ratio_is_the_median_of_the_pairs_ratios():
    # the machine was ten times slower during the second pair: medians of times would give 4 / 2, the pairs say 3
    pairs = [(Time(3, 30), Time(1, 10)), (Time(40, 400), Time(10, 100)), (Time(4, 40), Time(2, 20))]
    found = summarise(pairs, "cpu")
    assert (found["ratio"], found["ratio_low"], found["ratio_high"]) == (3, 2, 4)
    assert (found["pairs"], found["clock"]) == (3, "cpu")
    assert (found["cpu_seconds"], found["floor_cpu_seconds"]) == (4, 2)
    assert (found["wall_seconds"], found["floor_wall_seconds"]) == (40, 20)
    assert found["device_seconds"] is None and found["floor_device_seconds"] is None


def test_the_ratio_is_by_the_clock_that_is_named():
    pairs = [(Time(1, 6, 10), Time(1, 2, 1)), (Time(1, 6, 30), Time(1, 2, 1))]
    assert summarise(pairs, "wall")["ratio"] == 3
    device = summarise(pairs, "device")
    assert (device["ratio"], device["device_seconds"], device["floor_device_seconds"]) == (20, 20, 1)


def test_pairs_alternate_who_goes_first():
    calls = []
    times = {"method": Time(2, 2), "floor": Time(1, 1)}

    def timed(call):
        call()
        return times[calls[-1]]

    pairs = take_pairs(
        lambda: calls.append("method"), lambda: calls.append("floor"), timed, repeat=3, seconds=float("inf")
    )
    assert calls == ["method", "floor", "floor", "method", "method", "floor"]
    # whoever went first, the method is the first of its pair
    assert pairs == [(times["method"], times["floor"])] * 3


@pytest.mark.parametrize(("seconds", "expected"), [(0, 1), (0.05, 2), (10, 4)])
def test_pairs_stop_before_they_go_beyond_the_budget(seconds, expected, monkeypatch):
    # of 0.02 s each, by a clock of the test's own: two fit in 0.05 s, and one is always taken
    now = 0.0

    def timed(call):
        nonlocal now
        now += 0.01
        return Time(0.01, 0.01)

    monkeypatch.setattr("benchmarks.loss.pairs.time", SimpleNamespace(perf_counter=lambda: now))
    assert len(take_pairs(print, print, timed, repeat=4, seconds=seconds)) == expected


def test_the_clock_of_the_processor_does_not_count_sleep():
    found = time_on_cpu(lambda: time.sleep(0.05))
    assert found.wall >= 0.05 > 0.02 > found.cpu
    assert found.device is None


def test_row_slices_cover_all_rows():
    assert [(part.start, part.stop) for part in row_slices(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert [(part.start, part.stop) for part in row_slices(6, 6)] == [(0, 6)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory of a process is read on Linux alone")
def test_peak_memory_is_that_of_the_call_even_if_it_frees_it():
    size = 96 << 20

    def call():
        torch.ones(size, dtype=torch.uint8)

    call()
    for _ in range(2):
        # the kernel counts pages in batches
        assert size * 0.97 < peak_of(call, "cpu") < size * 1.1
    assert peak_of(lambda: None, "cpu") < size / 10


class Operators(TorchDispatchMode):
    """Record every operator that runs, with the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        shapes = [tuple(value.shape) for value in args if isinstance(value, torch.Tensor)]
        self.seen.append((str(function.overloadpacket).removeprefix("aten."), shapes))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("products", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_floor_is_the_matrix_products_and_nothing_else(products, dtype):
    rows, hidden_size, vocabulary = 600, 8, 32
    hidden, weight = torch.ones(rows, hidden_size, dtype=dtype), torch.ones(vocabulary, hidden_size, dtype=dtype)
    floor = make_floor(hidden, weight, products=products)
    with Operators() as operators:
        floor()
    multiplied = [shapes[-2:] for name, shapes in operators.seen if name in ("mm", "addmm_")]
    count = sum(2 * left[0] * left[1] * right[1] for left, right in multiplied)
    assert count == 2 * products * rows * hidden_size * vocabulary
    assert {name for name, _ in operators.seen} <= {"mm", "addmm_", "t", "slice", "transpose"}
