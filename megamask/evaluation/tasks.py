"""The tasks that an encoder is evaluated on: their text fields, labels and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

TaskKind = Literal["classification", "regression", "spans", "minimal_pairs"]
Metric = Literal["accuracy", "f1", "mcc", "pearson", "spearman", "exact_match", "span_f1", "pair_accuracy"]


@dataclass(frozen=True)
class Task:
    """What one task asks, independent of where its files are."""

    name: str
    title: str
    kind: TaskKind
    fields: tuple[str, ...]
    """Names of the one or two text fields, in the order in which an encoder reads them."""
    labels: tuple[str, ...]
    """Names of the classes, in the order of their numbers; empty for other kinds than classification."""
    metrics: tuple[Metric, ...]
    """All reported metrics. The score of the task is their mean, as GLUE defines it."""


@dataclass(frozen=True)
class Answer:
    """A span of a context."""

    text: str
    start: int
    """Index of its first character in the context."""


@dataclass(frozen=True)
class Examples:
    """Texts with a label each: a class number or a number; 1 for spans and pairs."""

    texts: tuple[tuple[str, ...], ...]
    """The fields of the task, in its order."""
    labels: Float[np.ndarray, " n"]
    answers: tuple[tuple[Answer, ...], ...] = ()
    """For spans: all accepted answers of each example."""
    groups: tuple[str, ...] = ()
    """For minimal pairs: the paradigm of each."""

    def __len__(self) -> int:
        return len(self.texts)


Layout = Literal["json_lines", "official", "hub"]
"""How the files of a task are arranged: local JSON lines, the files that its authors publish, or the Hub's dataset."""


@dataclass(frozen=True)
class TaskData:
    """The examples of a task as they were read."""

    task: Task
    train: Examples
    test: Examples
    """The examples on which scores are reported. No setting is chosen on them."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file that was read, by name."""
    layout: Layout = "official"
    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts of examples, of test examples that are in train too, and of examples left out, by reason."""


def _classification(name: str, title: str, fields: str, labels: str, *metrics: Metric) -> Task:
    return Task(name, title, "classification", tuple(fields.split()), tuple(labels.split()), metrics or ("accuracy",))


_PAIR = "sentence1 sentence2"
_THREE = "entailment neutral contradiction"
_TWO = "entailment not_entailment"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _classification("cola", "CoLA", "sentence", "0 1", "mcc"),
        _classification("sst2", "SST-2", "sentence", "0 1"),
        _classification("mrpc", "MRPC", _PAIR, "0 1", "accuracy", "f1"),
        Task("stsb", "STS-B", "regression", ("sentence1", "sentence2"), (), ("pearson", "spearman")),
        _classification("qqp", "QQP", "question1 question2", "0 1", "accuracy", "f1"),
        _classification("mnli", "MNLI-m", "premise hypothesis", _THREE),
        _classification("mnli_mismatched", "MNLI-mm", "premise hypothesis", _THREE),
        _classification("qnli", "QNLI", "question sentence", _TWO),
        _classification("rte", "RTE", _PAIR, _TWO),
        _classification("wnli", "WNLI", _PAIR, "0 1"),
        _classification("snli", "SNLI", _PAIR, _THREE),
        _classification("trec", "TREC", "sentence", "ABBR DESC ENTY HUM LOC NUM"),
        _classification("subj", "SUBJ", "sentence", "0 1"),
        Task("squad", "SQuAD 1.1", "spans", ("question", "context"), (), ("exact_match", "span_f1")),
        Task("blimp", "BLiMP", "minimal_pairs", ("sentence_good", "sentence_bad"), (), ("pair_accuracy",)),
    )
}
"""By the name that `--tasks` takes."""
