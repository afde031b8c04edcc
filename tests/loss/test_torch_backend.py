"""The portable backend on the tiles that every backend must get right."""

import pytest
import torch

from eaftdrope.loss.backends import torch as backend
from tests.loss.anchored_tiles import check_anchored
from tests.loss.tile_cases import check_gradient, check_sliced_gradient, check_statistics, make_case, tile_cases

CASES = [
    pytest.param(case, id=f"{str(dtype).removeprefix('torch.')}-{case}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for case in tile_cases(dtype)
]


@pytest.mark.parametrize("case", CASES)
def test_statistics(case):
    check_statistics(backend.tile_statistics, case)


@pytest.mark.parametrize("case", CASES)
def test_gradient(case):
    check_gradient(backend.tile_statistics, backend.tile_gradient_, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_anchored(dtype):
    for case in tile_cases(dtype, small=True):
        check_anchored(backend, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 100, 257])
def test_gradient_by_slices_of_the_vocabulary(dtype, columns):
    case = make_case("sliced", 6, 257, dtype)
    check_sliced_gradient(backend.tile_statistics, backend.tile_gradient_, case, columns)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_broken_logit_is_not_hidden(value):
    """A gate of 0 would leave out the row that is broken."""
    case = make_case("broken", 3, 100, torch.float32)
    case.logits[1, 50] = float(value)
    stats = backend.tile_statistics(case.logits, case.labels, case.transform, 20)
    assert stats.nll.isfinite().tolist() == [True, False, True]
    for name in ("entropy", "topk_entropy"):
        assert getattr(stats, name).isnan().tolist() == [False, True, False], name
