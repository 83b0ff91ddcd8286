"""Which documents are kept: read, cleaned, each once, shared out to training and validation; all others are counted."""

from __future__ import annotations

import heapq
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from megamask.data.formats.conllu import TaggedDocument
from megamask.data.formats.lines import BadDocument, FileWarning
from megamask.data.input_file import InputFile
from megamask.data.pos_tagger import TaggedWords
from megamask.data.read_documents import ReadOptions, document_hash, is_validation, normalize_text, read_documents
from megamask.data.shards import Split
from megamask.errors import DataError
from megamask.runtime.progress_bar import ProgressBar

FEW = 10_000
"""Documents below which `bad_share` is of this many."""
REASONS = ("bad", "blank", "duplicate")
"""Why a document is not kept."""
SKIP = "(`on_bad_document` skip would count it and go on.)"
EMPTY = "empty_files"
"""The count of files without a document."""
CUT = "cut_files"
"""The count of files that a fault ends before their end."""
NAMED = 10
"""Bad documents that are named when they are skipped; of those that end their file, ten times as many."""
MANY_LINES = 1000
"""Lines of a document from a .txt file that seem to be a document each."""


def print_warning(line: str) -> None:
    """Write a line to stderr. Output that cannot be written is dropped: it must not end the work."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Document:
    """One that is kept."""

    digest: bytes
    split: Split
    text: str
    words: TaggedWords | None
    """Its words with their tags, if they came with it."""
    source: str
    """The name of the input that holds it."""


@dataclass(frozen=True)
class Corpus:
    """What is read, and by which rules."""

    sources: Sequence[InputFile]
    options: ReadOptions
    on_bad_document: Literal["stop", "skip"]
    bad_share: float
    valid_share: float
    warned: set[str] = field(default_factory=set)
    """Warnings that were given: the text may be read twice."""
    remarks: set[str] = field(default_factory=set)
    """Remarks of readers that were given, at most one for each file."""

    def documents(self, counts: Counter[str], label: str) -> Iterator[Document]:
        """Each document that is kept; ``counts`` says what became of all. Holds about 100 bytes for each.

        Raises DataError at a bad one, or at too many.
        """
        counts.update(dict.fromkeys(("documents", *REASONS, EMPTY, CUT), 0))
        seen: set[bytes] = set()
        for source, found in self._read(label, counts):
            counts["documents"] += 1
            if isinstance(found, BadDocument):
                counts["bad"] += 1
                counts[CUT] += found.ends_file and source.is_file
                self._bear(found, counts)
                continue
            clean, words = normalize_text(found) if isinstance(found, str) else found.text, None
            if isinstance(found, TaggedDocument):
                words = found.words
            self._warn_of_lines(source, clean)
            key = document_hash(clean)
            if not clean:
                counts["blank"] += 1
            elif key in seen:
                counts["duplicate"] += 1
            else:
                seen.add(key)
                split: Split = "valid" if is_validation(key, self.valid_share) else "train"
                yield Document(key, split, clean, words, source.name)

    def _warn_of_lines(self, source: InputFile, clean: str) -> None:
        """Say once that a document seems to be many, one a line."""
        if source.kind != ".txt" or self.options.documents != "blocks" or "lines" in self.warned:
            return
        count = clean.count("\n") + 1
        if count > MANY_LINES:
            self.warned.add("lines")
            print_warning(
                f"{source.path} has a document of {count:,} lines: no blank line stands between them. "
                "`--documents lines` makes each line a document."
            )

    def _remark(self, remark: FileWarning) -> None:
        """Say once what a reader noticed."""
        if remark.message not in self.remarks:
            self.remarks.add(remark.message)
            print_warning(remark.message)

    def _bear(self, found: BadDocument, counts: Counter[str]) -> None:
        """Raise DataError unless a bad document may be left out."""
        if self.on_bad_document == "stop":
            raise DataError(f"{found.problem} {SKIP}")
        if counts["bad"] > self.bad_share * max(counts["documents"], FEW):
            raise DataError(
                f"{found.problem} It is the {counts['bad']}. bad one of {counts['documents']} documents, more than "
                f"`bad_share` ({self.bad_share:g}) allows."
            )
        if found.problem not in self.warned and len(self.warned) < (10 * NAMED if found.ends_file else NAMED):
            self.warned.add(found.problem)
            print_warning(f"Skipped: {found.problem}")

    def _read(self, label: str, counts: Counter[str]) -> Iterator[tuple[InputFile, str | TaggedDocument | BadDocument]]:
        """Every document as it stands, with its source. Shows how many bytes of the files are read.

        Counts files without a document; DataError at one unless bad documents are skipped.
        """
        size = sum(source.size for source in self.sources)
        done = 0
        with ProgressBar(label, size or None, "byte" if size else "document") as bar:
            for source in self.sources:
                before = counts["documents"]
                with source.open() as raw:
                    for found in read_documents(source, self.options, raw):
                        if isinstance(found, FileWarning):
                            self._remark(found)
                            continue
                        yield source, found
                        if raw is None:
                            bar.update(0 if size else 1)
                        elif not raw.closed:
                            bar.move_to(done + raw.tell())
                if source.is_file and counts["documents"] == before:
                    if self.on_bad_document == "stop":
                        raise DataError(f"{source.path} holds no document. {SKIP}")
                    counts[EMPTY] += 1
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
