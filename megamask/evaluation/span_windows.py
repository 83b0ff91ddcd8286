"""Questions and contexts as overlapping windows of tokens, the answers as tokens of a window, and back to text.

A context that does not fit beside its question is read in windows, each with the question. Windows that do not hold
the whole answer are trained to point at the first token, as in the code of BERT (Devlin et al. 2019, section 4.2). The
prediction is the best span of context tokens over all windows of a question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from megamask.evaluation.features import EncodedTexts
from megamask.evaluation.tasks import Answer, Examples

LENGTH = 384
"""Tokens of a window, unless the model has fewer positions."""
OVERLAP = 128
"""Tokens that two windows share; at most a third of the length."""
QUESTION = 64
"""Most tokens of a question; at most a third of the length. As in the code of BERT."""
LONGEST_ANSWER = 30
"""Most tokens of a predicted answer. As in the code of BERT."""


@dataclass(frozen=True)
class Windows:
    """The windows of all examples; the windows of one example are consecutive."""

    texts: EncodedTexts
    example: Int[np.ndarray, " w"]
    """The number of the example of each window."""
    offsets: tuple[Int[np.ndarray, "_L 2"], ...]
    """The characters of the context that each token covers; (0, 0) for tokens outside of the context."""
    context: tuple[Bool[np.ndarray, " _L"], ...]
    """Whether each token belongs to the context."""
    truncated_questions: int
    overlap: int
    """Tokens that two windows of an example share."""

    def __len__(self) -> int:
        return len(self.example)

    def characters(self, window: int) -> tuple[float, float]:
        """The first and the last character of the context that a window holds; without limit at the ends."""
        spans = self.offsets[window][self.context[window]]
        is_first = window == 0 or self.example[window - 1] != self.example[window]
        is_last = window == len(self) - 1 or self.example[window + 1] != self.example[window]
        return 0 if is_first else float(spans[0, 0]), math.inf if is_last else float(spans[-1, 1])


def make_windows(tokenizer: PreTrainedTokenizerBase, examples: Examples, length: int, *, token_types: bool) -> Windows:
    """All windows of at most ``length`` tokens. The fields of ``examples`` are question and context, in this order."""
    questions, truncated = _short_questions(tokenizer, [question for question, _ in examples.texts], length)
    overlap = min(OVERLAP, length // 3)
    encoded = tokenizer(
        questions,
        [context for _, context in examples.texts],
        truncation="only_second",
        max_length=length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=token_types,
        verbose=False,
    )
    context = tuple(
        np.array([part == 1 for part in encoded.sequence_ids(number)]) for number in range(len(encoded["input_ids"]))
    )
    offsets = tuple(
        np.where(inside[:, None], np.array(spans), 0)
        for spans, inside in zip(encoded["offset_mapping"], context, strict=True)
    )
    types = tuple(encoded["token_type_ids"]) if token_types else ()
    example = np.array(encoded["overflow_to_sample_mapping"], np.int64)
    return Windows(EncodedTexts(tuple(encoded["input_ids"]), types, 0), example, offsets, context, truncated, overlap)


def _short_questions(tokenizer: PreTrainedTokenizerBase, questions: list[str], length: int) -> tuple[list[str], int]:
    """The questions without leading whitespace, cut after `QUESTION` tokens, and how many were cut."""
    longest = min(QUESTION, length // 3)
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    short = [
        question[: spans[longest - 1][1]] if len(spans) > longest else question
        for question, spans in zip(questions, offsets, strict=True)
    ]
    return short, sum(len(spans) > longest for spans in offsets)


def answer_tokens(windows: Windows, answers: Sequence[Answer]) -> Int[np.ndarray, "w 2"]:
    """The first and last token of the answer of each window; 0 and 0 where the window does not hold all of it.

    ``answers`` has one answer for each example.
    """
    tokens = np.zeros((len(windows), 2), np.int64)
    for number, example in enumerate(windows.example):
        answer, offsets, context = answers[example], windows.offsets[number], windows.context[number]
        end = answer.start + len(answer.text)
        inside = np.flatnonzero(context & (offsets[:, 0] < end) & (offsets[:, 1] > answer.start))
        first, last = windows.characters(number)
        if len(inside) and first <= answer.start and end <= last:
            tokens[number] = inside[0], inside[-1]
    return tokens


def best_span(
    start: Float[np.ndarray, " L"], end: Float[np.ndarray, " L"], context: Bool[np.ndarray, " L"]
) -> tuple[int, int, float]:
    """First and last token and score (the sum of both logits) of the best span of at most `LONGEST_ANSWER` tokens."""
    start, end = np.where(context, start, -np.inf), np.where(context, end, -np.inf)
    length = len(start)
    sums = np.full((min(LONGEST_ANSWER, length), length), -np.inf)
    for more in range(len(sums)):
        sums[more, : length - more] = start[: length - more] + end[more:]
    more, first = divmod(int(sums.argmax()), length)
    return first, first + more, float(sums[more, first])


def predicted_answers(windows: Windows, examples: Examples, logits: Sequence[Float[np.ndarray, "_L 2"]]) -> list[str]:
    """The text of the best span of each example over its windows; ``logits`` are those of start and end by window."""
    best: dict[int, tuple[float, str]] = {}
    for number, example in enumerate(windows.example.tolist()):
        first, last, score = best_span(logits[number][:, 0], logits[number][:, 1], windows.context[number])
        if example not in best or score > best[example][0]:
            offsets = windows.offsets[number]
            best[example] = score, examples.texts[example][1][offsets[first, 0] : offsets[last, 1]].strip()
    return [best[example][1] for example in range(len(examples))]
