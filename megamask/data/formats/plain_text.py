"""Plain text (.txt): a document per block between blank lines, per line, or per file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megamask.data.formats import lines as reading
from megamask.data.formats.lines import BLOCK, Bad, Bytes, read_lines


def read_blocks(path: Path, file: Bytes) -> Iterator[str | Bad]:
    """A document per block of lines; blank lines stand between blocks."""
    block: list[str] = []
    bad: Bad | None = None
    size = 0
    for at, number, text in _lines(path, file):
        if isinstance(text, Bad):
            bad = bad or Bad(text.problem)
        elif text and not text.isspace():
            size += len(text)
            if size > reading.LONGEST:
                bad = bad or Bad(f"{path}: the document up to line {number} (byte {at}) {reading.too_long()}")
            if bad:
                block.clear()
            else:
                block.append(text)
        elif block or bad:
            yield bad or "".join(block)
            block, bad, size = [], None, 0
    if block or bad:
        yield bad or "".join(block)


def _lines(path: Path, file: Bytes) -> Iterator[tuple[int, int, str | Bad]]:
    """As ``lines``, but a "\\r" inside a line ends a line too: a file may have no other line ends.

    Byte and number are those of the whole line.
    """
    for at, number, text in read_lines(path, file):
        if isinstance(text, Bad) or "\r" not in text:
            yield at, number, text
        else:
            content = text.rstrip("\r\n")
            *parts, last = content.split("\r")
            for part in parts:
                yield at, number, part + "\r"
            yield at, number, last + text[len(content) :]


def read_single_lines(path: Path, file: Bytes) -> Iterator[str | Bad]:
    """A document per line; blank lines are none."""
    for _, _, text in read_lines(path, file):
        if isinstance(text, Bad):
            yield Bad(text.problem)
        else:
            # a file in which "\r" alone ends a line is one line to Python
            yield from (part for part in text.split("\r") if part and not part.isspace())


def read_whole_file(path: Path, file: Bytes) -> str | Bad:
    """The file as one document."""
    parts, size = [], 0
    while size <= reading.LONGEST and (part := file.read(BLOCK)):  # one read would take all that it may give
        parts.append(part)
        size += len(part)
    if size > reading.LONGEST:
        return Bad(f"{path} {reading.too_long()}")
    raw = b"".join(parts)
    parts.clear()
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
        return Bad(f"{path} {reading.zero_byte()}") if "\0" in text else text
    except UnicodeDecodeError as error:
        return Bad(f"{path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}.{reading.utf16(raw)}")
