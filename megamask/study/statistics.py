"""Statistics of paired comparisons: intervals, exact tests, equivalence, power and the multi-bootstrap.

The unit of replication is the pretraining seed. An array of differences has one number for each seed that two arms
share (arm minus baseline), with fine-tuning seeds averaged first. All functions but the multi-bootstrap cost
microseconds; all of them also take a stack of studies, with the seeds in the last axis.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

CONFIDENCE = 0.95
"""Confidence level of every interval, two-sided."""
EQUAL = 1e-5
"""Differences whose range is at most this, in points or nats, are equal up to rounding in float32."""
EXACT_SEEDS = 14
"""Up to this many seeds the sign-flip test visits all sign patterns; above, it draws 9,999 of them."""


@dataclass(frozen=True)
class Interval:
    """A two-sided interval."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether ``value`` is outside the closed interval."""
        return value < self.low or value > self.high


def t_interval(
    differences: Float[np.ndarray, "*studies seeds"], confidence: float = CONFIDENCE
) -> tuple[Float[np.ndarray, "*studies"], Float[np.ndarray, "*studies"]]:
    """The ends of Student's interval for the mean; NaN for one seed. Assumes that the differences are normal."""
    if differences.shape[-1] < 2:
        return np.full(differences.shape[:-1], np.nan), np.full(differences.shape[:-1], np.nan)
    mean, error = differences.mean(-1), differences.std(-1, ddof=1) / np.sqrt(differences.shape[-1])
    half = stats.t.ppf((1 + confidence) / 2, differences.shape[-1] - 1) * error
    return np.asarray(mean - half), np.asarray(mean + half)


def t_test_p(differences: Float[np.ndarray, "*studies seeds"]) -> Float[np.ndarray, "*studies"]:
    """Two-sided p of the paired t test; NaN where it is not defined: one seed, or differences that are all equal.

    Equal differences say nothing about their spread. They are common where a score has few possible values.
    """
    equal = np.ptp(differences, axis=-1) <= EQUAL
    if differences.shape[-1] < 2 or np.all(equal):
        return np.full(differences.shape[:-1], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(equal, np.nan, stats.ttest_1samp(differences, 0.0, axis=-1).pvalue)


def sign_flip_p(differences: Float[np.ndarray, "*studies seeds"], seed: int = 0) -> Float[np.ndarray, "*studies"]:
    """Two-sided p of the sign-flip test of a zero mean, which assumes only that differences are symmetric about it.

    Its smallest value is 2 / 2**seeds, so fewer than six seeds never reach 0.05. ``seed`` matters above `EXACT_SEEDS`.
    """
    outcome = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        axis=-1,
        n_resamples=np.inf if differences.shape[-1] <= EXACT_SEEDS else 9999,
        rng=np.random.default_rng(seed),
    )
    return np.asarray(outcome.pvalue, dtype=float)


def smallest_sign_flip_p(seeds: int) -> float:
    """The smallest two-sided p that the sign-flip test can give."""
    return min(1.0, 2.0 / 2**seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979): reject those below the level, and the family-wise error stays below it.

    An undefined p (NaN) counts as 1, so it stays in the family.
    """
    values = np.nan_to_num(np.asarray(p_values, dtype=float), nan=1.0)
    order = np.argsort(values, kind="stable")
    adjusted = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    result = np.empty_like(values)
    result[order] = np.minimum(adjusted, 1.0)
    return result.tolist()


def equivalence_p(differences: Float[np.ndarray, "*studies seeds"], margin: float) -> Float[np.ndarray, "*studies"]:
    """p of two one-sided t tests (Schuirmann 1987): below 0.05, the mean difference lies within +-``margin``.

    NaN where the t test is not defined.
    """
    equal = np.ptp(differences, axis=-1) <= EQUAL
    if differences.shape[-1] < 2 or np.all(equal):
        return np.full(differences.shape[:-1], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        above = stats.ttest_1samp(differences, -margin, axis=-1, alternative="greater").pvalue
        below = stats.ttest_1samp(differences, margin, axis=-1, alternative="less").pvalue
    return np.where(equal, np.nan, np.maximum(above, below))


def welch_interval(
    first: Float[np.ndarray, " n"], second: Float[np.ndarray, " m"], confidence: float = CONFIDENCE
) -> tuple[Interval | None, float]:
    """Interval and p of the difference of two means (first minus second) of arms that share no seed.

    None and NaN if the spread is unknown: an arm has one seed, or neither arm has any spread.
    """
    if min(len(first), len(second)) < 2 or max(np.ptp(first), np.ptp(second)) <= EQUAL:
        return None, float("nan")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss")  # one arm without spread, which Welch's test allows
        test = stats.ttest_ind(first, second, equal_var=False)
        ends = test.confidence_interval(confidence)
    return Interval(float(ends.low), float(ends.high)), float(test.pvalue)


def expected_half_width(seeds: int, sd: float, correlation: float = 0.0, paired: bool = True) -> float:
    """Half the width of the interval of a mean difference: about the smallest difference that can be detected.

    ``sd`` is the standard deviation over seeds of one arm, ``correlation`` that between two arms with the same seed.
    """
    if seeds < 2:
        return float("inf")
    degrees = seeds - 1 if paired else 2 * seeds - 2
    spread = sd * np.sqrt(2 * (1 - correlation) / seeds)
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * spread)


def detectable_effect(seeds: int, sd_of_differences: float, power: float = 0.8) -> float:
    """The true mean difference that a paired t test at level 0.05 detects with probability ``power``.

    It follows from the noncentral t distribution (Cohen 1988, section 2.3). Infinite for one seed.
    """
    if seeds < 2 or not np.isfinite(sd_of_differences):
        return float("inf")
    if sd_of_differences == 0:
        return 0.0
    degrees = seeds - 1
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, degrees)

    def excess(shift: float) -> float:
        both = stats.nct.sf(critical, degrees, [shift, -shift])  # a mirrored shift gives the other side
        return float(both.sum()) - power

    upper = 1.0
    while excess(upper) < 0:
        upper *= 1.5
    return float(optimize.brentq(excess, 0.0, upper) * sd_of_differences / np.sqrt(seeds))


def example_weights(examples: int, draws: int, rng: np.random.Generator) -> Float[np.ndarray, "examples draws"]:
    """How often each example occurs in each bootstrap sample; a sample has as many examples as the test set."""
    chosen = rng.integers(0, examples, (examples, draws)) * draws + np.arange(draws)
    return np.bincount(chosen.ravel(), minlength=examples * draws).reshape(examples, draws).astype(np.float32)


def multi_bootstrap(
    arm: Float[np.ndarray, "seeds draws"], baseline: Float[np.ndarray, "seeds draws"], rng: np.random.Generator
) -> Float[np.ndarray, " draws"]:
    """Differences of two arms over bootstrap samples of seeds and examples together (MultiBERTs, Sellam et al. 2022).

    Column d has the scores on sample d of the test examples, by pretraining seed; both arms take the same examples and,
    because they are paired, the same seeds. With few seeds its interval is too narrow: three seeds have only ten
    different samples. So it is reported beside the t interval, and a verdict needs both.
    """
    seeds, draws = arm.shape
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).T / seeds
    return ((arm - baseline) * weights).sum(0)


def percentile_interval(samples: Float[np.ndarray, " draws"], confidence: float = CONFIDENCE) -> Interval:
    """The interval between two percentiles of bootstrap samples."""
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
