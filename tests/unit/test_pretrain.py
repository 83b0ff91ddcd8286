"""The joints of the story: whose packs are whose, the seeds of dropout, and when to stop."""

from __future__ import annotations

import itertools
import os
import signal
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask import ranks
from megamask.building import numbers
from megamask.config import PacksConfig, PretrainConfig
from megamask.spikes import Ledger
from megamask.stopping import Stop
from megamask.training import seed_of

ledgers = st.one_of(st.just(Ledger()), st.just(Ledger(((2, 3), (4, 9)))))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(1, 6), ledgers)
def test_the_packs_of_all_ranks_are_all_packs_in_order_but_for_those_left_out(
    world: int, accumulate: int, start: int, more: int, ledger: Ledger
) -> None:
    per_step, steps = world * accumulate, start + more
    config = replace(PretrainConfig(), steps=steps, packs=PacksConfig(256, 64, per_step))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "world", lambda: world)
        each = []
        for rank in range(world):
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            each.append(list(numbers(config, start, accumulate, ledger)))
    # micro-step by micro-step, rank by rank
    found = list(itertools.chain(*zip(*each, strict=True)))
    first = [(step + ledger.shift(step)) * per_step for step in range(start, steps)]
    assert found == [number for begin in first for number in range(begin, begin + per_step)]
    assert found == sorted(set(found)) and (ledger.entries or found == list(range(start * per_step, steps * per_step)))


def test_dropout_has_a_seed_of_its_own_for_each_pack_of_each_run() -> None:
    seeds = [seed_of(seed, number) for seed in range(100) for number in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in (*seeds, seed_of(2**63 - 1, 10**12)))


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_inside_and_means_what_it_meant_outside(name: signal.Signals) -> None:
    before = signal.getsignal(name)
    with Stop() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), name)
        assert stop.agreed()
        assert stop.agreed()
    assert signal.getsignal(name) == before
    with Stop() as again:
        assert not again.agreed()
