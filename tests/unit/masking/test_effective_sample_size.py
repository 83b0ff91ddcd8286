"""A temperature that follows the effective sample size: it reaches it, from either side, in one state on any ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamask.batch import Losses
from megamask.errors import CheckpointError
from megamask.errors.setting_rules import settings_problems
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.masking.settings import EntropyScoreConfig
from megamask.runtime import ranks
from megamask.schedules import Schedule
from tests.batches import IDS, pack

BATCH = pack([100, 80, 64, 50, 90, 120], padding=8)
ENTROPY = torch._standard_gamma(torch.full((BATCH.layout.rows,), 2.0), generator=torch.Generator().manual_seed(1))


def masker(size: float | None, *, temperature: float = 1.0, share: Schedule | None = None) -> Masker:
    score = EntropyScoreConfig(temperature=temperature, effective_sample_size=size)
    share = share or Schedule(start=0.15)
    return Masker(MaskingConfig(Schedule(start=0.2), score="entropy", entropy=score, random_share=share), IDS)


def plan_of(maker: Masker, number: int, progress: float = 0.5):
    batch = dataclasses.replace(BATCH, number=number)
    return batch, maker(batch, progress=progress, rng=PackRng(3, number), entropy=ENTROPY)


def losses_of(targets: int) -> Losses:
    nll = torch.zeros(targets)
    return Losses(nll.sum(), nll, nll, nll > 0)


def sample(plan) -> tuple[float, float, int]:
    weights = 1 / plan.probability.double()
    return float(weights.sum()), float(weights.square().sum()), len(weights)


def steps(maker: Masker, some: range, packs: int = 2) -> list[float]:
    """The realised effective sample size of each step."""
    sizes = []
    for step in some:
        plans = [plan_of(maker, packs * step + place) for place in range(packs)]
        for batch, plan in plans:
            maker.score.update(batch, plan, losses_of(len(plan.targets)))
        maker.score.sync()
        total, square, targets = (sum(part) for part in zip(*(sample(plan) for _, plan in plans), strict=True))
        sizes.append(total**2 / square / targets)
    return sizes


@pytest.mark.parametrize(("size", "temperature"), [(0.8, 0.1), (0.8, 20.0), (0.6, 5.0)])
def test_the_requested_size_is_reached_from_either_side(size: float, temperature: float) -> None:
    realised = torch.tensor(steps(masker(size, temperature=temperature), range(60))[20:])
    assert (realised.mean() - size).abs() < 5 * realised.std() / 40**0.5
    fixed = torch.tensor(steps(masker(None, temperature=temperature), range(20)))
    assert (fixed.mean() - size).abs() > 10 * fixed.std() / 20**0.5


def test_without_a_size_there_is_no_state() -> None:
    maker = masker(None)
    steps(maker, range(2))
    assert maker.score.state_dict() == maker.score.metrics() == {} and maker.score.temperature == 1.0


def test_random_masks_do_not_move_the_temperature() -> None:
    maker = masker(0.8, share=Schedule("step", 1.0, 0.1, at=0.5))
    for number in range(4):
        batch, plan = plan_of(maker, number, progress=0.0)
        maker.score.update(batch, plan, losses_of(len(plan.targets)))
        maker.score.sync()
    assert maker.score.metrics() == {"masking/temperature": 1.0}


def test_a_resumed_run_is_bitwise_equal() -> None:
    whole, stopped, resumed = (masker(0.7) for _ in range(3))
    expected = steps(whole, range(8))
    first = steps(stopped, range(4))
    resumed.score.load_state_dict(stopped.score.state_dict())
    assert first + steps(resumed, range(4, 8)) == expected
    assert torch.equal(resumed.score.state_dict()["log_temperature"], whole.score.state_dict()["log_temperature"])


def test_several_ranks_move_as_one_does_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    one, several = masker(0.7), [masker(0.7) for _ in range(3)]
    for step in range(4):
        for place in range(6):
            batch, plan = plan_of(one, 6 * step + place)
            rank = several[place % 3]
            assert torch.equal(plan_of(rank, batch.number)[1].targets, plan.targets)
            for maker in (one, rank):
                maker.score.update(batch, plan, losses_of(len(plan.targets)))
        own = [maker.score._own.clone() for maker in several]
        total = own[2] + own[1] + own[0]  # in another order
        monkeypatch.setattr(ranks, "sum", lambda _, total=total: total)
        for maker in several:
            maker.score.sync()
        monkeypatch.undo()
        one.score.sync()
        assert len({float(maker.score._log) for maker in (one, *several)}) == 1


def test_a_state_of_another_kind_is_refused() -> None:
    for maker, other in ((masker(0.8), masker(None)), (masker(None), masker(0.8))):
        with pytest.raises(CheckpointError, match="effective_sample_size"):
            maker.score.load_state_dict(other.score.state_dict())


@pytest.mark.parametrize(
    ("size", "temperature", "sentence"),
    [
        (1.0, 1.0, "`entropy.effective_sample_size` must lie in (0, 1), but is 1.0"),
        (0.8, 0.0, "`entropy.temperature` must be above 0 with `entropy.effective_sample_size`"),
    ],
)
def test_what_cannot_be_reached_is_one_sentence(size: float, temperature: float, sentence: str) -> None:
    [problem] = settings_problems(EntropyScoreConfig(temperature=temperature, effective_sample_size=size), "entropy")
    assert sentence in problem
