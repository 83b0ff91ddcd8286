"""The charts of a report: every run is a dot, and every mean has its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megamask.study.comparison import Contrast, StudyComparison, repeats_baseline
from megamask.study.measures import LOSS, ArmScores, Measure, budget_title, reference_scores
from megamask.study.report_blocks import Chart, LegendEntry
from megamask.study.results import Arm, CurvePoint, StudyResults
from megamask.study.statistics import Interval
from megamask.study.svg import COLORS, GRID, INK, MUTED, arm_color, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 4.7
"""Inches of a chart: its text is readable on a screen of 400 pixels."""
CURVE_AXES: dict[str, tuple[str, Callable[[CurvePoint], float]]] = {
    "tokens": ("tokens", lambda point: float(point.tokens)),
    "flops": ("FLOPs, scoring and teacher included", lambda point: point.flops),
    "hours": ("hours of training", lambda point: point.seconds / 3600),
}


def dash_pattern(arm: Arm) -> tuple[str, str]:
    """The line style of an arm for matplotlib and for SVG: solid methods, dashed controls, dotted checks."""
    return {"control": ("--", "6 3"), "check": (":", "2 2")}.get(arm.role, ("-", ""))


def arm_legend(results: StudyResults) -> tuple[LegendEntry, ...]:
    """An entry for each arm that has a run."""
    drawn = {run.arm for run in results.runs if run.state != "failed"}
    return tuple(
        LegendEntry(arm.title, number % COLORS, dash_pattern(arm)[1])
        for number, arm in enumerate(results.arms)
        if arm.name in drawn
    )


def score_chart(comparison: StudyComparison, budget: str, measure: Measure, name: str) -> Chart | None:
    """The score of every run, mean and interval of each arm, and lines for the scores without a pretrained model."""
    results = comparison.results
    arms = [(number, arm, comparison.scores[arm.name, budget, measure]) for number, arm in enumerate(results.arms)]
    arms = [row for row in arms if row[2].by_seed]
    if not arms:
        return None
    references = reference_scores(results, measure)

    def draw(axes: Axes) -> None:
        for row, (number, _, scores) in enumerate(arms):
            _dots(
                axes,
                row,
                scores.values,
                scores.mean,
                scores.interval,
                arm_color(number),
            )
        low, high = axes.get_xlim()
        for number, (kind, value) in enumerate(references.items()):
            _reference_line(axes, kind.replace("_", " "), value, number, low, high)
        _rows(axes, [arm.title for _, arm, _ in arms])
        axes.set_xlabel(f"{measure.title}, {measure.unit}")

    described = "; ".join(f"{arm.title} {scores.mean:.{measure.digits}f}" for _, arm, scores in arms)
    text = f"{measure.full_title} at {budget_title(budget)}, means: {described}"
    return _chart(name, measure.full_title, text, [arm.title for _, arm, _ in arms], draw, len(references))


def difference_chart(
    comparison: StudyComparison, budget: str, measure: Measure, noise: float, name: str
) -> Chart | None:
    """The paired difference of every seed from the baseline, with mean and interval, and the spread of a repetition.

    ``noise`` is half the width of the shaded band; NaN draws none.
    """
    results = comparison.results
    rows: list[tuple[int, Arm, Contrast]] = []
    for number, arm in enumerate(results.arms[1:], 1):
        contrast = comparison.contrast(arm.name, budget, measure)
        if contrast is not None:
            rows.append((number, arm, contrast))
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        if noise == noise:
            axes.axvspan(-noise, noise, color=GRID, alpha=0.45, linewidth=0)
        axes.axvline(0, color=INK, linewidth=1)
        for row, (number, _, contrast) in enumerate(rows):
            values = np.array(list(contrast.by_seed.values()), dtype=float)
            if not len(values):  # other seeds than the baseline's
                reached = (comparison.scores[name, budget, measure] for name in (contrast.arm, contrast.against))
                values = next(reached).values - next(reached).mean
            is_paired = bool(contrast.by_seed)
            _dots(axes, row, values, contrast.delta, contrast.interval, arm_color(number), is_paired)
        _rows(axes, [arm.title for _, arm, _ in rows])
        axes.set_xlabel(f"minus {results.arms[0].title}, {measure.unit}")

    described = "; ".join(f"{arm.title} {contrast.delta:+.{measure.digits}f}" for _, arm, contrast in rows)
    text = f"{measure.full_title} at {budget_title(budget)}, mean differences from {results.arms[0].title}: {described}"
    return _chart(name, measure.full_title, text, [arm.title for _, arm, _ in rows], draw)


def repetition_noise(comparison: StudyComparison, budget: str, measure: Measure) -> float:
    """Standard deviation of a difference between two runs of the baseline with different seeds; NaN without them."""
    results = comparison.results
    repeats = [arm.name for arm in results.arms if repeats_baseline(arm)]
    groups = [comparison.scores[name, budget, measure].values for name in (results.arms[0].name, *repeats[:1])]
    if len(groups) < 2 or min(map(len, groups)) < 2:
        return float("nan")
    return float(np.sqrt(sum(np.var(group, ddof=1) for group in groups)))


def curve_charts(results: StudyResults, budget: str, name: str) -> list[Chart]:
    """The validation loss of all arms against tokens, FLOPs and hours: the mean over seeds, and a band of all seeds."""
    runs: dict[str, list[tuple[CurvePoint, ...]]] = {}
    for run in results.runs:
        if run.budget == budget and run.curve and run.state != "failed":
            runs.setdefault(run.arm, []).append(run.curve)
    charts = []
    for axis, (label, coordinate) in CURVE_AXES.items():
        if not any(coordinate(point) > 0 for curves in runs.values() for curve in curves for point in curve):
            continue

        def draw(axes: Axes, label: str = label, coordinate: Callable[[CurvePoint], float] = coordinate) -> None:
            for number, arm in enumerate(results.arms):
                if arm.name in runs:
                    _curve(axes, runs[arm.name], coordinate, arm_color(number), dash_pattern(arm)[0])
            axes.set(xlabel=label, ylabel="nats per masked token", ylim=_loss_limits(runs.values()))
            axes.grid(axis="y", linewidth=0.7)

        ends = {
            arm.title: np.mean([curve[-1].loss for curve in runs[arm.name]]) for arm in results.arms if arm.name in runs
        }
        described = "; ".join(f"{title} {loss:.3f}" for title, loss in ends.items())
        text = f"Validation loss against {label} at {budget_title(budget)}. Last losses: {described}"
        svg = draw_svg(f"{name}-{axis}", text, (WIDTH, 3.4), draw)
        charts.append(Chart(f"Loss against {label}", svg, text))
    return charts


def profile_chart(
    name: str,
    title: str,
    shares: Mapping[str, Sequence[float]],
    results: StudyResults,
    labels: Sequence[str],
    even: float,
) -> Chart:
    """Shares of the targets by class of token, a line for each arm; ``even`` is that of uniform masks, or NaN."""

    def draw(axes: Axes) -> None:
        for number, arm in enumerate(results.arms):
            if arm.name in shares:
                axes.plot(
                    range(len(labels)),
                    shares[arm.name],
                    color=arm_color(number),
                    linestyle=dash_pattern(arm)[0],
                    marker="o",
                    markersize=3.5,
                    linewidth=1.6,
                )
        if even == even:
            axes.axhline(even, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels)) > 3 else 0)
        axes.set(xlabel=title, ylabel="share of the targets", ylim=(0, None))
        axes.grid(axis="y", linewidth=0.7)

    described = "; ".join(
        f"{arm.title} {', '.join(f'{share:.3f}' for share in shares[arm.name])}"
        for arm in results.arms
        if arm.name in shares
    )
    text = f"Share of the targets by {title} ({', '.join(labels)}): {described}"
    bottom = 0.52 + (0.07 * max(map(len, labels)) if max(map(len, labels)) > 3 else 0)
    return Chart(f"Targets by {title}", draw_svg(name, text, (WIDTH, 2.9 + bottom), draw, (0.62, bottom, 0.12)), text)


def value_chart(name: str, setting: str, points: Sequence[tuple[str, ArmScores]], baseline: ArmScores) -> Chart:
    """A measure against the values of a setting, with a logarithmic axis if the largest is ten times the smallest."""
    measure = baseline.measure
    numbers = [_as_number(value) for value, _ in points]
    numeric = all(number is not None for number in numbers)
    places = [float(n) for n in numbers if n is not None] if numeric else [float(n) for n in range(len(points))]

    def draw(axes: Axes) -> None:
        for place, (_, scores) in zip(places, points, strict=True):
            axes.plot(
                [place] * len(scores.values),
                scores.values,
                "o",
                color=arm_color(1),
                alpha=0.45,
                markersize=4.5,
                markeredgewidth=0,
            )
            if scores.interval is not None:
                axes.plot([place] * 2, [scores.interval.low, scores.interval.high], color=arm_color(1), linewidth=2)
        axes.plot(places, [scores.mean for _, scores in points], "-D", color=arm_color(1), markersize=5, linewidth=1)
        if baseline.by_seed:
            axes.axhline(baseline.mean, color=arm_color(0), linewidth=1.4, linestyle="--")
        if numeric and min(places) > 0 and max(places) >= 10 * min(places):
            axes.set_xscale("log")
        axes.set_xticks(places, [value for value, _ in points], rotation=0 if numeric else 30)
        axes.minorticks_off()
        axes.set(xlabel=setting, ylabel=f"{measure.title}, {measure.unit}")
        axes.grid(axis="y", linewidth=0.7)

    described = "; ".join(f"{value}: {scores.mean:.{measure.digits}f}" for value, scores in points)
    text = f"{measure.full_title} by {setting}: {described}"
    return Chart(f"{measure.title} by {setting}", draw_svg(name, text, (WIDTH, 3.2), draw), text)


def scatter_chart(
    name: str, labels: tuple[str, str], points: Mapping[str, tuple[np.ndarray, np.ndarray]], results: StudyResults
) -> Chart:
    """Two measures of every pretrained model against each other."""

    def draw(axes: Axes) -> None:
        for number, arm in enumerate(results.arms):
            if arm.name in points:
                axes.plot(*points[arm.name], "o", color=arm_color(number), alpha=0.75, markersize=5, markeredgewidth=0)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.grid(linewidth=0.7)

    means = "; ".join(
        f"{arm.title} {points[arm.name][0].mean():.1f} and {points[arm.name][1].mean():.1f}"
        for arm in results.arms
        if arm.name in points
    )
    text = f"{labels[1]} against {labels[0]}, means: {means}"
    return Chart(f"{labels[1]} against {labels[0]}", draw_svg(name, text, (WIDTH, 3.4), draw), text)


def _loss_limits(runs: Iterable[Sequence[tuple[CurvePoint, ...]]]) -> tuple[float, float]:
    """Without the first fifth of each run, whose losses would flatten the rest."""
    late = [p.loss for curves in runs for curve in curves for p in curve if p.step >= 0.2 * curve[-1].step]
    room = 0.04 * (max(late) - min(late)) + 1e-3
    return min(late) - room, max(late) + room


def _curve(
    axes: Axes, curves: list[tuple[CurvePoint, ...]], coordinate: Callable[[CurvePoint], float], color: str, style: str
) -> None:
    """Runs of an arm validate at the same steps; beyond the shortest, only its seeds that go on are averaged."""
    steps = sorted({point.step for curve in curves for point in curve})
    at = [[point for curve in curves for point in curve if point.step == step] for step in steps]
    places = [float(np.mean([coordinate(point) for point in points])) for points in at]
    losses = [[point.loss for point in points] for points in at]
    axes.fill_between(
        places, [min(some) for some in losses], [max(some) for some in losses], color=color, alpha=0.15, linewidth=0
    )
    axes.plot(places, [float(np.mean(some)) for some in losses], color=color, linestyle=style, linewidth=1.8)


def _dots(
    axes: Axes,
    row: int,
    values: np.ndarray,
    mean: float,
    interval: Interval | None,
    color: str,
    filled: bool = True,
) -> None:
    """A dot for each run, below them the mean with its interval."""
    places = row - 0.12 + (0.18 * np.linspace(-1, 1, len(values)) if len(values) > 1 else np.zeros(len(values)))
    if filled:
        axes.plot(values, places, "o", color=color, alpha=0.5, markersize=4.5, markeredgewidth=0)
    else:
        axes.plot(values, places, "o", markerfacecolor="none", markeredgecolor=color, markersize=4.2)
    if interval is not None:
        ends = [interval.low, interval.high]
        axes.plot(ends, [row + 0.27] * 2, color=color, linewidth=2.2, solid_capstyle="butt")
    axes.plot([mean], [row + 0.27], "D", color=color, markersize=5.5, markeredgewidth=0)


def _rows(axes: Axes, titles: Sequence[str]) -> None:
    axes.set_yticks(range(len(titles)), [_short(title) for title in titles])
    axes.set_ylim(len(titles) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", linewidth=0.7)


def _short(title: str) -> str:
    return title if len(title) <= 26 else f"{title[:24]}..."


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _reference_line(axes: Axes, kind: str, value: float, number: int, low: float, high: float) -> None:
    """A line where the scores are; a label with an arrow if the value lies outside."""
    axes.set_xlim(low, high)
    inside = low <= value <= high
    if inside:
        axes.axvline(value, color=MUTED, linewidth=1, linestyle=(0, (1 + 2 * number, 2)))
    label = f"{kind} {value:.1f}"
    label = label if inside else f"\u2190 {label}" if value < low else f"{label} \u2192"
    place = min(max((value - low) / (high - low), 0.0), 1.0)
    side = "left" if place < 0.25 else "right" if place > 0.75 else "center"
    axes.annotate(
        label,
        (place, 1),
        xycoords="axes fraction",
        xytext=(0, 3 + 11 * number),
        textcoords="offset points",
        fontsize=8.5,
        color=MUTED,
        ha=side,
    )


def _chart(
    name: str, title: str, description: str, labels: Sequence[str], draw: Callable[[Axes], None], lines_above: int = 0
) -> Chart:
    left, top = 0.2 + 0.077 * max(len(_short(label)) for label in labels), 0.12 + 0.17 * lines_above
    size = (WIDTH, 0.52 + top + 0.4 * len(labels))
    return Chart(title, draw_svg(name, description, size, draw, (left, 0.52, top)), description)


def chart_measures(comparison: StudyComparison) -> list[Measure]:
    """The measures that are drawn: the endpoints, the tasks of their modes, and the loss."""
    modes = {(measure.mode, measure.variant) for measure in comparison.primary}
    tasks = [m for m in comparison.tasks if (m.mode, m.variant) in modes and m not in comparison.primary]
    return [*comparison.primary, *tasks, LOSS]
