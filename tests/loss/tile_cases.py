"""Tiles of logits that every backend must get right, and the float64 truth they are held against.

    for case in tile_cases(torch.bfloat16):
        check_statistics(backend.tile_statistics, case)
        check_gradient(backend.tile_statistics, backend.tile_gradient_, case)

Legend: R rows of a tile, V vocabulary, K size of the top-K entropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eaftdrope.loss.backends.tile import LogitsTransform, TileStats

PLAIN = LogitsTransform()

# Stands between the rows of a tile whose gradient is formed.
_BETWEEN = 3.5

# How far one stored value of the gradient may be from the truth: half a unit in the last place, and what float32
# arithmetic adds before the rounding; the smallest numbers of float16 are 6e-8 apart.
GRADIENT_ERROR = {torch.float32: (2e-6, 1e-9), torch.bfloat16: (4.1e-3, 1e-9), torch.float16: (6e-4, 6.1e-8)}


@dataclass(frozen=True)
class TileCase:
    """One tile `[R, V]` of raw projections in the model's dtype, and what a backend is told about it."""

    name: str
    logits: Tensor
    labels: Tensor
    weight: Tensor
    transform: LogitsTransform = PLAIN
    topk: int | None = 20

    def __str__(self) -> str:
        return self.name


def make_case(
    name: str, rows: int, vocab: int, dtype: torch.dtype, *, spread: float = 3.0, seed: int = 0, **options
) -> TileCase:
    """Rows from flat to certain: each is scaled differently, and every third has a winner far above the rest. Labels are
    likely, unlikely, first and last; weights go from 0 to 1."""
    generator = torch.Generator().manual_seed(1000 * seed + vocab)
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    logits *= spread * torch.linspace(0.1, 1.5, rows, dtype=torch.float64)[:, None]
    winners = torch.randint(0, vocab, (rows,), generator=generator)
    gap = torch.linspace(0, 30, rows, dtype=torch.float64)
    certain = torch.arange(rows) % 3 == 0
    logits[certain, winners[certain]] = logits[certain].amax(-1) + gap[certain]
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::2] = winners[::2]
    labels[0] = 0
    labels[-1] = vocab - 1
    weight = torch.rand(rows, generator=generator)
    weight[rows // 2] = 0
    weight[-1] = 1
    return TileCase(name, logits.to(dtype), labels, weight, **options)


def padded(case: TileCase, stride: int) -> TileCase:
    """The same tile with `stride` elements from row to row. What lies between the rows is poison and must stay."""
    buffer = torch.full((case.logits.shape[0], stride), float("nan"), dtype=case.logits.dtype)
    buffer[:, : case.logits.shape[1]] = case.logits
    return replace(case, name=f"{case.name}-stride{stride}", logits=buffer[:, : case.logits.shape[1]])


def tile_cases(dtype: torch.dtype, *, small: bool = False) -> list[TileCase]:
    """All cases; `small` leaves out the wide ones, for slow executors (an interpreter, a sanitizer)."""
    cases = [make_case(f"v{vocab}", 7, vocab, dtype) for vocab in (2, 3, 7, 31, 64, 257, 1000)]
    if not small:
        cases += [make_case(f"v{vocab}", 5, vocab, dtype) for vocab in (4096, 16_385, 50_257)]
    cases += [
        make_case("one-row", 1, 100, dtype),
        padded(make_case("padded", 4, 257, dtype), 272),
        padded(make_case("odd-stride", 4, 257, dtype), 259),
        make_case("k2", 5, 300, dtype, topk=2),
        make_case("k64", 5, 300, dtype, topk=64),
        make_case("k-above-v", 5, 13, dtype, topk=20),
        make_case("no-topk", 5, 300, dtype, topk=None),
        make_case("scaled", 5, 300, dtype, transform=LogitsTransform(scale=0.25)),
        make_case("softcap", 5, 300, dtype, spread=20.0, transform=LogitsTransform(softcap=30.0)),
        make_case("scaled-softcap", 5, 300, dtype, spread=20.0, transform=LogitsTransform(scale=1.7, softcap=15.0)),
        _with_logits(make_case("flat", 3, 640, dtype), lambda z: z.zero_()),
        _with_logits(make_case("ties", 3, 640, dtype), lambda z: z.fill_(-30).index_fill_(1, _at(3, 70, 71, 639), 5)),
        _with_logits(make_case("far-apart", 3, 200, dtype), lambda z: z.mul_(1000)),
        _with_logits(make_case("one-hot", 4, 500, dtype), lambda z: z.fill_(-1e4).index_fill_(1, _at(499), 1e4)),
        _masked(make_case("masked-vocabulary", 6, 1300, dtype)),
        _masked(make_case("masked-below-k", 6, 130, dtype)),
    ]
    return cases


def _at(*columns: int) -> Tensor:
    return torch.tensor(columns)


def _with_logits(case: TileCase, change) -> TileCase:
    logits = case.logits.clone()
    change(logits)
    return replace(case, logits=logits)


def _masked(case: TileCase) -> TileCase:
    """-inf for all but the ends of the vocabulary, as models with padded vocabularies have it; labels stay possible."""
    logits = case.logits.clone()
    vocab = logits.shape[1]
    logits[:, 5 : vocab - 5] = float("-inf")
    return replace(case, logits=logits, labels=case.labels % 5)


# --- the truth --------------------------------------------------------------------------------------------------------


def transformed(case: TileCase) -> Tensor:
    """`[R, V]` the model's logits in float64, from the rounded projections."""
    z = case.logits.double() * case.transform.scale
    cap = case.transform.softcap
    return z if cap is None else cap * torch.tanh(z / cap)


def true_statistics(case: TileCase) -> dict[str, Tensor]:
    """nll, entropy, topk_entropy (nats) and correct in float64; shifted sums keep the digits of entropies near 0."""
    z_RV = transformed(case)
    x_RV = z_RV - z_RV.amax(-1, keepdim=True)
    target_R = x_RV.gather(1, case.labels[:, None]).squeeze(1)
    rest_R, entropy_R = _shifted(x_RV)
    topk_R = None
    if case.topk is not None:
        topk_R = _shifted(x_RV.topk(min(case.topk, x_RV.shape[1])).values)[1]
    return {"nll": rest_R.log1p() - target_R, "entropy": entropy_R, "topk_entropy": topk_R, "correct": target_R == 0}


def _shifted(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of e^x without one maximum, entropy) of rows whose maximum is 0"""
    others = x_RV.scatter(1, x_RV.argmax(-1, keepdim=True), float("-inf"))
    exp = others.exp()
    rest = exp.sum(-1)
    return rest, rest.log1p() + torch.where(exp > 0, -others * exp, 0).sum(-1) / (1 + rest)


def true_gradient(case: TileCase, *, by_logits: bool = False) -> Tensor:
    """`[R, V]` float64 gradient of sum_t w_t nll_t by the raw projections, or by the logits they are transformed to."""
    z_RV = transformed(case)
    statistics = true_statistics(replace(case, topk=None))
    gradient = z_RV.softmax(-1)
    # p - 1 of a label that is nearly certain
    gradient.scatter_(1, case.labels[:, None], torch.expm1(-statistics["nll"])[:, None])
    gradient *= case.weight.double()[:, None]
    cap = case.transform.softcap
    if by_logits:
        return gradient
    if cap is not None:
        gradient *= 1 - (z_RV / cap).square()
    return gradient * case.transform.scale


# --- the checks -------------------------------------------------------------------------------------------------------


def check_statistics(tile_statistics, case: TileCase) -> TileStats:
    """Values to 1e-5 relative (float32 rounds logits of size z by z * 6e-8, which a difference of two may show), the
    tile unread by anything else: it must come out bit-equal."""
    before = case.logits.clone()
    actual = tile_statistics(case.logits, case.labels, case.transform, case.topk)
    assert torch.equal(torch.nan_to_num(before), torch.nan_to_num(case.logits)), "the tile was changed"
    expected = true_statistics(case)
    largest = transformed(case).nan_to_num(neginf=0).abs().max().item()
    moved = case.transform != PLAIN or case.logits.dtype != torch.float32
    slack = 4e-7 * largest if moved or largest > 100 else 1e-12
    for name in ("nll", "entropy", "topk_entropy"):
        value, truth = getattr(actual, name), expected[name]
        if truth is None:
            assert value is None, name
            continue
        assert value.dtype == torch.float32 and value.shape == case.labels.shape, name
        assert (value >= 0).all(), f"{name} is negative"
        # an entropy keeps its digits however small it is
        floor = slack if name == "nll" or case.transform != PLAIN else 1e-20
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=floor, msg=lambda m, n=name: f"{n}: {m}")
    assert actual.correct.dtype == torch.bool
    assert torch.equal(actual.correct, expected["correct"]), "correct"
    return actual


def check_gradient(tile_statistics, tile_gradient_, case: TileCase) -> None:
    """Every stored value within the rounding of the dtype; what lies beyond the row stays as it was."""
    stats = tile_statistics(case.logits, case.labels, case.transform, None)
    logits = _same_layout(case.logits)
    tile_gradient_(logits, case.labels, stats, case.weight, case.transform)
    _assert_gradient(logits, slice(None), case)
    beyond = logits.as_strided((logits.shape[0], logits.stride(0)), (logits.stride(0), 1))[:, logits.shape[1] :]
    assert (beyond == _BETWEEN).all(), "written beyond the row"


def check_sliced_gradient(tile_statistics, tile_gradient_, case: TileCase, columns: int) -> None:
    """The gradient formed slice by slice of the vocabulary from whole-row statistics: labels are counted from the start
    of the slice, and one outside [0, columns) has its target in another slice."""
    stats = tile_statistics(case.logits, case.labels, case.transform, None)
    for start in range(0, case.logits.shape[1], columns):
        part = case.logits[:, start : start + columns].clone(memory_format=torch.contiguous_format)
        tile_gradient_(part, case.labels - start, stats, case.weight, case.transform)
        _assert_gradient(part, slice(start, start + columns), case)


def _same_layout(logits: Tensor) -> Tensor:
    # a number: a NaN that is read, transformed and written would be a NaN again
    buffer = torch.full((logits.shape[0], logits.stride(0)), _BETWEEN, dtype=logits.dtype, device=logits.device)
    copy = buffer[:, : logits.shape[1]]
    copy.copy_(logits)
    return copy


def _assert_gradient(actual: Tensor, columns: slice, case: TileCase) -> None:
    expected = true_gradient(case)[:, columns]
    relative, absolute = GRADIENT_ERROR[actual.dtype]
    # float32 holds a logit of size z to z * 6e-8, and its exponential to that share of itself
    relative += 1e-7 * min(1e3, transformed(case).nan_to_num(neginf=0).abs().max().item())
    error = (actual.double() - expected).abs()
    allowed = relative * expected.abs() + absolute * math.ceil(abs(case.transform.scale))
    if case.transform.softcap is not None:
        # 1 - tanh^2 near saturation, from a float32 tanh
        allowed += 5e-7 * case.transform.scale * true_gradient(case, by_logits=True)[:, columns].abs()
    worst = (error - allowed).max().item()
    assert not actual.isnan().any() and worst <= 0, (
        f"{case}: {int((error > allowed).sum())} values off by up to {worst}"
    )
