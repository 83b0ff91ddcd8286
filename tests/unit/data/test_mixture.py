"""The order of sources in a mixture: exact shares in every window, and an index that equals a count."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.mixture import BLOCK, PHASES, AnnealedOrder, SourceOrder, block_quotas, smoothed_shares

AMOUNTS = st.floats(0, 1e6, allow_subnormal=False)
SHARES = st.lists(AMOUNTS, min_size=1, max_size=20).filter(lambda shares: sum(shares) > 0)


@given(SHARES)
def test_a_quota_is_the_share_to_a_pack(shares: list[float]) -> None:
    quotas = block_quotas(shares)
    total = sum(map(Fraction, shares))
    wanted = [BLOCK * Fraction(share) / total for share in shares]
    rare = sum(0 < packs < 1 for packs in wanted)
    assert sum(quotas) == BLOCK
    # each source that gets a pack although its share is smaller takes it from another
    assert all(-1 - rare < got - packs <= 1 + Fraction(1, 10**6) for got, packs in zip(quotas, wanted, strict=True))
    assert all((got > 0) == (share > 0) for got, share in zip(quotas, shares, strict=True))


@pytest.mark.parametrize("shares", [(0.6, 0.3, 0.1), (6, 3, 1), (0.7, 0.1, 0.1, 0.1), (0.3, 0.3, 0.4), (1,), (0, 1)])
def test_shares_of_whole_packs_are_exact(shares: tuple[float, ...]) -> None:
    assert [Fraction(int(q), BLOCK) for q in block_quotas(shares)] == [
        Fraction(str(s)) / sum(Fraction(str(t)) for t in shares) for s in shares
    ]


@given(SHARES, st.integers(0, 10**12))
def test_index_and_counts_equal_a_loop_over_all_numbers(shares: list[float], far: int) -> None:
    order = SourceOrder(block_quotas(shares))
    before: Counter[int] = Counter()
    for number in range(2 * BLOCK + 7):
        source, index = order[number]
        assert index == before[source]
        if number % 97 == 0:
            assert order.counts(number).tolist() == [before[each] for each in range(len(shares))]
        before[source] += 1
    source, index = order[far]
    assert order.counts(far)[source] == index
    expected = order.counts(far)
    expected[source] += 1
    assert order.counts(far + 1).tolist() == expected.tolist()


@given(SHARES, st.integers(0, 10**6))
def test_every_window_of_a_block_has_the_quotas(shares: list[float], start: int) -> None:
    order = SourceOrder(block_quotas(shares))
    window = Counter(order[number][0] for number in range(start, start + BLOCK))
    assert [window[source] for source in range(len(shares))] == order.quotas.tolist()


def test_sources_are_evenly_spaced() -> None:
    order = SourceOrder(block_quotas([0.6, 0.3, 0.1]))
    for number in range(BLOCK):
        off = order.counts(number) - number * order.quotas / BLOCK
        assert np.abs(off).max() <= 1.5  # half a pack of each of three sources


def test_alpha_smooths_by_size() -> None:
    sizes = [900, 90, 10]
    assert smoothed_shares(sizes, 1.0) == pytest.approx([0.9, 0.09, 0.01])
    assert smoothed_shares(sizes, 0.0) == pytest.approx([1 / 3] * 3)
    powers = [(size / 1000) ** 0.3 for size in sizes]
    assert smoothed_shares(sizes, 0.3) == pytest.approx([power / sum(powers) for power in powers])


# ---- shares that move

ALPHAS = st.floats(0, 1)
SIZES = st.lists(st.integers(1, 10**6), min_size=2, max_size=8)


@given(SIZES, ALPHAS, ALPHAS, st.integers(1, 4 * BLOCK), st.integers(0, 10**9))
def test_moving_shares_equal_a_loop_over_all_numbers(
    sizes: list[int], start: float, end: float, total: int, far: int
) -> None:
    order = AnnealedOrder.by_alpha(sizes, start, end, total)
    before: Counter[int] = Counter()
    for number in range(total + 9):
        source, index = order[number]
        assert index == before[source]
        if number % 53 == 0:
            assert order.counts(number).tolist() == [before[each] for each in range(len(sizes))]
        before[source] += 1
    # beyond the run, as after skipped packs, the last phase lasts
    source, index = order[far]
    assert far < total or order.counts(far)[source] == index


def test_shares_move_from_alpha_to_alpha_end() -> None:
    sizes, total = [900, 90, 10], 3 * PHASES * BLOCK
    order = AnnealedOrder.by_alpha(sizes, 1.0, 0.3, total)
    assert order.shares_at(0) * BLOCK == pytest.approx(block_quotas(smoothed_shares(sizes, 1.0).tolist()))
    assert order.shares_at(total - 1) * BLOCK == pytest.approx(block_quotas(smoothed_shares(sizes, 0.3).tolist()))
    for phase in (0, 20, PHASES - 1):
        begin = phase * 3 * BLOCK
        alpha = 1.0 + phase / (PHASES - 1) * (0.3 - 1.0)
        window = Counter(order[number][0] for number in range(begin + 777, begin + 777 + BLOCK))
        assert [window[source] for source in range(3)] == block_quotas(smoothed_shares(sizes, alpha).tolist()).tolist()


def test_short_phases_reach_small_sources_by_their_mean_share() -> None:
    sizes, total = [980, 20], 10 * PHASES
    counts = AnnealedOrder.by_alpha(sizes, 1.0, 0.5, total).counts(total)
    expected = sum(10 * smoothed_shares(sizes, alpha) for alpha in np.linspace(1.0, 0.5, PHASES).tolist())
    assert abs(counts[1] - expected[1]) < 0.2 * expected[1]


def test_the_same_alpha_in_all_phases_is_the_constant_order() -> None:
    order = AnnealedOrder.by_alpha([7, 3], 0.5, 0.5, 5000)
    constant = SourceOrder(block_quotas(smoothed_shares([7, 3], 0.5).tolist()))
    assert [order[number] for number in range(6000)] == [constant[number] for number in range(6000)]
