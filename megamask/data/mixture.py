"""Mixtures: the source of the pack with a number, and how much of each source was read before it, in O(1).

The order repeats after `BLOCK` numbers. A block has a whole number of packs of each source, evenly spaced, so any
window of `BLOCK` numbers, wherever it begins, has exactly these. Shares are rounded to one pack of a block. The order
depends on the shares alone; a seed orders the packs inside each source.

Shares that change over a run change in `PHASES` steps. Each phase has its own order, which the numbers of the run index
unchanged, and a table of the counts before each phase gives the index inside a source. So a look-up is still O(1).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64

BLOCK = 1000
"""Packs after which the order of sources repeats."""
PHASES = 64
"""Steps in which shares change over a run."""


def block_quotas(shares: Sequence[float]) -> Int64[np.ndarray, " S"]:
    """The packs of each source in a block: its share of `BLOCK`, rounded so that the sum is `BLOCK`.

    ``shares`` are 0 or more with a sum above 0, in any unit. The largest remainders are rounded up (Hamilton's method);
    a source with a share above 0 gets at least one pack. At most `BLOCK` sources.
    """
    wanted = np.asarray(shares, np.float64) / max(shares)
    wanted = wanted / wanted.sum() * BLOCK
    # a share of 0.3 may be 299.99999999999994 packs
    quotas = np.floor(np.round(wanted, 9)).astype(np.int64)
    quotas[np.argsort(quotas - wanted, kind="stable")[: BLOCK - quotas.sum()]] += 1
    for source in np.flatnonzero((quotas == 0) & (wanted > 0)):
        quotas[quotas.argmax()] -= 1
        quotas[source] = 1
    return quotas


def smoothed_shares(sizes: Sequence[int], alpha: float) -> Float[np.ndarray, " S"]:
    """Shares proportional to (n_l / N) ** ``alpha``, for sources of the sizes n_l whose sum is N.

    1 reads all sources equally often, 0 gives all the same share. Source: "Cross-lingual Language Model Pretraining"
    (Lample and Conneau 2019), section 3.1, which counts sentences; here a size is a number of packs.
    """
    weights = (np.asarray(sizes, np.float64) / sum(sizes)) ** alpha
    return weights / weights.sum()


class SourceOrder:
    """The source of each number from 0 on, and its index among the numbers of that source."""

    def __init__(self, quotas: Int64[np.ndarray, " S"]):
        """``quotas``: the packs of each source in a block, with a sum of `BLOCK`."""
        assert quotas.min() >= 0 and quotas.sum() == BLOCK
        self.quotas = quotas
        sources = np.repeat(np.arange(len(quotas)), quotas)
        first = np.cumsum(quotas) - quotas
        # pack i of k is in the middle of part i of k equal parts
        middles = (2 * (np.arange(BLOCK) - first[sources]) + 1) / quotas[sources]
        order = np.lexsort([sources, middles])
        self._sources = sources[order]
        self._ranks = (np.arange(BLOCK) - first[sources])[order]

    def __getitem__(self, number: int) -> tuple[int, int]:
        """The source at ``number``, and how many numbers before it are of the same source."""
        block, place = divmod(number, BLOCK)
        source = int(self._sources[place])
        return source, block * int(self.quotas[source]) + int(self._ranks[place])

    def shares_at(self, number: int) -> Float[np.ndarray, " S"]:
        """The share of each source around ``number``: the same everywhere."""
        return self.quotas / BLOCK

    def counts(self, number: int) -> Int64[np.ndarray, " S"]:
        """How many of the numbers below ``number`` are of each source."""
        block, place = divmod(number, BLOCK)
        return block * self.quotas + np.bincount(self._sources[:place], minlength=len(self.quotas))


class AnnealedOrder:
    """As `SourceOrder`, with another order in each phase; used in the same way.

    A window inside a phase has exact shares. An order does not begin again with its phase, so that short phases, too,
    reach the sources with small shares.
    """

    def __init__(self, orders: Sequence[SourceOrder], starts: Sequence[int]):
        """``orders`` of the phases, and the number at which each begins: increasing, from 0."""
        assert starts[0] == 0 and len(orders) == len(starts)
        self._orders, self._starts = tuple(orders), tuple(starts)
        before = np.zeros_like(orders[0].quotas)
        shifts = []
        for order, start, end in zip(orders, starts, [*starts[1:], starts[-1]], strict=True):
            shifts.append(before - order.counts(start))
            before = before + order.counts(end) - order.counts(start)
        self._shifts = shifts
        """For each phase, what to add to the counts of its order."""

    @classmethod
    def by_alpha(cls, sizes: Sequence[int], start: float, end: float, total: int) -> AnnealedOrder:
        """Shares by `smoothed_shares`, whose alpha changes linearly from ``start`` to ``end`` over ``total`` numbers.

        mmBERT anneals the exponent from 0.7 to 0.5 and 0.3, in three phases with other languages in each (Marone et al.
        2025); here all sources are in every phase. Numbers from ``total`` on belong to the last phase.
        """
        shares = [smoothed_shares(sizes, alpha) for alpha in np.linspace(start, end, PHASES).tolist()]
        orders = [SourceOrder(block_quotas(each.tolist())) for each in shares]
        return cls(orders, [phase * total // PHASES for phase in range(PHASES)])

    def __getitem__(self, number: int) -> tuple[int, int]:
        """The source at ``number``, and how many numbers before it are of the same source."""
        phase = self._phase(number)
        source, index = self._orders[phase][number]
        return source, index + int(self._shifts[phase][source])

    def shares_at(self, number: int) -> Float[np.ndarray, " S"]:
        """The share of each source in the phase of ``number``."""
        return self._orders[self._phase(number)].shares_at(number)

    def counts(self, number: int) -> Int64[np.ndarray, " S"]:
        """How many of the numbers below ``number`` are of each source."""
        phase = self._phase(number)
        return self._orders[phase].counts(number) + self._shifts[phase]

    def _phase(self, number: int) -> int:
        return bisect_right(self._starts, number) - 1
