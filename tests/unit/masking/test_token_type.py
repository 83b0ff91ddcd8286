"""Adaptive masking by token type as relations: random at first, then by errors, one state on any ranks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megamask.batch import Losses
from megamask.errors import CheckpointError
from megamask.errors.setting_rules import settings_problems
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.masking.settings import TokenTypeScoreConfig
from megamask.masking.token_type import TokenTypeScore
from megamask.runtime import ranks
from megamask.schedules import Schedule
from tests.batches import IDS, pack

SIGNALS = ["accuracy", "loss"]


def masker(ratio: float = 0.3, **settings) -> Masker:
    score_config = TokenTypeScoreConfig(**settings)
    config = MaskingConfig(
        Schedule(start=ratio), score="token_type", token_type=score_config, random_share=Schedule(start=0.0)
    )
    return Masker(config, IDS)


def plan_of(maker: Masker, number: int):
    batch = pack([60, 30], number=number, seed=number)
    return batch, maker(batch, progress=0.0, rng=PackRng(5, number))


def predictions(targets: int, seed: int) -> Losses:
    draws = torch.Generator().manual_seed(seed)
    nll, correct = torch.rand(targets, generator=draws) * 9, torch.rand(targets, generator=draws) < 0.4
    return Losses(nll.sum(), nll, torch.zeros_like(nll), correct)


def learn(maker: Masker, steps: range) -> list[torch.Tensor]:
    """The targets of each step, a pack each."""
    drawn = []
    for step in steps:
        batch, plan = plan_of(maker, step)
        drawn.append(plan.targets)
        maker.score.update(batch, plan, predictions(len(plan.targets), step))
        maker.score.sync()
    return drawn


@pytest.mark.parametrize("signal", SIGNALS)
def test_before_the_first_update_it_is_random_masking_bit_for_bit(signal: str) -> None:
    ours, plain = masker(signal=signal, every=3), Masker(MaskingConfig(Schedule(start=0.3)), IDS)
    for step in range(3):
        (_, plan), (_, expected) = plan_of(ours, step), plan_of(plain, step)
        for field in dataclasses.fields(expected):
            one, other = getattr(plan, field.name), getattr(expected, field.name)
            assert one is other or torch.equal(one, other), field.name
        learn(ours, range(step, step + 1))
    assert not torch.equal(plan_of(ours, 3)[1].targets, plan_of(plain, 3)[1].targets)


@pytest.mark.parametrize("signal", SIGNALS)
def test_values_are_those_of_a_loop_in_plain_python(signal: str) -> None:
    ours = masker(signal=signal, every=2, momentum=0.2, floor=0.05)
    expected = [1.0 if signal == "accuracy" else math.log(IDS.size)] * IDS.size
    sums: dict[int, list[float]] = {}
    for step in range(6):
        batch, plan = plan_of(ours, step)
        losses = predictions(len(plan.targets), step)
        missed = losses.nll.tolist() if signal == "loss" else [float(not right) for right in losses.correct]
        for label, one in zip(plan.labels.tolist(), missed, strict=True):
            sums.setdefault(label, []).append(one)
        ours.score.update(batch, plan, losses)
        ours.score.sync()
        if step % 2:
            for label, each in sums.items():
                expected[label] = max(0.05, 0.2 * expected[label] + 0.8 * sum(each) / len(each))
            sums = {}
    # losses are rounded to multiples of 2^-20
    assert ours.score.state_dict()["values"].tolist() == pytest.approx(expected, abs=2e-6)


def test_a_type_is_drawn_in_proportion_to_its_value() -> None:
    """One token of a pack is drawn 3000 times; Hoeffding's bound at 1e-9 for each group of types."""
    ours, rounds = masker(1 / 92, every=1), 3000
    values = torch.full((IDS.size,), 0.2).double()
    values[IDS.size // 2 :] = 0.8
    state = ours.score.state_dict() | {"values": values, "steps": torch.tensor([1])}
    ours.score.load_state_dict(state)
    batch = pack([90])
    easy = int((batch.tokens[batch.maskable] < IDS.size // 2).sum())
    hard = int(batch.maskable.sum()) - easy
    drawn = 0
    for number in range(rounds):
        plan = ours(dataclasses.replace(batch, number=number), progress=0.0, rng=PackRng(1, number))
        assert len(plan.targets) == 1
        drawn += int(plan.labels >= IDS.size // 2)
    expected = 0.8 * hard / (0.8 * hard + 0.2 * easy)
    assert abs(drawn / rounds - expected) < math.sqrt(math.log(2 / 1e-9) / (2 * rounds))


def test_types_that_were_never_targets_stay_among_the_hardest() -> None:
    ours = masker(every=1)
    learn(ours, range(4))
    state = ours.score.state_dict()
    assert (state["values"][~state["seen"]] == 1).all()
    assert state["values"].max() == 1 and state["values"][state["seen"]].min() < 1


@pytest.mark.parametrize("signal", SIGNALS)
def test_several_ranks_learn_what_one_learns_bit_for_bit(signal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, several = masker(signal=signal, every=2), [masker(signal=signal, every=2) for _ in range(3)]
    for step in range(6):
        for place in range(6):
            batch, plan = plan_of(one, 6 * step + place)
            rank = several[place % 3]
            assert torch.equal(plan_of(rank, batch.number)[1].targets, plan.targets)
            for maker in (one, rank):
                maker.score.update(batch, plan, predictions(len(plan.targets), batch.number))
        own = [maker.score._own.clone() for maker in several]
        # added in another order than one rank adds its packs
        total = own[2] + own[1] + own[0]
        for maker in several:
            monkeypatch.setattr(ranks, "sum", lambda _, total=total: total)
            maker.score.sync()
        monkeypatch.undo()
        one.score.sync()
        for maker in several:
            for name, tensor in one.score.state_dict().items():
                assert torch.equal(maker.score.state_dict()[name], tensor), name


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_resumed_run_draws_and_learns_on_bit_for_bit(signal: str) -> None:
    whole, stopped, resumed = (masker(signal=signal, every=3) for _ in range(3))
    expected = learn(whole, range(10))
    first = learn(stopped, range(5))  # between two updates
    resumed.score.load_state_dict({name: tensor.clone() for name, tensor in stopped.score.state_dict().items()})
    for learned, wanted in zip([*first, *learn(resumed, range(5, 10))], expected, strict=True):
        assert torch.equal(learned, wanted)
    for name, tensor in whole.score.state_dict().items():
        assert torch.equal(resumed.score.state_dict()[name], tensor), name


def test_a_nan_loss_leaves_the_value_of_its_type() -> None:
    ours = masker(signal="loss", every=1)
    batch, plan = plan_of(ours, 0)
    label = int(plan.labels[0])
    losses = predictions(len(plan.targets), 0)
    nll = losses.nll.masked_fill(plan.labels == label, torch.nan)
    ours.score.update(batch, plan, dataclasses.replace(losses, nll=nll))
    ours.score.sync()
    values = ours.score.state_dict()["values"]
    assert values[label] == math.log(IDS.size) and values.isfinite().all()


def test_metrics_are_about_the_types_that_were_targets() -> None:
    ours = masker(every=1, floor=0.25)
    assert ours.score.metrics() == {}
    learn(ours, range(6))
    state, metrics = ours.score.state_dict(), ours.score.metrics()
    seen = state["values"][state["seen"]]
    assert metrics["token_types/seen"] == pytest.approx(len(seen) / IDS.size)
    assert metrics["token_types/error"] == pytest.approx(float(seen.mean()))
    assert metrics["token_types/at_floor"] == pytest.approx(float((seen == 0.25).double().mean())) != 0


@pytest.mark.parametrize("state", [{}, {"values": torch.zeros(3)}])
def test_a_state_of_another_score_or_vocabulary_is_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match="no values of 97 token types"):
        TokenTypeScore(TokenTypeScoreConfig(), IDS.size).load_state_dict(state)


def test_every_problem_is_named() -> None:
    bad = TokenTypeScoreConfig(every=0, momentum=1.0, floor=0.0, temperature=0.0)
    sentences = settings_problems(MaskingConfig(score="token_type", token_type=bad), "masking")
    names = ["every", "momentum", "floor", "temperature"]
    assert [name in sentence for name, sentence in zip(names, sentences, strict=True)] == [True] * 4
    other = MaskingConfig(score="uniform", token_type=TokenTypeScoreConfig(every=5))
    [sentence] = settings_problems(other, "masking")
    assert sentence.startswith("`masking.token_type` has no effect")
