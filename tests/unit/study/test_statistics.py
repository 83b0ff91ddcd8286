"""Tests against scipy, against published critical values, and on simulated studies with and without an effect."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megamask.study import statistics

STUDIES = 1_000
MOST_FALSE_ALARMS = int(stats.binom.ppf(0.9999, STUDIES, 0.05))
"""A test at level 0.05 exceeds this number in 1,000 null studies with a probability below 1 in 10,000."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_interval_and_p_agree_with_scipy(rng: np.random.Generator) -> None:
    differences = rng.normal(0.3, 1, (5, 6))
    reference = stats.ttest_1samp(differences, 0, axis=-1)
    low, high = statistics.t_interval(differences)
    np.testing.assert_allclose(low, reference.confidence_interval(0.95).low)
    np.testing.assert_allclose(high, reference.confidence_interval(0.95).high)
    np.testing.assert_allclose(statistics.t_test_p(differences), reference.pvalue)
    assert np.array_equal(statistics.t_test_p(differences) < 0.05, (low > 0) | (high < 0))


@pytest.mark.parametrize("differences", [[1.0], [2.0, 2.0, 2.0], [0.0, 0.0]])
def test_no_p_without_spread(differences: list[float]) -> None:
    assert np.isnan(statistics.t_test_p(np.array(differences)))
    assert np.isnan(statistics.equivalence_p(np.array(differences), 0.5))


def test_sign_flips_by_enumeration(rng: np.random.Generator) -> None:
    differences = rng.normal(0.5, 1, 7)
    signs = np.array(np.meshgrid(*[(-1, 1)] * 7)).reshape(7, -1)
    means = np.abs(differences @ signs) / 7
    assert statistics.sign_flip_p(differences) == np.mean(means >= abs(differences.mean()) - 1e-12)


@pytest.mark.parametrize(("seeds", "smallest"), [(3, 0.25), (5, 0.0625), (6, 0.03125), (8, 0.0078125)])
def test_smallest_sign_flip_p_is_reached(seeds: int, smallest: float) -> None:
    assert statistics.smallest_sign_flip_p(seeds) == smallest
    assert statistics.sign_flip_p(np.arange(1.0, seeds + 1)) == smallest


def test_many_sign_flips_are_sampled_close_to_the_t_test(rng: np.random.Generator) -> None:
    differences = rng.normal(0.4, 1, 30)
    low, high = stats.binom.ppf([0.0001, 0.9999], 9999, statistics.t_test_p(differences)) / 9999
    assert low - 0.01 < statistics.sign_flip_p(differences) < high + 0.01


def test_holm_by_hand() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.5, float("nan")]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_holm_keeps_the_family_wise_rate(rng: np.random.Generator) -> None:
    p_values = statistics.t_test_p(rng.normal(size=(STUDIES, 7, 6)))
    alarms = sum(min(statistics.holm(row)) < 0.05 for row in p_values.tolist())
    assert alarms <= MOST_FALSE_ALARMS
    assert (p_values.min(1) < 0.05).sum() > MOST_FALSE_ALARMS  # without it, seven tasks raise too many


@pytest.mark.parametrize("seeds", [3, 6])
def test_false_alarms_of_each_test(rng: np.random.Generator, seeds: int) -> None:
    null = rng.normal(size=(STUDIES, seeds))
    assert (statistics.t_test_p(null) < 0.05).sum() <= MOST_FALSE_ALARMS
    assert (statistics.sign_flip_p(null) < 0.05).sum() <= MOST_FALSE_ALARMS
    at_the_margin = null + 0.5
    assert (statistics.equivalence_p(at_the_margin, 0.5) < 0.05).sum() <= MOST_FALSE_ALARMS


def test_equivalence_is_an_interval_within_the_margin(rng: np.random.Generator) -> None:
    differences = rng.normal(0.1, 0.4, (STUDIES, 6))
    low, high = statistics.t_interval(differences, confidence=0.9)
    within = (low > -0.5) & (high < 0.5)
    assert np.array_equal(statistics.equivalence_p(differences, 0.5) < 0.05, within)
    assert 0 < within.sum() < STUDIES


def test_planted_effects_are_found_as_often_as_predicted(rng: np.random.Generator) -> None:
    for seeds in (3, 6, 10):
        effect = statistics.detectable_effect(seeds, sd_of_differences=2.0, power=0.8)
        p_values = statistics.t_test_p(rng.normal(effect, 2.0, (STUDIES, seeds)))
        low, high = stats.binom.ppf([0.0001, 0.9999], STUDIES, 0.8)
        assert low <= (p_values < 0.05).sum() <= high


@pytest.mark.parametrize(("seeds", "half_width"), [(3, 1.36), (5, 0.87), (10, 0.56)])
def test_half_widths_of_published_spread(seeds: int, half_width: float) -> None:
    """Two unpaired arms with a standard deviation of 0.6 points of GLUE, as crammed BERTs have."""
    assert statistics.expected_half_width(seeds, 0.6, paired=False) == pytest.approx(half_width, abs=0.006)
    paired = statistics.expected_half_width(seeds, 0.6, correlation=0.75)
    assert paired == pytest.approx(statistics.expected_half_width(seeds, 0.3, correlation=0.0))


def test_welch_agrees_with_scipy(rng: np.random.Generator) -> None:
    first, second = rng.normal(1, 1, 6), rng.normal(0, 3, 4)
    interval, p = statistics.welch_interval(first, second)
    assert interval is not None
    assert p == stats.ttest_ind(first, second, equal_var=False).pvalue
    assert interval.excludes(0) == (p < 0.05)
    assert statistics.welch_interval(first[:1], second) == (None, pytest.approx(float("nan"), nan_ok=True))


def test_bootstrap_agrees_with_scipy_where_only_seeds_vary(rng: np.random.Generator) -> None:
    scores = rng.normal(1, 1, 12)
    draws = np.repeat(scores[:, None], 20_000, axis=1)
    interval = statistics.percentile_interval(statistics.multi_bootstrap(draws, np.zeros_like(draws), rng))
    reference = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=rng)
    assert (interval.low, interval.high) == pytest.approx(tuple(reference.confidence_interval), abs=0.03)


def test_bootstrap_variance_has_both_parts(rng: np.random.Generator) -> None:
    """The variance over seeds and examples is that of seeds plus that of examples, up to their product."""
    seeds, examples, draws = 8, 200, 10_000
    right = rng.random((2, seeds, examples)) < rng.normal(0.7, 0.03, (2, seeds, 1))
    weights = statistics.example_weights(examples, draws, rng)
    scores = right.astype(np.float32) @ weights / examples
    samples = statistics.multi_bootstrap(scores[0], scores[1], rng)
    difference = right[0].astype(float) - right[1]
    of_seeds = difference.mean(1).var() / seeds
    of_examples = difference.mean(0).var() / examples
    both = difference.var() / (seeds * examples) - of_seeds / examples - of_examples / seeds
    assert samples.var() == pytest.approx(of_seeds + of_examples + both, rel=0.06)


def test_the_same_draws_serve_both_arms(rng: np.random.Generator) -> None:
    scores = rng.random((4, 100))
    assert not statistics.multi_bootstrap(scores, scores, rng).any()


def test_example_weights_are_samples_with_replacement(rng: np.random.Generator) -> None:
    weights = statistics.example_weights(50, 2_000, rng)
    assert np.array_equal(weights.sum(0), np.full(2_000, 50))
    assert weights.mean() == 1.0
    np.testing.assert_allclose(weights.var(), 1 - 1 / 50, rtol=0.02)
