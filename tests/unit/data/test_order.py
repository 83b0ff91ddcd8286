"""The order of an epoch is a permutation, keyed by seed and epoch, the same one by one and at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.order import Permutation


@given(st.integers(1, 3000), st.integers(), st.integers(0, 100))
def test_is_a_bijection(size, seed, epoch):
    order = Permutation(size, seed=seed, epoch=epoch).many(np.arange(size))
    assert sorted(order.tolist()) == list(range(size))


@given(st.integers(1, 2**50), st.integers(0, 9))
def test_one_by_one_is_all_at_once(size, seed):
    order = Permutation(size, seed=seed, epoch=3)
    places = np.unique(np.linspace(0, size - 1, 50).astype(np.int64))
    assert [order[int(p)] for p in places] == order.many(places).tolist()


def test_seeds_and_epochs_have_their_own_orders():
    orders = {
        tuple(Permutation(1000, seed=seed, epoch=epoch).many(np.arange(1000)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_neighbours_are_separated():
    """A random permutation keeps a pair of neighbours together 2 times on average, whatever its size."""
    order = Permutation(100_000, seed=0, epoch=0).many(np.arange(100_000))
    assert (np.abs(np.diff(order)) == 1).sum() < 20
    # and the first tenth of the order comes evenly from all tenths of the numbers: binomial, 5 standard deviations
    tenths = np.bincount(order[:10_000] // 10_000, minlength=10)
    assert np.all(np.abs(tenths - 1000) < 5 * 30)


@pytest.mark.parametrize("place", [-1, 10])
def test_places_outside_are_refused(place):
    with pytest.raises(IndexError):
        Permutation(10, seed=0, epoch=0)[place]
