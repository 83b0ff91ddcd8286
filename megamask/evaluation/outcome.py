"""What an evaluation of one model on one task returns, and the record of it: a cell of the table of results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from megamask.evaluation.tasks import Layout

Mode = Literal["fine_tuned", "frozen", "zero_shot", "reference"]
"""fine_tuned: all weights are trained on the task; frozen: a linear model on the features of the encoder; zero_shot:
pseudo-log-likelihoods; reference: without a pretrained encoder (majority class, bag of words, random weights)."""
State = Literal["ok", "collapsed", "failed"]
"""collapsed: the run ended, but predicts one class, no better than the majority class, or NaN; failed: an error."""


@dataclass(frozen=True)
class Outcome:
    """Predictions of one model for the test examples of one task."""

    predictions: Float[np.ndarray, " n"]
    """A class number, a number, or for each pair of sentences 1, 0.5 (a tie) or 0; spans: the F1 of each answer."""
    scores: Mapping[str, float]
    """The value of each metric, as a fraction: accuracy 0.74, correlations in [-1, 1]."""
    collapsed: str = ""
    """Why the run counts as collapsed; empty if it does not."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Counts and measurements that are not scores: texts that were truncated, updates, the learning rate, the final
    loss."""


@dataclass(frozen=True)
class CellKey:
    """What identifies a cell within an output folder."""

    model: str
    """The label of the model: a run's or folder's name, or ARM/seed-N in a study."""
    task: str
    mode: Mode
    seed: int
    """Seed of fine-tuning; 0 if nothing is random."""
    variant: str = ""
    """The pooling, or the kind of pseudo-log-likelihood or of reference."""


@dataclass(frozen=True)
class Cell:
    """One result, the content of one JSON file."""

    key: CellKey
    state: State
    reason: str
    """Reason of a collapse or a failure; empty otherwise."""
    score: float | None
    """The mean of ``scores``, the number that tables show; None if the run failed."""
    scores: Mapping[str, float]
    predictions: tuple[float, ...]
    """As in `Outcome`."""
    labels: tuple[float, ...]
    """Labels of the same examples, so that a report can resample them; all 1 for pairs and spans."""
    metrics: Mapping[str, float]
    """As in `Outcome`, with the counts of the examples of the task."""
    settings: Mapping[str, Any]
    """Everything that affects the result: hyperparameters, head, lengths."""
    data: Mapping[str, str]
    """SHA-256 of the files that were read, by name."""
    weights: str
    """SHA-256 of the weights of the model; empty for a reference without one."""
    versions: Mapping[str, str]
    command: str
    """A command that computes this cell."""
    seconds: float
    layout: Layout = "official"
    """How the files of the task were arranged, which decides which published scores are comparable."""
