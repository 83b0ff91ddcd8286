"""Results to compare an encoder with: the largest class, a linear model on words, and the frequency of words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from megamask.evaluation.outcome import Outcome
from megamask.evaluation.scores import collapse_reason, compute_scores, largest_class, task_score
from megamask.evaluation.tasks import Examples, Task, TaskData

STRENGTHS = (0.3, 3.0, 30.0)
"""Inverse regularization strengths, of which the best on a tenth of the training examples is taken."""
_WORD = re.compile(r"[^\W_]+")


def majority_class(data: TaskData) -> Outcome:
    """The largest class of the training examples for every example; for a regression their mean."""
    task, train, test = data.task, data.train.labels, data.test.labels
    constant = largest_class(train) if task.kind == "classification" else float(train.mean())
    predictions = np.full(len(test), constant)
    return Outcome(predictions, compute_scores(task, predictions, test))


def bag_of_words(data: TaskData) -> Outcome:
    """A linear model on words: TF-IDF of single words and of two in a row, then logistic or ridge regression.

    The features of a pair are those of both texts, of single words, with their absolute difference and product. The
    regularization strength is the best on a held-out tenth of the training examples; then all of them are used.
    """
    task, train, test = data.task, data.train, data.test
    if not any(text.strip() for texts in train.texts for text in texts):
        return replace(majority_class(data), collapsed="the texts of all training examples are empty")
    held_out = np.random.default_rng(0).permutation(len(train)) < max(1, len(train) // 10)
    if task.kind == "classification" and len(np.unique(train.labels[~held_out])) < 2:
        held_out[:] = False  # too few examples to hold any out
    features, of_test = _features(task, train, test)
    best, strength = -math.inf, STRENGTHS[1]
    for candidate in STRENGTHS if held_out.any() else ():
        model = _fit(task, features[~held_out], train.labels[~held_out], candidate)
        score = task_score(compute_scores(task, model.predict(features[held_out]), train.labels[held_out]))
        if score > best:
            best, strength = score, candidate
    predictions = _fit(task, features, train.labels, strength).predict(of_test).astype(np.float64)
    scores = compute_scores(task, predictions, test.labels)
    reason = collapse_reason(task, predictions, test.labels, train.labels)
    return Outcome(predictions, scores, reason, {"inverse_regularization": strength, "features": features.shape[1]})


def word_frequency(data: TaskData, texts: Iterable[str], most: int | None) -> Outcome:
    """The sentence of each minimal pair with the more frequent words, as counted in ``texts``.

    The score of a sentence is the sum of the logarithms of (count + 1) / (words + vocabulary), in lower case. It is
    rounded once, so sentences of the same words are a tie. ``most`` limits the pairs of a paradigm.
    """
    from megamask.evaluation.minimal_pairs import first_of_each_group, pair_outcome  # imports torch

    counts = Counter(word for text in texts for word in _words(text))
    total = math.log(sum(counts.values()) + len(counts) + 1)

    def score(sentence: str) -> float:
        return math.fsum(math.log(counts[word] + 1) - total for word in _words(sentence))

    pairs = first_of_each_group(data.test, most)
    scores = np.array([[score(sentence) for sentence in pair] for pair in pairs.texts])
    return pair_outcome(scores, pairs.groups, {"counted_words": float(sum(counts.values()))})


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _features(task: Task, train: Examples, test: Examples) -> tuple[Any, Any]:
    """Sparse matrices of the training and the test examples."""
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    single = len(task.fields) == 1
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2 if single else 1), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]"
    )
    vectorizer.fit(text for texts in train.texts for text in texts)

    def matrix(examples: Examples) -> Any:
        parts = [vectorizer.transform([texts[i] for texts in examples.texts]) for i in range(len(task.fields))]
        if not single:
            first, second = parts
            parts += [abs(first - second), first.multiply(second)]
        return sparse.hstack(parts, format="csr")

    return matrix(train), matrix(test)


def _fit(task: Task, features: Any, labels: np.ndarray, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if task.kind == "regression":
        return Ridge(alpha=1 / strength).fit(features, labels)
    # liblinear is the fastest solver for sparse features; it takes two classes
    two = LogisticRegression(C=strength, solver="liblinear", random_state=0)
    return (two if len(task.labels) == 2 else OneVsRestClassifier(two)).fit(features, labels)
