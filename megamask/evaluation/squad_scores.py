"""Exact match and F1 of answers, as the official script of SQuAD 1.1 defines them (Rajpurkar et al. 2016, section 6.1).

Answers are compared in lower case, without punctuation, articles and extra whitespace. The score of a question is the
largest over its right answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, the words a, an and the, and extra whitespace; in this order."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if ``answer`` equals one of the ``right`` ones after normalization, else 0."""
    return float(any(normalize_answer(answer) == normalize_answer(each) for each in right))


def answer_f1(answer: str, right: Sequence[str]) -> float:
    """The largest F1 of the words of ``answer`` and those of a ``right`` answer, counted with repetitions."""
    return max(_f1(normalize_answer(answer).split(), normalize_answer(each).split()) for each in right)


def _f1(words: list[str], right: list[str]) -> float:
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right)) if common else 0.0
