"""Which packs a rank trains on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.pretrain_config import PacksConfig, PretrainConfig
from megamask.health.loss_spikes import SkippedPacks
from megamask.runtime import ranks
from megamask.training.setup import pack_numbers

skipped_packs_of_runs = st.one_of(st.just(SkippedPacks()), st.just(SkippedPacks(((2, 3), (4, 9)))))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(1, 6), skipped_packs_of_runs)
def test_all_ranks_together_read_all_packs_in_order_except_skipped_ones(
    world: int, accumulate: int, start: int, more: int, skipped_packs: SkippedPacks
) -> None:
    per_step, steps = world * accumulate, start + more
    config = replace(PretrainConfig(), steps=steps, packs=PacksConfig(256, 64, per_step))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "world", lambda: world)
        each = []
        for rank in range(world):
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            each.append(list(pack_numbers(config, start, skipped_packs)))
    # micro-step by micro-step, rank by rank
    numbers = list(itertools.chain(*zip(*each, strict=True)))
    first = [(step + skipped_packs.shift(step)) * per_step for step in range(start, steps)]
    assert numbers == [number for begin in first for number in range(begin, begin + per_step)]
    assert numbers == sorted(set(numbers)) and (
        skipped_packs.entries or numbers == list(range(start * per_step, steps * per_step))
    )
