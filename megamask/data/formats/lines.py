"""Read lines of UTF-8 text with their positions; a line that cannot be read is a ``BadDocument``. Memory: one line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ByteStream = io.BufferedIOBase
"""An open file, decompressed while it is read or not."""

BLOCK = 2**16
MAX_DOCUMENT_BYTES = 2**28
"""Largest document: a file without line ends, or a small file that decompresses to a huge one, must not use up the
memory."""
SHOWN = 80
"""Number of characters of a bad record that an error shows."""
MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8. Concatenated files have it inside too."""


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used, and the error that says where it is and why."""

    problem: str
    text: str = ""
    """The line with replacement characters, for formats with records of several lines."""
    ends_file: bool = False
    """Whether the rest of its file is not read, so that more documents may be lost."""
    no_subset: bool = False
    """Whether only its field `split_by` cannot be used."""


@dataclass(frozen=True)
class SubsetText:
    """The text of a record, and the value of its field `split_by`."""

    text: str
    subset: str


@dataclass(frozen=True)
class FileWarning:
    """A warning about a file whose documents are read, but perhaps not as intended. It is not a document."""

    message: str


def zero_byte_problem() -> str:
    """The end of the error for text with a zero byte."""
    return "contains a zero byte: it may be UTF-16 or not text. Convert it to UTF-8."


def too_long_problem() -> str:
    """The end of the error for a document or line that is too long."""
    return f"is longer than {MAX_DOCUMENT_BYTES:,} bytes. Split it into documents."


def utf16_hint(raw: bytes) -> str:
    """The cure for a file that begins with the byte order mark of UTF-16; "" for others."""
    return " It looks like UTF-16: convert it to UTF-8." if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else ""


def read_lines(path: Path, file: ByteStream) -> Iterator[tuple[int, int, str | BadDocument]]:
    """For each line: its first byte (of the decompressed text), its number from 1, and its text or its error.

    A byte order mark at the beginning of a line is dropped.
    """
    at = number = 0
    while raw := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        size = len(raw)
        if size > MAX_DOCUMENT_BYTES:
            text: str | BadDocument = BadDocument(f"{path}, line {number} (byte {at}) {too_long_problem()}")
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(BLOCK)
                size += len(raw)
        else:
            try:
                text = raw.decode("utf-8-sig")
                raw = b""  # or a long line would be in memory twice
            except UnicodeDecodeError as error:
                # after a byte order mark the decoder counts from the mark
                start = error.start + (len(MARK) if raw.startswith(MARK) else 0)
                text = BadDocument(
                    f"{path}, line {number} is not UTF-8: byte {at + start} is 0x{raw[start]:02x}."
                    + (utf16_hint(raw) if number == 1 else ""),
                    raw.decode("utf-8-sig", errors="replace"),
                )
            if isinstance(text, str) and "\0" in text:
                text = BadDocument(f"{path}, line {number} (byte {at}) {zero_byte_problem()}", text)
        yield at, number, text
        at += size
