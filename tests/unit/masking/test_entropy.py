"""What each strategy takes, said without its formulas: the top, the middle, in proportion, at wrong places."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamask.batch import Losses, MaskPlan
from megamask.errors import ConfigError, DataError, NonFiniteError
from megamask.errors.setting_rules import settings_problems
from megamask.masking.choose_within_budget import choose_pieces
from megamask.masking.entropy import EntropyScore, EntropyScoreConfig, shuffled
from megamask.masking.masker import STEPS, Masker, MaskingConfig
from megamask.masking.piece_order import PieceTable
from megamask.masking.rng import PackRng
from megamask.masking.score import Score
from megamask.masking.units import pieces_of_unit
from megamask.runtime import ranks
from megamask.schedules import Schedule
from tests.batches import IDS, pack

UNITS = ["token", "word", "span"]
STRATEGIES = ["high", "low", "middle", "both", "proportional"]
LENGTHS = [40, 3, 25, 64, 7, 12]


def doubts(batch, seed=0):
    """Made-up entropies, all different."""
    draws = torch.Generator().manual_seed(seed)
    return 8 * torch.rand(batch.layout.rows, generator=draws) ** 2


def score(batch, entropy, pieces=None, **settings):
    pieces = PieceTable.of_tokens(batch) if pieces is None else pieces
    return EntropyScore(EntropyScoreConfig(**settings))(batch, entropy, pieces, PackRng(0, batch.number))


def masker(unit="token", ratio=0.2, random_share=0.0, **settings):
    config = MaskingConfig(
        Schedule(start=ratio),
        unit,
        "entropy",
        entropy=EntropyScoreConfig(**settings),
        random_share=Schedule(start=random_share),
    )
    assert settings_problems(config, "masking") == []
    return Masker(config, IDS)


def plan_of(maker, batch, entropy=None, progress=0.0) -> MaskPlan:
    return maker(batch, progress=progress, rng=PackRng(1, batch.number), entropy=entropy)


def maskable_of(batch):
    """The maskable rows of each sequence that has any."""
    inside = batch.layout.sequence[:, None] == torch.arange(len(batch.layout.lengths))
    rows = [(inside[:, n] & batch.maskable).nonzero().squeeze(1) for n in range(inside.shape[1])]
    return [some for some in rows if len(some)]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 60), min_size=1, max_size=10),
    unit=st.sampled_from(UNITS),
    strategy=st.sampled_from(STRATEGIES),
    temperature=st.sampled_from([0.0, 0.01, 0.5, 3.0]),
    random_share=st.sampled_from([0.0, 0.1, 0.5, 0.97, 1.0]),
    cap=st.sampled_from([0.0, 0.02, 0.6, 0.99]),
    shuffle=st.sampled_from(["no", "pack", "type"]),
    share=st.floats(0.01, 1.0),
    scale=st.sampled_from([0.0, 1.0, -1.0]),
    seed=st.integers(0, 2**31),
)
def test_the_budget_is_exact_whatever_decides(
    lengths, unit, strategy, temperature, random_share, cap, shuffle, share, scale, seed
):
    batch = pack(lengths, padding=3, seed=seed)
    rng = PackRng(seed, 0)
    pieces = pieces_of_unit(unit, batch, rng)
    entropy = EntropyScore(
        EntropyScoreConfig(strategy, temperature or (strategy == "proportional"), True, cap, shuffle)
    )
    budget = max(1, int(share * batch.maskable.sum()))
    scores = entropy(batch, scale * doubts(batch), pieces, rng)
    assert scores.isfinite().all()
    rows, probability = choose_pieces(
        scores, pieces, budget, batch, rng, temperature=entropy.temperature, random_share=random_share
    )
    assert len(rows) == budget == len(probability)
    assert (rows.diff() > 0).all()
    assert batch.maskable[rows].all()
    assert ((probability > 0) & (probability <= 1)).all()


@pytest.mark.parametrize("unit", ["token", "word"])
@pytest.mark.parametrize("strategy", ["high", "low"])
def test_at_temperature_zero_exactly_the_top_or_bottom_of_each_sequence_is_taken(unit, strategy):
    batch = pack(LENGTHS)
    entropy = doubts(batch)
    plan = plan_of(masker(unit, strategy=strategy, temperature=0), batch, entropy)
    piece = pieces_of_unit(unit, batch, PackRng(1, 0)).piece
    for rows in maskable_of(batch):
        numbers, counts = piece[rows].unique(return_counts=True)
        means = torch.stack([entropy[piece == number].mean() for number in numbers])
        hits = torch.stack([torch.isin(rows[piece[rows] == number], plan.targets).sum() for number in numbers])
        order = means.argsort(descending=strategy == "high")
        whole = hits[order] == counts[order]
        if unit == "token":  # of words, one more may be taken from below the edge to make the sum exact
            assert whole.tolist() == sorted(whole.tolist(), reverse=True)
        else:
            edge = int(whole.sum())
            assert whole[: max(0, edge - 1)].all()


def test_low_is_high_of_the_negated():
    batch = pack(LENGTHS)
    entropy = doubts(batch)
    low, high = masker("word", strategy="low"), masker("word", strategy="high")
    assert torch.equal(plan_of(low, batch, entropy).targets, plan_of(high, batch, -entropy).targets)


def test_middle_and_both_take_the_nearest_to_and_farthest_from_the_middle_rank():
    batch = pack([42])
    (rows,) = maskable_of(batch)
    entropy = doubts(batch).exp()  # far from even: ranks decide, not distances
    inside = rows[entropy[rows].argsort()].tolist()
    assert len(inside) == 40
    for strategy, expected in (("middle", inside[15:25]), ("both", inside[:5] + inside[-5:])):
        chosen = choose_pieces(
            score(batch, entropy, strategy=strategy),
            PieceTable.of_tokens(batch),
            10,
            batch,
            PackRng(0, 0),
            temperature=0,
        )
        assert chosen.rows.tolist() == sorted(expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_piece_has_the_score_of_the_mean_of_its_rows(strategy):
    batch = pack(LENGTHS)
    pieces = pieces_of_unit("word", batch, PackRng(0, 0))
    piece = pieces.piece
    entropy = doubts(batch)
    means = entropy.clone().double()
    for number in piece.unique():
        means[piece == number] = entropy[piece == number].double().mean()
    scores = score(batch, entropy, pieces, strategy=strategy)
    again = score(batch, means, pieces, strategy=strategy)
    torch.testing.assert_close(scores, again)
    assert len(scores) == len(piece.unique())


@pytest.mark.parametrize("strategy", STRATEGIES[:4])
def test_how_hard_a_document_is_does_not_matter_once_standardised(strategy):
    batch = pack(LENGTHS)
    entropy = doubts(batch).double()
    home = batch.layout.sequence.double()
    moved = entropy * (1 + home) + 5 * home
    torch.testing.assert_close(
        score(batch, entropy, strategy=strategy)[batch.maskable], score(batch, moved, strategy=strategy)[batch.maskable]
    )


def test_proportions_do_not_matter_by_how_much_all_are_larger():
    batch = pack(LENGTHS)
    entropy = doubts(batch).double() + 1
    one, other = (score(batch, entropy * by, strategy="proportional") for by in (1, 3))
    apart = (one - other)[batch.maskable]
    torch.testing.assert_close(apart, apart[:1].expand_as(apart))


def test_scores_have_mean_0_and_spread_1_in_each_sequence():
    batch = pack([40, 25, 64])
    for strategy in ("high", "low"):
        scores = score(batch, doubts(batch), strategy=strategy)
        for rows in maskable_of(batch):
            assert float(scores[rows].mean()) == pytest.approx(0, abs=1e-9)
            assert float(scores[rows].std(unbiased=False)) == pytest.approx(1)
    middle = score(pack([2002]), torch.rand(2002), strategy="middle")
    assert float(middle[1:-1].std()) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [0.0, 3.3, -2.7])
def test_a_flat_sequence_is_masked_at_random(strategy, value):
    batch = pack([34, 50, 22])
    flat = torch.full((batch.layout.rows,), value)
    scores = score(batch, flat, strategy=strategy, skip_top=0.1)
    assert scores.isfinite().all()
    for rows in maskable_of(batch):
        assert len(scores[rows].unique()) == 1
    # equals are taken in random order even at temperature 0, not from the front
    draws, hits = 300, torch.zeros(batch.layout.rows)
    for number in range(draws):
        one = dataclasses.replace(batch, number=number)
        hits[choose_pieces(scores, PieceTable.of_tokens(batch), 20, one, PackRng(0, number), temperature=0).rows] += 1
    rates = hits[batch.maskable] / draws
    mean = float(rates.mean())
    assert (rates - mean).abs().max() < 5 * (mean * (1 - mean) / draws) ** 0.5


@pytest.mark.parametrize(("temperature", "lowest"), [(1.0, 0.0), (0.5, -4.0)])
def test_proportional_draws_in_proportion_to_the_power_of_entropy(temperature, lowest):
    batch = pack([10])
    entropy = torch.tensor([9.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.5, 0.25, 2.0, 9.0]) + lowest  # the ends are special
    scores = score(batch, entropy, strategy="proportional", temperature=temperature)
    draws, hits = 1200, torch.zeros(10)
    for number in range(draws):
        one = dataclasses.replace(batch, number=number)
        hits[
            choose_pieces(scores, PieceTable.of_tokens(batch), 1, one, PackRng(0, number), temperature=temperature).rows
        ] += 1
    weights = (entropy[1:-1] - lowest) ** (1 / temperature)
    expected = weights / weights.sum()
    assert ((hits[1:-1] / draws - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


def test_the_capped_are_left_to_the_last_and_taken_then():
    batch = pack([52])
    entropy = doubts(batch)
    (rows,) = maskable_of(batch)
    top = rows[entropy[rows].argsort(descending=True)]
    scores = score(batch, entropy, skip_top=0.1)
    for budget in (10, 45, 47, 50):
        taken = choose_pieces(scores, PieceTable.of_tokens(batch), budget, batch, PackRng(0, 0), temperature=0.5).rows
        assert int(torch.isin(top[:5], taken).sum()) == max(0, budget - 45)
    taken = choose_pieces(scores, PieceTable.of_tokens(batch), 10, batch, PackRng(0, 0), temperature=0).rows
    assert taken.tolist() == top[5:15].sort().values.tolist()


def test_shuffled_entropies_are_the_same_numbers_at_other_places():
    batch = pack(LENGTHS * 4, padding=5)
    entropy = doubts(batch)
    for by_type in (False, True):
        moved = shuffled(entropy, batch, PackRng(0, 0), by_type=by_type)
        assert torch.equal(moved[batch.maskable].sort().values, entropy[batch.maskable].sort().values)
        assert not torch.equal(moved, entropy)
        assert torch.equal(moved, shuffled(entropy, batch, PackRng(0, 0), by_type=by_type))
        assert not torch.equal(moved, shuffled(entropy, batch, PackRng(0, 1), by_type=by_type))
    for token in batch.tokens[batch.maskable].unique():
        same = batch.tokens == token
        assert torch.equal(moved[same].sort().values, entropy[same].sort().values)


def test_shuffling_over_the_pack_reaches_every_place_alike():
    batch = pack([12])
    entropy = torch.arange(12.0)
    sums = torch.zeros(12)
    draws = 2000
    for number in range(draws):
        sums += shuffled(entropy, batch, PackRng(0, number), by_type=False)
    # the mean of the numbers 1 to 10, whose variance is 99 / 12
    assert ((sums[1:-1] / draws - 5.5).abs() < 5 * (99 / 12 / draws) ** 0.5).all()


# ---- the masker


@pytest.mark.parametrize("unit", UNITS)
def test_a_random_share_of_one_is_bitwise_uniform_masking(unit):
    batch = pack(LENGTHS)
    plain = plan_of(Masker(MaskingConfig(Schedule(start=0.2), unit), IDS), batch)
    for entropy in (None, doubts(batch), doubts(batch, seed=1)):
        plan = plan_of(masker(unit, random_share=1.0, shuffle="pack"), batch, entropy)
        assert torch.equal(plan.inputs, plain.inputs)
        assert torch.equal(plan.targets, plain.targets)
        assert torch.equal(plan.probability, plain.probability)


def test_what_is_explored_does_not_depend_on_entropy_and_the_rest_does():
    batch = pack([202, 102])
    entropy = doubts(batch)
    some = masker(random_share=0.5, temperature=0)
    explored, top = torch.zeros(304), torch.zeros(304)
    by_score = plan_of(masker(ratio=0.1, temperature=0), batch, entropy).targets
    draws = 400
    for number in range(draws):
        plan = plan_of(some, dataclasses.replace(batch, number=number), entropy)
        explored[plan.targets] += 1
    rest = batch.maskable.clone()
    edge = [rows[entropy[rows].argsort(descending=True)][: len(rows) // 8] for rows in maskable_of(batch)]
    rest[torch.cat(edge)] = False
    top[by_score] = 1
    assert (explored[top.bool() & ~rest] == draws).all()
    rates = explored[rest] / draws
    mean = float(rates.mean())
    assert (rates - mean).abs().max() < 5 * (mean * (1 - mean) / draws) ** 0.5


def test_a_plan_with_entropy_is_a_function_of_its_arguments():
    batch = pack(LENGTHS)
    entropy = doubts(batch)
    maker = masker("span", shuffle="type", random_share=0.3)
    assert torch.equal(plan_of(maker, batch, entropy).inputs, plan_of(maker, batch, entropy).inputs)
    other = dataclasses.replace(batch, number=1)
    assert not torch.equal(plan_of(maker, batch, entropy).inputs, plan_of(maker, other, entropy).inputs)


def test_entropy_is_needed_as_soon_as_the_score_is_used():
    ramp = MaskingConfig(score="entropy", random_share=Schedule("ramp", 1.0, 0.1, at=0.25, until=0.75))
    needs = [Masker(ramp, IDS).needs_entropy(step / STEPS) for step in range(STEPS + 1)]
    assert needs == [step > STEPS // 4 for step in range(STEPS + 1)]
    assert not any(Masker(MaskingConfig(), IDS).needs_entropy(step / STEPS) for step in range(STEPS + 1))


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda entropy: None, ConfigError, "none was given"),
        (lambda entropy: entropy[:-1], DataError, "one number for each token"),
        (lambda entropy: entropy.index_fill(0, torch.tensor([3, 5]), torch.nan), NonFiniteError, "2 of 151 tokens"),
        (lambda entropy: entropy.index_fill(0, torch.tensor([3]), torch.inf), NonFiniteError, "1 of 151 tokens"),
    ],
)
def test_an_entropy_that_does_not_fit_is_refused_where_it_is_needed(spoil, error, words):
    batch = pack(LENGTHS)
    spoilt = spoil(doubts(batch))
    with pytest.raises(error, match=words):
        plan_of(masker(), batch, spoilt)
    plan_of(masker(random_share=1.0), batch, spoilt)
    plan_of(Masker(MaskingConfig(), IDS), batch, spoilt)


class Counting:
    """A score with something to learn: the sum of the losses it was shown, over all ranks."""

    temperature = 0.0

    def __init__(self):
        self.seen = torch.zeros(1)

    def __call__(self, batch, entropy, pieces, rng):
        return batch.tokens.double()

    def update(self, batch, plan, losses):
        self.seen += losses.nll.sum()

    def metrics(self):
        return {}

    def sync(self):
        self.seen = ranks.sum(self.seen)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_a_score_learns_and_its_state_is_restored(monkeypatch):
    batch = pack([42])
    assert isinstance(Counting(), Score)
    assert isinstance(EntropyScore(EntropyScoreConfig()), Score)
    maker = Masker(MaskingConfig(random_share=Schedule(start=0.0)), IDS, Counting())
    plan = plan_of(maker, batch)
    assert plan.labels.min() >= batch.tokens[batch.maskable].sort(descending=True).values[len(plan.targets) - 1]
    ones = torch.ones(len(plan.targets))
    maker.score.update(batch, plan, Losses(ones.sum(), ones, ones, ones.bool()))
    monkeypatch.setattr(ranks, "sum", lambda values: 2 * values)
    maker.score.sync()
    other = Masker(MaskingConfig(), IDS, Counting())
    other.score.load_state_dict(maker.score.state_dict())
    assert other.score.state_dict() == {"seen": torch.tensor([2.0 * len(plan.targets)])}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (MaskingConfig(entropy=EntropyScoreConfig("low")), ["entropy"]),
        (
            MaskingConfig(random_share=Schedule(start=0.0), entropy=EntropyScoreConfig(skip_top=0.1)),
            ["entropy", "random_share"],
        ),
        (MaskingConfig(score="entropy", random_share=Schedule(start=1.5)), ["random_share.start"]),
        (MaskingConfig(score="entropy", entropy=EntropyScoreConfig(temperature=-1.0)), ["entropy.temperature"]),
        (MaskingConfig(score="entropy", entropy=EntropyScoreConfig(temperature=torch.inf)), ["entropy.temperature"]),
        (MaskingConfig(score="entropy", entropy=EntropyScoreConfig("proportional", 0.0)), ["entropy.temperature"]),
        (MaskingConfig(score="entropy", entropy=EntropyScoreConfig(skip_top=1.0)), ["entropy.skip_top"]),
        (
            MaskingConfig(score="entropy", entropy=EntropyScoreConfig("both", standardise=False)),
            ["entropy.standardise"],
        ),
    ],
)
def test_every_problem_is_named(config, names):
    problems = settings_problems(config, "masking")
    assert len(problems) == len(names)
    assert all(f"`masking.{name}`" in sentence for name, sentence in zip(names, problems, strict=True))
    for fine in (MaskingConfig(), MaskingConfig(score="entropy")):
        assert settings_problems(fine, "masking") == []
    for ends in (0.0, 1.0):
        assert settings_problems(MaskingConfig(score="entropy", random_share=Schedule(start=ends)), "masking") == []
