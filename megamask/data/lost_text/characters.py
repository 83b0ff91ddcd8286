"""Characters of a text: how often each occurs, and the words with some of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence

import numpy as np


def histogram(texts: Sequence[str]) -> dict[str, int]:
    """How often each character occurs."""
    counts = np.zeros(sys.maxunicode + 1, np.int64)
    for chunk in _chunks(texts):
        here = np.bincount(np.frombuffer(chunk.encode("utf-32-le"), np.uint32))
        counts[: len(here)] += here
    return {chr(c): int(counts[c]) for c in np.flatnonzero(counts)}


def _chunks(texts: Sequence[str]) -> Iterator[str]:
    """The texts joined to strings that fit into a processor's cache, unless a single text is longer."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= 2**15:
            yield "".join(chunk)
            chunk, size = [], 0
    yield "".join(chunk)


def any_of(characters: str) -> re.Pattern[str]:
    """A pattern that matches one of ``characters``."""
    return re.compile(f"[{re.escape(characters)}]" if characters else r"(?!)")


def words_with(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    """The words of ``text`` between whitespace in which ``pattern`` matches one character."""
    end = 0
    for match in pattern.finditer(text):
        if match.start() < end or match[0].isspace():
            continue
        begin, end = match.span()
        while begin and not text[begin - 1].isspace():
            begin -= 1
        while end < len(text) and not text[end].isspace():
            end += 1
        yield text[begin:end]
