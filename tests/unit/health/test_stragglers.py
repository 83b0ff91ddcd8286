"""A rank that is slower than the others is named, and noise is not."""

from __future__ import annotations

import random

import pytest
import torch

from megamask.engine.stopwatch import Stopwatch
from megamask.health.stragglers import PATIENCE, StragglerDetector
from megamask.metrics.meters import Meters, Window


def lines(worlds: int, factors: dict[int, float], windows: int, steps: int = 1, seed: int = 0) -> list[list[str]]:
    """The lines after each window of ``steps`` steps that take 1 s, plus or minus a tenth, on each rank."""
    rng = random.Random(seed)
    pace = StragglerDetector([f"node{rank // 2}" for rank in range(worlds)])
    noisy = [
        [factors.get(rank, 1.0) * sum(rng.gauss(1, 0.1) for _ in range(steps)) for rank in range(worlds)]
        for _ in range(windows)
    ]
    return [pace(seconds) for seconds in noisy]


@pytest.mark.parametrize("world", [2, 3, 8, 64])
def test_a_rank_that_takes_half_longer_is_named_within_fifty_steps(world: int):
    for seed in range(20):
        slow = seed % world
        reports = lines(world, {slow: 1.5}, windows=5, steps=10, seed=seed)
        (line,) = [line for window in reports for line in window]
        assert line.startswith(f"Rank {slow} on node{slow // 2} is slow")


@pytest.mark.parametrize("steps", [10, 1])
def test_noise_of_a_tenth_names_no_rank(steps: int):
    for seed in range(5):
        reports = lines(8, {}, windows=1000 // steps, steps=steps, seed=seed)
        assert not any(reports)


def test_a_pause_is_ignored_and_a_recovered_rank_is_named_again():
    pace = StragglerDetector(["a", "b", "c"])
    even, slow = (1.0, 1.0, 1.0), (1.0, 9.0, 1.0)
    named = [bool(pace(seconds)) for seconds in [*[slow] * (PATIENCE - 1), even, *[slow] * 5, even, *[slow] * PATIENCE]]
    assert [at for at, is_named in enumerate(named) if is_named] == [2 * PATIENCE - 1, len(named) - 1]


def test_half_of_the_ranks_may_be_slow_but_not_a_single_one():
    reports = lines(4, {0: 2.0, 3: 2.0}, windows=PATIENCE, steps=10)[-1]
    assert [line.split()[1] for line in reports] == ["0", "3"]
    assert not any(lines(1, {0: 9.0}, windows=9))


def test_all_ranks_know_the_own_work_of_each(monkeypatch):
    """Three ranks, one after the other: what each adds to the sum is its own place in the list."""

    class Loader:
        waited = 0.0

    class Engine:
        def forward_seconds(self) -> float:
            return 2.0

    monkeypatch.setattr("megamask.runtime.ranks.world", lambda: 3)
    own: list[torch.Tensor] = []
    for rank in range(3):
        monkeypatch.setattr("megamask.runtime.ranks.rank", lambda rank=rank: rank)
        loader = Loader()
        meters = Meters(loader, Engine())
        loader.waited = float(rank)
        meters.step(1.0)
        monkeypatch.setattr("megamask.runtime.ranks.sum", lambda values: (own.append(values), values)[1])
        window = meters.take()
        assert window.busy_seconds == tuple(2.0 + rank if other == rank else 0.0 for other in range(3))
    whole = Meters()
    whole.step(1.0)
    monkeypatch.setattr("megamask.runtime.ranks.sum", lambda values: torch.stack(own).sum(0))
    window: Window = whole.take()
    assert window.busy_seconds == (2.0, 3.0, 4.0)
    assert window.metrics(1e-3)["slowest_rank"] == 4 / 3


def test_a_stopwatch_only_counts_time_inside_of_its_blocks(monkeypatch):
    now = iter([1.0, 3.0, 10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            pass
    assert watch.take() == 6.0
    with watch:
        pass
    assert (watch.take(), watch.take()) == (1.0, 0)
