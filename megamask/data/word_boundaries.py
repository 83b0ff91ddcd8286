"""Word boundaries: the tokens that begin a word, by the marks of a tokenizer or by its pre-tokenizer.

A tokenizer has one of three rules (``WordRule``):

- ``marks``: a token shows by itself whether it begins a word, so a table by id suffices (``word_starts``). WordPiece
  marks the tokens that continue a word; sentencepiece and Metaspace mark the space before a word.
- ``pre_tokenizer``: tokens do not show it. Words are then the pieces of the pre-tokenizer, the same as ``word_ids`` of
  transformers, and are known only while text is encoded (``piece_starts``). This is the rule of byte-level BPE, whose
  tokens mark spaces but not the letters after a "(" or an added token; of BPE and Unigram after Whitespace; of
  WordLevel.
- ``unknown``: neither, for example BPE without a pre-tokenizer, whose tokens cross the spaces between words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64
from tokenizers import Encoding, models
from tokenizers import Tokenizer as Backend

from megamask.data.tokenizer import METASPACE, Tokenizer, token_ids
from megamask.errors import ConfigError

WordRule = Literal["marks", "pre_tokenizer", "unknown"]

_PROBE = "lamp lamp lamp"


def word_rule(tokenizer: Tokenizer) -> WordRule:
    """The rule by which the words of ``tokenizer`` are found; see the module."""
    backend = tokenizer.backend
    if _is_wordpiece(backend) or (_marks_spaces(backend) and not _crosses_words(backend)):
        return "marks"
    return "pre_tokenizer" if len(_pieces(backend, _PROBE)) >= len(_PROBE.split()) else "unknown"


def word_starts(tokenizer: Tokenizer) -> Bool[np.ndarray, " V"]:
    """For each id, whether a token of that id begins a word. All true unless the rule is ``marks``.

    WordPiece: every token without the prefix of a continuation. Sentencepiece and Metaspace: tokens with the mark of a
    space and, as in WordPiece, tokens that begin with punctuation or a symbol, so that a comma after a word is a word
    of its own. A table by id does not see the token before: letters that follow punctuation without a space ("t" in
    "don't"), and an unknown token inside a word, belong to the word before them. Other special tokens, and added
    tokens, begin words.
    """
    ids = token_ids(tokenizer)
    starts = np.ones(ids.size, bool)
    if word_rule(tokenizer) != "marks":
        return starts
    backend = tokenizer.backend
    unknown = backend.token_to_id(tokenizer.roles.get("unk", ""))
    added = {*ids.special, *backend.get_added_tokens_decoder()}
    prefix = _attribute(backend, "continuing_subword_prefix")
    for token, number in backend.get_vocab(with_added_tokens=True).items():
        if number == unknown:
            starts[number] = bool(prefix)  # in WordPiece it is a whole word
        elif number in added:
            continue
        elif prefix:
            starts[number] = not token.startswith(prefix)
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
    """The error for a tokenizer whose words are ``unknown``."""
    return (
        f"{what} does not show where words begin: its tokens have no mark for it (such as ## or ▁), and no "
        "pre-tokenizer separates words. Set `masking.unit` to token, or prepare the text with another tokenizer."
    )


# ---- lengths of words

CLAUSE = 4
"""If the median word has as many tokens, words are probably clauses."""


@dataclass(frozen=True)
class WordLengths:
    """The number of words of a text, and the number of tokens of the median and the longest word."""

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
        """The lengths as a sentence, with a warning if words are probably clauses."""
        median = f"{self.median} token{'s' * (self.median != 1)}"
        lengths = f"{self.words:,} words, the median has {median}, the longest {self.longest:,}"
        if self.median < CLAUSE:
            return f"{lengths}."
        return (
            f"{lengths}: words are probably clauses, as in text without spaces. `masking.unit` word masks whole "
            "clauses; token does not."
        )


# ---- properties of a tokenizer


def _attribute(backend: Backend, name: str) -> str:
    return getattr(backend.model, name, None) or ""


def _is_wordpiece(backend: Backend) -> bool:
    return isinstance(backend.model, models.WordPiece) and bool(_attribute(backend, "continuing_subword_prefix"))


def normalized(backend: Backend, text: str) -> str:
    """The text as the pre-tokenizer sees it."""
    return backend.normalizer.normalize_str(text) if backend.normalizer else text


def _pieces(backend: Backend, text: str) -> list[str]:
    """The pieces of a text that the model sees."""
    text = normalized(backend, text)
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]


def _marks_spaces(backend: Backend) -> bool:
    """Whether the model sees ▁ for the space between words and does not mark the ends of words."""
    text = "".join(_pieces(backend, _PROBE)).lower()
    marked = _PROBE.replace(" ", METASPACE)
    return text.removeprefix(METASPACE) == marked and not _attribute(backend, "end_of_word_suffix")


def _crosses_words(backend: Backend) -> bool:
    """Whether a token continues, or ends, with the space before the next word, so that this one lacks its mark."""
    return any(METASPACE in token.lstrip(f"{METASPACE} \n\t\r") for token in backend.get_vocab(with_added_tokens=False))


def _begins_word(piece: bytes) -> bool:
    """Whether the first character of ``piece`` is whitespace, punctuation or a symbol; half a character is not."""
    text = piece.decode(errors="ignore")
    if not text or not piece.startswith(text[0].encode()):
        return False
    # a combining mark belongs to the letter before it
    return not (text[0].isalnum() or unicodedata.category(text[0]).startswith("M"))
