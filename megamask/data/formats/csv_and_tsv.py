"""Tables of text (.csv with commas, .tsv with tabs): a header, then a document per row.

Fields may be in double quotes and then contain separators, line ends and doubled quotes (RFC 4180). Memory: one row.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from megamask.data.formats import lines as reading
from megamask.data.formats.fields import missing_column, text_field
from megamask.data.formats.lines import BadDocument, ByteStream, FileWarning, SubsetText, read_lines

SEPARATORS = {".csv": ",", ".tsv": "\t"}
OPEN = "starts a quoted field that does not end."
MANY_LINES = 100
"""A row of more lines may have an unbalanced quote."""
_OTHERS = (",", ";", "\t", "|")


def read_delimited(
    path: Path, file: ByteStream, field: str, separator: str, split_by: str | None = None
) -> Iterator[str | SubsetText | BadDocument | FileWarning]:
    """The columns ``field`` and ``split_by`` of each row, without blank lines.

    A warning precedes the first row of many lines.
    """
    faults: list[str] = []

    def texts() -> Iterator[str]:
        for _, _, text in read_lines(path, file):
            if isinstance(text, BadDocument):
                faults.append(text.problem)
            # a line that is not UTF-8 may start or end a quoted field, so the parser gets it too
            yield text.text if isinstance(text, BadDocument) else text

    csv.field_size_limit(reading.MAX_DOCUMENT_BYTES)
    rows = csv.reader(texts(), delimiter=separator, strict=True)
    header: list[str] | None = None
    has_warned = False
    while True:
        begin = rows.line_num + 1
        row, fault = _next(rows)
        problem = faults[0] if faults else f"{path}, line {begin} {fault}" if fault else ""
        faults.clear()
        count = rows.line_num - begin + 1
        if count > MANY_LINES and fault != OPEN and not has_warned:
            has_warned = True
            yield FileWarning(
                f"{path}, line {begin} starts a row of {count:,} lines: a quoted field contains them, or a quote is "
                "unbalanced, so that many rows are read as one. If so, put each field that holds quotes in quotes and "
                "double the quotes inside it."
            )
        if problem:
            # without a header no row can be read
            yield BadDocument(problem, ends_file=header is None or fault == OPEN)
        elif row is None:
            return
        elif header is None:
            header = row if row else None
            names = {"text_field": field} | ({"split_by": split_by} if split_by else {})
            wrong = [setting for setting, name in names.items() if header and header.count(name) != 1]
            if header and wrong:
                yield _bad_header(path, header, names[wrong[0]], separator, wrong[0])
                return
        elif row:
            yield _field(f"{path}, line {begin}", header, row, field, split_by)
        if problem and header is None:
            return


def _next(rows: Iterator[list[str]]) -> tuple[list[str] | None, str]:
    """The next row, or None after the last one; and the error, or ""."""
    try:
        return next(rows, None), ""
    except csv.Error as error:
        reason = str(error)
        if reason == "unexpected end of data":
            return [], OPEN
        if "field limit" in reason:
            return [], reading.too_long_problem()
        return [], f"is not a valid row of a table with quotes: {reason}."


def _field(
    place: str, header: list[str], row: list[str], field: str, split_by: str | None
) -> str | SubsetText | BadDocument:
    if len(row) != len(header):
        return BadDocument(f"{place} must have {len(header)} fields, as the header has, but has {len(row)}.")
    return text_field(place, dict(zip(header, row, strict=True)), field, split_by)


def _bad_header(path: Path, header: list[str], field: str, separator: str, setting: str) -> BadDocument:
    if field in header:
        return BadDocument(f"{path} has {header.count(field)} columns {field!r}. Rename all but one.", ends_file=True)
    other = [mark for mark in _OTHERS if mark != separator and field in separator.join(header).split(mark)]
    more = f" Its separator seems to be {other[0]!r}, but must be {separator!r}: convert the file." if other else ""
    return missing_column(path, field, header, more, setting)
