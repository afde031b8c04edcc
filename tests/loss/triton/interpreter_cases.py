"""The Triton kernels in the interpreter, on CPU tensors. Run by test_interpreter.py in a process of its own:

TRITON_INTERPRET=1 python -m pytest -p no:faulthandler tests/loss/triton/interpreter_cases.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from eaftdrope.loss.backends import triton as backend
from eaftdrope.loss.backends import triton_kernels as kernels
from eaftdrope.loss.backends.tile import LogitsTransform, TileStats
from tests.gpuless import triton_interpreter
from tests.loss.tile_cases import (
    TileCase,
    check_gradient,
    check_sliced_gradient,
    check_statistics,
    make_case,
    padded,
    tile_cases,
)
from tests.loss.triton.mutants import planted

triton_interpreter.install()

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CAPPED = LogitsTransform(scale=1.7, softcap=15.0)


def parameters(cases):
    return [pytest.param(case, id=f"{str(case.logits.dtype).removeprefix('torch.')}-{case}") for case in cases]


def statistics(case):
    return check_statistics(backend.tile_statistics, case)


def gradient(case):
    check_gradient(backend.tile_statistics, backend.tile_gradient_, case)


@pytest.mark.parametrize("name", triton_interpreter.check())
def test_the_interpreter_is_honest(name):
    assert triton_interpreter.check()[name]


# --- values -----------------------------------------------------------------------------------------------------------

SMALL = [case for dtype in (FP32, BF16, FP16) for case in tile_cases(dtype, small=True)]
# Both sides of: a block of 128 lanes, one step more, the next number of lanes, a stretch of the gradient. Then real
# vocabularies: 50257 is odd, 151936 has the most lanes. All in rows whose stride a caller would give them.
BORDERS = [
    padded(make_case(f"border{vocab}", rows, vocab, BF16), -(-vocab // 16) * 16 + 16)
    for rows, vocabs in ((3, (127, 128, 129, 255, 256, 257)), (2, (4096, 4097, 16_384, 16_385)), (3, (50_257,)))
    for vocab in vocabs
] + [make_case("largest", 1, 151_936, BF16), make_case("largest", 1, 151_936, FP32)]


@pytest.mark.parametrize("case", parameters(SMALL + BORDERS))
def test_statistics(case):
    statistics(case)


@pytest.mark.parametrize("case", parameters(SMALL + BORDERS))
def test_gradient(case):
    gradient(case)


@pytest.mark.parametrize(
    "case",
    parameters(
        case
        for case in tile_cases(FP32, small=True)
        if str(case) in ("v257", "scaled-softcap", "one-hot", "masked-vocabulary")
    ),
)
def test_with_the_error_of_a_device(case, monkeypatch):
    """ex2.approx.ftz: off by up to 2^-22 either way, and 0 for what is not a normal number."""

    def create_exp2(self, argument):
        exact = np.exp2(argument.data)
        error = np.where(argument.data.view(np.uint32) & 1, 2**-22, -(2**-22)).astype(np.float32)
        result = np.where(exact < 2.0**-126, np.float32(0), exact * (1 + error))
        # the exponential of 0 is 1 on every device
        return interpreter.TensorHandle(np.where(argument.data == 0, np.float32(1), result), argument.dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp2", create_exp2)
    statistics(case)
    gradient(case)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("columns", [64, 100, 257])
def test_gradient_by_slices_of_the_vocabulary(dtype, columns):
    case = make_case("sliced", 6, 257, dtype)
    check_sliced_gradient(backend.tile_statistics, backend.tile_gradient_, case, columns)


def columns_of_a_wider_tile():
    """Rows far apart that start where no vector load may."""
    case = make_case("inside", 4, 300, BF16)
    wide = torch.full((4, 512), float("nan"), dtype=BF16)
    wide[:, 3:303] = case.logits
    return replace(case, logits=wide[:, 3:303]), wide


def test_a_tile_within_a_wider_one():
    case, wide = columns_of_a_wider_tile()
    stats = statistics(case)
    expected = case.logits.clone(memory_format=torch.contiguous_format)
    backend.tile_gradient_(expected, case.labels, stats, case.weight, case.transform)
    backend.tile_gradient_(case.logits, case.labels, stats, case.weight, case.transform)
    assert torch.equal(case.logits, expected)
    assert wide[:, :3].isnan().all() and wide[:, 303:].isnan().all()


def test_statistics_and_weights_that_are_strided():
    case = make_case("strided", 4, 100, FP32)
    stats = backend.tile_statistics(case.logits, case.labels, case.transform, 20)
    every = {name: value for name, value in vars(stats).items() if name != "anchor"}
    every_other = {name: torch.stack((value, value * 0 - 9), 1)[:, 0] for name, value in every.items()}
    expected, actual = case.logits.clone(), case.logits.clone()
    backend.tile_gradient_(expected, case.labels, stats, case.weight, case.transform)
    labels = torch.stack((case.labels, case.labels), 1)[:, 0]
    weight = torch.stack((case.weight, case.weight), 1)[:, 0]
    backend.tile_gradient_(actual, labels, TileStats(**every_other), weight, case.transform)
    assert torch.equal(actual, expected)


def test_no_rows():
    case = make_case("none", 1, 40, BF16)
    stats = backend.tile_statistics(case.logits[:0], case.labels[:0], case.transform, 20)
    backend.tile_gradient_(case.logits[:0], case.labels[:0], stats, case.weight[:0], case.transform)
    assert {tuple(value.shape) for value in vars(stats).values() if value is not None} == {(0,)}


@pytest.mark.parametrize("at", [0, 127, 128, 299], ids=lambda at: f"column{at}")
@pytest.mark.parametrize("transform", [LogitsTransform(), CAPPED], ids=["plain", "capped"])
def test_a_nan_is_not_hidden(at, transform):
    case = make_case("nan", 3, 300, FP32)
    case.logits[1, at] = float("nan")
    stats = backend.tile_statistics(case.logits, case.labels, transform, 20)
    for name in ("nll", "entropy", "topk_entropy"):
        assert getattr(stats, name).isnan().tolist() == [False, True, False], name


@pytest.mark.parametrize("at", [0, 127, 128, 299], ids=lambda at: f"column{at}")
def test_an_infinite_logit_is_not_hidden(at):
    """A gate of 0 would leave out the row that is broken."""
    case = make_case("infinite", 3, 300, FP32)
    case.logits[1, at] = float("inf")
    stats = backend.tile_statistics(case.logits, case.labels, case.transform, 20)
    assert stats.nll.isfinite().tolist() == [True, False, True]
    for name in ("entropy", "topk_entropy"):
        assert getattr(stats, name).isnan().tolist() == [False, True, False], name


def test_an_impossible_label_costs_infinity_and_pulls_with_its_whole_weight():
    case = make_case("impossible", 2, 50, FP32)
    case.logits[torch.arange(2), case.labels] = float("-inf")
    stats = backend.tile_statistics(case.logits, case.labels, case.transform, 20)
    assert stats.nll.tolist() == [float("inf")] * 2 and stats.entropy.isfinite().all()
    backend.tile_gradient_(case.logits, case.labels, stats, case.weight, case.transform)
    assert torch.equal(case.logits[torch.arange(2), case.labels], -case.weight)


# --- top-K ------------------------------------------------------------------------------------------------------------


def one_lane_holds_them_all():
    """V = 1000 has 128 lanes: every 128th column is in the same one."""
    case = make_case("one-lane", 3, 1000, FP32)
    case.logits[:, 5::128] += 50
    return replace(case, topk=7)


def whole_numbers(low, high, vocab=700):
    """Ties everywhere: at the K-th place, at the maximum, more of them than there are lanes."""
    case = make_case(f"whole-numbers-{low}-{high}", 4, vocab, BF16)
    generator = torch.Generator().manual_seed(high)
    return replace(case, logits=torch.randint(low, high, (4, vocab), generator=generator).to(BF16))


def around_zero():
    """-0.0 and 0.0 are the same logit and two keys."""
    case = make_case("around-zero", 2, 300, FP32)
    case.logits.clamp_(max=0)
    case.logits[:, ::3] = 0.0
    case.logits[:, 1::3] = -0.0
    return case


def lowest_of_floats():
    """Masked with the lowest finite number instead of -inf, once all of them."""
    case = make_case("lowest", 2, 200, FP32)
    case.logits[0, 5:] = torch.finfo(FP32).min
    case.logits[1] = torch.finfo(FP32).min
    return replace(case, labels=case.labels % 5)


TOPK = [
    one_lane_holds_them_all(),
    *(whole_numbers(0, high) for high in (2, 4, 30, 300)),
    around_zero(),
    lowest_of_floats(),
    *(replace(make_case(f"k{k}", 3, 300, BF16), topk=k) for k in (1, 19, 32, 33, 100, 128, 129, 250, 300, 301)),
    replace(make_case("many-capped", 3, 300, BF16, transform=CAPPED), topk=150),
]


@pytest.mark.parametrize("case", parameters(TOPK))
def test_topk_entropy(case):
    statistics(case)


def test_topk_entropy_of_scaled_down_logits_turned_over():
    """A negative scale turns the order of the raw projections over."""
    statistics(replace(make_case("turned", 3, 300, FP32), transform=LogitsTransform(scale=-0.5)))
    statistics(replace(make_case("turned", 3, 300, FP32), transform=LogitsTransform(scale=-0.5), topk=200))


def test_topk_below_1_is_refused():
    case = make_case("k0", 1, 30, FP32)
    with pytest.raises(ValueError, match="topk=0"):
        backend.tile_statistics(case.logits, case.labels, case.transform, 0)


# --- columns ----------------------------------------------------------------------------------------------------------


def columns(rows, vocab, dtype, stride=None):
    generator = torch.Generator().manual_seed(rows + vocab)
    tile = torch.full((rows, stride or vocab), float("nan"), dtype=dtype)[:, :vocab]
    tile.copy_(torch.randn(rows, vocab, generator=generator) * torch.logspace(-6, -1, vocab))
    # a column that reaches the threshold exactly, by a negative number
    tile[:, vocab // 2] = 0
    tile[rows - 1, vocab // 2] = -(2.0**-12)
    keep, mass = backend.tile_columns(tile, 2.0**-12)
    assert keep.dtype == torch.bool and mass.dtype == torch.float32
    expected = tile.float().abs().amax(0) >= 2.0**-12
    assert torch.equal(keep, expected) and keep[vocab // 2] and 0 < keep.sum() < vocab
    torch.testing.assert_close(mass.double(), tile.double().sum(0), rtol=1e-6, atol=1e-6 * tile.abs().max().item())


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("rows", "vocab", "stride"), [(1, 127, 144), (15, 128, 128), (16, 129, 144), (33, 300, 301)])
def test_columns(rows, vocab, stride, dtype):
    columns(rows, vocab, dtype, stride)


def test_columns_of_no_rows():
    keep, mass = backend.tile_columns(torch.empty(0, 40), 0.5)
    assert not keep.any() and torch.equal(mass, torch.zeros(40))


# --- functions --------------------------------------------------------------------------------------------------------


@triton.jit
def _functions(x_ptr, log1p_ptr, expm1_ptr, tanh_ptr, slope_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    x = tl.load(x_ptr + i)
    tl.store(log1p_ptr + i, kernels._log1p(x))
    tl.store(expm1_ptr + i, kernels._expm1_negative(x))
    tanh, slope = kernels._tanh(x)
    tl.store(tanh_ptr + i, tanh)
    tl.store(slope_ptr + i, slope)


def test_functions_keep_their_digits():
    near = torch.tensor([0.624999, 0.625, 0.625001, 0.999999, 1.0, 1.000001, 0.0])
    x = torch.cat([torch.logspace(-30, 1.5, 1024 - len(near), dtype=torch.float64).float(), near])
    results = [torch.empty(1024) for _ in range(4)]
    _functions[(1,)](x, *results, 1024)
    exact = x.double()
    expected = {
        "log1p": exact.log1p(),
        "expm1": torch.expm1(-exact),
        "tanh": exact.tanh(),
        # the definition would cancel in float64 as well
        "slope": 1 / exact.cosh().square(),
    }
    for (name, truth), result in zip(expected.items(), results, strict=True):
        # e^-2x loses |2x| * 6e-8 of itself in float32
        rtol = 4e-7 if name != "slope" else 5e-6
        torch.testing.assert_close(result.double(), truth, rtol=rtol, atol=1e-38, msg=lambda m, n=name: f"{n}: {m}")


# --- planted bugs that the values must show ---------------------------------------------------------------------------


def between_rows_nothing_changes():
    """A number there, not NaN: a gradient of NaN is NaN again, and would not show."""
    case = padded(make_case("border", 3, 257, BF16), 272)
    whole = case.logits.as_strided((3, 272), (272, 1))
    whole[:, 257:] = 7.0
    stats = backend.tile_statistics(case.logits, case.labels, case.transform, 20)
    backend.tile_gradient_(case.logits, case.labels, stats, case.weight, case.transform)
    assert (whole[:, 257:] == 7.0).all()


def nan_is_seen():
    case = make_case("nan", 1, 300, FP32)
    case.logits[0, 7] = float("nan")
    assert backend.tile_statistics(case.logits, case.labels, case.transform, 20).nll.isnan().all()


def sliced():
    check_sliced_gradient(backend.tile_statistics, backend.tile_gradient_, make_case("sliced", 6, 257, FP32), 100)


def certain(dtype=FP32) -> TileCase:
    """One logit far above the others: entropies and p - 1 near 0."""
    case = make_case("certain", 3, 300, dtype)
    case.logits[:, 42] = case.logits.amax(-1) + torch.tensor([12.0, 16.0, 20.0], dtype=dtype)
    return replace(case, labels=torch.full((3,), 42))


SHOWN = {
    "what is masked counts as 0": lambda: statistics(make_case("border", 3, 257, FP32)),
    # only a low cap is near enough to the other logits to be seen
    "what is masked is capped": lambda: statistics(
        make_case("border", 3, 257, FP32, transform=LogitsTransform(softcap=1.0))
    ),
    "one column too many": between_rows_nothing_changes,
    "the maximum is in the sum": lambda: statistics(certain()),
    "the maximum of each lane is left out": lambda: statistics(make_case("diffuse", 3, 257, FP32)),
    "truncated to bfloat16": lambda: gradient(make_case("diffuse", 3, 257, BF16)),
    "p - 1 by subtraction": lambda: gradient(certain()),
    "a NaN is dropped": nan_is_seen,
    "an infinite gap": lambda: statistics(tile_case("masked-vocabulary")),
    "ties are counted once": lambda: statistics(whole_numbers(0, 4)),
    "one open lane is forgotten": lambda: statistics(make_case("diffuse", 7, 1000, FP32)),
    "only the lane maxima": lambda: statistics(one_lane_holds_them_all()),
    "every label is in the slice": sliced,
    "no derivative of the softcap": lambda: gradient(make_case("capped", 3, 257, FP32, transform=CAPPED)),
    "no derivative of the scale": lambda: gradient(
        make_case("scaled", 3, 257, FP32, transform=LogitsTransform(scale=0.25))
    ),
}


def tile_case(name):
    return next(case for case in tile_cases(FP32, small=True) if str(case) == name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("bug", SHOWN)
def test_the_values_show_a_planted_bug(bug):
    SHOWN[bug]()
    with planted(bug), pytest.raises(AssertionError):
        SHOWN[bug]()
