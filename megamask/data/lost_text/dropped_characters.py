"""Characters that get no token: BPE without an unknown token drops them, or the pre-tokenizer does.

Only words with a character that the tokenizer may drop are examined, and each different word once. If the
pre-tokenizer drops more than whitespace, every word is examined. Words are the text between whitespace.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from megamask.data.lost_text.characters import any_of, words_with
from megamask.data.lost_text.removed_characters import normalizer_steps
from megamask.data.tokenizer import Tokenizer
from megamask.data.word_boundaries import normalized


class DroppedCharacters:
    """Counts the characters that get no token. It caches the result of each word."""

    def __init__(self, tokenizer: Tokenizer, has_unknown: bool) -> None:
        self._backend = tokenizer.backend
        content = json.loads(self._backend.to_str())
        model, pre_tokenizer = content["model"], json.dumps(content["pre_tokenizer"])
        self._bpe = model if model["type"] == "BPE" and not has_unknown else None
        self._vocabulary = self._backend.get_vocab(with_added_tokens=False) if self._bpe else {}
        self._normalizes_to_bytes = any(s["type"] == "ByteLevel" for s in normalizer_steps(content["normalizer"]))
        self._byte_level = self._normalizes_to_bytes or '"ByteLevel"' in pre_tokenizer
        self._drops_separators = re.search(r'"Removed"|"CharDelimiterSplit"', pre_tokenizer) is not None
        self._split = tokenizer.split_at_added_tokens
        self._dropped_in = lru_cache(100_000)(self._compute_dropped)

    def __call__(self, texts: Sequence[str], characters: Iterable[str]) -> Counter[str]:
        """The characters of ``texts`` without a token, with counts; ``characters`` are all of ``texts``."""
        dropped: Counter[str] = Counter()
        for word, count in self._words_to_check(texts, characters).items():
            for character in self._dropped_in(word):
                dropped[character] += count
        return dropped

    def _words_to_check(self, texts: Sequence[str], characters: Iterable[str]) -> Counter[str]:
        """Words that may have such characters, with how often each occurs."""
        if self._drops_separators:
            return Counter(word for text in texts for word in text.split())
        suspects = [c for c in characters if self._bpe and (self._dropped_in(c) or self._dropped_in(c * 3))]
        if not suspects:
            return Counter()
        pattern = any_of("".join(suspects))
        return Counter(word for text in texts for word in words_with(pattern, text))

    def _compute_dropped(self, word: str) -> tuple[str, ...]:
        """The characters of the normalized ``word`` that get no token."""
        dropped_characters: list[str] = []
        for part in self._split(word):
            text = normalized(self._backend, part)
            pieces = [(text, (0, len(text)))]
            if self._backend.pre_tokenizer:
                pieces = self._backend.pre_tokenizer.pre_tokenize_str(text)
            covered = np.zeros(len(text), bool)
            places: set[int] = set()  # in a text of bytes, where a piece may be a part of a character
            for piece, (begin, end) in pieces:
                covered[begin:end] = True
                dropped = self._dropped_by_model(piece)
                if self._normalizes_to_bytes:
                    # a pre-tokenizer adds characters in front of a piece
                    places.update(max(end - len(piece) + at, begin) for at in dropped)
                else:
                    dropped_characters += _characters(piece, dropped, as_bytes=self._byte_level)
            places.update(np.flatnonzero(~covered).tolist())
            dropped_characters += _characters(text, sorted(places), as_bytes=self._normalizes_to_bytes)
        return tuple(dropped_characters)

    def _dropped_by_model(self, piece: str) -> list[int]:
        """The places in ``piece`` of characters for which a BPE without an unknown token has no token."""
        model = self._bpe
        if not model or (model.get("ignore_merges") and piece in self._vocabulary):
            return []
        prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        last = len(piece) - 1
        dropped = []
        for at, character in enumerate(piece):
            token = (prefix if at else "") + character + (suffix if at == last else "")
            by_bytes = model.get("byte_fallback") and all(
                f"<0x{byte:02X}>" in self._vocabulary for byte in token.encode()
            )
            if token not in self._vocabulary and not by_bytes and not character.isspace():
                dropped.append(at)
        return dropped


def _characters(text: str, places: Sequence[int], *, as_bytes: bool) -> list[str]:
    """The characters at ``places``, without whitespace; if ``as_bytes``, those that the bytes there belong to."""
    if as_bytes and all(c in BYTE_OF for c in text):
        return _characters_at(bytes(BYTE_OF[c] for c in text), set(places))
    return [text[at] for at in places if not text[at].isspace()]


def _characters_at(text: bytes, places: set[int]) -> list[str]:
    """The characters of a UTF-8 text with a byte at ``places``."""
    begins = [at for at, byte in enumerate(text) if byte & 0xC0 != 0x80] + [len(text)]
    return [
        text[begin:end].decode(errors="replace")
        for begin, end in pairwise(begins)
        if not places.isdisjoint(range(begin, end)) and not text[begin:end].isspace()
    ]


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary (Radford et al., 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_OF = _byte_alphabet()
