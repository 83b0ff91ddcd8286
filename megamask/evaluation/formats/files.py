"""Lines and JSON of benchmark files, compressed or not; a line that cannot be read becomes a problem with its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamask.data.formats.compression import COMPRESSIONS, CORRUPT, open_compressed
from megamask.data.formats.lines import BadDocument, read_lines
from megamask.storage.strict_json import parse_json

QUOTED = 80
"""Characters of a faulty line that a problem shows."""


def existing_file(folder: Path, *names: str) -> Path | None:
    """The first of ``names`` that is a file in ``folder``, as it is or compressed."""
    paths = (folder / f"{name}{ending}" for name in names for ending in ("", *COMPRESSIONS))
    return next((path for path in paths if path.is_file()), None)


def whole_text(path: Path) -> str:
    """The text of a file. Raises OSError, one of CORRUPT, or UnicodeDecodeError."""
    with path.open("rb") as raw:
        return open_compressed(path, raw).read().decode("utf-8-sig")


def text_lines_of(path: Path) -> Iterator[tuple[str, str | None]]:
    """The place of each line and its text without the line end, or its problem and None. Blank lines are skipped."""
    try:
        with path.open("rb") as raw:
            for _, number, text in read_lines(path, open_compressed(path, raw)):
                if isinstance(text, BadDocument):
                    yield text.problem, None
                elif text and not text.isspace():
                    yield f"{path}, line {number}", text.rstrip("\r\n")
    except CORRUPT as error:
        yield f"{path} is damaged or was truncated: {error}.", None
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror or error}.", None


def json_objects_of(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The place of each line of a file of JSON lines and its object, or its problem and None."""
    for place, text in text_lines_of(path):
        if text is None:
            yield place, None
            continue
        try:
            value = parse_json(text)
        except ValueError as error:
            yield f"{place} is not valid JSON: {error}. It begins with {text[:QUOTED]!r}.", None
            continue
        if isinstance(value, dict):
            yield place, value
        else:
            yield f"{place} must be a JSON object, but is {type(value).__name__}.", None


def tab_separated_rows_of(
    path: Path, header: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, str | None] | None]]:
    """The place of each row of a file of GLUE and its columns by name, or its problem and None.

    GLUE's files have tabs between the columns and no quoting: a double quote is a character of the text. Without
    ``header`` the first line names the columns. A column that a row lacks is None.
    """
    names = header
    for place, text in text_lines_of(path):
        if text is None:
            yield place, None
            continue
        values = text.split("\t")
        if not names:
            names = tuple(values)
            continue
        yield place, dict(zip(names, [*values, *[None] * (len(names) - len(values))], strict=False))
