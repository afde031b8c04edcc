"""The threshold for singular values, and the signal it keeps, against a plain singular value decomposition."""

import math

import pytest
import torch

from eaftdrope.checkpoints.spectrum import keep_signal, keep_signal_of_factors, threshold_factor


def test_the_factor_is_the_published_one():
    """Gavish and Donoho: 2.858 for square matrices, and a cubic that is off by at most 0.02 for the others."""
    assert threshold_factor(300, 300) == pytest.approx(2.858, abs=5e-4)
    # the singular values of square noise have the distribution of a quarter circle, and 4 / sqrt(3) is its threshold
    median = 4 / math.sqrt(3) / threshold_factor(300, 300)
    assert (median * math.sqrt(4 - median**2) + 4 * math.asin(median / 2)) / (2 * math.pi) == pytest.approx(
        0.5, abs=1e-6
    )
    for rows, columns in ((1, 10), (2, 10), (5, 10), (10, 8)):
        beta = min(rows, columns) / max(rows, columns)
        assert threshold_factor(rows, columns) == pytest.approx(
            0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02
        )


def plain(change):
    """The definition, by the decomposition of the whole matrix."""
    left, singular, right = torch.linalg.svd(change.double(), full_matrices=False)
    kept = singular > threshold_factor(*change.shape) * singular.quantile(0.5)
    return (left * (singular * kept)) @ right, int(kept.sum())


def signal(rows, columns, rank, noise, seed=0):
    torch.manual_seed(seed)
    low_rank = torch.randn(rows, rank) @ torch.randn(rank, columns)
    return low_rank + noise * torch.randn(rows, columns), low_rank


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (120, 30), (30, 120), (7, 300)])
def test_a_dense_change_is_that_of_a_plain_decomposition(rows, columns, monkeypatch):
    # several blocks, the last of them shorter
    monkeypatch.setattr("eaftdrope.checkpoints.spectrum._BLOCK_BYTES", 8 * min(rows, columns) * 9)
    change, _ = signal(rows, columns, 2, 0.1)
    expected, count = plain(change)
    before, found = change.norm().item(), change.clone()
    spectrum = keep_signal(found)
    assert (spectrum.kept, spectrum.total) == (count, min(rows, columns)) and 0 < count < 7
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6 * before)
    assert spectrum.norm == pytest.approx(expected.norm().item() / before, rel=1e-6)


def test_the_planted_signal_is_found_in_noise():
    change, low_rank = signal(150, 100, 3, 0.3)
    error = (change - low_rank).norm()
    assert keep_signal(change).kept == 3
    assert (change - low_rank).norm() < 0.35 * error


def test_noise_only_leaves_nothing():
    change = 1e-4 * torch.randn(100, 80, generator=torch.Generator().manual_seed(0))
    spectrum = keep_signal(change)
    assert (spectrum.kept, spectrum.norm) == (0, 0.0) and not change.any()


def test_a_change_of_low_rank_and_no_change_are_left_alone():
    _, low_rank = signal(40, 30, 3, 0.0)
    found = low_rank.clone()
    keep_signal(found)
    torch.testing.assert_close(found, low_rank, rtol=1e-5, atol=1e-5)
    nothing = torch.zeros(10, 10)
    assert keep_signal(nothing).norm == 1.0 and not nothing.any()


def test_the_matrices_of_a_stack_are_separate():
    """Experts: one with a signal and one with noise only, whose own medians differ by a factor of a thousand."""
    first, _ = signal(40, 40, 1, 0.1)
    second, _ = signal(40, 40, 1, 0.1, seed=1)
    stack = torch.stack([first, 1e-3 * second])
    spectrum = keep_signal(stack)
    torch.testing.assert_close(stack[0].double(), plain(first)[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(stack[1].double(), plain(1e-3 * second)[0], rtol=0, atol=1e-7)
    assert (spectrum.kept, spectrum.total) == (2, 80)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(60, 40, 8), (12, 90, 8), (6, 40, 8)])
def test_factors_are_those_of_the_decomposition_of_their_product(rows, columns, rank):
    """Two strong directions and weak ones: of the R singular values of the product, those above R's own threshold remain."""
    torch.manual_seed(0)
    up, down = torch.randn(rows, rank) * torch.tensor([9.0, 8.0] + [0.1] * (rank - 2)), torch.randn(rank, columns)
    left, singular, right = torch.linalg.svd((up @ down).double(), full_matrices=False)
    count = min(rank, rows)
    kept = singular > threshold_factor(rows, count) * singular[:count].quantile(0.5)
    new_up, new_down, spectrum = keep_signal_of_factors(up, down)
    assert (spectrum.kept, spectrum.total) == (int(kept.sum()), count) and 1 <= spectrum.kept < count
    expected = (left * (singular * kept)) @ right
    torch.testing.assert_close((new_up @ new_down).double(), expected, rtol=0, atol=1e-5 * singular[0].item())
    assert (new_up.shape, new_down.shape) == (up.shape, down.shape)
    assert spectrum.norm == pytest.approx((expected.norm() / singular.norm()).item(), rel=1e-6)
