"""Scores of predictions by task, and the rule that calls a run collapsed; from scikit-learn and scipy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from megamask.evaluation.tasks import Task


def compute_scores(
    task: Task, predictions: Float[np.ndarray, " n"], labels: Float[np.ndarray, " n"]
) -> dict[str, float]:
    """Each metric of a classification or regression ``task``, as a fraction.

    F1 is that of class 1. A prediction that is NaN or Inf counts as wrong. The correlation of a constant, or of
    predictions that contain NaN or Inf, is undefined; it is 0 here, and `collapse_reason` names the run.
    """
    return {metric: _METRICS[metric](predictions, labels) for metric in task.metrics}


def task_score(scores: Mapping[str, float]) -> float:
    """The mean of the metrics of a task, as GLUE defines it."""
    return float(np.mean(list(scores.values())))


def collapse_reason(
    task: Task,
    predictions: Float[np.ndarray, " n"],
    labels: Float[np.ndarray, " n"],
    train_labels: Float[np.ndarray, " m"],
) -> str:
    """Why a run counts as collapsed; empty if it does not.

    A run collapsed if a prediction is NaN or Inf, if all are equal, or if the accuracy is not above that of the largest
    class of ``labels`` by more than one binomial standard error. ``train_labels`` only tell whether a single predicted
    class is the largest of the training examples.
    """
    if not np.isfinite(predictions).all():
        return f"{np.count_nonzero(~np.isfinite(predictions))} of {len(predictions)} predictions are NaN or Inf"
    if len(predictions) and (predictions == predictions[0]).all():
        if task.kind != "classification":
            return f"all predictions are {predictions[0]:g}"
        largest = (
            ", the largest class of the training examples" if predictions[0] == largest_class(train_labels) else ""
        )
        return f"all predictions are {task.labels[int(predictions[0])]}{largest}"
    if task.kind != "classification":
        return ""
    accuracy = _accuracy(predictions, labels)
    majority = float(np.mean(labels == largest_class(labels)))
    error = math.sqrt(majority * (1 - majority) / len(labels))
    if accuracy <= majority + error:
        return f"accuracy {accuracy:.3f} exceeds the largest class, {majority:.3f}, by less than {error:.3f}"
    return ""


def largest_class(labels: Float[np.ndarray, " n"]) -> float:
    """The most frequent label; the smallest of equally frequent ones."""
    classes, counts = np.unique(labels, return_counts=True)
    return float(classes[counts.argmax()])


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels))


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score  # slow to import

    return float(f1_score(labels == 1, predictions == 1, zero_division=0))


def _mcc(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    whole = np.nan_to_num(predictions, nan=-1, posinf=-1, neginf=-1).astype(int)
    return float(matthews_corrcoef(labels.astype(int), whole))


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
        from scipy import stats

        if len(labels) < 2 or not np.isfinite(predictions).all() or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0
        value = float(getattr(stats, name)(predictions, labels).statistic)
        return value if math.isfinite(value) else 0.0

    return correlation


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "mcc": _mcc,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
"""Those of classification and regression; spans and pairs compute their own."""
