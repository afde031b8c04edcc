"""The CUDA kernels, run on the CPU through the product's own loader, on the tiles that every backend must get right.

Borders that the cases below stand on: a 16-byte vector holds 4 or 8 logits; a thread takes 16 at once; a block has 512
threads, so 8192 logits a round; rows start at any element, so any number of logits is peeled at either end.
"""

import mmap
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from eaftdrope.loss.backends.cuda import Library
from eaftdrope.loss.backends.tile import LogitsTransform
from tests.loss.cuda.replay import Record, compute
from tests.loss.cuda.toolchain import build, need_host_compiler
from tests.loss.tile_cases import (
    check_gradient,
    check_sliced_gradient,
    check_statistics,
    make_case,
    padded,
    tile_cases,
    transformed,
    true_gradient,
    true_statistics,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of Linux; Python has no name for it before 3.13
MAP_NORESERVE = 0x4000

BORDERS = [1, 4, 5, 8, 9, 15, 16, 17, 33, 2047, 2048, 2049, 4095, 4097, 8191, 8192, 8193, 8200]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = [pytest.param(case, id=f"{short(dtype)}-{case}") for dtype in DTYPES for case in tile_cases(dtype)]


@pytest.mark.parametrize("case", CASES)
def test_every_tile(twin, case):
    check_statistics(twin.tile_statistics, case)
    check_gradient(twin.tile_statistics, twin.tile_gradient_, case)


@pytest.fixture(scope="module")
def approximate_twin(tmp_path_factory):
    """The twin with the errors that device mathematics may have."""
    need_host_compiler()
    path = tmp_path_factory.mktemp("approximate") / "libeaft_twin.so"
    build.build_host_twin(path, ["-O2", "-include", str(Path(__file__).with_name("approximate.h"))])
    return Library(path, stream=lambda device: nullcontext(None))


@pytest.mark.parametrize("case", CASES)
def test_every_tile_with_the_errors_of_device_mathematics(approximate_twin, case):
    """The tolerances leave room for exp2f off by 4 ulp, tanhf, log1pf and expm1f by 2, and no denormals."""
    check_statistics(approximate_twin.tile_statistics, case)
    check_gradient(approximate_twin.tile_statistics, approximate_twin.tile_gradient_, case)


def test_the_errors_are_there(approximate_twin, twin):
    case = make_case("any", 3, 300, torch.float32)
    arguments = (case.logits, case.labels, case.transform, 20)
    exact, off = twin.tile_statistics(*arguments), approximate_twin.tile_statistics(*arguments)
    assert not torch.equal(exact.rest, off.rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("vocab", BORDERS)
def test_widths_around_the_borders(twin, dtype, vocab):
    case = make_case("border", 3, vocab, dtype, seed=1)
    check_statistics(twin.tile_statistics, case)
    check_gradient(twin.tile_statistics, twin.tile_gradient_, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("vocab", [3, 8, 9, 23, 64, 300])
def test_rows_that_start_anywhere(twin, dtype, vocab):
    """Odd strides give each row of a tile an alignment of its own; a thread's sums are then of other logits."""
    for stride in (vocab + 1, vocab + 3, vocab + 8):
        case = padded(make_case("aligned", 9, vocab, dtype, seed=2), stride)
        check_statistics(twin.tile_statistics, case)
        check_gradient(twin.tile_statistics, twin.tile_gradient_, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("columns", [1, 64, 100, 257])
def test_gradient_by_slices_of_the_vocabulary(twin, dtype, columns):
    case = make_case("sliced", 6, 257, dtype)
    check_sliced_gradient(twin.tile_statistics, twin.tile_gradient_, case, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_gradient_in_a_slice_of_the_tile_itself(twin, dtype):
    """In place, unaligned, and the columns beside the slice stay as they were."""
    case = make_case("in-place", 4, 300, dtype)
    stats = twin.tile_statistics(case.logits, case.labels, case.transform, None)
    tile = case.logits.clone()
    twin.tile_gradient_(tile[:, 101:203], case.labels - 101, stats, case.weight, case.transform)
    assert torch.equal(tile[:, :101], case.logits[:, :101]) and torch.equal(tile[:, 203:], case.logits[:, 203:])
    torch.testing.assert_close(tile[:, 101:203].double(), true_gradient(case)[:, 101:203], rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize("k", [1, 32, 33, 511, 512, 513, 700, 2000])
def test_topk_around_the_threads_of_a_block(twin, k):
    """Up to 512 the threads' maxima give the threshold; beyond, the row is searched."""
    for dtype in DTYPES:
        check_statistics(twin.tile_statistics, make_case("k", 4, 1500, dtype, topk=k))


@pytest.mark.parametrize("run", [1000, 1100, 5000])
def test_topk_with_more_candidates_than_fit(twin, run):
    """The largest logits side by side belong to few threads, so far more than K exceed the threshold: below and above
    the 1024 that are kept, at which the search takes over."""
    case = make_case("run", 3, 12_000, torch.float32)
    case.logits[:, 3000 : 3000 + run] += 40
    # one finite logit for each of few threads: the threshold is -inf and every finite logit is a candidate
    case.logits[2] = float("-inf")
    case.logits[2, torch.arange(run) * 2] = torch.randn(run)
    case.labels[2] = 0
    check_statistics(twin.tile_statistics, case)


def test_topk_ignores_the_sign_of_zero(twin):
    case = make_case("zeros", 2, 100, torch.float32)
    case.logits[:] = -1.0
    case.logits[:, ::5] = -0.0
    case.logits[:, 1::10] = 0.0
    check_statistics(twin.tile_statistics, case)


@pytest.mark.parametrize("transform", [LogitsTransform(), LogitsTransform(scale=-0.5), LogitsTransform(softcap=3.0)])
def test_a_nan_is_not_hidden(twin, transform):
    """Wherever it stands: in the peeled ends, in a vector, at the maximum's side, at the label."""
    for dtype in DTYPES:
        for column in (0, 1, 50, 98, 99):
            case = padded(make_case("nan", 3, 100, dtype), 101)
            case.logits[1, column] = float("nan")
            case.labels[1] = 7
            stats = twin.tile_statistics(case.logits, case.labels, transform, 20)
            for values in (stats.nll, stats.entropy, stats.topk_entropy):
                assert values.isnan().tolist() == [False, True, False]


def test_an_infinite_logit_is_not_hidden(twin):
    """A gate of 0 would leave out the row that is broken."""
    for dtype in DTYPES:
        for column in (0, 1, 50, 98, 99):
            case = padded(make_case("infinite", 3, 100, dtype), 101)
            case.logits[1, column] = float("inf")
            stats = twin.tile_statistics(case.logits, case.labels, case.transform, 20)
            assert stats.nll.isfinite().tolist() == [True, False, True]
            for values in (stats.entropy, stats.topk_entropy):
                assert values.isnan().tolist() == [False, True, False]


def test_a_row_of_minus_infinity_is_not_hidden(twin):
    case = make_case("nothing", 2, 40, torch.float32)
    case.logits[0] = float("-inf")
    stats = twin.tile_statistics(case.logits, case.labels, case.transform, 20)
    assert stats.nll.isnan().tolist() == [True, False]


def test_an_impossible_label_costs_infinity_and_has_a_gradient(twin):
    case = make_case("impossible", 2, 40, torch.float32)
    case.labels[0] = 3
    case.logits[0, 3] = float("-inf")
    stats = twin.tile_statistics(case.logits, case.labels, case.transform, 20)
    assert stats.nll[0] == float("inf") and stats.entropy.isfinite().all()
    check_gradient(twin.tile_statistics, twin.tile_gradient_, case)


def test_a_label_outside_the_vocabulary_reads_nothing_and_shows(twin):
    case = make_case("outside", 3, 40, torch.float32)
    case.labels[:] = torch.tensor([-100, 40, 39])
    stats = twin.tile_statistics(case.logits, case.labels, case.transform, None)
    assert stats.nll.isnan().tolist() == [True, True, False]
    assert stats.correct.tolist()[:2] == [False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_entropies_far_below_one(twin, dtype):
    """One token takes almost everything: the entropy keeps its digits down to 1e-18."""
    vocab = 700
    case = make_case("certain", 40, vocab, dtype)
    case.logits[:] = torch.randn(40, vocab, generator=torch.Generator().manual_seed(3)).to(dtype)
    case.logits[torch.arange(40), torch.arange(40) * 17] = torch.linspace(5, 60, 40).to(dtype)
    truth = true_statistics(case)["entropy"]
    assert truth.min() < 1e-17 and truth.max() > 1
    check_statistics(twin.tile_statistics, case)


def test_offsets_beyond_two_to_the_31(twin):
    """Rows 2^30 + 64 elements apart: the third starts beyond 2^31 elements. Only the pages of the rows exist."""
    stride, vocab = 2**30 + 64, 300
    case = make_case("far", 3, vocab, torch.bfloat16)
    memory = mmap.mmap(-1, 2 * (2 * stride + vocab), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    tile = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, vocab), (stride, 1))
    tile.copy_(case.logits)
    stats = twin.tile_statistics(tile, case.labels, case.transform, 20)
    twin.tile_gradient_(tile, case.labels, stats, case.weight, case.transform)
    keep, mass = twin.tile_columns(tile, 1e-3)
    near = compute(twin, Record(case))
    assert torch.equal(stats.nll, near["nll"]) and torch.equal(stats.topk_entropy, near["topk_entropy"])
    assert torch.equal(tile, near["gradient"])
    assert torch.equal(mass, near["mass"]) and torch.equal(keep, near["keep"])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (8, 64), (9, 65), (40, 257)])
def test_columns(twin, dtype, shape):
    generator = torch.Generator().manual_seed(shape[1])
    buffer = torch.full((shape[0], shape[1] + 3), float("nan"), dtype=dtype)
    gradient = buffer[:, : shape[1]]
    # columns from large to tiny, so that some are kept and some are not
    size = torch.logspace(0, -6, shape[1])[torch.randperm(shape[1], generator=generator)]
    gradient.copy_(torch.randn(shape, generator=generator) * size)
    threshold = 2.0**-6
    gradient[:, 0] = 0
    gradient[-1, 0] = -threshold
    keep, mass = twin.tile_columns(gradient, threshold)
    assert torch.equal(keep, (gradient.double().abs() >= threshold).any(0))
    assert keep[0] and (shape[1] == 1 or not keep.all())
    torch.testing.assert_close(mass.double(), gradient.double().sum(0), rtol=1e-6, atol=1e-6)


def test_columns_keep_a_nan(twin):
    gradient = torch.zeros(4, 70)
    gradient[3, 66] = float("nan")
    keep, mass = twin.tile_columns(gradient, 1e-3)
    assert keep.nonzero().flatten().tolist() == [66] and mass[66].isnan()


def test_no_rows(twin):
    logits, labels = torch.empty(0, 50), torch.empty(0, dtype=torch.int64)
    stats = twin.tile_statistics(logits, labels, LogitsTransform(), 20)
    twin.tile_gradient_(logits, labels, stats, torch.empty(0), LogitsTransform())
    keep, mass = twin.tile_columns(logits, 1e-3)
    assert stats.nll.shape == (0,) and stats.topk_entropy.shape == (0,)
    assert not keep.any() and torch.equal(mass, torch.zeros(50))


def test_equal_logits_are_equal_after_the_transform(twin):
    """`correct` compares the label's logit with the maximum: both come from the same rounded transform."""
    for transform in (LogitsTransform(scale=0.3), LogitsTransform(scale=1.7, softcap=15.0)):
        case = make_case("equal", 50, 97, torch.float32, seed=5, transform=transform)
        best = transformed(case).argmax(-1)
        stats = twin.tile_statistics(case.logits, best, transform, None)
        assert stats.correct.all()
