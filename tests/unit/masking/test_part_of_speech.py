"""PTW as relations: whole-word masking under equal losses, in proportion to weights else, one state on any ranks."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamask.batch import Losses, PackedBatch
from megamask.errors import CheckpointError, ConfigError, DataError
from megamask.errors.setting_rules import settings_problems
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.part_of_speech import PartOfSpeechScore, PartOfSpeechScoreConfig
from megamask.masking.piece_order import PieceTable
from megamask.masking.rng import PackRng
from megamask.masking.units import Unit, pieces_of_unit
from megamask.runtime import ranks
from megamask.schedules import Schedule
from tests.batches import IDS, pack

NAMES = ("ADJ", "NOUN", "PUNCT", "VERB")
PLAIN = PartOfSpeechScoreConfig()
NEVER = Schedule(start=0.0)


def tagged(lengths: list[int], number: int = 0, *, untagged: bool = False) -> PackedBatch:
    """A pack in which every row has a tag of its own, or some have none."""
    batch = pack(lengths, number=number, seed=number)
    draws = torch.Generator().manual_seed(number)
    tags = torch.randint(0 if untagged else 1, len(NAMES) + 1, (batch.layout.rows,), generator=draws)
    return dataclasses.replace(batch, tags=(tags * batch.maskable).to(torch.uint8))


def masker(ratio: Schedule | float = 0.3, unit: Unit = "word", **settings) -> Masker:
    schedule = Schedule(start=ratio) if isinstance(ratio, float) else ratio
    score_config = PartOfSpeechScoreConfig(**settings)
    config = MaskingConfig(schedule, unit, "part_of_speech", part_of_speech=score_config, random_share=NEVER)
    return Masker(config, IDS, tags=NAMES)


def knowing(maker: Masker, losses: list[float]) -> Masker:
    maker.score.load_state_dict({"losses": torch.tensor(losses).double(), "steps": torch.tensor([1])})
    return maker


def plan_of(maker: Masker, batch: PackedBatch, progress: float = 0.0):
    return maker(batch, progress=progress, rng=PackRng(5, batch.number))


def of_nll(nll: torch.Tensor) -> Losses:
    """Losses of which only the negative log likelihoods matter."""
    return Losses(nll.sum(), nll, torch.zeros_like(nll), torch.zeros_like(nll, dtype=torch.bool))


def weights(losses: list[float], sharpness: float = 2.0) -> list[float]:
    """The formula of the paper's code, in plain Python."""
    mean, spread = statistics.mean(losses), statistics.stdev(losses)
    return [1 / (1 + math.exp(-sharpness * (loss - mean) / (spread or 1e-4))) for loss in losses]


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_before_the_first_update_it_is_bitwise_random_masking(unit):
    batch = tagged([50, 31, 64, 20], untagged=True)
    ours, plain = masker(0.3, unit), Masker(MaskingConfig(Schedule(start=0.3), unit), IDS)
    actual, expected = plan_of(ours, batch), plan_of(plain, batch)
    for field in dataclasses.fields(expected):
        one, other = getattr(actual, field.name), getattr(expected, field.name)
        assert one is other is None or torch.equal(one, other), field.name


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@given(loss=st.floats(0.001, 20), number=st.integers(0, 1000), temperature=st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=20)
def test_equal_losses_are_random_masking_bit_for_bit(unit, loss, number, temperature):
    batch = tagged([50, 31, 64, 20], number, untagged=True)
    ours = knowing(masker(0.3, unit, temperature=temperature), [loss] * 4)
    actual, expected = plan_of(ours, batch), plan_of(Masker(MaskingConfig(Schedule(start=0.3), unit), IDS), batch)
    for name in ("inputs", "targets", "labels", "hidden", "visible"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@given(losses=st.lists(st.floats(0, 10, width=32), min_size=4, max_size=4), sharpness=st.floats(0.5, 4))
def test_weights_are_those_of_the_formula(losses, sharpness):
    score = PartOfSpeechScore(PartOfSpeechScoreConfig(sharpness=sharpness), NAMES)
    score.load_state_dict({"losses": torch.tensor(losses).double(), "steps": torch.tensor([1])})
    assert score.log_weights.exp().tolist() == pytest.approx(weights(losses, sharpness), abs=1e-9)


def test_a_word_is_drawn_in_proportion_to_the_weight_of_its_tag():
    """One token of a pack of single-token words is drawn 4000 times; Hoeffding's bound at 1e-9 for each share."""
    losses, rounds = [1.0, 3.0, 0.5, 2.0], 4000
    batch = tagged([40])
    batch = dataclasses.replace(batch, starts_word=torch.ones_like(batch.starts_word))
    ours = knowing(masker(1 / 40), losses)
    drawn = torch.zeros(5)
    for number in range(rounds):
        again = dataclasses.replace(batch, number=number)
        plan = plan_of(ours, again)
        assert len(plan.targets) == 1
        drawn[again.tags[plan.targets].long()] += 1
    counts = torch.bincount(batch.tags.long(), minlength=5)[1:].double()
    expected = counts * torch.tensor(weights(losses)).double()
    apart = (drawn[1:] / rounds - expected / expected.sum()).abs()
    assert apart.max() < math.sqrt(math.log(2 * len(NAMES) / 1e-9) / (2 * rounds))
    assert (drawn[1:] / counts).argsort().tolist() == torch.tensor(losses).argsort().tolist()


def test_a_temperature_is_an_exponent_of_the_weights():
    batch = tagged([40])
    for temperature in (0.5, 2.0):
        ours = knowing(masker(1 / 40, temperature=temperature), [1.0, 3.0, 0.5, 2.0])
        whole = PackRng(0, 0)
        score = ours.score(batch, None, PieceTable.of_tokens(batch), whole)
        assert ours.score.temperature == temperature
        by_tag = torch.tensor([0.5, *weights([1.0, 3.0, 0.5, 2.0])]).log()
        first = pieces_of_unit("word", batch, whole).piece
        starts = torch.tensor([first.tolist().index(number) for number in first.tolist()])
        # every token counts by the tag of its word's first, those without by a half
        assert torch.allclose(score.float(), by_tag[batch.tags.long()[starts]], rtol=1e-6)


@settings(max_examples=20)
@given(
    step=st.integers(0, 99),
    unit=st.sampled_from(["token", "word", "span"]),
    ends=st.sampled_from([(0.3, 0.0), (0.0, 0.3)]),
)
def test_budgets_are_exact_and_whole_words_stay_whole(step, unit, ends):
    ours = knowing(masker(Schedule("linear", *ends), unit), [1.0, 3.0, 0.5, 2.0])
    batch = tagged([50, 31, 64, 20], step, untagged=True)
    plan = plan_of(ours, batch, step / 100)
    assert len(plan.targets.unique()) == ours.budget(step / 100, batch.layout.rows)
    piece = pieces_of_unit(unit, batch, PackRng(5, batch.number)).piece
    hits, sizes = (torch.bincount(p, minlength=int(piece[-1]) + 1) for p in (piece[plan.targets], piece))
    assert int(((hits > 0) & (hits < sizes)).sum()) <= 1


def test_running_losses_are_those_of_a_loop_in_plain_python():
    ours, expected = masker(momentum=0.9), [0.0] * 4
    draw = random.Random(3)
    for step in range(6):
        batch = tagged([60, 30], step, untagged=True)
        if step % 2:  # a step without verbs must leave theirs alone
            batch = dataclasses.replace(batch, tags=torch.where(batch.tags == 4, 0, batch.tags))
        plan = plan_of(ours, batch)
        # multiples of a power of two, so that no rounding of sums hides a fault
        nll = torch.tensor([draw.randrange(8 << 10) / 1024 for _ in plan.targets])
        ours.score.update(batch, plan, of_nll(nll))
        ours.score.sync()
        for tag in range(4):
            losses = [
                loss for loss, t in zip(nll.tolist(), batch.tags[plan.targets].tolist(), strict=True) if t == tag + 1
            ]
            if losses:
                expected[tag] = 0.9 * expected[tag] + (1 - 0.9) * statistics.mean(losses)
    assert ours.score.state_dict()["losses"].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_learn_what_one_learns_bit_for_bit(world, monkeypatch):
    one, several = masker(), [masker() for _ in range(world)]
    for step in range(4):
        for place in range(6):
            batch = tagged([60, 30], 6 * step + place)
            plan = plan_of(one, batch)
            of_rank = several[place % world]
            assert torch.equal(plan_of(of_rank, batch).targets, plan.targets)
            nll = torch.rand(len(plan.targets), generator=torch.Generator().manual_seed(batch.number)) * 9
            for maker in (one, of_rank):
                maker.score.update(batch, plan, of_nll(nll))
        # the message of all: what each rank noted, added in an order of its own
        notes: list[torch.Tensor] = []
        monkeypatch.setattr(ranks, "sum", lambda own, notes=notes: notes.append(own) or own)
        for maker in several:
            maker.score.sync()
        total = sum(notes[::-1][1:], notes[-1])
        monkeypatch.setattr(
            ranks, "sum", lambda own, total=total: own if torch.equal(own, total) else pytest.fail("other sums")
        )
        one.score.sync()
        for maker in several:
            maker.score.load_state_dict(one.score.state_dict())


def test_a_resumed_run_draws_and_learns_on_bit_for_bit():
    def steps(maker: Masker, some: range) -> list[torch.Tensor]:
        results = []
        for step in some:
            batch = tagged([60, 30], step)
            plan = plan_of(maker, batch)
            results.append(plan.targets)
            nll = torch.rand(len(plan.targets), generator=torch.Generator().manual_seed(step))
            maker.score.update(batch, plan, of_nll(nll))
            maker.score.sync()
        return results

    whole, stopped, resumed = masker(), masker(), masker()
    expected = steps(whole, range(8))
    first = steps(stopped, range(4))
    resumed.score.load_state_dict({name: tensor.clone() for name, tensor in stopped.score.state_dict().items()})
    for actual, wanted in zip([*first, *steps(resumed, range(4, 8))], expected, strict=True):
        assert torch.equal(actual, wanted)
    for name, tensor in whole.score.state_dict().items():
        assert torch.equal(resumed.score.state_dict()[name], tensor)


def test_a_nonfinite_loss_does_not_change_its_tag():
    ours, batch = masker(), tagged([60, 30])
    plan = plan_of(ours, batch)
    tags = batch.tags[plan.targets]
    nll = torch.ones(len(plan.targets)).masked_fill(tags == 2, torch.nan)
    ours.score.update(batch, plan, of_nll(nll))
    ours.score.sync()
    losses = ours.score.state_dict()["losses"]
    assert losses[1] == 0 and (losses[[0, 2, 3]] > 0).all()


def test_metrics_cover_every_tag_since_the_last_call():
    ours = masker()
    for number in range(2):
        batch = tagged([60, 30], number)
        plan = plan_of(ours, batch)
        nll = torch.full((len(plan.targets),), 1.0 + number)
        ours.score.update(batch, plan, of_nll(nll))
        ours.score.sync()
        by_name = ours.score.metrics()
        tags = batch.tags[plan.targets].tolist()
        for place, name in enumerate(NAMES, start=1):
            assert by_name[f"tags/{name}/share"] == pytest.approx(tags.count(place) / len(tags))
            assert by_name.get(f"tags/{name}/loss", 1.0 + number) == 1.0 + number
        shares = [value for name, value in by_name.items() if name.endswith("/share")]
        assert sum(shares) == pytest.approx(1.0)
    quiet = ours.score.metrics()
    assert not any(name.endswith("/loss") for name in quiet) and quiet["tags/NOUN/share"] == 0


def test_text_without_tags_is_refused():
    config = MaskingConfig(score="part_of_speech")
    with pytest.raises(ConfigError, match=r"`masking.score` is 'part_of_speech', .*--tags"):
        Masker(config, IDS)
    bare = pack([40, 20])
    with pytest.raises(DataError, match=r"pack 0 has no tags\. .*--tags"):
        plan_of(masker(), bare)


@pytest.mark.parametrize("state", [{}, {"losses": torch.zeros(3), "steps": torch.tensor([1])}])
def test_a_state_of_another_score_or_of_other_tags_is_refused(state):
    with pytest.raises(CheckpointError, match="no losses of 4 parts of speech"):
        masker().score.load_state_dict(state)


def test_every_problem_is_named():
    bad = PartOfSpeechScoreConfig(momentum=1.0, sharpness=0.0, temperature=float("nan"))
    problems = settings_problems(MaskingConfig(score="part_of_speech", part_of_speech=bad), "masking")
    names = ["momentum", "sharpness", "temperature"]
    assert [name in sentence for name, sentence in zip(names, problems, strict=True)] == [True] * 3
    assert settings_problems(MaskingConfig(score="part_of_speech"), "masking") == []
    other = PartOfSpeechScoreConfig(momentum=0.9)
    for score in ("uniform", "entropy"):
        [sentence] = settings_problems(MaskingConfig(score=score, part_of_speech=other), "masking")
        assert sentence.startswith("`masking.part_of_speech` has no effect")
