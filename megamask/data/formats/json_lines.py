"""JSON lines (.jsonl, .ndjson): an object per line. A faulty line loses one document. Memory: one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from megamask.data.formats.fields import text_field
from megamask.data.formats.lines import SHOWN, BadDocument, ByteStream, SubsetText, read_lines
from megamask.errors.json_types import json_kind


def read_json_lines(
    path: Path, file: ByteStream, field: str, split_by: str | None = None
) -> Iterator[str | SubsetText | BadDocument]:
    """The string in ``field`` of each line, and that in ``split_by``. Blank lines are skipped."""
    for at, number, text in read_lines(path, file):
        if isinstance(text, BadDocument):
            yield BadDocument(text.problem)
        elif text and not text.isspace():
            place = f"{path}, line {number} (byte {at})"
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield BadDocument(f"{place} is not valid JSON: {error}. It begins with {text[:SHOWN]!r}.")
                continue
            yield record_text(place, record, text, field, split_by)


def record_text(
    place: str, record: object, source: str, field: str, split_by: str | None = None
) -> str | SubsetText | BadDocument:
    """The text of a parsed value, which must be an object; ``source`` is its JSON."""
    if not isinstance(record, dict):
        return BadDocument(f"{place} must be a JSON object, but is {json_kind(record)}: {source[:SHOWN]!r}.")
    for name in (field, *([split_by] if split_by else ())):
        times = _times(source, name)
        if times > 1:
            return BadDocument(f"{place}: the field {name!r} occurs {times} times. Keep one, or rename the others.")
    return text_field(place, record, field, split_by)


@cache
def _spellings(field: str) -> frozenset[str]:
    """How JSON writers spell the key ``field``."""
    return frozenset((json.dumps(field), json.dumps(field, ensure_ascii=False)))


def _times(source: str, field: str) -> int:
    """How often ``field`` is a key of the object in ``source``, at least 1.

    The parser keeps the last of equal keys. Only objects that may have the key twice are parsed again.
    """
    if sum(map(source.count, _spellings(field))) < 2:
        return 1
    return [key for key, _ in json.loads(source, object_pairs_hook=list)].count(field)
