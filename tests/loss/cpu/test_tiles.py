"""The C++ backend on the tiles that every backend must get right, with every instruction set of the machine."""

import ctypes
import dataclasses
import mmap

import pytest
import torch

from eaftdrope.loss.backends import cpu as backend
from eaftdrope.loss.backends import torch as torch_backend
from eaftdrope.loss.backends.tile import LogitsTransform, TileStats
from tests.loss.anchored_tiles import check_anchored
from tests.loss.cpu.every_function import many_ties, rising_maximum
from tests.loss.tile_cases import (
    PLAIN,
    check_gradient,
    check_sliced_gradient,
    check_statistics,
    make_case,
    padded,
    tile_cases,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    pytest.param(case, id=f"{str(dtype).removeprefix('torch.')}-{case}")
    for dtype in DTYPES
    for case in tile_cases(dtype)
]
# both sides of the widths of vectors, of a step of four of them, of the blocks for maxima (512) and for sums (4096)
EDGES = [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 8191, 8192, 8193]


@pytest.mark.parametrize("case", CASES)
def test_statistics(isa, case):
    check_statistics(backend.tile_statistics, case)


@pytest.mark.parametrize("case", CASES)
def test_gradient(isa, case):
    check_gradient(backend.tile_statistics, backend.tile_gradient_, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_anchored(isa, dtype):
    for case in tile_cases(dtype, small=True):
        check_anchored(backend, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [3, 15, 17, 63, 64, 65, 4095, 4097, 8193])
def test_anchored_widths_and_blocks(isa, dtype, vocab):
    capped = LogitsTransform(scale=0.5, softcap=20.0)
    check_anchored(backend, make_case(f"v{vocab}", 3, vocab, dtype))
    check_anchored(backend, padded(make_case(f"v{vocab}", 4, vocab, dtype, transform=capped), vocab + 3), PLAIN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_anchored_with_a_maximum_that_rises_from_block_to_block(isa, dtype):
    check_anchored(backend, rising_maximum(dtype, blocks=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", EDGES)
def test_widths_and_blocks(isa, dtype, vocab):
    capped = LogitsTransform(scale=0.5, softcap=20.0)
    for case in (
        make_case(f"v{vocab}", 3, vocab, dtype),
        # rows that start anywhere
        padded(make_case(f"v{vocab}", 4, vocab, dtype, transform=capped), vocab + 3),
    ):
        check_statistics(backend.tile_statistics, case)
        check_gradient(backend.tile_statistics, backend.tile_gradient_, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 100, 257])
def test_gradient_by_slices_of_the_vocabulary(isa, dtype, columns):
    case = make_case("sliced", 6, 257, dtype)
    check_sliced_gradient(backend.tile_statistics, backend.tile_gradient_, case, columns)
    capped = dataclasses.replace(case, transform=LogitsTransform(softcap=30.0))
    check_sliced_gradient(backend.tile_statistics, backend.tile_gradient_, capped, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 50, 4095, 4096, 4999])
def test_an_infinite_logit_is_not_hidden(isa, dtype, place):
    """A gate of 0 would leave out the row that is broken."""
    case = make_case("infinite", 3, 5000, dtype)
    case.logits[1, place] = float("inf")
    stats = backend.tile_statistics(case.logits, case.labels, case.transform, 20)
    assert stats.nll.isfinite().tolist() == [True, False, True]
    for name in ("entropy", "topk_entropy"):
        assert getattr(stats, name).isnan().tolist() == [False, True, False], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", [PLAIN, LogitsTransform(softcap=30.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("bits", ["positive", "negative"])
@pytest.mark.parametrize("place", [0, 50, 4095, 4096, 4999])
def test_a_nan_is_not_hidden(isa, dtype, transform, bits, place):
    case = make_case("nan", 3, 5000, dtype, transform=transform)
    case.logits[1, place] = float("nan")
    if bits == "negative":
        case.logits[1, place].copysign_(torch.tensor(-1.0))
    stats = backend.tile_statistics(case.logits, case.labels, transform, 20)
    for name in ("nll", "entropy", "topk_entropy"):
        assert getattr(stats, name).isnan().tolist() == [False, True, False], name
    # nor a NaN that only the gradient sees, even where the gate is closed
    stats = TileStats(nll=torch.ones(3), entropy=None, topk_entropy=None, correct=None,
                      maximum=torch.full((3,), 20.0), rest=torch.ones(3))  # fmt: skip
    backend.tile_gradient_(case.logits, torch.full((3,), -1), stats, torch.tensor([1.0, 0.0, 0.0]), transform)
    assert case.logits[1].isnan().nonzero().tolist() == [[place]]
    assert (case.logits[2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_maximum_that_rises_from_block_to_block(isa, dtype):
    case = rising_maximum(dtype, blocks=5)
    check_statistics(backend.tile_statistics, case)
    check_gradient(backend.tile_statistics, backend.tile_gradient_, case)


@pytest.mark.parametrize("k", [1, 2, 11, 12, 13, 100, 5999, 6000, 7000])
def test_topk_on_both_sides_of_the_number_of_maxima(isa, k):
    check_statistics(backend.tile_statistics, many_ties(torch.bfloat16, k))


def test_exponential(isa):
    """e^x to two units in the last place of float32; exactly 0 for -inf."""
    x = torch.cat([torch.linspace(-87, 0, 100_000), torch.tensor([-200.0, -3e38, float("-inf")])])
    one = torch.ones(1)
    stats = TileStats(nll=one, entropy=one, topk_entropy=None, correct=None, maximum=0 * one, rest=0 * one)
    actual = x.clone()[None]
    backend.tile_gradient_(actual, torch.tensor([-1]), stats, one, PLAIN)
    expected = x.double().exp()
    error = (actual[0, :-3].double() / expected[:-3] - 1).abs()
    assert error.max() < 2.5e-7
    assert actual[0, -3:].tolist() == [0, 0, 0]


def test_softcap(isa):
    """c tanh(x / c) and its derivative to a few units in the last place, near 0 and near saturation."""
    x = torch.cat([torch.linspace(-200, 200, 20_001), torch.logspace(-6, 2, 20_000), -torch.logspace(-6, 2, 20_000)])
    cap, rows = 10.0, len(x)
    transform = LogitsTransform(softcap=cap)
    actual = backend.tile_statistics(x[:, None], torch.zeros(rows, dtype=torch.int64), transform, None).maximum
    z = cap * torch.tanh(x.double() / cap)
    torch.testing.assert_close(actual.double(), z, rtol=3e-7, atol=0)
    # the gradient of a logit that is its row's maximum, with rest 0, is the derivative alone
    ones, slope = torch.ones(rows), x.clone()[:, None]
    stats = TileStats(nll=ones, entropy=ones, topk_entropy=None, correct=None, maximum=actual, rest=0 * ones)
    backend.tile_gradient_(slope, torch.full((rows,), -1), stats, ones, transform)
    exact = torch.cosh(x.double() / cap).pow(-2)
    # x / c is rounded first
    allowed = exact * (1e-6 + 3e-7 * (x.double() / cap).abs())
    assert ((slope[:, 0].double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_torch_backend(isa, dtype):
    case = make_case("agree", 9, 20_011, dtype)
    actual = backend.tile_statistics(case.logits, case.labels, PLAIN, 20)
    expected = torch_backend.tile_statistics(case.logits, case.labels, PLAIN, 20)
    for name in ("nll", "entropy", "topk_entropy", "maximum", "rest"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-5, atol=1e-9)
    assert torch.equal(actual.correct, expected.correct)


@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "own-threads"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(library, threads, openmp):
    case = make_case("threads", 37, 3001, torch.bfloat16)
    one_thread = backend.tile_statistics(case.logits, case.labels, PLAIN, 20)
    gradient = case.logits.clone()
    before, parallel = torch.get_num_threads(), library.parallel
    try:
        torch.set_num_threads(threads)
        library.eaft_set_parallel(parallel if openmp else None)
        stats = backend.tile_statistics(case.logits, case.labels, PLAIN, 20)
        assert stats.anchor is None
        for name in (field.name for field in dataclasses.fields(stats) if field.name != "anchor"):
            assert torch.equal(getattr(stats, name), getattr(one_thread, name)), name
        backend.tile_gradient_(gradient, case.labels, stats, case.weight, PLAIN)
        check_gradient(backend.tile_statistics, backend.tile_gradient_, case)
    finally:
        torch.set_num_threads(before)
        library.eaft_set_parallel(parallel)
    expected = case.logits.clone()
    backend.tile_gradient_(expected, case.labels, one_thread, case.weight, PLAIN)
    assert torch.equal(gradient, expected)


def test_rows_further_apart_than_32_bits_can_count(isa):
    """Two rows 2^31 elements apart, of which only the columns of the tile are ever touched (the rest is not mapped)."""
    case = make_case("far", 2, 300, torch.bfloat16)
    stride = (1 << 31) + 64
    buffer = _reserve(2 * (stride + 300))
    far = torch.frombuffer(buffer, dtype=torch.bfloat16).as_strided((2, 300), (stride, 1))
    far.copy_(case.logits)
    case_far = dataclasses.replace(case, logits=far)
    check_statistics(backend.tile_statistics, case_far)
    stats = backend.tile_statistics(far, case.labels, PLAIN, None)
    expected = case.logits.clone()
    backend.tile_gradient_(expected, case.labels, stats, case.weight, PLAIN)
    keep, mass = backend.tile_columns(far, 1.0)
    assert torch.equal(keep, (case.logits.abs() >= 1).any(0))
    torch.testing.assert_close(mass, case.logits.float().sum(0))
    assert torch.equal(backend.gather_columns(far, torch.arange(300)), case.logits)
    backend.tile_gradient_(far, case.labels, stats, case.weight, PLAIN)
    assert torch.equal(far, expected)
    backend.add_rows_(far, torch.tensor([1]), torch.ones(1, 300))
    assert torch.equal(far[1], (expected[1].float() + 1).bfloat16())


def _reserve(size: int) -> ctypes.Array:
    """Zeros of which only the touched pages take memory; never freed."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        pytest.skip(f"{size} bytes of address space are not to be had: 64-bit offsets were NOT checked")
    return (ctypes.c_char * size).from_address(address)


def test_what_it_refuses(library):
    tile, labels = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"strides \(1, 2\): expected a matrix with contiguous columns"):
        backend.tile_statistics(torch.zeros(8, 2).t(), labels, PLAIN, None)
    with pytest.raises(ValueError, match="rows do not overlap"):
        backend.tile_statistics(torch.zeros(8).expand(2, 8), labels, PLAIN, None)
    with pytest.raises(ValueError, match=r"not on torch\.float64: use the torch backend"):
        backend.tile_statistics(tile.double(), labels, PLAIN, None)
    with pytest.raises(ValueError, match=r"labels_R is torch.int32 \(2,\) on cpu: expected torch.int64 \(2,\)"):
        backend.tile_statistics(tile, labels.int(), PLAIN, None)
    with pytest.raises(ValueError, match="topk of 0: expected at least 1"):
        backend.tile_statistics(tile, labels, PLAIN, 0)
    assert "not on cuda:0" in backend.unavailable(torch.device("cuda:0"), torch.float32)
    assert "torch backend" in backend.unavailable(torch.device("cpu"), torch.float64)
    assert backend.unavailable(torch.device("cpu"), torch.bfloat16) is None


def test_no_rows(library):
    empty = torch.empty(0, 8)
    stats = backend.tile_statistics(empty, torch.empty(0, dtype=torch.int64), PLAIN, 5)
    assert stats.nll.shape == stats.topk_entropy.shape == (0,)
    backend.tile_gradient_(empty, torch.empty(0, dtype=torch.int64), stats, torch.empty(0), PLAIN)


def test_a_label_outside_the_tile_reads_nothing(library):
    stats = backend.tile_statistics(torch.zeros(3, 8), torch.tensor([8, -1, 3]), PLAIN, None)
    assert stats.nll.isnan().tolist() == [True, True, False]
