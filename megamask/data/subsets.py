"""Subsets: the documents with one value of the field `split_by`, such as a language; each becomes a source of shards.

All subsets have one tokenizer. An exponent decides the share of each in its training text, so that small subsets get
tokens too.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from megamask.data.mixture import BLOCK, smoothed_shares
from megamask.data.shards import Split
from megamask.errors import DataError, listed, must


@dataclass
class SubsetCounts:
    """What was read of each subset, and what cannot be assigned to one."""

    split_by: str
    documents: Counter[tuple[str, Split]] = field(default_factory=Counter)
    train_bytes: Counter[str] = field(default_factory=Counter)
    """UTF-8 bytes of the train documents."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Blank and duplicate documents of each subset."""
    unassigned: int = 0
    """Records without a subset."""
    first: str = ""
    """The problem of the first of them."""

    @property
    def names(self) -> list[str]:
        """The subsets, sorted."""
        return sorted({name for name, _ in self.documents})

    def add(self, subset: str, split: Split, text: str) -> None:
        """Count a document. DataError if there are more subsets than a mixture can have."""
        self.documents[subset, split] += 1
        if split == "train":
            self.train_bytes[subset] += len(text.encode())
        # counting names at each document would be slow
        if self.documents[subset, split] == 1 and len(self.names) > BLOCK:
            raise DataError(
                f"The field {self.split_by!r} (`split_by`) has more than {BLOCK:,} values, and a mixture has at most "
                f"that many sources; among the values are {listed(self.names)}. Name another field."
            )

    def reject(self, problem: str) -> None:
        """Count a record without a subset. DataError if none of the first `BLOCK` records has one."""
        self.unassigned += 1
        self.first = self.first or problem
        if self.unassigned == BLOCK and not self.documents:
            raise DataError(*self.problems(valid_share=0.0))

    def problems(self, valid_share: float) -> list[str]:
        """Sentences for records without a subset, and for subsets without a document in one of the splits."""
        problems = []
        if self.unassigned and not self.documents:
            return [
                f"None of the {self.unassigned:,} records read so far has a value of {self.split_by!r} (`split_by`) "
                f"that can be used. The first: {self.first} Name another field, or correct the records."
            ]
        if self.unassigned:
            have = "record has" if self.unassigned == 1 else "records have"
            problems.append(
                f"{self.unassigned:,} {have} no value of {self.split_by!r} (`split_by`) that can be used. The "
                f"first: {self.first} Correct them, name another field, or skip them (`on_bad_document` skip counts "
                "them, up to `bad_share` of all documents)."
            )
        for names in self._names_that_differ_in_case():
            problems.append(
                f"The values {', '.join(names)} of {self.split_by!r} (`split_by`) differ only in case, and would be "
                "several sources, whose folders some file systems do not distinguish. Use one spelling."
            )
        lost = [f"{name} ({count:,})" for name, count in sorted(self.dropped.items()) if name not in self.names]
        if lost:
            problems.append(
                f"All documents of {listed(lost, 'value')} of {self.split_by!r} (`split_by`) are blank or duplicates "
                "of others, so nothing is left to train on. Remove them, or correct the text."
            )
        for split in ("train", "valid") if valid_share else ("train",):
            empty = [name for name in self.names if not self.documents[name, split]]
            if empty:
                problems.append(empty_subsets_problem(self.split_by, split, self._sizes(empty), valid_share))
        return problems

    def _names_that_differ_in_case(self) -> list[list[str]]:
        """The subsets whose names differ only in case, together."""
        alike: dict[str, list[str]] = {}
        for name in self.names:
            alike.setdefault(name.casefold(), []).append(name)
        return [names for names in alike.values() if len(names) > 1]

    def _sizes(self, names: Sequence[str]) -> dict[str, int]:
        return {name: self.documents[name, "train"] + self.documents[name, "valid"] for name in names}


def empty_subsets_problem(split_by: str, split: Split, documents: Mapping[str, int], valid_share: float) -> str:
    """The sentence for subsets without text in a split; ``documents`` counts those of each."""
    which = listed((f"{name} ({count:,} document{'s' * (count != 1)})" for name, count in documents.items()), "value")
    sentence = f"The split {split!r} has no text of {which} of {split_by!r} (`split_by`), but a run needs some of each."
    # with such a share a split without documents is unlikely, but if it has happened, more is needed
    likely = math.ceil(500 / max(1, min(documents.values()))) / 100
    share = min(0.5, likely if likely > valid_share else 2 * valid_share)
    rest = "remove their documents, join them under another value, or give more text."
    if split == "valid" and share > valid_share and min(documents.values()) > 1:
        cure = f"Try `--valid-share {share:g}`, or {rest}"
        return f"{sentence} {must('valid_share', 'be larger', valid_share, cure)}"
    return f"{sentence} {rest.capitalize()}"


def tokenizer_quotas(train_bytes: Mapping[str, int], size: int, alpha: float) -> dict[str, int]:
    """The bytes of each subset in the training text of a tokenizer, of ``size`` in all, or of all there are.

    In proportion to (its bytes / all bytes) ** ``alpha``. A subset with fewer bytes is repeated. The exponent is not
    that of the mixture: XLM-R samples languages with 0.3 (Conneau et al. 2020), multilingual BERT with 0.7 for its
    text and its vocabulary.
    """
    names = sorted(train_bytes)
    sizes = [train_bytes[name] for name in names]
    shares = smoothed_shares(sizes, alpha)
    return {name: round(min(size, sum(sizes)) * share) for name, share in zip(names, shares.tolist(), strict=True)}


class TextSample:
    """The texts with the smallest hashes, of at most ``size`` bytes in all, but at least one: random and repeatable."""

    def __init__(self, size: int):
        self._size, self._bytes = size, 0
        self._heap: list[tuple[int, str]] = []

    def add(self, digest: bytes, text: str) -> None:
        """Add a text with the hash ``digest``, and drop those for which there is no more room."""
        heapq.heappush(self._heap, (-int.from_bytes(digest[8:], "little"), text))
        self._bytes += len(text.encode())
        while self._bytes > self._size and len(self._heap) > 1:
            self._bytes -= len(heapq.heappop(self._heap)[1].encode())

    def texts(self) -> list[str]:
        """The texts, from the smallest hash on."""
        return [text for _, text in sorted(self._heap, reverse=True)]

    def repeated(self) -> Iterator[str]:
        """The texts again and again, from the smallest hash on, up to ``size`` bytes."""
        left = self._size
        for number, text in enumerate(cycle(self.texts())):
            left -= len(text.encode())
            if left < 0 and number:
                return
            yield text
