"""The sections of a report that compare the arms: verdicts, paired differences and curves."""

from __future__ import annotations

from megamask.study import charts
from megamask.study.comparison import LEVEL, MARGIN, MIN_SEEDS, Contrast, StudyComparison, judge
from megamask.study.measures import LOSS, budget_title, correlation_of_seeds
from megamask.study.report_blocks import Block, ChartGrid, Entry, ItemList, ReportTable, Section, Text, Tone
from megamask.study.report_scores import arm_entry, chart_grid, is_empty
from megamask.study.results import Arm
from megamask.study.verdicts import (
    compare_with_control,
    conclusion,
    difference_text,
    flops_ratio,
    harness_checks,
    headline,
    missing_endpoints,
    what_seeds_can_show,
)

TONES: dict[str, Tone] = {
    "better": "good",
    "worse": "bad",
    "passed": "good",
    "failed": "bad",
    "too few seeds": "warning",
    "incomplete": "warning",
    "not decided": "warning",
}


SHADED = "Shaded: one standard deviation of the difference between two runs of the baseline with different seeds."
NOT_SHADED = "No band is shaded: no arm repeats the baseline with other seeds, so the noise of one run is not known."


def verdict_section(comparison: StudyComparison) -> Section:
    """Per budget, endpoint and arm: the difference from the baseline and what it shows."""
    results = comparison.results
    blocks: list[Block] = [Text(headline(comparison), "good" if _any_better(comparison) else "")]
    blocks += [Text(sentence, "warning") for sentence in missing_endpoints(comparison)]
    measures = (*comparison.primary, LOSS)
    for budget in results.budgets:
        rows = []
        for arm in results.arms[1:]:
            contrasts = [comparison.contrast(arm.name, budget, measure) for measure in measures]
            if arm.role != "check" and any(contrasts):
                shown = [_verdict_entry(contrast) for contrast in contrasts]
                rows.append((arm_entry(arm), *shown, _cost_entry(comparison, arm, budget)))
        if rows:
            columns = ("Arm", *(measure.title for measure in measures), "Conclusion")
            title = (
                f"Difference from {results.arms[0].title} at {budget_title(budget)}: mean [95 % interval] and verdict"
            )
            blocks.append(ReportTable(title, columns, tuple(rows)))
    checks = harness_checks(comparison)
    if checks:
        blocks.append(
            ReportTable(
                "Checks of the study itself: what an arm must show, and what it shows",
                ("Arm", "Budget", "Must show", "Shows", "Check"),
                tuple(
                    (
                        arm_entry(check.arm),
                        Entry(budget_title(check.budget)),
                        Entry(check.expected),
                        Entry(check.shown),
                        Entry(check.state, tone=TONES[check.state]),
                    )
                    for check in checks
                ),
            )
        )
    else:
        blocks.append(
            Text(
                "No finished run repeats the baseline with other seeds or with half of its steps, so nothing confirms "
                "the method of this study.",
                "warning",
            )
        )
    if comparison.with_controls:
        blocks.append(_control_table(comparison))
    blocks += [
        Text(
            f"The rule: better or worse needs at least {MIN_SEEDS} paired pretraining seeds, a paired t interval "
            "and a bootstrap interval over seeds and test examples that both exclude zero, "
            f"p below {LEVEL:g} after Holm over the two primary endpoints, and for scores a difference above "
            f"{MARGIN:g} points. Anything else is reported as not shown. An arm with failed runs is never better.",
            "muted",
        ),
        ItemList("What this number of seeds can show", tuple(what_seeds_can_show(comparison))),
        _contrast_table(comparison),
    ]
    return Section("verdict", "Verdict", tuple(block for block in blocks if not is_empty(block)))


def _control_table(comparison: StudyComparison) -> ReportTable:
    """Whether a control, which costs nothing, is as good as a method."""
    results = comparison.results
    titles = {arm.name: arm.title for arm in results.arms}
    pairs = dict.fromkeys((c.arm, c.against, c.budget) for c in comparison.with_controls)
    rows = []
    for arm, control, budget in pairs:
        contrasts = [c for c in comparison.with_controls if (c.arm, c.against, c.budget) == (arm, control, budget)]
        by_measure = {contrast.measure: contrast for contrast in contrasts}
        entries = [_control_entry(by_measure.get(measure)) for measure in comparison.primary]
        rows.append((Entry(titles[arm]), Entry(titles[control]), Entry(budget_title(budget)), *entries))
    caption = f"Is a control as good as a method? Two one-sided tests with a margin of {MARGIN:g} points"
    columns = ("Method", "Control", "Budget", *(measure.title for measure in comparison.primary))
    return ReportTable(caption, columns, tuple(rows), folded=len(rows) > 6)


def _control_entry(contrast: Contrast | None) -> Entry:
    if contrast is None:
        return Entry("no score", tone="muted")
    return Entry(
        compare_with_control(contrast), small=f"{difference_text(contrast)}, p {p_text(contrast.p_equivalent)}"
    )


def difference_section(comparison: StudyComparison) -> Section:
    """Paired differences of every seed."""
    blocks: list[Block] = []
    any_noise = False
    for number, budget in enumerate(comparison.results.budgets):
        made = []
        for place, measure in enumerate(charts.chart_measures(comparison)):
            noise = charts.repetition_noise(comparison, budget, measure)
            any_noise |= noise == noise
            made.append(charts.difference_chart(comparison, budget, measure, noise, f"pairs-{number}-{place}"))
        blocks.append(
            chart_grid(
                f"Differences at {budget_title(budget)}. A dot is a pretraining seed, paired with the same seed of the "
                "baseline; an open dot is a run with another seed, minus the baseline's mean; the diamond is the "
                "mean with its 95 % interval.",
                made,
            )
        )
    blocks.append(
        Text(
            SHADED if any_noise else NOT_SHADED,
            "muted",
        )
    )
    gains = _pairing_gains(comparison)
    if gains:
        blocks.append(
            ItemList("Correlation of arm and baseline over seeds: what the pairing gains", gains, folded=True)
        )
    return Section("differences", "Paired differences", tuple(block for block in blocks if not is_empty(block)))


def curve_section(comparison: StudyComparison) -> Section:
    """Validation loss under the uniform mask that all arms share."""
    results = comparison.results
    blocks: list[Block] = []
    for number, budget in enumerate(results.budgets):
        made = charts.curve_charts(results, budget, f"curves-{number}")
        at = f"Validation loss at {budget_title(budget)}"
        caption = f"{at}: the mean over seeds, in a band of all seeds; the first fifth of each run is cut off."
        blocks.append(ChartGrid(caption, tuple(made), charts.arm_legend(results)))
    blocks = [block for block in blocks if not is_empty(block)]
    if not blocks:
        blocks = [Text("No run has recorded a validation loss.", "warning")]
    blocks.append(
        Text(
            "All arms are validated under the same uniform mask. Training losses are not compared: their masks "
            "differ in rate and difficulty by arm.",
            "muted",
        )
    )
    return Section("curves", "Curves", tuple(blocks))


def _verdict_entry(contrast: Contrast | None) -> Entry:
    if contrast is None:
        return Entry("no score", tone="muted")
    verdict = judge(contrast)
    return Entry(verdict, small=f"{difference_text(contrast)}, {contrast.seeds} seeds", tone=TONES.get(verdict, ""))


def _cost_entry(comparison: StudyComparison, arm: Arm, budget: str) -> Entry:
    ratio = flops_ratio(comparison.results, arm.name, budget)
    cost = f"{ratio:.2f} times the baseline's FLOPs" if ratio == ratio else "FLOPs unknown"
    return Entry(conclusion(comparison, arm.name, budget), small=cost)


def _contrast_table(comparison: StudyComparison) -> ReportTable:
    titles = {arm.name: arm.title for arm in comparison.results.arms}
    rows = []
    for contrast in comparison.contrasts:
        digits = 3 if contrast.measure == LOSS else 2
        bootstrap = contrast.bootstrap
        rows.append(
            (
                Entry(titles[contrast.arm]),
                Entry(budget_title(contrast.budget)),
                Entry(contrast.measure.full_title),
                Entry(str(contrast.seeds)),
                Entry(difference_text(contrast)),
                Entry(f"[{bootstrap.low:+.{digits}f}, {bootstrap.high:+.{digits}f}]" if bootstrap else "none"),
                *(Entry(p_text(p)) for p in (contrast.p, contrast.p_sign_flip, contrast.p_holm, contrast.p_study)),
                Entry(judge(contrast)),
            )
        )
    columns = (
        "Arm",
        "Budget",
        "Measure",
        "Seeds",
        "Difference, t interval",
        "Bootstrap interval",
        "p, t test",
        "p, sign flip",
        "p, Holm",
        "p, Holm over the study",
        "Verdict",
    )
    return ReportTable("All comparisons with the baseline", columns, tuple(rows), folded=True)


def p_text(p: float) -> str:
    """A p-value with three digits."""
    return "none" if p != p else f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def _pairing_gains(comparison: StudyComparison) -> tuple[str, ...]:
    results, lines = comparison.results, []
    for budget in results.budgets:
        for measure in comparison.primary:
            baseline = comparison.scores[results.arms[0].name, budget, measure]
            for arm in results.arms[1:]:
                correlation = correlation_of_seeds(comparison.scores[arm.name, budget, measure], baseline)
                if correlation == correlation:
                    lines.append(f"{arm.title}, {measure.title} at {budget_title(budget)}: {correlation:+.2f}")
    return tuple(lines)


def _any_better(comparison: StudyComparison) -> bool:
    checks = {arm.name for arm in comparison.results.arms if arm.role == "check"}
    primary = [c for c in comparison.contrasts if c.measure.primary and c.arm not in checks]
    return any(judge(contrast) == "better" for contrast in primary)
