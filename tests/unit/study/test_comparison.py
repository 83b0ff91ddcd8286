"""Tests of the verdicts: planted effects are found, nulls are not, and nothing is dropped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from megamask.evaluation.outcome import CellKey
from megamask.study.comparison import (
    Contrast,
    compare_arms,
    contrast_of,
    is_equivalent,
    judge,
    missing_runs,
)
from megamask.study.measures import LOSS, ArmScores, Measure, primary_measures, reference_scores, task_scores
from megamask.study.results import Arm, StudyResults
from megamask.study.statistics import Interval, holm, multi_bootstrap, percentile_interval, t_interval, t_test_p
from megamask.study.verdicts import compare_with_control, conclusion, harness_checks, headline, missing_endpoints
from tests.unit.study.simulated import ARMS, make_cell, simulate_study

PAIRS = Measure("blimp", "zero_shot", "original", primary=True)
STUDIES = 1_000
MOST_FALSE_ALARMS = int(stats.binom.ppf(0.9999, STUDIES, 0.05))
"""A rate of 0.05 exceeds this number in 1,000 studies with a probability below 1 in 10,000."""
BETTER = Contrast(
    "entropy",
    "random",
    "tokens=1",
    PAIRS,
    {1: 1.0, 2: 1.1, 3: 1.2},
    3,
    1.1,
    Interval(0.85, 1.35),
    Interval(0.9, 1.3),
    p=0.003,
    p_holm=0.006,
)


def small_study(**settings) -> StudyResults:
    """Three tasks of few examples, one budget."""
    plain = {"tasks": ("sst2", "subj", "blimp"), "examples": 80, "budgets": ("tokens=1500000",)}
    return simulate_study(**(plain | settings))


def scores(*values: float, arm: str = "entropy", measure: Measure = PAIRS) -> ArmScores:
    return ArmScores(arm, "tokens=1", measure, dict(enumerate(values)))


def test_every_condition_of_better_is_needed() -> None:
    assert judge(BETTER) == "better"
    assert judge(replace(BETTER, seeds=2)) == "too few seeds"
    assert judge(replace(BETTER, interval=Interval(-0.1, 2))) == "no difference shown"
    assert judge(replace(BETTER, interval=None)) == "no difference shown"
    assert judge(replace(BETTER, bootstrap=Interval(-0.1, 2))) == "no difference shown"
    assert judge(replace(BETTER, p_holm=0.05)) == "no difference shown"
    assert judge(replace(BETTER, p_holm=float("nan"))) == "no difference shown"
    assert judge(replace(BETTER, delta=0.5)) == "below the margin"
    assert judge(replace(BETTER, failed=1)) == "incomplete"
    assert judge(replace(BETTER, delta=-1.1, interval=Interval(-2, -1), bootstrap=None, failed=1)) == "worse"


def test_less_loss_is_better_without_a_margin() -> None:
    contrast = replace(BETTER, measure=LOSS, delta=-0.02, interval=Interval(-0.03, -0.01), bootstrap=None)
    assert judge(contrast) == "better"
    assert judge(replace(contrast, delta=0.02, interval=Interval(0.01, 0.03))) == "worse"


@pytest.mark.parametrize(("seeds", "spread"), [(3, 5.0), (6, 0.7)])
def test_false_alarms_of_a_study_stay_below_the_stated_rate(seeds: int, spread: float) -> None:
    """Two endpoints without a difference: "better" or "worse" in at most 5 % of the studies, up to chance."""
    rng = np.random.default_rng(seeds)
    null = rng.normal(0, spread, (STUDIES, 2, seeds))
    p_values, (low, high) = t_test_p(null), t_interval(null)
    alarms = 0
    for study in range(STUDIES):
        verdicts = set()
        for endpoint, p in enumerate(holm(p_values[study].tolist())):
            samples = multi_bootstrap(np.repeat(null[study, endpoint][:, None], 100, 1), np.zeros((seeds, 100)), rng)
            interval = Interval(float(low[study, endpoint]), float(high[study, endpoint]))
            contrast = replace(
                BETTER,
                seeds=seeds,
                delta=float(null[study, endpoint].mean()),
                interval=interval,
                bootstrap=percentile_interval(samples),
                p_holm=p,
            )
            verdicts.add(judge(contrast))
        alarms += bool(verdicts & {"better", "worse"})
    assert alarms <= MOST_FALSE_ALARMS


def test_a_contrast_is_paired_by_seed() -> None:
    first, second = scores(3, 1, 2), scores(2.5, 0.4, 1.6, arm="random")
    contrast = contrast_of(first, second)
    assert contrast is not None and contrast.by_seed == pytest.approx({0: 0.5, 1: 0.6, 2: 0.4})
    assert contrast.p == pytest.approx(stats.ttest_rel([3, 1, 2], [2.5, 0.4, 1.6]).pvalue)
    unpaired = contrast_of(first, second, unpaired=True)
    assert unpaired is not None and not unpaired.by_seed
    assert unpaired.p == pytest.approx(stats.ttest_ind([3, 1, 2], [2.5, 0.4, 1.6], equal_var=False).pvalue)
    assert contrast_of(first, scores()) is None


def test_equal_differences_have_no_verdict() -> None:
    """ArmScores with few values give equal differences by chance, and their spread is unknown."""
    contrast = contrast_of(scores(2, 3, 4), scores(1, 2, 3, arm="random"))
    assert contrast is not None and contrast.interval is None
    assert judge(contrast) == "no difference shown"


def test_equivalence_needs_seeds_and_a_narrow_interval() -> None:
    close = contrast_of(scores(2.1, 3.0, 3.95, 5.02), scores(2, 3.1, 4, 5, arm="adaptive"))
    assert close is not None and is_equivalent(close)
    assert compare_with_control(close) == "control is as good"
    wide = contrast_of(scores(2, 5, 3, 8), scores(3, 3, 4, 5, arm="adaptive"))
    assert wide is not None and not is_equivalent(wide)
    assert compare_with_control(wide) == "not decided"


def test_planted_effects_and_checks() -> None:
    comparison = compare_arms(small_study(effects={"kd": 0.08, "random-half": -0.08}, noise=0.004), draws=300)
    verdicts = {(c.arm, c.measure.name): judge(c) for c in comparison.contrasts if c.measure.primary}
    assert verdicts["kd", "blimp"] == verdicts["kd", "mean"] == "better"
    assert not {v for (arm, _), v in verdicts.items() if arm not in ("kd", "random-half")} & {"better", "worse"}
    assert [check.state for check in harness_checks(comparison)] == ["passed", "passed"]
    assert conclusion(comparison, "kd", "tokens=1500000") == "Helps on BLiMP and Mean of tasks."
    assert conclusion(comparison, "entropy", "tokens=1500000") == "Not shown to help."
    assert (
        headline(comparison) == "Shown to be better than Random masks: Distillation after start (BLiMP; Mean of tasks)."
    )


def test_two_seeds_never_give_a_verdict() -> None:
    comparison = compare_arms(small_study(seeds=2, effects={"kd": 0.2}), draws=100)
    assert {judge(contrast) for contrast in comparison.contrasts} == {"too few seeds"}
    assert {check.state for check in harness_checks(comparison)} == {"not decided"}
    assert headline(comparison).startswith("No arm is shown to be better")


def test_a_repetition_that_differs_takes_back_the_conclusion() -> None:
    arms = tuple(arm for arm in ARMS if arm.name in ("random", "kd", "random-again"))
    comparison = compare_arms(
        small_study(arms=arms, effects={"kd": 0.08, "random-again": 0.08}, noise=0.004), draws=100
    )
    assert harness_checks(comparison)[0].state == "failed"
    assert conclusion(comparison, "kd", "tokens=1500000").startswith("Not shown to help: better on")
    without = compare_arms(small_study(arms=arms[:2], effects={"kd": 0.08}, noise=0.004), draws=100)
    assert "no repetition of the baseline" in conclusion(without, "kd", "tokens=1500000")


def test_collapsed_cells_are_counted_and_stay_in_the_mean() -> None:
    results = small_study(arms=ARMS[:2])
    measure = Measure("sst2", "frozen", "first")
    before = task_scores(results, "entropy", "tokens=1500000", measure)
    key = ("entropy", 1, "tokens=1500000")
    index = next(n for n, cell in enumerate(results.cells[key]) if cell.key.task == "sst2")
    cells = list(results.cells[key])
    labels = np.array(cells[index].labels)
    cells[index] = make_cell(cells[index].key, np.zeros_like(labels), labels, "collapsed", "one class")
    collapsed = task_scores(replace(results, cells={**results.cells, key: tuple(cells)}), "entropy", key[2], measure)
    assert (collapsed.collapsed, collapsed.failed, len(collapsed.by_seed)) == (1, 0, 6)
    assert collapsed.by_seed[1] == pytest.approx(100 * np.mean(labels == 0)) != before.by_seed[1]
    cells[index] = make_cell(cells[index].key, labels, labels, "failed", "out of memory")
    failed = task_scores(replace(results, cells={**results.cells, key: tuple(cells)}), "entropy", key[2], measure)
    assert (failed.collapsed, failed.failed, failed.cells, len(failed.by_seed)) == (0, 1, 6, 5)


def test_fine_tuning_seeds_are_averaged_before_pretraining_seeds() -> None:
    labels = np.array([0.0, 1.0, 1.0, 0.0])
    right = {1: ([4, 2], 0), 2: ([1], 0)}  # right answers of each fine-tuning seed
    cells = {
        ("random", seed, "tokens=1"): tuple(
            make_cell(
                CellKey("random", "sst2", "fine_tuned", n, ""), np.where(np.arange(4) < k, labels, 1 - labels), labels
            )
            for n, k in enumerate(counts)
        )
        for seed, (counts, _) in right.items()
    }
    results = replace(small_study(seeds=2, arms=ARMS[:1]), cells=cells, runs=(), budgets=("tokens=1",))
    reached = task_scores(results, "random", "tokens=1", Measure("sst2", "fine_tuned"))
    assert reached.by_seed == {1: 75.0, 2: 25.0}
    assert reached.mean == 50.0


def test_a_failed_run_is_counted_and_forbids_better() -> None:
    results = small_study(arms=ARMS[:3], effects={"kd": 0.08}, noise=0.004)
    runs = tuple(
        replace(run, state="failed", reason="loss is NaN") if (run.arm, run.seed) == ("kd", 6) else run
        for run in results.runs
    )
    cells = {key: cells for key, cells in results.cells.items() if key[:2] != ("kd", 6)}
    failed = replace(results, runs=runs, cells=cells)
    comparison = compare_arms(failed, draws=100)
    verdicts = {c.measure.name: judge(c) for c in comparison.contrasts if c.arm == "kd" and c.measure.primary}
    assert set(verdicts.values()) == {"incomplete"}
    assert missing_runs(failed) == ["kd, seed 6, tokens=1500000: failed: loss is NaN"]


def test_the_mean_needs_every_task_and_its_declared_mode() -> None:
    results = small_study(arms=ARMS[:1])
    assert primary_measures(results)[1] == Measure("mean", "frozen", "mean", primary=True)
    declared = replace(results, mean_mode="frozen", mean_variant="first")
    assert primary_measures(declared)[1].variant == "first"
    by_plan = replace(results, mean_mode="frozen", mean_variant="")
    assert primary_measures(by_plan)[1].variant == "mean"
    absent = compare_arms(replace(results, mean_mode="zero_shot"), draws=10)
    assert [measure.name for measure in absent.primary] == ["blimp"]
    assert len(missing_endpoints(absent)) == 1
    key = ("random", 2, "tokens=1500000")
    cells = tuple(cell for cell in results.cells[key] if cell.key.task != "subj")
    comparison = compare_arms(replace(results, cells={**results.cells, key: cells}), draws=10)
    assert sorted(comparison.scores["random", key[2], comparison.primary[1]].by_seed) == [1, 3, 4, 5, 6]


def test_without_stored_predictions_only_seeds_are_resampled() -> None:
    results = small_study(arms=ARMS[:2])
    short = {
        key: tuple(replace(cell, predictions=(), labels=()) for cell in cells) for key, cells in results.cells.items()
    }
    stored, without = compare_arms(results, draws=400), compare_arms(replace(results, cells=short), draws=400)
    assert not stored.not_resampled
    assert any("SST-2 (frozen, first): predictions" in problem for problem in without.not_resampled)
    for first, second in zip(stored.contrasts, without.contrasts, strict=True):
        assert (first.delta, first.p, first.p_holm) == (second.delta, second.p, second.p_holm)
        if first.measure.name == "sst2" and first.bootstrap and second.bootstrap:
            wide, narrow = first.bootstrap, second.bootstrap
            assert wide.high - wide.low > narrow.high - narrow.low


def test_random_weights_count_in_their_own_mode() -> None:
    results, labels = small_study(arms=ARMS[:1], seeds=2), np.array([0.0, 1.0, 1.0, 0.0])
    answers = {"majority": 2, "random_weights_frozen_mean": 3, "random_weights_frozen_first": 1}
    references = tuple(
        make_cell(
            CellKey("reference", "sst2", "reference", 0, kind),
            np.where(np.arange(4) < right, labels, 1 - labels),
            labels,
        )
        for kind, right in answers.items()
    )
    results = replace(results, references=references)
    assert reference_scores(results, Measure("sst2", "frozen", "mean")) == {"majority": 50, "random_weights": 75}
    assert reference_scores(results, Measure("sst2", "frozen", "first")) == {"majority": 50, "random_weights": 25}
    assert reference_scores(results, Measure("sst2", "fine_tuned")) == {"majority": 50}


def test_roles_decide_what_is_compared() -> None:
    comparison = compare_arms(small_study(seeds=3), draws=20)
    assert {(c.arm, c.against) for c in comparison.with_controls} == {
        (arm.name, "adaptive") for arm in ARMS if arm.role == "method"
    }
    assert all(np.isnan(c.p_study) for c in comparison.contrasts if c.arm == "random-again" or not c.measure.primary)
    repeated = [c for c in comparison.contrasts if c.arm == "random-again"]
    assert all(not contrast.by_seed for contrast in repeated)  # other seeds, so nothing is paired
    assert Arm("x", "X", "check").role == "check"
