"""The row kernels of the Triton backend: statistics, top-K entropy, gradient, and the columns a gradient touches.

**Statistics.** One program per row, one pass. The row is distributed over L lanes, column v to lane v mod L; a lane keeps
(m, r, s): its maximum, and over its other logits the sums

    r = sum e^(z - m)          s = sum (m - z) e^(z - m)

so sum_v e^(z_v - m) = 1 + r. One occurrence of the maximum is kept out of both sums; an empty lane is r = -1. A logit z
joins with one exponential, e = e^-|z - m|:

    z <= m:   r += e                 s += |z - m| e
    z >  m:   r = e (1 + r)          s = e (s + |z - m| (1 + r))          m = z

Every term is >= 0, so nothing cancels. Lanes do not communicate until the row ends; then, with M the maximum of all, the
lane that holds M contributes its r and s as they are, and each other lane e^(m - M) (1 + r), likewise s, and

    H = log1p(r) + s / (1 + r)             -log p_y = log1p(r) - (z_y - M)

**Top-K entropy**, exact, ties included, without sorting. Let t be a number that at least K lane maxima reach: the K-th
largest logit is >= t, and logits above t lie in lanes whose maximum is above t. t is found by bisection over the lane
maxima, read as integers in the order of the floats, until at most `slots(K)` lanes reach it; on ties until t *is* the
K-th largest, when fewer than K lanes are above it. The statistics kernel writes t and these open lanes; a second kernel
gathers only the open lanes (at most slots(K) * V / L logits of the row), bisects again for the K-th largest logit T of
{logits above t} and copies of t, and sums over the logits above T, and over as many copies of T as are missing.

**Gradient**, in place: g = w (e^(z - M) / (1 + r)) z', and w expm1(-nll) z' at the label, selected before the one
store, so that p_y - 1 keeps its digits. z' is the derivative of the transform: with a softcap 1 - tanh^2 in the form
4 e^(-2|u|) / (1 + e^(-2|u|))^2, which does not cancel near saturation.

**Bytes per element of a tile** (bfloat16 / float32): statistics read 2 / 4; gradient reads 2 / 4 and writes 2 / 4. Top-K
reads one 32-byte sector for each gathered logit: at V = 151,936 and K = 20 at most 32 * 38 of them, 13 % of a bfloat16
row. `column_kernel` reads 2 / 4. Static count of the main loops for sm_90 (triton 3.9.0), instructions per logit:
statistics 15, gradient 10; 40 and 41 with a softcap.

**Block rule.** L is the smallest power of 2 that makes a row at most 32 steps, but from 128 to 4,096 (`block_lanes`); a
thread holds 8 lanes, which is one 16-byte load of bfloat16 per step and 24 registers of state. So V = 151,936 takes 512
threads per row and 38 steps. No autotuning: the first launch compiles one variant, and none is timed. Rows are never
split: a tile has hundreds of them, and for a tile of a few rows reading the head's weight costs more than the row.

**Loads.** Only the last block is masked, so loads of the main loops are 16 bytes wide for every V, provided rows start
16-byte aligned: the stride must be a multiple of 16 elements for Triton to know. Any other stride is correct, and slower.
Row offsets are 64-bit. The compiler fuses nothing (`enable_fp_fusion=False` at each launch): a multiplication fused
into a subtraction in one place and not in another would make the label's logit differ from the equal maximum. Fused
multiplications are written `tl.fma`.

**Checked**, under tests/loss/triton: values, masks, borders, int32 overflow and accesses out of bounds in the interpreter
(interpreter_cases.py, guard_cases.py), each check proven on planted bugs (mutants.py); registers, spills, shared memory
and load widths of the code compiled for sm_80 to sm_120 and gfx942 (compiled.py, budgets.json); values on a device and
CUDA graph capture where there is one (test_device.py). **Not checked without a GPU**: speed, occupancy, launch failures,
the true error of the hardware's exponential (2^-22 is assumed and tested), and whether compiled code does what the
source specifies. Nothing is compiled for XPU in the tests.

Legend: R rows, V vocabulary, L lanes, K size of the top-K entropy.
"""

from __future__ import annotations

import triton
import triton.language as tl

# e^-110 is 0 in float32, and 110 * 0 is 0 where infinity * 0 would be NaN
VANISHED = tl.constexpr(110.0)
# the maximum of an empty lane: finite, so that differences with it are not NaN, and no finite logit is below it
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
# Pointers to one number per row: nothing is gained from their alignment, and it changes with the rows of a tile, so each
# alignment would be compiled again. The same holds for the number of rows.
ROW_POINTERS = (
    "labels_ptr",
    "nll_ptr",
    "entropy_ptr",
    "maximum_ptr",
    "rest_ptr",
    "correct_ptr",
    "weight_ptr",
    "threshold_ptr",
    "open_count_ptr",
    "topk_entropy_ptr",
)
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


# --- functions of one number ------------------------------------------------------------------------------------------


@triton.jit
def _exp(x):
    """e^x by one multiplication and one instruction of the hardware. `tl.exp` needs three more on results below 2^-126."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0. Up to 1 by 2 atanh(x / (2 + x)), whose series ends below 1e-8 of it; the hardware's
    logarithm has an absolute error near 1."""
    q = x / (2 + x)
    q2 = q * q
    series = 1 + q2 * (1 / 3 + q2 * (1 / 5 + q2 * (1 / 7 + q2 * (1 / 9 + q2 * (1 / 11 + q2 * (1 / 13))))))
    return tl.where(x <= 1, 2 * q * series, tl.log(1 + x))


@triton.jit
def _expm1_negative(x):
    """e^-x - 1 for x >= 0. Up to 1 by -2 sinh(x / 2) e^(-x / 2), sinh by its series."""
    h = 0.5 * x
    h2 = h * h
    sinh = h * (1 + h2 / 6 * (1 + h2 / 20 * (1 + h2 / 42 * (1 + h2 / 72))))
    return tl.where(x <= 1, -2 * sinh * _exp(-h), _exp(-x) - 1)


@triton.jit
def _tanh(u):
    """tanh and its derivative. A polynomial (Cephes tanhf) below 0.625, where 1 - e^(-2u) would cancel."""
    u2 = u * u
    series = tl.fma(u2, -5.70498872745e-3, 2.06390887954e-2)
    series = tl.fma(series, u2, -5.37397155531e-2)
    series = tl.fma(series, u2, 1.33314422036e-1)
    series = tl.fma(series, u2, -3.33332819422e-1)
    e = tl.exp2(tl.abs(u) * (-2 * LOG2_E))
    inverse = 1 / (1 + e)
    big = (1 - e) * inverse
    tanh = tl.where(tl.abs(u) < 0.625, tl.fma(series * u2, u, u), tl.where(u < 0, -big, big))
    return tanh, 4 * e * inverse * inverse


@triton.jit
def _logits(raw, factor, cap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """The model's logits from raw projections: cap * tanh(factor * raw), or factor * raw."""
    z = raw.to(tl.float32)
    if CAPPED:
        tanh, _slope = _tanh(z * factor)
        z = cap * tanh
    elif SCALED:
        z = z * factor
    return z


# --- bisection over floats in the order of their bits -----------------------------------------------------------------


@triton.jit
def _to_key(x):
    """An int32 for each float32, in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bisect(keys, enough, few):
    """A key that at least `enough` of the keys reach: either at most `few` reach it, or it is the `enough`-th largest."""
    low = tl.min(keys, 0).to(tl.int64)  # pyrefly: ignore[missing-attribute]  # a Triton tensor
    high = tl.max(keys, 0).to(tl.int64) + 1  # pyrefly: ignore[missing-attribute]  # a Triton tensor
    reach_low = tl.full([], keys.shape[0], tl.int64)
    while (reach_low > few) & (high - low > 1):
        middle = (low + high) >> 1
        reach = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0).to(tl.int64)
        low, high = tl.where(reach >= enough, middle, low), tl.where(reach >= enough, high, middle)
        reach_low = tl.where(reach >= enough, reach, reach_low)
    return low.to(tl.int32)


# --- statistics -------------------------------------------------------------------------------------------------------


@triton.jit
def _join(m, r, s, z):
    """The state of the lanes after one more logit each; -inf and empty lanes add nothing, NaN stays in r."""
    difference = z - m
    gap = tl.minimum(tl.abs(difference), VANISHED, propagate_nan=NAN_STAYS)
    e = _exp(-gap)
    spread = gap * e
    higher = difference > 0
    keep = tl.where(higher, e, 1.0)
    s = tl.fma(tl.where(higher, r, 0.0), spread, tl.fma(keep, s, spread))
    return tl.maximum(m, z), tl.fma(keep, r, e), s


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def row_statistics_kernel(
    logits_ptr,
    stride,
    vocab,
    labels_ptr,
    nll_ptr,
    entropy_ptr,
    maximum_ptr,
    rest_ptr,
    correct_ptr,
    threshold_ptr,
    open_count_ptr,
    open_lanes_ptr,
    factor,
    cap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Statistics of a row; for the top-K entropy (TOPK > 0) a threshold and the lanes `[SLOTS]` to be gathered."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    lane = tl.arange(0, LANES)
    m = tl.full([LANES], LOWEST, tl.float32)
    r = tl.full([LANES], -1.0, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    whole = vocab // LANES * LANES
    for start in range(0, whole, LANES):
        m, r, s = _join(m, r, s, _logits(tl.load(row_ptr + start + lane), factor, cap, SCALED, CAPPED))
    if whole < vocab:
        inside = whole + lane < vocab
        z = _logits(tl.load(row_ptr + whole + lane, mask=inside, other=0.0), factor, cap, SCALED, CAPPED)
        m, r, s = _join(m, r, s, tl.where(inside, z, float("-inf")))

    maximum = tl.max(m, 0)
    holds_it = lane == tl.min(tl.where(m == maximum, lane, LANES), 0)  # the first of them
    gap = tl.minimum(maximum - m, VANISHED)
    share = _exp(-gap)
    mass = share * (1 + r)
    # NaN if the maximum is +inf: the entropy would be 0, and the gate closed, so that the row would not show
    rest = tl.sum(tl.where(holds_it, r, mass), 0) + (maximum - maximum)  # pyrefly: ignore[unsupported-operation]
    spread = tl.sum(tl.where(holds_it, s, share * s + gap * mass), 0)

    # by the same function from the same row: equal to the maximum if it is the maximum
    target = _logits(tl.load(row_ptr + tl.load(labels_ptr + row)), factor, cap, SCALED, CAPPED)
    log_rest = _log1p(rest)
    tl.store(nll_ptr + row, log_rest - (target - maximum))
    tl.store(entropy_ptr + row, log_rest + spread / (1 + rest))  # pyrefly: ignore[unsupported-operation]
    tl.store(maximum_ptr + row, maximum)
    tl.store(rest_ptr + row, rest)
    tl.store(correct_ptr + row, target == maximum)

    if TOPK > 0:
        keys = _to_key(m)
        threshold = _bisect(keys, TOPK, SLOTS)
        is_open = keys > threshold
        rank = tl.cumsum(is_open.to(tl.int32), 0)
        tl.store(threshold_ptr + row, _from_key(threshold))
        tl.store(open_count_ptr + row, tl.sum(is_open.to(tl.int32), 0))
        tl.store(open_lanes_ptr + row * SLOTS + rank - 1, lane, mask=is_open)


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def topk_entropy_kernel(
    logits_ptr,
    stride,
    vocab,
    maximum_ptr,
    rest_ptr,
    threshold_ptr,
    open_count_ptr,
    open_lanes_ptr,
    topk_entropy_ptr,
    factor,
    cap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Entropy of the K largest logits of a row, renormalised among themselves. STEPS: power of 2, >= V / LANES."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    is_open = slot < tl.load(open_count_ptr + row)
    lane = tl.load(open_lanes_ptr + row * SLOTS + slot, mask=is_open, other=0)
    column = lane[:, None] + LANES * tl.arange(0, STEPS)[None, :]
    inside = is_open[:, None] & (column < vocab)
    raw = tl.load(logits_ptr + row * stride + column, mask=inside, other=0.0)
    z = tl.where(inside, _logits(raw, factor, cap, SCALED, CAPPED), float("-inf"))

    keys = tl.maximum(_to_key(tl.reshape(z, [SLOTS * STEPS])), _to_key(tl.load(threshold_ptr + row)))
    last = _bisect(keys, TOPK, TOPK)
    above = keys > last
    copies = TOPK - tl.sum(above.to(tl.int32), 0)

    maximum = tl.load(maximum_ptr + row)
    gap = tl.minimum(maximum - _from_key(keys), VANISHED)
    mass = tl.where(above & (gap > 0), _exp(-gap), 0.0)
    last_gap = tl.minimum(maximum - _from_key(last), VANISHED)
    last_mass = tl.where(last_gap > 0, copies * _exp(-last_gap), 0.0)
    # occurrences of the maximum among the K; one of them is kept out
    maxima = tl.sum((above & (gap == 0)).to(tl.int32), 0) + tl.where(last_gap > 0, 0, copies)
    rest = tl.sum(mass, 0) + last_mass + (maxima - 1)
    spread = tl.sum(gap * mass, 0) + last_gap * last_mass
    entropy = _log1p(rest) + spread / (1 + rest)
    # a NaN of the row is not among its largest, and must not be hidden
    row_rest = tl.load(rest_ptr + row)
    tl.store(topk_entropy_ptr + row, tl.where(row_rest == row_rest, entropy, row_rest))


# --- gradient ---------------------------------------------------------------------------------------------------------


@triton.jit
def _gradient(raw, column, target_column, target, maximum, coefficient, factor, cap, slope, SCALED, CAPPED):
    z = raw.to(tl.float32)
    if CAPPED:
        tanh, derivative = _tanh(z * factor)
        g = tl.where(column == target_column, target, coefficient * _exp(cap * tanh - maximum))
        return g * (slope * derivative)
    if SCALED:
        z = z * factor
    return tl.where(column == target_column, target * slope, coefficient * slope * _exp(z - maximum))


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def row_gradient_kernel(
    logits_ptr,
    stride,
    vocab,
    labels_ptr,
    nll_ptr,
    maximum_ptr,
    rest_ptr,
    weight_ptr,
    factor,
    cap,
    slope,
    stretches,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    LANES: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """Gradient of STRETCH columns of a row, in place; `stretches` programs per row. `slope`: d logit / d raw at 0."""
    program = tl.program_id(0)
    row = (program // stretches).to(tl.int64)
    first = program % stretches * STRETCH
    row_ptr = logits_ptr + row * stride
    weight = tl.load(weight_ptr + row)
    maximum = tl.load(maximum_ptr + row)
    coefficient = weight / (1 + tl.load(rest_ptr + row))
    target = weight * _expm1_negative(tl.load(nll_ptr + row))
    label = tl.load(labels_ptr + row)
    # a label of another slice of the vocabulary has no target here
    target_column = tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)

    stop = tl.minimum(first + STRETCH, vocab)
    whole = first + (stop - first) // LANES * LANES
    lane = tl.arange(0, LANES)
    for start in range(first, whole, LANES):
        column = start + lane
        g = _gradient(
            tl.load(row_ptr + column), column, target_column, target, maximum, coefficient, factor, cap, slope,
            SCALED, CAPPED,
        )  # fmt: skip
        tl.store(row_ptr + column, g.to(logits_ptr.dtype.element_ty))
    if whole < stop:
        column = whole + lane
        inside = column < vocab
        g = _gradient(
            tl.load(row_ptr + column, mask=inside, other=0.0), column, target_column, target, maximum, coefficient,
            factor, cap, slope, SCALED, CAPPED,
        )  # fmt: skip
        tl.store(row_ptr + column, g.to(logits_ptr.dtype.element_ty), mask=inside)


# --- columns ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("rows",))
def column_kernel(
    grad_ptr, stride, rows, vocab, threshold, keep_ptr, mass_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """For each of COLUMNS columns: any |g| >= threshold, and the sum of g. ROWS rows per step."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < vocab
    step = tl.arange(0, ROWS)
    mass = tl.zeros([ROWS, COLUMNS], tl.float32)
    largest = tl.zeros([ROWS, COLUMNS], tl.float32)
    if tl.program_id(0) * COLUMNS + COLUMNS <= vocab:
        for first in range(0, rows, ROWS):
            row = first + step
            offset = row.to(tl.int64)[:, None] * stride + column[None, :]
            g = tl.load(grad_ptr + offset, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
            mass += g
            largest = tl.maximum(largest, tl.abs(g))
    else:
        for first in range(0, rows, ROWS):
            row = first + step
            offset = row.to(tl.int64)[:, None] * stride + column[None, :]
            g = tl.load(grad_ptr + offset, mask=(row < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            mass += g
            largest = tl.maximum(largest, tl.abs(g))
    tl.store(keep_ptr + column, tl.max(largest, 0) >= threshold, mask=inside)
    tl.store(mass_ptr + column, tl.sum(mass, 0), mask=inside)
