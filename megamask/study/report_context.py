"""The sections of a report around its findings, from the audit of masks to the references."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megamask.evaluation.outcome import Mode
from megamask.evaluation.table import comparability_note
from megamask.study import charts
from megamask.study.comparison import StudyComparison
from megamask.study.measures import LOSS, ArmScores, Measure, budget_title, reference_scores, scores_of
from megamask.study.report_blocks import Block, Chart, ChartGrid, Entry, ItemList, ReportTable, Section, Text
from megamask.study.report_scores import arm_entry, chart_grid, is_empty
from megamask.study.results import Arm, StudyResults

COMPARED_MODES: tuple[Mode, Mode] = ("frozen", "fine_tuned")
DECILE = re.compile(r"masks/decile_(\d+)")
HELD_OUT = "held_out_score/"
TAG = "masks/tags/"
REFERENCES = {
    "majority": "the largest class of the training examples",
    "bag_of_words": "a linear model on TF-IDF of words; BLiMP: the more frequent words",
    "random_weights": "the same architecture without pretraining",
}
BABYLM = (
    "BLiMP is scored by pseudo-log-likelihood, one [MASK] at a time, as a sum in float32, with a tie as half. BabyLM's "
    "pipelines count ties as correct, and some papers choose a temperature on the reported set."
)


def mask_section(comparison: StudyComparison) -> Section:
    """What was masked: arms must differ only where they should."""
    results, blocks = comparison.results, list[Block]()
    for number, budget in enumerate(results.budgets):
        means = {arm.name: metrics for arm in results.arms if (metrics := _mask_means(results, arm.name, budget))}
        if not means:
            continue
        made = _decile_charts(results, means, number)
        caption = (
            f"Share of the targets by frequency (1: the most frequent types, each decile has a tenth of the text) and "
            f"by tag at {budget_title(budget)}. The dotted line is the share under uniform masks."
        )
        blocks.append(ChartGrid(caption, tuple(made), charts.arm_legend(results)))
        names = sorted({name for metrics in means.values() for name in metrics}, key=_natural)
        rows = tuple(
            (
                arm_entry(arm),
                *(
                    Entry(f"{means[arm.name][name]:.4g}") if name in means[arm.name] else Entry("none", tone="muted")
                    for name in names
                ),
            )
            for arm in results.arms
            if arm.name in means
        )
        blocks.append(
            ReportTable(
                f"Mask metrics at {budget_title(budget)}: means over steps and seeds",
                ("Arm", *names),
                rows,
                folded=True,
            )
        )
    if not blocks:
        blocks = [Text("The logs of the runs have no metrics of masks.", "warning")]
    elif not any(isinstance(block, ChartGrid) and block.charts for block in blocks):
        blocks.append(Text("The logs have no shares by frequency or part of speech.", "warning"))
    return Section("masks", "Mask audit", tuple(block for block in blocks if not is_empty(block)))


def ablation_section(comparison: StudyComparison) -> Section:
    """Arms that vary one setting, and the two ways of evaluation."""
    results, blocks = comparison.results, list[Block]()
    measures = (*comparison.primary, LOSS)
    for number, budget in enumerate(results.budgets):
        made: list[Chart] = []
        for setting, arms in varied_settings(results).items():
            for measure in measures:
                baseline = comparison.scores[results.arms[0].name, budget, measure]
                points = [(value, comparison.scores[name, budget, measure]) for value, name in arms]
                points = [(value, scores) for value, scores in points if scores.by_seed]
                if len(points) > 1:
                    name = f"ablation-{number}-{len(made)}"
                    made.append(charts.value_chart(name, setting, points, baseline))
        blocks.append(
            chart_grid(f"One setting varied at {budget_title(budget)}; the dashed line is the baseline", made)
        )
        scatter = _modes_chart(results, budget, number)
        if scatter is not None:
            caption = f"Frozen features and fine-tuning at {budget_title(budget)}; a dot is a pretrained model"
            blocks.append(ChartGrid(caption, (scatter,), charts.arm_legend(results)))
    blocks = [block for block in blocks if not is_empty(block)]
    rows = tuple(
        (arm_entry(arm), Entry("; ".join(f"{name} = {value}" for name, value in arm.changes.items()) or "nothing"))
        for arm in results.arms[1:]
    )
    if not any(isinstance(block, ChartGrid) for block in blocks):
        blocks.append(
            Text(
                "No two arms differ from the baseline in one and the same setting, and no task was evaluated "
                "both frozen and fine-tuned, so there is nothing to draw.",
                "muted",
            )
        )
    blocks.append(ReportTable("Settings in which each arm differs from the baseline", ("Arm", "Settings"), rows))
    return Section("ablations", "Ablations", tuple(blocks))


def varied_settings(results: StudyResults) -> dict[str, list[tuple[str, str]]]:
    """For each setting that is the only change of an arm: its values with their arms."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for arm in results.arms[1:]:
        if len(arm.changes) == 1 and arm.role != "check":
            ((setting, value),) = arm.changes.items()
            groups.setdefault(setting, []).append((value, arm.name))
    groups = {setting: arms for setting, arms in groups.items() if len(arms) > 1}
    return {setting: sorted(arms, key=lambda pair: _natural(pair[0])) for setting, arms in groups.items()}


def sensitivity_section(comparison: StudyComparison) -> Section:
    """The learning rates of fine-tuning, and the spread of its seeds."""
    results, blocks = comparison.results, list[Block]()
    cells = [cell for cells in results.cells.values() for cell in cells if cell.key.mode == "fine_tuned"]
    blocks += _held_out_table(results)
    rows = []
    for arm in results.arms if cells else ():
        for task in sorted({cell.key.task for cell in cells}):
            of_arm = [
                cell
                for (name, _, _), some in results.cells.items()
                if name == arm.name
                for cell in some
                if (cell.key.task, cell.key.mode) == (task, "fine_tuned") and cell.score is not None
            ]
            by_rate: dict[float, list[float]] = {}
            for cell in of_arm:
                by_rate.setdefault(cell.metrics.get("learning_rate", float("nan")), []).append(100 * (cell.score or 0))
            for rate, scores in sorted(by_rate.items()):
                shown = "unknown" if rate != rate else f"{rate:g}"
                row = (
                    Entry(task),
                    Entry(shown),
                    Entry(str(len(scores))),
                    Entry(f"{np.mean(scores):.1f}"),
                    Entry(f"{min(scores):.1f} to {max(scores):.1f}"),
                )
                rows.append((arm_entry(arm), *row))
    if rows:
        columns = ("Arm", "Task", "Learning rate", "Runs", "Mean", "Range")
        blocks.append(
            ReportTable("Fine-tuning by learning rate, over all seeds and budgets", columns, tuple(rows), folded=True)
        )
        rates = {row[2].text for row in rows}
        if len(rates) == 1:
            blocks.append(
                Text("All runs used one learning rate, so the study does not show how much the choice matters.")
            )
    else:
        blocks.append(
            Text("No task was fine-tuned, so there is no learning rate or fine-tuning seed to vary.", "muted")
        )
    return Section("sensitivity", "Sensitivity", tuple(blocks))


def _held_out_table(results: StudyResults) -> list[ReportTable]:
    """Scores of the learning rates that were tried on a held-out tenth of the training examples, if any were."""
    tried: dict[tuple[str, str], dict[float, list[float]]] = {}
    for (arm, _, _), cells in results.cells.items():
        for cell in (cell for cell in cells if cell.key.mode == "fine_tuned"):
            for name, score in cell.metrics.items():
                if name.startswith(HELD_OUT):
                    rate = float(name.removeprefix(HELD_OUT))
                    tried.setdefault((arm, cell.key.task), {}).setdefault(rate, []).append(100 * score)
    rates = sorted({rate for scores in tried.values() for rate in scores})
    rows = tuple(
        (
            arm_entry(arm),
            Entry(Measure(task).title),
            *(Entry(f"{np.mean(scores[rate]):.1f}" if rate in scores else "none") for rate in rates),
        )
        for arm in results.arms
        for (name, task), scores in tried.items()
        if name == arm.name
    )
    caption = "Learning rates of fine-tuning: points on a held-out tenth of the training examples, means over seeds"
    return [ReportTable(caption, ("Arm", "Task", *(f"{rate:g}" for rate in rates)), rows)] if rows else []


def reference_section(comparison: StudyComparison) -> Section:
    """Scores without a pretrained model, which the charts show as lines."""
    results = comparison.results
    measures = [m for m in charts.chart_measures(comparison) if reference_scores(results, m)]
    kinds = sorted({kind for measure in measures for kind in reference_scores(results, measure)})
    if not kinds:
        text = "No reference was computed: neither a majority class, a bag of words nor an encoder with random weights."
        return Section("references", "References", (Text(text, "warning"),))
    rows = tuple(
        (
            Entry(kind.replace("_", " "), small=REFERENCES.get(kind, "")),
            *(
                Entry(f"{points[kind]:.1f}" if kind in points else "none")
                for points in (reference_scores(results, measure) for measure in measures)
            ),
        )
        for kind in kinds
    )
    columns = ("Reference", *(measure.title for measure in measures))
    return Section("references", "References", (ReportTable("Points without a pretrained model", columns, rows),))


def comparability_section(comparison: StudyComparison) -> Section:
    """Why these numbers are not those of public benchmarks."""
    notes = list(comparison.results.notes)
    of_one_model = next((list(cells) for cells in comparison.results.cells.values() if cells), [])
    notes += [note] if (note := comparability_note(of_one_model)) else []
    if any(cell.key.task == "blimp" for cells in comparison.results.cells.values() for cell in cells):
        notes.append(BABYLM)
    notes += [f"Bootstrap: {problem}." for problem in comparison.not_resampled]
    notes.append(
        "Scores compare the arms of this study. Compare them with published numbers only if data, splits, "
        "budget, head and learning rate are the same."
    )
    return Section("comparability", "Comparability", (ItemList("Differences from public protocols", tuple(notes)),))


def _mask_means(results: StudyResults, arm: str, budget: str) -> dict[str, float]:
    """Means over the runs of an arm that are not failed."""
    values: dict[str, list[float]] = {}
    for run in results.runs:
        if (run.arm, run.budget) == (arm, budget) and run.state != "failed":
            for name, value in run.masks.items():
                values.setdefault(name, []).append(value)
    return {name: float(np.mean(some)) for name, some in values.items()}


def _decile_charts(results: StudyResults, means: Mapping[str, Mapping[str, float]], number: int) -> list[Chart]:
    made = []
    deciles = {
        arm: {int(m[1]): v for n, v in metrics.items() if (m := DECILE.fullmatch(n))} for arm, metrics in means.items()
    }
    deciles = {arm: shares for arm, shares in deciles.items() if len(shares) == 10}
    if deciles:
        shares = {arm: [some[place] for place in sorted(some)] for arm, some in deciles.items()}
        labels = [str(place) for place in range(1, 11)]
        made.append(
            charts.profile_chart(f"deciles-{number}", "decile of token frequency", shares, results, labels, 0.1)
        )
    tags = {
        arm: {n.removeprefix(TAG): v for n, v in metrics.items() if n.startswith(TAG)} for arm, metrics in means.items()
    }
    names = sorted({name for some in tags.values() for name in some})
    with_tags = {arm: [some.get(name, 0.0) for name in names] for arm, some in tags.items() if some}
    if with_tags:
        made.append(charts.profile_chart(f"tags-{number}", "part of speech", with_tags, results, names, float("nan")))
    return made


def _modes_chart(results: StudyResults, budget: str, number: int) -> Chart | None:
    """Frozen against fine-tuned scores of the tasks that have both, one point for each pretrained model."""
    modes: dict[Mode, set[tuple[str, str]]] = {}
    for cells in results.cells.values():
        for cell in cells:
            modes.setdefault(cell.key.mode, set()).add((cell.key.task, cell.key.variant))
    frozen, tuned = modes.get("frozen", set()), modes.get("fine_tuned", set())
    tasks = sorted({task for task, _ in frozen} & {task for task, _ in tuned})
    if not tasks:
        return None
    points: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    of_mode: list[list[Measure]] = [
        [Measure(task, mode, max(variant for name, variant in modes[mode] if name == task)) for task in tasks]
        for mode in COMPARED_MODES
    ]
    for arm in results.arms:
        first, second = (_mean_of(results, arm, budget, measures) for measures in of_mode)
        seeds = sorted(set(first) & set(second))
        if seeds:
            points[arm.name] = np.array([first[seed] for seed in seeds]), np.array([second[seed] for seed in seeds])
    if not points:
        return None
    named = ", ".join(Measure(task).title for task in tasks)
    return charts.scatter_chart(f"modes-{number}", (f"frozen, points ({named})", "fine-tuned, points"), points, results)


def _mean_of(results: StudyResults, arm: Arm, budget: str, measures: Sequence[Measure]) -> dict[int, float]:
    scores: list[ArmScores] = [scores_of(results, arm.name, budget, replace(m, primary=False)) for m in measures]
    seeds = set.intersection(*(set(s.by_seed) for s in scores)) if scores else set()
    return {seed: float(np.mean([s.by_seed[seed] for s in scores])) for seed in seeds}


def _natural(text: str) -> tuple:
    """Numbers inside a text sort by their value."""
    return tuple(
        (0, float(part), "") if re.fullmatch(r"\d+(\.\d+)?", part) else (1, 0.0, part)
        for part in re.split(r"(\d+(?:\.\d+)?)", text)
        if part
    )
