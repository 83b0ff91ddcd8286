"""Exact match and F1 of answers equal those of the official definition."""

from __future__ import annotations

import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.evaluation.squad_scores import answer_f1, exact_match, normalize_answer

WORDS = st.sampled_from(
    ["The", "a", "an", "cat", "Cats.", "U.S.", "1,000", "theory", "—", "“quoted”", "\tno\n", "An-a"]
)
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)


def official(answer, right):
    """Exact match and F1 as evaluate-v1.1.py describes them, written step by step."""

    def words(text):
        text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    f1 = []
    for each in right:
        common = sum((Counter(words(answer)) & Counter(words(each))).values())
        if common == 0:
            f1.append(0.0)
            continue
        precision, recall = common / len(words(answer)), common / len(words(each))
        f1.append(2 * precision * recall / (precision + recall))
    return float(" ".join(words(answer)) in [" ".join(words(each)) for each in right]), max(f1)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_scores_are_those_of_the_official_definition(answer, right):
    match, f1 = official(answer, right)
    assert exact_match(answer, right) == match
    assert answer_f1(answer, right) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "right", "match", "f1"),
    [
        ("The  Cat.", ["a cat"], 1, 1),
        ("black cat", ["cat", "the black dog"], 0, 2 / 3),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("", ["cat"], 0, 0),
        ("theory", ["ory"], 0, 0),
        ("U.S.", ["us"], 1, 1),
    ],
)
def test_scores_by_hand(answer, right, match, f1):
    assert (exact_match(answer, right), answer_f1(answer, right)) == (match, pytest.approx(f1))


def test_normalization_keeps_words_that_begin_like_an_article():
    assert normalize_answer("An anthem, the (theme)!") == "anthem theme"


def test_scores_equal_those_of_torchmetrics():
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    cases = [("The black cat.", ["cat", "a black dog"]), ("in 1,000 U.S. homes", ["1000 homes"]), ("none", ["some"])]
    predictions = [{"prediction_text": answer, "id": str(n)} for n, (answer, _) in enumerate(cases)]
    targets = [
        {"answers": {"answer_start": [0] * len(right), "text": right}, "id": str(n)}
        for n, (_, right) in enumerate(cases)
    ]
    result = squad(predictions, targets)
    assert result["exact_match"].item() == pytest.approx(100 * sum(exact_match(*case) for case in cases) / len(cases))
    assert result["f1"].item() == pytest.approx(100 * sum(answer_f1(*case) for case in cases) / len(cases))
