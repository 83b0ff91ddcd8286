"""A run in phases reads packs of the length of each phase, by number alone, and reads on in a length it had before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamask.batch import PackedBatch
from megamask.config.phases import most_phase_targets, run_phases
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import MixtureConfig, PacksConfig, PhaseConfig
from megamask.data.length_phases import PhasedPacks
from megamask.data.mixed_sources import MixedPacks
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.training.run_text import training_packs
from megamask.training.summary import mixture_lines

CONFIG = PretrainConfig(
    steps=20,
    seed=3,
    packs=PacksConfig(tokens=128, length=48, per_step=4, masks_per_text=2),
    phases=(
        PhaseConfig(until=0.15, length=16),
        PhaseConfig(steps=2, per_step=8),
        PhaseConfig(steps=3, length=16, mask_ratio=0.5),
        PhaseConfig(steps=1, per_step=2),
    ),
)
"""3 steps of 4 short packs, 2 of 8 long, 3 of 4 short, 1 of 2 long, then 4 long in each."""
STEPS = [(16, 4)] * 3 + [(48, 8)] * 2 + [(16, 4)] * 3 + [(48, 2)] + [(48, 4)] * 11
"""The length of sequences and the packs of each step."""


@pytest.fixture
def shards(make_shards) -> Shards:
    return Shards.open(make_shards([60, 14, 30, 9] * 20))


def plain(shards: Shards, length: int, seed: int = CONFIG.seed, **more: int) -> Packs:
    return Packs(shards, tokens=128, length=length, seed=seed, targets=most_phase_targets(CONFIG), **more)


def same_text(batch: PackedBatch, expected: PackedBatch) -> bool:
    return torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.layout.positions, expected.layout.positions)


def test_each_step_reads_on_where_the_last_one_of_its_length_ended(shards: Shards) -> None:
    packs = training_packs(CONFIG, {"text": shards})
    assert isinstance(packs, PhasedPacks)
    alone, read, number, texts = {length: plain(shards, length) for length in (16, 48)}, {16: 0, 48: 0}, 0, 0
    for length, per_step in STEPS:
        for place in range(per_step):
            batch, text = packs.batch(number), place % (per_step // 2)
            assert same_text(batch, alone[length].batch(read[length] + text))
            assert (batch.number, batch.source_pack) == (number, texts + text)
            assert batch.layout.max_seqlen == length and len(batch.layout.cu_seqlens) == packs.entries
            number += 1
        read[length] += per_step // 2
        texts += per_step // 2
        assert packs.epochs(number) == pytest.approx(sum(count / len(alone[n]) for n, count in read.items()))


def test_the_first_phase_is_a_run_without_phases(shards: Shards) -> None:
    short = replace(CONFIG, phases=(), packs=replace(CONFIG.packs, length=16))
    phased, first = (training_packs(config, {"text": shards}) for config in (CONFIG, short))
    assert all(same_text(phased.batch(number), first.batch(number)) for number in range(12))
    assert not all(same_text(phased.batch(number), first.batch(number)) for number in range(12, 16))


def test_phases_of_one_length_read_what_a_run_without_phases_reads(shards: Shards) -> None:
    sizes = PacksConfig(tokens=128, length=48, per_step=4)
    phases = (PhaseConfig(steps=2, per_step=8), PhaseConfig(steps=5, per_step=2, mask_ratio=0.2))
    phased = replace(CONFIG, packs=sizes, phases=phases)
    one, other = (training_packs(config, {"text": shards}) for config in (phased, replace(phased, phases=())))
    assert all(same_text(one.batch(number), other.batch(number)) for number in range(80))


def test_every_source_of_a_mixture_has_the_phase_and_its_shares(make_shards) -> None:
    sources = {
        name: Shards.open(make_shards(lengths, name=name))
        for name, lengths in {"wiki": [60, 14] * 30, "books": [30, 9] * 15}.items()
    }
    phases = (
        PhaseConfig(until=0.15, length=16, shares=(0.0, 1.0)),
        PhaseConfig(steps=2, per_step=8, alpha=0.0),
        PhaseConfig(steps=3, length=16, shares=(3.0, 1.0)),
        PhaseConfig(steps=1, per_step=2),
    )
    config = replace(CONFIG, packs=replace(CONFIG.packs, masks_per_text=1), phases=phases)
    packs = training_packs(config, sources)
    assert isinstance(packs, MixedPacks)
    names, number = list(sources), 0
    alone = {
        (place, length): plain(shards, length, config.seed + (place << 63))
        for place, shards in enumerate(sources.values())
        for length in (16, 48)
    }
    read = dict.fromkeys(alone, 0)
    by_phase: list[list[int]] = []
    for step, (length, per_step) in enumerate(STEPS):
        counts = [0, 0]
        for _ in range(per_step):
            source = packs.source_of(number)
            assert same_text(packs.batch(number), alone[source, length].batch(read[source, length]))
            read[source, length] += 1
            counts[source] += 1
            number += 1
        by_phase = [*by_phase, [0, 0]] if step in (0, 3, 5, 8, 9) else by_phase
        by_phase[-1] = [a + b for a, b in zip(by_phase[-1], counts, strict=True)]
    assert by_phase[0] == [0, 12] and by_phase[1] == [8, 8] and by_phase[2] == [9, 3]
    total = [sum(each) for each in zip(*by_phase, strict=True)]
    assert list(packs.shares.values()) == pytest.approx([count / number for count in total])
    epochs = packs.source_epochs(number)
    for place, name in enumerate(names):
        parts = [read[place, length] / len(alone[place, length]) for length in (16, 48)]
        assert epochs[name] == pytest.approx(sum(parts))


def test_shares_below_a_pack_in_a_block_are_said(make_shards) -> None:
    sources = {name: Shards.open(make_shards([60, 14] * 30, name=name)) for name in ("wiki", "books")}
    packs = replace(CONFIG.packs, masks_per_text=1)
    plain = replace(CONFIG, packs=packs, phases=(), mixture=MixtureConfig(shares=(1.0, 0.0004)))
    mixed = training_packs(plain, sources)
    assert isinstance(mixed, MixedPacks)
    line = "  the source books (0.0004): a share below 0.001 counts as 0.001, a pack in 1,000"
    assert line in mixture_lines(plain, mixed)
    enough = replace(plain, mixture=MixtureConfig(shares=(1.0, 0.002)))
    assert not any("counts as" in each for each in mixture_lines(enough, mixed))
    phased = replace(enough, phases=(PhaseConfig(steps=3, shares=(1.0, 0.0004)),))
    assert line in mixture_lines(phased, training_packs(phased, sources))  # type: ignore[arg-type]


def test_a_number_belongs_to_one_step_and_one_phase() -> None:
    phases, number = run_phases(CONFIG), 0
    for step, (length, per_step) in enumerate(STEPS):
        assert phases.packs_before(step) == number
        assert phases.at_step(step) is phases.at_pack(number) is phases.at_pack(number + per_step - 1)
        assert (phases.at_step(step).length, phases.at_step(step).per_step) == (length, per_step)
        number += per_step
    far = 10**15  # no table grows with the number
    assert phases.packs_before(far) == number + (far - len(STEPS)) * 4
    assert phases.at_pack(phases.packs_before(far)).length == 48
