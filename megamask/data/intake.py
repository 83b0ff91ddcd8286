"""Which documents are kept: read, cleaned, each once, shared out to training and validation; all others are counted."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from megamask.data import text
from megamask.data.conllu import Tagged
from megamask.data.shards import Split
from megamask.data.tagger import Words
from megamask.data.text import Bad, Reading, Source
from megamask.errors import DataError

FEW = 10_000
"""Documents below which `bad_share` is of this many."""
REASONS = ("bad", "blank", "duplicate")
"""Why a document is not kept."""


@dataclass(frozen=True)
class Document:
    """One that is kept."""

    digest: bytes
    split: Split
    text: str
    words: Words | None
    """Its words with their tags, if they came with it."""


@dataclass(frozen=True)
class Intake:
    """What is read, and by which rules."""

    sources: Sequence[Source]
    reading: Reading
    on_bad_document: Literal["stop", "skip"]
    bad_share: float
    valid_share: float

    def documents(self, counts: Counter[str], label: str) -> Iterator[Document]:
        """Each document that is kept; ``counts`` says what became of all. Holds about 100 bytes for each.

        Raises DataError at a bad one, or at too many.
        """
        counts.update(dict.fromkeys(("documents", *REASONS), 0))
        seen: set[bytes] = set()
        for found in self._read(label):
            counts["documents"] += 1
            if isinstance(found, Bad):
                counts["bad"] += 1
                self._bear(found, counts)
                continue
            clean, words = (found.text, found.words) if isinstance(found, Tagged) else (text.normalise(found), None)
            digest = text.digest(clean)
            if not clean:
                counts["blank"] += 1
            elif digest in seen:
                counts["duplicate"] += 1
            else:
                seen.add(digest)
                split: Split = "valid" if text.is_valid(digest, self.valid_share) else "train"
                yield Document(digest, split, clean, words)

    def _bear(self, found: Bad, counts: Counter[str]) -> None:
        """Raise DataError unless a bad document may be left out."""
        if self.on_bad_document == "stop":
            raise DataError(f"{found.problem} (`on_bad_document` skip would count it and go on.)")
        if counts["bad"] > self.bad_share * max(counts["documents"], FEW):
            raise DataError(
                f"{found.problem} It is the {counts['bad']}. bad one of {counts['documents']} documents, more than "
                f"`bad_share` ({self.bad_share:g}) allows."
            )

    def _read(self, label: str) -> Iterator[str | Tagged | Bad]:
        """Every document as it stands, under a bar that moves by the bytes of its files."""
        size = sum(source.size for source in self.sources)
        done = 0
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=label, disable=None) as bar:
            for source in self.sources:
                with source.open() as raw:
                    for found in text.documents(source, self.reading, raw):
                        yield found
                        if raw is not None and not raw.closed:
                            bar.update(done + raw.tell() - bar.n)
                done += source.size

    def sample(self, size: int) -> list[str]:
        """Train documents of ``size`` bytes in all, those with the smallest hashes: a fair and repeatable draw."""
        drawn: list[tuple[int, str]] = []
        held = 0
        for document in self.documents(Counter(), "reading for the tokenizer"):
            if document.split == "train":
                heapq.heappush(drawn, (-int.from_bytes(document.digest[8:], "little"), document.text))
                held += len(document.text.encode())
                while held > size and len(drawn) > 1:
                    held -= len(heapq.heappop(drawn)[1].encode())
        return [clean for _, clean in sorted(drawn, reverse=True)]
