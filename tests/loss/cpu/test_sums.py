"""What the sums over tiles and the sparse backward need, with every instruction set, against float64."""

import pytest
import torch

from eaftdrope.loss.backends import cpu as backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# half a unit in the last place of what is stored
ROUNDING = {torch.float32: 6e-8, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def _matrix(rows: int, columns: int, dtype: torch.dtype, *, gap: int = 0, seed: int = 0) -> torch.Tensor:
    """Random numbers; `gap` NaNs between the rows."""
    generator = torch.Generator().manual_seed(1000 * seed + columns)
    buffer = torch.full((rows, columns + gap), float("nan"), dtype=dtype)
    buffer[:, :columns] = torch.randn(rows, columns, generator=generator)
    return buffer[:, :columns]


def _beyond(matrix: torch.Tensor) -> torch.Tensor:
    """What lies between the rows."""
    rows, columns = matrix.shape
    return matrix.as_strided((rows, matrix.stride(0)), (matrix.stride(0), 1))[:, columns:]


def _assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor) -> None:
    error = (actual.double() - exact).abs()
    # the addition itself is float32
    assert (error <= ROUNDING[actual.dtype] * exact.abs() + 2e-7 * exact.abs() + 1e-7).all(), error.max()


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("columns", [1, 5, 16, 31, 64, 100, 897])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulate(isa, dtype, columns, gap):
    product = _matrix(9, columns, dtype, gap=gap, seed=1)
    total = _matrix(9, columns, torch.float32, gap=gap)
    before = total.double()
    backend.accumulate(total, product, True)
    assert torch.equal(total, (before + product.double()).float())
    backend.accumulate(total, product, False)
    assert torch.equal(total, product.float())
    assert _beyond(total).isnan().all(), "written beyond the row"


@pytest.mark.parametrize("columns", [1, 7, 16, 33, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled(isa, dtype, target, columns):
    gradient = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    factor = torch.tensor(1 / 3)
    expected = (gradient.float() * factor).to(target)
    before = gradient.data_ptr()
    actual = backend.scaled(gradient, factor, target)
    assert torch.equal(actual, expected) and actual.dtype == target
    assert (actual.data_ptr() == before) == (dtype == target)
    assert torch.equal(backend.scaled(torch.arange(6.0), torch.tensor(2.0), torch.float32), torch.arange(6.0) * 2)


def test_accumulate_writes_over_what_was_there(isa):
    total = torch.full((2, 70), float("nan"))
    backend.accumulate(total, torch.ones(2, 70, dtype=torch.bfloat16), False)
    assert (total == 1).all()


@pytest.mark.parametrize("columns", [1, 16, 100, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tile_columns(isa, dtype, rows, columns):
    tile = _matrix(rows, columns, dtype, gap=5)
    keep, mass = backend.tile_columns(tile, 2.5)
    assert keep.dtype == torch.bool and mass.dtype == torch.float32
    assert torch.equal(keep, (tile.abs() >= 2.5).any(0))
    exact, size = tile.double().sum(0), tile.double().abs().sum(0)
    assert ((mass.double() - exact).abs() <= 3e-7 * size).all()


def test_tile_columns_at_the_threshold(isa):
    """It belongs to what is kept, whatever its sign, as NaN does."""
    for dtype in DTYPES:
        tile = torch.zeros(11, 70, dtype=dtype)
        tile[3, 5], tile[9, 64], tile[10, 69], tile[0, 0] = 2**-12, -(2**-12), float("nan"), 2**-12 * 0.99
        keep, mass = backend.tile_columns(tile, 2**-12)
        assert keep.nonzero().squeeze(1).tolist() == [5, 64, 69]
        assert mass[[5, 64]].tolist() == [2**-12, -(2**-12)] and mass[69].isnan()


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 21])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_columns(library, dtype, rows):
    tile = _matrix(rows, 3000, dtype, gap=2)
    for columns in ([], [0], [2999], [5, 6, 7, 900, 2999], list(range(0, 3000, 3)), [7, 7, 3]):
        columns = torch.tensor(columns, dtype=torch.int64)
        gathered = backend.gather_columns(tile, columns)
        assert gathered.is_contiguous() and gathered.dtype == dtype
        assert torch.equal(gathered, tile[:, columns])


@pytest.mark.parametrize("product_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sum_dtype", DTYPES, ids=str)
def test_add_rows(isa, sum_dtype, product_dtype):
    for columns in (1, 16, 37, 130):
        total = _matrix(50, columns, sum_dtype, gap=3)
        rows = torch.tensor([0, 3, 4, 17, 49])
        product = _matrix(5, columns, product_dtype, gap=1, seed=2)
        before = total.clone()
        backend.add_rows_(total, rows, product)
        _assert_rounded_once(total[rows], before[rows].double() + product.double())
        others = torch.ones(50, dtype=torch.bool).index_fill_(0, rows, False)
        assert torch.equal(total[others], before[others])
        assert _beyond(total).isnan().all(), "written beyond the row"


def test_a_bfloat16_sum_is_rounded_to_the_nearest_even(isa):
    """1 + 2^-8 lies between two bfloat16: to the even 1; 1 + 3 2^-8 to 1 + 2^-6; a truncation gives 1 + 2^-7."""
    total = torch.ones(1, 40, dtype=torch.bfloat16)
    product = torch.full((1, 40), 2**-8)
    product[0, ::2] = 3 * 2**-8
    backend.add_rows_(total, torch.tensor([0]), product)
    assert total[0, 0] == 1 + 2**-6 and total[0, 1] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits(isa, dtype):
    """To float32 and back; only denormal bfloat16 (below 1.2e-38) may be flushed to 0, as AVX512-BF16 does."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)[None]
    single, back = torch.empty(1, 1 << 16), torch.empty_like(every)
    backend.accumulate(single, every, False)
    backend.accumulate(back, single, False)
    torch.testing.assert_close(single, every.float(), rtol=0, atol=0, equal_nan=True)
    denormal = (every.abs() < torch.finfo(dtype).tiny) & (dtype == torch.bfloat16)
    expected = every.masked_fill(denormal, 0) if isa == "avx512bf16" else every
    torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits(isa, dtype):
    """As torch rounds, over the whole range and beyond it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 100_000, generator=generator) * 10.0 ** torch.linspace(-9, 6, 100_000)
    x[0, :8] = torch.tensor([65504, 65519.99, 65520, -65520, 3.4e38, 2**-24, 2**-25, 1.0001 * 2**-25])
    actual = torch.empty(1, 100_000, dtype=dtype)
    backend.accumulate(actual, x, False)
    assert torch.equal(actual, x.to(dtype))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(library, threads):
    tile, rows = _matrix(50, 7001, torch.bfloat16), torch.arange(0, 7001, 2)
    product, wide = _matrix(3501, 300, torch.bfloat16), torch.randn(7001, 300)
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            total = wide.clone()
            backend.add_rows_(total, rows, product)
            results.append((*backend.tile_columns(tile, 2.5), backend.gather_columns(tile, rows), total))
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*results):
        assert torch.equal(one, several)


def test_what_it_refuses(library):
    total = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"product of shape \(4, 5\) for a sum of \(4, 6\)"):
        backend.accumulate(total, torch.zeros(4, 5), True)
    with pytest.raises(ValueError, match=r"product of shape \(3, 6\) for 2 rows of a sum of \(4, 6\)"):
        backend.add_rows_(total, torch.tensor([0, 1]), torch.zeros(3, 6))
    with pytest.raises(ValueError, match="expected a matrix with contiguous columns"):
        backend.tile_columns(total.t(), 1.0)
    with pytest.raises(ValueError, match=r"columns_C is torch\.int32"):
        backend.gather_columns(total, torch.tensor([1], dtype=torch.int32))
