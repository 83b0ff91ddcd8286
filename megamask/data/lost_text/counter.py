"""Counts what a tokenizer loses of a text. Costs about two percent of encoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from tokenizers import Encoding, models

from megamask.data.lost_text.characters import histogram
from megamask.data.lost_text.coverage import KEPT, Coverage, most_frequent, shortened
from megamask.data.lost_text.dropped_characters import DroppedCharacters
from megamask.data.lost_text.removed_characters import RemovedCharacters
from megamask.data.lost_text.unknown_tokens import UnknownTokens
from megamask.data.tokenizer import Tokenizer


class CoverageCounter:
    """Counts what ``tokenizer`` loses. Each process has one: it caches what it learned about characters and words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._unknown = UnknownTokens(tokenizer)
        self._dropped = DroppedCharacters(tokenizer, self._unknown.id is not None)
        self._removed = RemovedCharacters(tokenizer)
        self.needs_encodings = isinstance(tokenizer.backend.model, models.WordLevel)
        """Whether unknown tokens are so frequent that texts should be encoded with offsets at once."""

    def __call__(
        self, texts: Sequence[str], ids: Sequence[Int64[np.ndarray, " _"]], encodings: Sequence[Encoding] | None = None
    ) -> Coverage:
        """Counts over ``texts``, whose tokens are ``ids``. With ``encodings``, no text is encoded again."""
        characters = histogram(texts)
        unknown = self._unknown.texts_of(texts, ids, encodings, characters)
        dropped = self._dropped(texts, characters)
        removed = self._removed(texts, characters)
        return Coverage(
            tokens=sum(map(len, ids)),
            characters=sum(characters.values()),
            bytes=sum(len(character.encode()) * count for character, count in characters.items()),
            unknown_tokens=sum(self._unknown.counts(ids)),
            unknown_characters=sum(len("".join(text.split())) * count for text, count in unknown.items()),
            lost_characters=dropped.total(),
            removed_characters=removed.total(),
            examples=Counter(dict(most_frequent(shortened(unknown + dropped), KEPT))),
            removed_examples=Counter(dict(most_frequent(removed, KEPT))),
        )
