"""Excerpts of the held-out text, on which an export is compared, and sentences with a masked word."""

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
"""Fewest and most tokens of a sentence with a masked word."""
_ENDS = re.compile(r"(?<=[.!?।؟])\s+|(?<=[。！？])|\s*\n\s*")  # noqa: RUF001


@dataclass(frozen=True)
class FillMaskExample:
    """A sentence in which the mask token replaces one word, and that word."""

    sentence: str
    answer: str


def excerpts(text: Shards, tokenizer: Tokenizer, count: int = 8) -> list[str]:
    """Decoded text from the beginning of ``count`` documents, which are spread over the first shard of ``text``.

    Each is the longest part without a special token, so it has no gap where an unknown word was.
    """
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    special = [vocab[tokenizer.roles[role]] for role in ROLES if tokenizer.roles.get(role) in vocab]
    offsets, tokens = next(text.offsets()), text.parts[0]
    documents = len(offsets) - 1
    decoded = []
    for number in dict.fromkeys(n * documents // count for n in range(count)):
        ids = tokens[offsets[number] : min(offsets[number + 1], offsets[number] + LENGTH)]
        is_special = np.isin(ids, special)
        longest = max(np.split(np.arange(len(ids)), np.flatnonzero(is_special)), key=len)
        decoded.append(tokenizer.decode(ids[longest[~is_special[longest]]]).strip())
    return [excerpt for excerpt in dict.fromkeys(decoded) if excerpt]


def fill_mask_examples(excerpts: Sequence[str], tokenizer: Tokenizer, count: int = 4) -> list[FillMaskExample]:
    """A sentence with one masked word from each of the first ``count`` excerpts that have one."""
    chosen: list[FillMaskExample] = []
    for excerpt in excerpts:
        sentences = [sentence.strip() for sentence in _ENDS.split(excerpt) if sentence.strip()]
        beginning = tokenizer.decode(tokenizer.encode([excerpt])[0][:LONG]).strip()
        candidates = [*(sentences[:-1] or sentences), beginning]  # the last sentence may be cut off
        chosen += [example for sentence in candidates if (example := _mask_word(sentence, tokenizer))][:1]
        if len(chosen) == count:
            break
    return chosen


def _mask_word(sentence: str, tokenizer: Tokenizer) -> FillMaskExample | None:
    """The sentence with one token masked, a whole word if possible; None if its length or content is unsuitable."""
    if any(role.lower() in sentence.lower() for role in tokenizer.roles.values()):
        return None
    ids, offsets = tokenizer.encode_with_offsets([sentence])[0]
    if not SHORT <= len(ids) <= LONG:
        return None
    pieces = [(begin, end) for begin, end in offsets.tolist() if sentence[begin:end].strip().isalpha()]
    words = [(begin, end) for begin, end in pieces if _is_whole(sentence, begin, end)]
    candidates = words or pieces
    if not candidates:
        return None
    begin, end = candidates[len(candidates) // 2]
    begin += len(sentence[begin:end]) - len(sentence[begin:end].lstrip())  # a token may include the space before it
    return FillMaskExample(sentence[:begin] + tokenizer.roles["mask"] + sentence[end:], sentence[begin:end])


def _is_whole(sentence: str, begin: int, end: int) -> bool:
    """Whether no letter precedes or follows a piece of the sentence."""
    before, after = sentence[begin - 1 : begin], sentence[end : end + 1]
    return (sentence[begin].isspace() or not before.isalnum()) and not after.isalnum()
