"""The importance correction as relations: unbiased over many draws, nothing at 0, nothing under random masks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamask.errors.setting_rules import settings_problems
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.padded import losses_at
from megamask.masking.rng import PackRng
from megamask.masking.settings import EntropyScoreConfig, Unit
from megamask.schedules import Schedule
from tests.batches import IDS, pack

LENGTHS = [60, 31, 64, 20, 8]
BATCH = pack(LENGTHS, padding=7)
DRAWS = torch.Generator().manual_seed(1)
ENTROPY = torch._standard_gamma(torch.full((BATCH.layout.rows,), 2.0), generator=DRAWS)
LOSS = ENTROPY.double() + torch.rand(BATCH.layout.rows, generator=DRAWS)
"""Hard tokens have large losses, so a mean over chosen tokens without weights is far too large."""
MAYBE = Schedule(start=0.15)


def masking(correction: float, *, random_share: Schedule = MAYBE, unit: Unit = "token", **settings) -> MaskingConfig:
    limit = settings.pop("max_weight", None)
    score = EntropyScoreConfig(**settings)
    return MaskingConfig(
        Schedule(start=0.2), unit, "entropy", entropy=score, random_share=random_share,
        correction=correction, max_weight=limit,
    )  # fmt: skip


def plan(config: MaskingConfig, number: int = 0):
    batch = dataclasses.replace(BATCH, number=number)
    return Masker(config, IDS)(batch, progress=0.5, rng=PackRng(3, number), entropy=ENTROPY)


@pytest.mark.parametrize(("temperature", "explored"), [(0.25, 0.15), (1.0, 0.15), (1.0, 0.0), (3.0, 0.0), (0.0, 0.5)])
def test_the_weighted_loss_is_on_average_that_of_random_targets(temperature: float, explored: float) -> None:
    """Over 400 draws; a false alarm beyond five standard errors has a chance of one in a million."""
    config = masking(1.0, temperature=temperature, random_share=Schedule(start=explored))
    truth = LOSS[BATCH.maskable].mean()
    weighted, plain = [], []
    for number in range(400):
        drawn = plan(config, number)
        assert drawn.weights is not None
        weighted.append((drawn.weights.double() * LOSS[drawn.targets]).mean())
        plain.append(LOSS[drawn.targets].mean())
    estimates, without = torch.stack(weighted), torch.stack(plain)
    assert (estimates.mean() - truth).abs() < 5 * estimates.std() / 20
    assert without.mean() - truth > 5 * without.std() / 20


def test_without_correction_the_plan_is_the_same_but_for_the_weights() -> None:
    none, full = plan(masking(0.0)), plan(masking(1.0))
    assert none.weights is None and full.weights is not None
    for field in dataclasses.fields(none):
        if field.name != "weights":
            assert torch.equal(getattr(none, field.name), getattr(full, field.name)), field.name


def test_random_targets_have_no_weights() -> None:
    assert plan(masking(1.0, random_share=Schedule(start=1.0))).weights is None


def test_a_correction_is_a_power_of_the_full_one() -> None:
    full, half = plan(masking(1.0)).weights, plan(masking(0.5)).weights
    assert full is not None and half is not None
    torch.testing.assert_close(half, full.sqrt())
    chance = full.new_tensor(len(full) / int(BATCH.maskable.sum()))
    probability = plan(masking(1.0)).probability
    assert probability is not None
    torch.testing.assert_close(full, chance / probability)


def test_larger_weights_are_clipped_and_others_stay() -> None:
    free, clipped = plan(masking(1.0)).weights, plan(masking(1.0, max_weight=1.5)).weights
    assert free is not None and clipped is not None
    assert 0 < int((free > 1.5).sum()) < len(free)
    assert torch.equal(clipped, free.clamp(max=1.5))


def test_the_random_share_limits_the_weights() -> None:
    for number in range(50):
        weights = plan(masking(1.0, temperature=0.05, random_share=Schedule(start=0.25)), number).weights
        assert weights is not None and weights.mean() < 4 and weights.max() < 6


def test_your_own_loop_gets_the_weighted_loss() -> None:
    drawn = plan(masking(1.0))
    logits = torch.randn(1, BATCH.layout.rows, IDS.size, dtype=torch.float64)
    losses = losses_at(logits, drawn)
    assert drawn.weights is not None
    assert torch.equal(losses.total, (drawn.weights * losses.nll).sum())


REFUSED = [
    (MaskingConfig(correction=0.5), "`masking.correction` has no effect with `masking.score` 'uniform'"),
    (masking(0.0, max_weight=2.0), "`masking.max_weight` has no effect while `masking.correction` is 0"),
    (masking(1.0, max_weight=0.5), "`masking.max_weight` must be at least 1, but is 0.5"),
    (masking(1.5), "`masking.correction` must lie in [0, 1], but is 1.5"),
    (masking(1.0, unit="span"), "`masking.unit` must be 'token' or 'word' with `masking.correction`, but is 'span'"),
    (masking(1.0, temperature=0.0, random_share=Schedule(start=0.0)), "`masking.random_share` must stay above 0"),
    (masking(1.0, temperature=0.0, random_share=Schedule("linear", 1.0, 0.0)), "`masking.random_share` must stay"),
    (masking(1.0, skip_top=0.1, random_share=Schedule(start=0.0)), "`masking.random_share` must stay above 0"),
]


@pytest.mark.parametrize(("config", "sentence"), REFUSED)
def test_what_cannot_be_corrected_is_one_sentence(config: MaskingConfig, sentence: str) -> None:
    (problem,) = settings_problems(config, "masking")
    assert sentence in problem


@pytest.mark.parametrize(
    "config",
    [
        masking(1.0, random_share=Schedule(start=0.0)),
        masking(1.0, temperature=0.0),
        masking(0.5, unit="word", max_weight=3.0),
        MaskingConfig(score="part_of_speech", correction=1.0),
        MaskingConfig(score="token_type", correction=1.0),
    ],
)
def test_what_can_be_corrected_is_not_refused(config: MaskingConfig) -> None:
    assert settings_problems(config, "masking") == []
