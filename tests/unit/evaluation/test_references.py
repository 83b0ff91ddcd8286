"""References know what words can tell, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from megamask.evaluation.references import bag_of_words, majority_class
from megamask.evaluation.tasks import TASKS, Examples, TaskData

RNG = np.random.default_rng(3)
WORDS = [f"word{number}" for number in range(30)]


def examples(count: int, *, right: bool, fields: int = 1) -> Examples:
    """Texts of random words whose label follows from the word `fine`, or from nothing."""
    labels = (RNG.random(count) < 0.4).astype(float)
    texts = []
    for label in labels:
        words = [" ".join(RNG.choice(WORDS, 5)) for _ in range(fields)]
        texts.append(tuple([f"{words[0]} fine" if right and label else words[0], *words[1:]]))
    return Examples(tuple(texts), labels)


def test_the_majority_is_that_of_train() -> None:
    train, test = examples(50, right=False), examples(40, right=False)
    outcome = majority_class(TaskData(TASKS["sst2"], train, test))
    assert outcome.scores["accuracy"] == pytest.approx(np.mean(test.labels == 0)) and not outcome.collapsed
    assert majority_class(TaskData(TASKS["mrpc"], train, test)).scores["f1"] == 0
    constant = majority_class(TaskData(TASKS["stsb"], train, test))
    assert constant.predictions == pytest.approx(np.full(40, train.labels.mean())) and constant.scores["pearson"] == 0


@pytest.mark.parametrize(("name", "fields"), [("sst2", 1), ("mrpc", 2)])
def test_words_are_learned_and_their_absence_is_a_collapse(name: str, fields: int) -> None:
    data = TaskData(TASKS[name], examples(150, right=True, fields=fields), examples(60, right=True, fields=fields))
    assert not bag_of_words(data).collapsed
    assert bag_of_words(data).scores["accuracy"] > majority_class(data).scores["accuracy"]
    noise = TaskData(TASKS[name], examples(150, right=False, fields=fields), examples(60, right=False, fields=fields))
    assert bag_of_words(noise).collapsed
    assert (bag_of_words(data).predictions == bag_of_words(data).predictions).all()


def test_the_overlap_of_a_pair_is_a_feature() -> None:
    def pairs(count: int) -> Examples:
        labels = RNG.integers(0, 6, count).astype(float)
        texts = []
        for label in labels:
            first = RNG.choice(WORDS, 5, replace=False)
            others = [word for word in WORDS if word not in first]
            texts.append((" ".join(first), " ".join([*first[: int(label)], *others[: 5 - int(label)]])))
        return Examples(tuple(texts), labels)

    assert bag_of_words(TaskData(TASKS["stsb"], pairs(200), pairs(60))).scores["spearman"] > 0.8


def test_every_class_of_several_is_predicted() -> None:
    labels = np.tile(np.arange(6.0), 20)
    marked = Examples(tuple((f"{WORDS[int(label)]} and so on",) for label in labels), labels)
    outcome = bag_of_words(TaskData(TASKS["trec"], marked, marked))
    assert (outcome.predictions == labels).all() and not outcome.collapsed


def test_without_any_word_the_largest_class_is_predicted_and_a_collapse() -> None:
    empty = Examples((("",), (" ",), ("",)), np.array([1.0, 1.0, 0.0]))
    outcome = bag_of_words(TaskData(TASKS["sst2"], empty, examples(5, right=True)))
    assert "are empty" in outcome.collapsed and (outcome.predictions == 1).all()
