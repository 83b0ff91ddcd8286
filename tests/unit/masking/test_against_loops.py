"""Masks are, bit for bit, those of a loop that looks at one piece after another."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megamask.batch import PackedBatch
from megamask.masking.choose_within_budget import choose_pieces, first_fit, first_fit_in_rounds
from megamask.masking.corrupt import corrupt_targets
from megamask.masking.piece_order import radix_argsort
from megamask.masking.rng import PackRng, gumbel
from megamask.masking.settings import Corruption
from megamask.masking.units import pieces_of_unit
from tests.batches import IDS, pack


class Loop:
    """The choice of pieces as `choose_pieces` describes it, in Python, with the same random numbers."""

    def __init__(self, batch: PackedBatch, piece: list[int], rng: PackRng):
        self.piece, self.rng, self.count = piece, rng, max(piece) + 1
        self.sequence, self.size, self.free = ([0] * self.count for _ in range(3))
        for row, number in enumerate(piece):
            self.size[number] += 1
            self.sequence[number] = int(batch.layout.sequence[row])
            self.free[number] = bool(batch.maskable[row])
        self.sequences = len(batch.layout.lengths)
        self.available = self.tokens(range(self.count))

    def tokens(self, pieces, sequence: int | None = None) -> int:
        some = (p for p in pieces if self.free[p] and sequence in (None, self.sequence[p]))
        return sum(self.size[p] for p in some)

    def split(self, weights: list[int], budget: int) -> list[int]:
        offset, total = float(self.rng.uniform(1)), float(sum(weights))
        marks = [int(np.floor(float(n) * (budget / total) + offset)) for n in np.cumsum(weights)]
        return [min(n, w) for n, w in zip(np.diff([0, *marks[:-1], budget]).tolist(), weights, strict=True)]

    def take(self, free: list[int], priority: list[float], share: list[int], budget: int, ratio: float) -> set[int]:
        order, taken = sorted(free, key=lambda p: -priority[p]), set()
        for sequence in range(self.sequences):
            before = 0
            for p in (p for p in order if self.sequence[p] == sequence):
                if np.float32(ratio) * np.float32(self.size[p]) < np.float32(share[sequence] - before):
                    taken.add(p)
                before += self.size[p]
        for p in reversed(order):
            if self.tokens(taken) <= budget:
                break
            taken -= {p}
        for p in order:
            if p not in taken and self.size[p] <= budget - self.tokens(taken):
                taken.add(p)
        return taken

    def choose(self, score: torch.Tensor | None, budget: int, temperature: float, random_share: float) -> list[int]:
        pieces, explored = [p for p in range(self.count) if self.free[p]], round(random_share * budget)
        noise = priority = gumbel(self.rng.uniform(self.count)).tolist()
        share = self.split([self.tokens(pieces, s) for s in range(self.sequences)], budget)
        if score is None or budget in (explored, self.available):
            taken = self.take(pieces, noise, share, budget, budget / self.available)
        else:
            mean = score.tolist()
            priority = [m + temperature * n for m, n in zip(mean, noise, strict=True)]
            if not temperature:
                ranks = sorted(range(self.count), key=lambda p: (mean[p], noise[p]))
                priority = [float(ranks.index(p)) for p in range(self.count)]
            some = self.split(share, explored) if explored else [0] * self.sequences
            rest = [n - m for n, m in zip(share, some, strict=True)]
            taken = self.take(pieces, priority, rest, budget - explored, (budget - explored) / self.available)
            if explored:
                priority = gumbel(self.rng.uniform(self.count)).tolist()
                others = [p for p in pieces if p not in taken]
                some = [min(n, self.tokens(others, s)) for s, n in enumerate(some)]
                missing = budget - self.tokens(taken)
                taken |= self.take(others, priority, some, missing, missing / self.available)
        rows = [row for row, number in enumerate(self.piece) if number in taken]
        if len(rows) < budget:
            best = max((p for p in pieces if p not in taken), key=lambda p: priority[p])
            rows += [row for row, number in enumerate(self.piece) if number == best][: budget - len(rows)]
        return sorted(rows)


def text(seed: int) -> PackedBatch:
    """A pack with unknown tokens inside of words; every third with very long words."""
    batch = pack([70, 3, 33, 5, 48], padding=seed % 2 * 6, number=seed, seed=seed)
    draws = torch.Generator().manual_seed(seed)
    unknown = torch.rand(batch.layout.rows, generator=draws) < 0.1
    starts = batch.starts_word & (torch.rand(batch.layout.rows, generator=draws) < (0.15 if seed % 3 == 0 else 1.0))
    return dataclasses.replace(batch, maskable=batch.maskable & ~unknown, starts_word=starts)


@pytest.mark.parametrize("random_share", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("temperature", [None, 0.0, 0.5])
@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_targets_are_those_of_a_loop(unit, temperature, random_share):
    for seed in range(6):
        batch = text(seed)
        score = torch.randn(batch.layout.rows, generator=torch.Generator().manual_seed(seed))
        if unit == "token" and seed == 1:
            score = score.round()  # many are equal
        one, other = PackRng(3, seed), PackRng(3, seed)
        pieces = pieces_of_unit(unit, batch, one)
        loop = Loop(batch, pieces_of_unit(unit, batch, other).piece.tolist(), other)
        assert (pieces.size.tolist(), pieces.sequence.tolist()) == (loop.size, loop.sequence)
        assert (pieces.maskable.tolist(), pieces.largest) == (loop.free, max(loop.size))
        budget = (7, 30, 60, 110, loop.available - 1, loop.available)[seed]
        given = None if temperature is None else pieces.mean_of_tokens(score)
        chosen = choose_pieces(
            given, pieces, budget, batch, one, temperature=temperature or 0.0, random_share=random_share
        )
        assert chosen.rows.tolist() == loop.choose(given, budget, temperature or 0.0, random_share)
        assert torch.equal(one.uniform(3), other.uniform(3))  # as many numbers were drawn


def test_the_replaced_tokens_are_those_of_a_loop():
    batch, targets, mix = text(2), torch.tensor([2, 5, 9, 11, 20, 21, 40, 44]), Corruption(0.5, 0.25, 0.25)
    plan, rng = corrupt_targets(batch, targets, mix, IDS, PackRng(0, 0)), PackRng(0, 0)
    shuffled = [int(targets[place]) for place in rng.order(8)]
    ordinary = [token for token in range(IDS.size) if token not in IDS.special]
    expected = batch.tokens.tolist()
    for row in shuffled[:4]:
        expected[row] = IDS.mask
    for row, index in zip(shuffled[4:6], rng.integers(len(ordinary), 2).tolist(), strict=True):
        expected[row] = ordinary[index]
    assert plan.inputs.tolist() == expected
    assert plan.hidden.tolist() == sorted(shuffled[:4])
    assert plan.visible.tolist() == [row for row in range(batch.layout.rows) if row not in shuffled[:4]]


def test_the_first_pieces_that_fit_are_those_of_a_loop():
    draws = np.random.default_rng(0)
    for largest in (1, 2, 3, 7, 16, 100):
        for left in (0, 1, 5, 30, 400, 10_000):
            size = draws.integers(0, largest + 1, 60)
            rest, expected = left, []
            for each in size.tolist():
                expected.append(0 < each <= rest)
                rest -= each if expected[-1] else 0
            for fit in (first_fit, first_fit_in_rounds):
                assert fit(torch.from_numpy(size), torch.tensor(left), largest).tolist() == expected


def test_a_radix_sort_orders_floats_as_torch_does():
    values = torch.randn(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values[::3] = values[::3].round()  # many are equal, some of them 0.0 or -0.0
    values[::50], values[7], values[8] = -torch.inf, torch.inf, 5e-324
    order = torch.from_numpy(radix_argsort(values.numpy()))
    assert torch.equal(order, values.argsort(descending=True, stable=True))
