"""Tests against scikit-learn and scipy on samples that are written out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from megamask.study.resampled_scores import resampled_score
from megamask.study.statistics import example_weights

REFERENCES: dict[str, Callable] = {
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    "mcc": metrics.matthews_corrcoef,
    "pearson": lambda labels, predictions: stats.pearsonr(labels, predictions).statistic,
    "spearman": lambda labels, predictions: stats.spearmanr(labels, predictions).statistic,
    "pair_accuracy": lambda labels, predictions: predictions.mean(),
}


@pytest.mark.parametrize(("metric", "classes"), [*((metric, 2) for metric in REFERENCES), ("accuracy", 4), ("mcc", 4)])
def test_each_sample_has_the_score_of_its_examples(metric: str, classes: int) -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, classes, 60).astype(float)
    rows = np.where(rng.random((3, 60)) < 0.6, labels, rng.integers(0, classes, (3, 60))).astype(float)
    if metric == "pair_accuracy":
        rows = rng.choice([0, 0.5, 1], (3, 60))
    weights = example_weights(60, 20, rng)
    scores = resampled_score([metric], rows, labels, weights)
    for draw in range(20):
        sample = np.repeat(np.arange(60), weights[:, draw].astype(int))
        expected = [REFERENCES[metric](labels[sample], row[sample]) for row in rows]
        np.testing.assert_allclose(scores[:, draw], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["f1", "mcc", "pearson", "spearman"])
def test_a_constant_has_no_correlation(metric: str) -> None:
    labels, rows = np.array([0.0, 1.0, 1.0]), np.zeros((1, 3))
    assert resampled_score([metric], rows, labels, np.ones((3, 1), dtype=np.float32)) == 0


def test_the_score_of_a_task_is_the_mean_of_its_metrics() -> None:
    labels, rows = np.array([0.0, 1.0, 1.0, 0.0]), np.array([[0.0, 1.0, 0.0, 0.0]])
    weights = np.ones((4, 1), dtype=np.float32)
    parts = [resampled_score([metric], rows, labels, weights) for metric in ("accuracy", "f1")]
    assert resampled_score(["accuracy", "f1"], rows, labels, weights) == pytest.approx(np.mean(parts))
