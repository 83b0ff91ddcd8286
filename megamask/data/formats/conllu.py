"""CoNLL-U files: documents of tagged words, as Universal Dependencies publishes them.

The text consists of the words, with a space after each word without `SpaceAfter=No` and a line for each paragraph
(`# newpar`). A document ends at the next `# newdoc` or at the end of the file. Of the ten columns, the first two, the
fourth (the universal tag) and the last are read. Memory: one document.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megamask.data.pos_tagger import TAG_IDS, TaggedWords

COLUMNS = 10
FORM, TAG, MISC = 1, 3, 9
_NUMBER = re.compile(r"[0-9]{1,9}([.-][0-9]{1,9})?")


@dataclass(frozen=True)
class TaggedDocument:
    """A document whose words have tags. Each word is NFC; the text has no surrounding space."""

    text: str
    words: TaggedWords


@dataclass
class _Document:
    """A document that is being read."""

    text: list[str] = field(default_factory=list)
    words: list[tuple[int, int, int]] = field(default_factory=list)
    length: int = 0
    gap: str = ""
    """The text before the next word."""
    fault: str = ""

    def add(self, forms: list[tuple[str, int]], space: bool) -> None:
        """Add words without a space between them; ``space``: whether one follows."""
        before = self.gap if self.length else ""
        self.text.append(before + "".join(form for form, _ in forms))
        self.length += len(before)
        for form, tag in forms:
            self.words.append((self.length, self.length + len(form), tag))
            self.length += len(form)
        self.gap = " " if space else ""

    def whole(self) -> TaggedDocument | str:
        """The document, or its error."""
        return self.fault or TaggedDocument("".join(self.text), TaggedWords.of(self.words))


def read_conllu(path: Path, lines: Iterable[tuple[int, str]], *, whole_file: bool) -> Iterator[TaggedDocument | str]:
    """The documents of a file whose ``lines`` are (number, text), in order; for one with an error the message.

    ``whole_file`` joins them to one document.
    """
    document = _Document()
    surface: tuple[int, str, bool] | None = None  # of a token of several words: last number, form, space after it
    inside: list[tuple[str, int]] = []
    for number, line in lines:
        line = line.rstrip("\r\n")
        if line.startswith("# newdoc") and not whole_file:
            if document.length or document.fault:
                yield document.whole()
            document = _Document()
        elif line.startswith("# newpar"):
            document.gap = "\n"
        elif not line.strip():
            document.gap = document.gap or " "
        if not line.strip() or line.startswith("#"):
            continue
        columns = line.split("\t")
        problem = _problem(columns)
        if problem:
            document.fault = document.fault or f"{path}, line {number} {problem}"
            continue
        name, form, space = columns[0], _clean(columns[FORM]), "SpaceAfter=No" not in columns[MISC].split("|")
        if "." in name:
            continue  # an empty node, which is not in the text
        if "-" in name:
            surface, inside = (int(name.split("-")[1]), form, space), []
            continue
        tag = TAG_IDS.get(columns[TAG], 0)
        if surface is None:
            document.add([(form, tag)], space)
            continue
        inside.append((form, tag))
        if int(name) >= surface[0]:
            _, written, space = surface
            # "don't" is "do" and "n't", but French "au" is "à" and "le": then all of it has the tag of the first
            parts = inside if "".join(f for f, _ in inside) == written else [(written, inside[0][1])]
            document.add(parts, space)
            surface = None
    if document.length or document.fault:
        yield document.whole()


def _clean(form: str) -> str:
    return unicodedata.normalize("NFC", form.replace("\0", " ")).strip()


def _problem(columns: list[str]) -> str:
    """The error of a line, to follow its number; "" if there is none."""
    if len(columns) != COLUMNS:
        return f"must have {COLUMNS} columns with tabs between them, as CoNLL-U has, but has {len(columns)}."
    if not _NUMBER.fullmatch(columns[0]):
        return f"must begin with the number of a word, but begins with {columns[0]!r}."
    if not _clean(columns[FORM]):
        return "has a word without a letter."
    if columns[TAG] != "_" and columns[TAG] not in TAG_IDS:
        return f"has the tag {columns[TAG]!r}, which is not a universal tag ({', '.join(TAG_IDS)})."
    return ""
