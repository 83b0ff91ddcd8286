"""The sentences of a report that state what a study has shown; every word follows from the numbers.

A method "helps" in an endpoint if its verdict there is "better" and the study's own check holds: the arm that repeats
the baseline with other seeds shows no difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megamask.study.comparison import (
    MIN_SEEDS,
    Contrast,
    StudyComparison,
    is_equivalent,
    judge,
    repeats_baseline,
)
from megamask.study.measures import LOSS, Measure, budget_title, primary_measures
from megamask.study.results import Arm, StudyResults
from megamask.study.statistics import detectable_effect, smallest_sign_flip_p

CheckState = Literal["passed", "failed", "not decided"]


@dataclass(frozen=True)
class HarnessCheck:
    """What an arm that tests the study must show, and what it shows."""

    arm: Arm
    budget: str
    expected: str
    shown: str
    state: CheckState


def harness_checks(comparison: StudyComparison) -> list[HarnessCheck]:
    """One for each arm with the role `check` and each budget in which it has scores."""
    checks = []
    for arm in (arm for arm in comparison.results.arms if arm.role == "check"):
        for budget in comparison.results.budgets:
            measures = comparison.primary if repeats_baseline(arm) else (*comparison.primary, LOSS)
            contrasts = [comparison.contrast(arm.name, budget, measure) for measure in measures]
            known = [contrast for contrast in contrasts if contrast is not None]
            if known:
                checks.append(_check(arm, budget, known))
    return checks


def _check(arm: Arm, budget: str, contrasts: list[Contrast]) -> HarnessCheck:
    verdicts = [judge(contrast) for contrast in contrasts]
    pairs = zip(contrasts, verdicts, strict=True)
    shown = "; ".join(f"{contrast.measure.title}: {verdict}" for contrast, verdict in pairs)
    if repeats_baseline(arm):
        expected = "no difference in a primary endpoint"
        passed = all(verdict in ("no difference shown", "too few seeds") for verdict in verdicts)
    else:
        expected = "worse in an endpoint or the loss, better in none"
        passed = "worse" in verdicts and not {"better", "incomplete"} & set(verdicts)
    decided = all(contrast.seeds >= MIN_SEEDS for contrast in contrasts)
    state: CheckState = "not decided" if not decided else "passed" if passed else "failed"
    return HarnessCheck(arm, budget, expected, shown, state)


def null_check(comparison: StudyComparison, budget: str) -> CheckState | Literal["absent"]:
    """The state of the arm that repeats the baseline with other seeds, at ``budget``."""
    checks = [c for c in harness_checks(comparison) if repeats_baseline(c.arm) and c.budget == budget]
    if not checks:
        return "absent"
    return next((check.state for check in checks if check.state != "passed"), "passed")


def conclusion(comparison: StudyComparison, arm: str, budget: str) -> str:
    """Whether an arm helps at a budget, as a sentence."""
    contrasts = [comparison.contrast(arm, budget, measure) for measure in comparison.primary]
    verdicts = [(c.measure.title, judge(c)) for c in contrasts if c is not None]
    if not verdicts:
        return "No score yet."
    better = [title for title, verdict in verdicts if verdict == "better"]
    worse = [title for title, verdict in verdicts if verdict == "worse"]
    hurts = f" It is worse on {_and(worse)}." if worse else ""
    if not better:
        return hurts.strip() or "Not shown to help."
    match null_check(comparison, budget):
        case "passed":
            return f"Helps on {_and(better)}.{hurts}"
        case "failed":
            return (
                f"Not shown to help: better on {_and(better)}, but the baseline differs from its own repetition.{hurts}"
            )
    return f"Better on {_and(better)}; no repetition of the baseline with other seeds confirms the method.{hurts}"


def headline(comparison: StudyComparison) -> str:
    """What the study shows, in one to three sentences."""
    results = comparison.results
    baseline = results.arms[0].title
    if not comparison.contrasts:
        return "The study has no results to compare yet."
    if not comparison.primary:
        return "The primary endpoints have no scores yet: only masked losses can be compared."
    sentences = []
    for verdict, words in (("better", "better than"), ("worse", "worse than")):
        arms = _arms_with(comparison, verdict)
        if arms:
            sentences.append(f"Shown to be {words} {baseline}: {'; '.join(arms)}.")
    if not any(sentence.startswith("Shown to be better") for sentence in sentences):
        sentences.insert(0, f"No arm is shown to be better than {baseline}.")
    if _few_seeds(comparison):
        sentences.append(f"Comparisons with fewer than {MIN_SEEDS} paired seeds have no verdict.")
    return " ".join(sentences)


def missing_endpoints(comparison: StudyComparison) -> list[str]:
    """A sentence for each primary endpoint of the plan that has no score."""
    return [
        f"The primary endpoint {measure.full_title} has no score: no cell of its tasks has this mode and variant."
        for measure in primary_measures(comparison.results)
        if measure not in comparison.primary and (measure.name != "mean" or comparison.results.mean_tasks)
    ]


def _arms_with(comparison: StudyComparison, verdict: str) -> list[str]:
    """`TITLE (BLiMP; Mean of tasks at 1,500,000 tokens)` for each arm, checks excluded; no budget where it is all."""
    lines, budgets = [], comparison.results.budgets
    for arm in (arm for arm in comparison.results.arms[1:] if arm.role != "check"):
        places = []
        for measure in comparison.primary:
            contrasts = [(budget, comparison.contrast(arm.name, budget, measure)) for budget in budgets]
            shown = [budget_title(budget) for budget, c in contrasts if c is not None and judge(c) == verdict]
            if shown:
                places.append(measure.title + ("" if len(shown) == len(budgets) else f" at {_and(shown)}"))
        if places:
            lines.append(f"{arm.title} ({'; '.join(places)})")
    return lines


def _few_seeds(comparison: StudyComparison) -> bool:
    return any(c.measure.primary and c.seeds < MIN_SEEDS for c in comparison.contrasts)


def compare_with_control(contrast: Contrast) -> str:
    """What a method minus a control shows: a control that costs nothing may be as good."""
    if is_equivalent(contrast):
        return "control is as good"
    verdict = judge(contrast)
    return {"better": "method is better", "worse": "control is better"}.get(verdict, "not decided")


def what_seeds_can_show(comparison: StudyComparison) -> list[str]:
    """For each primary endpoint and budget: the effect that the seeds detect, given the spread that was observed."""
    lines = []
    methods = {arm.name for arm in comparison.results.arms[1:] if arm.role != "check"}
    for budget in comparison.results.budgets:
        for measure in comparison.primary:
            spreads = [
                (contrast.spread, contrast.seeds)
                for contrast in comparison.contrasts
                if contrast.arm in methods and (contrast.budget, contrast.measure) == (budget, measure)
                if contrast.spread == contrast.spread and contrast.seeds >= MIN_SEEDS
            ]
            if not spreads:
                continue
            seeds = min(number for _, number in spreads)
            sd = (sum(spread**2 for spread, _ in spreads) / len(spreads)) ** 0.5
            place, effect = f"{measure.title} at {budget_title(budget)}", detectable_effect(seeds, sd)
            lines.append(
                f"{place}: paired differences have a standard deviation of {sd:.2f} points, so {seeds} seeds detect a "
                f"true difference of {effect:.2f} points with 80 % power in one t test. The smallest p of a sign flip "
                f"is {smallest_sign_flip_p(seeds):.3g}."
            )
    return lines


def flops_ratio(results: StudyResults, arm: str, budget: str) -> float:
    """FLOPs of an arm relative to the baseline's, as means over finished runs; NaN if they are not known."""

    def mean(name: str) -> float:
        totals = [
            sum(r.flops.values()) for r in results.runs if (r.arm, r.budget, r.state) == (name, budget, "finished")
        ]
        return sum(totals) / len(totals) if totals else 0.0

    of_baseline = mean(results.arms[0].name)
    return mean(arm) / of_baseline if of_baseline and mean(arm) else float("nan")


def difference_text(contrast: Contrast) -> str:
    """`+1.2 [+0.4, +2.0]`, in the unit of the measure."""
    digits = _digits(contrast.measure)
    if contrast.interval is None:
        return f"{contrast.delta:+.{digits}f} [spread unknown]"
    return f"{contrast.delta:+.{digits}f} [{contrast.interval.low:+.{digits}f}, {contrast.interval.high:+.{digits}f}]"


def _digits(measure: Measure) -> int:
    return 3 if measure == LOSS else 2


def _and(names: list[str]) -> str:
    return " and ".join(names)
