"""Documents of a preparation: read, cleaned, deduplicated, counted, and assigned to training or validation."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from megamask.data.formats.conllu import TaggedDocument
from megamask.data.formats.lines import BadDocument, FileWarning, SubsetText
from megamask.data.input_file import InputFile
from megamask.data.pos_tagger import TaggedWords
from megamask.data.read_documents import ReadOptions, document_hash, is_validation, normalize_text, read_documents
from megamask.data.shards import Split
from megamask.data.subsets import SubsetCounts, TextSample, tokenizer_quotas
from megamask.errors import DataError, raise_all
from megamask.runtime.progress_bar import ProgressBar

FEW = 10_000
"""`bad_share` is a share of at least this many documents."""
REASONS = ("bad", "blank", "duplicate")
"""Why a document is not kept."""
SKIP = "(`on_bad_document` skip counts it and continues, up to `bad_share`.)"
EMPTY = "empty_files"
"""The count of files without a document."""
CUT = "cut_files"
"""The count of files that are not read to their end because of a fault."""
NAMED = 10
"""Number of skipped documents that are printed; ten times as many of those that end their file."""
MANY_LINES = 1000
"""A document of a .txt file with more lines may be meant as one document per line."""


ReadDocument = str | SubsetText | TaggedDocument
"""A document as a reader yields it."""


def print_warning(line: str) -> None:
    """Write a line to stderr. A failure to write is ignored: it must not end the work."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Document:
    """A document that is kept."""

    digest: bytes
    split: Split
    text: str
    words: TaggedWords | None
    """Its words with their tags, if the input has tags."""
    source: str
    """The name of its input."""
    subset: str = ""
    """The value of its field `split_by`, if there are subsets."""


@dataclass(frozen=True)
class Corpus:
    """The inputs, and the rules by which documents are kept."""

    sources: Sequence[InputFile]
    options: ReadOptions
    on_bad_document: Literal["stop", "skip"]
    bad_share: float
    valid_share: float
    warned: set[str] = field(default_factory=set)
    """Skipped documents that were printed: the text may be read twice."""
    warnings: set[str] = field(default_factory=set)
    """Warnings about files that were printed."""

    def documents(self, counts: Counter[str], label: str, subsets: SubsetCounts | None = None) -> Iterator[Document]:
        """Each document that is kept. ``counts`` gets the number of all, and of those dropped by reason.

        Uses about 100 bytes per document. Raises DataError at a bad document, or at too many. If there are subsets,
        ``subsets`` counts them; records without one, and subsets without a document in one of the splits, are counted
        and raise DataError at the end.
        """
        counts.update(dict.fromkeys(("documents", *REASONS, EMPTY, CUT), 0))
        split_by = self.options.split_by
        subsets = subsets or (SubsetCounts(split_by) if split_by else None)
        seen: set[bytes] = set()
        for source, document in self._read(label, counts):
            counts["documents"] += 1
            if isinstance(document, BadDocument):
                counts["bad"] += 1
                counts[CUT] += document.ends_file and source.is_file
                if subsets and document.no_subset and self.on_bad_document == "stop":
                    subsets.reject(document.problem)
                else:
                    self._skip(document, counts)
                continue
            words, text, subset = _contents(document)
            self._check_lines(source, text)
            digest = document_hash(text)
            if not text or digest in seen:
                counts["duplicate" if text else "blank"] += 1
                if subsets:
                    subsets.dropped[subset] += 1
            else:
                seen.add(digest)
                split: Split = "valid" if is_validation(digest, self.valid_share) else "train"
                if subsets:
                    subsets.add(subset, split, text)
                yield Document(digest, split, text, words, source.name, subset)
        raise_all(DataError, subsets.problems(self.valid_share) if subsets else [])

    def _check_lines(self, source: InputFile, text: str) -> None:
        """Warn if a document seems to be many documents, one per line."""
        count = text.count("\n") + 1
        if source.kind == ".txt" and self.options.documents == "blocks" and count > MANY_LINES:
            self._warn(
                "lines",
                f"{source.path} has a document of {count:,} lines without a blank line between them. "
                "`--documents lines` makes each line a document.",
            )

    def _warn(self, kind: str, message: str) -> None:
        """Print ``message``, once for each ``kind``."""
        if kind not in self.warnings:
            self.warnings.add(kind)
            print_warning(message)

    def _skip(self, bad: BadDocument, counts: Counter[str]) -> None:
        """Raise DataError unless the document may be skipped."""
        if self.on_bad_document == "stop":
            raise DataError(f"{bad.problem} {SKIP}")
        if counts["bad"] > self.bad_share * max(counts["documents"], FEW):
            raise DataError(
                f"{bad.problem} {counts['bad']} of the {counts['documents']} documents read so far cannot be used, "
                f"more than `bad_share` ({self.bad_share:g}) allows."
            )
        if bad.problem not in self.warned and len(self.warned) < (10 * NAMED if bad.ends_file else NAMED):
            self.warned.add(bad.problem)
            print_warning(f"Skipped: {bad.problem}")

    def _read(self, label: str, counts: Counter[str]) -> Iterator[tuple[InputFile, ReadDocument | BadDocument]]:
        """Every document with its source. A progress bar shows the number of bytes read.

        Counts files without a document; raises DataError at one unless bad documents are skipped.
        """
        size = sum(source.size for source in self.sources)
        done = 0
        with ProgressBar(label, size or None, "byte" if size else "document") as bar:
            for source in self.sources:
                before = counts["documents"]
                with source.open() as raw:
                    for document in read_documents(source, self.options, raw):
                        if isinstance(document, FileWarning):
                            self._warn(document.message, document.message)
                            continue
                        yield source, document
                        if raw is None:
                            bar.update(0 if size else 1)
                        elif not raw.closed:
                            bar.move_to(done + raw.tell())
                if source.is_file and counts["documents"] == before:
                    if self.on_bad_document == "stop":
                        raise DataError(f"{source.path} contains no documents. {SKIP}")
                    counts[EMPTY] += 1
                done += source.size

    def sample(self, size: int, alpha: float = 1.0) -> list[str]:
        """Training documents of ``size`` bytes in all, those with the smallest hashes: random and repeatable.

        Subsets, if there are any, are read once more before, and get shares by ``alpha`` (`tokenizer_quotas`).
        """
        quotas = {"": size}
        if self.options.split_by:
            subsets = SubsetCounts(self.options.split_by)
            deque(self.documents(Counter(), "counting subsets", subsets), maxlen=0)
            quotas = tokenizer_quotas(subsets.train_bytes, size, alpha)
        samples = {subset: TextSample(quota) for subset, quota in quotas.items()}
        for document in self.documents(Counter(), "reading for the tokenizer"):
            if document.split == "train":
                samples[document.subset].add(document.digest, document.text)
        if not self.options.split_by:
            return samples[""].texts()
        return [text for sample in samples.values() for text in sample.repeated()]


def _contents(document: ReadDocument) -> tuple[TaggedWords | None, str, str]:
    """The tagged words of a document, if it has any, its clean text and its subset."""
    if isinstance(document, TaggedDocument):
        return document.words, document.text, ""
    if isinstance(document, SubsetText):
        return None, normalize_text(document.text), document.subset
    return None, normalize_text(document), ""
