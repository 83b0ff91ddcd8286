"""Where words begin: by the marks that a tokenizer puts on its tokens, or else by its pre-tokenizer.

A tokenizer's ``WordRule`` is one of three:

- ``marks``: a token shows by itself whether it begins a word, so a table by id suffices (``word_starts``). WordPiece
  and any model with a ``continuing_subword_prefix`` mark the tokens that continue a word; sentencepiece, Metaspace and
  byte-level tokenizers mark the space before a word.
- ``pre_tokenizer``: tokens show nothing (BPE after Whitespace, WordLevel, ``</w>`` at the end of a word, Unigram
  without Metaspace). Words are then the pieces of the pre-tokenizer, as ``word_ids`` of transformers has them, and
  are known only while text is encoded (``starts_of``).
- ``unknown``: neither; for example BPE without pre-tokenizer, whose tokens cross the spaces between words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from megamask.data.tokenizer import METASPACE, Tokenizer, token_ids
from megamask.errors import ConfigError

WordRule = Literal["marks", "pre_tokenizer", "unknown"]

BYTE_SPACE = "Ġ"
"""A space in the alphabet of byte-level tokenizers."""
_PROBE = "lamp lamp lamp"


def word_rule(tokenizer: Tokenizer) -> WordRule:
    """How the words of ``tokenizer`` are found, see the module."""
    backend = tokenizer.backend
    if _attribute(backend, "continuing_subword_prefix"):
        return "marks"
    mark = _space_mark(backend)
    if mark and not _attribute(backend, "end_of_word_suffix") and not _crosses_words(backend, mark):
        return "marks"
    return "pre_tokenizer" if len(_pieces(backend, _PROBE)) >= len(_PROBE.split()) else "unknown"


def word_starts(tokenizer: Tokenizer) -> Bool[np.ndarray, " V"]:
    """For each id, whether a token of that id begins a word. All true unless the rule is ``marks``.

    With a continuing prefix: every token without it. SentencePiece and byte-level: tokens with the mark of a space,
    and, as in WordPiece, tokens that begin with neither letter, digit nor combining mark, so that a comma after a word
    is a word of its own. A table by id cannot see what stands before: letters that follow punctuation without a
    space ("t" in "don't") belong to the word that the punctuation began. Special tokens, and tokens that were added,
    begin words.
    """
    ids = token_ids(tokenizer)
    starts = np.ones(ids.size, bool)
    if word_rule(tokenizer) != "marks":
        return starts
    added = {*ids.special, *tokenizer.backend.get_added_tokens_decoder()}
    prefix = _attribute(tokenizer.backend, "continuing_subword_prefix")
    byte_level = not prefix and _space_mark(tokenizer.backend) == BYTE_SPACE
    for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if number in added:
            continue
        if prefix:
            starts[number] = not token.startswith(prefix)
        elif byte_level:
            starts[number] = _begins_word(bytes(BYTE_OF[c] for c in token if c in BYTE_OF))
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            starts[number] = _begins_word(bytes([int(token[3:5], 16)]))
        else:
            starts[number] = token.startswith(METASPACE) or _begins_word(token.encode())
    return starts


def piece_starts(encoding: Encoding) -> Bool[np.ndarray, " n"]:
    """Whether each token begins a piece of the pre-tokenizer."""
    numbers = np.array(encoding.word_ids, np.int64)
    return np.diff(numbers, prepend=-1) != 0


def encode_with_word_starts(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> list[tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
    """The ids of each text, and whether each token begins a word. Raises ConfigError if the rule is ``unknown``."""
    rule = word_rule(tokenizer)
    if rule == "unknown":
        raise ConfigError(unknown_words_problem("The tokenizer"))
    if rule == "pre_tokenizer":
        return [(np.array(each.ids, np.int64), piece_starts(each)) for each in tokenizer.encodings(texts)]
    table = word_starts(tokenizer)
    # the first token begins a word, with or without the mark of a space
    return [(ids, table[ids] | (np.arange(len(ids)) == 0)) for ids in tokenizer.encode(texts)]


def unknown_words_problem(what: str) -> str:
    """The sentence for a tokenizer whose words are ``unknown``."""
    return (
        f"{what} does not show where words begin: its tokens have no mark for it (such as ##, ▁ or Ġ), and no "
        "pre-tokenizer separates words. Set `masking.unit` to token, or prepare the text with another tokenizer."
    )


# ---- how long words are

CLAUSE = 4
"""Tokens of the median word from which words are taken for clauses."""


@dataclass(frozen=True)
class WordLengths:
    """How many words some text has, and how many tokens the median and the longest of them have."""

    words: int
    median: int
    longest: int

    @classmethod
    def of(cls, sizes: Int64[np.ndarray, " _sizes"]) -> WordLengths:
        """``sizes[n]`` words have n tokens."""
        words = int(sizes.sum())
        median = int(np.searchsorted(np.cumsum(sizes), (words + 1) // 2)) if words else 0
        return cls(words, median, int(np.flatnonzero(sizes).max(initial=0)))

    def sentence(self) -> str:
        """The sizes in words, and a warning if such words are clauses."""
        median = f"{self.median} token{'s' * (self.median != 1)}"
        said = f"{self.words:,} words, the median has {median}, the longest {self.longest:,}"
        if self.median < CLAUSE:
            return f"{said}."
        return (
            f"{said}: such a word is rather a clause, as in text without spaces. `masking.unit` word masks whole "
            "clauses; token does not."
        )


# ---- what a tokenizer does


def _attribute(backend: Backend, name: str) -> str:
    return getattr(backend.model, name, None) or ""


def normalized(backend: Backend, text: str) -> str:
    """The text as the pre-tokenizer sees it."""
    return backend.normalizer.normalize_str(text) if backend.normalizer else text


def _pieces(backend: Backend, text: str) -> list[str]:
    """What the model sees of a text."""
    text = normalized(backend, text)
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]


def _space_mark(backend: Backend) -> str:
    """The character that stands for the space between words where the model sees one, else ""."""
    seen = "".join(_pieces(backend, _PROBE))
    match = re.fullmatch(rf"[{METASPACE}{BYTE_SPACE}]?lamp([{METASPACE}{BYTE_SPACE}])lamp\1lamp", seen, re.IGNORECASE)
    return match[1] if match else ""


def _crosses_words(backend: Backend, mark: str) -> bool:
    """Whether a token goes on, or ends, with the space before the next word, so that this one lacks its mark."""
    return any(mark in token.lstrip(f"{mark} \n\t\rĊĉč") for token in backend.get_vocab(with_added_tokens=False))


def _begins_word(piece: bytes) -> bool:
    """Whether the first character of ``piece`` is whitespace, punctuation or a symbol; half a character is not."""
    text = piece.decode(errors="ignore")
    if not text or not piece.startswith(text[0].encode()):
        return False
    # a combining mark carries on the letter before it
    return not (text[0].isalnum() or unicodedata.category(text[0]).startswith("M"))


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al., 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_OF = _byte_alphabet()
