"""Write the report of a study: `report.html`, and with the same numbers `report.md` and `results.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from megamask.storage import atomic_write
from megamask.study.comparison import StudyComparison, compare_arms, judge
from megamask.study.measures import Measure, budget_title
from megamask.study.report_blocks import Report
from megamask.study.report_context import (
    ablation_section,
    comparability_section,
    mask_section,
    reference_section,
    sensitivity_section,
)
from megamask.study.report_findings import curve_section, difference_section, verdict_section
from megamask.study.report_html import render_html
from megamask.study.report_markdown import render_markdown
from megamask.study.report_provenance import provenance_section
from megamask.study.report_scores import budget_section, score_section
from megamask.study.results import StudyResults
from megamask.study.statistics import Interval

ARM_COLUMNS = ("budget", "arm", "title", "role", "measure", "mode", "variant", "unit", "primary")
SCORE_COLUMNS = ("seeds", "mean", "low", "high", "median", "minimum", "cells", "collapsed", "failed")
DIFFERENCE_COLUMNS = ("difference", "difference_low", "difference_high", "bootstrap_low", "bootstrap_high")
TEST_COLUMNS = ("share_not_better", "p", "p_sign_flip", "p_holm", "p_study", "p_equivalent", "paired_seeds", "verdict")
COLUMNS = (*ARM_COLUMNS, *SCORE_COLUMNS, *DIFFERENCE_COLUMNS, *TEST_COLUMNS)
"""Of `results.csv`: a row for each budget, arm and measure. Differences are from the baseline."""


def write_report(results: StudyResults, folder: Path) -> None:
    """Write the three files into ``folder``, each whole or not at all."""
    comparison = compare_arms(results)
    report = build_report(comparison)
    atomic_write.write_atomic(folder / "report.html", render_html(report))
    atomic_write.write_atomic(folder / "report.md", render_markdown(report))
    atomic_write.write_atomic(folder / "results.csv", render_csv(comparison))


def build_report(comparison: StudyComparison) -> Report:
    """All sections, in the order in which a reader asks."""
    results = comparison.results
    finished = sum(run.state == "finished" for run in results.runs)
    cells = sum(map(len, results.cells.values()))
    facts = (
        f"{len(results.arms)} arms, {len(results.seeds)} pretraining seeds",
        f"Budgets: {', '.join(map(budget_title, results.budgets))}",
        f"{finished} of {len(results.runs)} pretraining runs finished, {cells} evaluations",
        "Primary endpoints, fixed in the plan: the macro average of BLiMP, and the mean of "
        f"{', '.join(Measure(task).title for task in results.mean_tasks) or 'no task'}",
    )
    sections = (
        verdict_section(comparison),
        budget_section(comparison),
        score_section(comparison),
        difference_section(comparison),
        curve_section(comparison),
        mask_section(comparison),
        ablation_section(comparison),
        sensitivity_section(comparison),
        reference_section(comparison),
        comparability_section(comparison),
        provenance_section(comparison),
    )
    return Report(results.name, results.question, facts, sections)


def render_csv(comparison: StudyComparison) -> str:
    """`results.csv`: empty fields where there is nothing to say."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for budget in comparison.results.budgets:
        for arm in comparison.results.arms:
            for measure in comparison.measures:
                scores = comparison.scores[arm.name, budget, measure]
                if not scores.cells:
                    continue
                contrast = comparison.contrast(arm.name, budget, measure)
                row: list[object] = [
                    budget,
                    arm.name,
                    arm.title,
                    arm.role,
                    measure.name,
                    measure.mode or "",
                    measure.variant,
                    measure.unit,
                    "yes" if measure.primary else "no",
                ]
                row += [len(scores.by_seed), scores.mean, *_ends(scores.interval), scores.median, scores.minimum]
                row += [scores.cells, scores.collapsed, scores.failed]
                if contrast is not None:
                    row += [contrast.delta, *_ends(contrast.interval), *_ends(contrast.bootstrap)]
                    row += [contrast.share_not_better, contrast.p, contrast.p_sign_flip, contrast.p_holm]
                    row += [contrast.p_study, contrast.p_equivalent, contrast.seeds, judge(contrast)]
                writer.writerow(_fields(row + [""] * (len(COLUMNS) - len(row))))
    return buffer.getvalue()


def _ends(interval: Interval | None) -> tuple[float, float]:
    return (interval.low, interval.high) if interval else (float("nan"), float("nan"))


def _fields(row: Sequence[object]) -> list[str]:
    return [("" if value != value else f"{value:.12g}") if isinstance(value, float) else str(value) for value in row]
