"""A run in two phases reads the packs of short sequences, then those of long ones, by number alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamask.batch import PackedBatch
from megamask.config.checks import config_problems
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import PacksConfig
from megamask.data.length_phases import PhasedPacks
from megamask.data.mixed_sources import MixedPacks
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.training.run_text import training_packs

CONFIG = PretrainConfig(
    packs=PacksConfig(tokens=128, length=48, start_length=16, start_steps=3, per_step=4, masks_per_text=2), seed=3
)


@pytest.fixture
def shards(make_shards) -> Shards:
    return Shards.open(make_shards([60, 14, 30, 9] * 20))


def plain(shards: Shards, length: int, seed: int = CONFIG.seed, **more: int) -> Packs:
    targets = CONFIG.masking.most_targets(CONFIG.packs.tokens, CONFIG.steps)
    return Packs(shards, tokens=128, length=length, seed=seed, targets=targets, **more)


def same_text(batch: PackedBatch, expected: PackedBatch) -> bool:
    return torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.layout.positions, expected.layout.positions)


def test_the_first_steps_have_short_sequences(shards: Shards) -> None:
    packs = training_packs(CONFIG, {"text": shards})
    step = {"per_step": 4, "views": 2}
    short, long = plain(shards, 16, **step), plain(shards, 48, **step)
    assert isinstance(packs, PhasedPacks)
    for number in range(40):
        batch = packs.batch(number)
        expected = short.batch(number) if number < 12 else long.batch(number - 12)
        assert same_text(batch, expected)
        assert batch.layout.max_seqlen <= (16 if number < 12 else 48)
        assert batch.number == number
    assert len({tuple(packs.batch(number).layout.cu_seqlens.shape) for number in range(40)}) == 1


def test_no_text_number_occurs_in_both_phases(shards: Shards) -> None:
    packs = training_packs(CONFIG, {"text": shards})
    texts = [packs.batch(number).source_pack for number in range(40)]
    assert texts == [packs.text_of(number) for number in range(40)]
    assert sorted(set(texts)) == list(range(20))
    assert all(texts.count(text) == 2 for text in texts)


def test_epochs_count_both_phases(shards: Shards) -> None:
    packs = training_packs(CONFIG, {"text": shards})
    short, long = plain(shards, 16), plain(shards, 48)
    assert packs.epochs(8) == 4 / len(short)
    assert packs.epochs(40) == pytest.approx(6 / len(short) + 14 / len(long))


def test_every_source_of_a_mixture_changes_at_the_same_step(make_shards) -> None:
    sources = {
        name: Shards.open(make_shards(lengths, name=name))
        for name, lengths in {"wiki": [60, 14] * 30, "books": [30, 9] * 15}.items()
    }
    config = replace(CONFIG, packs=replace(CONFIG.packs, masks_per_text=1))
    packs = training_packs(config, sources)
    assert isinstance(packs, MixedPacks)
    seen = {name: 0 for name in sources}
    in_phase = [{name: 0 for name in sources} for _ in range(2)]
    names = list(sources)
    for number in range(40):
        phase, (source, _) = int(number >= 12), packs.order[number]
        name = names[source]
        expected = plain(sources[name], (16, 48)[phase], config.seed + (source << 63)).batch(in_phase[phase][name])
        assert same_text(packs.batch(number), expected)
        seen[name] += 1
        in_phase[phase][name] += 1
    assert all(seen.values())


def problems_of(config: PretrainConfig) -> str:
    return " ".join(config_problems(config))


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    longer = replace(CONFIG, packs=replace(CONFIG.packs, start_length=48))
    assert "`packs.start_length` must be below `packs.length` (48), but is 48." in problems_of(longer)
    alone = replace(CONFIG, packs=replace(CONFIG.packs, start_length=None))
    assert "`packs.start_steps`" in problems_of(alone)
    endless = replace(CONFIG, packs=replace(CONFIG.packs, start_steps=None))
    assert "`packs.start_length` needs `packs.start_steps`" in problems_of(endless)
    stored = replace(CONFIG, distill=replace(CONFIG.distill, stored=tmp_path))
    assert "`packs.start_length` has no packs for `distill.stored`" in problems_of(stored)
