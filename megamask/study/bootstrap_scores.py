"""The scores of every pretrained model on the same bootstrap samples of each task's test examples.

Samples depend on the task only, so that two arms are compared on the same examples. The units of BLiMP are its
paradigms, since pairs of one paradigm share a template. A task whose examples cannot be resampled keeps its score in
every sample, so only its seeds vary, and `BootstrapScores.problems` says so.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megamask.evaluation.outcome import Cell
from megamask.evaluation.tasks import TASKS
from megamask.study.measures import Measure, cells_of, seeds_of
from megamask.study.resampled_scores import RESAMPLED, resampled_score
from megamask.study.results import StudyResults
from megamask.study.statistics import example_weights

PARADIGM = "paradigm/"
"""The beginning of the names of the accuracies by paradigm, in the figures of a cell."""
TOLERANCE = 1e-4
"""Of a score that is computed again from stored predictions."""


class BootstrapScores:
    """Points of each model and task by bootstrap sample."""

    def __init__(self, results: StudyResults, measures: Sequence[Measure], draws: int):
        self.draws = draws
        self._mean_tasks = results.mean_tasks
        self._scores: dict[tuple[str, str, int, Measure], np.ndarray] = {}
        self._problems: dict[str, str] = {}
        for measure in measures:
            self._add(results, measure)

    @property
    def problems(self) -> tuple[str, ...]:
        """Sentences about the tasks whose examples could not be resampled."""
        return tuple(f"{title}: {reason}" for title, reason in self._problems.items())

    def of_pair(
        self, arm: str, other: str, budget: str, measure: Measure, seeds: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Two arrays (seeds, draws) of points, of two arms; None if a score is missing."""
        arrays = [[self._of_model(name, budget, seed, measure) for seed in seeds] for name in (arm, other)]
        first, second = ([row for row in rows if row is not None] for rows in arrays)
        if not len(first) == len(second) == len(seeds):
            return None
        return np.stack(first), np.stack(second)

    def _of_model(self, arm: str, budget: str, seed: int, measure: Measure) -> np.ndarray | None:
        if measure.name != "mean":
            return self._scores.get((arm, budget, seed, replace(measure, primary=False)))
        tasks = [replace(measure, name=name, primary=False) for name in self._mean_tasks]
        parts = [self._scores.get((arm, budget, seed, task)) for task in tasks]
        known = [part for part in parts if part is not None]
        return np.mean(known, axis=0) if len(known) == len(parts) else None

    def _add(self, results: StudyResults, measure: Measure) -> None:
        """Resample the examples of a task once, and score all models on the samples."""
        plain = replace(measure, primary=False)
        rows: dict[tuple[str, str, int, Measure], list[np.ndarray]] = {}
        resampled: dict[tuple[str | bytes, ...], list[tuple[tuple[str, str, int, Measure], _Units]]] = {}
        examples: int | None = None
        for arm, budget in ((arm.name, budget) for arm in results.arms for budget in results.budgets):
            for seed in seeds_of(results, arm, budget):
                for cell in cells_of(results, arm, seed, budget, measure):
                    if cell.score is None:
                        continue
                    key, units = (arm, budget, seed, plain), _units_of(cell)
                    examples = examples or len(units.labels)
                    problem = units.problem or ("" if len(units.labels) == examples else DIFFERENT_SIZES)
                    if problem:
                        self._problems[measure.full_title] = problem
                        rows.setdefault(key, []).append(np.full(self.draws, 100 * cell.score))
                    else:
                        resampled.setdefault((*units.metrics, units.labels.tobytes()), []).append((key, units))
        rng = np.random.default_rng(zlib.crc32(measure.name.encode()))
        weights = example_weights(examples or 1, self.draws, rng)
        for group in resampled.values():  # one group, if all cells have the same labels
            first = group[0][1]
            values = np.stack([units.values for _, units in group])
            for (key, _), row in zip(group, resampled_score(first.metrics, values, first.labels, weights), strict=True):
                rows.setdefault(key, []).append(100 * row)
        self._scores |= {key: np.mean(some, axis=0) for key, some in rows.items()}


@dataclass(frozen=True)
class _Units:
    """What is resampled: the predictions and labels of examples, or the accuracies of paradigms."""

    values: np.ndarray
    labels: np.ndarray
    metrics: tuple[str, ...]
    problem: str = ""
    """Why nothing can be resampled."""


DIFFERENT_SIZES = "cells have different numbers of test examples, so only seeds are resampled"
NO_FUNCTION = "its score is not a function of stored predictions, so only seeds are resampled"
NOT_STORED = "predictions of single examples are not stored, so only seeds are resampled"
NOT_FINITE = "predictions are NaN or Inf, so only seeds are resampled"
NOT_EQUAL = "a score differs from that of its stored predictions, so only seeds are resampled"


def _units_of(cell: Cell) -> _Units:
    paradigms = [share for name, share in sorted(cell.metrics.items()) if name.startswith(PARADIGM)]
    if paradigms:
        return _Units(np.array(paradigms, dtype=float), np.ones(len(paradigms)), ("pair_accuracy",))
    values, labels = np.array(cell.predictions, dtype=float), np.array(cell.labels, dtype=float)
    metrics: tuple[str, ...] = TASKS[cell.key.task].metrics if cell.key.task in TASKS else tuple(cell.scores)
    units = _Units(values, labels, metrics)
    if not set(metrics) <= set(RESAMPLED):
        return replace(units, problem=NO_FUNCTION)
    if not len(values) or len(values) != len(labels):
        return replace(units, problem=NOT_STORED)
    if not np.isfinite(values).all():
        return replace(units, problem=NOT_FINITE)
    again = resampled_score(metrics, values[None], labels, np.ones((len(labels), 1), dtype=np.float32))[0, 0]
    return (
        units if cell.score is not None and abs(again - cell.score) <= TOLERANCE else replace(units, problem=NOT_EQUAL)
    )
