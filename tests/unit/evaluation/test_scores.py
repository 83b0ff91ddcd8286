"""Scores against their definitions, and the rule of collapsed runs."""

from __future__ import annotations

import numpy as np
import pytest

from megamask.evaluation.scores import collapse_reason, compute_scores, task_score
from megamask.evaluation.tasks import TASKS

RNG = np.random.default_rng(1)
LABELS = (RNG.random(200) < 0.7).astype(float)
NOISY = np.where(RNG.random(200) < 0.2, 1 - LABELS, LABELS)


def counts(predictions: np.ndarray, labels: np.ndarray) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives."""
    pairs = [(p, t) for p in (1, 0) for t in (1, 0)]
    return tuple(int(np.sum((predictions == p) & (labels == t))) for p, t in pairs)  # type: ignore[return-value]


def test_f1_and_mcc_are_those_of_the_table_of_counts() -> None:
    tp, fp, fn, tn = counts(NOISY, LABELS)
    mrpc = compute_scores(TASKS["mrpc"], NOISY, LABELS)
    assert mrpc["accuracy"] == pytest.approx((tp + tn) / 200)
    assert mrpc["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert task_score(mrpc) == pytest.approx((mrpc["accuracy"] + mrpc["f1"]) / 2)
    mcc = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert compute_scores(TASKS["cola"], NOISY, LABELS) == {"mcc": pytest.approx(mcc)}


def test_correlations_ignore_scale_and_spearman_ignores_monotone_maps() -> None:
    labels = RNG.random(100) * 5
    scores = compute_scores(TASKS["stsb"], labels**3, labels)
    assert scores["spearman"] == pytest.approx(1) and scores["pearson"] < 1
    assert compute_scores(TASKS["stsb"], 2 * labels - 7, labels)["pearson"] == pytest.approx(1)
    assert compute_scores(TASKS["stsb"], -labels, labels)["spearman"] == pytest.approx(-1)


@pytest.mark.parametrize("prediction", [3.0, np.nan, np.inf])
def test_a_constant_correlates_with_nothing_and_has_collapsed(prediction: float) -> None:
    labels, constant = RNG.random(50), np.full(50, prediction)
    assert compute_scores(TASKS["stsb"], constant, labels) == {"pearson": 0, "spearman": 0}
    assert collapse_reason(TASKS["stsb"], constant, labels, labels)


def test_a_prediction_of_nan_is_wrong() -> None:
    predictions = LABELS.copy()
    predictions[:50] = np.nan
    assert compute_scores(TASKS["sst2"], predictions, LABELS) == {"accuracy": 0.75}
    assert compute_scores(TASKS["cola"], predictions, LABELS)["mcc"] < 1
    assert "50 of 200" in collapse_reason(TASKS["sst2"], predictions, LABELS, LABELS)


def test_one_class_has_collapsed_and_is_named() -> None:
    task = TASKS["rte"]
    train = np.array([1.0, 1.0, 0.0])
    assert collapse_reason(task, np.ones(200), LABELS, train) == (
        "all predictions are not_entailment, the largest class of the training examples"
    )
    assert collapse_reason(task, np.zeros(200), LABELS, train) == "all predictions are entailment"


def test_the_largest_class_must_be_exceeded_by_a_standard_error() -> None:
    labels = np.repeat([0.0, 1.0], [60, 40])
    error = np.sqrt(0.6 * 0.4 / 100)  # 0.049

    def reason(right: int) -> str:
        predictions = labels.copy()
        predictions[right:] = 1 - predictions[right:]
        return collapse_reason(TASKS["sst2"], predictions, labels, labels)

    limit = int(100 * (0.6 + error))
    assert reason(limit) and not reason(limit + 1)
    assert not collapse_reason(TASKS["stsb"], RNG.random(100), labels, labels)
