"""Where the Triton kernels read and write: offsets beyond 2^31, accesses out of bounds. Run by test_interpreter.py in a
process of its own:

    TRITON_INTERPRET=1 python -m pytest -p no:faulthandler tests/loss/triton/guard_cases.py
"""

import ctypes
import itertools
import mmap

import pytest
import torch
from triton.runtime import interpreter

from eaftdrope.loss.backends import triton as backend
from tests.gpuless import triton_interpreter
from tests.gpuless.guard_pages import dies, guarded
from tests.loss.tile_cases import make_case
from tests.loss.triton.interpreter_cases import SHOWN
from tests.loss.triton.mutants import PLANTED, planted

triton_interpreter.install()

BF16, FP32 = torch.bfloat16, torch.float32

# --- offsets beyond 2^31 ----------------------------------------------------------------------------------------------

FAR = 2**30 + 16


def far_rows(monkeypatch):
    """Three rows 2^30 elements apart: 4 GiB of addresses, of which three pages are ever touched."""
    # the interpreter would copy the storage onto itself
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    case = make_case("far", 3, 257, BF16)
    memory = mmap.mmap(-1, 2 * (2 * FAR + 257), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    logits = torch.frombuffer(memory, dtype=BF16).as_strided((3, 257), (FAR, 1))
    logits.copy_(case.logits)
    return case, logits


def test_rows_beyond_two_to_the_31(monkeypatch):
    case, far = far_rows(monkeypatch)
    stats = backend.tile_statistics(case.logits, case.labels, case.transform, 20)
    far_stats = backend.tile_statistics(far, case.labels, case.transform, 20)
    for name in ("nll", "entropy", "topk_entropy", "correct", "maximum", "rest"):
        assert torch.equal(getattr(stats, name), getattr(far_stats, name)), name
    backend.tile_gradient_(case.logits, case.labels, stats, case.weight, case.transform)
    backend.tile_gradient_(far, case.labels, stats, case.weight, case.transform)
    assert torch.equal(case.logits, far)
    for near_result, far_result in zip(
        backend.tile_columns(case.logits, 0.01), backend.tile_columns(far, 0.01), strict=True
    ):
        assert torch.equal(near_result, far_result)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "bug", ["int32 offsets of a row", "int32 offsets of the gradient", "int32 offsets of the columns"]
)
def test_int32_offsets_are_caught(bug, monkeypatch):
    case, far = far_rows(monkeypatch)
    stats = backend.tile_statistics(case.logits, case.labels, case.transform, 20)
    with planted(bug), pytest.raises(interpreter.InterpreterError, match="int32 overflow"):
        backend.tile_statistics(far, case.labels, case.transform, 20)
        backend.tile_gradient_(far, case.labels, stats, case.weight, case.transform)
        backend.tile_columns(far, 0.01)


# --- accesses out of bounds -------------------------------------------------------------------------------------------


def on_guard_pages(bug, side, topk=1):
    """Whether the three functions die when everything they get and allocate ends (begins) at a guard page."""
    case = make_case("guarded", 17, 300, FP32)
    stats = backend.tile_statistics(case.logits, case.labels, case.transform, topk)

    def run():
        def on_guard(tensor):
            return guarded(tensor.shape, tensor.dtype, side).copy_(tensor)

        tile, labels, weight = map(on_guard, (case.logits, case.labels, case.weight))
        torch.empty = lambda *shape, dtype, device: guarded(shape, dtype, side)
        backend.tile_statistics(tile, labels, case.transform, topk)
        # as a slice: labels are negative for its end, and beyond it for its start
        backend.tile_gradient_(tile, labels - 10_000, stats, weight, case.transform)
        backend.tile_gradient_(tile, labels + 10_000, stats, weight, case.transform)
        backend.tile_columns(tile, 0.1)

    with planted(bug):
        return dies(run)


@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("topk", [pytest.param(1, marks=pytest.mark.exhaustive), 20, None])
def test_nothing_is_touched_out_of_bounds(side, topk):
    assert not on_guard_pages(None, side, topk)


OUT_OF_BOUNDS = [
    "no mask on the last load",
    "no mask on the last load of the gradient",
    "no mask on the last store",
    "one column too many",
    "no mask on the rows of the columns",
    "a slot too far",
    "gathers beyond the row",
    "reads at a label of another slice",
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("bug", OUT_OF_BOUNDS)
def test_accesses_out_of_bounds_are_caught(bug):
    assert on_guard_pages(bug, "end")


@pytest.mark.parametrize("distance", [1, 10_000])
def test_an_access_far_out_of_bounds_dies_whatever_is_mapped_there(distance):
    # neighbours that a jump over a narrow guard would land in
    tensors = [guarded((17, 300), FP32, "end") for _ in range(50)]
    for tensor in tensors:
        address = tensor.data_ptr() + 4 * (17 * 300 - 1 + distance)
        assert dies(lambda address=address: ctypes.c_float.from_address(address).value)


def test_every_planted_bug_is_used():
    elsewhere = [bug for bug in PLANTED if bug.startswith("int32") or bug == "every step is masked"]
    assert set(PLANTED) == set(itertools.chain(elsewhere, OUT_OF_BOUNDS, SHOWN))
