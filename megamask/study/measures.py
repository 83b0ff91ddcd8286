"""What a study measures for each arm: the score of each task by pretraining seed, their mean, and the masked loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from megamask.evaluation.outcome import Cell, Mode
from megamask.evaluation.tasks import TASKS
from megamask.study.results import StudyResults
from megamask.study.statistics import Interval, t_interval

FROZEN_POOLING = "mean"
"""The default pooling of frozen features in the second endpoint: no loss trains the vector of the first token."""
RANDOM_WEIGHTS = "random_weights"
PAIRS_VARIANT = "original"
"""The variant of the first primary endpoint: the pseudo-log-likelihood of Salazar et al. 2020, as in BabyLM."""


@dataclass(frozen=True)
class Measure:
    """A column of the tables: one task in one mode, a mean over tasks, or the masked loss."""

    name: str
    """A task, `mean` or `loss`."""
    mode: Mode | None = None
    """None for the loss."""
    variant: str = ""
    primary: bool = False
    """Whether it is one of the two primary endpoints."""

    @property
    def title(self) -> str:
        match self.name:
            case "mean":
                return "Mean of tasks"
            case "loss":
                return "Masked loss"
        return TASKS[self.name].title if self.name in TASKS else self.name

    @property
    def unit(self) -> str:
        """The unit of its values: scores are fractions times 100."""
        return "nats" if self.name == "loss" else "points"

    @property
    def sign(self) -> int:
        """1 if larger values are better, -1 if smaller ones are."""
        return -1 if self.name == "loss" else 1

    @property
    def digits(self) -> int:
        """Number of digits after the decimal point, in tables."""
        return 3 if self.name == "loss" else 1

    @property
    def full_title(self) -> str:
        """The title with mode and variant."""
        how = ", ".join(filter(None, (self.mode and self.mode.replace("_", "-"), self.variant.replace("_", "-"))))
        return f"{self.title} ({how})" if how else self.title


LOSS = Measure("loss")


def budget_title(budget: str) -> str:
    """A budget of a plan in words: `tokens=1500000` is "1,500,000 tokens"."""
    kind, _, amount = budget.partition("=")
    try:
        match kind:
            case "tokens":
                return f"{float(amount):,.0f} tokens"
            case "flops":
                return f"{float(amount):.3g} FLOPs".replace("e+", "e")
    except ValueError:
        return budget
    return f"{amount} of training" if kind == "time" else budget


@dataclass(frozen=True)
class ArmScores:
    """The scores of one arm in one measure, at one budget."""

    arm: str
    budget: str
    measure: Measure
    by_seed: Mapping[int, float]
    """In the measure's unit, with fine-tuning seeds averaged; pretraining seeds without a score are absent."""
    collapsed: int = 0
    """Cells that collapsed. Their scores are in the mean."""
    failed: int = 0
    """Cells without a score, and pretraining runs that failed."""
    cells: int = 0
    """All cells, collapsed and failed ones included; pretraining runs for the loss."""

    @property
    def values(self) -> np.ndarray:
        return np.array(list(self.by_seed.values()), dtype=float)

    @property
    def mean(self) -> float:
        return float(self.values.mean()) if self.by_seed else float("nan")

    @property
    def median(self) -> float:
        return float(np.median(self.values)) if self.by_seed else float("nan")

    @property
    def minimum(self) -> float:
        return float(self.values.min()) if self.by_seed else float("nan")

    @property
    def interval(self) -> Interval | None:
        """Student's t interval of the mean over pretraining seeds; None for fewer than two seeds."""
        if len(self.by_seed) < 2:
            return None
        low, high = t_interval(self.values)
        return Interval(float(low), float(high))


def primary_measures(results: StudyResults) -> tuple[Measure, Measure]:
    """The two endpoints that the plan has declared: the macro average of BLiMP, and the mean of tasks."""
    pairs = Measure("blimp", "zero_shot", PAIRS_VARIANT, primary=True)
    mode, variant = results.mean_mode, results.mean_variant
    tasks: dict[tuple[Mode, str], set[str]] = {}
    pooled = set[tuple[Mode, str]]()
    for cell in (cell for cells in results.cells.values() for cell in cells):
        if cell.key.task in results.mean_tasks and mode in (None, cell.key.mode):
            key = (cell.key.mode, cell.key.variant)
            tasks.setdefault(key, set()).add(cell.key.task)
            if cell.key.variant == (cell.settings.get("pooling") or FROZEN_POOLING):
                pooled.add(key)
    if tasks and not variant:  # the earliest of those that cover most tasks; dicts keep the order
        mode, variant = min(tasks, key=lambda key: (-len(tasks[key]), key not in pooled))
    return pairs, Measure("mean", mode, variant or "", primary=True)


def task_measures(results: StudyResults) -> list[Measure]:
    """Every task, mode and variant that has a cell: those of the primary endpoints first, in the order of the tasks."""
    cells = [cell for cells in results.cells.values() for cell in cells]
    order = {name: number for number, name in enumerate(dict.fromkeys((*results.mean_tasks, *TASKS)))}
    pairs, mean = primary_measures(results)
    first = {(pairs.mode, pairs.variant), (mean.mode, mean.variant)}
    keys = {(cell.key.task, cell.key.mode, cell.key.variant) for cell in cells if cell.key.mode != "reference"}
    measures = [pairs if key == ("blimp", pairs.mode, pairs.variant) else Measure(*key) for key in keys]
    return sorted(
        measures, key=lambda m: ((m.mode, m.variant) not in first, m.mode, m.variant, order.get(m.name, 99), m.name)
    )


def cells_of(results: StudyResults, arm: str, seed: int, budget: str, measure: Measure) -> list[Cell]:
    """The cells of one pretrained model in a measure, one for each fine-tuning seed.

    If several evaluations have computed the same cell with different settings, the first evaluation counts.
    """
    cells: dict[int, Cell] = {}
    key = (measure.name, measure.mode, measure.variant)
    for cell in results.cells.get((arm, seed, budget), ()):
        if (cell.key.task, cell.key.mode, cell.key.variant) == key:
            cells.setdefault(cell.key.seed, cell)
    return [cells[number] for number in sorted(cells)]


def seeds_of(results: StudyResults, arm: str, budget: str) -> list[int]:
    """The pretraining seeds of an arm that have a run or a cell, in order."""
    of_runs = {run.seed for run in results.runs if (run.arm, run.budget) == (arm, budget)}
    return sorted(of_runs | {seed for name, seed, of_budget in results.cells if (name, of_budget) == (arm, budget)})


def task_scores(results: StudyResults, arm: str, budget: str, measure: Measure) -> ArmScores:
    """The scores of one task, as points: fine-tuning seeds are averaged, collapsed ones included."""
    by_seed, cells = {}, []
    for seed in seeds_of(results, arm, budget):
        of_seed = cells_of(results, arm, seed, budget, measure)
        scores = [100 * cell.score for cell in of_seed if cell.score is not None]
        if scores:
            by_seed[seed] = float(np.mean(scores))
        cells += of_seed
    return ArmScores(
        arm,
        budget,
        measure,
        by_seed,
        collapsed=sum(cell.state == "collapsed" for cell in cells),
        failed=sum(cell.score is None for cell in cells) + _failed_runs(results, arm, budget),
        cells=len(cells) + _failed_runs(results, arm, budget),
    )


def mean_scores(results: StudyResults, arm: str, budget: str, measure: Measure) -> ArmScores:
    """The mean of the declared tasks, for the pretraining seeds that have a score in each of them."""
    parts = [task_scores(results, arm, budget, replace(measure, name=name)) for name in results.mean_tasks]
    seeds = set.intersection(*(set(part.by_seed) for part in parts)) if parts else set()
    failed_runs = _failed_runs(results, arm, budget)
    return ArmScores(
        arm,
        budget,
        measure,
        {seed: float(np.mean([part.by_seed[seed] for part in parts])) for seed in sorted(seeds)},
        collapsed=sum(part.collapsed for part in parts),
        failed=sum(part.failed - failed_runs for part in parts) + failed_runs,
        cells=sum(part.cells - failed_runs for part in parts) + failed_runs,
    )


def loss_scores(results: StudyResults, arm: str, budget: str) -> ArmScores:
    """The last validation loss of each finished run, in nats, under the uniform mask that all arms share."""
    runs = [run for run in results.runs if (run.arm, run.budget) == (arm, budget)]
    finished = {run.seed: run.curve[-1].loss for run in runs if run.state == "finished" and run.curve}
    return ArmScores(
        arm, budget, LOSS, dict(sorted(finished.items())), failed=_failed_runs(results, arm, budget), cells=len(runs)
    )


def scores_of(results: StudyResults, arm: str, budget: str, measure: Measure) -> ArmScores:
    """The scores of an arm in any measure."""
    match measure.name:
        case "mean":
            return mean_scores(results, arm, budget, measure)
        case "loss":
            return loss_scores(results, arm, budget)
    return task_scores(results, arm, budget, measure)


def reference_scores(results: StudyResults, measure: Measure) -> dict[str, float]:
    """Points without a pretrained model, by kind: majority class, bag of words, random weights; means over seeds.

    Random weights are evaluated in every mode and variant; the ones of ``measure`` count.
    """
    of_measure = "_".join(filter(None, (RANDOM_WEIGHTS, measure.mode, measure.variant)))
    if measure.name == "mean":
        parts = [reference_scores(results, replace(measure, name=name)) for name in results.mean_tasks]
        kinds = set.intersection(*(set(part) for part in parts)) if parts else set()
        return {kind: float(np.mean([part[kind] for part in parts])) for kind in sorted(kinds)}
    points: dict[str, list[float]] = {}
    for cell in results.references:
        kind = RANDOM_WEIGHTS if cell.key.variant == of_measure else cell.key.variant
        is_other = kind.startswith(f"{RANDOM_WEIGHTS}_")
        if cell.key.task == measure.name and cell.score is not None and not is_other:
            points.setdefault(kind, []).append(100 * cell.score)
    return {kind: float(np.mean(scores)) for kind, scores in sorted(points.items())}


def correlation_of_seeds(first: ArmScores, second: ArmScores) -> float:
    """Pearson correlation of two arms over their common seeds, which shows the benefit of pairing; NaN below three."""
    common = sorted(set(first.by_seed) & set(second.by_seed))
    pairs: Sequence[tuple[float, float]] = [(first.by_seed[seed], second.by_seed[seed]) for seed in common]
    if len(pairs) < 3 or any(np.ptp(column) == 0 for column in zip(*pairs, strict=True)):
        return float("nan")
    return float(stats.pearsonr(*zip(*pairs, strict=True)).statistic)


def _failed_runs(results: StudyResults, arm: str, budget: str) -> int:
    return sum((run.arm, run.budget, run.state) == (arm, budget, "failed") for run in results.runs)
