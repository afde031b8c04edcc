"""The Triton kernels on a device. Skipped, and said so, where there is none."""

import dataclasses

import pytest
import torch

from eaftdrope.loss.backends import triton as backend
from eaftdrope.loss.backends.tile import TileStats
from tests.loss.tile_cases import (
    check_gradient,
    check_sliced_gradient,
    check_statistics,
    make_case,
    padded,
    tile_cases,
)

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
REASON = None if DEVICE is None else backend.unavailable(DEVICE, torch.bfloat16)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE is None, reason="no GPU: the Triton kernels were NOT run on a device"),
    pytest.mark.skipif(REASON is not None, reason=f"the Triton kernels were NOT run on the device: {REASON}"),
]

CASES = [
    pytest.param(case, id=f"{str(dtype).removeprefix('torch.')}-{case}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for case in [
        *tile_cases(dtype),
        padded(make_case("padded", 5, 50_257, dtype), 50_272),
        make_case("largest", 3, 151_936, dtype),
        make_case("k128", 3, 50_257, dtype, topk=128),
        make_case("k200", 3, 50_257, dtype, topk=200),
    ]
]


def on_device(tile):
    """A copy with the same row stride, and what lies between the rows."""
    rows, stride = tile.shape[0], tile.stride(0)
    buffer = torch.full((rows, stride), float("nan"), dtype=tile.dtype)
    buffer[:, : tile.shape[1]] = tile
    return buffer.to(DEVICE)[:, : tile.shape[1]]


def moved(stats, device):
    values = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
    return TileStats(**{name: None if value is None else value.to(device) for name, value in values.items()})


def tile_statistics(logits, labels, transform, topk):
    tile = on_device(logits)
    stats = backend.tile_statistics(tile, labels.to(DEVICE), transform, topk)
    # what the caller finds in its tile afterwards
    logits.copy_(tile.cpu())
    return moved(stats, "cpu")


def tile_gradient_(logits, labels, stats, weight, transform):
    tile = on_device(logits)
    backend.tile_gradient_(tile, labels.to(DEVICE), moved(stats, DEVICE), weight.to(DEVICE), transform)
    whole = tile.as_strided((tile.shape[0], tile.stride(0)), (tile.stride(0), 1))
    logits.as_strided(whole.shape, whole.stride()).copy_(whole.cpu())


@pytest.mark.parametrize("case", CASES)
def test_statistics(case):
    check_statistics(tile_statistics, case)


@pytest.mark.parametrize("case", CASES)
def test_gradient(case):
    check_gradient(tile_statistics, tile_gradient_, case)


@pytest.mark.parametrize("columns", [64, 100, 257])
def test_gradient_by_slices_of_the_vocabulary(columns):
    check_sliced_gradient(tile_statistics, tile_gradient_, make_case("sliced", 6, 257, torch.bfloat16), columns)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 127), (300, 50_257)])
def test_columns(rows, vocab):
    tile = torch.randn(rows, vocab, device=DEVICE).mul_(2**-13).bfloat16()
    keep, mass = backend.tile_columns(tile, 2**-12)
    assert torch.equal(keep, (tile.float().abs() >= 2**-12).any(0)) and 0 < keep.sum() < vocab
    torch.testing.assert_close(mass.double(), tile.double().sum(0), rtol=1e-5, atol=1e-7)


def test_rows_beyond_two_to_the_31():
    """A tile of 4.3 GB: offsets that int32 can not hold, on the device itself."""
    rows, vocab = 16_400, 131_072
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("less than 6 GB free: offsets beyond 2^31 were NOT checked on the device")
    case = make_case("last", 3, vocab, torch.bfloat16)
    tile = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    tile[-3:] = case.logits.to(DEVICE)
    labels = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    labels[-3:] = case.labels.to(DEVICE)
    weight = torch.ones(rows, device=DEVICE)
    few = backend.tile_statistics(tile[-3:].clone(), labels[-3:], case.transform, 20)
    stats = backend.tile_statistics(tile, labels, case.transform, 20)
    assert torch.equal(stats.nll[-3:], few.nll) and torch.equal(stats.topk_entropy[-3:], few.topk_entropy)
    expected = tile[-3:].clone()
    backend.tile_gradient_(expected, labels[-3:], few, weight[-3:], case.transform)
    backend.tile_gradient_(tile, labels, stats, weight, case.transform)
    assert torch.equal(tile[-3:], expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA graphs: capture was NOT checked")
def test_a_cuda_graph_records_both_functions():
    first, second = (make_case("graph", 5, 50_257, torch.bfloat16, seed=seed) for seed in (0, 1))
    tile, labels, weight = (getattr(first, name).to(DEVICE) for name in ("logits", "labels", "weight"))

    def step():
        stats = backend.tile_statistics(tile, labels, first.transform, 20)
        backend.tile_gradient_(tile, labels, stats, weight, first.transform)
        return stats

    # compiles
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = step()
    # other numbers in the same memory
    for name, place in (("logits", tile), ("labels", labels), ("weight", weight)):
        place.copy_(getattr(second, name))
    graph.replay()
    recorded = tile.clone()
    tile.copy_(second.logits)
    expected = step()
    assert torch.equal(stats.nll, expected.nll) and torch.equal(stats.topk_entropy, expected.topk_entropy)
    assert torch.equal(recorded, tile)
