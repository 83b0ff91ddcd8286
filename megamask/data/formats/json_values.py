"""JSON (.json): a list of objects, or a sequence of objects, each on one line or on several.

After an error outside a list, reading continues at the next line. Inside a list the next object cannot be found: the
rest of the file is not read, and the error says so. Memory: two objects.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

from megamask.data.formats import lines as reading
from megamask.data.formats.json_lines import record_text
from megamask.data.formats.lines import BLOCK, SHOWN, BadDocument, ByteStream, SubsetText, utf16_hint

_GAP = re.compile("[ \t\r\n\ufeff]*")
_GAP_IN_LIST = re.compile("[ \t\r\n\ufeff,]*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""A byte that is not UTF-8, as the error handler `surrogateescape` decodes it. No valid UTF-8 decodes to it."""
_REST = "The rest of the file is not read."


def read_json_documents(
    path: Path, file: ByteStream, field: str, split_by: str | None = None
) -> Iterator[str | SubsetText | BadDocument]:
    """The string in ``field`` of each object, and that in ``split_by``."""
    text = _Text(file)
    in_list = False
    while text.skip(_GAP_IN_LIST if in_list else _GAP):
        if text.here == ("]" if in_list else "["):
            text.advance(text.at + 1)
            in_list = not in_list
            continue
        place = f"{path}, line {text.line} (byte {text.byte})"
        start = text.byte
        value, source, fault = text.value()
        wrong = _NOT_UTF8.search(source)
        if wrong:
            at = start + len(_raw(source[: wrong.start()]))
            byte = _raw(wrong[0])
            problem = f"{place} is not UTF-8: byte {at} is 0x{byte[0]:02x}.{utf16_hint(_raw(source[:2]))}"
        else:
            problem = f"{place} {fault}" if fault else ""
        if fault and in_list:
            yield BadDocument(f"{problem} {_REST}", ends_file=True)
            return
        yield BadDocument(problem) if problem else record_text(place, value, source, field, split_by)
        if fault:
            text.skip_line()
    if in_list:
        yield BadDocument(f"{path} is corrupt or truncated: its list does not end.", ends_file=True)


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


class _Text:
    """The rest of a file, of which ``text[at:]`` is in memory."""

    def __init__(self, file: ByteStream):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder()
        self._ended = False
        self.text, self.at = "", 0
        self.line, self.byte = 1, 0
        """The position of ``at`` in the file."""

    @property
    def here(self) -> str:
        """The next character."""
        return self.text[self.at]

    def advance(self, to: int) -> None:
        """Move to the character ``to`` of ``text``."""
        passed = self.text[self.at : to]
        self.line += passed.count("\n")
        self.byte += len(_raw(passed))
        self.at = to

    def skip(self, gap: re.Pattern[str]) -> bool:
        """Move past the gap; False if the file ends there."""
        while True:
            match = gap.match(self.text, self.at)
            assert match is not None
            self.advance(match.end())
            if self.at < len(self.text):
                return True
            if not self._read():
                return False

    def skip_line(self) -> None:
        """Move to the next line."""
        while (end := self.text.find("\n", self.at)) < 0:
            self.advance(len(self.text))
            if not self._read():
                return
        self.advance(end + 1)

    def value(self) -> tuple[object, str, str]:
        """The value that begins here, its JSON, and the error, or "" if there is none.

        The position does not move if there is an error.
        """
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                if not self._may_be_cut(error) or not self._read():
                    source = self.text[self.at : self.at + SHOWN]
                    return None, source, f"is not valid JSON: {_reason(error)}. It begins with {source!r}."
            else:
                # a number may continue in the next block
                if end < len(self.text) or isinstance(value, (dict, list)) or not self._read():
                    source = self.text[self.at : end]
                    self.advance(end)
                    return value, source, ""
            if len(self.text) - self.at > reading.MAX_DOCUMENT_BYTES:
                return None, self.text[self.at : self.at + SHOWN], reading.too_long_problem()

    def _may_be_cut(self, error: Exception) -> bool:
        """Whether more text may complete the value: the error is at the end, or in a string without an end."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16

    def _read(self) -> bool:
        """Read a block; False at the end of the file."""
        if self._ended:
            return False
        self.text, self.at = self.text[self.at :], 0
        raw = self._file.read(max(BLOCK, len(self.text)))
        self._ended = not raw
        self.text += self._decoder.decode(raw, final=self._ended)
        return True


def _reason(error: Exception) -> str:
    """The message without the position, which counts from the beginning of a block."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)
