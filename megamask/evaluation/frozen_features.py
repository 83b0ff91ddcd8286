"""A linear model on the features of a frozen encoder: what the encoder knows, without what fine-tuning adds.

Features are computed once without dropout, standardised on the training examples, and given to an L2-penalised logistic
regression or ridge regression. The strength of the penalty is the best on a tenth of the training examples, then the
model is fitted to all of them. Nothing is random, so there are no seeds. Features are computed in fp32 on every
machine, since they are the whole result. The cost is that of one forward pass over all texts; the regressions take
seconds for 10,000 texts.

Two texts are encoded one by one, and the features of a pair are u, v, |u - v| and u * v (InferSent, Conneau et al.
2017, section 3.1; SentEval takes the last two for similarity). An encoder that was not fine-tuned has never compared
two texts in one input, so features of the pair as one input say little about it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel

from megamask.evaluation.encoder import EncoderFolder, load_encoder
from megamask.evaluation.features import EncodedTexts, encode_texts, text_features
from megamask.evaluation.outcome import Outcome
from megamask.evaluation.scores import collapse_reason, compute_scores
from megamask.evaluation.settings import EvaluateConfig, Pooling
from megamask.evaluation.tasks import Examples, Task, TaskData
from megamask.hf.model_folder import load_hf_tokenizer

PENALTIES = tuple(10.0**power for power in range(-1, 7))
"""Weights of the L2 penalty that are tried: 1 / C of scikit-learn's logistic regression, alpha of its ridge."""
HELD_OUT = 0.1
"""Share of the training examples on which a setting is chosen."""
MOST_ITERATIONS = 1000


def fit_frozen(encoder: EncoderFolder, data: TaskData, config: EvaluateConfig) -> dict[str, Outcome]:
    """An outcome for each kind of pooling, "first" and "mean", from one pass over the texts.

    Raises CheckpointError if the encoder cannot be loaded.
    """
    begin = time.perf_counter()
    model, tokenizer = load_encoder(encoder), load_hf_tokenizer(encoder.folder)
    longest = min(config.max_length, encoder.max_length)
    columns = range(len(data.task.fields))
    train, test = (
        [encode_texts(tokenizer, model, [(texts[column],) for texts in part.texts], longest) for column in columns]
        for part in (data.train, data.test)
    )
    train_features, test_features = _features(model, train), _features(model, test)
    metrics = {
        "max_length": longest,
        "truncated_train": sum(texts.truncated for texts in train),
        "truncated_test": sum(texts.truncated for texts in test),
        "feature_seconds": time.perf_counter() - begin,
    }
    return {
        pooling: _outcome(data, train_features[pooling], test_features[pooling], metrics) for pooling in train_features
    }


def held_out_split(task: Task, train: Examples) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """The rows to train on and the tenth to choose settings on, always the same; the classes are in proportion.

    A class with a single example, which cannot be in both, makes the split ignore classes.
    """
    rows, labels = np.arange(len(train)), train.labels.astype(np.int64)
    counts = np.bincount(labels, minlength=2) if task.kind == "classification" else np.zeros(1)
    num_held_out = max(1, round(HELD_OUT * len(rows)))
    proportional = task.kind == "classification" and counts[counts > 0].min() > 1 and num_held_out >= (counts > 0).sum()
    fit, choose = train_test_split(
        rows, test_size=num_held_out, random_state=0, stratify=labels if proportional else None
    )
    return fit, choose


def _features(model: PreTrainedModel, columns: Sequence[EncodedTexts]) -> dict[Pooling, Float[np.ndarray, "n F"]]:
    """By pooling: the vector u of each text; of a pair, u, v, |u - v| and u * v, so F is D or 4 D."""
    vectors = [text_features(model, texts) for texts in columns]
    if len(vectors) == 1:
        return vectors[0]
    first, second = vectors
    pairs = {pooling: (first[pooling], second[pooling]) for pooling in first}
    return {pooling: np.concatenate([u, v, abs(u - v), u * v], axis=1) for pooling, (u, v) in pairs.items()}


@dataclass(frozen=True)
class _Fit:
    """A linear model and the scaler of its features."""

    scaler: StandardScaler
    model: Any
    converged: bool

    def predict(self, features: Float[np.ndarray, "n D"]) -> Float[np.ndarray, " n"]:
        return self.model.predict(self.scaler.transform(features)).astype(np.float64)

    def loss(self, features: Float[np.ndarray, "n D"], labels: Float[np.ndarray, " n"]) -> float:
        """The mean negative log-likelihood of classes, or the mean squared error."""
        inputs = self.scaler.transform(features)
        if isinstance(self.model, Ridge):
            return float(mean_squared_error(labels, self.model.predict(inputs)))
        known = np.isin(labels, self.model.classes_)  # a class that is not in the rest has no probability
        return float(log_loss(labels[known], self.model.predict_proba(inputs[known]), labels=self.model.classes_))


def _outcome(data: TaskData, train: np.ndarray, test: np.ndarray, metrics: dict[str, float]) -> Outcome:
    begin, labels = time.perf_counter(), data.train.labels
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        predictions = np.full(len(test), np.nan)
        scores = compute_scores(data.task, predictions, data.test.labels)
        return Outcome(predictions, scores, "features of the encoder are NaN or Inf", metrics)
    fit, choose = held_out_split(data.task, data.train)
    losses = {
        penalty: _fit(data.task, train[fit], labels[fit], penalty).loss(train[choose], labels[choose])
        for penalty in (PENALTIES if _can_choose(data.task, labels[fit], labels[choose]) else ())
    }
    penalty = min(losses, key=losses.__getitem__, default=1.0)
    best = _fit(data.task, train, labels, penalty)
    predictions = best.predict(test)
    chosen = {"penalty": penalty, "held_out_loss": losses.get(penalty, np.nan), "converged": float(best.converged)}
    return Outcome(
        predictions,
        compute_scores(data.task, predictions, data.test.labels),
        collapse_reason(data.task, predictions, data.test.labels, labels),
        metrics | chosen | {"fit_seconds": time.perf_counter() - begin},
    )


def _can_choose(task: Task, fit: Float[np.ndarray, " a"], choose: Float[np.ndarray, " b"]) -> bool:
    """Whether a setting can be chosen: with few examples, all to train on may be of one class."""
    return task.kind != "classification" or (len(np.unique(fit)) > 1 and bool(np.isin(choose, fit).any()))


def _fit(task: Task, features: Float[np.ndarray, "n D"], labels: Float[np.ndarray, " n"], penalty: float) -> _Fit:
    scaler = StandardScaler().fit(features.astype(np.float64))
    inputs, model = scaler.transform(features.astype(np.float64)), _linear_model(task, labels, penalty)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(inputs, labels)
    return _Fit(scaler, model, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught))


def _linear_model(task: Task, labels: Float[np.ndarray, " n"], penalty: float) -> Any:
    if task.kind == "regression":
        return Ridge(alpha=penalty, solver="cholesky")
    # Newton's method needs 3 iterations where L-BFGS needs 200, but its matrix grows with the square of the classes
    solver = "newton-cholesky" if len(np.unique(labels)) == 2 else "lbfgs"
    return LogisticRegression(C=1 / penalty, solver=solver, max_iter=MOST_ITERATIONS)
