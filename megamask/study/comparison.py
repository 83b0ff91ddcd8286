"""Compare the arms of a study with its baseline: differences, intervals, p-values and a verdict for each measure.

The rule of a verdict is in `judge`. It never says "better" below three seeds, where an interval contains zero, or for
an arm with failed runs. Cost: seconds, for the bootstrap over test examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megamask.study.bootstrap_scores import BootstrapScores
from megamask.study.measures import LOSS, ArmScores, Measure, primary_measures, scores_of, seeds_of, task_measures
from megamask.study.results import Arm, StudyResults
from megamask.study.statistics import (
    Interval,
    equivalence_p,
    holm,
    multi_bootstrap,
    percentile_interval,
    sign_flip_p,
    t_interval,
    t_test_p,
    welch_interval,
)

Verdict = Literal["better", "worse", "below the margin", "no difference shown", "too few seeds", "incomplete"]
LEVEL = 0.05
"""Significance level of every test."""
MARGIN = 0.5
"""Margin in points: a smaller difference is not called better or worse, and two arms within it count as equal."""
MIN_SEEDS = 3


@dataclass(frozen=True)
class Contrast:
    """One arm minus another in one measure, at one budget."""

    arm: str
    against: str
    budget: str
    measure: Measure
    by_seed: Mapping[int, float]
    """The difference of each shared pretraining seed; empty if the arms share none."""
    seeds: int
    """Shared seeds, or the smaller number of seeds if they share none."""
    delta: float
    """Mean difference, in the measure's unit; NaN if an arm has no score."""
    interval: Interval | None
    """Student's paired interval, or Welch's if the arms share no seed; None if the spread is unknown."""
    bootstrap: Interval | None = None
    """Bootstrap interval over seeds and test examples together; None for the loss and without shared seeds."""
    share_not_better: float = float("nan")
    """Share of the bootstrap samples in which the arm is not better."""
    p: float = float("nan")
    """p of the t test."""
    p_sign_flip: float = float("nan")
    p_holm: float = float("nan")
    """``p`` adjusted by Holm: over the two primary endpoints, or over the tasks of one mode."""
    p_study: float = float("nan")
    """``p`` adjusted by Holm over both endpoints of all arms of the budget; NaN for other measures."""
    p_equivalent: float = float("nan")
    """p of the two one-sided tests for a difference within the margin; NaN for the loss."""
    failed: int = 0
    """Number of runs and cells of the arm that failed. The others may be its better half."""

    @property
    def spread(self) -> float:
        """Standard deviation of the paired differences; NaN for fewer than two."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if len(self.by_seed) > 1 else float("nan")


def judge(contrast: Contrast) -> Verdict:
    """The verdict on a contrast whose p-values are adjusted.

    "better" needs all of: three seeds; a t interval and, if there is one, a bootstrap interval that exclude zero; an
    adjusted p below 0.05; for scores, more than 0.5 points; no failed run or cell. "worse" needs all but the last.
    """
    if contrast.seeds < MIN_SEEDS:
        return "too few seeds"
    certain = contrast.interval is not None and contrast.interval.excludes(0) and contrast.p_holm < LEVEL
    if not certain or (contrast.bootstrap is not None and not contrast.bootstrap.excludes(0)):
        return "no difference shown"
    if contrast.measure != LOSS and abs(contrast.delta) <= MARGIN:
        return "below the margin"
    if contrast.delta * contrast.measure.sign < 0:
        return "worse"
    return "incomplete" if contrast.failed else "better"


def is_equivalent(contrast: Contrast) -> bool:
    """Whether the difference is shown to lie within the margin (two one-sided tests, three seeds at least)."""
    return contrast.seeds >= MIN_SEEDS and contrast.p_equivalent < LEVEL


@dataclass(frozen=True)
class StudyComparison:
    """All scores and contrasts of a study."""

    results: StudyResults
    primary: tuple[Measure, ...]
    """The declared endpoints that have a score."""
    tasks: tuple[Measure, ...]
    scores: Mapping[tuple[str, str, Measure], ArmScores]
    """By arm, budget and measure."""
    contrasts: tuple[Contrast, ...]
    """Every arm but the baseline, against the baseline."""
    with_controls: tuple[Contrast, ...]
    """Every method against every control, in the primary endpoints."""
    not_resampled: tuple[str, ...]
    """Tasks whose test examples could not be resampled, with the reason."""

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The primary endpoints, the tasks that are not one, and the loss."""
        return (*self.primary, *(measure for measure in self.tasks if measure not in self.primary), LOSS)

    def contrast(self, arm: str, budget: str, measure: Measure) -> Contrast | None:
        """The contrast of ``arm`` with the baseline; None if one of them has no score."""
        matching = (c for c in self.contrasts if (c.arm, c.budget, c.measure) == (arm, budget, measure))
        return next(matching, None)


def compare_arms(results: StudyResults, draws: int = 2000) -> StudyComparison:
    """Compare all arms; ``draws`` is the number of bootstrap samples."""
    tasks = tuple(task_measures(results))
    measures = {*primary_measures(results), *tasks, LOSS}
    scores = {
        (arm.name, budget, measure): scores_of(results, arm.name, budget, measure)
        for arm in results.arms
        for budget in results.budgets
        for measure in measures
    }
    with_scores = {measure for (_, _, measure), reached in scores.items() if reached.by_seed}
    primary = tuple(measure for measure in primary_measures(results) if measure in with_scores)
    resampled = BootstrapScores(results, tasks, draws)
    pairs = [(arm.name, results.arms[0].name) for arm in results.arms[1:]]
    contrasts = _contrasts(results, pairs, [*primary, *(t for t in tasks if t not in primary), LOSS], scores, resampled)
    controls = [arm.name for arm in results.arms if arm.role == "control"]
    pairs = [(arm.name, control) for arm in results.arms if arm.role == "method" for control in controls]
    return StudyComparison(
        results,
        primary,
        tasks,
        scores,
        tuple(_adjusted(contrasts, results)),
        tuple(_adjusted(_contrasts(results, pairs, primary, scores, resampled), results)),
        resampled.problems,
    )


def repeats_baseline(arm: Arm) -> bool:
    """Whether an arm differs from the baseline in its seeds only, so that it must show no difference."""
    return arm.role == "check" and set(arm.changes) <= {"seed"}


def _contrasts(
    results: StudyResults,
    pairs: Sequence[tuple[str, str]],
    measures: Sequence[Measure],
    scores: Mapping[tuple[str, str, Measure], ArmScores],
    resampled: BootstrapScores,
) -> list[Contrast]:
    unpaired = {arm.name for arm in results.arms if repeats_baseline(arm)}
    contrasts = [
        contrast_of(scores[arm, budget, measure], scores[other, budget, measure], resampled, arm in unpaired)
        for budget in results.budgets
        for arm, other in pairs
        for measure in measures
    ]
    return [contrast for contrast in contrasts if contrast is not None]


def contrast_of(
    first: ArmScores, second: ArmScores, resampled: BootstrapScores | None = None, unpaired: bool = False
) -> Contrast | None:
    """``first`` minus ``second``, not adjusted yet; None if one of them has no score."""
    if not first.by_seed or not second.by_seed:
        return None
    common = sorted(set(first.by_seed) & set(second.by_seed))
    contrast = Contrast(
        first.arm, second.arm, first.budget, first.measure, {}, 0, float("nan"), None, failed=first.failed
    )
    if unpaired or not common:
        interval, p = welch_interval(first.values, second.values)
        seeds = min(len(first.by_seed), len(second.by_seed))
        return replace(contrast, seeds=seeds, delta=first.mean - second.mean, interval=interval, p=p)
    by_seed = {seed: first.by_seed[seed] - second.by_seed[seed] for seed in common}
    differences = np.array(list(by_seed.values()), dtype=float)
    p, (low, high) = float(t_test_p(differences)), t_interval(differences)
    contrast = replace(
        contrast,
        by_seed=by_seed,
        seeds=len(common),
        delta=float(differences.mean()),
        interval=None if np.isnan(p) else Interval(float(low), float(high)),
        p=p,
        p_sign_flip=float(sign_flip_p(differences)) if len(common) > 1 else float("nan"),
    )
    if contrast.measure == LOSS:
        return contrast
    contrast = replace(contrast, p_equivalent=float(equivalence_p(differences, MARGIN)))
    draws = resampled and resampled.of_pair(first.arm, second.arm, first.budget, first.measure, common)
    if not draws:
        return contrast
    samples = multi_bootstrap(*draws, np.random.default_rng(0))
    return replace(contrast, bootstrap=percentile_interval(samples), share_not_better=float(np.mean(samples <= 0)))


def _adjusted(contrasts: Sequence[Contrast], results: StudyResults) -> list[Contrast]:
    """With Holm's p-values: the two primary endpoints are a family, and so are the tasks of each mode and variant."""
    checks = {arm.name for arm in results.arms if arm.role == "check"}
    families: dict[tuple, list[int]] = {}
    studies: dict[str, list[int]] = {}
    for number, contrast in enumerate(contrasts):
        measure = contrast.measure
        pair = (contrast.arm, contrast.against, contrast.budget)
        kind = "primary" if measure.primary else (measure.mode, measure.variant)
        families.setdefault((*pair, kind), []).append(number)
        if measure.primary and contrast.arm not in checks:
            studies.setdefault(contrast.budget, []).append(number)
    adjusted = list(contrasts)
    for family in families.values():
        for number, p in zip(family, holm([contrasts[n].p for n in family]), strict=True):
            adjusted[number] = replace(adjusted[number], p_holm=p)
    for family in studies.values():
        for number, p in zip(family, holm([contrasts[n].p for n in family]), strict=True):
            adjusted[number] = replace(adjusted[number], p_study=p)
    return adjusted


def missing_runs(results: StudyResults) -> list[str]:
    """The runs of the plan that are not finished, as `ARM, seed, budget: state`."""
    states = {(run.arm, run.seed, run.budget): run for run in results.runs}
    lines = []
    for arm, budget in ((arm, budget) for arm in results.arms for budget in results.budgets):
        planned = set() if repeats_baseline(arm) else set(results.seeds)
        for seed in sorted(planned.union(seeds_of(results, arm.name, budget))):
            run = states.get((arm.name, seed, budget))
            if run is None or run.state != "finished":
                state = "not run" if run is None else f"{run.state}{': ' + run.reason if run.reason else ''}"
                lines.append(f"{arm.name}, seed {seed}, {budget}: {state}")
    return lines
