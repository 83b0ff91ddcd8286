"""Characters that the normalizer of a tokenizer removes.

A ``Replace`` that removes text depends on the context, so it costs two more normalizations of the text: with it and
without it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

from megamask.data.lost_text.characters import histogram
from megamask.data.tokenizer import METASPACE, Tokenizer
from megamask.data.word_boundaries import normalized


class RemovedCharacters:
    """Counts the characters that the normalizer removes. It caches which characters are always removed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        steps = normalizer_steps(json.loads(tokenizer.backend.to_str())["normalizer"])
        # a Prepend adds text that is not in the input, ByteLevel writes bytes
        steps = [step for step in steps if step["type"] not in ("Prepend", "ByteLevel")]
        keeping = [step for step in steps if not _removes_text(step)]
        self._keeping = _normalizer(keeping)
        self._removing = _normalizer(steps) if keeping != steps else None
        self._split = tokenizer.split_at_added_tokens
        self._removed: dict[str, bool] = {}

    def __call__(self, texts: Sequence[str], counts: dict[str, int]) -> Counter[str]:
        """The characters of ``texts`` that the normalizer removes, with how often each occurs.

        ``counts`` has the number of occurrences of each character in ``texts``.
        """
        removed = Counter({c: times for c, times in counts.items() if self._is_removed(c)})
        if self._removing is None:
            return removed
        # steps that depend on context: the text without these steps, minus the text with them
        kept, left = (
            Counter(histogram([normalized(backend, part) for text in texts for part in self._split(text)]))
            for backend in (self._keeping, self._removing)
        )
        # accents are removed on purpose
        return removed + Counter(
            {c: n for c, n in (kept - left).items() if not (c.isspace() or c == METASPACE or unicodedata.combining(c))}
        )

    def _is_removed(self, character: str) -> bool:
        """Whether nothing of ``character`` is left in any context."""
        if character not in self._removed:
            gone = not normalized(self._keeping, character).strip()
            self._removed[character] = gone and not character.isspace()
        return self._removed[character]


def normalizer_steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The normalizers of a tokenizer file in order, with sequences flattened."""
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [step for part in normalizer["normalizers"] for step in normalizer_steps(part)]
    return [normalizer]


def _normalizer(steps: list[dict[str, Any]]) -> Backend:
    """A tokenizer that is only used for its normalizer ``steps``."""
    content = json.loads(Backend(models.BPE()).to_str())
    return Backend.from_str(json.dumps(content | {"normalizer": {"type": "Sequence", "normalizers": steps}}))


def _removes_text(step: dict[str, Any]) -> bool:
    """Whether a normalizer is a ``Replace`` that puts nothing, or a blank, in the place of text that is not blank."""
    if step["type"] != "Replace" or step["content"].replace(METASPACE, "").strip():
        return False
    [(kind, pattern)] = step["pattern"].items()
    if kind == "Regex":  # without the signs that a pattern of whitespace consists of
        pattern = re.sub(r"\\[snrtfv]|\{[\d,]*\}|[\[\]()|+*?$]", "", pattern.removeprefix("^"))
    return bool(pattern.replace(METASPACE, "").strip())
