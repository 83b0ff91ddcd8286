"""The order of an epoch is a permutation, keyed by seed and epoch, the same whatever was read before."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.order import Permutation


def permuted(size: int, seed: int, epoch: int) -> list[int]:
    """The whole order, from a Feistel network on arrays of uint64."""
    half = next(bits for bits in range(1, 64) if 4**bits >= size)
    numbers = np.arange(4**half, dtype=np.uint64)
    left, right = numbers >> np.uint64(half), numbers % np.uint64(2**half)
    for turn in range(6):
        digest = hashlib.blake2b(f"{seed} {epoch} {turn}".encode(), digest_size=8).digest()
        x = right + np.frombuffer(digest, "<u8")[0]
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
        x = x ^ (x >> np.uint64(33))
        left, right = right, left ^ (x % np.uint64(2**half))
    network = left * np.uint64(2**half) + right
    numbers = network[:size]
    while (outside := numbers >= size).any():
        numbers = np.where(outside, network[numbers.astype(np.int64)], numbers)
    return numbers.tolist()


@given(st.integers(1, 3000), st.integers(), st.integers(0, 100))
def test_is_a_bijection_and_that_of_the_network_on_arrays(size, seed, epoch):
    order = [*Permutation(size, seed=seed, epoch=epoch)]
    assert sorted(order) == list(range(size))
    assert order == permuted(size, seed, epoch)


@given(st.integers(1, 2**50), st.integers(0, 9))
def test_does_not_depend_on_what_was_read_before(size, seed):
    order = Permutation(size, seed=seed, epoch=3)
    places = np.unique(np.linspace(0, size - 1, 50).astype(np.int64)).tolist()
    forwards, backwards = {p: order[p] for p in places}, {p: order[p] for p in reversed(places)}
    assert forwards == backwards == {p: Permutation(size, seed=seed, epoch=3)[p] for p in places}


def test_seeds_and_epochs_have_their_own_orders():
    orders = {tuple(Permutation(1000, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_neighbours_are_separated():
    """A random permutation keeps a pair of neighbours together 2 times on average, whatever its size."""
    order = np.array([*Permutation(100_000, seed=0, epoch=0)])
    assert (np.abs(np.diff(order)) == 1).sum() < 20
    # and the first tenth of the order comes evenly from all tenths of the numbers: binomial, 5 standard deviations
    tenths = np.bincount(order[:10_000] // 10_000, minlength=10)
    assert np.all(np.abs(tenths - 1000) < 5 * 30)


@pytest.mark.parametrize("place", [-1, 10])
def test_places_outside_are_refused(place):
    with pytest.raises(IndexError):
        Permutation(10, seed=0, epoch=0)[place]
