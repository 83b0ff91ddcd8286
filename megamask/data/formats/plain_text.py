"""Plain text (.txt): a document per block between blank lines, per line, or per file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megamask.data.formats import lines as reading
from megamask.data.formats.lines import BLOCK, BadDocument, ByteStream, read_lines


def read_blocks(path: Path, file: ByteStream) -> Iterator[str | BadDocument]:
    """A document per block of lines between blank lines."""
    block: list[str] = []
    bad: BadDocument | None = None
    size = 0
    for at, number, text in _lines(path, file):
        if isinstance(text, BadDocument):
            bad = bad or BadDocument(text.problem)
        elif text and not text.isspace():
            size += len(text)
            if size > reading.MAX_DOCUMENT_BYTES:
                bad = bad or BadDocument(
                    f"{path}: the document up to line {number} (byte {at}) {reading.too_long_problem()}"
                )
            if bad:
                block.clear()
            else:
                block.append(text)
        elif block or bad:
            yield bad or "".join(block)
            block, bad, size = [], None, 0
    if block or bad:
        yield bad or "".join(block)


def _lines(path: Path, file: ByteStream) -> Iterator[tuple[int, int, str | BadDocument]]:
    """As ``read_lines``, but a "\\r" inside a line ends a line too: it may be the only line end of a file.

    Byte and number are those of the whole line.
    """
    for at, number, text in read_lines(path, file):
        if isinstance(text, BadDocument) or "\r" not in text:
            yield at, number, text
        else:
            content = text.rstrip("\r\n")
            *parts, last = content.split("\r")
            for part in parts:
                yield at, number, part + "\r"
            yield at, number, last + text[len(content) :]


def read_single_lines(path: Path, file: ByteStream) -> Iterator[str | BadDocument]:
    """A document per line, without blank lines."""
    for _, _, text in read_lines(path, file):
        if isinstance(text, BadDocument):
            yield BadDocument(text.problem)
        else:
            # Python reads a file with "\r" as its only line end as one line
            yield from (part for part in text.split("\r") if part and not part.isspace())


def read_whole_file(path: Path, file: ByteStream) -> str | BadDocument:
    """The file as one document."""
    parts, size = [], 0
    while size <= reading.MAX_DOCUMENT_BYTES and (part := file.read(BLOCK)):  # a single read would read the whole file
        parts.append(part)
        size += len(part)
    if size > reading.MAX_DOCUMENT_BYTES:
        return BadDocument(f"{path} {reading.too_long_problem()}")
    raw = b"".join(parts)
    parts.clear()
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
        return BadDocument(f"{path} {reading.zero_byte_problem()}") if "\0" in text else text
    except UnicodeDecodeError as error:
        return BadDocument(
            f"{path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}.{reading.utf16_hint(raw)}"
        )
