"""Every function of the CPU backend on small tiles against float64, with every instruction set of the machine.

python every_function.py LIBRARY        for a library other than the product's own: a sanitizer's, one with a planted bug
"""

import dataclasses
import sys
from pathlib import Path

import torch

from eaftdrope.loss.backends import cpu as backend
from eaftdrope.loss.native import build
from eaftdrope.loss.native import library as native
from tests.loss.anchored_tiles import check_anchored
from tests.loss.tile_cases import (
    TileCase,
    check_gradient,
    check_sliced_gradient,
    check_statistics,
    make_case,
    padded,
    tile_cases,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_every_function() -> None:
    """Raises AssertionError for anything that is wrong."""
    library = native.load()
    best = library.eaft_set_isa(-1)
    for isa in range(best + 1):
        assert library.eaft_set_isa(isa) == isa
        for dtype in DTYPES:
            cases = [*tile_cases(dtype, small=True), rising_maximum(dtype, blocks=2), many_ties(dtype, 5)]
            for case in [*cases, padded(make_case("neighbours", 3, 70, dtype), 71)]:
                check_statistics(backend.tile_statistics, case)
                check_gradient(backend.tile_statistics, backend.tile_gradient_, case)
                check_anchored(backend, case)
            check_sliced_gradient(backend.tile_statistics, backend.tile_gradient_, make_case("s", 3, 257, dtype), 100)
            check_sums(dtype)
    library.eaft_set_isa(-1)


def rising_maximum(dtype: torch.dtype, blocks: int) -> TileCase:
    """Blocks of 4096 that each start a new maximum, tie with the last one, stay below it, or begin with -inf."""
    case = make_case("rising", 4, blocks * 4096 + 9, dtype, spread=1.0)
    for block in range(blocks + 1):
        case.logits[0, block * 4096] = 6.0 + block
        case.logits[1, block * 4096 + 7] = 6.0
        case.logits[2, block * 4096 : block * 4096 + 2000] = float("-inf")
        case.logits[3, block * 4096 + 3] = 30.0 - block
    return dataclasses.replace(case, labels=torch.tensor([blocks * 4096, 7, 4095, 3]))


def many_ties(dtype: torch.dtype, k: int) -> TileCase:
    """12 sub-blocks of 512, so 12 maxima among which the K-th is looked for; few distinct numbers, one, or few finite."""
    case = make_case("ties", 4, 6000, dtype, topk=k)
    case.logits[1] = torch.randint(0, 3, (6000,), generator=torch.Generator().manual_seed(k)).to(dtype)
    case.logits[2] = 1.5
    case.logits[3, 40:] = float("-inf")
    return dataclasses.replace(case, labels=case.labels % 40)


def halfway(dtype: torch.dtype) -> torch.Tensor:
    """`[1, n]` float32 numbers in the middle between two neighbours of the 16-bit dtype, and the neighbours."""
    steps = torch.arange(256) * 2.0**-11 * (1 if dtype == torch.float16 else 8)
    return torch.cat([1 + steps, -1 - steps, 2.0**-20 * (1 + steps)])[None]


def check_sums(dtype: torch.dtype) -> None:
    """What works on gradients rather than on logits."""
    for columns in (1, 37, 130, 2050):
        tile = padded(make_case("tile", 11, columns, dtype), columns + 1).logits
        keep, mass = backend.tile_columns(tile, 1.5)
        assert torch.equal(keep, (tile.abs() >= 1.5).any(0))
        torch.testing.assert_close(mass, tile.double().sum(0).float(), rtol=1e-5, atol=1e-4)
        every_third = torch.arange(columns - 1, -1, -3)
        assert torch.equal(backend.gather_columns(tile, every_third), tile[:, every_third])
        total = torch.ones(20, columns)
        rows = torch.tensor([0, 1, 2, 5, 6, 7, 8, 10, 11, 12, 19])
        backend.add_rows_(total, rows, tile)
        expected = torch.ones(20, columns).index_add_(0, rows, tile.float())
        assert torch.equal(total, expected)
        copy = torch.empty(11, columns, dtype=dtype)
        backend.accumulate(copy, tile, False)
        assert torch.equal(copy, tile)
    exact = halfway(dtype)
    rounded = torch.empty_like(exact, dtype=dtype)
    backend.accumulate(rounded, exact, False)
    assert torch.equal(rounded, exact.to(dtype))


def main() -> None:
    torch.set_num_threads(1)
    build.library_path = lambda: Path(sys.argv[1])
    check_every_function()
    print("every function is right")


if __name__ == "__main__":
    main()
