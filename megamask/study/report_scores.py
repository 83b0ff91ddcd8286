"""The tables of a report: what each arm has used, and what it has reached."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megamask.study import charts
from megamask.study.comparison import LEVEL, MIN_SEEDS, Contrast, StudyComparison, contrast_of
from megamask.study.measures import ArmScores, Measure, budget_title, reference_scores
from megamask.study.report_blocks import Block, Chart, ChartGrid, Entry, ItemList, ReportTable, Section, Text
from megamask.study.results import Arm, PretrainingRun
from megamask.study.statistics import holm
from megamask.study.verdicts import flops_ratio


def budget_section(comparison: StudyComparison) -> Section:
    """What each arm has used."""
    results = comparison.results
    parts = sorted({part for run in results.runs for part, flops in run.flops.items() if flops})
    blocks: list[Block] = []
    for budget in results.budgets:
        rows = []
        for arm in results.arms:
            runs = [run for run in results.runs if (run.arm, run.budget) == (arm.name, budget)]
            if runs:
                ratio = flops_ratio(results, arm.name, budget)
                rows.append((arm_entry(arm), *_budget_entries(runs, parts, ratio)))
        if rows:
            columns = (
                "Arm",
                "Finished runs",
                "Steps",
                "Tokens",
                *(f"FLOPs: {part}" for part in parts),
                "FLOPs",
                "FLOPs / baseline",
                "Hours",
                "Tokens/s",
                "Peak memory",
            )
            blocks.append(ReportTable(f"Means over the finished runs at {budget_title(budget)}", columns, tuple(rows)))
    blocks.append(
        Text("FLOPs of logits are part of the student's and the teacher's. Energy was not measured.", "muted")
    )
    if not results.runs:
        blocks = [Text("No pretraining run has been recorded.", "warning")]
    return Section("budgets", "Budgets", tuple(blocks))


def score_section(comparison: StudyComparison) -> Section:
    """Mean and interval of each arm in each task, and a chart with every run."""
    results = comparison.results
    blocks: list[Block] = []
    drawn = charts.chart_measures(comparison)
    others = [measure for measure in comparison.tasks if measure not in drawn]
    for number, budget in enumerate(results.budgets):
        for measures, folded in ((drawn, False), (others, True)):
            table = _score_table(comparison, budget, measures, folded)
            if table.rows:
                blocks.append(table)
        made = [charts.score_chart(comparison, budget, m, f"scores-{number}-{n}") for n, m in enumerate(drawn)]
        blocks.append(
            chart_grid(
                f"Every run at {budget_title(budget)}. A dot is a pretraining seed; the diamond is the mean with its "
                "95 % interval; dotted lines are scores without a pretrained model.",
                made,
            )
        )
    blocks.append(
        Text(
            "Points, mean ± half of the 95 % t interval over pretraining seeds; fine-tuning seeds are averaged "
            "first. Small print: the median, and collapsed or failed cells, which are counted, never dropped. "
            f"Bold: differs from the second best with p below {LEVEL:g} after Holm over the columns.",
            "muted",
        )
    )
    return Section("scores", "Scores", tuple(block for block in blocks if not is_empty(block)))


def arm_entry(arm: Arm) -> Entry:
    """The first cell of a row: the title of an arm and its role."""
    return Entry(arm.title, small=arm.role)


def chart_grid(caption: str, made: Sequence[Chart | None]) -> ChartGrid:
    """The charts that could be made."""
    return ChartGrid(caption, tuple(chart for chart in made if chart is not None))


def is_empty(block: Block) -> bool:
    """Whether a block shows nothing."""
    return (isinstance(block, ChartGrid) and not block.charts) or (isinstance(block, ItemList) and not block.items)


def _budget_entries(runs: Sequence[PretrainingRun], parts: Sequence[str], ratio: float) -> list[Entry]:
    done = [run for run in runs if run.state == "finished"]
    failed = sum(run.state == "failed" for run in runs)
    states = Entry(f"{len(done)} of {len(runs)}", small=f"{failed} failed" if failed else "")
    if not done:
        return [states, *[Entry("none", tone="muted")] * (len(parts) + 7)]

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    seconds, tokens = mean([run.seconds for run in done]), mean([run.tokens for run in done])
    return [
        states,
        Entry(f"{mean([run.steps for run in done]):,.0f}"),
        Entry(f"{tokens:,.0f}"),
        *(Entry(_power(mean([run.flops.get(part, 0.0) for run in done]))) for part in parts),
        Entry(_power(mean([sum(run.flops.values()) for run in done]))),
        Entry(f"{ratio:.2f}" if ratio == ratio else "unknown"),
        Entry(f"{seconds / 3600:.2f}"),
        Entry(f"{tokens / seconds:,.0f}" if seconds else "unknown"),
        Entry(f"{max(run.peak_memory for run in done) / 2**30:.2f} GiB"),
    ]


def _power(value: float) -> str:
    return f"{value:.2e}".replace("e+", "e") if value else "0"


def _score_table(comparison: StudyComparison, budget: str, measures: Sequence[Measure], folded: bool) -> ReportTable:
    results = comparison.results
    measures = [m for m in measures if any(comparison.scores[a.name, budget, m].by_seed for a in results.arms)]
    bold = _clear_winners(comparison, budget, measures)
    rows = []
    for arm in results.arms if measures else ():
        scores = [comparison.scores[arm.name, budget, measure] for measure in measures]
        if any(reached.cells for reached in scores):
            rows.append(
                (arm_entry(arm), *(score_entry(reached, (arm.name, reached.measure) in bold) for reached in scores))
            )
    references = [reference_scores(results, measure) for measure in measures]
    for kind in sorted({kind for of_measure in references for kind in of_measure}) if rows else ():
        cells = [Entry(f"{points[kind]:.1f}" if kind in points else "none", tone="muted") for points in references]
        rows.append((Entry(kind.replace("_", " "), small="without pretraining"), *cells))
    what = "Other modes and variants" if folded else "Scores"
    title = f"{what} at {budget_title(budget)}"
    if not folded and any(measure.name == "mean" for measure in measures):
        title += f"; the mean is that of {', '.join(Measure(task).title for task in results.mean_tasks)}"
    names = tuple(m.full_title if folded or not _plain(m, measures) else m.title for m in measures)
    return ReportTable(title, ("Arm", *names), tuple(rows), folded)


def _plain(measure: Measure, measures: Sequence[Measure]) -> bool:
    """Whether its short title names it."""
    return sum(other.title == measure.title for other in measures) == 1


def score_entry(scores: ArmScores, bold: bool) -> Entry:
    """`74.1 ± 0.8`, and below it the median and what collapsed or failed."""
    digits = scores.measure.digits
    if not scores.by_seed:
        return Entry("none", small=f"{scores.failed} of {scores.cells} failed" if scores.failed else "", tone="muted")
    interval = scores.interval
    half = f" ± {(interval.high - interval.low) / 2:.{digits}f}" if interval else ""
    notes = [f"median {scores.median:.{digits}f}"]
    notes += [f"{scores.collapsed} of {scores.cells} collapsed"] if scores.collapsed else []
    notes += [f"{scores.failed} of {scores.cells} failed"] if scores.failed else []
    return Entry(f"{scores.mean:.{digits}f}{half}", small="; ".join(notes), strong=bold)


def _clear_winners(comparison: StudyComparison, budget: str, measures: Sequence[Measure]) -> set[tuple[str, Measure]]:
    """The best arm of each column that differs from the runner-up after Holm over the columns."""
    leaders: list[tuple[Contrast, Measure]] = []
    for measure in measures:
        reached = [
            comparison.scores[arm.name, budget, measure] for arm in comparison.results.arms if arm.role != "check"
        ]
        ranked = sorted((s for s in reached if s.by_seed), key=lambda s: -s.mean * measure.sign)
        contrast = contrast_of(ranked[0], ranked[1]) if len(ranked) > 1 else None
        if contrast is not None:
            leaders.append((contrast, measure))
    adjusted = holm([contrast.p for contrast, _ in leaders])
    return {
        (contrast.arm, measure)
        for (contrast, measure), p in zip(leaders, adjusted, strict=True)
        if p < LEVEL and contrast.seeds >= MIN_SEEDS and not contrast.failed
    }
