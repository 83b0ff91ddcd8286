"""The texts of unknown tokens.

Most documents are encoded without offsets. If unknown tokens are rare in a document, only the words with a character
that may be the reason are encoded again, with offsets.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int64
from tokenizers import Encoding

from megamask.data.lost_text.characters import any_of, words_with
from megamask.data.tokenizer import Tokenizer

MAX_SHARE = 0.01
"""Share of unknown tokens in a document above which all of it is encoded again."""
MAX_WORD = 100
"""Length in characters above which WordPiece makes a word unknown, unless its file says otherwise."""


class UnknownTokens:
    """Finds the texts of unknown tokens. It caches which characters give one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        backend = tokenizer.backend
        model = json.loads(backend.to_str())["model"]
        unk = model.get("unk_id") if "unk_id" in model else backend.token_to_id(model.get("unk_token") or "")
        self.id: int | None = unk
        self._longest = model.get("max_input_chars_per_word", MAX_WORD)
        self._gives_unknown: dict[str, bool] = {}

    def counts(self, ids: Sequence[Int64[np.ndarray, " _"]]) -> list[int]:
        """The number of unknown tokens in each text."""
        return [int((each == self.id).sum()) if self.id is not None else 0 for each in ids]

    def texts_of(
        self,
        texts: Sequence[str],
        ids: Sequence[Int64[np.ndarray, " _"]],
        encodings: Sequence[Encoding] | None,
        characters: Iterable[str],
    ) -> Counter[str]:
        """The text of each unknown token, with how often it occurs; ``characters`` are those of ``texts``."""
        counts = self.counts(ids)
        unknown: Counter[str] = Counter()
        suspects = self._suspects(characters) if any(counts) and encodings is None else any_of("")
        for number in np.flatnonzero(counts).tolist():
            if encodings is not None:
                unknown.update(self._texts_by_offset(texts[number], encodings[number]))
            else:
                unknown.update(self._texts_in(texts[number], counts[number], len(ids[number]), suspects))
        return unknown

    def _texts_by_offset(self, text: str, encoding: Encoding) -> Iterator[str]:
        """The text of each unknown token, by its offsets."""
        return (
            text[begin:end]
            for number, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if number == self.id
        )

    def _texts_in(self, text: str, count: int, tokens: int, suspects: re.Pattern[str]) -> list[str]:
        """The texts of the ``count`` unknown tokens of ``text``; encodes only suspicious words if that suffices."""
        if count <= MAX_SHARE * tokens:
            words = list(words_with(suspects, text))
            for more in (False, True):
                if more:
                    words += [w for w in text.split() if len(w) > self._longest and not suspects.search(w)]
                encodings = self._tokenizer.encodings(words)
                pairs = zip(words, encodings, strict=True)
                unknown = [text for word, encoding in pairs for text in self._texts_by_offset(word, encoding)]
                if len(unknown) == count:
                    return unknown
        return list(self._texts_by_offset(text, *self._tokenizer.encodings([text])))

    def _suspects(self, characters: Iterable[str]) -> re.Pattern[str]:
        """A pattern of those ``characters`` that give an unknown token, alone or inside a word."""
        new = [c for c in characters if c not in self._gives_unknown]
        alone, inside = (self._tokenizer.encode([c * times for c in new]) for times in (1, 3))
        for character, *encoded in zip(new, alone, inside, strict=True):
            self._gives_unknown[character] = any(self.id in ids for ids in encoded)
        return any_of("".join(c for c in characters if self._gives_unknown[c]))
