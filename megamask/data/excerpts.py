"""Pieces of the held-out text: what an export is compared on, and what a finished model is asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megamask.data.shards import Shards
from megamask.data.tokenizer import ROLES, Tokenizer

LENGTH = 100
"""Tokens of an excerpt."""
SHORT, LONG = 5, 40
"""Tokens of a sentence that is asked."""
_ENDS = re.compile(r"(?<=[.!?।؟])\s+|(?<=[。！？])|\s*\n\s*")  # noqa: RUF001


@dataclass(frozen=True)
class Question:
    """A sentence in which one word is the mask token, and that word."""

    sentence: str
    answer: str


def excerpts(text: Shards, tokenizer: Tokenizer, count: int = 8) -> list[str]:
    """The beginnings of ``count`` documents from all over the first shard of ``text``, decoded.

    Special tokens are left out, so an unknown word is missing there.
    """
    known = tokenizer.backend.get_vocab(with_added_tokens=True)
    special = [known[tokenizer.roles[role]] for role in ROLES if tokenizer.roles.get(role) in known]
    offsets, tokens = next(text.offsets()), text.parts[0]
    documents = len(offsets) - 1
    found = []
    for number in dict.fromkeys(n * documents // count for n in range(count)):
        ids = tokens[offsets[number] : min(offsets[number + 1], offsets[number] + LENGTH)]
        found.append(tokenizer.decode(ids[~np.isin(ids, special)]).strip())
    return [excerpt for excerpt in dict.fromkeys(found) if excerpt]


def questions(excerpts: Sequence[str], tokenizer: Tokenizer, count: int = 4) -> list[Question]:
    """A sentence, or the beginning, of each of the first ``count`` excerpts that has one, with a word of it hidden."""
    found = []
    for excerpt in excerpts:
        sentences = [sentence.strip() for sentence in _ENDS.split(excerpt) if sentence.strip()]
        beginning = tokenizer.decode(tokenizer.encode([excerpt])[0][:LONG]).strip()
        likely = [*(sentences[:-1] or sentences), beginning]  # the last one may be cut
        asked = (question for sentence in likely if (question := _ask(sentence, tokenizer)))
        if question := next(asked, None):
            found.append(question)
    return found[:count]


def _ask(sentence: str, tokenizer: Tokenizer) -> Question | None:
    """The sentence with one token hidden, a whole word where there is one; None if it does not lend itself to that."""
    if any(role.lower() in sentence.lower() for role in tokenizer.roles.values()):
        return None
    ids, places = tokenizer.encode_with_offsets([sentence])[0]
    if not SHORT <= len(ids) <= LONG:
        return None
    words = [(begin, end) for begin, end in places.tolist() if sentence[begin:end].strip().isalpha()]
    whole = [(begin, end) for begin, end in words if _is_whole(sentence, begin, end)]
    likely = whole or words
    if not likely:
        return None
    begin, end = likely[len(likely) // 2]
    begin += len(sentence[begin:end]) - len(sentence[begin:end].lstrip())  # a token may carry the space before it
    return Question(sentence[:begin] + tokenizer.roles["mask"] + sentence[end:], sentence[begin:end])


def _is_whole(sentence: str, begin: int, end: int) -> bool:
    """Whether no letter stands before or behind a piece of the sentence."""
    before, behind = sentence[begin - 1 : begin], sentence[end : end + 1]
    return (sentence[begin].isspace() or not before.isalnum()) and not behind.isalnum()
