"""Moments added in blocks give the singular values of the whole matrix; ranks of known matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.analysis.effective_rank import Moments, Spectrum, outside_directions, outside_norm
from tests.tolerances import assert_close

WIDTH = 12


def moments(rows: torch.Tensor, blocks: int = 1) -> Moments:
    moments_of_rows = Moments(rows.shape[1])
    for block in rows.chunk(blocks):
        moments_of_rows.add(block)
    return moments_of_rows


def entropy_rank(values: np.ndarray) -> float:
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
def test_streamed_moments_give_the_svd_of_the_stacked_matrix(centred, offset):
    rows = torch.randn(300, WIDTH, dtype=torch.float64) * torch.logspace(0, -1, WIDTH) + offset
    stacked = (rows - rows.mean(0) if centred else rows).numpy()
    values = np.linalg.svd(stacked, compute_uv=False)
    streamed = moments(rows, blocks=7).spectrum(centred)
    # the noise of a Gram matrix, as a share of the largest value that it holds
    assert np.abs(streamed.values.numpy() - values).max() < 2e-7 * values[0]
    if offset < 1e4 or centred:
        assert streamed.effective == pytest.approx(entropy_rank(values), rel=1e-6)
        assert streamed.numerical(0.05) == np.linalg.matrix_rank(stacked, rtol=0.05)
    squares = np.cumsum(values**2) / (values**2).sum()
    assert streamed.energy(0.9) == np.searchsorted(squares, 0.9) + 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**31))
def test_blocks_and_their_order_do_not_matter(sizes, seed):
    rows = torch.randn(sum(sizes), WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    blocks = rows.split(sizes)
    joined = sum((moments(block) for block in reversed(blocks)), Moments(WIDTH))
    whole = moments(rows)
    assert joined.count == whole.count
    assert_close(joined.mean, whole.mean)
    assert_close(joined.scatter, whole.scatter)


def test_an_orthonormal_basis_has_all_dimensions():
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0]
    measured = moments(basis).spectrum()
    assert measured.effective == pytest.approx(WIDTH)
    assert measured.energy(1 - 1e-9) == measured.numerical(0.5) == WIDTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_repeated_row_has_rank_1_and_rank_0_without_its_mean(dtype):
    rows = torch.randn(1, WIDTH, dtype=dtype).repeat(50, 1)
    measured = moments(rows, blocks=3).spectrum()
    assert measured.effective == pytest.approx(1)
    assert measured.energy(0.99) == measured.numerical(1e-6) == 1
    left = moments(rows, blocks=3).spectrum(centred=True)
    assert left.effective == left.energy(0.99) == left.numerical(1e-6) == 0


@given(st.integers(1, WIDTH), st.floats(1e-3, 1e3))
def test_the_rank_is_at_most_the_dimension_and_ignores_scale(rank, scale):
    draws = torch.Generator().manual_seed(rank)
    rows = torch.randn(90, rank, generator=draws) @ torch.randn(rank, WIDTH, generator=draws)
    measured, scaled = moments(rows).spectrum(), moments(rows * scale).spectrum()
    assert measured.numerical(1e-5) == rank
    assert 1 <= measured.effective <= rank + 1e-3
    assert scaled.effective == pytest.approx(measured.effective, rel=1e-4)
    assert scaled.numerical(1e-5) == rank


def test_equal_values_among_zeros_are_counted_by_every_rank():
    values = torch.tensor([2.0] * 5 + [0.0] * 7, dtype=torch.float64)
    spectrum = Spectrum(values, torch.eye(WIDTH, dtype=torch.float64))
    assert spectrum.effective == pytest.approx(5)
    assert spectrum.energy(0.6) == 3 and spectrum.energy(0.61) == 4 and spectrum.numerical(1e-6) == 5


def along(*axes: int) -> Spectrum:
    """Rows along some axes, of lengths 1, 2, 3 ..."""
    rows = torch.zeros(len(axes), WIDTH, dtype=torch.float64)
    rows[range(len(axes)), axes] = torch.arange(1.0, len(axes) + 1, dtype=torch.float64)
    return moments(rows).spectrum()


def test_shares_outside_by_direction_and_by_norm():
    real, mask = along(0, 1, 2), along(0, 5)
    assert outside_directions(mask, 2, real, 3) == pytest.approx(1 / 2)
    assert outside_norm(mask, real, 3) == pytest.approx(4 / 5)
    assert outside_directions(along(1, 2), 2, real, 3) == pytest.approx(0)
    assert outside_directions(along(6, 7), 2, real, 3) == pytest.approx(1)
    assert outside_norm(real, real, 2) == pytest.approx(1 / (1 + 4 + 9))
    assert outside_norm(real, real, 3) == pytest.approx(0)


def test_a_direction_is_outside_by_the_squared_sine_of_its_angle():
    rows = torch.zeros(1, WIDTH, dtype=torch.float64)
    rows[0, 0], rows[0, 5] = np.cos(0.3), np.sin(0.3)
    tilted = moments(rows).spectrum()
    assert outside_directions(tilted, 1, along(0, 1), 2) == pytest.approx(np.sin(0.3) ** 2)
    assert outside_norm(tilted, along(0, 1), 2) == pytest.approx(np.sin(0.3) ** 2)


def test_an_empty_subspace_is_inside():
    nothing = moments(torch.zeros(4, WIDTH)).spectrum()
    assert nothing.effective == 0 and nothing.energy(0.9) == nothing.numerical(1e-6) == 0
    assert outside_directions(nothing, 0, along(0), 1) == outside_norm(nothing, along(0), 1) == 0
