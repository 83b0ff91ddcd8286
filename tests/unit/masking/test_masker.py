"""What masking is, as relations: exact, fair, whole, keyed by the pack, blind to the device and the rank."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamask.errors import DataError
from megamask.masking.choose_within_budget import choose_pieces
from megamask.masking.corrupt import Corruption
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.piece_order import PieceTable
from megamask.masking.rng import PackRng
from megamask.masking.units import pieces_of_unit
from megamask.schedules import Schedule
from tests.batches import IDS, pack

UNITS = ["token", "word", "span"]
LENGTHS = [40, 3, 25, 64, 7, 12]


def masker(unit="token", ratio=0.3, corruption=None) -> Masker:
    return Masker(MaskingConfig(Schedule(start=ratio), unit, corruption=corruption or Corruption()), IDS)


def plan_of(maker, batch, seed=1, progress=0.0):
    return maker(batch, progress=progress, rng=PackRng(seed, batch.number))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 60), min_size=1, max_size=12),
    padding=st.integers(0, 9),
    unit=st.sampled_from(UNITS),
    ratio=st.floats(0.01, 0.5),
    seed=st.integers(0, 2**31),
)
def test_the_budget_is_exact_and_special_tokens_are_never_masked(lengths, padding, unit, ratio, seed):
    batch = pack(lengths, padding=padding, seed=seed)
    maker = masker(unit, ratio)
    budget = maker.budget(0.0, batch.layout.rows)
    if budget > int(batch.maskable.sum()):
        with pytest.raises(DataError, match="can be masked"):
            plan_of(maker, batch, seed)
        return
    plan = plan_of(maker, batch, seed)
    assert len(plan.targets) == budget == len(plan.targets.unique())
    assert batch.maskable[plan.targets].all()
    assert (plan.targets.diff() > 0).all()
    assert torch.equal(plan.labels, batch.tokens[plan.targets])


@pytest.mark.parametrize("unit", UNITS)
def test_hidden_and_visible_rows_part_the_pack_and_untargeted_rows_stay(unit):
    batch = pack(LENGTHS, padding=5)
    plan = plan_of(masker(unit), batch)
    assert torch.equal(torch.cat([plan.hidden, plan.visible]).sort().values, torch.arange(batch.layout.rows))
    assert torch.isin(plan.hidden, plan.targets).all()
    assert (plan.inputs[plan.hidden] == IDS.mask).all()
    others = torch.ones(batch.layout.rows, dtype=torch.bool)
    others[plan.targets] = False
    assert torch.equal(plan.inputs[others], batch.tokens[others])
    assert not (plan.inputs[plan.visible] == IDS.mask).any()


@pytest.mark.parametrize("unit", ["word", "span"])
def test_at_most_one_piece_is_cut(unit):
    for number in range(30):
        batch = pack([50, 31, 64, 20], number=number, seed=number)
        rng = PackRng(0, number)
        pieces = pieces_of_unit(unit, batch, rng)
        chosen = choose_pieces(torch.zeros(len(pieces.size)), pieces, 45, batch, rng).rows
        hits = torch.bincount(pieces.piece[chosen], minlength=len(pieces.size))
        assert int(((hits > 0) & (hits < pieces.size)).sum()) <= 1


def test_words_stay_whole_where_single_token_words_are_left_to_fill_up():
    for number in range(30):
        batch = pack([50, 31, 64, 20], number=number, seed=number)
        rng = PackRng(0, number)
        pieces = pieces_of_unit("word", batch, rng)
        chosen = choose_pieces(torch.zeros(len(pieces.size)), pieces, 30, batch, rng).rows
        hits = torch.bincount(pieces.piece[chosen], minlength=len(pieces.size))
        assert ((hits == 0) | (hits == pieces.size)).all()


def test_pieces_never_join_two_sequences_and_spans_are_whole_words():
    batch = pack(LENGTHS)
    word, span = (pieces_of_unit(unit, batch, PackRng(0, 0)).piece for unit in ("word", "span"))
    for piece in (word, span):
        for number in piece.unique():
            assert len(batch.layout.sequence[piece == number].unique()) == 1
    assert all(len(span[word == number].unique()) == 1 for number in word.unique())
    assert int(span[-1]) < int(word[-1])


def test_at_temperature_zero_the_top_rows_of_each_sequence_are_taken():
    batch = pack([22, 22, 22])
    score = torch.rand(66, generator=torch.Generator().manual_seed(3))
    chosen = choose_pieces(score, PieceTable.of_tokens(batch), 15, batch, PackRng(0, 0), temperature=0.0).rows
    for number in range(3):
        inside = (batch.layout.sequence == number) & batch.maskable
        best = score.masked_fill(~inside, -1).topk(5).indices
        assert set(best.tolist()) == set(chosen[batch.layout.sequence[chosen] == number].tolist())


def test_every_sequence_gets_its_share_to_within_one_row():
    batch = pack(LENGTHS, padding=9)
    counts = torch.bincount(batch.layout.sequence[batch.maskable], minlength=7).double()
    for number in range(50):
        plan = plan_of(masker(), dataclasses.replace(batch, number=number))
        got = torch.bincount(batch.layout.sequence[plan.targets], minlength=7).double()
        assert ((got - counts * len(plan.targets) / counts.sum()).abs() < 1).all()


def test_a_uniform_score_masks_every_row_alike():
    batch = pack([34, 50, 22])
    draws = 1000
    hits = torch.zeros(batch.layout.rows)
    for number in range(draws):
        hits[plan_of(masker(), dataclasses.replace(batch, number=number)).targets] += 1
    rates = hits[batch.maskable] / draws
    mean = float(rates.mean())
    assert (rates - mean).abs().max() < 5 * (mean * (1 - mean) / draws) ** 0.5


@pytest.mark.parametrize("unit", ["word", "span"])
def test_long_pieces_are_masked_as_often_as_short_ones(unit):
    batch = pack([60] * 128)  # a pack of ordinary size: what is set right in the end is a small part of it
    rates = {True: [], False: []}
    for number in range(60):
        rng = PackRng(0, number)
        pieces = pieces_of_unit(unit, batch, rng)
        chosen = torch.zeros(batch.layout.rows)
        chosen[choose_pieces(torch.zeros(len(pieces.size)), pieces, 2304, batch, rng).rows] = 1
        size = pieces.size[pieces.piece]
        long = size > size[batch.maskable].double().median()
        for which in (True, False):
            rates[which].append(float(chosen[batch.maskable & (long == which)].mean()))
    long, short = (torch.tensor(rates[which]) for which in (True, False))
    assert (long - short).mean().abs() < 0.02


def test_a_plan_is_a_function_of_seed_and_pack_number():
    batch = pack(LENGTHS)
    again = plan_of(masker("span"), batch)
    assert torch.equal(plan_of(masker("span"), batch).inputs, again.inputs)
    assert not torch.equal(plan_of(masker("span"), dataclasses.replace(batch, number=1)).inputs, again.inputs)
    assert not torch.equal(plan_of(masker("span"), batch, seed=2).inputs, again.inputs)


@pytest.mark.parametrize("mix", [(1.0, 0.0, 0.0), (0.8, 0.1, 0.1), (0.0, 1.0, 0.0), (0.5, 0.0, 0.5)])
def test_corruption_has_exact_counts_and_draws_no_special_token(mix):
    batch = pack([200, 150, 90])
    plan = plan_of(masker(corruption=Corruption(*mix)), batch)
    masks, randoms = Corruption(*mix).counts(len(plan.targets))
    assert len(plan.hidden) == masks == round(mix[0] * len(plan.targets))
    seen = plan.targets[~torch.isin(plan.targets, plan.hidden)]
    assert int((plan.inputs[seen] != batch.tokens[seen]).sum()) <= randoms
    assert int((plan.inputs[seen] == batch.tokens[seen]).sum()) >= len(seen) - randoms
    assert not torch.isin(plan.inputs[seen], torch.tensor(IDS.special)).any()


def test_random_replacements_are_uniform_over_ordinary_tokens():
    batch = pack([402])
    counts = torch.zeros(IDS.size)
    for number in range(200):
        plan = plan_of(masker(ratio=0.5, corruption=Corruption(0, 1, 0)), dataclasses.replace(batch, number=number))
        counts += torch.bincount(plan.inputs[plan.targets], minlength=IDS.size)
    ordinary = counts[len(IDS.special) :]
    mean = float(ordinary.mean())
    assert counts[: len(IDS.special)].sum() == 0
    assert (ordinary - mean).abs().max() < 5 * mean**0.5


@pytest.mark.parametrize("steps", [1, 5, 127, 128, 1000])
@pytest.mark.parametrize(
    "ratio", [Schedule("linear", 0.2, 0.9), Schedule("ramp", 0.6, 0.1, at=0.2, until=0.5), Schedule(start=0.3)]
)
def test_the_most_targets_are_the_most_of_any_step(ratio, steps):
    config = MaskingConfig(ratio)
    maker = Masker(config, IDS)
    assert config.most_targets(1000, steps) == max(maker.budget(step / steps, 1000) for step in range(steps))
    by_the_clock = max(maker.budget(moment / 10_000, 1000) for moment in range(10_001))
    assert config.most_targets(1000) == by_the_clock >= config.most_targets(1000, steps)


def test_a_moving_ratio_is_exact_at_both_ends_and_has_few_shapes():
    maker = Masker(MaskingConfig(Schedule("linear", 0.3, 0.15)), IDS)
    budgets = [maker.budget(step / 1000, 1000) for step in range(1001)]
    assert (budgets[0], budgets[-1]) == (300, 150)
    assert budgets == sorted(budgets, reverse=True)
    assert len(set(budgets)) <= 65
